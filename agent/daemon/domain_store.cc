#include "agent/daemon/domain_store.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <sstream>

#include "agent/migration/journal.h"
#include "common/config.h"
#include "common/durable_file.h"
#include "common/log.h"

namespace baton::daemon {
namespace {

std::string ImagesFile(const VmPaths& paths) { return paths.state_dir + "/images"; }

}  // namespace

absl::StatusOr<std::vector<std::string>> DomainStore::List() const {
  std::vector<std::string> uuids;
  std::error_code error;
  std::filesystem::directory_iterator entries(config_.state_dir + "/domains", error);
  if (error == std::errc::no_such_file_or_directory) return uuids;
  if (error) return ErrnoError(error.value(), config_.state_dir + "/domains");
  for (const auto& entry : entries) {
    if (std::filesystem::exists(entry.path() / "shim.conf", error))
      uuids.push_back(entry.path().filename().string());
  }
  std::sort(uuids.begin(), uuids.end());
  return uuids;
}

absl::StatusOr<v1::ShimConfig> DomainStore::Read(const std::string& uuid) const {
  v1::ShimConfig config;
  const VmPaths paths = DomainPathsOf(config_, uuid);
  RETURN_IF_ERROR(ReadMessage(paths.conf, &config));
  if (config.mode() != v1::ShimConfig::DOMAIN || config.domain_uuid() != uuid)
    return Error(absl::StatusCode::kDataLoss, "{}: is not of domain {}", paths.conf, uuid);
  return config;
}

absl::Status DomainStore::WriteSoon(const std::string& uuid, const v1::ShimConfig& config) const {
  const VmPaths paths = DomainPathsOf(config_, uuid);
  RETURN_IF_ERROR(MakeDirectories(paths.state_dir));
  RETURN_IF_ERROR(MakeDirectories(paths.run_dir));
  return WriteMessageSoon(paths.conf, config);
}

absl::Status DomainStore::Sync(const std::string& uuid) const {
  return SyncFile(DomainPathsOf(config_, uuid).conf);
}

absl::StatusOr<migration::Ownership> DomainStore::OwnershipOf(const std::string& uuid) const {
  auto records = migration::Journal::Read(DomainPathsOf(config_, uuid).journal);
  if (absl::IsNotFound(records.status())) return migration::Ownership();
  RETURN_IF_ERROR(records.status());
  return migration::ReplayOwnership(*records);
}

v1::HandoverState DomainStore::VerdictOf(const std::string& uuid, const std::string& migration) const {
  auto records = migration::Journal::Read(DomainPathsOf(config_, uuid).journal);
  return records.ok() ? migration::VerdictOf(*records, migration).verdict : v1::IDLE;
}

absl::Status DomainStore::Retire(const std::string& uuid) const {
  const VmPaths paths = DomainPathsOf(config_, uuid);
  RETURN_IF_ERROR(RemoveFileDurable(paths.conf));
  for (const char* name : {"/suspended", "/absent-before"}) (void)RemoveFileDurable(paths.state_dir + name);
  return RemoveTree(paths.run_dir);
}

absl::Status DomainStore::Forget(const std::string& uuid) const {
  RETURN_IF_ERROR(Retire(uuid));
  return RemoveTree(DomainPathsOf(config_, uuid).state_dir);
}

absl::Status DomainStore::NoteImages(const std::string& uuid, const std::vector<std::string>& paths) const {
  const VmPaths at = DomainPathsOf(config_, uuid);
  RETURN_IF_ERROR(MakeDirectories(at.state_dir));
  std::string text;
  for (const std::string& path : paths) text += path + "\n";
  return WriteFileDurable(ImagesFile(at), text);
}

void DomainStore::DropImages(const std::string& uuid) const {
  const VmPaths at = DomainPathsOf(config_, uuid);
  auto text = ReadFileLimited(ImagesFile(at), 1 << 20);
  if (!text.ok()) return;
  std::istringstream lines(*text);
  for (std::string path; std::getline(lines, path);) {
    if (!path.empty() && ::unlink(path.c_str()) != 0 && errno != ENOENT)
      LOG_WARN("domain {}: an image that was made for it stays: {}", uuid, Message(ErrnoError(errno, path)));
  }
  (void)RemoveFileDurable(ImagesFile(at));
}

void DomainStore::KeepImages(const std::string& uuid) const {
  (void)RemoveFileDurable(ImagesFile(DomainPathsOf(config_, uuid)));
}

}  // namespace baton::daemon
