#include "agent/vmm/qmp/qmp_client.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>

#include "common/log.h"
#include "common/unix_socket.h"

namespace baton::vmm {
namespace {

using nlohmann::json;

// A member of `object` as a string, or "".
int64_t IntegerAt(const json& object, const char* key) {
  if (!object.is_object()) return 0;
  auto it = object.find(key);
  return it != object.end() && it->is_number_integer() ? it->get<int64_t>() : 0;
}

int IntAt(const json& object, const char* key) { return static_cast<int>(IntegerAt(object, key)); }

// QEMU stamps events with the real time; this is the monotonic time of that moment.
int64_t EventTime(const json& event) {
  const int64_t now = MonotonicNs();
  auto stamp = event.find("timestamp");
  if (stamp == event.end() || !stamp->is_object()) return now;
  const int64_t real_now = std::chrono::duration_cast<std::chrono::nanoseconds>(
                               std::chrono::system_clock::now().time_since_epoch())
                               .count();
  const int64_t second = IntegerAt(*stamp, "seconds");
  const int64_t age = real_now - (second * 1000000 + IntegerAt(*stamp, "microseconds")) * 1000;
  constexpr int64_t kOldest = 10'000'000'000;
  return age >= 0 && age < kOldest ? now - age : now;
}

std::string Dump(const json& value) { return value.dump(-1, ' ', false, json::error_handler_t::replace); }

}  // namespace

std::string StringAt(const json& object, const char* key) {
  if (!object.is_object()) return "";
  auto it = object.find(key);
  return it != object.end() && it->is_string() ? it->get<std::string>() : "";
}

absl::StatusOr<std::unique_ptr<QmpClient>> QmpClient::Connect(const std::string& path, Deadline deadline) {
  ASSIGN_OR_RETURN(UniqueFd fd, ConnectUnix(path, deadline));
  std::unique_ptr<QmpClient> client(new QmpClient(std::move(fd)));
  if (!client->stop_) return ErrnoError(errno, "eventfd");
  client->reader_ = std::thread([raw = client.get()] { raw->Read(); });
  RETURN_IF_ERROR(client->Negotiate(deadline));
  return client;
}

QmpClient::QmpClient(UniqueFd fd) : fd_(std::move(fd)), stop_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

QmpClient::~QmpClient() {
  uint64_t one = 1;
  (void)!::write(stop_.get(), &one, sizeof(one));
  if (reader_.joinable()) reader_.join();
}

absl::Status QmpClient::Negotiate(Deadline deadline) {
  {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_until(lock, deadline.when(), [&] { return greeting_ || !broken_.ok(); })) {
      return absl::DeadlineExceededError(
          "QEMU's monitor does not greet (QEMU hangs, or another client is connected)");
    }
    if (!greeting_) return broken_;
    RETURN_IF_ERROR(*greeting_);
  }
  return Execute("qmp_capabilities", json::object(), deadline).status();
}

absl::Status QmpClient::SendLine(const std::string& line, Deadline deadline, int fd) {
  std::lock_guard lock(send_mutex_);
  size_t sent = 0;
  while (sent < line.size()) {
    iovec iov{const_cast<char*>(line.data()) + sent, line.size() - sent};
    msghdr header{};
    header.msg_iov = &iov;
    header.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    if (fd >= 0 && sent == 0) {
      header.msg_control = control;
      header.msg_controllen = sizeof(control);
      cmsghdr* cmsg = CMSG_FIRSTHDR(&header);
      cmsg->cmsg_level = SOL_SOCKET;
      cmsg->cmsg_type = SCM_RIGHTS;
      cmsg->cmsg_len = CMSG_LEN(sizeof(int));
      std::memcpy(CMSG_DATA(cmsg), &fd, sizeof(int));
    }
    ssize_t n = ::sendmsg(fd_.get(), &header, MSG_NOSIGNAL);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN) {
        RETURN_IF_ERROR(WaitFd(fd_.get(), POLLOUT, deadline, "QEMU's monitor"));
        continue;
      }
      return Error(absl::StatusCode::kUnavailable, "QEMU's monitor: {}", std::strerror(errno));
    }
    sent += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::StatusOr<json> QmpClient::Execute(const std::string& command, const json& arguments, Deadline deadline,
                                        int fd) {
  Pending pending;
  uint64_t id;
  {
    std::lock_guard lock(mutex_);
    if (!broken_.ok()) return Annotate(broken_, command);
    id = next_id_++;
    calls_[id] = &pending;
  }
  json message{{"execute", command}, {"id", id}};
  if (!arguments.empty()) message["arguments"] = arguments;
  absl::Status sent = SendLine(Dump(message) + "\n", deadline, fd);
  std::unique_lock lock(mutex_);
  if (sent.ok()) {
    changed_.wait_until(lock, deadline.when(), [&] { return pending.answer || !broken_.ok(); });
  }
  calls_.erase(id);
  if (!sent.ok()) return Annotate(sent, command);
  if (!pending.answer) {
    if (!broken_.ok()) return Annotate(broken_, command);
    return Error(absl::StatusCode::kDeadlineExceeded, "{}: QEMU's monitor does not answer in time", command);
  }
  json answer = std::move(*pending.answer);
  lock.unlock();
  if (auto error = answer.find("error"); error != answer.end()) {
    std::string words = StringAt(*error, "desc");
    return Error(absl::StatusCode::kFailedPrecondition, "{}: QEMU refuses: {}", command,
                 words.empty() ? Dump(*error) : words);
  }
  return std::move(answer["return"]);
}

