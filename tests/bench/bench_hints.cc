// What free page hints are worth: the same memory moved with and without them, by both engines over loopback,
// with Baton's balloon device and a driver that names what is free as Linux does. Prints JSON on the last
// line.
//
//   bench_hints [--gib N] [--rounds N]     N GiB of memory (8), one eighth of it live, the rest dirtied and
//   freed
#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <random>
#include <thread>

#include "agent/migration/destination.h"
#include "agent/migration/source.h"
#include "agent/migration/state_pipe.h"
#include "agent/vhost/balloon_backend.h"
#include "agent/vhost/frontend.h"
#include "agent/virtio/balloon.h"
#include "agent/virtio/driver_queue.h"
#include "common/log.h"

namespace baton {
namespace {

using std::chrono::seconds;
constexpr uint64_t kGiB = uint64_t{1} << 30;
constexpr uint64_t kHintBlock = uint64_t{4} << 20;
constexpr uint64_t kRingBase = 0x10000;
constexpr uint16_t kRingSize = 128;

memory::GuestRam MakeBenchRam(uint64_t bytes) {
  UniqueFd fd(::memfd_create("bench-hints", MFD_CLOEXEC));
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) std::abort();
  std::vector<memory::RamBlock> blocks;
  blocks.push_back(*memory::RamBlock::FromFd("mem", std::move(fd)));
  memory::GuestRam ram(std::move(blocks));
  if (!ram.SetLayout({{0, bytes, 0, 0}}).ok()) std::abort();
  return ram;
}

// The guest's side of the balloon: three rings at kRingBase, and everything from `free` on is free.
class BalloonDriver {
 public:
  BalloonDriver(const std::string& socket, const memory::GuestRam& ram, uint64_t free)
      : ram_(ram),
        free_(free),
        frontend_(*vhost::Connection::Dial(socket, Deadline::After(seconds(5)))),
        memory_(*virtio::GuestMemory::Create({{0, ram.total_bytes(), ram.blocks()[0].base()}})) {
    Check(Start());
    thread_ = std::thread([this] { Run(); });
  }
  ~BalloonDriver() {
    end_ = true;
    Signal(wake_.get());
    thread_.join();
  }

