// Random schedules of a driver, a device with an in-flight region, deaths of the device at any store, and
// moves to back-ends of other kinds, against a model of what must come of it: every request is completed
// once, none that the driver has seen completed is submitted again, what is submitted again comes in the
// order of fetching, and in flight is told from available exactly.
//
// The seed is printed; RC_PARAMS="seed=..." repeats a run.
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/detail/Configuration.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <optional>
#include <random>

#include "agent/virtio/inflight.h"
#include "agent/virtio/inflight_tracker.h"
#include "tests/unit/virtio/ring_lab.h"

namespace baton::virtio {
namespace {

struct Died {};

// Thrown by the hook after the store that the countdown ends at; 0 never ends.
struct Countdown {
  uint64_t* left;
  void operator()(TrackerStep) const {
    if (*left && --*left == 0) throw Died();
  }
};

struct CrashPlan {
  uint16_t n = 4;
  bool packed = false;
  bool in_order = false;
  uint64_t seed = 0;
  uint32_t steps = 0;
  // Die at this store, once; 0: at random ones, again and again.
  uint64_t die_at = 0;
};

void Demand(bool ok, const std::string& what) {
  if (!ok) RC_FAIL(what);
}
void Demand(const absl::Status& status) {
  if (!status.ok()) RC_FAIL(std::string(status.message()));
}
template <typename T>
T Demand(absl::StatusOr<T> value) {
  Demand(value.status());
  return *std::move(value);
}

class CrashSchedule {
 public:
  explicit CrashSchedule(const CrashPlan& plan)
      : plan_(plan), lab_(plan.n, kSlotBytes * (plan.n + 1)), random_(plan.seed) {
    options_.features = kFVersion1 | (plan.packed ? kFRingPacked : 0) | (plan.in_order ? kFInOrder : 0) |
                        (Random(2) ? kFIndirectDesc : 0);
    format_ = plan.packed ? RingFormat::kPacked : RingFormat::kSplit;
    driver_.emplace(Demand(DriverQueue::Create(lab_.memory, lab_.layout, options_, lab_.indirect)));
    for (uint16_t slot = 0; slot < plan.n; ++slot) free_slots_.push_back(slot);
    UseRegion(InflightKind::kSpec, plan.n);
    if (plan.die_at) left_ = plan.die_at;
    Restart();
  }

  // False: the planned death did not come.
  bool Run() {
    for (uint32_t step = 0; step < plan_.steps; ++step) {
      if (!plan_.die_at && left_ == 0 && Random(8) == 0) left_ = 1 + Random(40);
      try {
        Step();
      } catch (const Died&) {
        Restart();
      }
    }
    const bool died = left_ == 0;
    left_ = 0;
    Settle();
    return died;
  }

 private:
  static constexpr uint64_t kSlotBytes = 64;
  static constexpr uint64_t kMask = 0x5a5a5a5a5a5a5a5a;

  // Where a request is on its way around.
  struct Request {
    uint64_t token = 0;
    uint16_t slot = 0;
    uint16_t id = 0;
    bool executed = false;
  };

  uint64_t Random(uint64_t below) { return random_() % below; }
  SplitRing Split() const {
    return {lab_.layout.size, lab_.layout.desc, lab_.layout.driver, lab_.layout.device};
  }
  PackedRing Packed() const {
    return {lab_.layout.size, lab_.layout.desc, lab_.layout.driver, lab_.layout.device};
  }
  uint64_t SlotGpa(uint16_t slot) const { return lab_.buffers + kSlotBytes * slot; }

  void Step() {
    switch (Random(10)) {
      case 0:
      case 1:
        return Submit();
      case 2:
      case 3:
        return TakeUsed();
      case 4:
      case 5:
        return Fetch();
      case 6:
        return Execute();
      case 7:
      case 8:
        return Publish();
      default:
        if (!plan_.die_at && Random(16) == 0) return Random(2) ? Move() : Die();
    }
  }

  void Submit() {
    for (uint64_t k = 1 + Random(3); k && !free_slots_.empty(); --k) {
      const uint16_t slot = free_slots_.back();
      const uint64_t gpa = SlotGpa(slot), token = next_token_;
      Demand(lab_.memory.Write(gpa, &token, sizeof token));
      std::vector<Segment> readable{{gpa, 8}}, writable{{gpa + 32, 8}};
      if (Random(2)) readable.push_back({gpa + 8, 4});
      if (Random(4) == 0) writable.push_back({gpa + 40, 4});
      auto id = driver_->Add(readable, writable, token);
      if (!id.ok()) break;
      free_slots_.pop_back();
      available_.push_back({token, slot, *id, false});
      ++next_token_;
    }
    driver_->Publish();
    (void)driver_->NeedsKick();
  }

