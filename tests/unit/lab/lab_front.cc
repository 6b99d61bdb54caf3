#include "tests/unit/lab/lab_front.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>

namespace baton::lab {
namespace {

using vhost::Request;
namespace pf = vhost::pf;

constexpr uint32_t kHeaderBytes = 16;

uint32_t Number(Request request) { return static_cast<uint32_t>(request); }

}  // namespace

void LabDirectory::MakeImage(uint64_t bytes) const {
  UniqueFd image(::open(Path("image").c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  EXPECT_EQ(::ftruncate(image.get(), static_cast<off_t>(bytes)), 0);
}

DeviceThread::DeviceThread(LabDeviceOptions options, BlkOptions blk)
    : DeviceThread(std::move(options), BlkModel::Create(std::move(blk)).value()) {}

DeviceThread::DeviceThread(LabDeviceOptions options, std::unique_ptr<DeviceModel> model)
    : stop_(::eventfd(0, EFD_CLOEXEC)) {
  options.crash_kills = false;
  auto device = LabDevice::Create(std::move(options), std::move(model));
  EXPECT_TRUE(device.ok()) << device.status();
  device_ = *std::move(device);
  thread_ = std::thread([this] { result_ = device_->Run(stop_.get()); });
}

DeviceThread::~DeviceThread() {
  const uint64_t one = 1;
  EXPECT_EQ(::write(stop_.get(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
  if (thread_.joinable()) thread_.join();
}

absl::Status DeviceThread::Join() {
  thread_.join();
  return result_;
}

nlohmann::json DeviceThread::Command(const nlohmann::json& command) {
  nlohmann::json answer = device_->Command(command);
  EXPECT_TRUE(answer.value("ok", false)) << command.dump() << ": " << answer.dump();
  return answer;
}

int64_t DeviceThread::Counter(const std::string& name) {
  return Command({{"cmd", "stats"}})["counters"].value(name, int64_t{0});
}

bool DeviceThread::Await(const std::string& counter, int64_t at_least) {
  return device_
      ->Command({{"cmd", "wait"}, {"counter", counter}, {"at_least", at_least}, {"timeout_ms", 20000}})
      .value("ok", false);
}

LabFront::LabFront(uint64_t features, uint32_t queues, uint16_t size)
    : features_(features | virtio::kFVersion1 | virtio::kVhostUserFProtocolFeatures), size_(size) {
  memory_fd_.reset(::memfd_create("guest", MFD_CLOEXEC));
  EXPECT_EQ(::ftruncate(memory_fd_.get(), kMemory), 0);
  map_ = SharedMapping::Map(memory_fd_.get(), 0, kMemory).value();
  memory_ = virtio::GuestMemory::Create({{kGpa, kMemory, map_.data()}}).value();
  for (uint32_t q = 0; q < queues; ++q) {
    const uint64_t at = kGpa + q * kQueueBytes;
    layouts_.push_back({.size = size, .desc = at, .driver = at + 0x4000, .device = at + 0x6000});
    auto driver = virtio::DriverQueue::Create(memory_, layouts_.back(),
                                              {.features = features_, .log = nullptr}, {at + 0x8000, 4});
    EXPECT_TRUE(driver.ok()) << driver.status();
    drivers_.push_back(std::make_unique<virtio::DriverQueue>(*std::move(driver)));
    kicks_.emplace_back(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    calls_.emplace_back(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    errors_.emplace_back(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    bases_[q] = features & virtio::kFRingPacked ? 0x80008000 : 0;
  }
}

absl::Status LabFront::Send(uint32_t request, std::span<const uint8_t> payload, std::vector<int> fds,
                            bool need_reply) {
  return connection_.Send(request, vhost::kVersion | (need_reply ? vhost::kFlagNeedReply : 0), payload, fds,
                          InTime());
}

absl::StatusOr<uint64_t> LabFront::Set(uint32_t request, std::span<const uint8_t> payload,
                                       std::vector<int> fds) {
  RETURN_IF_ERROR(Send(request, payload, std::move(fds), true));
  ASSIGN_OR_RETURN(vhost::WireMessage reply, connection_.Receive(/*reply=*/true, InTime()));
  return reply.As<uint64_t>();
}

absl::StatusOr<uint64_t> LabFront::Get(uint32_t request) {
  RETURN_IF_ERROR(Send(request, {}));
  ASSIGN_OR_RETURN(vhost::WireMessage reply, connection_.Receive(/*reply=*/true, InTime()));
  return reply.As<uint64_t>();
}

absl::Status LabFront::Connect(const std::string& socket) {
  ASSIGN_OR_RETURN(connection_, vhost::Connection::Dial(socket, InTime()));
  ASSIGN_OR_RETURN(const uint64_t offered, Get(Number(Request::kGetFeatures)));
  if (features_ & ~offered) return Error(absl::StatusCode::kFailedPrecondition, "not offered");
  ASSIGN_OR_RETURN(uint64_t protocol, Get(Number(Request::kGetProtocolFeatures)));
  // Bit 20 makes every stop one without completing; tests ask for message 45 instead.
  protocol &= ~(kPfGetBaseInflight | without_protocol);
  RETURN_IF_ERROR(Send(Number(Request::kSetProtocolFeatures), vhost::Bytes(protocol)));
  RETURN_IF_ERROR(Send(Number(Request::kSetOwner), {}));
  auto set = [this](Request request, auto payload, std::vector<int> fds = {}) -> absl::Status {
    ASSIGN_OR_RETURN(const uint64_t answer, Set(Number(request), vhost::Bytes(payload), std::move(fds)));
    if (answer == 0) return absl::OkStatus();
    return Error(absl::StatusCode::kFailedPrecondition, "{} refused", vhost::RequestName(Number(request)));
  };
  RETURN_IF_ERROR(set(Request::kSetFeatures, features_ | (logging_ ? virtio::kVhostFLogAll : 0)));
  struct {
    vhost::MemTableHeader header;
    vhost::MemRegion region;
  } table{{1, 0}, {kGpa, kMemory, kUser, 0}};
  RETURN_IF_ERROR(set(Request::kSetMemTable, table, {memory_fd_.get()}));
  if (logging_) RETURN_IF_ERROR(StartLog());
  if (protocol & pf::kInflightShmfd) {
    if (!inflight_fd_) {
      vhost::InflightDescription wanted{};
      wanted.num_queues = static_cast<uint16_t>(drivers_.size());
      wanted.queue_size = size_;
      RETURN_IF_ERROR(Send(Number(Request::kGetInflightFd), vhost::Bytes(wanted)));
      ASSIGN_OR_RETURN(vhost::WireMessage reply, connection_.Receive(/*reply=*/true, InTime()));
      if (reply.fds.size() != 1) return absl::InternalError("no in-flight region");
      inflight_ = reply.As<vhost::InflightDescription>();
      inflight_fd_ = std::move(reply.fds[0]);
    }
    RETURN_IF_ERROR(set(Request::kSetInflightFd, inflight_, {inflight_fd_.get()}));
  }
  for (uint32_t q = 0; q < drivers_.size(); ++q) RETURN_IF_ERROR(StartQueue(q));
  return absl::OkStatus();
}

absl::Status LabFront::StartQueue(uint32_t q) {
  auto set = [this](Request request, auto payload, std::vector<int> fds = {}) -> absl::Status {
    ASSIGN_OR_RETURN(const uint64_t answer, Set(Number(request), vhost::Bytes(payload), std::move(fds)));
    if (answer == 0) return absl::OkStatus();
    return Error(absl::StatusCode::kFailedPrecondition, "{} refused", vhost::RequestName(Number(request)));
  };
  const uint64_t user = kUser - kGpa;
  const virtio::QueueLayout& l = layouts_[q];
  const vhost::VringAddr addr{
      q, logging_ ? vhost::kVringFLog : 0, user + l.desc, user + l.device, user + l.driver, l.device};
  RETURN_IF_ERROR(set(Request::kSetVringNum, vhost::VringState{q, size_}));
  RETURN_IF_ERROR(set(Request::kSetVringBase, vhost::VringState{q, bases_[q]}));
  RETURN_IF_ERROR(set(Request::kSetVringAddr, addr));
  RETURN_IF_ERROR(set(Request::kSetVringErr, uint64_t{q}, {errors_[q].get()}));
  RETURN_IF_ERROR(set(Request::kSetVringCall, uint64_t{q}, {calls_[q].get()}));
  RETURN_IF_ERROR(set(Request::kSetVringKick, uint64_t{q}, {kicks_[q].get()}));
  return set(Request::kSetVringEnable, vhost::VringState{q, 1});
}

absl::Status LabFront::SendStop(uint32_t q, uint32_t message) {
  return Send(message, vhost::Bytes(vhost::VringState{q, 0}));
}

absl::StatusOr<uint32_t> LabFront::Answer(uint32_t q) {
  ASSIGN_OR_RETURN(vhost::WireMessage reply, connection_.Receive(/*reply=*/true, InTime()));
  const auto state = reply.As<vhost::VringState>();
  if (state.index != q) return Error(absl::StatusCode::kInternal, "answer for ring {}", state.index);
  bases_[q] = state.num;
  return state.num;
}

absl::StatusOr<uint32_t> LabFront::Stop(uint32_t q, uint32_t message) {
  RETURN_IF_ERROR(SendStop(q, message));
  return Answer(q);
}

absl::Status LabFront::OpenChannel() {
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) != 0) {
    return absl::InternalError("socketpair");
  }
  channel_ = vhost::Connection(UniqueFd(pair[0]));
  UniqueFd theirs(pair[1]);
  return Set(Number(Request::kSetBackendReqFd), {}, {theirs.get()}).status();
}

absl::Status LabFront::StartLog() {
  logging_ = true;
  if (!log_fd_) {
    const uint64_t bytes = (kGpa + kMemory) / 4096 / 8;
    log_fd_.reset(::memfd_create("log", MFD_CLOEXEC));
    if (::ftruncate(log_fd_.get(), static_cast<off_t>(bytes)) != 0) return absl::InternalError("log");
    ASSIGN_OR_RETURN(log_, SharedMapping::Map(log_fd_.get(), 0, bytes));
  }
  const vhost::LogDescription log{log_.size(), 0};
  RETURN_IF_ERROR(Send(Number(Request::kSetLogBase), vhost::Bytes(log), {log_fd_.get()}));
  return connection_.Receive(/*reply=*/true, InTime()).status();
}

bool LabFront::Logged(uint64_t gpa) const {
  const uint64_t page = gpa / 4096;
  return (__atomic_load_n(log_.data() + page / 8, __ATOMIC_ACQUIRE) >> page % 8 & 1) != 0;
}

uint64_t LabFront::BufferGpa(uint32_t q, uint32_t slot) const {
  return kGpa + q * kQueueBytes + 0x20000 + uint64_t{slot} * kSlotBytes;
}

absl::Status LabFront::Add(uint32_t q, uint32_t slot, uint32_t type, uint64_t sector, uint32_t bytes,
                           uint64_t tag) {
  const uint64_t at = BufferGpa(q, slot), data = at + 64, status = at + kSlotBytes - 16;
  struct {
    uint32_t type, reserved;
    uint64_t sector;
  } header{type, 0, sector};
  static_assert(sizeof header == kHeaderBytes);
  std::memcpy(At(at), &header, sizeof header);
  *At(status + 8) = 0xee;
  if (type == kWriteOut || type == kAppend) {
    for (uint32_t i = 0; i + 8 <= bytes; i += 8) std::memcpy(At(data + i), &tag, sizeof tag);
  }
  std::vector<virtio::Segment> readable = {{at, kHeaderBytes}}, writable;
  const bool writes = type == kRead || type == kIdentify;
  if (type != kFlushAll) (writes ? writable : readable).push_back({data, bytes});
  // An append is answered with its place, right before the status.
  writable.push_back(type == kAppend ? virtio::Segment{status, 9} : virtio::Segment{status + 8, 1});
  return drivers_[q]->Add(readable, writable, slot).status();
}

void LabFront::Kick(uint32_t q) {
  drivers_[q]->Publish();
  const uint64_t one = 1;
  if (drivers_[q]->NeedsKick()) {
    EXPECT_EQ(::write(kicks_[q].get(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
  }
}

void LabFront::Submit(uint32_t q, uint32_t slot, uint32_t type, uint64_t sector, uint32_t bytes,
                      uint64_t tag) {
  absl::Status added = Add(q, slot, type, sector, bytes, tag);
  ASSERT_TRUE(added.ok()) << added;
  Kick(q);
}

std::vector<Finished> LabFront::Reap(uint32_t q) {
  std::vector<Finished> out;
  virtio::UsedBuffer used;
  for (;;) {
    auto taken = drivers_[q]->TakeUsed(&used);
    EXPECT_TRUE(taken.ok()) << taken.status();
    if (!taken.ok()) return out;
    if (!*taken) {
      auto more = drivers_[q]->EnableCalls();
      EXPECT_TRUE(more.ok()) << more.status();
      if (!more.ok() || !*more) return out;
      continue;
    }
    const auto slot = static_cast<uint32_t>(used.token);
    out.push_back({used.token, *At(BufferGpa(q, slot) + kSlotBytes - 8), used.len});
  }
}

std::vector<Finished> LabFront::Await(uint32_t q, size_t count, Deadline deadline) {
  std::vector<Finished> out;
  for (;;) {
    for (const Finished& f : Reap(q)) out.push_back(f);
    if (out.size() >= count || deadline.Expired()) return out;
    pollfd p{calls_[q].get(), POLLIN, 0};
    ::poll(&p, 1, deadline.PollTimeoutMs());
    uint64_t calls;
    if (::read(calls_[q].get(), &calls, sizeof calls) < 0 && errno != EAGAIN) return out;
  }
}

uint64_t LabFront::Data(uint32_t q, uint32_t slot, uint32_t offset) const {
  uint64_t value;
  std::memcpy(&value, map_.data() + (BufferGpa(q, slot) + 64 + offset - kGpa), sizeof value);
  return value;
}

}  // namespace baton::lab