 private:
  static void Check(const absl::Status& status) {
    if (status.ok()) return;
    std::fprintf(stderr, "%s\n", Message(status).c_str());
    std::abort();
  }
  static void Signal(int fd) {
    const uint64_t one = 1;
    (void)!::write(fd, &one, sizeof one);
  }
  absl::Status Start() {
    const Deadline deadline = Deadline::After(seconds(10));
    using vhost::Request;
    frontend_.set_on_config_change([this] { changed_ = true; });
    RETURN_IF_ERROR(frontend_.GetU64(Request::kGetFeatures, deadline).status());
    ASSIGN_OR_RETURN(uint64_t protocol, frontend_.GetU64(Request::kGetProtocolFeatures, deadline));
    RETURN_IF_ERROR(frontend_.SetProtocolFeatures(protocol, deadline));
    RETURN_IF_ERROR(frontend_.OpenChannel(deadline));
    RETURN_IF_ERROR(
        frontend_.SetU64(Request::kSetFeatures, kFeatures | virtio::kVhostUserFProtocolFeatures, deadline));
    struct {
      vhost::MemTableHeader header;
      vhost::MemRegion region;
    } table{{1, 0}, {0, ram_.total_bytes(), 0, 0}};
    int fd = ram_.blocks()[0].fd();
    RETURN_IF_ERROR(frontend_.Set(Request::kSetMemTable, vhost::Bytes(table), {&fd, 1}, deadline));
    const virtio::QueueLayout layout{kRingSize, kRingBase, kRingBase + 0x2000, kRingBase + 0x4000};
    virtio::QueueOptions options;
    options.features = kFeatures;
    auto queue = virtio::DriverQueue::Create(memory_, layout, options);
    if (!queue.ok()) return queue.status();
    queue_.emplace(*std::move(queue));
    const uint32_t ring = 2;
    const vhost::VringState num{ring, kRingSize}, base{ring, 0}, enable{ring, 1};
    const vhost::VringAddr addr{ring, 0, layout.desc, layout.device, layout.driver, 0};
    const uint64_t index = ring;
    int kick = kick_.get(), call = call_.get();
    RETURN_IF_ERROR(frontend_.Set(Request::kSetVringNum, vhost::Bytes(num), {}, deadline));
    RETURN_IF_ERROR(frontend_.Set(Request::kSetVringBase, vhost::Bytes(base), {}, deadline));
    RETURN_IF_ERROR(frontend_.Set(Request::kSetVringAddr, vhost::Bytes(addr), {}, deadline));
    RETURN_IF_ERROR(frontend_.Set(Request::kSetVringKick, vhost::Bytes(index), {&kick, 1}, deadline));
    RETURN_IF_ERROR(frontend_.Set(Request::kSetVringCall, vhost::Bytes(index), {&call, 1}, deadline));
    return frontend_.Set(Request::kSetVringEnable, vhost::Bytes(enable), {}, deadline);
  }
  bool Say(uint32_t word) {
    const uint64_t gpa = kRingBase + 0x6000 + 4 * (words_++ % 64);
    std::memcpy(memory_.At(gpa, 4), &word, 4);
    const virtio::Segment segment{gpa, 4};
    return Add({&segment, 1}, {});
  }
  // Waits for room; false at the end.
  bool Add(std::span<const virtio::Segment> out, std::span<const virtio::Segment> in) {
    while (!end_) {
      if (queue_->Add(out, in, 0).ok()) return true;
      Publish();
      pollfd items[2] = {{call_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
      virtio::UsedBuffer used;
      bool taken = false;
      while (queue_->TakeUsed(&used).value_or(false)) taken = true;
      if (taken) continue;
      if (queue_->EnableCalls().value_or(true)) continue;
      ::poll(items, 2, 1000);
      uint64_t count;
      if (items[0].revents) (void)!::read(call_.get(), &count, sizeof count);
    }
    return false;
  }
  void Publish() {
    queue_->Publish();
    if (queue_->NeedsKick()) Signal(kick_.get());
  }
  void Run() {
    while (!end_) {
      pollfd items[2] = {{frontend_.channel_fd(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
      ::poll(items, 2, -1);
      if (items[0].revents) frontend_.ServeChannel();
      if (!std::exchange(changed_, false)) continue;
      auto config = frontend_.GetConfig(0, virtio::kBalloonConfigSize, Deadline::After(seconds(5)));
      uint32_t id = 0;
      if (!config.ok()) return;
      std::memcpy(&id, config->data() + virtio::kBalloonConfigCmdId, 4);
      if (id < virtio::kHintFirstId || !Say(id)) continue;
      for (uint64_t gpa = free_; gpa < ram_.total_bytes(); gpa += kHintBlock) {
        const virtio::Segment segment{gpa,
                                      static_cast<uint32_t>(std::min(kHintBlock, ram_.total_bytes() - gpa))};
        if (!Add({}, {&segment, 1})) return;
      }
      if (Say(virtio::kHintStop)) Publish();
    }
  }

  static constexpr uint64_t kFeatures =
      virtio::kBalloonFFreePageHint | virtio::kFVersion1 | virtio::kFEventIdx;
  const memory::GuestRam& ram_;
  const uint64_t free_;
  vhost::Frontend frontend_;
  virtio::GuestMemory memory_;
  std::optional<virtio::DriverQueue> queue_;
  UniqueFd kick_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)}, call_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)},
      wake_{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
  uint32_t words_ = 0;
  bool changed_ = false;
  std::atomic<bool> end_{false};
  std::thread thread_;
};

// A guest that does nothing, so that only memory and hints are measured.
class IdleVmm final : public vmm::VmmDriver {
 public:
  ~IdleVmm() override {
    if (reader_.joinable()) reader_.join();
  }
  pid_t pid() const override { return ::getpid(); }
  int exit_fd() const override { return exited_.get(); }
  std::string version() const override { return "idle"; }
  absl::StatusOr<bool> IsRunning(Deadline) override { return true; }
  absl::StatusOr<UniqueFd> Freeze(Deadline) override { return Pair(out_); }
  absl::Status ContinueState(Deadline deadline) override {
    RETURN_IF_ERROR(migration::WriteState(out_.get(), "state", deadline));
    out_.reset();
    return absl::OkStatus();
  }
  absl::Status Resume(Deadline) override { return absl::OkStatus(); }
  absl::StatusOr<UniqueFd> BeginLoad(Deadline) override {
    UniqueFd in;
    ASSIGN_OR_RETURN(UniqueFd other, Pair(in));
    reader_ = std::thread([fd = std::move(in)] {
      (void)migration::ReadToEnd(fd.get(), Deadline::After(seconds(60)),
                                 [](std::string) { return absl::OkStatus(); });
    });
    return other;
  }
  absl::Status FinishLoad(Deadline) override { return absl::OkStatus(); }
  absl::Status Start(Deadline) override { return absl::OkStatus(); }
  absl::Status Announce(Deadline) override { return absl::OkStatus(); }
  absl::Status PowerDown(Deadline) override { return absl::OkStatus(); }
  void Kill() override {}

 private:
  static absl::StatusOr<UniqueFd> Pair(UniqueFd& mine) {
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return ErrnoError(errno, "pair");
    mine.reset(pair[0]);
    return UniqueFd(pair[1]);
  }
  UniqueFd exited_{::eventfd(0, EFD_CLOEXEC)}, out_;
  std::thread reader_;
};

class HintsOnly final : public migration::DeviceSet {
 public:
  HintsOnly(memory::HintSource* hints, uint64_t bytes) : hints_(hints), bytes_(bytes) {}
  memory::HintSource* hints() override { return hints_; }
  std::vector<std::unique_ptr<memory::DirtySource>> MakeDirtySources() override { return {}; }
  absl::Status ArmStop(const migration::StopOrders&) override { return absl::OkStatus(); }
  std::vector<v1::DeviceStop> stops() const override { return {}; }
  std::vector<std::string> TakesInflight() const override { return {}; }
  std::vector<std::string> OrdersInflight() const override { return {}; }
  absl::StatusOr<v1::DeviceStates> CollectStates(const memory::GuestRam&, Deadline) override {
    v1::DeviceStates states;
    states.add_layout()->set_size(bytes_);
    return states;
  }
  Duration stop_duration() const override { return Duration(0); }
  absl::Status DisarmStop() override { return absl::OkStatus(); }
  absl::Status ExpectStates(const v1::DeviceStates&) override { return absl::OkStatus(); }
  absl::Status VerifyAgainstMemory(const v1::DeviceStates&, const memory::GuestRam&) override {
    return absl::OkStatus();
  }
  absl::Status CheckStarted() const override { return absl::OkStatus(); }

 private:
  memory::HintSource* const hints_;
  const uint64_t bytes_;
};

class NoJournal final : public migration::RecordLog {
 public:
  explicit NoJournal(std::vector<migration::JournalRecord> records) : records_(std::move(records)) {}
  absl::Status Append(const migration::JournalRecord& record) override {
    std::lock_guard lock(mutex_);
    records_.push_back(record);
    return absl::OkStatus();
  }
  bool certainly_absent() const override { return true; }
  absl::Status Repair() override { return absl::OkStatus(); }
  absl::Status Reserve(size_t) override { return absl::OkStatus(); }
  std::vector<migration::JournalRecord> Records() const override {
    std::lock_guard lock(mutex_);
    return records_;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<migration::JournalRecord> records_;
};

struct Result {
  double seconds = 0;
  uint64_t wire = 0, hinted = 0;
};

Result Move(const memory::GuestRam& here, memory::HintSource& hints, bool use) {
  memory::GuestRam there = MakeBenchRam(here.total_bytes());
  IdleVmm source, destination;
  HintsOnly devices(&hints, here.total_bytes()), none(nullptr, here.total_bytes());
  NoJournal mine({{migration::JournalRecord::Kind::kOwner, 1, ""}}), theirs({});
  UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  if (::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      ::listen(listener.get(), 16) != 0 ||
      ::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0)
    std::abort();
  migration::DestinationOptions to;
  to.migration_id = "m1";
  to.vm = "vm";
  to.epoch = 1;
  auto in = migration::IncomingMigration::Start(
      to, {destination, there, none, theirs, [](const v1::SideReport&) {}});
  if (!in.ok()) std::abort();
  std::thread acceptor([&] {
    for (;;) {
      UniqueFd fd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!fd) return;
      stream::PreambleBytes preamble;
      if (::recv(fd.get(), preamble.data(), preamble.size(), MSG_WAITALL) !=
          static_cast<ssize_t>(preamble.size()))
        continue;
      (void)(*in)->AcceptChannel(preamble, std::move(fd));
    }
  });
  migration::SourceOptions from;
  from.migration_id = "m1";
  from.vm = "vm";
  from.epoch = 1;
  from.dial.address = "127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  from.params.set_free_page_hints(use);
  const Clock::time_point begin = Clock::now();
  auto out = migration::OutgoingMigration::Start(
      from, {source, here, devices, mine, nullptr, [](const v1::SideReport&) {}});
  auto end = out->Wait(Deadline::After(seconds(300)));
  Result result;
  result.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  if (!end.ok() || *end != migration::OutgoingMigration::Outcome::kReleased) {
    std::fprintf(stderr, "%s\n", out->report().ShortDebugString().c_str());
    std::exit(1);
  }
  result.wire = out->report().progress().bytes().wire();
  result.hinted = out->report().progress().bytes().hint_skipped();
  ::shutdown(listener.get(), SHUT_RDWR);
  acceptor.join();
  return result;
}

int Main(int argc, char** argv) {
  CLI::App app{"What free page hints are worth"};
  uint64_t gib = 8;
  int rounds = 3;
  app.add_option("--gib", gib, "GiB of memory")->check(CLI::Range(1, 64));
  app.add_option("--rounds", rounds, "Measurements of each")->check(CLI::Range(1, 100));
  CLI11_PARSE(app, argc, argv);
  InitLogging({.program = "bench_hints", .level = "error", .json = false, .context = ""});
  const uint64_t bytes = gib * kGiB, live = bytes / 8;
  memory::GuestRam ram = MakeBenchRam(bytes);
  std::mt19937_64 random(1);
  auto* words = reinterpret_cast<uint64_t*>(ram.blocks()[0].base());
  for (uint64_t i = 0; i < live / 8; ++i) words[i] = random();
  // Dirtied as a whole, and freed.
  for (uint64_t i = live / 8; i < bytes / 8; ++i) words[i] = i * 0x9e3779b97f4a7c15u;
  const std::string socket = fmt::format("/tmp/bench-hints-{}.sock", ::getpid());
  vhost::BalloonBackendOptions options;
  options.listen_path = socket;
  options.ram = &ram;
  auto balloon = vhost::BalloonBackend::Start(std::move(options));
  if (!balloon.ok()) std::abort();
  BalloonDriver driver(socket, ram, live);
  std::vector<double> with, without;
  double bytes_ratio = 0;
  for (int round = 0; round < rounds; ++round) {
    const Result hinted = Move(ram, **balloon, true), plain = Move(ram, **balloon, false);
    if (hinted.hinted == 0) return 1;
    std::printf("round %d: with hints %6.2f s, %8.1f MiB sent; without %6.2f s, %8.1f MiB sent\n", round,
                hinted.seconds, static_cast<double>(hinted.wire) / 1048576, plain.seconds,
                static_cast<double>(plain.wire) / 1048576);
    with.push_back(hinted.seconds);
    without.push_back(plain.seconds);
    bytes_ratio = std::max(bytes_ratio, static_cast<double>(hinted.wire) / static_cast<double>(live));
  }
  std::sort(with.begin(), with.end());
  std::sort(without.begin(), without.end());
  std::printf("{\"bytes_ratio\": %.3f, \"time_ratio\": %.3f}\n", bytes_ratio,
              with[with.size() / 2] / without[without.size() / 2]);
  return 0;
}

}  // namespace
}  // namespace baton

int main(int argc, char** argv) { return baton::Main(argc, argv); }
