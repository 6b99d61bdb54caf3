// Memory of a guest with a balloon: 16 MiB live, whose content is known; a thread that takes memory, writes
// it, checks it and gives it back without end, so that pages are reused while they are reported as free; and
// on the letter d 48 MiB that are written and freed. Commands on standard input: d prints DIRTIED, q checks
// all and prints RESULT.
#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>

namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr size_t kLive = 16 * kMiB, kFreed = 48 * kMiB, kTaken = 4 * kMiB;

std::atomic<bool> g_end{false};
std::atomic<uint64_t> g_wrong{0}, g_turns{0};

uint64_t* Take(size_t size, uint64_t stamp) {
  void* map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  auto* words = static_cast<uint64_t*>(map);
  for (size_t i = 0; i < size / 8; ++i) words[i] = stamp ^ (i * 0x9e3779b97f4a7c15u);
  return words;
}

uint64_t Wrong(const uint64_t* words, size_t size, uint64_t stamp) {
  uint64_t wrong = 0;
  for (size_t i = 0; i < size / 8; ++i) wrong += words[i] != (stamp ^ (i * 0x9e3779b97f4a7c15u));
  return wrong;
}

void* TakeAndGive(void*) {
  for (uint64_t turn = 1; !g_end; ++turn) {
    uint64_t* words = Take(kTaken, turn);
    if (words == nullptr) continue;
    g_wrong += Wrong(words, kTaken, turn);
    munmap(words, kTaken);
    g_turns = turn;
    usleep(2000);
  }
  return nullptr;
}

}  // namespace

void RunMemoryWorkload() {
  const uint64_t* live = Take(kLive, 1);
  pthread_t thread;
  pthread_create(&thread, nullptr, TakeAndGive, nullptr);
  std::printf("STARTED\n");
  for (char c = 0; c != 'q';) {
    if (read(0, &c, 1) <= 0) break;
    if (c != 'd') continue;
    if (uint64_t* words = Take(kFreed, 2)) munmap(words, kFreed);
    std::printf("DIRTIED\n");
  }
  g_end = true;
  pthread_join(thread, nullptr);
  g_wrong += live == nullptr ? 1 : Wrong(live, kLive, 1);
  std::printf("RESULT %s turns=%llu wrong=%llu\n", g_wrong == 0 ? "OK" : "FAILED",
              static_cast<unsigned long long>(g_turns.load()),
              static_cast<unsigned long long>(g_wrong.load()));
}
