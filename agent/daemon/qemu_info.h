// What a QEMU binary says of itself. Asked once a binary and change of its file.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <string>

#include "agent/daemon/agent_config.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::daemon {

struct QemuFacts {
  // First line of --version: "QEMU emulator version 7.2.22 (Debian …)".
  std::string version;
  // Names and aliases of machine types.
  std::set<std::string> machines;
};

// Thread-safe.
class QemuInfo {
 public:
  // Runs the binary twice, unless its facts are known. Errors name the binary.
  absl::StatusOr<QemuFacts> Of(const QemuBinary& binary, Deadline deadline);

 private:
  struct Known {
    int64_t mtime = 0;
    QemuFacts facts;
  };
  std::mutex mutex_;
  std::map<std::string, Known> known_;  // guarded by mutex_; by path
};

// "7.2.22" from "QEMU emulator version 7.2.22 (Debian …)"; empty if there is no such thing in it.
std::string VersionNumber(const std::string& text);

}  // namespace baton::daemon
