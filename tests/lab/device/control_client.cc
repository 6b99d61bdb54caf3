#include "tests/lab/device/control_client.h"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>

#include "common/fd.h"
#include "common/unix_socket.h"

namespace baton::lab {

absl::StatusOr<nlohmann::json> CallLabDevice(const std::string& control, const nlohmann::json& command,
                                             Deadline deadline) {
  ASSIGN_OR_RETURN(UniqueFd fd, ConnectUnix(control, deadline));
  const std::string line = command.dump() + "\n";
  for (size_t sent = 0; sent < line.size();) {
    const ssize_t n = ::send(fd.get(), line.data() + sent, line.size() - sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EAGAIN) {
      RETURN_IF_ERROR(WaitFd(fd.get(), POLLOUT, deadline, control));
    } else if (n < 0) {
      return ErrnoError(errno, control);
    } else {
      sent += static_cast<size_t>(n);
    }
  }
  std::string answer;
  while (answer.empty() || answer.back() != '\n') {
    RETURN_IF_ERROR(WaitFd(fd.get(), POLLIN, deadline, control));
    char buffer[4096];
    const ssize_t n = ::recv(fd.get(), buffer, sizeof buffer, 0);
    if (n < 0 && errno == EAGAIN) continue;
    if (n <= 0) return Error(absl::StatusCode::kUnavailable, "{}: the device ended", control);
    answer.append(buffer, static_cast<size_t>(n));
  }
  auto json = nlohmann::json::parse(answer, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return Error(absl::StatusCode::kDataLoss, "{}: not JSON: {}", control, answer);
  if (!json.value("ok", false)) {
    return Error(absl::StatusCode::kFailedPrecondition, "{}", json.value("error", answer));
  }
  return json;
}

}  // namespace baton::lab
