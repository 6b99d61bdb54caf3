#include "agent/daemon/qemu_info.h"

#include <sys/stat.h>

#include <cerrno>

#include "common/process.h"

namespace baton::daemon {
namespace {

absl::StatusOr<std::string> Ask(const QemuBinary& binary, std::vector<std::string> args, Deadline deadline) {
  SpawnOptions options;
  options.argv = {binary.path};
  options.argv.insert(options.argv.end(), binary.args.begin(), binary.args.end());
  options.argv.insert(options.argv.end(), args.begin(), args.end());
  options.env = binary.env;
  ASSIGN_OR_RETURN(CommandOutput output, RunCommand(options, deadline));
  if (!output.status.ok())
    return Error(absl::StatusCode::kFailedPrecondition, "{} {} {}: {}", binary.path, args[0],
                 output.status.ToString(), output.err.substr(0, output.err.find('\n')));
  return output.out;
}

}  // namespace

std::string VersionNumber(const std::string& text) {
  size_t at = text.find("version ");
  if (at == std::string::npos) return "";
  at += 8;
  return text.substr(at, text.find_first_not_of("0123456789.", at) - at);
}

absl::StatusOr<QemuFacts> QemuInfo::Of(const QemuBinary& binary, Deadline deadline) {
  struct stat info {};
  if (::stat(binary.path.c_str(), &info) != 0) return ErrnoError(errno, binary.path);
  int64_t mtime = info.st_mtim.tv_sec * 1000000000ll + info.st_mtim.tv_nsec;
  {
    std::lock_guard lock(mutex_);
    auto found = known_.find(binary.path);
    if (found != known_.end() && found->second.mtime == mtime) return found->second.facts;
  }
  QemuFacts facts;
  ASSIGN_OR_RETURN(std::string version, Ask(binary, {"--version"}, deadline));
  facts.version = version.substr(0, version.find('\n'));
  if (VersionNumber(facts.version).empty())
    return Error(absl::StatusCode::kFailedPrecondition, "{}: is not QEMU (says '{}')", binary.path,
                 facts.version);
  ASSIGN_OR_RETURN(std::string machines, Ask(binary, {"-machine", "help"}, deadline));
  // "q35   Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)", one a line after a title.
  for (size_t at = machines.find('\n'); at != std::string::npos; at = machines.find('\n', at + 1)) {
    size_t end = machines.find_first_of(" \n", at + 1);
    std::string name = machines.substr(at + 1, end == std::string::npos ? end : end - at - 1);
    if (!name.empty()) facts.machines.insert(name);
  }
  std::lock_guard lock(mutex_);
  known_[binary.path] = {mtime, facts};
  return facts;
}

}  // namespace baton::daemon
