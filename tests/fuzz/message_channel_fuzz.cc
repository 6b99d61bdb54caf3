// What a peer may send on channel 0.
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "agent/stream/message_channel.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace baton;
  int fds[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0) std::abort();
  UniqueFd peer(fds[0]);
  auto channel = stream::MakePlainChannel(UniqueFd(fds[1]));
  if (!channel.ok()) std::abort();
  stream::MessageChannel messages(std::move(channel).value());
  // Less than the socket's buffer, so that nobody waits.
  size = std::min<size_t>(size, 64u << 10);
  if (size > 0 && ::write(peer.get(), data, size) != static_cast<ssize_t>(size)) std::abort();
  peer.reset();
  for (;;) {
    auto message = messages.Receive(Deadline::After(std::chrono::seconds(50)));
    if (message.status().code() == absl::StatusCode::kDeadlineExceeded) std::abort();
    if (!message.ok()) return 0;
  }
}
