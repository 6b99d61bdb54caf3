#include "agent/virtio/inflight.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <cstring>

namespace baton::virtio {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

struct Part {
  explicit Part(uint16_t n, uint16_t used_idx = 0) : bytes(16 + 16 * size_t{n}) {
    EXPECT_TRUE(InitInflightSplit(bytes, n, used_idx).ok());
  }
  InflightSplitHeader& header() { return *reinterpret_cast<InflightSplitHeader*>(bytes.data()); }
  InflightSplitDesc& desc(size_t i) { return reinterpret_cast<InflightSplitDesc*>(bytes.data() + 16)[i]; }
  std::vector<uint8_t> bytes;
};

TEST(InflightStride, OfTheKnownBackends) {
  EXPECT_EQ(*InferSplitStride(2112, 1, 128), 2112u);      // libvhost-user, DPDK
  EXPECT_EQ(*InferSplitStride(2 * 2064, 2, 128), 2064u);  // yc-libvhost
  EXPECT_EQ(*InferSplitStride(4160, 1, 256), 4160u);
  EXPECT_FALSE(InferSplitStride(2000, 1, 128).ok());
  EXPECT_FALSE(InferSplitStride(2113, 2, 128).ok());
  EXPECT_FALSE(InferSplitStride(2112, 0, 128).ok());
}

TEST(Inflight, LibvhostStrideEqualsDpdkStrideForEverySize) {
  for (uint32_t n = 1; n <= 32768; ++n)
    EXPECT_EQ((16 * n + 2 + 63) / 64 * 64, (16 * n + 16 + 63) / 64 * 64) << n;
}

// Published but not cleared: the last batch is 2, entry 0 is in flight.
TEST(Inflight, RecoversTheBatchThatWasPublished) {
  Part part(4, 4);
  part.header().last_batch_head = 2;
  part.desc(0).inflight = 1;
  part.desc(2).inflight = 1;
  auto set = ReadInflightSplit(part.bytes, 4, 5);
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->Ids(), ElementsAre(0));
  EXPECT_EQ(set->repaired, 1);
  EXPECT_EQ(set->last_avail(), 6);
}

// A region made for a ring that already ran: used_idx of the ring keeps entry 0, used_idx 0 would lose it.
TEST(Inflight, RegionInitialisedWithTheRingsIndexKeepsTheFirstRequest) {
  Part part(4, 5);
  part.desc(0).inflight = 1;
  auto set = ReadInflightSplit(part.bytes, 4, 5);
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->Ids(), ElementsAre(0));
  EXPECT_EQ(set->last_avail(), 6);
}

TEST(Inflight, HeadsComeInTheOrderOfTheirCounters) {
  Part part(4);
  part.desc(3) = {1, {}, 0, 7};
  part.desc(1) = {1, {}, 0, 9};
  part.desc(0) = {1, {}, 0, 8};
  auto set = ReadInflightSplit(part.bytes, 4, 0);
  ASSERT_TRUE(set.ok()) << set.status();
  EXPECT_THAT(set->Ids(), ElementsAre(3, 0, 1));
}

TEST(Inflight, UninitialisedPartIsEmpty) {
  std::vector<uint8_t> zero(80);
  auto set = ReadInflightSplit(zero, 4, 17);
  ASSERT_TRUE(set.ok());
  EXPECT_TRUE(set->empty());
  EXPECT_EQ(set->last_avail(), 17);
}

TEST(Inflight, EachContradictionIsRefusedByName) {
  auto why = [](auto&& change, uint16_t used = 0) {
    Part part(4);
    change(part);
    auto set = ReadInflightSplit(part.bytes, 4, used);
    EXPECT_EQ(ReasonOf(set.status()), v1::INFLIGHT_UNKNOWN);
    return Message(set.status());
  };
  EXPECT_THAT(why([](Part& p) { p.header().version = 2; }), HasSubstr("version 2"));
  EXPECT_THAT(why([](Part& p) { p.header().desc_num = 5; }), HasSubstr("desc_num 5"));
  EXPECT_THAT(why([](Part& p) { p.header().last_batch_head = 4; }), HasSubstr("last_batch_head 4"));
  EXPECT_THAT(why([](Part& p) { p.desc(1).inflight = 2; }), HasSubstr("flag 2"));
  EXPECT_THAT(why([](Part&) {}, 5), HasSubstr("behind"));
  EXPECT_THAT(why([](Part& p) { p.desc(0).next = 9; }, 2), HasSubstr("entry 9"));
  std::vector<uint8_t> short_part(8);
  EXPECT_FALSE(ReadInflightSplit(short_part, 4, 0).ok());
}

TEST(Inflight, EntryBeyondASmallerRingIsRefused) {
  Part part(8);
  part.desc(5).inflight = 1;
  EXPECT_FALSE(ReadInflightSplit(part.bytes, 4, 0).ok());
}

// A back-end that completes in batches, killed between any two stores, loses and repeats nothing.
TEST(Inflight, RecoveryAfterAnyCrashPointIsRight) {
  EXPECT_TRUE(rc::check([] {
    const uint16_t n = 16;
    Part part(n);
    std::vector<bool> taken(n, false), published(n, false);
    uint16_t used = 0;
    uint64_t counter = 1;
    int stores = *rc::gen::inRange(0, 200);
    auto store = [&] { return stores-- > 0; };
    [&] {
      for (;;) {
        for (uint16_t i = 0; i < n; ++i) {
          if (taken[i] || !*rc::gen::arbitrary<bool>()) continue;
          if (!store()) return;
          part.desc(i).counter = counter++;
          if (!store()) return;
          part.desc(i).inflight = 1;
          taken[i] = true;
          published[i] = false;
        }
        std::vector<uint16_t> batch;
        for (uint16_t i = 0; i < n; ++i) {
          if (taken[i] && *rc::gen::arbitrary<bool>()) batch.push_back(i);
        }
        for (uint16_t i : batch) {
          if (!store()) return;
          part.desc(i).next = part.header().last_batch_head;
          part.header().last_batch_head = i;
        }
        if (!store()) return;
        used = static_cast<uint16_t>(used + batch.size());
        for (uint16_t i : batch) published[i] = true;
        for (uint16_t i : batch) {
          if (!store()) return;
          part.desc(i).inflight = 0;
        }
        if (!store()) return;
        part.header().used_idx = used;
        for (uint16_t i : batch) taken[i] = false;
      }
    }();
    auto set = ReadInflightSplit(part.bytes, n, used);
    RC_ASSERT(set.ok());
    std::vector<uint16_t> heads = set->Ids(), expected;
    std::sort(heads.begin(), heads.end());
    for (uint16_t i = 0; i < n; ++i) {
      if (taken[i] && !published[i]) expected.push_back(i);
    }
    RC_ASSERT(heads == expected);
  }));
}

}  // namespace
}  // namespace baton::virtio
