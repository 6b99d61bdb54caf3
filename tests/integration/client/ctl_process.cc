#include "tests/integration/client/ctl_process.h"

#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <stdexcept>

namespace baton::testing {
namespace {

constexpr Duration kPatience = std::chrono::seconds(120);

// Appends what is there; false at the end of the stream.
bool Drain(UniqueFd* fd, std::string* out) {
  char buffer[4096];
  ssize_t n = ::read(fd->get(), buffer, sizeof buffer);
  if (n > 0) {
    out->append(buffer, static_cast<size_t>(n));
    return true;
  }
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return true;
  fd->reset();  // a terminal ends with EIO
  return false;
}

}  // namespace

CtlProcess::CtlProcess(const std::vector<std::string>& arguments, const Options& options) {
  int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1};
  int master = -1, slave = -1;
  if (options.terminal) {
    winsize size{};
    size.ws_col = static_cast<unsigned short>(options.columns);
    size.ws_row = static_cast<unsigned short>(options.rows);
    if (openpty(&master, &slave, nullptr, nullptr, &size) != 0) throw std::runtime_error("openpty");
    fcntl(master, F_SETFD, FD_CLOEXEC);
  } else if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0 || pipe2(err, O_CLOEXEC) != 0) {
    throw std::runtime_error("pipe2");
  }
  std::vector<std::string> environment = {"PATH=/usr/bin:/bin", "HOME=/nonexistent", "TERM=xterm",
                                          "LC_ALL=C.UTF-8", "TZ=UTC"};
  for (const auto& [name, value] : options.environment) environment.push_back(name + "=" + value);
  std::vector<char*> argv, envp;
  std::string program = options.program.empty() ? BATONCTL : options.program;
  argv.push_back(program.data());
  std::vector<std::string> copies = arguments;
  for (auto& argument : copies) argv.push_back(argument.data());
  argv.push_back(nullptr);
  for (auto& variable : environment) envp.push_back(variable.data());
  envp.push_back(nullptr);

  pid_ = fork();
  if (pid_ == 0) {
    setsid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // a test that dies leaves nothing behind
    if (options.terminal) {
      ioctl(slave, TIOCSCTTY, 0);
      for (int fd : {0, 1, 2}) dup2(slave, fd);
    } else {
      dup2(in[0], 0);
      dup2(out[1], 1);
      dup2(err[1], 2);
    }
    execve(program.c_str(), argv.data(), envp.data());
    _exit(127);
  }
  if (options.terminal) {
    close(slave);
    output_.reset(master);
    input_.reset(fcntl(master, F_DUPFD_CLOEXEC, 3));
  } else {
    close(in[0]);
    close(out[1]);
    close(err[1]);
    input_.reset(in[1]);
    output_.reset(out[0]);
    error_.reset(err[0]);
    if (!options.keep_input) input_.reset();
  }
}

CtlProcess::~CtlProcess() {
  if (pid_ > 0 && status_ < 0) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
}

bool CtlProcess::Pump(Deadline deadline) {
  if (!output_ && !error_) return false;
  pollfd fds[] = {{output_ ? output_.get() : -1, POLLIN, 0}, {error_ ? error_.get() : -1, POLLIN, 0}};
  if (poll(fds, 2, deadline.PollTimeoutMs()) <= 0) return false;
  if (fds[0].revents != 0) Drain(&output_, &out_);
  if (fds[1].revents != 0) Drain(&error_, &err_);
  return true;
}

bool CtlProcess::ReadUntil(const std::string& text) {
  Deadline deadline = Deadline::After(kPatience);
  while (out_.find(text) == std::string::npos) {
    if (!Pump(deadline)) return false;
  }
  return true;
}

bool CtlProcess::ReadErrorUntil(const std::string& text) {
  Deadline deadline = Deadline::After(kPatience);
  while (err_.find(text) == std::string::npos) {
    if (!Pump(deadline)) return false;
  }
  return true;
}

void CtlProcess::Write(const std::string& text) {
  [[maybe_unused]] ssize_t n = ::write(input_.get(), text.data(), text.size());
}

void CtlProcess::Signal(int signal) { kill(pid_, signal); }

int CtlProcess::Wait() {
  Deadline deadline = Deadline::After(kPatience);
  while (Pump(deadline)) {
  }
  int raw = 0;
  // Its output has ended or the time is over; an ended process is reaped at once.
  if (deadline.Expired()) {
    kill(pid_, SIGKILL);
    waitpid(pid_, &raw, 0);
    pid_ = -1;
    return -1;
  }
  waitpid(pid_, &raw, 0);
  pid_ = -1;
  status_ = WIFEXITED(raw) ? WEXITSTATUS(raw) : 128 + WTERMSIG(raw);
  return status_;
}

termios CtlProcess::Mode() const {
  termios mode{};
  tcgetattr(input_.get(), &mode);
  return mode;
}

void CtlProcess::Resize(int columns, int rows) {
  winsize size{};
  size.ws_col = static_cast<unsigned short>(columns);
  size.ws_row = static_cast<unsigned short>(rows);
  ioctl(input_.get(), TIOCSWINSZ, &size);
}

CtlResult RunCtl(const std::vector<std::string>& arguments, const std::string& input,
                 const std::map<std::string, std::string>& environment) {
  CtlProcess::Options options;
  options.keep_input = !input.empty();
  options.environment = environment;
  CtlProcess process(arguments, options);
  if (!input.empty()) {
    process.Write(input);
    process.CloseInput();
  }
  CtlResult result;
  result.code = process.Wait();
  result.out = process.out();
  result.err = process.err();
  return result;
}

}  // namespace baton::testing
