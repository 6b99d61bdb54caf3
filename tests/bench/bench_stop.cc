// Baton's own time to stop a device of 64 queues with 256 requests in flight each, and to collect its state:
// CPU time of the mediator's thread, system calls included, from the VMM's first GET_VRING_BASE to the
// collected state, split and packed, while the back-end logs dirty pages as it does in every migration. The
// back-end is scripted and answers at once; rings and region are filled by hand, in the order of a queue that
// has been in use for long. Not in Baton's time, and shown beside it: that of back-end and VMM, and the wall
// clock with all three. The physical limit of it: what the same number of answers costs a thread that does
// nothing else.
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <random>
#include <set>
#include <sstream>
#include <thread>

#include "agent/vhost/inflight_proto.h"
#include "agent/vhost/mediator.h"
#include "agent/vhost/quirks.h"
#include "agent/vhost/socket.h"
#include "agent/virtio/features.h"
#include "agent/virtio/inflight.h"
#include "agent/virtio/ring_access.h"
#include "common/log.h"
#include "common/unix_socket.h"
#include "tests/temp_dir.h"

namespace baton::vhost {
namespace {

constexpr uint32_t kQueues = 64;
constexpr uint16_t kInFlight = 256, kRing = 1024;
// Per queue: descriptors, avail, used, then the requests' headers.
constexpr uint64_t kDesc = 0, kAvail = 0x4000, kUsed = 0x5000, kHeaders = 0x8000, kPerQueue = 0x10000;
constexpr uint64_t kMemory = kQueues * kPerQueue, kUser = 0x7f0000000000;

Deadline Soon() { return Deadline::After(std::chrono::seconds(10)); }

template <typename T>
T Must(absl::StatusOr<T> value) {
  if (value.ok()) return std::move(*value);
  std::fprintf(stderr, "bench_stop: %s\n", std::string(value.status().message()).c_str());
  std::exit(1);
}
void Must(const absl::Status& status) { (void)Must(status.ok() ? absl::StatusOr<int>(0) : status); }

// Answers what it is asked, and notes the in-flight region.
class ScriptedBackend {
 public:
  ScriptedBackend(const std::string& socket, bool packed) : packed_(packed) {
    listener_ = Must(UnixListener::Listen(socket));
    thread_ = std::thread([this] { Run(); });
  }
  ~ScriptedBackend() {
    quit_ = true;
    thread_.join();
  }
  // What GET_VRING_BASE answers.
  std::atomic<uint32_t> base{0};
  pid_t tid() const { return tid_; }

 private:
  void Run() {
    tid_ = ::gettid();
    Connection connection;
    while (!quit_) {
      pollfd p{connection.valid() ? connection.fd() : listener_.fd(), POLLIN, 0};
      if (::poll(&p, 1, 50) <= 0) continue;
      if (!connection.valid()) {
        connection = Connection(Must(listener_.Accept()));
        continue;
      }
      auto message = connection.Receive(false, Soon());
      if (!message.ok()) {
        connection.Close();
        continue;
      }
      Answer(connection, *message);
    }
  }
  void Answer(Connection& connection, WireMessage& m) {
    auto reply = [&](std::span<const uint8_t> payload, std::span<const int> fds = {}) {
      (void)connection.Send(m.header.request, kReplyFlags, payload, fds, Soon());
    };
    auto u64 = [&](uint64_t value) { reply(Bytes(value)); };
    switch (m.request()) {
      case Request::kGetFeatures:
        return u64(virtio::kFVersion1 | virtio::kVhostFLogAll | virtio::kVhostUserFProtocolFeatures |
                   (packed_ ? virtio::kFRingPacked : 0));
      case Request::kGetProtocolFeatures:
        return u64(pf::kMq | pf::kLogShmfd | pf::kReplyAck | pf::kInflightShmfd | pf::kSkipDrain);
      case Request::kGetQueueNum:
        return u64(kQueues);
      case Request::kGetInflightFd: {
        auto d = m.As<InflightDescription>();
        const auto format = packed_ ? virtio::RingFormat::kPacked : virtio::RingFormat::kSplit;
        auto geometry = Must(
            virtio::MakeInflightGeometry(virtio::InflightKind::kSpec, format, d.num_queues, d.queue_size));
        d.mmap_size = geometry.mmap_size;
        UniqueFd fd(::memfd_create("inflight", MFD_CLOEXEC));
        if (::ftruncate(fd.get(), static_cast<off_t>(d.mmap_size)) != 0) std::exit(1);
        const int raw = fd.get();
        return reply(Bytes(d), {&raw, 1});
      }
      case Request::kSetInflightFd: {
        // Fill it as if 256 requests of each queue had been fetched.
        auto d = m.As<InflightDescription>();
        description_ = d;
        region_ = std::move(m.fds[0]);
        break;
      }
      case Request::kSetLogBase:
        return u64(0);
      case Request::kGetVringBaseSkipDrain:
      case Request::kGetVringBase: {
        auto state = m.As<VringState>();
        state.num = base;
        return reply(Bytes(state));
      }
      default:
        break;
    }
    if (m.need_reply()) u64(0);
  }

