// baton-lab-contain [--grace SECONDS] TEST [ARGUMENT...]: runs a test program so that nothing it started
// outlives it.
//
// QEMU, shims and libvirt's daemons are meant to outlive who started them, and a test that a signal or
// ctest's time limit ends has no chance to end them. Here the test runs in a namespace of processes of its
// own, whose first process is this program once more: when that ends, the kernel kills all others
// (pid_namespaces(7)), and it ends at the latest with the program that ctest knows (PR_SET_PDEATHSIG), also
// when that is killed with SIGKILL. Memory files in /dev/shm and names of network namespaces are the test's
// own as well, and gone with it.
//
// A test that ends by itself and leaves a process behind that is still there after that time has failed.
// Exits as the test did; with 128 and the signal's number if a signal ended it. Without the right to make
// namespaces only the test's own end is watched: what it leaves is found, reported and killed
// (PR_SET_CHILD_SUBREAPER), but not if this program dies.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace baton::lab {
namespace {

// What was killed as the test ended may take this long to be gone, on a busy machine.
constexpr int kGraceSeconds = 20;
// What is killed here, too.
constexpr int kKillSeconds = 20;
constexpr int kForwarded[] = {SIGTERM, SIGINT, SIGHUP, SIGQUIT};
// Of the first process in the namespace, before it has started anything.
constexpr int kNoNamespace = 255;

void Say(const std::string& what) { std::fprintf(stderr, "baton-lab-contain: %s\n", what.c_str()); }

// The signals that are waited for below, not handled.
sigset_t Awaited() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGCHLD);
  for (int signal : kForwarded) sigaddset(&set, signal);
  return set;
}

// Passes a signal on, unless the terminal sent it: to the whole group, so that the test has it already.
void Forward(const siginfo_t& info, pid_t to) {
  const bool known =
      std::find(std::begin(kForwarded), std::end(kForwarded), info.si_signo) != std::end(kForwarded);
  if (known && info.si_code != SI_KERNEL) ::kill(to, info.si_signo);
}

int ExitCode(int status) { return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status); }

