// What the kinds of channels share about sockets. Internal to the stream.
#pragma once

#include <poll.h>
#include <sys/uio.h>

#include <string>

#include "common/clock.h"
#include "common/status.h"

namespace baton::stream {

// sendmsg(2) and recvmsg(2) take no more (UIO_MAXIOV).
inline constexpr int kMaxIovecs = 1024;

// Waits until the socket is ready (or broken: the next call tells). DeadlineExceeded names `peer`.
absl::Status WaitSocket(int fd, short events, Deadline deadline, const std::string& peer);

// A status for an errno of a socket call: a broken connection is Unavailable whatever broke it.
absl::Status SocketError(int error, const std::string& peer);

// Takes `bytes` off the front of the buffers.
void Advance(iovec*& buffers, int& count, size_t bytes);

}  // namespace baton::stream
