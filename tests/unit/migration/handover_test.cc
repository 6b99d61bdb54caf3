#include "agent/migration/handover.h"

#include <gtest/gtest.h>

#include <functional>
#include <random>

namespace baton::migration {
namespace {

using E = Handover::Event;
using K = JournalRecord::Kind;

void Drive(Handover& side, std::initializer_list<E> events) {
  for (E event : events) ASSERT_TRUE(side.Apply(event).ok()) << EventName(event);
}

TEST(Handover, HappyPathHandsTheGuestOverOnce) {
  Handover source = Handover::Source("m1", 4);
  Handover destination = Handover::Destination("m1", 4);
  EXPECT_TRUE(source.may_resume());
  EXPECT_FALSE(destination.may_start());
  Drive(source, {E::kFrozen, E::kYieldBegun});
  EXPECT_FALSE(source.may_resume());
  EXPECT_FALSE(source.may_send_yield());
  Drive(source, {E::kYieldDurable});
  EXPECT_FALSE(source.may_send_yield()) << "not everything was sent";
  Drive(source, {E::kAllSent});
  EXPECT_TRUE(source.may_send_yield());
  Drive(destination, {E::kYieldHeard});
  EXPECT_FALSE(destination.may_write_owner()) << "the state was not checked";
  Drive(destination, {E::kStateChecked});
  EXPECT_TRUE(destination.may_write_owner());
  Drive(destination, {E::kOwnerBegun});
  EXPECT_FALSE(destination.may_start());
  EXPECT_EQ(destination.answer_to_query(), v1::IDLE);
  Drive(destination, {E::kOwnerDurable});
  EXPECT_TRUE(destination.may_start());
  EXPECT_EQ(destination.answer_to_query(), v1::OWNER);
  EXPECT_EQ(destination.own_epoch(), 5u);
  Drive(source, {E::kOwnerHeard});
  EXPECT_TRUE(source.must_release());
  EXPECT_FALSE(source.may_resume());
  Drive(source, {E::kReleased});
  EXPECT_TRUE(source.settled());
}

TEST(Handover, NothingThatNeedsYieldIsAllowedBeforeFreezing) {
  Handover source = Handover::Source("m1", 1);
  EXPECT_FALSE(source.Apply(E::kYieldBegun).ok());
  EXPECT_FALSE(source.Apply(E::kOwnerHeard).ok()) << "a destination that owns what was not yielded is wrong";
  EXPECT_TRUE(source.may_resume());
}

TEST(Handover, OwnerAfterRefusedIsNeverAllowed) {
  Handover destination = Handover::Destination("m1", 1);
  Drive(destination, {E::kStateChecked, E::kYieldHeard, E::kRefuseBegun});
  EXPECT_FALSE(destination.may_write_owner()) << "REFUSED may be on the disk already";
  EXPECT_FALSE(destination.Apply(E::kOwnerBegun).ok());
  Drive(destination, {E::kRefuseDurable});
  EXPECT_FALSE(destination.Apply(E::kOwnerBegun).ok());
  EXPECT_EQ(destination.answer_to_query(), v1::REFUSED);
}

TEST(Handover, RefusedAfterOwnerWasBegunIsNotAllowed) {
  Handover destination = Handover::Destination("m1", 1);
  Drive(destination, {E::kStateChecked, E::kYieldHeard, E::kOwnerBegun});
  EXPECT_FALSE(destination.Apply(E::kRefuseBegun).ok());
  EXPECT_FALSE(destination.Apply(E::kCancel).ok());
  Drive(destination, {E::kOwnerFailed});
  EXPECT_TRUE(destination.must_refuse());
  EXPECT_FALSE(destination.may_write_owner());
}

TEST(Handover, YieldedSourceResumesOnlyAfterADurableRefusal) {
  Handover source = Handover::Source("m1", 7);
  Drive(source, {E::kFrozen, E::kYieldBegun, E::kYieldDurable, E::kConnectionLost});
  EXPECT_TRUE(source.must_ask());
  EXPECT_FALSE(source.Apply(E::kResumed).ok());
  Drive(source, {E::kRefusedHeard});
  EXPECT_FALSE(source.may_resume());
  EXPECT_TRUE(source.must_write_refusal());
  Drive(source, {E::kRefusalDurable, E::kResumed});
  EXPECT_EQ(source.RefusedRecord(), (JournalRecord{K::kRefused, 7, "m1"}));
}

TEST(Handover, FencingMakesTheSourceNewerThanTheFencedDestination) {
  Handover source = Handover::Source("m1", 7);
  EXPECT_FALSE(source.Apply(E::kFenced).ok()) << "nothing to settle";
  Drive(source, {E::kFrozen, E::kYieldBegun, E::kYieldDurable, E::kFenced});
  EXPECT_EQ(source.RefusedRecord(), (JournalRecord{K::kFenced, 9, "m1"}));
  Drive(source, {E::kRefusalDurable});
  EXPECT_EQ(source.own_epoch(), 9u);
  EXPECT_FALSE(source.Apply(E::kOwnerHeard).ok()) << "a late verdict changes nothing any more";
  EXPECT_TRUE(source.may_resume());
}

TEST(Handover, RefusalHeardWhileTheYieldWriteIsUncertainWaitsForIt) {
  Handover source = Handover::Source("m1", 1);
  Drive(source, {E::kFrozen, E::kYieldBegun, E::kRefusedHeard});
  EXPECT_FALSE(source.may_resume());
  Handover failed = source;
  Drive(source, {E::kYieldDurable});
  EXPECT_TRUE(source.must_write_refusal());
  Drive(failed, {E::kYieldFailed});
  EXPECT_TRUE(failed.may_resume());
  EXPECT_FALSE(failed.may_write_yielded());
}

TEST(Handover, CancelledSourceDoesNotYield) {
  Handover source = Handover::Source("m1", 1);
  Drive(source, {E::kFrozen, E::kCancel});
  EXPECT_FALSE(source.Apply(E::kYieldBegun).ok());
  EXPECT_TRUE(source.may_resume());
}

TEST(Handover, RecoveredSidesFollowTheirJournals) {
  const JournalRecord owner{K::kOwner, 1, ""};
  auto yielded = Handover::Recover(v1::ROLE_SOURCE, "m1", 1, {owner, {K::kYielded, 1, "m1"}});
  ASSERT_TRUE(yielded.ok());
  EXPECT_TRUE(yielded->must_ask());
  auto refused =
      Handover::Recover(v1::ROLE_SOURCE, "m1", 1, {owner, {K::kYielded, 1, "m1"}, {K::kRefused, 1, "m1"}});
  ASSERT_TRUE(refused.ok());
  EXPECT_TRUE(refused->may_resume());
  auto fenced =
      Handover::Recover(v1::ROLE_SOURCE, "m1", 1, {owner, {K::kYielded, 1, "m1"}, {K::kFenced, 3, "m1"}});
  ASSERT_TRUE(fenced.ok());
  EXPECT_TRUE(fenced->may_resume());
  EXPECT_EQ(fenced->own_epoch(), 3u);
  auto waiting = Handover::Recover(v1::ROLE_DESTINATION, "m1", 1, {{K::kIncoming, 1, "m1"}});
  ASSERT_TRUE(waiting.ok());
  EXPECT_TRUE(waiting->must_refuse()) << "what had been received died with the process";
  auto owns =
      Handover::Recover(v1::ROLE_DESTINATION, "m1", 1, {{K::kIncoming, 1, "m1"}, {K::kOwner, 2, "m1"}});
  ASSERT_TRUE(owns.ok());
  EXPECT_TRUE(owns->may_start());
  EXPECT_FALSE(Handover::Recover(v1::ROLE_SOURCE, "m2", 1, {owner, {K::kYielded, 1, "m1"}}).ok());
}

TEST(Ownership, FollowsAGuestThereAndBack) {
  std::vector<JournalRecord> journal = {{K::kOwner, 1, ""}, {K::kYielded, 1, "m1"}, {K::kReleased, 1, "m1"}};
  auto now = ReplayOwnership(journal);
  ASSERT_TRUE(now.ok());
  EXPECT_EQ(now->state, Ownership::State::kReleased);
  journal.push_back({K::kIncoming, 2, "m2"});
  journal.push_back({K::kOwner, 3, "m2"});
  now = ReplayOwnership(journal);
  ASSERT_TRUE(now.ok()) << now.status();
  EXPECT_EQ(now->state, Ownership::State::kOwner);
  EXPECT_EQ(now->epoch, 3u);
  EXPECT_EQ(VerdictOf(journal, "m2").verdict, v1::OWNER);
  EXPECT_EQ(VerdictOf(journal, "m2").epoch, 3u);
  EXPECT_EQ(VerdictOf(journal, "m7").verdict, v1::IDLE);
}

TEST(Ownership, ImpossibleHistoriesAreDataLoss) {
  const std::vector<std::vector<JournalRecord>> histories = {
      {{K::kIncoming, 1, "m1"}, {K::kRefused, 1, "m1"}, {K::kOwner, 2, "m1"}},
      {{K::kYielded, 1, "m1"}},
      {{K::kOwner, 3, ""}, {K::kYielded, 2, "m1"}},
      {{K::kOwner, 3, ""}, {K::kOwner, 3, ""}},
      {{K::kOwner, 1, ""}, {K::kReleased, 1, "m1"}},
      {{K::kOwner, 1, ""}, {K::kYielded, 1, "m1"}, {K::kFenced, 2, "m1"}},
      {{K::kOwner, 1, ""}, {K::kIncoming, 1, "m1"}},
      {{K::kOwner, 1, ""}, {K::kYielded, 1, "m1"}, {K::kOwner, 2, ""}},
  };
  for (const auto& history : histories)
    EXPECT_EQ(ReplayOwnership(history).status().code(), absl::StatusCode::kDataLoss) << history.size();
}

// --- two sides, their disks, a channel that loses, repeats, delays and reorders, and processes that die ---

struct Side {
  Handover handover;
  std::vector<JournalRecord> journal;
  std::optional<JournalRecord> writing;
  bool poisoned = false;  // a failed write may or may not be on the disk; nothing more can be written
  bool running = false;   // guest executes
  bool gone = false;      // host lost for good
  bool vmm_dead = false;
  size_t checked = 0;  // records of `journal` that were replayed
};

enum class Message { kState, kYield, kQuery, kOwner, kRefused };

class World {
 public:
  explicit World(uint64_t seed)
      : random_(seed),
        source_{.handover = Handover::Source("m", 1),
                .journal = {{K::kOwner, 1, ""}},
                .writing = {},
                .running = true},
        destination_{
            .handover = Handover::Destination("m", 1), .journal = {{K::kIncoming, 1, "m"}}, .writing = {}} {}

