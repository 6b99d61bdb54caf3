// Both engines with a guest that gives free page hints, well or badly, while it goes on writing its memory.
#include <gtest/gtest.h>

#include <condition_variable>
#include <functional>
#include <future>

#include "agent/migration/destination.h"
#include "agent/migration/source.h"
#include "tests/unit/migration/cutting_proxy.h"
#include "tests/unit/migration/fake_host.h"

namespace baton::migration {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using K = JournalRecord::Kind;
using Outcome = OutgoingMigration::Outcome;

constexpr Duration kHintTestEnd = seconds(60);
constexpr uint64_t kFirstFree = 100, kFreePages = 300;

// A balloon whose guest answers on a thread of its own.
class FakeHints final : public memory::HintSource {
 public:
  ~FakeHints() override { Join(); }
  uint32_t poison() const override { return poison_value; }
  absl::Status Publish(memory::HintListener& listener) override {
    ++published;
    if (!has_driver) return absl::FailedPreconditionError("the guest has no driver");
    Join();
    {
      std::lock_guard lock(mutex_);
      listener_ = &listener;
      stop_asked_ = false;
      done = false;
    }
    guest_ = std::thread([this] { answer(*this); });
    return absl::OkStatus();
  }
  void PublishStop() override {
    std::lock_guard lock(mutex_);
    ++stops;
    stop_asked_ = true;
    changed_.notify_all();
  }
  void Finish() override {
    {
      std::lock_guard lock(mutex_);
      if (listener_ && at_done) at_done();
      listener_ = nullptr;
      done = true;
    }
    changed_.notify_all();
  }
  void AllowDiscard(bool allow) override { discard = allow; }

  // What the guest can do. Without effect after Finish.
  void Start() {
    Say([](memory::HintListener& l) { l.OnStart(); });
  }
  // Of these pages those that are free now.
  void Hint(uint64_t first, uint64_t count) {
    for (uint64_t page = first; page < first + count; ++page)
      if (is_free(page)) HintAnyway(page);
  }
  void HintAnyway(uint64_t page) {
    Say([&](memory::HintListener& l) { l.OnHint(0, page, 1); });
  }
  void Stop() {
    Say([](memory::HintListener& l) { l.OnStop(); });
  }
  void Lose() {
    Say([](memory::HintListener& l) { l.OnLost("the guest reset its balloon"); });
  }
  // Until the host asks it to stop, or is done with it.
  void AwaitStop() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return stop_asked_ || done; });
  }
  bool AwaitDone(Duration limit) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, limit, [&] { return done.load(); });
  }

  std::function<void(FakeHints&)> answer;
  std::function<void()> at_done;
  std::function<bool(uint64_t page)> is_free;
  uint32_t poison_value = 0;
  bool has_driver = true;
  std::atomic<int> published{0}, stops{0};
  std::atomic<bool> done{true}, discard{true};

 private:
  void Say(const std::function<void(memory::HintListener&)>& word) {
    std::lock_guard lock(mutex_);
    if (listener_) word(*listener_);
  }
  void Join() {
    Finish();
    if (guest_.joinable()) guest_.join();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  memory::HintListener* listener_ = nullptr;
  bool stop_asked_ = false;
  std::thread guest_;
};

void AnswerAll(FakeHints& h) {
  h.Start();
  for (uint64_t page = kFirstFree; page < kFirstFree + kFreePages; page += 10) h.Hint(page, 10);
  h.Stop();
}

struct HintedHost {
  HintedHost(bool runs, std::vector<JournalRecord> records)
      : ram(test::MakeRam()),
        vmm(ram, faults, runs),
        devices(ram, faults),
        journal(faults, std::move(records)) {
    devices.hint_source = &hints;
    hints.is_free = [this](uint64_t page) { return vmm.IsFree(page); };
  }
  test::Faults faults;
  memory::GuestRam ram;
  FakeHints hints;
  test::FakeVmm vmm;
  test::FakeDevices devices;
  test::MemoryLog journal;
};

