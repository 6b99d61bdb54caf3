#include "agent/daemon/token.h"

#include <sys/random.h>

#include <cerrno>

#include "agent/stream/preamble.h"

namespace baton::daemon {

absl::StatusOr<std::string> NewToken() {
  std::string token(stream::kTokenSize, '\0');
  size_t done = 0;
  while (done < token.size()) {
    ssize_t n = ::getrandom(token.data() + done, token.size() - done, 0);
    if (n < 0 && errno != EINTR) return ErrnoError(errno, "getrandom");
    if (n > 0) done += static_cast<size_t>(n);
  }
  return token;
}

}  // namespace baton::daemon
