#include "agent/daemon/vm_store.h"

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <filesystem>

#include "agent/migration/journal.h"
#include "common/durable_file.h"
#include "common/log.h"
#include "common/vm_spec.h"

namespace baton::daemon {
namespace {

namespace fs = std::filesystem;

// Verdicts of ended incoming migrations that are kept; the oldest go first. A source asks within seconds, or
// after its host was down for a while.
constexpr size_t kKeepEnded = 1000;

// Migration ids come from other programs and become file names.
bool SafeFileName(const std::string& id) {
  if (id.empty() || id.size() > 64 || id[0] == '.') return false;
  return std::all_of(id.begin(), id.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.';
  });
}

std::string EndedDir(const AgentConfig& config) { return config.state_dir + "/ended"; }

}  // namespace

absl::StatusOr<std::vector<std::string>> VmStore::List() const {
  std::vector<std::string> names;
  std::error_code error;
  fs::directory_iterator entries(config_.state_dir + "/vms", error);
  if (error == std::errc::no_such_file_or_directory) return names;
  if (error) return ErrnoError(error.value(), config_.state_dir + "/vms");
  for (const fs::directory_entry& entry : entries) {
    std::string name = entry.path().filename().string();
    if (!IsValidName(name)) continue;
    if (fs::exists(entry.path() / "shim.conf", error)) {
      names.push_back(name);
    } else if (absl::Status removed = Remove(name); !removed.ok()) {
      LOG_WARN("leftovers of a VM that was never started stay: vm={} error=\"{}\"", name, Message(removed));
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

absl::StatusOr<v1::ShimConfig> VmStore::Read(const std::string& vm) const {
  v1::ShimConfig config;
  RETURN_IF_ERROR(ReadMessage(PathsOf(config_, vm).conf, &config));
  if (config.spec().name() != vm)
    return Error(absl::StatusCode::kDataLoss, "{}: describes VM '{}'", PathsOf(config_, vm).conf,
                 config.spec().name());
  return config;
}

absl::Status VmStore::Write(const std::string& vm, const v1::ShimConfig& config) const {
  VmPaths paths = PathsOf(config_, vm);
  RETURN_IF_ERROR(MakeDirectories(paths.state_dir));
  RETURN_IF_ERROR(MakeDirectories(paths.run_dir));
  return WriteMessageDurable(paths.conf, config);
}

absl::StatusOr<std::vector<migration::JournalRecord>> VmStore::ReadJournal(const std::string& vm) const {
  auto records = migration::Journal::Read(PathsOf(config_, vm).journal);
  if (absl::IsNotFound(records.status())) return std::vector<migration::JournalRecord>{};
  return records;
}

absl::Status VmStore::Remove(const std::string& vm) const {
  VmPaths paths = PathsOf(config_, vm);
  v1::ShimConfig config;
  if (ReadMessage(paths.conf, &config).ok() && !config.migration_id().empty()) {
    ASSIGN_OR_RETURN(auto records, ReadJournal(vm));
    v1::EndedIncoming ended;
    ended.set_migration_id(config.migration_id());
    ended.set_vm(vm);
    ended.set_token(config.token());
    ended.set_tls(config.params().tls());
    ended.set_epoch(config.source().epoch());
    // Nothing decided and nothing left that could decide: that is a refusal, durable before the journal goes.
    migration::JournalVerdict verdict = migration::VerdictOf(records, config.migration_id());
    bool owner = verdict.verdict == v1::OWNER;
    ended.set_verdict(owner ? v1::OWNER : v1::REFUSED);
    if (owner) ended.set_epoch(verdict.epoch);
    RETURN_IF_ERROR(RememberEnded(ended));
  }
  if (::unlink(paths.memory.c_str()) != 0 && errno != ENOENT)
    LOG_WARN("guest memory file stays: {}", Message(ErrnoError(errno, paths.memory)));
  RETURN_IF_ERROR(RemoveTree(paths.run_dir));
  // shim.conf is what makes the directory a VM: without it a half-removed one is a leftover for the next
  // List().
  RETURN_IF_ERROR(RemoveFileDurable(paths.conf));
  return RemoveTree(paths.state_dir);
}

absl::Status VmStore::RememberEnded(const v1::EndedIncoming& ended) const {
  if (!SafeFileName(ended.migration_id()))
    return Error(absl::StatusCode::kInvalidArgument, "'{}' is no migration id", ended.migration_id());
  RETURN_IF_ERROR(MakeDirectories(EndedDir(config_)));
  PruneEnded();
  return WriteMessageDurable(EndedDir(config_) + "/" + ended.migration_id(), ended);
}

std::optional<v1::EndedIncoming> VmStore::FindEnded(const std::string& migration_id) const {
  if (!SafeFileName(migration_id)) return std::nullopt;
  v1::EndedIncoming ended;
  if (!ReadMessage(EndedDir(config_) + "/" + migration_id, &ended).ok()) return std::nullopt;
  if (ended.migration_id() != migration_id) return std::nullopt;
  return ended;
}

void VmStore::PruneEnded() const {
  std::error_code error;
  std::vector<std::pair<fs::file_time_type, fs::path>> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(EndedDir(config_), error)) {
    fs::file_time_type when = entry.last_write_time(error);
    if (!error) files.emplace_back(when, entry.path());
  }
  if (files.size() < kKeepEnded) return;
  std::sort(files.begin(), files.end());
  for (size_t i = 0; i + kKeepEnded <= files.size(); ++i) fs::remove(files[i].second, error);
}

}  // namespace baton::daemon
