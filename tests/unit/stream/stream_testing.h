// Parts that the stream's tests share.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "agent/memory/guest_ram.h"
#include "agent/stream/channel.h"
#include "common/clock.h"
#include "common/fd.h"

namespace baton::stream {

// Generous: passes on a machine that does ten other things.
inline Deadline Soon() { return Deadline::After(std::chrono::seconds(90)); }

inline std::pair<UniqueFd, UniqueFd> SocketPair() {
  int fds[2];
  EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
  return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

inline std::pair<std::unique_ptr<Channel>, std::unique_ptr<Channel>> ChannelPair() {
  auto [a, b] = SocketPair();
  auto left = MakePlainChannel(std::move(a));
  auto right = MakePlainChannel(std::move(b));
  EXPECT_TRUE(left.ok() && right.ok());
  return {std::move(left).value(), std::move(right).value()};
}

inline memory::GuestRam MemfdRam(const std::vector<uint64_t>& pages) {
  std::vector<memory::RamBlock> blocks;
  for (size_t i = 0; i < pages.size(); ++i) {
    UniqueFd fd(::memfd_create("ram", MFD_CLOEXEC));
    EXPECT_EQ(::ftruncate(fd.get(), static_cast<off_t>(pages[i] * memory::kPageSize)), 0);
    auto block = memory::RamBlock::FromFd("ram" + std::to_string(i), std::move(fd));
    EXPECT_TRUE(block.ok()) << block.status();
    blocks.push_back(std::move(block).value());
  }
  return memory::GuestRam(std::move(blocks));
}

inline void FillPage(uint8_t* page, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (size_t i = 0; i < memory::kPageSize; i += 8) {
    uint64_t word = random();
    std::memcpy(page + i, &word, 8);
  }
}

}  // namespace baton::stream
