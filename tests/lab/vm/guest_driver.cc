#include "tests/lab/vm/guest_driver.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>

namespace baton::lab {
namespace {

constexpr int kStateSeconds = 30;
constexpr Duration kStateTime = std::chrono::seconds(kStateSeconds);

absl::StatusOr<std::pair<UniqueFd, UniqueFd>> MakePair() {
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) return ErrnoError(errno, "socketpair");
  return std::make_pair(UniqueFd(pair[0]), UniqueFd(pair[1]));
}

void WriteWhole(int fd, const std::string& bytes) {
  const timeval limit{kStateSeconds, 0};
  (void)::setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
  for (size_t done = 0; done < bytes.size();) {
    ssize_t n = ::send(fd, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;  // the reader has given up
    done += static_cast<size_t>(n);
  }
}

absl::StatusOr<std::string> ReadState(int fd) {
  std::string bytes;
  const Deadline deadline = Deadline::After(kStateTime);
  while (!LabGuest::Complete(bytes)) {
    pollfd p{fd, POLLIN, 0};
    if (::poll(&p, 1, deadline.PollTimeoutMs()) <= 0 && errno != EINTR)
      return absl::DeadlineExceededError("the state does not come");
    char chunk[65536];
    ssize_t n = ::recv(fd, chunk, sizeof chunk, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return absl::DataLossError("the state ends early");
    bytes.append(chunk, static_cast<size_t>(n));
  }
  return bytes;
}

}  // namespace

absl::StatusOr<std::unique_ptr<LabGuestDriver>> LabGuestDriver::Launch(GuestConfig config,
                                                                       GuestCallbacks callbacks,
                                                                       Deadline deadline) {
  ASSIGN_OR_RETURN(auto guest, LabGuest::Create(std::move(config), std::move(callbacks), deadline));
  return std::unique_ptr<LabGuestDriver>(new LabGuestDriver(std::move(guest)));
}

LabGuestDriver::LabGuestDriver(std::unique_ptr<LabGuest> guest)
    : guest_(std::move(guest)), exit_(::eventfd(0, EFD_CLOEXEC)) {}

LabGuestDriver::~LabGuestDriver() { Kill(); }

pid_t LabGuestDriver::pid() const { return ::getpid(); }

absl::StatusOr<bool> LabGuestDriver::IsRunning(Deadline) {
  if (!guest_) return Gone();
  return guest_->running();
}

absl::StatusOr<UniqueFd> LabGuestDriver::Freeze(Deadline deadline) {
  if (!guest_) return Gone();
  ASSIGN_OR_RETURN(auto pair, MakePair());
  RETURN_IF_ERROR(guest_->Pause(deadline));
  out_ = std::move(pair.first);
  return std::move(pair.second);
}

absl::Status LabGuestDriver::ContinueState(Deadline deadline) {
  if (!guest_) return Gone();
  if (!out_) return absl::FailedPreconditionError("the guest was not frozen");
  ASSIGN_OR_RETURN(std::string state, guest_->Save(deadline));
  if (mover_.joinable()) mover_.join();
  mover_ = std::thread([fd = std::move(out_), state = std::move(state)] { WriteWhole(fd.get(), state); });
  return absl::OkStatus();
}

absl::Status LabGuestDriver::Resume(Deadline deadline) {
  if (!guest_) return Gone();
  out_.reset();
  return guest_->Run(deadline);
}

absl::StatusOr<UniqueFd> LabGuestDriver::BeginLoad(Deadline) {
  if (!guest_) return Gone();
  ASSIGN_OR_RETURN(auto pair, MakePair());
  in_ = std::move(pair.first);
  if (mover_.joinable()) mover_.join();
  mover_ = std::thread([this] { loaded_ = ReadState(in_.get()); });
  return std::move(pair.second);
}

absl::Status LabGuestDriver::FinishLoad(Deadline deadline) {
  if (!guest_) return Gone();
  if (!mover_.joinable()) return absl::FailedPreconditionError("nothing is being loaded");
  mover_.join();
  in_.reset();
  if (!loaded_.ok()) return loaded_.status();
  return guest_->Load(*loaded_, deadline);
}

absl::Status LabGuestDriver::Start(Deadline deadline) { return guest_ ? guest_->Run(deadline) : Gone(); }

// There is no interface of a lab guest that a switch would have to learn about.
absl::Status LabGuestDriver::Announce(Deadline) { return guest_ ? absl::OkStatus() : Gone(); }

absl::Status LabGuestDriver::PowerDown(Deadline) {
  if (!guest_) return Gone();
  guest_->PowerDown();
  return absl::OkStatus();
}

void LabGuestDriver::Kill() {
  if (in_) ::shutdown(in_.get(), SHUT_RDWR);
  if (mover_.joinable()) mover_.join();
  out_.reset();
  in_.reset();
  if (!guest_) return;
  guest_.reset();
  const uint64_t one = 1;
  (void)!::write(exit_.get(), &one, sizeof one);
}

}  // namespace baton::lab
