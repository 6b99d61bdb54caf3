// ./dev soak devices: random crashes under a lab guest that writes all the time, thousands of runs. One run
// is one incident: a back-end is killed (anywhere, or at a named point of a request's life), the mediator is
// taken away and comes back as another shim's would, both at once, the disk gets another back-end, the guest
// is stopped, or it moves. After each the guest must complete what it had in flight, and read back everything
// it ever wrote: nothing lost, repeated or misordered.
//
// A guest with random features lives for a while; its own seed is printed with every failure, and
// `--seed THAT --runs N` repeats it from its boot.
#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <map>
#include <random>

#include "common/log.h"
#include "tests/lab/device/control_client.h"
#include "tests/lab/device/journal.h"
#include "tests/lab/vm/harness.h"

namespace baton::lab {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr int kRunsOfAGuest = 40;

// The points of the lab device (tests/lab/device) at which it can end itself.
constexpr const char* kCrashPoints[] = {"before_fetch",  "fetch_counter", "fetch_flag",    "fetch_entry",
                                        "after_fetch",   "before_io",     "after_io",      "before_link",
                                        "link_entry",    "link_head",     "link_position", "after_link",
                                        "after_publish", "clear_flag",    "after_clear"};

class Soak {
 public:
  Soak(std::string device, uint64_t seed, uint64_t runs)
      : device_(std::move(device)), runs_(runs), next_seed_(seed) {}

  absl::Status Run() {
    for (; done_ < runs_; ++done_) {
      if (!harness_ || left_ == 0) RETURN_IF_ERROR(NewGuest());
      --left_;
      absl::Status status = OneRun();
      if (!status.ok()) return Explain(status);
    }
    return EndGuest();
  }

  void Print() const {
    for (const auto& [name, count] : counts_) std::printf("  %-22s %8llu\n", name.c_str(), Wide(count));
    std::printf(
        "verified: %llu runs, %llu writes, %llu requests replayed, no I/O lost, repeated or misordered\n",
        Wide(done_), Wide(writes_), Wide(replayed_));
  }

 private:
  static unsigned long long Wide(uint64_t value) { return value; }
  uint64_t Below(uint64_t end) { return random_() % end; }

  absl::Status Explain(const absl::Status& status) const {
    std::string history;
    for (const std::string& what : history_) history += what + ", ";
    return Annotate(status, fmt::format("guest of --seed {} ({}), its run {} ({}in all {})", guest_seed_,
                                        features_, history_.size(), history, done_));
  }

  absl::Status NewGuest() {
    RETURN_IF_ERROR(EndGuest());
    history_.clear();
    guest_seed_ = next_seed_;
    random_.seed(guest_seed_);
    next_seed_ = random_();
    left_ = kRunsOfAGuest;
    HarnessOptions options;
    options.queues = 1 + static_cast<uint32_t>(Below(3));
    options.queue_size = 16u << Below(4);
    options.workload.writers = 1 + static_cast<uint32_t>(Below(12));
    options.workload.blocks = options.workload.writers * (9 + Below(8));
    options.workload.packed = Below(2) != 0;
    options.workload.indirect = Below(2) != 0;
    options.workload.event_idx = Below(2) != 0;
    options.workload.in_order = Below(4) == 0;
    // QEMU keeps an in-flight region; a VMM that does not leaves it to the mediator.
    options.workload.inflight = Below(2) != 0;
    options.workload.pages = 16;
    options.workload.report = 0;
    options.backend = {device_, "--exit-on-eof", "--synchronous", "--seed",
                       std::to_string(guest_seed_ & 0xffff)};
    const uint64_t latency = Below(3) * 100;
    if (latency != 0)
      options.backend.insert(options.backend.end(), {"--latency-max-us", std::to_string(latency)});
    if (Below(3) == 0) options.backend.insert(options.backend.end(), {"--shuffle", "4"});
    options.backend.insert(options.backend.end(), {"--control", "{dir}/control{n}.sock", "--journal",
                                                   "{dir}/journal", "--journal-tag-offset", "8"});
    options.backend_says_ready = true;
    features_ = fmt::format("{} {} x {} writers {}{}{}{} latency {}",
                            options.workload.packed ? "packed" : "split", options.queues, options.queue_size,
                            options.workload.writers, options.workload.indirect ? " indirect" : "",
                            options.workload.event_idx ? " event_idx" : "",
                            options.workload.in_order ? " in_order" : "", latency);
    harness_ = std::make_unique<Harness>(options);
    absl::Status status = harness_->Start();
    return status.ok() ? status : Explain(status);
  }

