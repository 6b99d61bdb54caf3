// The guest's serial console as QEMU's socket chardev has it: one client at a time, and a log of everything.
#pragma once

#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "common/fd.h"
#include "common/status.h"
#include "common/unix_socket.h"

namespace baton::lab {

class Console {
 public:
  // Listens at `path` and appends to `log_path`; either may be empty.
  static absl::StatusOr<std::unique_ptr<Console>> Open(const std::string& path, const std::string& log_path);

  // To the log and to the client, if one is there and reads. Any thread.
  void Say(const std::string& line);
  // For the thread that waits: descriptors, and what was typed.
  std::vector<int> fds() const;
  void Attend(int fd, const std::function<void(char)>& typed);

 private:
  Console(UnixListener listener, UniqueFd log) : listener_(std::move(listener)), log_(std::move(log)) {}
  mutable std::mutex mutex_;
  UnixListener listener_;
  const UniqueFd log_;
  UniqueFd client_;  // guarded by mutex_
};

}  // namespace baton::lab