 public:
  UniqueFd region_;
  InflightDescription description_{};

 private:
  const bool packed_;
  UnixListener listener_;
  std::atomic<pid_t> tid_{0};
  std::atomic<bool> quit_{false};
  std::thread thread_;
};

struct Desc {
  uint64_t addr;
  uint32_t len;
  uint16_t flags_or_id, next_or_flags;
};

struct BlkHead {
  uint32_t type, reserved;
  uint64_t sector;
};

// 256 writes of one queue, made available and fetched; what the region says of them.
virtio::InflightSet Fill(uint8_t* memory, uint32_t queue, bool packed) {
  uint8_t* at = memory + queue * kPerQueue;
  const uint64_t gpa = queue * kPerQueue;
  virtio::InflightSet set;
  set.format = packed ? virtio::RingFormat::kPacked : virtio::RingFormat::kSplit;
  constexpr uint16_t kNext = 1, kWrite = 2;
  // Completions out of order have mixed the free descriptors (split) and ids (packed).
  std::vector<uint16_t> places(kInFlight);
  std::iota(places.begin(), places.end(), 0);
  std::shuffle(places.begin(), places.end(), std::mt19937(queue + 1));
  for (uint16_t i = 0; i < kInFlight; ++i) {
    BlkHead head{1, 0, uint64_t{8} * i};
    std::memcpy(at + kHeaders + 32 * i, &head, sizeof head);
    const uint64_t header = gpa + kHeaders + 32 * i;
    const auto d = static_cast<uint16_t>(3 * (packed ? i : places[i]));
    const uint16_t id = places[i];
    if (packed) {
      const uint16_t avail = 1u << 7;
      const Desc chain[3] = {{header, 16, id, static_cast<uint16_t>(avail | kNext)},
                             {gpa, 4096, id, static_cast<uint16_t>(avail | kNext)},
                             {header + 16, 1, id, static_cast<uint16_t>(avail | kWrite)}};
      std::memcpy(at + kDesc + 16 * d, chain, sizeof chain);
      set.requests.push_back({id, 3, static_cast<uint32_t>(set.descs.size()), i + 1u});
      for (const Desc& c : chain) set.descs.push_back({c.addr, c.len, c.flags_or_id, c.next_or_flags});
      continue;
    }
    const Desc chain[3] = {{header, 16, kNext, static_cast<uint16_t>(d + 1)},
                           {gpa, 4096, kNext, static_cast<uint16_t>(d + 2)},
                           {header + 16, 1, kWrite, 0}};
    std::memcpy(at + kDesc + 16 * d, chain, sizeof chain);
    std::memcpy(at + kAvail + 4 + 2 * i, &d, 2);
    set.requests.push_back({d, 0, 0, i + 1u});
  }
  if (packed) {
    set.avail.idx = 3 * kInFlight;
  } else {
    const uint16_t idx = kInFlight;
    std::memcpy(at + kAvail + 2, &idx, 2);
    set.avail.idx = idx;
  }
  return set;
}

std::set<pid_t> Threads() {
  std::set<pid_t> out;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task"))
    out.insert(std::stoi(entry.path().filename().string()));
  return out;
}

// CPU time of a thread, by its id (the clock id as the kernel makes it from one).
double CpuMs(pid_t tid) {
  timespec t{};
  ::clock_gettime(static_cast<clockid_t>((~static_cast<unsigned>(tid)) << 3 | 6), &t);
  return static_cast<double>(t.tv_sec) * 1e3 + static_cast<double>(t.tv_nsec) / 1e6;
}

// Page faults of a thread that needed no disk.
double MinorFaults(pid_t tid) {
  std::ifstream file(fmt::format("/proc/self/task/{}/stat", tid));
  std::string line;
  std::getline(file, line);
  // The tenth field; the second may hold spaces and ends with the last bracket.
  std::istringstream fields(line.substr(line.rfind(')') + 1));
  std::string field;
  for (int i = 3; i <= 10; ++i) fields >> field;
  return std::stod(field);
}

struct Figures {
  double cpu_ms, backend_ms, vmm_ms, wall_ms, faults;
};

Figures Once(const std::string& dir, bool packed) {
  UniqueFd memory_fd(::memfd_create("guest", MFD_CLOEXEC));
  if (::ftruncate(memory_fd.get(), kMemory) != 0) std::exit(1);
  auto* memory =
      static_cast<uint8_t*>(::mmap(nullptr, kMemory, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd.get(), 0));
  std::vector<memory::RamBlock> blocks;
  blocks.push_back(Must(memory::RamBlock::FromFd("ram", UniqueFd(::dup(memory_fd.get())))));
  memory::GuestRam ram(std::move(blocks));
  Must(ram.SetLayout({{0, kMemory, 0, 0}}));

  ScriptedBackend backend(dir + "/backend.sock", packed);
  MediatorOptions options;
  options.spec.set_name("disk0");
  options.spec.set_class_(v1::BLK);
  options.spec.set_queue_size(kRing);
  options.backend.set_socket(dir + "/backend.sock");
  options.backend.set_kind(v1::LAB);
  options.listen_path = dir + "/vmm.sock";
  options.ram = &ram;
  const std::set<pid_t> before = Threads();
  auto mediator = Must(Mediator::Start(std::move(options), {}));
  pid_t thread = 0;
  for (pid_t tid : Threads()) {
    if (!before.contains(tid)) thread = tid;
  }
  Connection vmm = Must(Connection::Dial(dir + "/vmm.sock", Soon()));
  auto ask = [&](Request request, std::span<const uint8_t> payload, std::span<const int> fds = {},
                 bool need_reply = false) {
    Must(vmm.Send(static_cast<uint32_t>(request), kVersion | (need_reply ? kFlagNeedReply : 0), payload, fds,
                  Soon()));
  };
  auto set = [&](Request request, std::span<const uint8_t> payload, std::vector<int> fds = {}) {
    ask(request, payload, fds, true);
    if (Must(vmm.Receive(true, Soon())).As<uint64_t>() != 0) std::exit(1);
  };
  ask(Request::kGetFeatures, {});
  uint64_t features = Must(vmm.Receive(true, Soon())).As<uint64_t>() & ~virtio::kVhostFLogAll;
  ask(Request::kGetProtocolFeatures, {});
  uint64_t protocol = Must(vmm.Receive(true, Soon())).As<uint64_t>() & ~pf::kInflightShmfd;
  ask(Request::kSetProtocolFeatures, Bytes(protocol));
  set(Request::kSetFeatures, Bytes(features));
  struct {
    MemTableHeader header{1, 0};
    MemRegion region{0, kMemory, kUser, 0};
  } table;
  set(Request::kSetMemTable, Bytes(table), {memory_fd.get()});
  UniqueFd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  for (uint32_t q = 0; q < kQueues; ++q) {
    const uint64_t at = kUser + q * kPerQueue;
    VringState num{q, kRing}, start{q, packed ? virtio::kPackedBaseAfterReset : 0};
    VringAddr addr{q, 0, at + kDesc, at + kUsed, at + kAvail, 0};
    uint64_t index = q;
    set(Request::kSetVringNum, Bytes(num));
    set(Request::kSetVringBase, Bytes(start));
    set(Request::kSetVringAddr, Bytes(addr));
    set(Request::kSetVringCall, Bytes(index), {event.get()});
    set(Request::kSetVringKick, Bytes(index), {event.get()});
  }
  // Everything is fetched, nothing completed.
  const auto format = packed ? virtio::RingFormat::kPacked : virtio::RingFormat::kSplit;
  const InflightDescription& d = backend.description_;
  auto geometry = Must(virtio::CheckInflightGeometry(format, d.mmap_size, d.mmap_offset, d.num_queues,
                                                     d.queue_size, d.mmap_size));
  std::vector<uint8_t> content(d.mmap_size);
  std::vector<virtio::InflightSet> sets;
  for (uint32_t q = 0; q < kQueues; ++q) {
    virtio::InflightSet in_flight = Fill(memory, q, packed);
    auto part = Must(virtio::InflightPart(geometry, content, static_cast<uint16_t>(q)));
    Must(virtio::WriteInflight(part, d.queue_size, in_flight));
    sets.push_back(in_flight);
    backend.base = packed ? virtio::EncodePackedBase({in_flight.avail, in_flight.used}) : in_flight.avail.idx;
  }
  if (::pwrite(backend.region_.get(), content.data(), content.size(), 0) !=
      static_cast<ssize_t>(content.size()))
    std::exit(1);

  // The rounds before the stop have read all memory through this mapping.
  for (uint64_t at = 0; at < kMemory; at += memory::kPageSize) (void)virtio::Load<uint8_t>(ram.At(at, 1));
  Must(mediator->StartLogging(Soon()));
  Must(mediator->ArmStop(StopOrder{std::chrono::seconds(5), true, true, ""}));
  const double faults = MinorFaults(thread);
  const double cpu = CpuMs(thread), backend_cpu = CpuMs(backend.tid()), vmm_cpu = CpuMs(::gettid());
  const Clock::time_point begin = Clock::now();
  for (uint32_t q = 0; q < kQueues; ++q) {
    VringState wanted{q, 0};
    ask(Request::kGetVringBase, Bytes(wanted));
    (void)Must(vmm.Receive(true, Soon()));
  }
  v1::DeviceState state = Must(mediator->CollectState(Soon()));
  Figures out{CpuMs(thread) - cpu, CpuMs(backend.tid()) - backend_cpu, CpuMs(::gettid()) - vmm_cpu,
              std::chrono::duration<double, std::milli>(Clock::now() - begin).count(), 0};
  out.faults = MinorFaults(thread) - faults;
  if (mediator->stop().handed_off() != kQueues * kInFlight) {
    std::fprintf(stderr, "bench_stop: %u requests handed off: %s\n", mediator->stop().handed_off(),
                 mediator->stop().why().c_str());
    std::exit(1);
  }
  for (uint32_t q = 0; q < kQueues; ++q) {
    if (Must(FromProto(state.vrings(static_cast<int>(q)))) == sets[q]) continue;
    std::fprintf(stderr, "bench_stop: queue %u was collected with other requests than it has\n", q);
    std::exit(1);
  }
  mediator.reset();
  ::munmap(memory, kMemory);
  return out;
}

// CPU time of a thread that answers as many requests as a stop has, with the system calls that a mediator has
// for each: receive, answer, which wakes the other side, and close a kick descriptor.
double BareAnswers() {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) std::exit(1);
  UniqueFd vmm(ends[0]), mediator(ends[1]);
  std::vector<UniqueFd> kicks;
  for (uint32_t q = 0; q < kQueues; ++q) kicks.emplace_back(::eventfd(0, EFD_CLOEXEC));
  std::array<char, sizeof(Header) + sizeof(VringState)> message{};
  double cpu = 0;
  std::thread answers([&] {
    std::array<char, sizeof message> bytes{};
    const double before = CpuMs(::gettid());
    for (uint32_t q = 0; q < kQueues; ++q) {
      if (::recv(mediator.get(), bytes.data(), bytes.size(), 0) != ssize_t{sizeof bytes}) std::exit(1);
      kicks[q].reset();
      if (::send(mediator.get(), bytes.data(), bytes.size(), 0) != ssize_t{sizeof bytes}) std::exit(1);
    }
    cpu = CpuMs(::gettid()) - before;
  });
  for (uint32_t q = 0; q < kQueues; ++q) {
    if (::send(vmm.get(), message.data(), message.size(), 0) != ssize_t{sizeof message} ||
        ::recv(vmm.get(), message.data(), message.size(), 0) != ssize_t{sizeof message})
      std::exit(1);
  }
  answers.join();
  return cpu;
}

int Main(int argc, char** argv) {
  CLI::App app("Baton's own time to stop a device of 64 queues with 256 requests in flight each");
  int runs = 20;
  bool json = false;
  app.add_option("--runs", runs, "measurements (20)")->check(CLI::PositiveNumber);
  app.add_flag("--json", json, "the medians, as a JSON object, as the last line");
  CLI11_PARSE(app, argc, argv);
  ::signal(SIGPIPE, SIG_IGN);
  InitLogging({.program = "bench_stop", .level = "error", .json = false, .context = {}});
  const test::TempDir dir;
  std::string medians;
  for (bool packed : {false, true}) {
    std::vector<double> cpu, backend, vmm, wall, faults, bare;
    for (int i = 0; i <= runs; ++i) {
      const Figures f = Once(dir.path(), packed);
      if (i == 0) continue;  // warms up
      cpu.push_back(f.cpu_ms);
      backend.push_back(f.backend_ms);
      vmm.push_back(f.vmm_ms);
      wall.push_back(f.wall_ms);
      faults.push_back(f.faults);
      bare.push_back(BareAnswers());
    }
    auto median = [](std::vector<double>& values) {
      std::sort(values.begin(), values.end());
      return values[values.size() / 2];
    };
    (void)median(cpu);
    const char* what = packed ? "packed" : "split";
    std::printf(
        "%-6s Baton's own time min %6.3f median %6.3f max %6.3f ms; medians beside it: back-end %6.3f, "
        "VMM %6.3f, wall clock with both %6.3f ms, page faults %.0f; %u bare answers %6.3f ms\n",
        what, cpu.front(), cpu[cpu.size() / 2], cpu.back(), median(backend), median(vmm), median(wall),
        median(faults), kQueues, median(bare));
    medians += fmt::format("{}\"{}\": {:.4f}", medians.empty() ? "" : ", ", what, cpu[cpu.size() / 2]);
  }
  if (json) std::printf("{%s}\n", medians.c_str());
  return 0;
}

}  // namespace
}  // namespace baton::vhost

int main(int argc, char** argv) { return baton::vhost::Main(argc, argv); }
