// Migrations that are cancelled at either end, or cut, at every moment: exactly one side may run the guest,
// and nothing waits for what does not come any more.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <future>
#include <thread>

#include "tests/unit/migration/engine_testing.h"

namespace baton::migration {
namespace {

using test::EngineTest;
using test::Host;
using K = JournalRecord::Kind;

TEST_F(EngineTest, ThereIsNothingToCancelAfterTheEnd) {
  Prepare("m1");
  StartDestination();
  StartSource();
  ExpectMoved();
  EXPECT_FALSE(out_->Cancel().ok());
  EXPECT_FALSE(out_->Resolve(v1::REFUSED, true).ok());
  EXPECT_FALSE(in_->Abort("late").ok());
}

TEST_F(EngineTest, AbortAtTheDestinationLetsTheSourceGoOn) {
  Prepare("m1");
  params_.set_bandwidth(1 << 20);
  StartDestination();
  proxy_.set_filter([&](bool to_destination, const v1::PeerMessage& message) {
    if (!to_destination && message.has_welcome()) {
      EXPECT_TRUE(in_->Abort("asked to").ok());
    }
    return true;
  });
  StartSource();
  ExpectStayed(v1::CANCELLED_BY_REQUEST);
  EXPECT_EQ(in_->report().phase(), v1::CANCELLED);
}

// Data channels that the destination never gets: as when it was told to abort before they came and turned
// them away, with what the source had already written into them.
class LostChannelsTest : public EngineTest {
 protected:
  ~LostChannelsTest() override {
    out_.reset();
    proxy_.Cut();
    for (std::thread& drain : drains_) drain.join();
  }
  // `then`: once the source has sent all of a round and waits for it to be acknowledged.
  void Begin(std::function<void()> then) {
    Prepare("m1");
    StartDestination();
    proxy_.set_accept([this](const stream::PreambleBytes& bytes, UniqueFd fd) {
      auto preamble = stream::DecodePreamble(bytes);
      if (!preamble.ok() || preamble->channel == 0) return in_->AcceptChannel(bytes, std::move(fd));
      drains_.emplace_back([fd = fd.release()] {
        const UniqueFd owned(fd);
        char buffer[4096];
        while (::read(owned.get(), buffer, sizeof buffer) > 0) continue;
      });
      return absl::OkStatus();
    });
    proxy_.set_filter([then](bool to_destination, const v1::PeerMessage& message) {
      if (to_destination && message.has_round_end()) then();
      return true;
    });
    StartSource();
  }
  std::vector<std::thread> drains_;  // of the proxy's thread until it was cut
};

TEST_F(LostChannelsTest, AnAbortEndsTheWaitForThem) {
  Begin([this] { EXPECT_TRUE(in_->Abort("asked to").ok()); });
  ExpectStayed(v1::CANCELLED_BY_REQUEST);
  EXPECT_EQ(in_->report().phase(), v1::CANCELLED);
}

TEST_F(LostChannelsTest, ASourceThatLeavesEndsTheWaitForThem) {
  Begin([this] { EXPECT_TRUE(out_->Cancel().ok()); });
  ExpectStayed(v1::CANCELLED_BY_REQUEST);
}

// Cancel or cut when the n-th message of channel 0 passes, in either direction.
enum class Blow { kCancel, kCutBefore, kCutAfter, kAbortDestination };

class BlowTest : public EngineTest, public testing::WithParamInterface<Blow> {
 protected:
  // False if the migration has fewer messages than `at`.
  bool Run(int at) {
    std::atomic<int> seen{0};
    std::atomic<bool> struck{false}, cut_next{false};
    std::promise<void> started;  // the first message may pass before out_ is there
    const std::shared_future<void> have_source = started.get_future().share();
    Prepare("m1");
    proxy_.set_filter([&](bool, const v1::PeerMessage&) {
      if (cut_next.exchange(false)) return false;
      if (seen++ != at) return true;
      struck = true;
      switch (GetParam()) {
        case Blow::kCancel:
          have_source.wait();
          (void)out_->Cancel();
          return true;
        case Blow::kAbortDestination:
          (void)in_->Abort("test");
          return true;
        case Blow::kCutBefore:
          return false;
        case Blow::kCutAfter:
          cut_next = true;
          return true;
      }
      return true;
    });
    StartDestination();
    StartSource();
    started.set_value();
    const auto source = SourceEnd();
    const auto destination = DestinationEnd();
    // It uses what is local here, and a message may still be on its way.
    proxy_.set_filter(nullptr);
    const bool moved = source == OutgoingMigration::Outcome::kReleased;
    EXPECT_EQ(destination, moved ? IncomingMigration::Outcome::kOwner : IncomingMigration::Outcome::kRefused)
        << out_->report().ShortDebugString() << in_->report().ShortDebugString();
    EXPECT_TRUE(moved || source == OutgoingMigration::Outcome::kResumed);
    ExpectOneGuest(moved);
    if (!moved && !HasFailure()) ExpectRetryWorks();
    return struck;
  }
};

TEST_P(BlowTest, AtEveryMessageExactlyOneGuestRuns) {
  int at = 0;
  for (; at < 200; ++at) {
    source_ = nullptr;
    source_ = std::make_unique<Host>(true, std::vector<JournalRecord>{{K::kOwner, 1, ""}});
    const bool struck = Run(at);
    out_.reset();
    if (HasFailure()) FAIL() << "at message " << at;
    if (!struck) break;
  }
  EXPECT_GT(at, 10) << "there are more messages than that";
}

INSTANTIATE_TEST_SUITE_P(Engine, BlowTest,
                         testing::Values(Blow::kCancel, Blow::kCutBefore, Blow::kCutAfter,
                                         Blow::kAbortDestination),
                         [](const auto& info) {
                           switch (info.param) {
                             case Blow::kCancel:
                               return "Cancel";
                             case Blow::kCutBefore:
                               return "CutBefore";
                             case Blow::kCutAfter:
                               return "CutAfter";
                             default:
                               return "AbortDestination";
                           }
                         });

}  // namespace
}  // namespace baton::migration
