#include "tests/lab/vm/guest.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <future>

#include "common/log.h"

namespace baton::lab {

// What the guest keeps of itself in its own memory.
struct LabGuest::Shared {
  uint64_t magic, run;
  uint64_t answers;  // on the console
  uint64_t errors;   // of no device in particular
  uint64_t stops;
  int64_t longest_stop_us, longest_gap_us;
  int64_t last_beat_us;  // 0: none since the last reset
  uint64_t reported;     // writes of the last progress line
  uint64_t verifying;    // kVerify, kSayResult
};

namespace {

using nlohmann::json;

constexpr uint64_t kGuestMagic = 0x31304d56424c4e42;
constexpr char kStreamMagic[8] = {'B', 'A', 'T', 'O', 'N', 'L', 'G', '1'};
constexpr uint32_t kStreamVersion = 1;
// A state larger than this is none.
constexpr uint32_t kMaxState = 64 << 20;
// Bound of starting and stopping a device by itself.
constexpr Duration kDeviceTime = std::chrono::seconds(60);
constexpr uint64_t kVerify = 1, kSayResult = 2;
constexpr int64_t kLostCheckUs = 100'000;
constexpr size_t kKeptErrors = 4000;

struct StreamHeader {
  char magic[8];
  uint32_t version;
  uint32_t size;      // of the JSON
  uint64_t checksum;  // XXH3 of the JSON
};
static_assert(sizeof(StreamHeader) == 24);

int64_t NowUs() { return MonotonicNs() / 1000; }

}  // namespace

absl::StatusOr<std::unique_ptr<LabGuest>> LabGuest::Create(GuestConfig config, GuestCallbacks callbacks,
                                                           Deadline deadline) {
  ASSIGN_OR_RETURN(Ram ram, Ram::Open(config.memory_path, config.memory_bytes));
  std::unique_ptr<LabGuest> guest(new LabGuest(std::move(config), std::move(callbacks), std::move(ram)));
  RETURN_IF_ERROR(guest->Build(deadline));
  guest->thread_ = std::thread([raw = guest.get()] { raw->Loop(); });
  return guest;
}

LabGuest::LabGuest(GuestConfig config, GuestCallbacks callbacks, Ram ram)
    : config_(std::move(config)),
      callbacks_(std::move(callbacks)),
      ram_(std::move(ram)),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

LabGuest::~LabGuest() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard lock(mutex_);
    exit_ = true;
  }
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof one);
  thread_.join();
}

absl::Status LabGuest::Build(Deadline deadline) {
  if (!wake_) return ErrnoError(errno, "eventfd");
  RamLayout layout(ram_.size());
  ASSIGN_OR_RETURN(shared_gpa_, layout.Take(sizeof(Shared), "the guest's own state"));
  uint32_t disks = 0, nics = 0;
  for (const DeviceOptions& options : config_.devices) {
    DeviceCallbacks callbacks{[this](const std::string& what) { Report(what); },
                              [this](int64_t now) { Beat(now); }};
    if (options.class_ == v1::NET) {
      ASSIGN_OR_RETURN(auto nic,
                       GuestNic::Create(options, config_.options, ram_, nics++, std::move(callbacks)));
      devices_.push_back(std::move(nic));
    } else if (options.class_ == v1::BALLOON) {
      auto balloon = std::make_unique<GuestBalloon>(options, config_.options, ram_, std::move(callbacks));
      balloon_ = balloon.get();
      devices_.push_back(std::move(balloon));
    } else {
      devices_.push_back(
          std::make_unique<GuestDisk>(options, config_.options, ram_, disks++, std::move(callbacks)));
    }
    RETURN_IF_ERROR(devices_.back()->Realize(layout, deadline));
  }
  ASSIGN_OR_RETURN(uint64_t memory_gpa,
                   layout.Take(MemoryWorkload::Bytes(config_.options), "the memory workload"));
  memory_ = std::make_unique<MemoryWorkload>(ram_, memory_gpa, config_.options,
                                             [this](const std::string& what) { Report(what); });
  if (balloon_ != nullptr)
    balloon_->SetFreed(memory_->freed_gpa(), [this] { return memory_->freed_bytes(); });
  return absl::OkStatus();
}

