// The newest report of each side of each migration on this host, on disk until batond has recorded the final
// one.
#pragma once

#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "baton/v1/types.pb.h"
#include "common/status.h"

namespace baton::daemon {

// Thread-safe. A report is to be written durably when it is final or when phase or handover changed; figures
// in between are kept in memory only.
class ReportStore {
 public:
  explicit ReportStore(std::string directory) : directory_(std::move(directory)) {}
  // Reads what an agent before this one kept. Files that do not parse are set aside with a log line.
  absl::Status Load();

  // Takes over a report and gives it a sequence number above all that were given for this side of this
  // migration: a shim that replaced another starts over, batond must not see that. Nothing replaces a final
  // report: then, and for an identical repetition of what is stored, nullopt. A failing disk is logged, and
  // the report kept in memory: it can still reach batond.
  std::optional<v1::SideReport> Update(v1::SideReport report);
  // The same without the disk, for whoever tells first and keeps then: what batond hears before that is what
  // a shim has said from its journal, and will say again to the next agent. Keep() must follow.
  std::optional<v1::SideReport> Take(v1::SideReport report);
  // Writes the newest report of a side, if Take() has left something to be written.
  void Keep(const std::string& migration_id, v1::Role role);
  // Forgets a final report up to that sequence number; true if it did.
  bool Acknowledge(const std::string& migration_id, v1::Role role, uint64_t sequence);

  std::optional<v1::SideReport> Find(const std::string& migration_id, v1::Role role) const;
  std::vector<v1::SideReport> All() const;
  // Reports of a VM that are not final.
  std::vector<v1::SideReport> OpenOf(const std::string& vm) const;

 private:
  using Key = std::pair<std::string, v1::Role>;
  std::string FileOf(const Key& key) const;
  const std::string directory_;
  mutable std::mutex mutex_;
  std::map<Key, v1::SideReport> reports_;  // guarded by mutex_
  std::set<Key> unwritten_;                // guarded by mutex_
};

}  // namespace baton::daemon
