// Peers that break the protocol: the connection ends with one line in the log, the mediator lives, and the
// next session works.
#include <gmock/gmock.h>
#include <spdlog/sinks/base_sink.h>
#include <spdlog/spdlog.h>
#include <sys/mman.h>

#include <condition_variable>
#include <mutex>

#include "tests/unit/vhost/fake_vmm.h"

namespace baton::vhost {
namespace {

using testing::HasSubstr;

// What the mediator logs, on whatever thread.
class LogText : public spdlog::sinks::base_sink<std::mutex> {
 public:
  // Everything so far, once `text` is in it or the time is up.
  std::string AwaitText(const std::string& text) {
    std::unique_lock lock(text_mutex_);
    grown_.wait_for(lock, std::chrono::seconds(60), [&] { return text_.find(text) != std::string::npos; });
    return text_;
  }

 private:
  void sink_it_(const spdlog::details::log_msg& message) override {
    std::lock_guard lock(text_mutex_);
    text_.append(message.payload.data(), message.payload.size());
    text_ += '\n';
    grown_.notify_all();
  }
  void flush_() override {}
  std::mutex text_mutex_;
  std::condition_variable grown_;
  std::string text_;
};

class Hostile : public MediatorFixture {
 protected:
  void SetUp() override {
    previous_ = spdlog::default_logger();
    spdlog::set_default_logger(std::make_shared<spdlog::logger>("test", log_));
    StartBackend();
    StartMediator();
  }
  void TearDown() override {
    // Whatever happened: a proper VMM is served.
    FakeVmm good(dir_ + "/vmm.sock");
    good.Negotiate();
    good.SetMemory();
    good.StartRing();
    good.Submit(0, true, 1, 0x5a);
    EXPECT_TRUE(good.AwaitUsed(1)) << mediator_->Describe().ShortDebugString();
    mediator_.reset();
    // The back-end logs, too, when its front-end leaves.
    backend_.reset();
    spdlog::set_default_logger(previous_);
  }
  // The mediator closes the connection and says why, once.
  void ExpectClosed(FakeVmm& vmm, const std::string& why) {
    ASSERT_TRUE(vmm.Closed());
    const std::string text = log_->AwaitText("VMM connection closed");
    EXPECT_THAT(text, HasSubstr("VMM connection closed: "));
    EXPECT_THAT(text, HasSubstr(why));
    size_t first = text.find("VMM connection closed");
    EXPECT_EQ(text.find("VMM connection closed", first + 1), std::string::npos) << text;
  }
  std::shared_ptr<LogText> log_ = std::make_shared<LogText>();
  std::shared_ptr<spdlog::logger> previous_;
};

TEST_F(Hostile, UnknownRequest) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  ASSERT_TRUE(vmm.Send(static_cast<Request>(77), {}).ok());
  ExpectClosed(vmm, "request 77 is not supported");
}

TEST_F(Hostile, RequestWithoutItsProtocolFeature) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  ASSERT_TRUE(vmm.Send(Request::kGetQueueNum, {}).ok());
  ExpectClosed(vmm, "GET_QUEUE_NUM without the protocol feature MQ");
}

TEST_F(Hostile, FeatureThatWasNotOffered) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  ASSERT_TRUE(vmm.Send(Request::kSetFeatures, Bytes(virtio::kFRingPacked)).ok());
  ExpectClosed(vmm, "RING_PACKED were not offered");
}

TEST_F(Hostile, ShortPayload) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  ASSERT_TRUE(vmm.Send(Request::kSetFeatures, Bytes(uint32_t{1})).ok());
  ExpectClosed(vmm, "4 bytes of payload instead of 8");
}

TEST_F(Hostile, AbsurdPayload) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  std::vector<uint8_t> much(kMaxPayload + 1);
  ASSERT_TRUE(vmm.Send(Request::kSetMemTable, much).ok());
  ExpectClosed(vmm, "4097 bytes of payload");
}

TEST_F(Hostile, OverlappingRegions) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  struct {
    MemTableHeader header{2, 0};
    MemRegion regions[2] = {{0, 0x10000, 0x100000, 0}, {0x8000, 0x10000, 0x200000, 0}};
  } table;
  ASSERT_TRUE(vmm.Send(Request::kSetMemTable, Bytes(table), {vmm.memory_fd(), vmm.memory_fd()}).ok());
  ExpectClosed(vmm, "overlap");
}

TEST_F(Hostile, RegionBeyondItsFile) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  struct {
    MemTableHeader header{1, 0};
    MemRegion region{0, 2 * FakeVmm::kMemory, 0x100000, 0};
  } table;
  ASSERT_TRUE(vmm.Send(Request::kSetMemTable, Bytes(table), {vmm.memory_fd()}).ok());
  ExpectClosed(vmm, "beyond its file");
}

TEST_F(Hostile, WrongNumberOfDescriptors) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  struct {
    MemTableHeader header{1, 0};
    MemRegion region{0, FakeVmm::kMemory, 0x100000, 0};
  } table;
  ASSERT_TRUE(vmm.Send(Request::kSetMemTable, Bytes(table), {}).ok());
  ExpectClosed(vmm, "0 descriptors came with it instead of 1");
}

