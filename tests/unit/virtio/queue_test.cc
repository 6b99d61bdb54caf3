#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "tests/unit/virtio/ring_lab.h"

namespace baton::virtio {
namespace {

// Both sides of one ring, of either kind.
class QueueTest : public testing::TestWithParam<uint64_t> {
 protected:
  void Make(uint16_t n, uint64_t features) {
    lab_.emplace(n);
    options_.features = GetParam() | features;
    driver_.emplace(DriverQueue::Create(lab_->memory, lab_->layout, options_, lab_->indirect).value());
    base_ = options_.Has(kFRingPacked) ? kPackedBaseAfterReset : 0;
    Restart();
  }
  void Restart() {
    device_.emplace(DeviceQueue::Create(lab_->memory, lab_->layout, options_, base_).value());
  }

  void Add(uint64_t token, size_t readable = 1, size_t writable = 1) {
    std::vector<Segment> in(readable, {lab_->buffers, 16});
    std::vector<Segment> out(writable, {lab_->buffers + 64, 32});
    ASSERT_TRUE(driver_->Add(in, out, token).ok());
  }
  Chain Pop() {
    Chain chain;
    auto popped = device_->Pop(&chain);
    EXPECT_TRUE(popped.ok() && *popped) << popped.status();
    return chain;
  }
  bool Empty() {
    Chain chain;
    return !device_->Pop(&chain).value();
  }
  std::vector<UsedBuffer> TakeAll() {
    std::vector<UsedBuffer> all;
    UsedBuffer used;
    for (;;) {
      auto taken = driver_->TakeUsed(&used);
      EXPECT_TRUE(taken.ok()) << taken.status();
      if (!taken.ok() || !*taken) return all;
      all.push_back(used);
    }
  }
  std::vector<uint64_t> Tokens(const std::vector<UsedBuffer>& all) {
    std::vector<uint64_t> tokens;
    for (const UsedBuffer& used : all) tokens.push_back(used.token);
    return tokens;
  }

  std::optional<RingLab> lab_;
  QueueOptions options_;
  uint32_t base_ = 0;
  std::optional<DriverQueue> driver_;
  std::optional<DeviceQueue> device_;
};

INSTANTIATE_TEST_SUITE_P(Kinds, QueueTest, testing::Values(kFVersion1, kFVersion1 | kFRingPacked),
                         [](const auto& info) { return info.param & kFRingPacked ? "Packed" : "Split"; });

TEST_P(QueueTest, CarriesBuffersThereAndBackOutOfOrder) {
  Make(8, 0);
  for (uint64_t token : {10, 11, 12}) Add(token);
  EXPECT_TRUE(Empty());
  driver_->Publish();
  EXPECT_EQ(device_->Available().value(), 3);
  Chain a = Pop(), b = Pop(), c = Pop();
  EXPECT_TRUE(Empty());
  EXPECT_EQ(a.readable_bytes, 16u);
  EXPECT_EQ(a.writable_bytes, 32u);
  EXPECT_EQ(device_->in_flight(), 3);
  ASSERT_TRUE(device_->Stage(c.id, 5).ok());
  ASSERT_TRUE(device_->Stage(a.id, 32).ok());
  EXPECT_EQ(device_->in_flight(), 3);
  EXPECT_TRUE(TakeAll().empty());
  EXPECT_EQ(device_->Publish(), 2);
  EXPECT_TRUE(device_->NeedsCall());
  EXPECT_FALSE(device_->NeedsCall());
  auto used = TakeAll();
  EXPECT_EQ(Tokens(used), (std::vector<uint64_t>{12, 10}));
  EXPECT_EQ(used[0].len, 5u);
  EXPECT_EQ(device_->in_flight(), 1);
  EXPECT_EQ(driver_->outstanding(), 1);
  ASSERT_TRUE(device_->Stage(b.id, 0).ok());
  device_->Publish();
  EXPECT_EQ(Tokens(TakeAll()), (std::vector<uint64_t>{11}));
}

TEST_P(QueueTest, InOrderReturnsABatchWithOneElement) {
  Make(8, kFInOrder);
  for (uint64_t token : {10, 11, 12}) Add(token);
  driver_->Publish();
  Chain a = Pop(), b = Pop(), c = Pop();
  ASSERT_TRUE(device_->Stage(c.id, 7).ok());
  ASSERT_TRUE(device_->Stage(b.id, 32).ok());
  EXPECT_EQ(device_->Publish(), 0);
  ASSERT_TRUE(device_->Stage(a.id, 32).ok());
  EXPECT_EQ(device_->Publish(), 3);
  auto used = TakeAll();
  EXPECT_EQ(Tokens(used), (std::vector<uint64_t>{10, 11, 12}));
  EXPECT_TRUE(used[0].skipped);
  EXPECT_TRUE(used[1].skipped);
  EXPECT_FALSE(used[2].skipped);
  EXPECT_EQ(used[2].len, 7u);
}

TEST_P(QueueTest, RestartsAtTheBaseWithRequestsInFlight) {
  Make(8, kFIndirectDesc);
  for (uint64_t token : {10, 11, 12}) Add(token, 2, 2);
  driver_->Publish();
  Chain a = Pop(), b = Pop();
  ASSERT_TRUE(device_->Stage(b.id, 1).ok());
  device_->Publish();
  base_ = device_->base();
  Restart();
  Chain again, none;
  EXPECT_FALSE(device_->Pop(&none).ok());
  ASSERT_TRUE(device_->Resubmit(a.id, a.descriptors, &again).ok());
  EXPECT_EQ(again.segments, a.segments);
  Chain c = Pop();
  ASSERT_TRUE(device_->Stage(a.id, 2).ok());
  ASSERT_TRUE(device_->Stage(c.id, 3).ok());
  device_->Publish();
  EXPECT_EQ(Tokens(TakeAll()), (std::vector<uint64_t>{11, 10, 12}));
}

}  // namespace
}  // namespace baton::virtio