  // One random step; with `faults` also crashes, losses and cancels. False if nothing can happen.
  bool Step(bool faults) {
    actions_.clear();
    SourceActions(faults);
    DestinationActions(faults);
    ChannelActions(faults);
    if (actions_.empty()) return false;
    actions_[random_() % actions_.size()]();
    Check();
    return true;
  }

  // No more faults: before long the guest must run somewhere, and both sides must know where.
  void RunFairly() {
    for (int i = 0; i < 3000 && !bad_ && !Quiet(); ++i) {
      if (!Step(false)) break;
    }
    const bool died_with_its_host = destination_.gone && source_.handover.must_release();
    if (source_.running != destination_.running || died_with_its_host) return;
    bad_ = true;
    ADD_FAILURE() << "no owner for ever: source " << v1::HandoverState_Name(source_.handover.state())
                  << " destination " << v1::HandoverState_Name(destination_.handover.state());
  }

  bool Quiet() const {
    const Handover& h = source_.handover;
    if (h.must_release()) return h.settled() && (destination_.gone || destination_.running);
    return source_.running && !h.must_ask() && !h.must_write_refusal() && !destination_.running &&
           (given_up_ || h.settled());
  }
  bool bad() const { return bad_; }
  bool handed_over() const { return destination_.running; }
  bool fenced() const { return fenced_; }