// The children of this process that live or were not reaped: pid and command line.
std::vector<std::pair<pid_t, std::string>> Children() {
  std::vector<std::pair<pid_t, std::string>> children;
  DIR* proc = ::opendir("/proc");
  while (const dirent* entry = proc != nullptr ? ::readdir(proc) : nullptr) {
    const pid_t pid = std::atoi(entry->d_name);
    if (pid <= 0) continue;
    const std::string dir = std::string("/proc/") + entry->d_name;
    std::ifstream stat(dir + "/stat");
    std::string line;
    std::getline(stat, line);
    // pid (name) state parent: the name may hold anything.
    const size_t name = line.find('('), end = line.rfind(')');
    if (name == std::string::npos || end == std::string::npos || line.size() < end + 4) continue;
    if (std::atoi(line.c_str() + end + 4) != ::getpid()) continue;
    std::ifstream file(dir + "/cmdline", std::ios::binary);
    std::string command((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::replace(command.begin(), command.end(), '\0', ' ');
    children.emplace_back(pid, command.empty() ? line.substr(name, end + 1 - name) : command);
  }
  if (proc != nullptr) ::closedir(proc);
  return children;
}

time_t Now() {
  timespec now;
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec;
}

// Reaps what has ended; the status of the test, if that was among them. False once there is no child any
// more.
bool ReapChildren(pid_t test, std::optional<int>* ended) {
  for (;;) {
    int status = 0;
    const pid_t pid = ::waitpid(-1, &status, WNOHANG);
    if (pid <= 0) return pid == 0;
    if (pid == test) *ended = status;
  }
}

// Waits until no child is left. False if some are at the end of that time.
bool AwaitNoChildren(int seconds) {
  const sigset_t awaited = Awaited();
  std::optional<int> ended;
  for (const time_t limit = Now() + seconds; ReapChildren(0, &ended);) {
    const timespec rest = {.tv_sec = limit - Now(), .tv_nsec = 0};
    if (rest.tv_sec <= 0) return false;
    ::sigtimedwait(&awaited, nullptr, &rest);
  }
  return true;
}

// Runs the test, as the process that its orphans fall to, and looks at what it leaves. Returns the exit code.
int Supervise(char** command, int grace, const sigset_t& mask) {
  const pid_t test = ::fork();
  if (test < 0) {
    Say(std::string("fork: ") + std::strerror(errno));
    return 1;
  }
  if (test == 0) {
    ::sigprocmask(SIG_SETMASK, &mask, nullptr);
    ::execvp(command[0], command);
    Say(std::string(command[0]) + ": " + std::strerror(errno));
    ::_exit(127);
  }
  const sigset_t awaited = Awaited();
  std::optional<int> ended;
  while (ReapChildren(test, &ended) && !ended) {
    siginfo_t info;
    if (::sigwaitinfo(&awaited, &info) > 0) Forward(info, test);
  }
  const int status = ended.value_or(1);
  const int code = ExitCode(status);
  if (WIFSIGNALED(status)) {
    const char* name = ::sigabbrev_np(WTERMSIG(status));
    Say(std::string("the test was ended by SIG") +
        (name != nullptr ? name : std::to_string(WTERMSIG(status))));
  }
  // A test that a signal ended could not clean up: what it left only has to go.
  if (AwaitNoChildren(WIFSIGNALED(status) ? 0 : grace)) return code;
  for (const auto& child : Children()) Say("left behind, and killed now: " + child.second.substr(0, 200));
  // What those have started falls to this process: again until there is none.
  for (const time_t limit = Now() + kKillSeconds; Now() < limit;) {
    for (const auto& child : Children()) ::kill(child.first, SIGKILL);
    if (AwaitNoChildren(1)) break;
  }
  return code == 0 ? 1 : code;
}

// Places where what a test makes would outlive it, and take memory: file systems of its own there, which the
// kernel gives up with the last process that sees them.
bool MountOwn() {
  constexpr char kNames[] = "/run/netns";
  return ::mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=100%") == 0 &&
         (::mkdir(kNames, 0755) == 0 || errno == EEXIST) &&
         ::mount("netns", kNames, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0755") == 0;
}

// The first process of the namespace. `parent` is a pipe that the process outside holds the other end of.
[[noreturn]] void First(char** command, int grace, const sigset_t& mask, int parent) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  pollfd gone = {.fd = parent, .events = 0, .revents = 0};
  // It may have died before it was asked for its signal.
  if (::poll(&gone, 1, 0) > 0) ::_exit(1);
  ::close(parent);
  // What is mounted in here is nobody else's; what is unmounted outside must not be held by a copy.
  if (::mount(nullptr, "/", nullptr, MS_REC | MS_SLAVE, nullptr) != 0 ||
      ::mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, nullptr) != 0 || !MountOwn()) {
    ::_exit(kNoNamespace);
  }
  std::exit(std::min(Supervise(command, grace, mask), kNoNamespace - 1));
}

int Contain(char** command, int grace) {
  // Whoever started this may have children reaped by themselves.
  ::signal(SIGCHLD, SIG_DFL);
  const sigset_t awaited = Awaited();
  sigset_t mask;
  ::sigprocmask(SIG_BLOCK, &awaited, &mask);
  int parent[2];
  if (::pipe2(parent, O_CLOEXEC) != 0) {
    Say(std::string("pipe: ") + std::strerror(errno));
    return 1;
  }
  const auto first = static_cast<pid_t>(
      ::syscall(SYS_clone, CLONE_NEWPID | CLONE_NEWNS | SIGCHLD, nullptr, nullptr, nullptr, 0));
  if (first == 0) {
    ::close(parent[1]);
    First(command, grace, mask, parent[0]);
  }
  int status = 0;
  if (first > 0) {
    // The end of the pipe that stays must not be the test's.
    ::close(parent[0]);
    while (::waitpid(first, &status, WNOHANG) == 0) {
      siginfo_t info;
      if (::sigwaitinfo(&awaited, &info) > 0) Forward(info, first);
    }
    if (!WIFEXITED(status) || WEXITSTATUS(status) != kNoNamespace) return ExitCode(status);
  }
  Say("no namespace of its own for this test");
  ::prctl(PR_SET_CHILD_SUBREAPER, 1);
  return Supervise(command, grace, mask);
}

}  // namespace
}  // namespace baton::lab

int main(int argc, char** argv) {
  int grace = baton::lab::kGraceSeconds, first = 1;
  if (argc > 2 && std::strcmp(argv[1], "--grace") == 0) {
    grace = std::atoi(argv[2]);
    first = 3;
  }
  if (first >= argc) {
    std::fprintf(stderr, "usage: baton-lab-contain [--grace SECONDS] TEST [ARGUMENT...]\n");
    return 2;
  }
  return baton::lab::Contain(argv + first, grace);
}