class EngineHints : public testing::Test {
 protected:
  EngineHints() {
    source_ = std::make_unique<HintedHost>(true, std::vector<JournalRecord>{{K::kOwner, 1, ""}});
    source_->hints.answer = AnswerAll;
    source_->vmm.Free(kFirstFree, kFreePages);
  }
  ~EngineHints() override {
    proxy_.set_accept(nullptr);
    out_.reset();
    in_.reset();
  }
  void Start(const std::string& id) {
    out_.reset();
    proxy_.set_accept(nullptr);
    in_.reset();
    destination_ = std::make_unique<HintedHost>(false, std::vector<JournalRecord>{});
    stream::Token token{};
    token.fill(static_cast<uint8_t>(id.back()));
    DestinationOptions there;
    there.migration_id = id;
    there.vm = "vm";
    there.epoch = 1;
    there.token = token;
    auto in = IncomingMigration::Start(there, {destination_->vmm, destination_->ram, destination_->devices,
                                               destination_->journal, [](const v1::SideReport&) {}});
    ASSERT_TRUE(in.ok()) << in.status();
    in_ = *std::move(in);
    proxy_.set_accept([this](const stream::PreambleBytes& preamble, UniqueFd fd) {
      return in_->AcceptChannel(preamble, std::move(fd));
    });
    SourceOptions here;
    here.migration_id = id;
    here.vm = "vm";
    here.epoch = 1;
    here.params = params_;
    here.dial.address = proxy_.address();
    here.dial.token = token;
    here.hints = options_;
    out_ = OutgoingMigration::Start(here, {source_->vmm, source_->ram, source_->devices, source_->journal,
                                           [this]() -> absl::StatusOr<std::unique_ptr<memory::DirtySource>> {
                                             return std::make_unique<test::FakeDirtySource>(source_->vmm,
                                                                                            source_->faults);
                                           },
                                           [](const v1::SideReport&) {}});
  }
  Outcome End() {
    auto end = out_->Wait(Deadline::After(kHintTestEnd));
    EXPECT_TRUE(end.ok()) << end.status();
    auto there = in_->Wait(Deadline::After(kHintTestEnd));
    EXPECT_TRUE(there.ok()) << there.status();
    return end.value_or(Outcome::kNone);
  }
  void ExpectMoved() {
    ASSERT_EQ(End(), Outcome::kReleased) << out_->report().ShortDebugString();
    const absl::Status memory = destination_->vmm.Verify();
    EXPECT_TRUE(memory.ok()) << memory;
    // The guest was told, at both sides, and the destination makes holes again.
    EXPECT_TRUE(source_->hints.done);
    EXPECT_TRUE(destination_->hints.done);
    EXPECT_TRUE(destination_->hints.discard);
  }
  // Pages of the hinted range that are free and hold nothing at the destination.
  uint64_t ZeroPagesThere() {
    uint64_t count = 0;
    for (uint64_t page = kFirstFree; page < kFirstFree + kFreePages; ++page) {
      const auto* words =
          reinterpret_cast<const uint64_t*>(destination_->ram.blocks()[0].base() + page * memory::kPageSize);
      count += destination_->vmm.IsFree(page) && words[0] == 0 && words[255] == 0 && words[511] == 0;
    }
    return count;
  }
  v1::Progress Progress() const { return out_->report().progress(); }

  test::CuttingProxy proxy_;
  std::unique_ptr<HintedHost> source_, destination_;
  v1::MigrationParams params_;
  HintOptions options_;
  std::unique_ptr<OutgoingMigration> out_;
  std::unique_ptr<IncomingMigration> in_;
};

TEST_F(EngineHints, FreePagesAreNotSent) {
  Start("m1");
  ExpectMoved();
  const uint64_t skipped = Progress().bytes().hint_skipped();
  EXPECT_GT(skipped, kFreePages / 2 * memory::kPageSize);
  EXPECT_LE(skipped, kFreePages * memory::kPageSize);
  EXPECT_LE(Progress().hints().hinted(), kFreePages * memory::kPageSize);
  EXPECT_EQ(Progress().hints().spoilt(), Progress().hints().hinted() - skipped);
  EXPECT_EQ(Progress().hints().unused(), "");
  EXPECT_TRUE(Progress().hints().has_answer());
  // Every page is accounted for once.
  EXPECT_EQ(source_->hints.published, 1);
  EXPECT_EQ(source_->hints.stops, 0);
  EXPECT_GT(ZeroPagesThere(), kFreePages / 2);
}

TEST_F(EngineHints, SwitchedOff_NobodyIsAsked) {
  params_.set_free_page_hints(false);
  Start("m1");
  ExpectMoved();
  EXPECT_EQ(source_->hints.published, 0);
  EXPECT_EQ(Progress().bytes().hint_skipped(), 0u);
}

TEST_F(EngineHints, GuestWithoutDriver_IsMovedAsBefore) {
  source_->hints.has_driver = false;
  Start("m1");
  ExpectMoved();
  EXPECT_EQ(Progress().bytes().hint_skipped(), 0u);
  EXPECT_EQ(Progress().hints().unused(), "the guest has no driver");
}

TEST_F(EngineHints, HintRaceA_ReuseAfterHint) {
  // The guest writes what it has just hinted, and what it is about to hint, all the time.
  source_->vmm.working_set = test::kPages - 1;
  Start("m1");
  ExpectMoved();
}

TEST_F(EngineHints, HintRaceB_HintsBehindTheStop) {
  source_->hints.answer = [](FakeHints& h) {
    h.Start();
    h.Hint(kFirstFree, 10);
    h.Stop();
    for (uint64_t page = 0; page < test::kPages; ++page) h.HintAnyway(page);
  };
  Start("m1");
  ExpectMoved();
  EXPECT_LE(Progress().bytes().hint_skipped(), 10 * memory::kPageSize);
}

// HintRaceC: nothing is waited for, and nothing counts, once the guest is frozen: the session ends with round
// 0, by DONE, while the guest runs.
TEST_F(EngineHints, HintRaceC_TheSessionEndsBeforeTheGuestIsFrozen) {
  std::atomic<int> told_running{0}, told_frozen{0};
  source_->hints.at_done = [&] { ++(source_->vmm.runs() ? told_running : told_frozen); };
  Start("m1");
  ExpectMoved();
  EXPECT_EQ(told_running, 1);
  EXPECT_EQ(told_frozen, 0);
}