 private:
  void Add(std::function<void()> action) { actions_.push_back(std::move(action)); }
  void Must(Side& side, E event) {
    const absl::Status status = side.handover.Apply(event);
    if (!status.ok()) {
      bad_ = true;
      ADD_FAILURE() << status;
    }
  }

  void Write(Side& side, E begun, const JournalRecord& record, bool has_begun) {
    if (has_begun) Must(side, begun);
    side.writing = record;
  }

  void FinishWrite(Side& side, bool faults) {
    const JournalRecord record = *side.writing;
    const int outcome = faults ? static_cast<int>(random_() % 8) : 7;
    if (outcome == 0) {  // uncertain
      if (random_() % 2) side.journal.push_back(record);
      side.poisoned = true;
      side.writing.reset();
      return;
    }
    side.writing.reset();
    const bool durable = outcome != 1;
    if (durable) side.journal.push_back(record);
    const bool source = &side == &source_;
    switch (record.kind) {
      case K::kYielded:
        return Must(side, durable ? E::kYieldDurable : E::kYieldFailed);
      case K::kOwner:
        return Must(side, durable ? E::kOwnerDurable : E::kOwnerFailed);
      case K::kReleased:
        return durable ? Must(side, E::kReleased) : void();
      default:
        if (durable) Must(side, source ? E::kRefusalDurable : E::kRefuseDurable);
    }
  }

