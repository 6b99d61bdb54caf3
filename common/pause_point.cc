#include "common/pause_point.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "common/fd.h"
#include "common/log.h"

namespace baton {
namespace {

// The value of BATON_PAUSE_AT, or what the file says that it names.
std::string PointsNow(const char* value) {
  if (value[0] != '@') return value;
  UniqueFd file(::open(value + 1, O_RDONLY | O_CLOEXEC));
  char text[1024];
  ssize_t size = file ? ::read(file.get(), text, sizeof text) : -1;
  return size > 0 ? std::string(text, static_cast<size_t>(size)) : "";
}

bool Named(const char* value, const std::string& name) {
  return ("," + PointsNow(value) + ",").find("," + name + ",") != std::string::npos;
}

}  // namespace

void PausePoint(const std::string& directory, const std::string& name, Duration bound) {
  const char* list = std::getenv("BATON_PAUSE_AT");
  if (list == nullptr || !Named(list, name)) return;
  const Deadline deadline = Deadline::After(bound);
  const std::string path = directory + "/pause-" + name;
  UniqueFd watch(inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
  // The directory is watched before the file is there, so that its removal cannot be missed.
  if (!watch ||
      inotify_add_watch(watch.get(), directory.c_str(), IN_DELETE | IN_MOVED_FROM | IN_DELETE_SELF) < 0) {
    LOG_WARN("pause-point {}: cannot watch {}: {}", name, directory, std::strerror(errno));
    return;
  }
  if (!UniqueFd(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600))) {
    LOG_WARN("pause-point {}: {}: {}", name, path, std::strerror(errno));
    return;
  }
  LOG_WARN("pause-point {}", name);
  while (::access(path.c_str(), F_OK) == 0 && !deadline.Expired()) {
    pollfd poll_fd{watch.get(), POLLIN, 0};
    if (::poll(&poll_fd, 1, deadline.PollTimeoutMs()) < 0 && errno != EINTR) return;
    char events[4096];
    while (::read(watch.get(), events, sizeof events) > 0) {
    }
  }
  LOG_WARN("pause-point {} left", name);
}

}  // namespace baton