LabGuest::Shared& LabGuest::shared() const { return *ram_.At<Shared>(shared_gpa_); }

// --- the thread ---

void LabGuest::Loop() {
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      if (exit_) return;
    }
    const int64_t now = Poll();
    RunPosted();
    if (running_) Advance(now);
  }
}

// Waits for the next event and handles those of connections and, while the guest runs, of rings.
int64_t LabGuest::Poll() {
  std::vector<pollfd> items{{wake_.get(), POLLIN, 0}};
  struct Source {
    GuestDevice* device;
    int ring;  // -1: the connection
  };
  std::vector<Source> sources{{nullptr, 0}};
  int64_t now = NowUs(), due = INT64_MAX;
  for (const auto& device : devices_) {
    due = std::min(due, device->Maintain(now, running_));
    for (int fd : {device->frontend().fd(), device->frontend().channel_fd()}) {
      if (fd < 0) continue;
      items.push_back({fd, POLLIN, 0});
      sources.push_back({device.get(), -1});
    }
    if (!running_) continue;
    due = std::min(due, device->NextDue());
    for (uint32_t i = 0; i < device->rings(); ++i) {
      items.push_back({device->frontend().call_fd(i), POLLIN, 0});
      sources.push_back({device.get(), static_cast<int>(i)});
    }
  }
  if (running_) due = std::min({due, memory_->NextDue(), lost_check_us_ + kLostCheckUs});
  now = NowUs();
  timespec timeout{};
  if (due > now) {
    timeout.tv_sec = (due - now) / 1000000;
    timeout.tv_nsec = (due - now) % 1000000 * 1000;
  }
  if (::ppoll(items.data(), items.size(), due == INT64_MAX ? nullptr : &timeout, nullptr) <= 0)
    return NowUs();
  now = NowUs();
  if (items[0].revents != 0) {
    uint64_t count;
    (void)!::read(wake_.get(), &count, sizeof count);
  }
  for (size_t i = 1; i < items.size(); ++i) {
    if (items[i].revents == 0) continue;
    if (sources[i].ring < 0) {
      if (sources[i].device->frontend().connected()) sources[i].device->Attend(now);
    } else {
      sources[i].device->Interrupt(static_cast<uint32_t>(sources[i].ring), now);
    }
  }
  return now;
}

void LabGuest::Advance(int64_t now_us) {
  for (char letter : std::exchange(typed_, {})) Obey(letter);
  memory_->Issue(now_us);
  uint64_t writes = 0;
  for (const auto& device : devices_) {
    device->Issue(now_us);
    if (auto* disk = dynamic_cast<GuestDisk*>(device.get())) writes += disk->workload().counters().writes;
  }
  if (now_us - lost_check_us_ >= kLostCheckUs) {
    lost_check_us_ = now_us;
    const int64_t limit = std::chrono::duration_cast<std::chrono::microseconds>(config_.lost_after).count();
    for (const auto& device : devices_) device->FindLost(now_us, limit);
  }
  if (config_.options.report != 0 &&
      writes / config_.options.report != shared().reported / config_.options.report) {
    shared().reported = writes;
    Say(fmt::format("PROGRESS writes={} errors={}", writes, FiguresNow().errors));
  }
  if (writes >= wanted_writes_) {
    std::lock_guard lock(mutex_);
    writes_ = writes;
    wanted_writes_ = UINT64_MAX;
    changed_.notify_all();
  }
  if (shared().verifying != 0 &&
      std::all_of(devices_.begin(), devices_.end(), [](const auto& device) { return device->Verified(); })) {
    FinishVerify();
  }
}

void LabGuest::RunPosted() {
  for (;;) {
    std::function<void()> work;
    {
      std::lock_guard lock(mutex_);
      if (posted_.empty()) return;
      work = std::move(posted_.front());
      posted_.pop_front();
    }
    work();
  }
}

void LabGuest::Post(std::function<void()> work) {
  {
    std::lock_guard lock(mutex_);
    posted_.push_back(std::move(work));
  }
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof one);
}

absl::Status LabGuest::Do(std::function<absl::Status()> work, Deadline deadline) {
  auto done = std::make_shared<std::promise<absl::Status>>();
  auto future = done->get_future();
  Post([work = std::move(work), done] { done->set_value(work()); });
  if (future.wait_until(deadline.when()) != std::future_status::ready)
    return absl::DeadlineExceededError("the lab guest does not answer in time");
  return future.get();
}