TEST_F(EngineHints, HintRaceD_NoInBandStop_EverythingIsSent) {
  options_.stop = milliseconds(200);
  options_.head = milliseconds(300);
  source_->hints.answer = [](FakeHints& h) {
    h.Start();
    h.Hint(kFirstFree, kFreePages);
  };
  Start("m1");
  ExpectMoved();
  EXPECT_EQ(source_->hints.stops, 1);
  EXPECT_EQ(Progress().bytes().hint_skipped(), 0u);
  EXPECT_EQ(Progress().hints().unused(), "the guest did not end its hints in time");
  EXPECT_LT(ZeroPagesThere(), 10u);
}

TEST_F(EngineHints, StopOnRequest_IsWaitedFor) {
  options_.head = milliseconds(100);
  source_->hints.answer = [](FakeHints& h) {
    h.Start();
    h.Hint(kFirstFree, kFreePages);
    h.AwaitStop();
    h.Stop();
  };
  Start("m1");
  ExpectMoved();
  EXPECT_EQ(source_->hints.stops, 1);
  EXPECT_GT(Progress().bytes().hint_skipped(), 0u);
}

TEST_F(EngineHints, LateHints_MeetMemoryThatWasSent) {
  options_.first_hint = milliseconds(1);
  options_.worth_waiting = UINT64_MAX;
  source_->hints.answer = [](FakeHints& h) {
    h.AwaitStop();  // by then everything else has gone
    AnswerAll(h);
  };
  Start("m1");
  ExpectMoved();
  EXPECT_EQ(Progress().bytes().hint_skipped(), 0u);
  EXPECT_GT(Progress().hints().hinted(), 0u);
  EXPECT_EQ(Progress().hints().spoilt(), Progress().hints().hinted());
}

TEST_F(EngineHints, HintRaceE_PoisonedPagesAreSent) {
  source_->hints.poison_value = 0xaaaaaaaa;
  Start("m1");
  ExpectMoved();
  EXPECT_EQ(source_->hints.published, 0);
  EXPECT_EQ(Progress().bytes().hint_skipped(), 0u);
  EXPECT_NE(Progress().hints().unused(), "");
}

TEST_F(EngineHints, HintRaceH_BalloonLostHalfWay_EverythingIsSent) {
  source_->hints.answer = [](FakeHints& h) {
    h.Start();
    h.Hint(kFirstFree, kFreePages);
    h.Lose();
  };
  Start("m1");
  ExpectMoved();
  EXPECT_EQ(Progress().bytes().hint_skipped(), 0u);
  EXPECT_EQ(Progress().hints().unused(), "the guest reset its balloon");
}

TEST_F(EngineHints, HintRaceI_SkippedPagesAreZeroesThere_AlsoAtTheSecondAttempt) {
  destination_ = nullptr;
  source_->faults.Fail("drain", 1);
  Start("m1");
  EXPECT_EQ(End(), Outcome::kResumed);
  EXPECT_TRUE(source_->hints.done);
  EXPECT_TRUE(source_->hints.discard);
  EXPECT_TRUE(source_->vmm.runs());
  source_->faults.Clear();
  Start("m2");
  ExpectMoved();
  EXPECT_EQ(source_->hints.published, 2);
  EXPECT_GT(Progress().bytes().hint_skipped(), 0u);
  EXPECT_GT(ZeroPagesThere(), kFreePages / 2);
}

// HintRaceJ: the device writes its ring by itself; only its own log knows.
TEST_F(EngineHints, HintRaceJ_WritesOfDevicesAreInTheHarvest) {
  source_->hints.answer = [](FakeHints& h) {
    h.Start();
    h.HintAnyway(test::kRingPage);
    h.Hint(kFirstFree, kFreePages);
    h.Stop();
  };
  Start("m1");
  ExpectMoved();  // compares the ring there with the state that was shipped
}

TEST_F(EngineHints, CancelWhileTheGuestIsAsked) {
  options_.head = options_.stop = seconds(30);
  options_.first_hint = seconds(30);
  std::promise<void> asked;
  source_->hints.answer = [&](FakeHints& h) {
    h.Start();
    h.Hint(kFirstFree, kFreePages);
    asked.set_value();
    h.AwaitDone(kHintTestEnd);
  };
  Start("m1");
  asked.get_future().wait();
  EXPECT_FALSE(source_->hints.discard);
  ASSERT_TRUE(out_->Cancel().ok());
  EXPECT_EQ(End(), Outcome::kResumed);
  EXPECT_EQ(out_->report().reason(), v1::CANCELLED_BY_REQUEST);
  EXPECT_TRUE(source_->hints.done);
  EXPECT_TRUE(source_->hints.discard);
  EXPECT_TRUE(source_->vmm.runs());
}

}  // namespace
}  // namespace baton::migration