  // The guest's own judgement is one witness; what the devices did to the disk, in their own record, is
  // another.
  absl::Status EndGuest() {
    if (!harness_) return absl::OkStatus();
    absl::Status status = harness_->Verify();
    if (!status.ok()) return Explain(status);
    auto figures = harness_->guest().Figures(Deadline::After(seconds(5)));
    if (figures.ok()) writes_ += figures->writes;
    auto records = ReadJournal(harness_->dir() + "/journal");
    if (!records.ok()) return Explain(records.status());
    auto verdict = CheckJournal(*records, {.tags_grow = true});
    if (!verdict.ok()) return Explain(Annotate(verdict.status(), "the devices' record"));
    replayed_ += verdict->replayed;
    harness_.reset();
    return absl::OkStatus();
  }

  // A moment in the life of what is in flight.
  absl::Status Moment() { return harness_->AwaitWrites(Below(12)); }

  absl::Status OneRun() {
    struct Incident {
      const char* name;
      absl::Status (Soak::*run)();
    };
    static constexpr Incident kIncidents[] = {
        {"back-end killed", &Soak::KillBackend}, {"back-end crashed", &Soak::CrashBackend},
        {"shim lost", &Soak::LoseMediator},      {"both lost", &Soak::LoseBoth},
        {"guest stopped", &Soak::StopGuest},     {"moved", &Soak::Move},
        {"back-end swapped", &Soak::Swap},       {"back-end crashed", &Soak::CrashBackend},
    };
    const Incident& incident = kIncidents[Below(std::size(kIncidents))];
    history_.emplace_back(incident.name);
    ++counts_[incident.name];
    RETURN_IF_ERROR(Moment());
    RETURN_IF_ERROR(Annotate((this->*incident.run)(), incident.name));
    RETURN_IF_ERROR(harness_->AwaitWrites(1 + Below(10)));
    return harness_->Verify();
  }

  absl::Status KillBackend() {
    harness_->backend().Kill();
    return harness_->StartBackend();
  }

  absl::Status CrashBackend() {
    const std::string point = kCrashPoints[Below(std::size(kCrashPoints))];
    history_.back() += " at " + point;
    auto set = CallLabDevice(harness_->control(),
                             {{"cmd", "set"}, {"crash_at", point}, {"crash_after", 1 + Below(20)}},
                             Deadline::After(seconds(5)));
    if (!set.ok() && !absl::IsUnavailable(set.status())) return set.status();
    // Some points are passed only by some rings; such a life ends like any other.
    if (!harness_->backend().AwaitEnd(Deadline::After(milliseconds(100)))) harness_->backend().Kill();
    return harness_->StartBackend();
  }

  absl::Status LoseMediator() {
    harness_->DropMediator();
    return harness_->StartMediator(/*returns=*/true);
  }

  absl::Status LoseBoth() {
    const bool first = Below(2) != 0;
    if (first) harness_->DropMediator();
    harness_->backend().Kill();
    harness_->DropMediator();
    const bool early = Below(2) != 0;
    if (early) RETURN_IF_ERROR(harness_->StartMediator(/*returns=*/true));
    RETURN_IF_ERROR(harness_->StartBackend());
    return early ? absl::OkStatus() : harness_->StartMediator(/*returns=*/true);
  }

  absl::Status StopGuest() {
    RETURN_IF_ERROR(harness_->guest().Pause(Deadline::After(seconds(20))));
    return harness_->guest().Run(Deadline::After(seconds(20)));
  }

  absl::Status Swap() { return harness_->Swap(Below(2) != 0 ? v1::HANDOFF : v1::DRAIN); }

  absl::Status Move() { return harness_->Move(/*handoff=*/Below(2) != 0); }

  const std::string device_;
  std::mt19937_64 random_;
  const uint64_t runs_;
  uint64_t next_seed_ = 0, guest_seed_ = 0, done_ = 0, writes_ = 0, replayed_ = 0;
  int left_ = 0;
  std::string features_;
  std::vector<std::string> history_;
  std::map<std::string, uint64_t> counts_;
  std::unique_ptr<Harness> harness_;
};

}  // namespace
}  // namespace baton::lab

int main(int argc, char** argv) {
  ::signal(SIGPIPE, SIG_IGN);
  uint64_t runs = 200, seed = std::random_device{}();
  std::string device, level = "error";
  CLI::App app("Random crashes of back-end and shim under a lab guest; see tests/soak/devices.cc");
  // ./dev gives one, which the caller may replace.
  app.add_option("--runs", runs, "incidents")->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  app.add_option("--seed", seed, "of everything that is random; printed");
  app.add_option("--device", device, "path of baton-lab-device")->required();
  app.add_option("--log-level", level);
  CLI11_PARSE(app, argc, argv);
  baton::InitLogging({.program = "baton-soak", .level = level, .json = false, .context = {}});
  std::printf("--seed %llu --runs %llu\n", static_cast<unsigned long long>(seed),
              static_cast<unsigned long long>(runs));
  std::fflush(stdout);
  baton::lab::Soak soak(device, seed, runs);
  absl::Status status = soak.Run();
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", baton::Message(status).c_str());
    return 1;
  }
  soak.Print();
  return 0;
}
