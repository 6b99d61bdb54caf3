// Random schedules of a driver and a device on one ring, against a model of what must come out: every buffer
// once, with the length that the device gave it, in the order of publishing; in the order of submission where
// that was promised; the counts exact at any time; and nobody asleep while there is work.
//
// Devices stop at any moment and are replaced at the vring base, in place or in memory mapped elsewhere; the
// driver saves and restores itself. RapidCheck prints the seed; RC_PARAMS="seed=..." repeats a run.
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <optional>
#include <random>

#include "tests/unit/virtio/ring_lab.h"

namespace baton::virtio {
namespace {

struct Plan {
  uint16_t n = 1;
  uint64_t features = 0;
  uint64_t seed = 0;
  uint32_t steps = 0;
  // Buffers sent around the ring first, so that the indices wrap soon after.
  uint32_t preroll = 0;
};

void Require(bool ok, const char* what) {
  if (!ok) RC_FAIL(what);
}
void Require(const absl::Status& status) {
  if (!status.ok()) RC_FAIL(std::string(status.message()));
}
template <typename T>
T Require(absl::StatusOr<T> value) {
  Require(value.status());
  return *std::move(value);
}

class Schedule {
 public:
  explicit Schedule(const Plan& plan) : plan_(plan), lab_(plan.n), random_(plan.seed) {
    options_.features = plan.features;
    driver_.emplace(Require(DriverQueue::Create(lab_.memory, lab_.layout, options_, lab_.indirect)));
    device_.emplace(Require(DeviceQueue::Create(lab_.memory, lab_.layout, options_,
                                                options_.Has(kFRingPacked) ? kPackedBaseAfterReset : 0)));
  }

  uint64_t Run() {
    Preroll();
    for (uint32_t step = 0; step < plan_.steps; ++step) {
      Step();
      CheckCounts();
    }
    Settle();
    return plan_.steps;
  }

 private:
  struct Buffer {
    uint64_t token = 0;
    std::vector<Segment> readable, writable;
    uint32_t room = 0;
  };
  struct Request {
    Chain chain;
    uint64_t token = 0;
    bool staged = false;
  };
  struct Result {
    uint64_t token = 0;
    uint32_t len = 0;
    uint32_t room = 0;
  };

  uint32_t Random(uint32_t below) { return static_cast<uint32_t>(random_() % below); }
  bool Chance(uint32_t percent) { return Random(100) < percent; }
  bool Has(uint64_t feature) const { return options_.Has(feature); }

  void Step() {
    const uint32_t what = Random(1000);
    if (what < 240) {
      Add();
    } else if (what < 360) {
      DriverPublish();
    } else if (what < 540) {
      if (device_awake_) Pop();
    } else if (what < 720) {
      Stage();
    } else if (what < 800) {
      DevicePublish();
    } else if (what < 920) {
      if (driver_awake_) Take();
    } else if (what < 940) {
      if (driver_awake_) DriverSleep();
    } else if (what < 960) {
      if (device_awake_) DeviceSleep();
    } else if (what < 966) {
      driver_->DisableCalls();
      driver_awake_ = true;
    } else if (what < 972) {
      device_->DisableKicks();
      device_awake_ = true;
    } else if (what < 980) {
      Unpop();
    } else if (what < 986) {
      device_->SetOrdering(Chance(50) ? Ordering::kInOrder : Ordering::kAsCompleted);
      AfterPublish();
    } else if (what < 990) {
      Restart();
    } else if (what < 993) {
      lab_.Move();
      ReplaceDriver();
      Restart();
    } else if (what < 996) {
      lab_.Move();
      ReplaceDriver();
      Require(device_->Remap(lab_.memory));
    } else {
      Settle();
    }
  }

  // --- driver ---

  void Add() {
    Buffer buffer;
    buffer.token = next_token_++;
    auto some = [this](std::vector<Segment>* out, uint32_t count) {
      for (uint32_t i = 0; i < count; ++i) out->push_back({lab_.buffers + Random(4096), 1 + Random(64)});
    };
    some(&buffer.readable, Random(4));
    some(&buffer.writable, Random(3) + (buffer.readable.empty() ? 1 : 0));
    buffer.room = static_cast<uint32_t>(TotalBytes(buffer.writable));
    const uint16_t free = driver_->free_slots();
    auto id = driver_->Add(buffer.readable, buffer.writable, buffer.token);
    if (!id.ok()) {
      Require(absl::IsResourceExhausted(id.status()), "Add failed for want of anything but room");
      Require(buffer.readable.size() + buffer.writable.size() > free, "Add refused what fits");
      return;
    }
    added_.push_back(std::move(buffer));
  }

  void DriverPublish() {
    driver_->Publish();
    for (Buffer& buffer : added_) available_.push_back(std::move(buffer));
    added_.clear();
    AfterDriver();
  }