// --- what the VMM does ---

absl::Status LabGuest::Boot() {
  shared() = {};
  shared().magic = kGuestMagic;
  uint64_t run = 0;
  if (::getrandom(&run, sizeof run, 0) != sizeof run) run = static_cast<uint64_t>(MonotonicNs());
  shared().run = run;
  for (const auto& device : devices_) RETURN_IF_ERROR(device->Boot(run));
  memory_->Boot();
  here_ = true;
  return absl::OkStatus();
}

absl::Status LabGuest::RunNow(Deadline deadline) {
  if (running_) return absl::OkStatus();
  const bool boots = !here_;
  if (boots && config_.incoming) return absl::FailedPreconditionError("the guest has not arrived yet");
  if (boots) RETURN_IF_ERROR(Boot());
  for (const auto& device : devices_) device->Start(deadline);
  const int64_t now = NowUs();
  if (const int64_t paused = paused_at_ns_ / 1000; paused != 0) {
    ++shared().stops;
    shared().longest_stop_us = std::max(shared().longest_stop_us, now - paused);
  }
  running_ = true;
  lost_check_us_ = now;
  memory_->Resumed(now);
  for (const auto& device : devices_) {
    device->Resumed(now);
    device->TakePending(now);
  }
  if (boots) Say("READY clock=host disk=lab");
  return absl::OkStatus();
}

absl::Status LabGuest::PauseNow(Deadline deadline) {
  if (!running_) return absl::OkStatus();
  running_ = false;
  paused_at_ns_ = MonotonicNs();
  for (const auto& device : devices_) device->Stop(deadline);
  return absl::OkStatus();
}

absl::Status LabGuest::Run(Deadline deadline) {
  return Do([this, deadline] { return RunNow(deadline.Min(Deadline::After(kDeviceTime))); }, deadline);
}

absl::Status LabGuest::Pause(Deadline deadline) {
  return Do([this, deadline] { return PauseNow(deadline.Min(Deadline::After(kDeviceTime))); }, deadline);
}

uint64_t LabGuest::Digest() const {
  uint64_t digest = XXH3_64bits(&shared(), sizeof(Shared)) ^ memory_->Digest();
  for (const auto& device : devices_) digest = digest * 0x9e3779b97f4a7c15 + device->Digest();
  return digest;
}

absl::StatusOr<std::string> LabGuest::SaveNow() {
  if (running_) return absl::FailedPreconditionError("a guest that runs has no state to give");
  json state{{"name", config_.name},
             {"memory", config_.memory_bytes},
             {"booted", here_},
             {"paused_at_ns", paused_at_ns_.load()}};
  json& devices = state["devices"] = json::array();
  for (const auto& device : devices_) devices.push_back(device->Save());
  if (here_) state["digest"] = Digest();
  const std::string body = state.dump();
  StreamHeader header{
      {}, kStreamVersion, static_cast<uint32_t>(body.size()), XXH3_64bits(body.data(), body.size())};
  std::memcpy(header.magic, kStreamMagic, sizeof header.magic);
  return std::string(reinterpret_cast<const char*>(&header), sizeof header) + body;
}

absl::StatusOr<std::string> LabGuest::Save(Deadline deadline) {
  auto state = std::make_shared<std::string>();
  absl::Status done = Do(
      [this, state]() -> absl::Status {
        ASSIGN_OR_RETURN(*state, SaveNow());
        return absl::OkStatus();
      },
      deadline);
  if (!done.ok()) return done;
  return *state;
}

bool LabGuest::Complete(const std::string& bytes) {
  StreamHeader header;
  if (bytes.size() < sizeof header) return false;
  std::memcpy(&header, bytes.data(), sizeof header);
  if (std::memcmp(header.magic, kStreamMagic, sizeof header.magic) != 0 || header.size > kMaxState)
    return true;
  return bytes.size() >= sizeof header + header.size;
}

