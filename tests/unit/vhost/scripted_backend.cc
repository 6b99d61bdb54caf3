#include "tests/unit/vhost/scripted_backend.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "agent/virtio/inflight_layout.h"

namespace baton::vhost {
namespace {

constexpr auto kPatience = std::chrono::seconds(5);

}  // namespace

ScriptedBackend::ScriptedBackend(ScriptedBackendOptions options)
    : options_(std::move(options)), check_(options_.check) {
  auto listening = UnixListener::Listen(options_.socket);
  EXPECT_TRUE(listening.ok()) << listening.status();
  if (listening.ok()) listen_ = std::move(*listening);
  thread_ = std::thread([this] { Loop(); });
}

ScriptedBackend::~ScriptedBackend() {
  quit_ = true;
  thread_.join();
}

std::vector<ScriptedBackend::Heard> ScriptedBackend::heard() const {
  std::lock_guard lock(mutex_);
  return heard_;
}

std::vector<uint32_t> ScriptedBackend::Of(Request request) const {
  std::vector<uint32_t> out;
  for (const auto& [what, about] : heard()) {
    if (what == request) out.push_back(about);
  }
  return out;
}

bool ScriptedBackend::WaitFor(Request request, size_t count) const {
  for (Deadline deadline = Deadline::After(kPatience); !deadline.Expired();) {
    if (Of(request).size() >= count) return true;
    ::poll(nullptr, 0, 2);
  }
  return false;
}

std::vector<std::pair<uint32_t, uint32_t>> ScriptedBackend::bases() const {
  std::lock_guard lock(mutex_);
  return bases_;
}

std::string ScriptedBackend::loaded() const {
  std::lock_guard lock(mutex_);
  return loaded_;
}

void ScriptedBackend::Loop() {
  while (!quit_) {
    pollfd p{listen_.fd(), POLLIN, 0};
    if (::poll(&p, 1, 20) != 1) continue;
    auto fd = listen_.Accept();
    if (!fd.ok() || !*fd) continue;
    ++connections_;
    Serve(Connection(std::move(*fd)));
    kept_.clear();
    load_fd_.reset();
    channel_.Close();
  }
}

void ScriptedBackend::Serve(Connection connection) {
  while (!quit_) {
    pollfd p{connection.fd(), POLLIN, 0};
    if (::poll(&p, 1, 20) != 1) continue;
    auto message = connection.Receive(/*reply=*/false, Deadline::After(kPatience));
    if (!message.ok()) return;
    {
      std::lock_guard lock(mutex_);
      const uint32_t about = message->As<uint32_t>();
      heard_.emplace_back(message->request(),
                          message->request() == Request::kSetVringKick ? about & 0xff : about);
      if (message->request() == Request::kSetVringBase)
        bases_.emplace_back(about, message->As<VringState>().num);
    }
    if (!Answer(connection, *message).ok()) return;
  }
}

absl::Status ScriptedBackend::Answer(Connection& connection, WireMessage& m) {
  auto reply = [&](std::span<const uint8_t> payload) {
    return connection.Send(m.header.request, kReplyFlags, payload, {}, Deadline::After(kPatience));
  };
  auto reply_u64 = [&](uint64_t value) { return reply(Bytes(value)); };
  switch (m.request()) {
    case Request::kGetFeatures:
      return reply_u64(options_.features);
    case Request::kGetProtocolFeatures:
      return reply_u64(options_.protocol_features);
    case Request::kGetQueueNum:
      return reply_u64(options_.queues);
    case Request::kGetVringBase: {
      VringState state{m.As<VringState>().index, 0};
      return reply(Bytes(state));
    }
    case Request::kGetInflightFd: {
      auto d = m.As<InflightDescription>();
      auto geometry = virtio::MakeInflightGeometry(virtio::InflightKind::kSpec, virtio::RingFormat::kSplit,
                                                   d.num_queues, d.queue_size);
      if (!geometry.ok()) return geometry.status();
      d.mmap_size = geometry->mmap_size;
      UniqueFd fd(::memfd_create("inflight", MFD_CLOEXEC));
      if (::ftruncate(fd.get(), static_cast<off_t>(d.mmap_size)) != 0)
        return absl::InternalError("no region");
      const int raw = fd.get();
      return connection.Send(m.header.request, kReplyFlags, Bytes(d), {&raw, 1}, Deadline::After(kPatience));
    }
    case Request::kSetVringKick: {
      ++kicks_;
      if (m.need_reply()) RETURN_IF_ERROR(reply_u64(0));
      if (kicks_ == options_.leaves_at_kick) return absl::UnavailableError("as told");
      if (kicks_ != options_.speaks_at_kick) return absl::OkStatus();
      const uint64_t features = options_.features;
      return connection.Send(static_cast<uint32_t>(Request::kGetFeatures), kReplyFlags, Bytes(features), {},
                             Deadline::After(kPatience));
    }
    case Request::kSetInflightFd:
      region_ = std::move(m.fds[0]);
      return m.need_reply() ? reply_u64(0) : absl::OkStatus();
    case Request::kGetVringBaseSkipDrain: {
      if (options_.truncates_region && ::ftruncate(region_.get(), 0) != 0)
        return absl::InternalError("the region cannot be made shorter");
      VringState state{m.As<VringState>().index, 0};
      return reply(Bytes(state));
    }
    case Request::kGetConfig: {
      std::vector<uint8_t> payload = m.payload;
      auto header = m.As<ConfigHeader>();
      for (uint32_t i = 0; i < header.size && header.offset + i < options_.config.size(); ++i)
        payload[sizeof header + i] = static_cast<uint8_t>(options_.config[header.offset + i]);
      return reply(payload);
    }
    case Request::kSetLogBase:
      return reply({});
    case Request::kSetDeviceStateFd:
      return Transfer(connection, m);
    case Request::kCheckDeviceState: {
      if (load_fd_) {
        std::string all;
        char buffer[4096];
        for (ssize_t n; (n = ::read(load_fd_.get(), buffer, sizeof buffer)) > 0;)
          all.append(buffer, static_cast<size_t>(n));
        load_fd_.reset();
        std::lock_guard lock(mutex_);
        loaded_ = all;
      }
      return reply_u64(check_);
    }
    case Request::kSetBackendReqFd:
      channel_ = Connection(std::move(m.fds[0]));
      [[fallthrough]];
    default:
      return m.need_reply() ? reply_u64(0) : absl::OkStatus();
  }
}

absl::Status ScriptedBackend::Transfer(Connection& connection, WireMessage& m) {
  if (options_.hangs_up) return absl::UnavailableError("as told");
  const bool load = m.As<TransferState>().direction == 1;
  UniqueFd ours = std::move(m.fds[0]);
  uint64_t answer = options_.transfer;
  int theirs = -1;
  UniqueFd other;
  if (options_.own_channel || options_.regular_file) {
    answer = 0;
    int ends[2];
    if (options_.regular_file) {
      other.reset(::memfd_create("state", MFD_CLOEXEC));
    } else if (::pipe2(ends, O_CLOEXEC) == 0) {
      other.reset(ends[load ? 1 : 0]);
      ours.reset(ends[load ? 0 : 1]);
    }
    theirs = other.get();
  }
  RETURN_IF_ERROR(connection.Send(m.header.request, kReplyFlags, Bytes(answer),
                                  theirs < 0 ? std::span<const int>() : std::span<const int>(&theirs, 1),
                                  Deadline::After(kPatience)));
  other.reset();
  if (answer & kTransferErrorMask) return absl::OkStatus();
  if (load) {
    load_fd_ = std::move(ours);
    return absl::OkStatus();
  }
  if (options_.silent_save) {
    kept_.push_back(std::move(ours));
    return absl::OkStatus();
  }
  for (size_t done = 0; done < options_.state.size();) {
    const ssize_t n = ::write(ours.get(), options_.state.data() + done, options_.state.size() - done);
    if (n <= 0) break;  // the front-end has had enough
    done += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

}  // namespace baton::vhost
