#include "agent/shim/spare.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "baton/v1/shim.pb.h"
#include "common/message_socket.h"

namespace baton::shim {
namespace {

constexpr Duration kAnswer = std::chrono::seconds(1);

// /proc/PID/cmdline shows this memory as it is (proc(5)).
absl::Status SetCommandLine(int argc, char** argv, const std::string& dir) {
  char* const begin = argv[0];
  const char* const end = argv[argc - 1] + std::strlen(argv[argc - 1]) + 1;
  const auto room = static_cast<size_t>(end - begin);
  std::string words = begin;
  for (const std::string& word : {std::string("--dir"), dir}) (words += '\0') += word;
  if (words.size() >= room)
    return Error(absl::StatusCode::kFailedPrecondition, "the command line has room for {} bytes, not for {}",
                 room, words.size() + 1);
  std::memset(begin, 0, room);
  std::memcpy(begin, words.data(), words.size());
  return absl::OkStatus();
}

absl::Status MoveTo(int fd, int number) {
  if (::dup2(fd, number) < 0) return ErrnoError(errno, "dup2");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::string> AwaitVm(int argc, char** argv) {
  UniqueFd connection(::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3));
  if (!connection) return ErrnoError(errno, "the agent's socket");
  MessageSocket agent(std::move(connection));
  v1::ShimConfig vm;
  std::vector<UniqueFd> log;
  // Ends with the agent, not with time.
  absl::Status received = agent.Receive(vm, Deadline::After(std::chrono::hours(24 * 365)), &log);
  if (absl::IsOutOfRange(received)) return "";
  RETURN_IF_ERROR(received);
  if (log.size() != 1 || vm.state_dir().empty())
    return absl::InvalidArgumentError("the agent did not say which VM is to be served");
  UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  if (!null) return ErrnoError(errno, "/dev/null");
  RETURN_IF_ERROR(MoveTo(null.get(), STDIN_FILENO));
  RETURN_IF_ERROR(MoveTo(log[0].get(), STDOUT_FILENO));
  RETURN_IF_ERROR(MoveTo(log[0].get(), STDERR_FILENO));
  RETURN_IF_ERROR(SetCommandLine(argc, argv, vm.state_dir()));
  RETURN_IF_ERROR(agent.Send(v1::ShimConfig(), Deadline::After(kAnswer)));
  return vm.state_dir();
}

}  // namespace baton::shim
