#include "agent/vhost/notify.h"

#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>

#include "common/log.h"

namespace baton::vhost {

void BlockSignals() {
  sigset_t signals;
  sigfillset(&signals);
  // A fault that is blocked ends the process without asking anybody (FragileMapping).
  for (int fault : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP}) sigdelset(&signals, fault);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

void Notify(int fd) {
  pollfd p{fd, POLLOUT, 0};
  const uint64_t one = 1;
  if (::poll(&p, 1, 0) == 1 && (p.revents & POLLOUT) && ::write(p.fd, &one, sizeof one) < 0) {
    LOG_DEBUG("a notification could not be written: {}", errno);
  }
}

}  // namespace baton::vhost