  void Crash(Side& side) {
    if (side.writing && random_() % 2) side.journal.push_back(*side.writing);
    side.writing.reset();
    side.poisoned = false;
    const v1::Role role = side.handover.role();
    auto recovered = Handover::Recover(role, "m", 1, side.journal);
    if (!recovered.ok()) {
      bad_ = true;
      ADD_FAILURE() << recovered.status();
      return;
    }
    side.handover = *recovered;
    if (role == v1::ROLE_SOURCE) given_up_ = true;
  }

  void SourceActions(bool faults) {
    Side& s = source_;
    if (s.gone) return;
    if (s.poisoned || s.writing) {
      if (s.writing) Add([&, faults] { FinishWrite(s, faults); });
      if (faults || s.poisoned) Add([&] { Crash(s); });
      if (s.writing && s.handover.must_ask() && faults)
        Add([&] { to_destination_.push_back(Message::kQuery); });
      return;
    }
    const Handover& h = s.handover;
    if (h.state() == v1::IDLE && s.running && !given_up_)
      Add([&] {
        s.running = false;
        Must(s, E::kFrozen);
      });
    if (h.may_write_yielded() && !given_up_) Add([&] { Write(s, E::kYieldBegun, h.YieldedRecord(), true); });
    if (h.state() == v1::FROZEN || h.state() == v1::YIELDED)
      if (!all_sent_ && !h.must_write_refusal() && !given_up_)
        Add([&] {
          all_sent_ = true;
          Must(s, E::kAllSent);
          to_destination_.push_back(Message::kState);
        });
    if (h.may_send_yield() && !yield_sent_)
      Add([&] {
        yield_sent_ = true;
        to_destination_.push_back(Message::kYield);
      });
    if (h.must_ask() && (faults || (to_destination_.empty() && to_source_.empty())))
      Add([&] { to_destination_.push_back(Message::kQuery); });
    if (h.must_write_refusal()) Add([&] { Write(s, E::kRefusalDurable, h.RefusedRecord(), false); });
    if (h.may_resume() && !s.running && !s.vmm_dead && (given_up_ || h.settled()))
      Add([&] {
        s.running = true;
        Must(s, E::kResumed);
      });
    if (h.must_release() && !h.settled())
      Add([&] {
        s.vmm_dead = true;
        Write(s, E::kReleased, h.ReleasedRecord(), false);
      });
    if (h.must_ask() && destination_.gone)
      Add([&] {
        fenced_ = true;
        Must(s, E::kFenced);
      });
    if (faults) {
      Add([&] { Crash(s); });
      Add([&] {
        given_up_ = given_up_ || !h.must_ask();
        Must(s, random_() % 2 ? E::kCancel : E::kConnectionLost);
      });
    }
  }