  void AfterDriver() {
    if (driver_->NeedsKick()) device_awake_ = true;
  }

  bool Take() {
    UsedBuffer used;
    if (!Require(driver_->TakeUsed(&used))) {
      Require(published_.empty(), "a published buffer does not arrive");
      AfterDriver();
      return false;
    }
    Require(!published_.empty(), "a buffer arrives that nobody published");
    const Result expected = published_.front();
    published_.pop_front();
    Require(used.token == expected.token, "buffers arrive in another order than they were published");
    Require(used.len == expected.len, "a buffer arrives with another length");
    Require(!used.skipped || expected.len == expected.room, "a batch hides a buffer that is not full");
    if (Has(kFInOrder)) {
      Require(used.token > last_token_ || last_token_ == UINT64_MAX, "IN_ORDER, but buffers overtake");
      last_token_ = used.token;
    }
    AfterDriver();
    return true;
  }

  void DriverSleep() {
    if (Require(driver_->EnableCalls())) {
      Require(!published_.empty(), "a driver is told of used buffers that are not there");
      return;
    }
    driver_awake_ = false;
  }

  void ReplaceDriver() {
    const std::vector<uint8_t> state = driver_->Save();
    driver_.emplace(Require(DriverQueue::Restore(lab_.memory, lab_.layout, options_, lab_.indirect, state)));
  }

  // --- device ---

  bool Pop() {
    Request request;
    if (!Require(device_->Pop(&request.chain))) {
      Require(available_.empty(), "an available buffer is not found");
      return false;
    }
    Require(!available_.empty(), "a buffer is found that nobody made available");
    const Buffer& expected = available_.front();
    const Chain& chain = request.chain;
    Require(std::ranges::equal(chain.Readable(), expected.readable),
            "a buffer to read is not what was added");
    Require(std::ranges::equal(chain.Writable(), expected.writable),
            "a buffer to write is not what was added");
    request.token = expected.token;
    unpoppable_ = {expected};
    available_.pop_front();
    running_.push_back(std::move(request));
    return true;
  }

  void Unpop() {
    if (!unpoppable_ || running_.empty() || running_.back().staged) return;
    Require(device_->Unpop(running_.back().chain), "the last chain does not go back");
    available_.push_front(std::move(*unpoppable_));
    unpoppable_.reset();
    running_.pop_back();
    device_awake_ = true;
  }

  void Stage() {
    std::vector<size_t> open;
    for (size_t i = 0; i < running_.size() && open.size() < 64; ++i) {
      if (!running_[i].staged) open.push_back(i);
    }
    if (open.empty()) return;
    Request& request = running_[open[Chance(40) ? 0 : Random(static_cast<uint32_t>(open.size()))]];
    const auto room = static_cast<uint32_t>(request.chain.writable_bytes);
    const uint32_t len = Chance(70) ? room : Random(room + 1);
    Require(device_->Stage(request.chain.id, len));
    request.staged = true;
    if (&request == &running_.back()) unpoppable_.reset();
  }

  void DevicePublish() {
    const uint16_t most = Chance(80) ? UINT16_MAX : static_cast<uint16_t>(1 + Random(3));
    const auto staged = device_->staged();
    const size_t count = std::min<size_t>(staged.size(), most);
    for (const Completion& completion : staged.first(count)) {
      auto it = std::ranges::find_if(running_, [&](const Request& r) { return r.chain.id == completion.id; });
      Require(it != running_.end() && it->staged, "what is published was not staged");
      published_.push_back({it->token, completion.len, static_cast<uint32_t>(it->chain.writable_bytes)});
      if (it == running_.end() - 1) unpoppable_.reset();
      running_.erase(it);
    }
    Require(device_->Publish(most) == count, "Publish does not publish what was staged");
    AfterPublish();
  }

  void AfterPublish() {
    if (device_->NeedsCall()) driver_awake_ = true;
  }

  void DeviceSleep() {
    if (!device_->staged().empty()) return;
    if (Require(device_->EnableKicks())) {
      Require(!available_.empty(), "a device is told of buffers that are not there");
      return;
    }
    device_awake_ = false;
  }

  // Another device goes on where this one stopped; what is in flight is submitted again, oldest first.
  void Restart() {
    const uint32_t base = device_->base();
    device_.reset();
    device_.emplace(Require(DeviceQueue::Create(lab_.memory, lab_.layout, options_, base)));
    for (Request& request : running_) {
      Chain again;
      Require(device_->Resubmit(request.chain.id, request.chain.descriptors, &again));
      Require(again.segments == request.chain.segments && again.readable == request.chain.readable,
              "a request is not what it was");
      request.chain = std::move(again);
      request.staged = false;
    }
    unpoppable_.reset();
    device_awake_ = driver_awake_ = true;
  }