absl::Status LabGuest::LoadNow(const std::string& bytes) {
  if (running_ || here_) return absl::FailedPreconditionError("the guest is here already");
  StreamHeader header{};
  if (bytes.size() < sizeof header) return absl::DataLossError("the state ends within its header");
  std::memcpy(&header, bytes.data(), sizeof header);
  if (std::memcmp(header.magic, kStreamMagic, sizeof header.magic) != 0)
    return absl::DataLossError("not the state of a lab guest");
  if (header.version != kStreamVersion)
    return Error(absl::StatusCode::kFailedPrecondition, "the state has version {}, not {}", header.version,
                 kStreamVersion);
  const std::string body = bytes.substr(sizeof header);
  if (body.size() != header.size || XXH3_64bits(body.data(), body.size()) != header.checksum)
    return absl::DataLossError("the state is damaged or cut off");
  json state = json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (state.is_discarded()) return absl::DataLossError("the state is not JSON");
  // What is missing or of another type is an exception of the JSON library.
  try {
    if (state.at("memory") != config_.memory_bytes || state.at("devices").size() != devices_.size())
      return absl::FailedPreconditionError("the state is of another machine");
    const bool booted = state.at("booted").get<bool>();
    for (size_t i = 0; i < devices_.size() && booted; ++i) {
      RETURN_IF_ERROR(devices_[i]->Load(state.at("devices").at(i)));
    }
    paused_at_ns_ = state.at("paused_at_ns").get<int64_t>();
    if (booted && (shared().magic != kGuestMagic || Digest() != state.at("digest").get<uint64_t>()))
      return absl::DataLossError("guest memory differs from what the source had when it stopped");
    here_ = booted;
  } catch (const json::exception& error) {
    return Error(absl::StatusCode::kDataLoss, "the state is malformed: {}", error.what());
  }
  return absl::OkStatus();
}

absl::Status LabGuest::Load(const std::string& state, Deadline deadline) {
  return Do([this, state] { return LoadNow(state); }, deadline);
}

// --- what the guest says ---

void LabGuest::Say(const std::string& line) {
  if (callbacks_.say) callbacks_.say(line);
}

void LabGuest::Report(const std::string& what) {
  Say("ERROR " + what);
  std::lock_guard lock(mutex_);
  if (errors_text_.size() < kKeptErrors) errors_text_ += what + "\n";
}

std::string LabGuest::errors_text() const {
  std::lock_guard lock(mutex_);
  return errors_text_;
}

void LabGuest::Beat(int64_t now_us) {
  Shared& s = shared();
  if (s.last_beat_us != 0) s.longest_gap_us = std::max(s.longest_gap_us, now_us - s.last_beat_us);
  s.last_beat_us = now_us;
}

GuestFigures LabGuest::FiguresNow() const {
  GuestFigures figures;
  if (!here_) return figures;
  const Shared& s = shared();
  for (const auto& device : devices_) {
    figures.outstanding += device->outstanding();
    if (const auto* disk = dynamic_cast<const GuestDisk*>(device.get())) {
      const auto& counters = disk->workload().counters();
      figures.writes += counters.writes;
      figures.reads += counters.reads;
      figures.errors += counters.errors;
    } else if (const auto* nic = dynamic_cast<const GuestNic*>(device.get())) {
      const auto& counters = nic->workload().counters();
      figures.packets_sent += counters.sent;
      figures.packets_received += counters.received;
      figures.packets_missing += counters.missing;
      figures.packet_duplicates += counters.duplicates;
      figures.errors += counters.errors;
    }
  }
  figures.errors += s.errors;
  figures.memory_writes = memory_->writes();
  figures.memory_errors = memory_->errors();
  figures.stops = s.stops;
  figures.longest_stop = std::chrono::microseconds(s.longest_stop_us);
  figures.longest_gap = std::chrono::microseconds(s.longest_gap_us);
  return figures;
}

absl::StatusOr<GuestFigures> LabGuest::Figures(Deadline deadline) {
  auto figures = std::make_shared<GuestFigures>();
  RETURN_IF_ERROR(Do(
      [this, figures] {
        *figures = FiguresNow();
        return absl::OkStatus();
      },
      deadline));
  return *figures;
}

