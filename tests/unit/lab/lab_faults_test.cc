// What the lab device does on command: crashes at every point, a full disk, lost answers; and that a hostile
// front-end only harms itself.
#include <gmock/gmock.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <random>

#include "tests/lab/device/control_client.h"
#include "tests/lab/device/journal.h"
#include "tests/unit/lab/lab_front.h"

namespace baton::lab {
namespace {

constexpr uint64_t kHour = 3600u * 1000000u;

class LabFaultsTest : public ::testing::Test {
 protected:
  LabFaultsTest() { directory_.MakeImage(kMiB); }
  LabDeviceOptions Options() {
    LabDeviceOptions options;
    options.socket = directory_.Path("socket");
    return options;
  }
  BlkOptions Blk() {
    BlkOptions blk;
    blk.image = directory_.Path("image");
    return blk;
  }
  void Begin(LabDeviceOptions options, BlkOptions blk, uint64_t features = 0) {
    device_ = std::make_unique<DeviceThread>(std::move(options), std::move(blk));
    if (!front_) front_ = std::make_unique<LabFront>(features, 1, 32);
    absl::Status connected = front_->Connect(directory_.Path("socket"));
    ASSERT_TRUE(connected.ok()) << connected;
  }

  LabDirectory directory_;
  std::unique_ptr<DeviceThread> device_;
  std::unique_ptr<LabFront> front_;
};

// A guest that writes numbered blocks, each block again only when the one before is complete, on a device
// that dies at a random point again and again, or is suspended. In the end every block holds its last number,
// and the journal shows that nothing was done twice after the guest was told, or in the wrong order.
class CrashRun {
 public:
  static constexpr uint32_t kSlots = 12;

  CrashRun(const LabDirectory& directory, uint64_t features, uint64_t seed)
      : directory_(directory), front_(features, 1, 16), random_(seed) {}

  void Run(int lives) {
    for (; lives > 0 && !::testing::Test::HasFailure(); --lives) Live();
    if (!::testing::Test::HasFailure()) Finish();
  }

 private:
  LabDeviceOptions Options(bool crash) {
    LabDeviceOptions options;
    options.socket = directory_.Path("socket");
    // A front-end whose back-end died knows no base.
    options.base = virtio::BaseConvention::kIgnored;
    if (crash) {
      const auto& points = CrashPoints();
      options.faults.crash_at = points[random_() % points.size()];
      options.faults.crash_after = 1 + random_() % 20;
    }
    return options;
  }
  BlkOptions Blk() {
    BlkOptions blk;
    blk.image = directory_.Path("image");
    blk.journal = directory_.Path("journal");
    blk.seed = random_();
    if (random_() % 2) blk.latency_max_us = 300;
    blk.latency_after = random_() % 2;
    if (random_() % 2) blk.shuffle = 4;
    return blk;
  }

  void Take(const std::vector<Finished>& ended) {
    for (const Finished& f : ended) {
      ASSERT_LT(f.token, kSlots);
      ASSERT_EQ(f.status, 0);
      ASSERT_TRUE(busy_[f.token]) << "a request was completed twice";
      busy_[f.token] = false;
    }
  }
  void SubmitSome() {
    bool any = false;
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      if (busy_[slot] || front_.driver(0).free_slots() < 3 || random_() % 2) continue;
      busy_[slot] = true;
      any = true;
      // Half of the requests rewrite a small place, the others one of their own, so that some overlap in
      // time.
      ASSERT_TRUE(front_.Add(0, slot, kWriteOut, slot * 2, 1024, ++written_[slot]).ok());
    }
    if (any) front_.Kick(0);
  }