  // --- both ---

  void CheckCounts() {
    Require(device_->in_flight() == running_.size(), "in_flight is wrong");
    Require(Require(device_->Available()) == available_.size(), "Available is wrong");
    Require(driver_->outstanding() == added_.size() + available_.size() + running_.size() + published_.size(),
            "outstanding is wrong");
  }

  // Both sides work only when they are woken, until nobody is: then nothing may be left.
  void Settle() {
    DriverPublish();
    while (device_awake_ || driver_awake_ || !running_.empty()) {
      const size_t before = available_.size() + running_.size() + published_.size();
      if (device_awake_) {
        while (Pop()) {
        }
        DevicePublish();
        DeviceSleep();
      }
      for (size_t k = running_.size(); k; --k) Stage();
      const size_t held = running_.size() - device_->staged().size();
      while (!device_->staged().empty()) DevicePublish();
      if (driver_awake_) {
        while (Take()) {
        }
        DriverSleep();
      }
      const size_t after = available_.size() + running_.size() + published_.size();
      Require(after < before || !held || device_awake_ || driver_awake_, "held completions wait for nobody");
    }
    Require(available_.empty(), "a device sleeps although buffers are available");
    Require(published_.empty(), "a driver sleeps although buffers are used");
    Require(driver_->outstanding() == 0 && driver_->free_slots() == plan_.n, "descriptors are lost");
    device_awake_ = driver_awake_ = true;
  }

  void Preroll() {
    const std::vector<Segment> one = {{lab_.buffers, 1}};
    Chain chain;
    UsedBuffer used;
    for (uint32_t left = plan_.preroll; left;) {
      const uint32_t now = std::min<uint32_t>(left, plan_.n);
      for (uint32_t i = 0; i < now; ++i) Require(driver_->Add(one, {}, 0).status());
      driver_->Publish();
      while (Require(device_->Pop(&chain))) Require(device_->Stage(chain.id, 0));
      while (device_->Publish()) {
      }
      while (Require(driver_->TakeUsed(&used))) {
      }
      left -= now;
    }
    (void)device_->NeedsCall();
    (void)driver_->NeedsKick();
  }

  const Plan plan_;
  RingLab lab_;
  std::mt19937_64 random_;
  QueueOptions options_;
  std::optional<DriverQueue> driver_;
  std::optional<DeviceQueue> device_;
  bool device_awake_ = true;
  bool driver_awake_ = true;
  uint64_t next_token_ = 0;
  uint64_t last_token_ = UINT64_MAX;
  // A buffer goes from one to the next: written, visible, fetched, published.
  std::deque<Buffer> added_;
  std::deque<Buffer> available_;
  std::deque<Request> running_;
  std::deque<Result> published_;
  // What the last Pop fetched, while nothing else happened to it.
  std::optional<Buffer> unpoppable_;
};

void CheckSchedules(uint64_t kind, const std::vector<uint16_t>& sizes) {
  uint64_t steps = 0;
  const bool ok = rc::check([&] {
    Plan plan;
    plan.n = *rc::gen::elementOf(sizes);
    plan.features = kFVersion1 | kind | *rc::gen::element<uint64_t>(0, kFIndirectDesc) |
                    *rc::gen::element<uint64_t>(0, kFEventIdx) |
                    *rc::gen::element<uint64_t>(0, kFInOrder, kFPartialOrder);
    plan.seed = *rc::gen::noShrink(rc::gen::resize(rc::kNominalSize, rc::gen::arbitrary<uint64_t>()));
    plan.steps = *rc::gen::resize(rc::kNominalSize, rc::gen::inRange<uint32_t>(1, 14000));
    // The indices of a split ring wrap at 65536.
    if (plan.n >= 64 && *rc::gen::resize(rc::kNominalSize, rc::gen::inRange(0, 10)) == 0)
      plan.preroll = 65500;
    steps += Schedule(plan).Run();
  });
  EXPECT_TRUE(ok);
  std::printf("ring schedules: %llu steps\n", static_cast<unsigned long long>(steps));
  // A run with parameters of its own is as long as they say.
  if (ok && !std::getenv("RC_PARAMS")) {
    EXPECT_GE(steps, 550000u);
  }
}

TEST(QueuePropertyTest, SplitRingsLoseRepeatAndReorderNothing) {
  CheckSchedules(0, {1, 2, 4, 8, 16, 64, 256});
}

TEST(QueuePropertyTest, PackedRingsLoseRepeatAndReorderNothing) {
  CheckSchedules(kFRingPacked, {1, 2, 3, 5, 7, 8, 13, 64, 100});
}

}  // namespace
}  // namespace baton::virtio