std::string LabGuest::StatusLine(const char* word) {
  const GuestFigures f = FiguresNow();
  std::string writers;
  uint64_t region = 0;
  // One disk for the check from outside: the first.
  for (const auto& device : devices_) {
    const auto* disk = dynamic_cast<const GuestDisk*>(device.get());
    if (!disk) continue;
    region = disk->workload().region_blocks();
    for (uint32_t i = 0; i < disk->workload().writers(); ++i)
      writers += (i ? "," : "") + std::to_string(disk->workload().sequence(i));
    break;
  }
  return fmt::format(
      "{} n={} writes={} reads={} errors={} stops={} stop_us={} gap_us={} cpu_gap_us={} memory_writes={} "
      "memory_errors={} outstanding={} packets_sent={} packets_received={} packets_missing={} "
      "packet_duplicates={} "
      "clock=host run={:016x} region_blocks={} writers={}",
      word, ++shared().answers, f.writes, f.reads, f.errors, f.stops, shared().longest_stop_us,
      shared().longest_gap_us, shared().longest_stop_us, f.memory_writes, f.memory_errors, f.outstanding,
      f.packets_sent, f.packets_received, f.packets_missing, f.packet_duplicates, shared().run, region,
      writers);
}

void LabGuest::BeginVerify(bool say_result) {
  {
    std::lock_guard lock(mutex_);
    verified_ = false;
  }
  shared().verifying = kVerify | (say_result ? kSayResult : 0);
  for (const auto& device : devices_) device->BeginVerify();
}

void LabGuest::FinishVerify() {
  memory_->Verify();
  if ((std::exchange(shared().verifying, 0) & kSayResult) != 0) Say(StatusLine("RESULT"));
  std::lock_guard lock(mutex_);
  verified_ = true;
  changed_.notify_all();
}

absl::StatusOr<GuestFigures> LabGuest::Verify(Deadline deadline) {
  RETURN_IF_ERROR(Do(
      [this] {
        BeginVerify(/*say_result=*/false);
        return absl::OkStatus();
      },
      deadline));
  {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_until(lock, deadline.when(), [&] { return verified_; })) {
      return Error(absl::StatusCode::kDeadlineExceeded, "the guest could not finish its requests: {}",
                   errors_text_.empty() ? "no error was seen" : errors_text_);
    }
  }
  return Figures(deadline);
}

absl::Status LabGuest::GoOn(Deadline deadline) {
  return Do(
      [this] {
        shared().verifying = 0;
        shared().last_beat_us = 0;
        for (const auto& device : devices_) device->GoOn();
        return absl::OkStatus();
      },
      deadline);
}

absl::Status LabGuest::AwaitWrites(uint64_t more, Deadline deadline) {
  ASSIGN_OR_RETURN(GuestFigures now, Figures(deadline));
  wanted_writes_ = now.writes + more;
  std::unique_lock lock(mutex_);
  if (changed_.wait_until(lock, deadline.when(), [&] { return writes_ >= now.writes + more; }))
    return absl::OkStatus();
  return Error(absl::StatusCode::kDeadlineExceeded, "the guest did not write {} more blocks: {}", more,
               errors_text_);
}

absl::StatusOr<std::string> LabGuest::ResultLine(Deadline deadline) {
  auto line = std::make_shared<std::string>();
  RETURN_IF_ERROR(Do(
      [this, line] {
        *line = StatusLine("RESULT");
        return absl::OkStatus();
      },
      deadline));
  return *line;
}

// A guest that stands still hears it when it runs again.
void LabGuest::Type(char letter) {
  Post([this, letter] { typed_ += letter; });
}

void LabGuest::Obey(char letter) {
  switch (letter) {
    case 's':
      return Say(StatusLine("STATUS"));
    case 'r':
      shared().stops = 0;
      shared().longest_stop_us = shared().longest_gap_us = shared().last_beat_us = 0;
      return Say(fmt::format("RESET n={}", ++shared().answers));
    case 'q':
      return BeginVerify(/*say_result=*/true);
    case 'g':
      shared().last_beat_us = 0;
      shared().verifying = 0;
      for (const auto& device : devices_) device->GoOn();
      return Say(fmt::format("GO n={}", ++shared().answers));
    case 'x':
      Say("POWEROFF");
      if (callbacks_.on_power_off) callbacks_.on_power_off();
      return;
    default:
      return;
  }
}

void LabGuest::PowerDown() { Type('x'); }

}  // namespace baton::lab