  void TakeUsed() {
    UsedBuffer used;
    while (Demand(driver_->TakeUsed(&used))) {
      auto it = published_.find(used.token);
      Demand(it != published_.end(), "a request came back that was not published");
      uint64_t answer = 0;
      Demand(lab_.memory.Read(SlotGpa(it->second.slot) + 32, &answer, sizeof answer));
      Demand(answer == (used.token ^ kMask), "a request came back that was not executed");
      free_slots_.push_back(it->second.slot);
      published_.erase(it);
    }
  }

  uint64_t TokenOf(const Chain& chain) {
    uint64_t token = ~uint64_t{0};
    Demand(CopyFromSegments(lab_.memory, chain.Readable(), 0, &token, sizeof token).status());
    return token;
  }

  void Fetch() {
    for (uint64_t k = 1 + Random(3); k; --k) {
      if (!Demand(device_->Pop(&chain_))) {
        Demand(available_.empty(), "an available request was not found");
        return;
      }
      Demand(!available_.empty(), "the device fetched what is in flight, or completed");
      Demand(TokenOf(chain_) == available_.front().token, "requests were fetched out of order");
      // Until OnFetch is through, a death leaves it in flight or available.
      fetching_ = true;
      Demand(tracker_->OnFetch(chain_));
      fetching_ = false;
      in_flight_.push_back(available_.front());
      available_.pop_front();
    }
  }

  // The effect of some request; it stays in flight until it is published.
  void Execute() {
    std::vector<Request*> running;
    for (Request& r : in_flight_) {
      if (!r.executed) running.push_back(&r);
    }
    if (running.empty() || (single_ && !device_->staged().empty())) return;
    Request& r = *running[Random(running.size())];
    const uint64_t answer = r.token ^ kMask;
    Demand(lab_.memory.Write(SlotGpa(r.slot) + 32, &answer, sizeof answer));
    // Half of them do not fill their buffer, and cannot be skipped by a batch.
    Demand(device_->Stage(r.id, Random(2) ? 8 : 4));
    r.executed = true;
  }

  void MarkPublished(const std::vector<uint16_t>& ids) {
    for (uint16_t id : ids) {
      auto it =
          std::find_if(in_flight_.begin(), in_flight_.end(), [&](const Request& r) { return r.id == id; });
      Demand(it != in_flight_.end(), "published what is not in flight");
      published_.emplace(it->token, *it);
      in_flight_.erase(it);
    }
  }

  void Publish() {
    std::vector<uint16_t> ids;
    for (const Completion& c : device_->staged()) ids.push_back(c.id);
    if (ids.empty()) return;
    Demand(tracker_->BeforePublish(device_->staged()));
    const uint64_t fate = plan_.die_at ? 2 : Random(24);
    if (fate == 0) {
      // Died within Publish, before the store that makes the batch visible, after all the others.
      const uint64_t at = lab_.layout.desc +
                          uint64_t{16} * (device_->packed() ? DecodePackedBase(device_->base()).used.idx : 0);
      const uint64_t visible = device_->packed() ? at + 8 : lab_.layout.device;
      uint64_t before = 0;
      Demand(lab_.memory.Read(visible, &before, device_->packed() ? 8 : 4));
      device_->Publish();
      Demand(lab_.memory.Write(visible, &before, device_->packed() ? 8 : 4));
      ring_overwritten_ |= ids.size() > 1;
      throw Died();
    }
    device_->Publish();
    MarkPublished(ids);
    if (fate == 1) throw Died();
    // Sometimes the driver is faster than the device's next store.
    if (Random(4) == 0) TakeUsed();
    if (Random(4) == 0) Submit();
    tracker_->AfterPublish();
  }

  [[noreturn]] void Die() { throw Died(); }

  void UseRegion(InflightKind kind, uint16_t queue_size) {
    geometry_ = Demand(MakeInflightGeometry(kind, format_, 3, queue_size));
    region_.assign(geometry_.mmap_size / 8 + 8, 0x7777777777777777);
    part_index_ = static_cast<uint16_t>(Random(3));
    single_ = TraitsOf(kind).single_completions;
    std::span<uint8_t> part = Part();
    std::fill(part.begin(), part.end(), uint8_t{0});
  }
  std::span<uint8_t> Part() {
    return Demand(InflightPart(geometry_, {reinterpret_cast<uint8_t*>(region_.data()), geometry_.mmap_size},
                               part_index_));
  }

  // A new device, that knows nothing but the ring and the region. Dies in recovery at times, too.
  void Restart() {
    // What the driver does while no device runs.
    if (Random(2)) TakeUsed();
    if (Random(2)) Submit();
    device_.reset();
    for (;;) {
      if (!plan_.die_at) left_ = Random(4) == 0 ? 1 + Random(6) : 0;
      try {
        Recover();
        break;
      } catch (const Died&) {
      }
    }
  }

