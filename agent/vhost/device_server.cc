#include "agent/vhost/device_server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "agent/vhost/memory_table.h"
#include "agent/vhost/notify.h"
#include "agent/vhost/socket.h"
#include "agent/vhost/wire.h"
#include "agent/virtio/features.h"
#include "common/log.h"
#include "common/unix_socket.h"

namespace baton::vhost {
namespace {

// For one message to be written or read once it has begun.
constexpr Duration kServerMessageTime = std::chrono::seconds(5);
constexpr uint64_t kServerProtocol = pf::kMq | pf::kLogShmfd | pf::kReplyAck | pf::kBackendReq | pf::kConfig;

}  // namespace

// Not in the unnamed namespace: DeviceServer::Impl has them as members.

// The front-end's dirty log (vhost-user.rst, "Migration"): bit i of byte b is page 8 b + i.
class SharedLog final : public virtio::WriteLog {
 public:
  ~SharedLog() override { Unmap(); }

  absl::Status Map(const LogDescription& log, int fd) {
    struct stat st;
    if (::fstat(fd, &st) != 0) return ErrnoError(errno, "SET_LOG_BASE");
    if (log.mmap_offset % 4096 != 0 || log.mmap_size == 0 ||
        log.mmap_offset + log.mmap_size < log.mmap_size ||
        static_cast<uint64_t>(st.st_size) < log.mmap_offset + log.mmap_size)
      return Error(absl::StatusCode::kInvalidArgument, "SET_LOG_BASE: {} bytes at {} of a file of {}",
                   log.mmap_size, log.mmap_offset, st.st_size);
    void* map = ::mmap(nullptr, log.mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                       static_cast<off_t>(log.mmap_offset));
    if (map == MAP_FAILED) return ErrnoError(errno, "SET_LOG_BASE");
    Unmap();
    bytes_ = static_cast<uint8_t*>(map);
    size_ = log.mmap_size;
    return absl::OkStatus();
  }
  void Unmap() {
    if (bytes_) ::munmap(bytes_, size_);
    bytes_ = nullptr;
    size_ = 0;
  }
  void Enable(bool on) { enabled_ = on; }

  // After the bytes were written: whoever takes the bit must see them.
  void Wrote(uint64_t gpa, uint64_t size) override {
    if (!enabled_ || !bytes_ || size == 0) return;
    for (uint64_t page = gpa / 4096; page <= (gpa + size - 1) / 4096; ++page) {
      if (page / 8 >= size_) return;
      __atomic_or_fetch(&bytes_[page / 8], static_cast<uint8_t>(1u << page % 8), __ATOMIC_RELEASE);
    }
  }

 private:
  uint8_t* bytes_ = nullptr;
  uint64_t size_ = 0;
  bool enabled_ = false;
};

struct ServedQueue {
  uint32_t size = 0;
  std::optional<VringAddr> addr;
  uint32_t base = 0;
  UniqueFd kick, call;
  bool enabled = false;
  // Runs while it has one. Disabled it runs and does nothing (vhost-user.rst, "Ring states").
  std::optional<virtio::DeviceQueue> ring;
};

class DeviceServer::Impl {
 public:
  Impl(DeviceServerOptions options, DeviceModel& model) : options_(std::move(options)), model_(model) {}
  ~Impl() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    Wake();
    if (thread_.joinable()) thread_.join();
  }

