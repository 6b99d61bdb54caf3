// The lab guest's account of packets.
#include "tests/lab/vm/net_workload.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <deque>
#include <map>

namespace baton::lab {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

constexpr uint64_t kNetRam = 16 << 20;

// One guest's NIC: what was submitted, by queue.
class FakeNic : public QueuePort {
 public:
  struct Request {
    uint32_t tag;
    std::vector<Piece> pieces;
  };
  FakeNic(uint8_t last, uint32_t pairs, bool control) {
    UniqueFd fd(::memfd_create("ram", MFD_CLOEXEC));
    EXPECT_EQ(::ftruncate(fd.get(), kNetRam), 0);
    ram_.emplace(Ram::Open(fmt::format("/proc/self/fd/{}", fd.get()), kNetRam).value());
    setup_.pairs = pairs;
    setup_.buffers = 16;
    setup_.mac = {0x52, 0x54, 0, 0, 0, last};
    setup_.control = control;
    setup_.options.packets = 1000;
    work.emplace(*ram_, 0x10000, setup_, *this, [this](const std::string& what) { errors += what + "\n"; });
    work->Boot(last);
  }
  bool Submit(uint32_t queue, uint32_t tag, std::span<const Piece> pieces) override {
    queues[queue].push_back({tag, {pieces.begin(), pieces.end()}});
    return true;
  }
  void Kick(uint32_t) override {}
  // Takes the oldest transmitted packet of a pair off the ring.
  std::vector<uint8_t> Transmitted(uint32_t pair) {
    auto& queue = queues[2 * pair + 1];
    if (queue.empty()) return {};
    Request request = queue.front();
    queue.pop_front();
    const uint8_t* at = ram_->At<uint8_t>(request.pieces[0].gpa);
    std::vector<uint8_t> packet(at, at + request.pieces[0].size);
    work->Complete(2 * pair + 1, request.tag, 0, now);
    return packet;
  }
  void Deliver(uint32_t pair, const std::vector<uint8_t>& packet) {
    auto& queue = queues[2 * pair];
    ASSERT_FALSE(queue.empty());
    Request request = queue.front();
    queue.pop_front();
    std::copy(packet.begin(), packet.end(), ram_->At<uint8_t>(request.pieces[0].gpa));
    work->Complete(2 * pair, request.tag, static_cast<uint32_t>(packet.size()), now);
    work->Issue(now);
  }
  Ram& ram() { return *ram_; }

  std::map<uint32_t, std::deque<Request>> queues;
  std::optional<NetWorkload> work;
  std::string errors;
  int64_t now = 1;

 private:
  std::optional<Ram> ram_;
  NetWorkload::Setup setup_;
};

// Lets both pairs' packets accumulate, then returns those of pair 0.
std::vector<std::vector<uint8_t>> Packets(FakeNic& nic, int count) {
  std::vector<std::vector<uint8_t>> packets;
  while (packets.size() < static_cast<size_t>(count)) {
    nic.work->Issue(nic.now += 1000);
    for (auto packet = nic.Transmitted(0); !packet.empty(); packet = nic.Transmitted(0))
      packets.push_back(packet);
  }
  packets.resize(count);
  return packets;
}

TEST(NetWorkloadTest, WhatArrivesInOrderIsComplete) {
  FakeNic a(1, 2, false), b(2, 2, false);
  b.work->Issue(1);
  EXPECT_EQ(b.queues[0].size(), 16u) << "receive buffers are given";
  for (const auto& packet : Packets(a, 100)) b.Deliver(1, packet);
  EXPECT_EQ(b.work->counters().received, 100u);
  EXPECT_EQ(b.work->counters().missing + b.work->counters().duplicates + b.work->counters().reordered, 0u);
  EXPECT_THAT(a.errors + b.errors, IsEmpty());
}

TEST(NetWorkloadTest, LossesDuplicatesAndReorderingAreCounted) {
  FakeNic a(1, 1, false), b(2, 1, false);
  b.work->Issue(1);
  auto packets = Packets(a, 10);
  for (int i : {0, 1, 3, 2, 3, 7, 8}) b.Deliver(0, packets[i]);
  const auto& counters = b.work->counters();
  EXPECT_EQ(counters.missing, 3u) << "4, 5 and 6";
  EXPECT_EQ(counters.reordered, 1u);
  EXPECT_EQ(counters.duplicates, 1u);
  EXPECT_EQ(counters.errors, 0u);
}

TEST(NetWorkloadTest, CorruptPacketsAndOnesOwnAreErrors) {
  FakeNic a(1, 1, false), b(2, 1, false);
  a.work->Issue(1);
  b.work->Issue(1);
  auto packets = Packets(a, 3);
  packets[0][100] ^= 1;
  b.Deliver(0, packets[0]);
  EXPECT_THAT(b.errors, HasSubstr("corrupt"));
  packets[1].pop_back();
  b.Deliver(0, packets[1]);
  EXPECT_EQ(b.work->counters().errors, 2u);
  a.Deliver(0, packets[2]);
  EXPECT_THAT(a.errors, HasSubstr("its own"));
  std::vector<uint8_t> foreign(74, 0);  // not ours, e.g. a RARP
  b.Deliver(0, foreign);
  EXPECT_EQ(b.work->counters().errors, 2u);
}

TEST(NetWorkloadTest, BuffersThatComeTwiceOrNeverAreFound) {
  FakeNic a(1, 1, false);
  a.work->Issue(a.now);
  a.work->Issue(a.now += 1000);
  ASSERT_EQ(a.queues[1].size(), 1u);
  const uint32_t tag = a.queues[1].front().tag;
  a.work->FindLost(a.now + 2000, 1000);
  EXPECT_THAT(a.errors, HasSubstr("not given back"));
  a.work->Complete(1, tag + 1, 0, a.now);
  EXPECT_THAT(a.errors, HasSubstr("not under way"));
}

TEST(NetWorkloadTest, TheDeviceIsToldOfAllPairs) {
  FakeNic a(1, 4, true);
  a.work->Issue(1);
  ASSERT_EQ(a.queues[8].size(), 1u);
  auto request = a.queues[8].front();
  ASSERT_EQ(request.pieces.size(), 3u);
  EXPECT_EQ(*a.ram().At<uint16_t>(request.pieces[0].gpa), 0x0004);
  EXPECT_EQ(*a.ram().At<uint16_t>(request.pieces[1].gpa), 4);
  *a.ram().At<uint8_t>(request.pieces[2].gpa) = 0;
  a.work->Complete(8, request.tag, 1, 2);
  a.work->Issue(3);
  EXPECT_EQ(a.queues[8].size(), 1u) << "once";
  EXPECT_THAT(a.errors, IsEmpty());
  a.work->Silence(true);
  while (a.work->outstanding() != 0) {
    for (uint32_t pair = 0; pair < 4; ++pair) a.Transmitted(pair);
  }
  EXPECT_TRUE(a.work->Quiet());
}

}  // namespace
}  // namespace baton::lab