  absl::StatusOr<InflightSet> RecoverTracker() {
    tracker_.emplace(Countdown{&left_});
    RETURN_IF_ERROR(tracker_->Attach(format_, Part(), plan_.n, single_));
    if (plan_.packed)
      return tracker_->RecoverPacked(lab_.memory, Packed(), DecodePackedBase(kPackedBaseAfterReset).used);
    ASSIGN_OR_RETURN(SplitIndices indices, ReadSplitIndices(lab_.memory, Split()));
    return tracker_->RecoverSplit(indices.used);
  }

  void Recover() {
    const InflightSet set = Demand(RecoverTracker());
    if (fetching_ && set.size() == in_flight_.size() + 1) {
      in_flight_.push_back(available_.front());
      available_.pop_front();
    }
    fetching_ = false;
    CheckSet(set);
    const uint32_t base = plan_.packed ? EncodePackedBase({set.avail, set.used}) : uint32_t{set.last_avail()};
    device_.emplace(Demand(DeviceQueue::Create(lab_.memory, lab_.layout, options_, base)));
    for (size_t k = 0; k < set.size(); ++k) {
      const InflightRequest& r = set.requests[k];
      Demand(device_->Resubmit(r.id, set.DescsOf(r), &chain_));
      Demand(TokenOf(chain_) == in_flight_[k].token, "another request was submitted again");
      in_flight_[k].executed = false;
    }
  }

  // Exactly what the model has in flight, in the order of fetching.
  void CheckSet(const InflightSet& set) {
    std::vector<uint16_t> expected;
    for (const Request& r : in_flight_) expected.push_back(r.id);
    Demand(set.Ids() == expected, "the set is not what is in flight");
    Demand(plan_.packed ? CheckInflightPacked(plan_.n, set)
                        : CheckInflightSplit(plan_.n, Demand(ReadSplitIndices(lab_.memory, Split())), set));
  }

  // Stops the device with requests in flight, and goes on with a back-end of another kind.
  void Move() {
    const uint32_t base = device_->base();
    device_.reset();
    tracker_.reset();
    const InflightSet set = plan_.packed ? MovePacked(base) : MoveSplit(static_cast<uint16_t>(base));
    CheckSet(set);
    std::vector<InflightKind> kinds{InflightKind::kSpec};
    if (!plan_.packed) kinds.push_back(InflightKind::kYc);
    if (!plan_.in_order) kinds.insert(kinds.end(), {InflightKind::kDpdk, InflightKind::kSpdk});
    if (!plan_.in_order && !plan_.packed) kinds.push_back(InflightKind::kLibvhostUser);
    const InflightKind kind = kinds[Random(kinds.size())];
    const auto queue_size = static_cast<uint16_t>(plan_.n + (Random(2) ? Random(20) : 0));
    UseRegion(kind, queue_size);
    Demand(WriteInflight(Part(), queue_size, set));
    const uint32_t told = Demand(BaseFor(kind, plan_.n, set));
    if (TraitsOf(kind).start_base == BaseConvention::kAvail) {
      Demand(told == base, "the destination's base is not the source's");
    }
    Restart();
  }

  InflightSet MoveSplit(uint16_t base) {
    const SplitIndices indices = Demand(ReadSplitIndices(lab_.memory, Split()));
    InflightSet set = Demand(
        ReadInflightSplit(Part(), plan_.n, indices.used, single_ ? BatchRule::kSingle : BatchRule::kLinked));
    const uint32_t answer = Random(2) ? base : indices.used;
    Demand(Demand(NormaliseBase(answer, indices.used, static_cast<uint16_t>(set.size()))) == base,
           "another base");
    Demand(VerifyInflightSplit(lab_.memory, Split(), indices, set));
    if (plan_.in_order) {
      Demand(Demand(InflightFromInOrderSplit(lab_.memory, Split(), base)).Ids() == set.Ids(),
             "the ring in order tells other requests");
    }
    return set;
  }

  InflightSet MovePacked(uint32_t base) {
    const PackedBase truth = DecodePackedBase(base);
    InflightSet set = Demand(ReadInflightPacked(Part(), lab_.memory, Packed()));
    const bool half = Random(2) != 0;
    uint32_t answer = Random(2) ? base : EncodePackedBase({truth.used, truth.used});
    if (half) answer &= 0xffff;
    Demand(Demand(NormaliseBase(answer, half, plan_.n, set)) == truth, "another base");
    Demand(VerifyInflightPacked(lab_.memory, Packed(), set));
    if (plan_.in_order && !ring_overwritten_) {
      const InflightSet ring = Demand(InflightFromInOrderPacked(lab_.memory, Packed(), truth));
      Demand(ring.Ids() == set.Ids() && ring.descs == set.descs, "the ring in order tells other requests");
    }
    return set;
  }