  void Live() {
    const bool crash = random_() % 4 != 0;
    DeviceThread device(Options(crash), Blk());
    absl::Status connected = front_.Connect(directory_.Path("socket"));
    // A crash within the recovery ends the connection early.
    if (!connected.ok()) {
      ASSERT_TRUE(crash) << connected;
    } else {
      for (int step = 0; step < 30 && !::testing::Test::HasFailure(); ++step) {
        SubmitSome();
        Take(front_.Reap(0));
        if (random_() % 4 == 0) Take(front_.Await(0, 1, Deadline::After(std::chrono::milliseconds(2))));
      }
      if (!crash || random_() % 8 == 0) {
        // Orderly: without completing.
        (void)front_.Stop(0, kMsgGetBaseSkipDrain);
      }
    }
    front_.Disconnect();
  }

  void Finish() {
    DeviceThread device(Options(false), Blk());
    ASSERT_TRUE(front_.Connect(directory_.Path("socket")).ok());
    const Deadline end = InTime();
    while (std::count(busy_.begin(), busy_.end(), true) > 0 && !end.Expired()) {
      Take(front_.Await(0, 1, Deadline::After(std::chrono::seconds(1))));
      if (::testing::Test::HasFailure()) return;
    }
    ASSERT_EQ(std::count(busy_.begin(), busy_.end(), true), 0) << "requests were lost";
    for (uint32_t slot = 0; slot < kSlots; ++slot) {
      if (!written_[slot]) continue;
      front_.Submit(0, slot, kRead, slot * 2, 1024);
      ASSERT_EQ(front_.Await(0, 1).size(), 1u);
      EXPECT_EQ(front_.Data(0, slot), written_[slot]) << "block " << slot;
    }
    ASSERT_TRUE(front_.Stop(0).ok());
    auto records = ReadJournal(directory_.Path("journal"));
    ASSERT_TRUE(records.ok()) << records.status();
    auto verdict = CheckJournal(*records);
    EXPECT_TRUE(verdict.ok()) << verdict.status();
  }