  absl::Status Begin() {
    wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!wake_) return ErrnoError(errno, "eventfd");
    ASSIGN_OR_RETURN(listener_, UnixListener::Listen(options_.listen_path));
    thread_ = std::thread([this] { Run(); });
    return absl::OkStatus();
  }

  const std::string& path() const { return options_.listen_path; }

  void Post(std::function<void()> function) {
    {
      std::lock_guard lock(mutex_);
      posted_.push_back(std::move(function));
    }
    Wake();
  }

  void ConfigChanged() {
    config_changed_ = true;
    SendConfigChange();
  }

 private:
  void Wake() {
    const uint64_t one = 1;
    if (::write(wake_.get(), &one, sizeof one) < 0 && errno != EAGAIN) LOG_ERROR("eventfd: {}", errno);
  }

  void Run();
  bool RunPosted();
  void OnMessage();
  absl::Status Handle(WireMessage& m);
  absl::Status Apply(WireMessage& m);
  absl::Status ReplyTo(const WireMessage& m, std::span<const uint8_t> payload) {
    return connection_.Send(m.header.request, kReplyFlags, payload, {}, Deadline::After(kServerMessageTime));
  }
  absl::Status Reply64(const WireMessage& m, uint64_t value) { return ReplyTo(m, Bytes(value)); }
  absl::StatusOr<ServedQueue*> Queue(uint64_t index);
  absl::Status TakeMemory(WireMessage& m);
  absl::Status StartQueue(uint32_t index);
  uint32_t StopQueue(uint32_t index);
  void Serve(uint32_t index);
  void Disconnect();
  void SendConfigChange();

  const DeviceServerOptions options_;
  DeviceModel& model_;
  UniqueFd wake_;
  UnixListener listener_;
  std::mutex mutex_;
  std::vector<std::function<void()>> posted_;  // guarded by mutex_
  bool stopping_ = false;                      // guarded by mutex_

  // Of the thread.
  Connection connection_, channel_;
  uint64_t features_ = 0, protocol_ = 0;
  MemoryTable table_;
  std::unique_ptr<virtio::GuestMemory> memory_;
  SharedLog log_;
  std::map<uint32_t, ServedQueue> queues_;
  bool config_changed_ = false;

  std::thread thread_;
};

bool DeviceServer::Impl::RunPosted() {
  std::vector<std::function<void()>> posted;
  {
    std::lock_guard lock(mutex_);
    if (stopping_) return false;
    posted.swap(posted_);
  }
  for (const auto& function : posted) function();
  return true;
}

void DeviceServer::Impl::Run() {
  BlockSignals();
  for (;;) {
    std::vector<pollfd> fds = {
        {wake_.get(), POLLIN, 0},
        {connection_.valid() ? connection_.fd() : listener_.fd(), POLLIN, 0},
        // Answers of the front-end on the back-end's channel: none is asked for; its end is noticed.
        {channel_.valid() ? channel_.fd() : -1, POLLIN, 0}};
    std::vector<uint32_t> kicked;
    for (auto& [index, queue] : queues_) {
      if (!queue.ring || !queue.kick) continue;
      fds.push_back({queue.kick.get(), POLLIN, 0});
      kicked.push_back(index);
    }
    if (::poll(fds.data(), fds.size(), -1) < 0 && errno != EINTR) {
      LOG_ERROR("device {}: poll: {}", options_.name, errno);
      return;
    }
    if (fds[0].revents) {
      uint64_t count;
      (void)!::read(wake_.get(), &count, sizeof count);
      if (!RunPosted()) break;
    }
    for (size_t i = 0; i < kicked.size(); ++i) {
      if (!fds[3 + i].revents) continue;
      uint64_t count;
      if (::read(fds[3 + i].fd, &count, sizeof count) < 0 && errno != EAGAIN) {
        queues_[kicked[i]].kick.reset();
        continue;
      }
      Serve(kicked[i]);
    }
    if (absl::Status intact = options_.ram->CheckIntact(); connection_.valid() && !intact.ok()) {
      LOG_ERROR("device {}: {}", options_.name, Message(intact));
      Disconnect();
      continue;
    }
    if (fds[2].revents) channel_.Close();
    if (!fds[1].revents) continue;
    if (connection_.valid()) {
      OnMessage();
      continue;
    }
    auto accepted = listener_.Accept();
    if (!accepted.ok()) LOG_WARN("device {}: {}", options_.name, Message(accepted.status()));
    if (!accepted.ok() || !*accepted) continue;
    connection_ = Connection(*std::move(accepted));
    model_.OnConnection(true);
  }
  if (connection_.valid()) Disconnect();
}