TEST_F(Hostile, RingOutsideMemory) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  vmm.Negotiate();
  vmm.SetMemory();
  VringState num{0, 16};
  ASSERT_TRUE(vmm.Set(Request::kSetVringNum, num).ok());
  VringAddr addr{0, 0, FakeVmm::kUser + FakeVmm::kMemory - 16, FakeVmm::kUser, FakeVmm::kUser + 0x2000, 0};
  ASSERT_TRUE(vmm.Send(Request::kSetVringAddr, Bytes(addr)).ok());
  ExpectClosed(vmm, "descriptor table of 256 bytes");
}

TEST_F(Hostile, RingIndexBeyondTheDevice) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  vmm.Negotiate();
  VringState num{200, 16};
  ASSERT_TRUE(vmm.Send(Request::kSetVringNum, Bytes(num)).ok());
  ExpectClosed(vmm, "ring 200");
}

TEST_F(Hostile, KickBeforeAnything) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  uint64_t index = 0;
  UniqueFd fd(::eventfd(0, EFD_CLOEXEC));
  ASSERT_TRUE(vmm.Send(Request::kSetVringKick, Bytes(index), {fd.get()}).ok());
  ExpectClosed(vmm, "SET_VRING_KICK");
}

TEST_F(Hostile, BaseOfARunningRing) {
  FakeVmm vmm(dir_ + "/vmm.sock");
  vmm.Negotiate();
  vmm.SetMemory();
  vmm.StartRing();
  VringState base{0, 7};
  ASSERT_TRUE(vmm.Send(Request::kSetVringBase, Bytes(base)).ok());
  ExpectClosed(vmm, "ring 0 is running");
}

TEST_F(Hostile, MessageThatStopsHalfWay) {
  auto raw = Connection::Dial(dir_ + "/vmm.sock", Deadline::After(std::chrono::seconds(5)));
  ASSERT_TRUE(raw.ok());
  ASSERT_EQ(::write(raw->fd(), "\x02\x00\x00\x00\x01", 5), 5);
  raw->Close();
  EXPECT_THAT(log_->AwaitText("VMM connection closed"), HasSubstr("closed within a message"));
}

class WrongBackend : public MediatorFixture {};

TEST_F(WrongBackend, Absent_NamesTheSocket) {
  auto mediator = Mediator::Start(Options(), {});
  EXPECT_TRUE(absl::IsNotFound(mediator.status())) << mediator.status();
  EXPECT_THAT(Message(mediator.status()), HasSubstr("device disk0: back-end " + dir_ + "/backend.sock"));
}

TEST_F(WrongBackend, Silent_IsNoticedWithinTheTimeout) {
  StartBackend({.silent_at = 1});
  auto began = Clock::now();
  auto mediator = Mediator::Start(Options(), {});
  EXPECT_TRUE(absl::IsDeadlineExceeded(mediator.status())) << mediator.status();
  EXPECT_LT(Clock::now() - began, std::chrono::seconds(2));
}

TEST_F(WrongBackend, GarbledReply_IsRefused) {
  StartBackend({.garble_at = 15});
  auto mediator = Mediator::Start(Options(), {});
  EXPECT_FALSE(mediator.ok());
}

TEST_F(WrongBackend, AbsentButNotRequired_ComesLater) {
  MediatorOptions options = Options();
  options.backend_required = false;
  StartMediator(std::move(options));
  EXPECT_EQ(mediator_->Describe().state(), v1::Device::BACKEND_LOST);
  StartBackend();
  ASSERT_TRUE(Becomes(v1::Device::IDLE_DEVICE));
  FakeVmm vmm(dir_ + "/vmm.sock");
  vmm.Negotiate();
}

// A back-end that stops answering in the middle of the start: the VMM is not held up longer than the
// watchdog.
TEST_F(WrongBackend, SilentAtARequest_TheVmmIsAnswered) {
  StartBackend({.silent_at = static_cast<uint32_t>(Request::kSetMemTable)});
  StartMediator();
  FakeVmm vmm(dir_ + "/vmm.sock");
  vmm.Negotiate();
  auto began = Clock::now();
  vmm.SetMemory();
  EXPECT_LT(Clock::now() - began, std::chrono::seconds(2));
  EXPECT_TRUE(Becomes(v1::Device::BACKEND_LOST));
  EXPECT_THAT(mediator_->Describe().message(), HasSubstr("SET_MEM_TABLE"));
}

TEST_F(WrongBackend, GarbledAtARequest_TheVmmIsAnswered) {
  StartBackend({.garble_at = static_cast<uint32_t>(Request::kSetMemTable)});
  StartMediator();
  FakeVmm vmm(dir_ + "/vmm.sock");
  vmm.Negotiate();
  vmm.SetMemory();
  EXPECT_TRUE(Becomes(v1::Device::BACKEND_LOST));
}

}  // namespace
}  // namespace baton::vhost