uint64_t QmpClient::LastEvent() const {
  std::lock_guard lock(mutex_);
  return event_count_;
}

absl::StatusOr<QmpEvent> QmpClient::WaitEvent(uint64_t after,
                                              const std::function<bool(const QmpEvent&)>& wanted,
                                              Deadline deadline) {
  std::unique_lock lock(mutex_);
  for (;;) {
    for (const QmpEvent& event : events_) {
      if (event.sequence <= after) continue;
      after = event.sequence;
      if (wanted(event)) return event;
    }
    if (!broken_.ok()) return broken_;
    if (changed_.wait_until(lock, deadline.when()) == std::cv_status::timeout && event_count_ <= after &&
        broken_.ok()) {
      return absl::DeadlineExceededError("QEMU did not report the event in time");
    }
  }
}

std::optional<QmpEvent> QmpClient::Newest(const std::string& name) const {
  std::lock_guard lock(mutex_);
  for (auto it = events_.rbegin(); it != events_.rend(); ++it) {
    if (it->name == name) return *it;
  }
  return std::nullopt;
}

bool QmpClient::WaitClosed(Deadline deadline) {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline.when(), [&] { return !broken_.ok(); });
}

void QmpClient::Read() {
  std::string buffer;
  absl::Status end;
  while (end.ok()) {
    pollfd items[2] = {{fd_.get(), POLLIN, 0}, {stop_.get(), POLLIN, 0}};
    if (::poll(items, 2, -1) < 0) {
      if (errno == EINTR) continue;
      end = ErrnoError(errno, "poll");
      break;
    }
    if (items[1].revents != 0) {
      end = absl::UnavailableError("the connection to QEMU's monitor is closed");
      break;
    }
    char chunk[4096];
    ssize_t n = ::recv(fd_.get(), chunk, sizeof(chunk), 0);
    if (n < 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      end = Error(absl::StatusCode::kUnavailable, "QEMU's monitor: {}", std::strerror(errno));
      break;
    }
    if (n == 0) {
      end = absl::UnavailableError("QEMU closed its monitor");
      break;
    }
    size_t scanned = buffer.size();
    buffer.append(chunk, static_cast<size_t>(n));
    for (;;) {
      size_t eol = buffer.find('\n', scanned);
      if (eol == std::string::npos) break;
      HandleLine(buffer.substr(0, eol));
      buffer.erase(0, eol + 1);
      scanned = 0;
    }
    if (buffer.size() > kMaxLine) {
      end =
          Error(absl::StatusCode::kUnavailable, "QEMU's monitor sent a line of more than {} bytes", kMaxLine);
    }
    if (buffer.empty()) buffer.shrink_to_fit();
  }
  std::lock_guard lock(mutex_);
  broken_ = end;
  changed_.notify_all();
}

void QmpClient::HandleLine(const std::string& line) {
  json message = json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (message.is_discarded() || !message.is_object()) {
    if (line.find_first_not_of(" \r\t") == std::string::npos) return;
    LOG_WARN("QEMU's monitor sent no JSON object: {}", line.substr(0, 200));
    std::lock_guard lock(mutex_);
    if (!greeting_) {
      greeting_ = absl::FailedPreconditionError("what listens on the monitor socket does not speak QMP");
      changed_.notify_all();
    }
    return;
  }
  std::lock_guard lock(mutex_);
  if (auto greeting = message.find("QMP"); greeting != message.end() && greeting->is_object()) {
    auto version = greeting->find("version");
    if (version != greeting->end() && version->is_object() && version->contains("qemu")) {
      const json& numbers = (*version)["qemu"];
      version_ = {IntAt(numbers, "major"), IntAt(numbers, "minor"), IntAt(numbers, "micro")};
    }
    greeting_ = absl::OkStatus();
  } else if (std::string name = StringAt(message, "event"); !name.empty()) {
    QmpEvent event;
    event.sequence = ++event_count_;
    event.name = std::move(name);
    event.at_ns = EventTime(message);
    auto data = message.find("data");
    event.data = data != message.end() && data->is_object() ? std::move(*data) : json::object();
    events_.push_back(std::move(event));
    if (events_.size() > kMaxEvents) events_.pop_front();
  } else if (auto id = message.find("id"); id != message.end() && id->is_number_unsigned() &&
                                           (message.contains("return") || message.contains("error"))) {
    auto call = calls_.find(id->get<uint64_t>());
    if (call == calls_.end()) return;  // its caller's deadline passed
    call->second->answer = std::move(message);
  } else {
    LOG_WARN("QEMU's monitor sent something unknown: {}", line.substr(0, 200));
    return;
  }
  changed_.notify_all();
}

}  // namespace baton::vmm
