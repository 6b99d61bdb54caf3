// Free page hints against everything a guest may do meanwhile: the races that reviewers of virtio-balloon
// found, one by one, and then at random. The device model and the queue of hints are real; the guest, its
// dirty tracking and the destination are a model that knows every byte.
#include "agent/memory/hint_session.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <array>
#include <cstring>
#include <deque>
#include <random>

#include "agent/virtio/balloon.h"

namespace baton::memory {
namespace {

using virtio::BalloonDevice;
using virtio::BalloonQueue;

constexpr uint64_t kPages = 16;
constexpr uint64_t kCommandGpa = kPages * kPageSize;

// A guest with a balloon driver, two dirty sources (vCPUs, and a device that writes memory by DMA), and a
// destination. Content of a page is a number; 0 is the page as it comes from the allocator of the host.
class World : private virtio::BalloonSink, private virtio::MemoryView {
 public:
  World() : session(Empty()) { device.SetFeatures(virtio::kBalloonFFreePageHint); }

  static PageSets Empty() { return PageSets{PageSet(kPages)}; }

  // --- the guest ---
  void Write(uint64_t page, bool by_device = false) {
    source[page] = ++version;
    written_after_publish[page] = true;
    free[page] = false;
    (by_device ? vhost_log : cpu_log).Set(page);
  }
  void Free(uint64_t page) { free[page] = true; }
  // The driver takes a free page out of the allocator and queues a hint for it; the allocator may take it
  // back at any time, which is Write.
  void QueueHint(uint64_t page) {
    if (free[page]) queue.push_back({virtio::BalloonBuffer{page * kPageSize, kPageSize, true}, 0});
  }
  void QueueCommand(uint32_t id) { queue.push_back({virtio::BalloonBuffer{kCommandGpa, 4, false}, id}); }
  // What Linux does on a configuration interrupt and in its worker: echo a new id, later say STOP.
  void DriverLooks() {
    const uint32_t id = device.state().cmd_id;
    if (id == seen_id) return;
    if (driver_active) QueueCommand(virtio::kHintStop);
    driver_active = id >= virtio::kHintFirstId;
    if (driver_active) QueueCommand(id);
    seen_id = id;
  }
  void DriverStops() {
    if (driver_active) QueueCommand(virtio::kHintStop);
    driver_active = false;
  }

  // --- the device ---
  bool HandleOne() {
    if (queue.empty()) return false;
    const auto [buffer, id] = queue.front();
    queue.pop_front();
    command_ = id;
    device.HandleChain(BalloonQueue::kFreePage, 0, {&buffer, 1}, *this, *this);
    return true;
  }
  void HandleAll() {
    while (HandleOne()) {
    }
  }

  // --- the migration ---
  PageSets Harvest() {
    PageSets out = Empty();
    out[0].Union(cpu_log);
    out[0].Union(vhost_log);
    cpu_log.Reset();
    vhost_log.Reset();
    return out;
  }
  absl::Status Begin(HintSession::Conditions conditions = {}) {
    (void)Harvest();  // S0
    RETURN_IF_ERROR(session.BaselineTaken(conditions));
    written_after_publish.fill(false);
    RETURN_IF_ERROR(session.Published());
    return device.StartHinting().status();  // S1
  }
  void Send(uint64_t page) {
    destination[page] = source[page];
    sent[page] = true;
  }
  // The rest of a migration: what is neither sent nor to be skipped goes, then what is dirty, with the guest
  // frozen.
  void Finish() {
    if (session.collecting()) session.Drop("no stop in time");
    // Round 0 sends what is not hinted ...
    for (uint64_t page = 0; page < kPages; ++page)
      if (!session.hinted()[0].Test(page)) Send(page);
    PageSets dirty = Harvest();  // S4
    auto skip = session.Resolve(dirty);
    ASSERT_TRUE(skip.ok()) << skip.status();
    for (uint64_t page = 0; page < kPages; ++page) {
      skipped[page] = !sent[page] && (*skip)[0].Test(page);
      // ... and round 1 what is dirty.
      if (dirty[0].Test(page)) Send(page);
    }
    dirty = Harvest();
    for (uint64_t page = 0; page < kPages; ++page)
      if (dirty[0].Test(page)) Send(page);
  }
  // Nothing that was written since the id was published may be missing, nor anything that was never hinted.
  bool Right() const {
    for (uint64_t page = 0; page < kPages; ++page) {
      if (destination[page] == source[page]) continue;
      if (!skipped[page] || written_after_publish[page]) return false;
      if (destination[page] != 0) return false;
    }
    return true;
  }