  const LabDirectory& directory_;
  LabFront front_;
  std::mt19937_64 random_;
  std::array<bool, kSlots> busy_{};
  std::array<uint64_t, kSlots> written_{};
};

class LabCrashTest : public ::testing::TestWithParam<uint64_t> {};

TEST_P(LabCrashTest, NothingIsLostRepeatedOrMisordered) {
  const char* wanted = std::getenv("BATON_LAB_CRASHES");
  const int runs = wanted ? std::atoi(wanted) / 20 : 3;
  const uint64_t seed = std::random_device{}();
  for (int run = 0; run < runs; ++run) {
    SCOPED_TRACE(fmt::format("seed {}", seed + static_cast<uint64_t>(run)));
    LabDirectory directory;
    directory.MakeImage(kMiB);
    CrashRun(directory, GetParam(), seed + static_cast<uint64_t>(run)).Run(20);
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Rings, LabCrashTest,
                         ::testing::Values(0, virtio::kFRingPacked, virtio::kFInOrder,
                                           virtio::kFRingPacked | virtio::kFInOrder | virtio::kFIndirectDesc),
                         [](const auto& info) {
                           std::string name = info.param & virtio::kFRingPacked ? "Packed" : "Split";
                           return name + (info.param & virtio::kFInOrder ? "InOrder" : "");
                         });

TEST_F(LabFaultsTest, FullDiskHoldsWritesReportsThemAndRetries) {
  BlkOptions blk = Blk();
  blk.no_space = true;
  Begin(Options(), blk);
  ASSERT_TRUE(front_->OpenChannel().ok());
  for (uint32_t i = 0; i < 3; ++i) front_->Submit(0, i, kWriteOut, i, 512, i + 1);
  front_->Submit(0, 3, kRead, 0, 512);
  ASSERT_TRUE(device_->Await("held", 3));
  EXPECT_EQ(front_->Await(0, 1).size(), 1u);  // the read
  pollfd error{front_->error_fd(0), POLLIN, 0};
  EXPECT_EQ(::poll(&error, 1, 0), 1);
  auto event = front_->channel().Receive(/*reply=*/false, InTime());
  ASSERT_TRUE(event.ok()) << event.status();
  EXPECT_EQ(event->header.request, kMsgBackendVringErr);
  EXPECT_EQ(event->As<vhost::VringState>().index, 0u);
  EXPECT_EQ(device_->Counter("in_flight"), 3);
  // Held requests are in flight like any other: they survive a suspension.
  ASSERT_TRUE(front_->Stop(0, kMsgGetBaseSkipDrain).ok());
  ASSERT_TRUE(front_->StartQueue(0).ok());
  ASSERT_TRUE(device_->Await("held", 3));
  EXPECT_EQ(device_->Counter("resubmitted"), 3);
  device_->Command({{"cmd", "set"}, {"no_space", false}});
  EXPECT_EQ(front_->Await(0, 3).size(), 3u);
  EXPECT_EQ(device_->Counter("held"), 0);
}

TEST_F(LabFaultsTest, OverlappingReplaysKeepTheirOrder) {
  BlkOptions blk = Blk();
  blk.latency_us = kHour;
  Begin(Options(), blk);
  for (uint32_t i = 0; i < 8; ++i) ASSERT_TRUE(front_->Add(0, i, kWriteOut, 0, 512, i + 1).ok());
  front_->Kick(0);
  ASSERT_TRUE(device_->Await("in_flight", 8));
  ASSERT_TRUE(front_->Stop(0, kMsgGetBaseSkipDrain).ok());
  // Times at random: without the order of the counters the last write would seldom be the last.
  device_->Command({{"cmd", "set"}, {"latency_us", 0}, {"latency_max_us", 5000}});
  ASSERT_TRUE(front_->StartQueue(0).ok());
  ASSERT_EQ(front_->Await(0, 8).size(), 8u);
  front_->Submit(0, 0, kRead, 0, 512);
  ASSERT_EQ(front_->Await(0, 1).size(), 1u);
  EXPECT_EQ(front_->Data(0, 0), 8u);
}

TEST_F(LabFaultsTest, ManyRequestsStopAtOnce) {
  BlkOptions blk = Blk();
  blk.latency_us = kHour;
  blk.queues = 16;
  device_ = std::make_unique<DeviceThread>(Options(), blk);
  front_ = std::make_unique<LabFront>(0, 16, 256);
  ASSERT_TRUE(front_->Connect(directory_.Path("socket")).ok());
  for (uint32_t q = 0; q < 16; ++q) {
    for (uint32_t i = 0; i < 80; ++i) ASSERT_TRUE(front_->Add(q, i, kWriteOut, i, 512, 1).ok());
    front_->Kick(q);
  }
  ASSERT_TRUE(device_->Await("in_flight", 16 * 80));
  for (uint32_t q = 0; q < 16; ++q) ASSERT_TRUE(front_->SendStop(q, kMsgGetBaseSkipDrain).ok());
  for (uint32_t q = 0; q < 16; ++q) EXPECT_EQ(front_->Answer(q).value_or(0), 80u);
  EXPECT_EQ(device_->Counter("cancelled"), 16 * 80);
}

TEST_F(LabFaultsTest, MessagesAreLostRefusedGarbledOrIgnored) {
  Begin(Options(), Blk());
  device_->Command({{"cmd", "set"}, {"refuse_at", "SET_OWNER"}});
  EXPECT_EQ(front_->Set(3, {}).value_or(0), 1u);
  device_->Command({{"cmd", "set"}, {"refuse_at", 0}, {"lose_reply_at", "GET_QUEUE_NUM"}});
  ASSERT_TRUE(front_->Send(17, {}).ok());
  ASSERT_TRUE(device_->Await("replies_lost", 1));
  device_->Command({{"cmd", "set"}, {"lose_reply_at", 0}, {"silent_at", 17}});
  ASSERT_TRUE(front_->Send(17, {}).ok());
  ASSERT_TRUE(device_->Await("msg.GET_QUEUE_NUM", 2));
  // Neither had an answer: the next one is that of the next request.
  device_->Command({{"cmd", "set"}, {"silent_at", 0}});
  EXPECT_TRUE(front_->Get(1).value_or(0) & virtio::kFVersion1);
  device_->Command({{"cmd", "set"}, {"garble_at", 1}});
  ASSERT_TRUE(front_->Send(1, {}).ok());
  auto garbled = front_->connection().Receive(/*reply=*/true, InTime());
  ASSERT_TRUE(garbled.ok()) << garbled.status();
  EXPECT_NE(garbled->header.request, 1u);
  EXPECT_FALSE(device_->operator->()->Command({{"cmd", "set"}, {"nonsense", 1}}).value("ok", true));
  EXPECT_FALSE(device_->operator->()->Command({{"cmd", "set"}, {"crash_at", "nowhere"}}).value("ok", true));
}

TEST_F(LabFaultsTest, FrozenDeviceDoesNothingUntilThawed) {
  Begin(Options(), Blk());
  device_->Command({{"cmd", "freeze"}});
  front_->Submit(0, 0, kWriteOut, 0, 512, 1);
  EXPECT_EQ(device_->Counter("fetched"), 0);
  EXPECT_TRUE(front_->Reap(0).empty());
  device_->Command({{"cmd", "thaw"}});
  EXPECT_EQ(front_->Await(0, 1).size(), 1u);
}

TEST_F(LabFaultsTest, CommandsOverTheSocket) {
  LabDeviceOptions options = Options();
  options.control = directory_.Path("control");
  Begin(options, Blk());
  auto answer = CallLabDevice(options.control, {{"cmd", "stats"}}, InTime());
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ((*answer)["counters"]["rings_running"], 1);
  auto wait = CallLabDevice(
      options.control, {{"cmd", "wait"}, {"counter", "done"}, {"at_least", 1}, {"timeout_ms", 1}}, InTime());
  EXPECT_EQ(wait.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(CallLabDevice(options.control, {{"cmd", "dance"}}, InTime()).ok());
  device_->operator->()->Command({{"cmd", "crash"}});
  EXPECT_EQ(device_->Join().code(), absl::StatusCode::kAborted);
}

TEST_F(LabFaultsTest, HostileFrontEndOnlyEndsItsConnection) {
  device_ = std::make_unique<DeviceThread>(Options(), Blk());
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(fmt::format("seed {}", seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 200; ++round) {
    LabFront front(0, 1, 16);
    ASSERT_TRUE(front.Connect(directory_.Path("socket")).ok());
    front.Submit(0, 0, kWriteOut, 0, 512, 1);
    // One message with a random id, payload and descriptor, another ring, or a broken ring.
    std::vector<uint8_t> payload(random() % 3 == 0 ? random() % 64 : 8 * (1 + random() % 5));
    for (uint8_t& byte : payload) byte = static_cast<uint8_t>(random() % 4 ? random() % 3 : random());
    std::vector<int> fds;
    if (random() % 2) fds.push_back(front.inflight_fd());
    switch (random() % 3) {
      case 0:
        for (uint64_t at = 0; at < 512; ++at) {
          front.At(front.layout(0).desc)[at] = static_cast<uint8_t>(random());
        }
        front.Kick(0);
        break;
      case 1:
        *reinterpret_cast<uint16_t*>(front.At(front.layout(0).driver + 2)) = static_cast<uint16_t>(random());
        break;
      default:
        break;
    }
    (void)front.Send(static_cast<uint32_t>(random() % 50), payload, fds);
    if (random() % 2) (void)front.SendStop(0, 11);
    front.Disconnect();
  }
  LabFront good(0, 1, 16);
  ASSERT_TRUE(good.Connect(directory_.Path("socket")).ok());
  good.Submit(0, 0, kWriteOut, 0, 512, 1);
  EXPECT_EQ(good.Await(0, 1).size(), 1u);
}

}  // namespace
}  // namespace baton::lab