  void DestinationActions(bool faults) {
    Side& d = destination_;
    if (d.gone) return;
    if (faults && random_() % 64 == 0)
      Add([&] {
        d.gone = true;
        d.running = false;
      });
    if (d.poisoned || d.writing) {
      if (d.writing) Add([&, faults] { FinishWrite(d, faults); });
      if (faults || d.poisoned) Add([&] { Crash(d); });
      return;
    }
    const Handover& h = d.handover;
    if (h.may_write_owner()) Add([&] { Write(d, E::kOwnerBegun, h.OwnerRecord(), true); });
    if (h.must_refuse() || (faults && h.may_write_refused()))
      Add([&] { Write(d, E::kRefuseBegun, h.RefusedRecord(), true); });
    if (h.may_start() && !d.running)
      Add([&] {
        d.running = true;
        Must(d, E::kStarted);
        to_source_.push_back(Message::kOwner);
      });
    // The source is gone from the connection and says nothing any more.
    if (faults || (given_up_ && to_destination_.empty())) Add([&] { Must(d, E::kConnectionLost); });
    if (faults) Add([&] { Crash(d); });
  }

  void ChannelActions(bool faults) {
    for (auto* channel : {&to_source_, &to_destination_}) {
      if (channel->empty()) continue;
      Add([=, this] {
        const size_t at = random_() % channel->size();
        const Message message = (*channel)[at];
        // Delivered once, or again later.
        if (!faults || random_() % 4) channel->erase(channel->begin() + static_cast<long>(at));
        Deliver(channel == &to_destination_, message);
      });
      if (faults)
        Add([=, this] { channel->erase(channel->begin() + static_cast<long>(random_() % channel->size())); });
    }
  }

  void Deliver(bool to_destination, Message message) {
    if (!to_destination) {
      if (source_.gone) return;
      (void)source_.handover.Apply(message == Message::kOwner ? E::kOwnerHeard : E::kRefusedHeard);
      if (message == Message::kRefused) given_up_ = true;
      return;
    }
    if (destination_.gone) return;
    Handover& h = destination_.handover;
    switch (message) {
      case Message::kState:
        (void)h.Apply(E::kStateChecked);
        break;
      case Message::kYield:
        (void)h.Apply(E::kYieldHeard);
        break;
      default:
        // Who asks has lost the connection.
        if (h.answer_to_query() == v1::IDLE)
          Must(destination_, E::kConnectionLost);
        else
          to_source_.push_back(h.answer_to_query() == v1::OWNER ? Message::kOwner : Message::kRefused);
    }
  }

  void Check() {
    const bool source_may = !source_.gone && source_.handover.may_resume();
    const bool destination_may = !destination_.gone && destination_.handover.may_start();
    if ((source_.running && destination_.running) || (source_may && destination_may)) {
      bad_ = true;
      ADD_FAILURE() << "two owners";
    }
    for (Side* side : {&source_, &destination_}) {
      if (side->journal.size() == side->checked) continue;
      side->checked = side->journal.size();
      if (auto replay = ReplayOwnership(side->journal); !replay.ok()) {
        bad_ = true;
        ADD_FAILURE() << replay.status();
      }
    }
  }

  std::mt19937_64 random_;
  Side source_, destination_;
  std::vector<Message> to_source_, to_destination_;
  std::vector<std::function<void()>> actions_;
  bool given_up_ = false, all_sent_ = false, yield_sent_ = false, fenced_ = false, bad_ = false;
};

TEST(HandoverProperty, NeverTwoOwnersNeverNoneForEver) {
  int handed_over = 0, fenced = 0;
  for (uint64_t seed = 1; seed <= 20000; ++seed) {
    World world(seed);
    // Short and long troubles; none at all for some.
    const int steps = seed % 10 == 0 ? 0 : static_cast<int>(seed % 90);
    for (int i = 0; i < steps && !world.bad(); ++i) world.Step(true);
    world.RunFairly();
    handed_over += world.handed_over();
    fenced += world.fenced();
    ASSERT_FALSE(world.bad() || HasFatalFailure()) << "seed " << seed;
  }
  // The schedules reach all outcomes.
  EXPECT_GT(handed_over, 1000);
  EXPECT_GT(fenced, 20);
}

}  // namespace
}  // namespace baton::migration