void DeviceServer::Impl::OnMessage() {
  auto message = connection_.Receive(/*reply=*/false, Deadline::After(kServerMessageTime));
  absl::Status status = message.ok() ? Handle(*message) : message.status();
  if (status.ok()) return;
  if (!absl::IsUnavailable(status)) LOG_WARN("device {}: {}", options_.name, Message(status));
  Disconnect();
}

void DeviceServer::Impl::Disconnect() {
  for (auto& [index, queue] : queues_) StopQueue(index);
  queues_.clear();
  connection_.Close();
  channel_.Close();
  table_.Clear();
  memory_.reset();
  log_.Enable(false);
  log_.Unmap();
  features_ = protocol_ = 0;
  model_.OnConnection(false);
}

absl::StatusOr<ServedQueue*> DeviceServer::Impl::Queue(uint64_t index) {
  if (index >= model_.queues())
    return Error(absl::StatusCode::kInvalidArgument, "ring {} of a device with {}", index, model_.queues());
  return &queues_[static_cast<uint32_t>(index)];
}

// The front-end's table tells which of its addresses is which of the guest's; the memory itself is mapped
// already, as the VM's RAM blocks.
absl::Status DeviceServer::Impl::TakeMemory(WireMessage& m) {
  auto header = m.As<MemTableHeader>();
  std::vector<MemRegion> regions(header.nregions);
  if (!regions.empty())
    std::memcpy(regions.data(), m.payload.data() + sizeof header, regions.size() * sizeof regions[0]);
  RETURN_IF_ERROR(table_.Replace(std::move(regions), std::move(m.fds)));
  ASSIGN_OR_RETURN(std::vector<memory::GpaRange> layout, LayoutFor(table_.Describe(), *options_.ram));
  std::vector<virtio::GuestMemory::Region> mapped;
  for (const memory::GpaRange& range : layout)
    mapped.push_back({range.gpa, range.size, options_.ram->blocks()[range.block].base() + range.offset});
  ASSIGN_OR_RETURN(virtio::GuestMemory made, virtio::GuestMemory::Create(std::move(mapped)));
  auto memory = std::make_unique<virtio::GuestMemory>(std::move(made));
  // VMMs change their map while rings run (firmware that maps itself in and out).
  for (auto& [index, queue] : queues_)
    if (queue.ring) RETURN_IF_ERROR(queue.ring->Remap(*memory));
  memory_ = std::move(memory);
  return absl::OkStatus();
}

absl::Status DeviceServer::Impl::StartQueue(uint32_t index) {
  ServedQueue& queue = queues_[index];
  if (queue.ring) return absl::OkStatus();
  if (!queue.addr || queue.size == 0)
    return Error(absl::StatusCode::kInvalidArgument, "ring {} was started before it was described", index);
  const uint32_t n = queue.size;
  virtio::QueueLayout layout;
  layout.size = static_cast<uint16_t>(n);
  const auto place = [&](uint64_t address, uint64_t size, uint64_t* gpa) {
    auto at = table_.ToGpa(address, size);
    if (at) *gpa = *at;
    return at.has_value();
  };
  if (!place(queue.addr->desc, uint64_t{16} * n, &layout.desc) ||
      !place(queue.addr->avail, 6 + uint64_t{2} * n, &layout.driver) ||
      !place(queue.addr->used, 6 + uint64_t{8} * n, &layout.device))
    return Error(absl::StatusCode::kInvalidArgument, "ring {} is not in guest memory", index);
  virtio::QueueOptions options;
  options.features = features_;
  options.log = &log_;
  if (!memory_) return absl::InvalidArgumentError("a ring was started without memory");
  auto ring = virtio::DeviceQueue::Create(*memory_, layout, options, queue.base);
  if (!ring.ok()) return ring.status();
  if (ring->in_flight() == 0) {
    queue.ring.emplace(*std::move(ring));
    return absl::OkStatus();
  }
  // A process before this one ended with requests that it had taken. What models here do can be done twice.
  auto again = virtio::DeviceQueue::Create(*memory_, layout, options, ring->split()->used_index());
  if (!again.ok()) return again.status();
  queue.ring.emplace(*std::move(again));
  return absl::OkStatus();
}

