#include "agent/daemon/console_relay.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "common/log.h"
#include "common/unix_socket.h"

namespace baton::daemon {
namespace {

constexpr size_t kTail = 8192;
constexpr size_t kMaxInput = 65536;
// Streams whose input came before they were opened; more than a few at once means that none of them will be.
constexpr size_t kMaxEarly = 16;

std::string TailOf(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return "";
  off_t size = ::lseek(fd.get(), 0, SEEK_END);
  off_t from = std::max<off_t>(0, size - static_cast<off_t>(kTail));
  std::string text(static_cast<size_t>(std::max<off_t>(0, size - from)), '\0');
  ssize_t n = ::pread(fd.get(), text.data(), text.size(), from);
  text.resize(n > 0 ? static_cast<size_t>(n) : 0);
  return text;
}

}  // namespace

ConsoleRelay::ConsoleRelay(Sink sink)
    : sink_(std::move(sink)), wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  thread_ = std::thread([this] { Run(); });
}

ConsoleRelay::~ConsoleRelay() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  Wake();
  thread_.join();
}

void ConsoleRelay::Wake() {
  uint64_t one = 1;
  [[maybe_unused]] ssize_t n = ::write(wake_.get(), &one, sizeof(one));
}

absl::Status ConsoleRelay::Open(uint64_t id, const std::string& vm, const VmPaths& paths) {
  UniqueFd fresh;
  {
    std::lock_guard lock(mutex_);
    if (streams_.count(id) != 0)
      return Error(absl::StatusCode::kAlreadyExists, "console stream {} exists", id);
    auto line = lines_.find(vm);
    if (line == lines_.end()) {
      auto connected = ConnectUnix(paths.console, Deadline::After(std::chrono::seconds(2)));
      if (!connected.ok()) return Annotate(connected.status(), "the console of VM " + vm);
      line = lines_.emplace(vm, Line()).first;
      line->second.fd = *std::move(connected);
    }
    line->second.streams.insert(id);
    Stream& stream = streams_[id];
    stream.vm = vm;
    if (auto early = early_.find(id); early != early_.end()) {
      line->second.input += early->second;
      early_.erase(early);
    }
    if (std::string tail = TailOf(paths.console_log); !tail.empty()) Deliver(id, stream, tail);
  }
  Wake();
  return absl::OkStatus();
}

void ConsoleRelay::OnData(const v1::ConsoleData& data) {
  {
    std::lock_guard lock(mutex_);
    auto stream = streams_.find(data.stream());
    if (stream == streams_.end()) {
      if (data.close()) {
        early_.erase(data.stream());
      } else if (early_[data.stream()].size() + data.data().size() <= kMaxInput) {
        early_[data.stream()] += data.data();
      }
      // Numbers of streams grow, so the first is the oldest.
      if (early_.size() > kMaxEarly) early_.erase(early_.begin());
      return;
    }
    auto line = lines_.find(stream->second.vm);
    if (line != lines_.end() && !data.data().empty()) {
      if (line->second.input.size() + data.data().size() > kMaxInput) {
        CloseStream(data.stream(), "the guest does not read its console; input is lost");
      } else {
        line->second.input += data.data();
      }
    }
    if (data.close() && streams_.count(data.stream()) != 0) {
      streams_.erase(data.stream());
      if (line != lines_.end()) {
        line->second.streams.erase(data.stream());
        if (line->second.streams.empty()) lines_.erase(line);
      }
    }
  }
  Wake();
}

void ConsoleRelay::CloseAll() {
  {
    std::lock_guard lock(mutex_);
    streams_.clear();
    lines_.clear();
    early_.clear();
  }
  Wake();
}

void ConsoleRelay::Deliver(uint64_t id, Stream& stream, const std::string& data) {
  v1::ConsoleData message;
  message.set_stream(id);
  if (stream.dropped > 0) message.set_data(fmt::format("\r\n[{} bytes of output lost]\r\n", stream.dropped));
  *message.mutable_data() += data;
  if (sink_(message)) {
    stream.dropped = 0;
  } else {
    stream.dropped += data.size();
  }
}

void ConsoleRelay::CloseStream(uint64_t id, const std::string& error) {
  auto stream = streams_.find(id);
  if (stream == streams_.end()) return;
  v1::ConsoleData message;
  message.set_stream(id);
  message.set_close(true);
  message.set_error(error);
  sink_(message);
  if (auto line = lines_.find(stream->second.vm); line != lines_.end()) line->second.streams.erase(id);
  streams_.erase(stream);
}

void ConsoleRelay::CloseLine(const std::string& vm, const std::string& error) {
  auto line = lines_.find(vm);
  if (line == lines_.end()) return;
  std::set<uint64_t> streams = line->second.streams;
  for (uint64_t id : streams) CloseStream(id, error);
  lines_.erase(vm);
}

void ConsoleRelay::ReadLine(const std::string& vm) {
  Line& line = lines_[vm];
  char buffer[4096];
  ssize_t n = ::recv(line.fd.get(), buffer, sizeof(buffer), MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) {
    CloseLine(vm, "the console of the VM closed: it ended or moved to another host");
    return;
  }
  for (uint64_t id : line.streams) Deliver(id, streams_[id], std::string(buffer, static_cast<size_t>(n)));
}

void ConsoleRelay::WriteLine(Line& line) {
  ssize_t n = ::send(line.fd.get(), line.input.data(), line.input.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
  if (n > 0) line.input.erase(0, static_cast<size_t>(n));
}

void ConsoleRelay::Run() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    // Descriptors of lines may be closed (and reused) by others while poll waits; what it says is therefore
    // only a hint, and every read and write below is non-blocking on the line as it is then.
    std::vector<pollfd> polls = {{wake_.get(), POLLIN, 0}};
    std::vector<std::string> names;
    for (const auto& [vm, line] : lines_) {
      polls.push_back({line.fd.get(), static_cast<short>(POLLIN | (line.input.empty() ? 0 : POLLOUT)), 0});
      names.push_back(vm);
    }
    lock.unlock();
    int n = ::poll(polls.data(), polls.size(), -1);
    lock.lock();
    if (n < 0) continue;
    uint64_t ignored = 0;
    if (polls[0].revents != 0 && ::read(wake_.get(), &ignored, sizeof(ignored)) < 0) continue;
    for (size_t i = 0; i < names.size(); ++i) {
      auto line = lines_.find(names[i]);
      if (line == lines_.end() || line->second.fd.get() != polls[i + 1].fd) continue;
      if ((polls[i + 1].revents & POLLOUT) != 0) WriteLine(line->second);
      if ((polls[i + 1].revents & (POLLIN | POLLHUP | POLLERR)) != 0) ReadLine(names[i]);
    }
    std::erase_if(lines_, [](const auto& entry) { return entry.second.streams.empty(); });
  }
}

}  // namespace baton::daemon
