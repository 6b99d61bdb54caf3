#include "tests/unit/vhost/fake_vmm.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>

#include <cstdlib>

namespace baton::vhost {
BackendThread::BackendThread(const BackendOptions& options) : stop_(::eventfd(0, EFD_CLOEXEC)) {
  lab::BlkOptions blk;
  blk.image = options.image;
  blk.latency_max_us = options.delay_us;
  blk.no_space = options.no_space;
  lab::LabDeviceOptions device;
  device.socket = options.socket;
  // What is submitted again is done at once, so that a test with slow requests can see it.
  blk.delay_replays = false;
  // FakeVmm accepts what it is offered.
  constexpr uint64_t kBlkFlush = virtio::Bit(9);
  device.without_features = options.less_features | ~(virtio::kFVersion1 | kBlkFlush | virtio::kVhostFLogAll |
                                                      virtio::kVhostUserFProtocolFeatures);
  device.without_protocol = options.less_protocol;
  if (options.suspends_by_status) {
    device.extra_features = virtio::kFSuspend;
    device.without_features &= ~virtio::kFSuspend;
  }
  if (!options.suspends) device.without_protocol |= lab::kPfGetBaseSkipDrain;
  if (!options.suspends_by_bit_20) device.without_protocol |= lab::kPfGetBaseInflight;
  device.inflight = options.inflight;
  device.base = virtio::BaseConvention::kIgnored;
  device.faults.base_offset = options.base_offset;
  device.faults.silent_at = options.silent_at;
  device.faults.garble_at = options.garble_at;
  auto model = lab::BlkModel::Create(std::move(blk));
  EXPECT_TRUE(model.ok()) << model.status();
  auto backend = lab::LabDevice::Create(std::move(device), *std::move(model));
  EXPECT_TRUE(backend.ok()) << backend.status();
  backend_ = std::move(*backend);
  thread_ = std::thread([this] {
    absl::Status ended = backend_->Run(stop_.get());
    EXPECT_TRUE(ended.ok()) << ended;
  });
}

BackendThread::~BackendThread() {
  uint64_t one = 1;
  EXPECT_EQ(::write(stop_.get(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
  thread_.join();
}

bool BackendThread::AwaitFetched(uint64_t n) {
  return backend_->Command({{"cmd", "wait"}, {"counter", "fetched"}, {"at_least", n}, {"timeout_ms", 30000}})
      .value("ok", false);
}

uint64_t BackendThread::Counter(const std::string& name) {
  return backend_->Command({{"cmd", "stats"}})["counters"].value(name, uint64_t{0});
}

FakeVmm::FakeVmm(const std::string& socket) {
  auto connection = Connection::Dial(socket, Soon());
  EXPECT_TRUE(connection.ok()) << connection.status();
  connection_ = std::move(*connection);
  memory_fd_.reset(::memfd_create("guest", MFD_CLOEXEC));
  EXPECT_EQ(::ftruncate(memory_fd_.get(), kMemory), 0);
  memory_ = static_cast<uint8_t*>(
      ::mmap(nullptr, kMemory, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd_.get(), 0));
  kick_.reset(::eventfd(0, EFD_CLOEXEC));
  call_.reset(::eventfd(0, EFD_CLOEXEC));
}

FakeVmm::~FakeVmm() { ::munmap(memory_, kMemory); }

void FakeVmm::Reconnect(const std::string& socket) {
  auto connection = Connection::Dial(socket, Soon());
  ASSERT_TRUE(connection.ok()) << connection.status();
  connection_ = std::move(*connection);
}

void FakeVmm::ClearRing() {
  std::memset(At(kAvail), 0, 0x1000);
  std::memset(At(kUsed), 0, 0x1000);
  avail_ = 0;
}

absl::Status FakeVmm::Send(Request request, std::span<const uint8_t> payload, std::vector<int> fds,
                           bool need_reply) {
  return connection_.Send(static_cast<uint32_t>(request), kVersion | (need_reply ? kFlagNeedReply : 0),
                          payload, fds, Soon());
}

absl::StatusOr<WireMessage> FakeVmm::Receive() { return connection_.Receive(/*reply=*/true, Soon()); }

absl::StatusOr<uint64_t> FakeVmm::Set(Request request, std::span<const uint8_t> payload,
                                      std::vector<int> fds) {
  RETURN_IF_ERROR(Send(request, payload, std::move(fds), true));
  ASSIGN_OR_RETURN(WireMessage reply, Receive());
  return reply.As<uint64_t>();
}

absl::StatusOr<uint64_t> FakeVmm::Get(Request request) {
  RETURN_IF_ERROR(Send(request, {}));
  ASSIGN_OR_RETURN(WireMessage reply, Receive());
  return reply.As<uint64_t>();
}

absl::StatusOr<uint32_t> FakeVmm::GetBase(uint32_t index) {
  VringState state{index, 0};
  RETURN_IF_ERROR(Send(Request::kGetVringBase, Bytes(state)));
  ASSIGN_OR_RETURN(WireMessage reply, Receive());
  return reply.As<VringState>().num;
}

bool FakeVmm::Closed() {
  pollfd p{connection_.fd(), POLLIN, 0};
  return ::poll(&p, 1, Soon().PollTimeoutMs()) == 1 && !Receive().ok();
}

void FakeVmm::Negotiate(uint64_t less_protocol) {
  auto features = Get(Request::kGetFeatures);
  ASSERT_TRUE(features.ok()) << features.status();
  auto protocol = Get(Request::kGetProtocolFeatures);
  ASSERT_TRUE(protocol.ok()) << protocol.status();
  uint64_t acked = *protocol & ~less_protocol;
  ASSERT_TRUE(Send(Request::kSetProtocolFeatures, Bytes(acked)).ok());
  ASSERT_TRUE(Send(Request::kSetOwner, {}).ok());
  auto set = Set(Request::kSetFeatures, *features & ~virtio::kVhostFLogAll);
  ASSERT_TRUE(set.ok() && *set == 0) << set.status();
}

void FakeVmm::SetMemory() {
  struct {
    MemTableHeader header;
    MemRegion region;
  } table{{1, 0}, {0, kMemory, kUser, 0}};
  auto set = Set(Request::kSetMemTable, table, {memory_fd_.get()});
  ASSERT_TRUE(set.ok() && *set == 0) << set.status();
}

void FakeVmm::StartRing(uint16_t base) {
  VringState num{0, kRingSize}, start{0, base};
  VringAddr addr{0, 0, kUser + kDesc, kUser + kUsed, kUser + kAvail, 0};
  uint64_t index = 0;
  VringState enable{0, 1};
  for (auto set :
       {Set(Request::kSetVringNum, num), Set(Request::kSetVringBase, start),
        Set(Request::kSetVringAddr, addr), Set(Request::kSetVringKick, index, {kick_.get()}),
        Set(Request::kSetVringCall, index, {call_.get()}), Set(Request::kSetVringEnable, enable)}) {
    ASSERT_TRUE(set.ok()) << set.status();
    ASSERT_EQ(*set, 0u);
  }
}

void FakeVmm::Submit(uint16_t slot, bool write, uint64_t sector, uint8_t fill, bool kick) {
  struct Desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
  };
  struct {
    uint32_t type, reserved;
    uint64_t sector;
  } header{write ? 1u : 0u, 0, sector};
  const uint64_t buffer = kBuffers + slot * uint64_t{0x1000};
  const uint16_t d = static_cast<uint16_t>(3 * slot);
  std::memcpy(At(buffer), &header, sizeof header);
  if (write) std::memset(At(buffer + 0x100), fill, 512);
  *At(buffer + 0x800) = 0xff;
  Desc chain[3] = {
      {buffer, 16, 1, static_cast<uint16_t>(d + 1)},
      {buffer + 0x100, 512, static_cast<uint16_t>(1 | (write ? 0 : 2)), static_cast<uint16_t>(d + 2)},
      {buffer + 0x800, 1, 2, 0}};
  std::memcpy(At(kDesc + 16 * d), chain, sizeof chain);
  std::memcpy(At(kAvail + 4 + 2 * (avail_ % kRingSize)), &d, sizeof d);
  __atomic_store_n(reinterpret_cast<uint16_t*>(At(kAvail + 2)), ++avail_, __ATOMIC_RELEASE);
  if (!kick) return;
  uint64_t one = 1;
  EXPECT_EQ(::write(kick_.get(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
}

uint16_t FakeVmm::UsedIndex() const {
  return __atomic_load_n(reinterpret_cast<const uint16_t*>(memory_ + kUsed + 2), __ATOMIC_ACQUIRE);
}

bool FakeVmm::AwaitUsed(uint16_t index) {
  for (Deadline deadline = Soon(); !deadline.Expired();) {
    if (UsedIndex() == index) return true;
    ::poll(nullptr, 0, 1);
  }
  return false;
}

MediatorFixture::MediatorFixture() {
  UniqueFd image(::open((dir_ + "/image").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  EXPECT_EQ(::ftruncate(image.get(), 1 << 20), 0);
}

MediatorFixture::~MediatorFixture() {
  mediator_.reset();
  backend_.reset();
}

void MediatorFixture::StartBackend(BackendOptions options) {
  options.socket = dir_ + "/backend.sock";
  options.image = dir_ + "/image";
  backend_.reset();
  backend_ = std::make_unique<BackendThread>(options);
}

MediatorOptions MediatorFixture::Options() {
  MediatorOptions options;
  options.spec.set_name("disk0");
  options.spec.set_class_(v1::BLK);
  options.backend.set_socket(dir_ + "/backend.sock");
  options.backend.set_kind(v1::LAB);
  options.listen_path = dir_ + "/vmm.sock";
  options.request_timeout = std::chrono::milliseconds(500);
  options.connect_timeout = std::chrono::milliseconds(500);
  return options;
}

void MediatorFixture::StartMediator() { StartMediator(Options()); }

void MediatorFixture::StartMediator(MediatorOptions options, MediatorCallbacks callbacks) {
  callbacks.on_change = [this](const v1::Device&) {
    std::lock_guard lock(change_mutex_);
    device_changed_.notify_all();
  };
  auto mediator = Mediator::Start(std::move(options), std::move(callbacks));
  ASSERT_TRUE(mediator.ok()) << mediator.status();
  mediator_ = std::move(*mediator);
}

bool MediatorFixture::AwaitDevice(const std::function<bool(const v1::Device&)>& wanted) {
  std::unique_lock lock(change_mutex_);
  return device_changed_.wait_until(lock, Soon().when(), [&] { return wanted(mediator_->Describe()); });
}

bool MediatorFixture::Becomes(v1::Device::State state) {
  return AwaitDevice([state](const v1::Device& device) { return device.state() == state; });
}

bool MediatorFixture::AwaitReconnects(uint32_t count) {
  return AwaitDevice([count](const v1::Device& device) { return device.reconnects() == count; });
}

}  // namespace baton::vhost