uint32_t DeviceServer::Impl::StopQueue(uint32_t index) {
  ServedQueue& queue = queues_[index];
  if (queue.ring) {
    model_.BeforeStop(index, *queue.ring);
    queue.base = queue.ring->base();
    queue.ring.reset();
  }
  queue.kick.reset();
  queue.call.reset();
  return queue.base;
}

void DeviceServer::Impl::Serve(uint32_t index) {
  ServedQueue& queue = queues_[index];
  if (!queue.ring || !queue.enabled) return;
  absl::Status status = model_.Serve(index, *queue.ring, *memory_);
  if (queue.ring->NeedsCall() && queue.call) Notify(queue.call.get());
  if (!status.ok()) {
    // A ring that contradicts itself: the guest's fault, and its device's end until it is reset.
    LOG_WARN("device {}: ring {}: {}; it is not served any more", options_.name, index, Message(status));
    queue.enabled = false;
  }
}

absl::Status DeviceServer::Impl::Handle(WireMessage& m) {
  RETURN_IF_ERROR(ValidateRequest(m, protocol_ | kServerProtocol));
  switch (m.request()) {
    case Request::kGetFeatures:
      return Reply64(m, model_.features() | virtio::kVhostFLogAll | virtio::kVhostUserFProtocolFeatures);
    case Request::kGetProtocolFeatures:
      return Reply64(m, kServerProtocol);
    case Request::kGetQueueNum:
      return Reply64(m, model_.queues());
    case Request::kGetVringBase: {
      auto state = m.As<VringState>();
      RETURN_IF_ERROR(Queue(state.index).status());
      state.num = StopQueue(state.index);
      return ReplyTo(m, Bytes(state));
    }
    case Request::kGetConfig: {
      const auto header = m.As<ConfigHeader>();
      if (uint64_t{header.offset} + header.size > model_.config_size()) return ReplyTo(m, {});
      m.payload.resize(sizeof header + header.size);
      model_.ReadConfig(header.offset, std::span(m.payload).subspan(sizeof header, header.size));
      return ReplyTo(m, m.payload);
    }
    case Request::kSetLogBase: {
      if (m.fds.empty()) return absl::InvalidArgumentError("SET_LOG_BASE without a descriptor");
      const auto log = m.As<LogDescription>();
      RETURN_IF_ERROR(log_.Map(log, m.fds[0].get()));
      return ReplyTo(m, Bytes(log));
    }
    default: {
      const absl::Status status = Apply(m);
      if (!m.need_reply()) return status;
      if (!status.ok()) LOG_WARN("device {}: {}", options_.name, Message(status));
      return Reply64(m, status.ok() ? 0 : 1);
    }
  }
}

