// What putting completions back into order costs: random order within a window of 256, one core.
//
//   Order/buffer   ReorderBuffer: each completion is given by its sequence number, what is in order is taken
//   Order/walk     the least that any such code does: the same completions stored in a plain array by number,
//   and
//                  the array walked once
//   Order/queue    a whole device side: Stage and Publish of a split and of a packed ring with IN_ORDER, ring
//   and
//                  driver's part included
//
// bench_rings --ratio runs the first two in turns, best of each, and prints one line.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "agent/virtio/completion_queue.h"
#include "agent/virtio/device_queue.h"
#include "agent/virtio/driver_queue.h"
#include "agent/virtio/reorder_buffer.h"

namespace baton::virtio {
namespace {

constexpr uint32_t kWindow = 256;
constexpr uint32_t kCompletions = 1 << 16;

// Sequence numbers in an order in which requests could end with kWindow of them in flight: each next one is a
// random one of those in flight, and the oldest is waited for when the window is full.
std::vector<uint64_t> RandomOrder() {
  std::mt19937_64 random(42);
  std::vector<uint64_t> flight(kWindow), out;
  std::iota(flight.begin(), flight.end(), 0);
  uint64_t next = kWindow;
  uint64_t oldest = 0;
  std::vector<bool> done(kCompletions + kWindow, false);
  while (out.size() < kCompletions) {
    const size_t pick = random() % flight.size();
    const uint64_t sequence = flight[pick];
    out.push_back(sequence);
    done[sequence] = true;
    while (done[oldest]) ++oldest;
    flight[pick] = flight.back();
    flight.pop_back();
    while (next < oldest + kWindow && next < kCompletions) flight.push_back(next++);
    if (flight.empty()) break;
  }
  return out;
}

const std::vector<uint64_t>& Order() {
  static const std::vector<uint64_t> order = RandomOrder();
  return order;
}

uint64_t ThroughBuffer(ReorderBuffer<Completion>& buffer, uint64_t first) {
  uint64_t sum = 0;
  Completion completion{.sequence = 0, .len = 4096, .id = 0, .slots = 1, .full = true};
  for (uint64_t sequence : Order()) {
    completion.sequence = sequence;
    completion.id = static_cast<uint16_t>(sequence);
    if (!buffer.Complete(first + sequence, completion)) std::abort();
    buffer.Drain([&](const Completion& next) { sum += next.id + next.len; });
  }
  return sum;
}

uint64_t ThroughArray(std::vector<Completion>& array) {
  uint64_t sum = 0;
  Completion completion{.sequence = 0, .len = 4096, .id = 0, .slots = 1, .full = true};
  size_t walked = 0;
  const std::vector<uint64_t>& order = Order();
  for (size_t i = 0; i < order.size(); ++i) {
    completion.sequence = order[i];
    completion.id = static_cast<uint16_t>(order[i]);
    array[order[i] % (2 * kWindow)] = completion;
    // In order without looking: what is here was stored a window ago, or its place was.
    if (i >= kWindow) {
      const Completion& next = array[walked++ % (2 * kWindow)];
      sum += next.id + next.len;
    }
  }
  return sum;
}

void BufferBench(benchmark::State& state) {
  ReorderBuffer<Completion> buffer(kWindow);
  uint64_t first = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(ThroughBuffer(buffer, first));
    first += kCompletions;
  }
  state.SetItemsProcessed(static_cast<int64_t>(state.iterations()) * kCompletions);
}
BENCHMARK(BufferBench)->Name("Order/buffer");

void WalkBench(benchmark::State& state) {
  std::vector<Completion> array(2 * kWindow);
  for (auto _ : state) benchmark::DoNotOptimize(ThroughArray(array));
  state.SetItemsProcessed(static_cast<int64_t>(state.iterations()) * kCompletions);
}
BENCHMARK(WalkBench)->Name("Order/walk");

// A ring of kWindow entries, always full: batches of random completions, in order to the driver.
void QueueBench(benchmark::State& state) {
  struct alignas(64) Line {
    uint8_t bytes[64];
  };
  constexpr uint64_t kGpa = 0x100000;
  constexpr uint64_t kBytes = 64 * 1024;
  auto bytes = std::make_unique<Line[]>(kBytes / sizeof(Line));
  const GuestMemory memory = GuestMemory::Create({{kGpa, kBytes, bytes[0].bytes}}).value();
  const QueueLayout layout{kWindow, kGpa, kGpa + 16 * kWindow, kGpa + 32 * kWindow};
  const bool packed = state.range(0) != 0;
  const QueueOptions options{kFVersion1 | kFInOrder | (packed ? kFRingPacked : 0), nullptr};
  auto driver = DriverQueue::Create(memory, layout, options).value();
  auto device = DeviceQueue::Create(memory, layout, options, packed ? kPackedBaseAfterReset : 0).value();
  const Segment buffer{kGpa + kBytes - 4096, 4096};
  std::mt19937_64 random(42);
  std::vector<uint16_t> running;
  Chain chain;
  UsedBuffer used;
  int64_t completions = 0;
  for (auto _ : state) {
    while (driver.free_slots()) (void)driver.Add({}, {&buffer, 1}, 0);
    driver.Publish();
    while (device.Pop(&chain).value()) running.push_back(chain.id);
    for (int k = 0; k < 32 && !running.empty(); ++k) {
      std::swap(running[random() % running.size()], running.back());
      if (!device.Stage(running.back(), buffer.len).ok()) std::abort();
      running.pop_back();
    }
    completions += device.Publish();
    while (driver.TakeUsed(&used).value()) {
    }
  }
  state.SetItemsProcessed(completions);
}
BENCHMARK(QueueBench)->Name("Order/queue")->ArgName("packed")->Arg(0)->Arg(1);

double Seconds(auto&& run) {
  const auto begin = std::chrono::steady_clock::now();
  benchmark::DoNotOptimize(run());
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// In turns, so that whatever else the machine does hits both; the best of each, because nothing makes either
// faster than it is.
int PrintRatio() {
  ReorderBuffer<Completion> buffer(kWindow);
  std::vector<Completion> array(2 * kWindow);
  uint64_t first = 0;
  double best_buffer = 1e9;
  double best_walk = 1e9;
  for (int round = 0; round < 300; ++round) {
    best_buffer = std::min(best_buffer, Seconds([&] { return ThroughBuffer(buffer, first); }));
    first += kCompletions;
    best_walk = std::min(best_walk, Seconds([&] { return ThroughArray(array); }));
  }
  std::printf("%.1f %.1f %.2f\n", kCompletions / best_buffer / 1e6, kCompletions / best_walk / 1e6,
              best_buffer / best_walk);
  return 0;
}

}  // namespace
}  // namespace baton::virtio

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--ratio") == 0) return baton::virtio::PrintRatio();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