  BalloonDevice device;
  HintSession session;
  std::array<uint64_t, kPages> source{}, destination{};
  std::array<bool, kPages> free{}, sent{}, skipped{}, written_after_publish{};
  PageSet cpu_log{kPages}, vhost_log{kPages};
  uint64_t version = 0;
  std::deque<std::pair<virtio::BalloonBuffer, uint32_t>> queue;
  bool driver_active = false;
  uint32_t seen_id = virtio::kHintDone;

 private:
  void OnInflate(uint64_t, uint64_t) override {}
  void OnDeflate(uint64_t, uint64_t) override {}
  void OnReported(uint64_t, uint64_t) override {}
  void OnHintStart() override { session.OnStart(); }
  void OnHint(uint64_t gpa, uint64_t size) override { session.OnHint(0, gpa / kPageSize, size / kPageSize); }
  void OnHintStop() override { session.OnStop(); }
  absl::Status Read(uint64_t, void* out, size_t size) const override {
    std::memcpy(out, &command_, size);
    return absl::OkStatus();
  }
  uint32_t command_ = 0;
};

// A guest that has used its memory, and freed pages 4 to 11.
struct UsedGuest : World {
  UsedGuest() {
    for (uint64_t page = 0; page < kPages; ++page) Write(page);
    for (uint64_t page = 4; page < 12; ++page) Free(page);
  }
};

TEST(HintSession, FreePagesAreNotSent) {
  UsedGuest w;
  ASSERT_TRUE(w.Begin().ok());
  w.DriverLooks();
  for (uint64_t page = 4; page < 12; ++page) w.QueueHint(page);
  w.DriverStops();
  w.HandleAll();
  EXPECT_EQ(w.session.state(), HintSession::State::kStopped);
  w.Finish();
  EXPECT_TRUE(w.Right());
  for (uint64_t page = 0; page < kPages; ++page) EXPECT_EQ(w.skipped[page], page >= 4 && page < 12) << page;
}

// a) The guest takes a page back and writes it while the hint is still in the queue.
TEST(HintSession, HintRaceA_ReuseAfterHint) {
  for (bool before_handling : {true, false}) {
    UsedGuest w;
    ASSERT_TRUE(w.Begin().ok());
    w.DriverLooks();
    w.QueueHint(5);
    w.QueueHint(6);
    if (before_handling) w.Write(5);
    w.HandleAll();
    if (!before_handling) w.Write(5);
    w.DriverStops();
    w.HandleAll();
    w.Finish();
    EXPECT_TRUE(w.Right());
    EXPECT_FALSE(w.skipped[5]);
    EXPECT_EQ(w.destination[5], w.source[5]);
    EXPECT_TRUE(w.skipped[6]);
  }
}

// b) A hint that is handled after the next synchronisation would erase what that one found.
TEST(HintSession, HintRaceB_HintAfterTheHarvest) {
  UsedGuest w;
  ASSERT_TRUE(w.Begin().ok());
  w.DriverLooks();
  w.QueueHint(5);
  w.DriverStops();
  w.HandleAll();
  w.QueueHint(7);  // of this id, behind its stop
  w.Write(7);
  w.HandleAll();
  w.Finish();
  EXPECT_TRUE(w.Right());
  EXPECT_FALSE(w.skipped[7]);
  // A session that has ended takes nothing any more.
  w.session.OnHint(0, 8, 1);
  EXPECT_FALSE(w.session.hinted()[0].Test(8));
}

// c) The vCPUs are paused, the balloon's queue is not: what is handled from now on has no effect.
TEST(HintSession, HintRaceC_HintsOfAPausedGuest) {
  UsedGuest w;
  ASSERT_TRUE(w.Begin().ok());
  w.DriverLooks();
  w.QueueHint(5);
  w.HandleAll();
  w.QueueHint(6);
  w.session.Drop("the guest is paused");
  w.DriverStops();
  w.HandleAll();
  EXPECT_EQ(w.session.state(), HintSession::State::kDropped);
  w.Finish();
  EXPECT_TRUE(w.Right());
  for (bool skipped : w.skipped) EXPECT_FALSE(skipped);
}

// d) The echo of the command id is not the end of the hints.
TEST(HintSession, HintRaceD_NothingIsSkippedBeforeTheInBandStop) {
  UsedGuest w;
  ASSERT_TRUE(w.Begin().ok());
  w.DriverLooks();
  w.HandleAll();
  w.QueueHint(5);
  w.HandleAll();
  EXPECT_TRUE(absl::IsFailedPrecondition(w.session.Resolve(w.Harvest()).status()));
  // ... and without it everything is sent.
  w.Finish();
  EXPECT_TRUE(w.Right());
  EXPECT_FALSE(w.skipped[5]);
}

// e) A guest that poisons its free pages would find zeroes.
TEST(HintSession, HintRaceE_PoisonedPagesAreNotLeftOut) {
  UsedGuest w;
  EXPECT_TRUE(absl::IsFailedPrecondition(w.Begin({.post_copy = false, .poison = 0xaaaaaaaa})));
  EXPECT_EQ(w.device.state().cmd_id, virtio::kHintDone);
}

// f) A page that was left out could be asked for.
TEST(HintSession, HintRaceF_NotWithPostCopy) {
  UsedGuest w;
  EXPECT_TRUE(absl::IsFailedPrecondition(w.Begin({.post_copy = true, .poison = 0})));
}

// g) The byte order is a matter of the device: Balloon.HintRaceG in balloon_test.cc.

// h) The device goes away with hints in its queue.
TEST(HintSession, HintRaceH_DeviceGoneWithHintsPending) {
  UsedGuest w;
  ASSERT_TRUE(w.Begin().ok());
  w.DriverLooks();
  w.QueueHint(5);
  w.HandleAll();
  w.QueueHint(6);
  w.device.Reset();
  w.session.Drop("the guest reset its balloon");
  w.DriverStops();
  w.HandleAll();
  w.Finish();
  EXPECT_TRUE(w.Right());
  for (bool skipped : w.skipped) EXPECT_FALSE(skipped);
}

// i) What is skipped must be zero at the destination: it never held anything else (Right() checks it), also
// at the next attempt, which has a destination of its own. End to end in engine_hints_test.cc.
TEST(HintSession, HintRaceI_SkippedPagesArriveAsZeroes) {
  UsedGuest w;
  ASSERT_TRUE(w.Begin().ok());
  w.DriverLooks();
  w.QueueHint(5);
  w.DriverStops();
  w.HandleAll();
  w.Finish();
  EXPECT_TRUE(w.skipped[5]);
  EXPECT_EQ(w.destination[5], 0u);
  EXPECT_NE(w.source[5], 0u);
}

// j) A page that a device writes by DMA is dirty in the device's log only.
TEST(HintSession, HintRaceJ_WritesOfDevicesCountAsWell) {
  UsedGuest w;
  ASSERT_TRUE(w.Begin().ok());
  w.DriverLooks();
  w.QueueHint(5);
  w.Write(5, /*by_device=*/true);
  w.DriverStops();
  w.HandleAll();
  w.Finish();
  EXPECT_TRUE(w.Right());
  EXPECT_FALSE(w.skipped[5]);
}

TEST(HintSession, StepsOutOfOrderAreRefused) {
  HintSession session(World::Empty());
  EXPECT_TRUE(absl::IsFailedPrecondition(session.Published()));
  session.OnStart();
  session.OnHint(0, 0, 4);
  session.OnStop();
  EXPECT_EQ(session.state(), HintSession::State::kNew);
  EXPECT_TRUE(session.hinted()[0].Empty());
  ASSERT_TRUE(session.BaselineTaken({}).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(session.BaselineTaken({})));
  ASSERT_TRUE(session.Published().ok());
  session.OnStop();  // of an earlier session
  EXPECT_TRUE(session.collecting());
  session.OnStart();
  session.OnHint(7, 0, 4);  // no such block
  session.OnHint(0, UINT64_MAX, 4);
  session.OnHint(0, 14, UINT64_MAX);
  EXPECT_EQ(session.hinted()[0].Count(), 2u);
}

// At least a hundred thousand interleavings of guest, driver, device and migration.
TEST(HintSession, RandomInterleavings_NoWrittenPageIsLost) {
  constexpr int kRuns = 100'000;
  const uint64_t seed = std::random_device{}();
  RecordProperty("seed", std::to_string(seed));
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  uint64_t skipped = 0, reused = 0;
  std::mt19937_64 random(seed);
  for (int run = 0; run < kRuns; ++run) {
    World w;
    const auto pick = [&](uint64_t n) { return random() % n; };
    for (uint64_t page = 0; page < kPages; ++page) {
      if (pick(4)) w.Write(page);
      if (pick(2)) w.Free(page);
    }
    bool begun = false;
    const uint64_t steps = 20 + pick(60);
    for (uint64_t step = 0; step < steps; ++step) {
      const uint64_t page = pick(kPages);
      switch (pick(12)) {
        case 0:
          w.Write(page);
          break;
        case 1:
          w.Write(page, true);
          break;
        case 2:
          w.Free(page);
          break;
        case 3:
        case 4:
        case 5:
          if (w.driver_active || pick(8) == 0) w.QueueHint(page);
          break;
        case 6:
          w.DriverLooks();
          break;
        case 7:
          if (pick(4) == 0) w.DriverStops();
          break;
        case 8:
        case 9:
          w.HandleOne();
          break;
        case 10:
          if (!begun) {
            begun = w.Begin().ok();
          } else if (pick(3) == 0) {
            // The source sends while hints come in.
            if (!w.session.hinted()[0].Test(page)) w.Send(page);
          }
          break;
        case 11:
          // A hostile driver: words that belong to no protocol.
          if (pick(4) == 0) w.QueueCommand(pick(2) ? virtio::kHintFirstId + pick(3) : pick(3));
          break;
      }
    }
    if (!begun) begun = w.Begin().ok();
    ASSERT_TRUE(begun);
    if (pick(4)) {
      w.device.StopHinting();
      w.DriverLooks();
      while (w.session.collecting() && w.HandleOne())
        if (pick(3) == 0) w.Write(pick(kPages));
    }
    w.Finish();
    ASSERT_TRUE(w.Right()) << "seed " << seed << " run " << run;
    for (uint64_t page = 0; page < kPages; ++page) {
      skipped += w.skipped[page];
      reused += w.session.hinted()[0].Test(page) && w.written_after_publish[page];
    }
  }
  // The dice found what they were thrown for.
  EXPECT_GT(skipped, static_cast<uint64_t>(kRuns) / 5);
  EXPECT_GT(reused, static_cast<uint64_t>(kRuns) / 10);
}

// The same as a property, with a smallest counterexample should there be one.
TEST(HintSession, Property_OneSessionAgainstAnyWrites) {
  EXPECT_TRUE(rc::check("no page written since the id is left out", [] {
    UsedGuest w;
    RC_ASSERT(w.Begin().ok());
    w.DriverLooks();
    const auto script = *rc::gen::container<std::vector<std::pair<uint8_t, uint8_t>>>(
        rc::gen::pair(rc::gen::inRange<uint8_t>(0, 5), rc::gen::inRange<uint8_t>(0, kPages)));
    for (const auto& [what, page] : script) {
      if (what == 0) w.Write(page);
      if (what == 1) w.Write(page, true);
      if (what == 2) w.Free(page);
      if (what == 3) w.QueueHint(page);
      if (what == 4) w.HandleOne();
    }
    w.DriverStops();
    w.HandleAll();
    w.Finish();
    RC_ASSERT(w.Right());
  }));
}

}  // namespace
}  // namespace baton::memory
