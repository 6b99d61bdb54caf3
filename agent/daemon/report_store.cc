#include "agent/daemon/report_store.h"

#include <google/protobuf/util/message_differencer.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "common/durable_file.h"
#include "common/log.h"

namespace baton::daemon {
namespace {
namespace fs = std::filesystem;

// Migration ids come from other programs: only those that are plain file names are written.
bool SafeReportName(const std::string& id) {
  return !id.empty() && id.size() <= 64 && id[0] != '.' && id.find('/') == std::string::npos &&
         id.find('\0') == std::string::npos;
}
}  // namespace

std::string ReportStore::FileOf(const Key& key) const {
  return directory_ + "/" + key.first + (key.second == v1::ROLE_SOURCE ? ".source" : ".destination");
}

absl::Status ReportStore::Load() {
  RETURN_IF_ERROR(MakeDirectories(directory_));
  std::lock_guard lock(mutex_);
  std::error_code error;
  std::vector<fs::path> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(directory_, error))
    files.push_back(entry.path());
  if (error) return ErrnoError(error.value(), directory_);
  for (const fs::path& file : files) {
    if (file.extension() != ".source" && file.extension() != ".destination") continue;
    v1::SideReport report;
    if (absl::Status status = ReadMessage(file.string(), &report); !status.ok()) {
      LOG_ERROR("report set aside: {}", Message(status));
      fs::rename(file, file.string() + ".damaged", error);
      continue;
    }
    reports_[{report.migration_id(), report.role()}] = report;
  }
  return absl::OkStatus();
}

std::optional<v1::SideReport> ReportStore::Update(v1::SideReport report) {
  const Key key{report.migration_id(), report.role()};
  auto fresh = Take(std::move(report));
  Keep(key.first, key.second);
  return fresh;
}

std::optional<v1::SideReport> ReportStore::Take(v1::SideReport report) {
  std::lock_guard lock(mutex_);
  Key key{report.migration_id(), report.role()};
  auto found = reports_.find(key);
  bool persist = true;
  if (found != reports_.end()) {
    const v1::SideReport& old = found->second;
    uint64_t offered = report.sequence();
    report.set_sequence(old.sequence());
    if (old.done() || google::protobuf::util::MessageDifferencer::Equals(old, report)) return std::nullopt;
    persist = report.done() || report.phase() != old.phase() || report.handover() != old.handover();
    report.set_sequence(std::max(old.sequence() + 1, offered));
  } else if (report.sequence() == 0) {
    report.set_sequence(1);
  }
  reports_[key] = report;
  if (persist && SafeReportName(report.migration_id())) unwritten_.insert(key);
  return report;
}

void ReportStore::Keep(const std::string& migration_id, v1::Role role) {
  std::lock_guard lock(mutex_);
  const Key key{migration_id, role};
  // One that was acknowledged meanwhile is gone.
  auto found = reports_.find(key);
  if (unwritten_.erase(key) == 0 || found == reports_.end()) return;
  absl::Status written = WriteMessageDurable(FileOf(key), found->second);
  if (!written.ok()) LOG_ERROR("report cannot be kept: {}", Message(written));
}

bool ReportStore::Acknowledge(const std::string& migration_id, v1::Role role, uint64_t sequence) {
  std::lock_guard lock(mutex_);
  auto found = reports_.find({migration_id, role});
  if (found == reports_.end() || !found->second.done() || found->second.sequence() > sequence) return false;
  if (SafeReportName(migration_id)) {
    absl::Status removed = RemoveFileDurable(FileOf(found->first));
    if (!removed.ok()) LOG_WARN("report stays: {}", Message(removed));
  }
  reports_.erase(found);
  return true;
}

std::optional<v1::SideReport> ReportStore::Find(const std::string& migration_id, v1::Role role) const {
  std::lock_guard lock(mutex_);
  auto found = reports_.find({migration_id, role});
  if (found == reports_.end()) return std::nullopt;
  return found->second;
}

std::vector<v1::SideReport> ReportStore::All() const {
  std::lock_guard lock(mutex_);
  std::vector<v1::SideReport> out;
  for (const auto& [key, report] : reports_) out.push_back(report);
  return out;
}

std::vector<v1::SideReport> ReportStore::OpenOf(const std::string& vm) const {
  std::lock_guard lock(mutex_);
  std::vector<v1::SideReport> out;
  for (const auto& [key, report] : reports_) {
    if (report.vm() == vm && !report.done()) out.push_back(report);
  }
  return out;
}

}  // namespace baton::daemon