absl::Status DeviceServer::Impl::Apply(WireMessage& m) {
  switch (m.request()) {
    case Request::kSetFeatures: {
      const uint64_t features = m.As<uint64_t>();
      if (features & ~(model_.features() | virtio::kVhostFLogAll | virtio::kVhostUserFProtocolFeatures))
        return Error(absl::StatusCode::kInvalidArgument, "SET_FEATURES {:#x}: not offered", features);
      log_.Enable((features & virtio::kVhostFLogAll) != 0);
      if (!(features & virtio::kVhostUserFProtocolFeatures))
        for (uint32_t i = 0; i < model_.queues(); ++i) queues_[i].enabled = true;
      features_ = features & ~virtio::kVhostOnly;
      model_.SetFeatures(features_);
      return absl::OkStatus();
    }
    case Request::kSetProtocolFeatures:
      protocol_ = m.As<uint64_t>() & kServerProtocol;
      return absl::OkStatus();
    case Request::kSetMemTable:
      return TakeMemory(m);
    case Request::kSetBackendReqFd:
      channel_ = Connection(std::move(m.fds.at(0)));
      if (config_changed_) SendConfigChange();
      return absl::OkStatus();
    case Request::kSetVringNum: {
      const auto state = m.As<VringState>();
      ASSIGN_OR_RETURN(ServedQueue * queue, Queue(state.index));
      if (state.num == 0 || state.num > 32768)
        return Error(absl::StatusCode::kInvalidArgument, "ring {} of {} entries", state.index, state.num);
      queue->size = state.num;
      return absl::OkStatus();
    }
    case Request::kSetVringBase: {
      const auto state = m.As<VringState>();
      ASSIGN_OR_RETURN(ServedQueue * queue, Queue(state.index));
      queue->base = state.num;
      return absl::OkStatus();
    }
    case Request::kSetVringAddr: {
      const auto addr = m.As<VringAddr>();
      ASSIGN_OR_RETURN(ServedQueue * queue, Queue(addr.index));
      queue->addr = addr;
      return absl::OkStatus();
    }
    case Request::kSetVringEnable: {
      const auto state = m.As<VringState>();
      ASSIGN_OR_RETURN(ServedQueue * queue, Queue(state.index));
      queue->enabled = state.num != 0;
      Serve(state.index);
      return absl::OkStatus();
    }
    case Request::kSetVringKick: {
      const uint64_t index = m.As<uint64_t>() & kVringIndexMask;
      ASSIGN_OR_RETURN(ServedQueue * queue, Queue(index));
      queue->kick = m.fds.empty() ? UniqueFd() : std::move(m.fds[0]);
      if (queue->kick) {
        const int flags = ::fcntl(queue->kick.get(), F_GETFL);
        (void)::fcntl(queue->kick.get(), F_SETFL, flags | O_NONBLOCK);
      }
      RETURN_IF_ERROR(StartQueue(static_cast<uint32_t>(index)));
      // Without waiting for a kick: it may have come before.
      Serve(static_cast<uint32_t>(index));
      return absl::OkStatus();
    }
    case Request::kSetVringCall: {
      ASSIGN_OR_RETURN(ServedQueue * queue, Queue(m.As<uint64_t>() & kVringIndexMask));
      queue->call = m.fds.empty() ? UniqueFd() : std::move(m.fds[0]);
      return absl::OkStatus();
    }
    case Request::kSetConfig: {
      const auto header = m.As<ConfigHeader>();
      if (m.payload.size() < sizeof header + header.size)
        return absl::InvalidArgumentError("SET_CONFIG: shorter than it says");
      return model_.WriteConfig(header.offset,
                                std::span<const uint8_t>(m.payload).subspan(sizeof header, header.size),
                                (header.flags & 1) != 0);
    }
    default:
      return absl::OkStatus();  // SET_OWNER, SET_VRING_ERR: nothing to do
  }
}

void DeviceServer::Impl::SendConfigChange() {
  if (!channel_.valid() || !(protocol_ & pf::kConfig)) return;
  const absl::Status sent = channel_.Send(static_cast<uint32_t>(BackendRequest::kConfigChange), kVersion, {},
                                          {}, Deadline::After(kServerMessageTime));
  if (sent.ok()) {
    config_changed_ = false;
    return;
  }
  LOG_WARN("device {}: telling of a changed configuration: {}", options_.name, Message(sent));
  channel_.Close();
}

DeviceServer::DeviceServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
DeviceServer::~DeviceServer() = default;

absl::StatusOr<std::unique_ptr<DeviceServer>> DeviceServer::Start(DeviceServerOptions options,
                                                                  DeviceModel& model) {
  auto impl = std::make_unique<Impl>(std::move(options), model);
  RETURN_IF_ERROR(impl->Begin());
  return std::unique_ptr<DeviceServer>(new DeviceServer(std::move(impl)));
}

const std::string& DeviceServer::path() const { return impl_->path(); }
void DeviceServer::Post(std::function<void()> function) { impl_->Post(std::move(function)); }
void DeviceServer::ConfigChanged() { impl_->ConfigChanged(); }

}  // namespace baton::vhost