  // Everything that was ever submitted comes back.
  void Settle() {
    for (uint32_t round = 0; round < 8u * plan_.n + 8 && (!available_.empty() || !in_flight_.empty());
         ++round) {
      TakeUsed();
      Fetch();
      Execute();
      try {
        Publish();
      } catch (const Died&) {
        Restart();
        left_ = 0;
      }
    }
    TakeUsed();
    Demand(available_.empty() && in_flight_.empty() && published_.empty(),
           fmt::format("lost: {} requests available, {} in flight, {} published", available_.size(),
                       in_flight_.size(), published_.size()));
    Demand(driver_->outstanding() == 0, "the driver still waits");
    Demand(free_slots_.size() == plan_.n, "a buffer was lost");
  }

  const CrashPlan plan_;
  RingLab lab_;
  std::mt19937_64 random_;
  RingFormat format_;
  QueueOptions options_;
  uint64_t left_ = 0;
  InflightGeometry geometry_;
  std::vector<uint64_t> region_;
  uint16_t part_index_ = 0;
  bool single_ = false;
  std::optional<DriverQueue> driver_;
  std::optional<DeviceQueue> device_;
  std::optional<InflightTracker<Countdown>> tracker_;
  Chain chain_;
  // A batch died half-written in a packed ring: its slots do not hold the driver's descriptors any more.
  bool ring_overwritten_ = false;
  bool fetching_ = false;
  uint64_t next_token_ = 0;
  std::vector<uint16_t> free_slots_;
  std::deque<Request> available_;
  std::vector<Request> in_flight_;  // in the order of fetching
  std::map<uint64_t, Request> published_;
};

void CheckCrashSchedules(bool packed, bool in_order) {
  uint64_t steps = 0;
  const bool ok = rc::check([&] {
    CrashPlan plan;
    plan.packed = packed;
    plan.in_order = in_order;
    plan.n = packed ? *rc::gen::element<uint16_t>(1, 2, 3, 4, 5, 8, 13, 64)
                    : *rc::gen::element<uint16_t>(1, 2, 4, 8, 16, 64);
    plan.seed = *rc::gen::noShrink(rc::gen::resize(rc::kNominalSize, rc::gen::arbitrary<uint64_t>()));
    plan.steps = *rc::gen::resize(rc::kNominalSize, rc::gen::inRange<uint32_t>(1, 7000));
    CrashSchedule(plan).Run();
    steps += plan.steps;
  });
  EXPECT_TRUE(ok);
  std::printf("in-flight schedules: %llu steps, seed=%llu\n", static_cast<unsigned long long>(steps),
              static_cast<unsigned long long>(rc::detail::configuration().testParams.seed));
  // A run with parameters of its own is as long as they say.
  if (ok && !std::getenv("RC_PARAMS")) {
    EXPECT_GE(steps, 250000u);
  }
}

TEST(InflightProperty, SplitRings) { CheckCrashSchedules(false, false); }
TEST(InflightProperty, SplitRingsInOrder) { CheckCrashSchedules(false, true); }
TEST(InflightProperty, PackedRings) { CheckCrashSchedules(true, false); }
TEST(InflightProperty, PackedRingsInOrder) { CheckCrashSchedules(true, true); }

// The same schedule again and again, dying one store later each time: every crash point of the tracker.
void DieAtEveryStore(bool packed, bool in_order) {
  uint64_t points = 0;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    for (uint64_t k = 1;; ++k) {
      bool died = false;
      std::string why;
      try {
        died = CrashSchedule({packed ? uint16_t{5} : uint16_t{4}, packed, in_order, seed, 160, k}).Run();
      } catch (const rc::detail::CaseResult& result) {
        why = result.description;
      }
      ASSERT_EQ(why, "") << "seed " << seed << ", store " << k;
      if (!died) break;
      ++points;
    }
  }
  std::printf("crash points: %llu\n", static_cast<unsigned long long>(points));
  EXPECT_GE(points, 200u);
}

TEST(InflightCrashPoints, SplitRings) { DieAtEveryStore(false, false); }
TEST(InflightCrashPoints, SplitRingsInOrder) { DieAtEveryStore(false, true); }
TEST(InflightCrashPoints, PackedRings) { DieAtEveryStore(true, false); }
TEST(InflightCrashPoints, PackedRingsInOrder) { DieAtEveryStore(true, true); }

}  // namespace
}  // namespace baton::virtio
