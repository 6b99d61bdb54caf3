#include "tests/lab/device/journal.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <map>
#include <tuple>
#include <unordered_map>

#include "common/clock.h"

namespace baton::lab {
namespace {

constexpr uint64_t kJournalSector = 512;

std::string Words(const JournalRecord& r) {
  return fmt::format("device {} {} queue {} counter {} offset {} length {} tag {}", r.device,
                     static_cast<char>(r.event), r.queue, r.counter, r.offset, r.length, r.tag);
}

}  // namespace

absl::StatusOr<Journal> Journal::Open(const std::string& path) {
  Journal out;
  out.fd_.reset(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
  if (!out.fd_) return ErrnoError(errno, path);
  return out;
}

uint64_t Journal::NewRun() {
  static std::atomic<uint64_t> runs{0};
  // Process ids do not come back within a test.
  return static_cast<uint64_t>(::getpid()) << 32 | ++runs;
}

void Journal::Record(uint64_t device, JournalEvent event, uint32_t queue, uint64_t counter, uint64_t offset,
                     uint64_t length, uint64_t tag) {
  char line[160];
  const int size = std::snprintf(line, sizeof line,
                                 "\n%" PRIu64 " %c %u %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " .",
                                 device, static_cast<char>(event), queue, counter, offset, length, tag);
  // A journal that cannot be written is found when it is checked: records are missing.
  if (::write(fd_.get(), line, static_cast<size_t>(size)) != size) fd_.reset();
}

absl::StatusOr<std::vector<JournalRecord>> ReadJournal(const std::string& path) {
  std::ifstream in(path);
  if (!in) return Error(absl::StatusCode::kNotFound, "no journal at {}", path);
  std::vector<JournalRecord> out;
  std::string line;
  while (std::getline(in, line)) {
    // A write(2) that goes over the end of a page may be cut there when the process is killed
    // (generic_perform_write() looks for fatal signals between pages): as if it had been killed before it.
    if (!line.ends_with('.')) continue;
    JournalRecord r;
    char event = 0;
    if (std::sscanf(line.c_str(), "%" SCNu64 " %c %u %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64, &r.device,
                    &event, &r.queue, &r.counter, &r.offset, &r.length, &r.tag) != 7) {
      return Error(absl::StatusCode::kDataLoss, "{}: line {}: {}", path, out.size() + 1, line);
    }
    r.event = static_cast<JournalEvent>(event);
    out.push_back(r);
  }
  return out;
}

absl::StatusOr<JournalVerdict> CheckJournal(const std::vector<JournalRecord>& records, JournalRules rules) {
  JournalVerdict verdict;
  struct Sector {
    uint64_t begun = 0, done = 0, published = 0;  // highest tags
  };
  std::unordered_map<uint64_t, Sector> sectors;
  enum class State { kReplayed, kBegun, kDone, kPublished, kCancelled };
  // Requests of each device; a counter is used again once its request was published.
  std::map<std::tuple<uint64_t, uint32_t, uint64_t>, State> requests;
  for (const JournalRecord& r : records) {
    auto broken = [&](const std::string& what) {
      return Error(absl::StatusCode::kDataLoss, "{}: {}", Words(r), what);
    };
    const auto key = std::tuple(r.device, r.queue, r.counter);
    auto it = requests.find(key);
    if (it != requests.end() && it->second == State::kCancelled) return broken("after its cancellation");
    switch (r.event) {
      case JournalEvent::kReplay:
        ++verdict.replayed;
        requests[key] = State::kReplayed;
        break;
      case JournalEvent::kBegin:
        ++verdict.writes;
        if (it != requests.end() && (it->second == State::kDone || it->second == State::kPublished)) {
          return broken("begun again after it was done");
        }
        requests[key] = State::kBegun;
        break;
      case JournalEvent::kDone:
        if (it == requests.end() || it->second != State::kBegun) return broken("done without a begin");
        it->second = State::kDone;
        break;
      case JournalEvent::kPublish:
        if (it == requests.end() || it->second != State::kDone) return broken("published and not done");
        ++verdict.published;
        it->second = State::kPublished;
        break;
      case JournalEvent::kCancel:
        ++verdict.cancelled;
        requests[key] = State::kCancelled;
        continue;
    }
    if (!rules.tags_grow || r.tag == 0) continue;
    for (uint64_t at = r.offset / kJournalSector;
         at < (r.offset + r.length + kJournalSector - 1) / kJournalSector; ++at) {
      Sector& s = sectors[at];
      if (r.event == JournalEvent::kBegin) {
        if (r.tag <= s.published) {
          return broken(
              fmt::format("sector {}: the guest had been told that {} is complete", at, s.published));
        }
        if (r.tag < s.begun) return broken(fmt::format("sector {}: {} had begun before", at, s.begun));
        s.begun = r.tag;
      } else if (r.event == JournalEvent::kDone) {
        if (r.tag < s.done) return broken(fmt::format("sector {}: {} was done before", at, s.done));
        s.done = r.tag;
      } else if (r.event == JournalEvent::kPublish) {
        s.published = std::max(s.published, r.tag);
      }
    }
  }
  return verdict;
}

}  // namespace baton::lab
