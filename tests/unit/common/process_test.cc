#include "common/process.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <thread>

#include "tests/temp_dir.h"

namespace baton {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;

Deadline Soon() { return Deadline::After(seconds(20)); }

absl::StatusOr<CommandOutput> Shell(const std::string& script, Deadline deadline = Soon(),
                                    SpawnOptions options = {}) {
  options.argv = {"sh", "-c", script};
  return RunCommand(options, deadline);
}

TEST(Process, CapturesOutputAndExit) {
  auto out = Shell("echo hello; echo oops >&2; exit 3");
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->out, "hello\n");
  EXPECT_EQ(out->err, "oops\n");
  EXPECT_EQ(out->status.ToString(), "exited with 3");
  EXPECT_EQ(Shell("kill -9 $$")->status.ToString(), "was killed by SIGKILL");
}

TEST(Process, ExecFailureIsReportedAsSuch) {
  SpawnOptions options;
  options.argv = {"/nonexistent/program"};
  auto process = Process::Spawn(options);
  EXPECT_EQ(process.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(Message(process.status()), "cannot execute /nonexistent/program: No such file or directory");
  EXPECT_EQ(SpawnDetached(options).status().code(), absl::StatusCode::kNotFound);
  options.argv = {"/etc/passwd"};
  EXPECT_EQ(Process::Spawn(options).status().code(), absl::StatusCode::kPermissionDenied);
  options.argv = {"sh"};
  options.working_dir = "/nonexistent";
  EXPECT_THAT(Message(Process::Spawn(options).status()), HasSubstr("chdir: No such file"));
  EXPECT_EQ(Process::Spawn({}).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Process, ChildHasOnlyTheDescriptorsItShallHave) {
  // One descriptor that leaks in most programs: without close-on-exec.
  int leak = ::open("/dev/zero", O_RDONLY);
  ASSERT_GE(leak, 3);
  int pipe_fds[2];
  ASSERT_EQ(::pipe2(pipe_fds, O_CLOEXEC), 0);
  UniqueFd reader(pipe_fds[0]), writer(pipe_fds[1]);
  SpawnOptions options;
  options.inherit = {{writer.get(), 5}};
  auto out = Shell("ls /proc/$$/fd; echo through >&5", Soon(), options);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->out, "0\n1\n2\n5\n");
  writer.reset();
  char buffer[16] = {};
  EXPECT_EQ(::read(reader.get(), buffer, sizeof(buffer)), 8);
  ::close(leak);
}

TEST(Process, TargetsMayCrossSources) {
  // The source of one is the target of the other.
  UniqueFd zero(::open("/dev/zero", O_RDONLY | O_CLOEXEC)), full(::open("/dev/full", O_RDONLY | O_CLOEXEC));
  SpawnOptions options;
  options.inherit = {{zero.get(), full.get()}, {full.get(), zero.get()}};
  auto out =
      Shell(fmt::format("readlink /proc/$$/fd/{} /proc/$$/fd/{}", zero.get(), full.get()), Soon(), options);
  ASSERT_TRUE(out.ok());
  EXPECT_EQ(out->out, "/dev/full\n/dev/zero\n");
}

TEST(Process, EnvironmentIsAddedOrReplaced) {
  SpawnOptions options;
  options.env = {{"BATON_TEST", "x y"}, {"HOME", "/nowhere"}};
  EXPECT_EQ(Shell("echo \"$BATON_TEST,$HOME,${PATH:+path}\"", Soon(), options)->out, "x y,/nowhere,path\n");
  options.clear_env = true;
  options.argv = {"/usr/bin/env"};
  EXPECT_EQ(RunCommand(options, Soon())->out, "BATON_TEST=x y\nHOME=/nowhere\n");
}

TEST(Process, SignalsAreDefaultInTheChild) {
  struct sigaction ignore {
  }, old{};
  ignore.sa_handler = SIG_IGN;
  ::sigaction(SIGPIPE, &ignore, &old);
  auto out = Shell("kill -PIPE $$; echo survived");
  ::sigaction(SIGPIPE, &old, nullptr);
  EXPECT_EQ(out->status.signal, SIGPIPE);
}

TEST(Process, DeadlineKillsTheWholeGroup) {
  const test::TempDir dir;
  std::string file = dir / "pid";
  auto out = Shell(fmt::format("sleep 1000 & echo $! > {}; wait", file), Deadline::After(milliseconds(300)));
  EXPECT_EQ(out.status().code(), absl::StatusCode::kDeadlineExceeded);
  FILE* in = ::fopen(file.c_str(), "r");
  ASSERT_NE(in, nullptr);
  int pid = 0;
  ASSERT_EQ(::fscanf(in, "%d", &pid), 1);
  ::fclose(in);
  // The signal is sent; the end may take a moment.
  for (Deadline wait = Soon(); !wait.Expired() && ProcessStartTime(pid).ok();) ::sched_yield();
  EXPECT_FALSE(ProcessStartTime(pid).ok());
}

TEST(Process, DaemonLeftBehindDoesNotHoldTheCommand) {
  auto out = Shell("sleep 1000 & echo $!", Soon());
  ASSERT_TRUE(out.ok()) << out.status();
  int pid = std::atoi(out->out.c_str());
  ASSERT_GT(pid, 0);
  EXPECT_TRUE(ProcessStartTime(pid).ok());
  ::kill(pid, SIGKILL);
}

TEST(Process, OutputIsBounded) {
  auto out = RunCommand({.argv = {"sh", "-c", "head -c 1000000 /dev/zero"}}, Soon(), 1000);
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_TRUE(out->status.ok());
  EXPECT_EQ(out->out.size(), 1000u);
}

TEST(Process, DestructionKillsUnlessReleased) {
  pid_t pid;
  {
    auto process = Process::Spawn({.argv = {"sleep", "1000"}});
    ASSERT_TRUE(process.ok());
    pid = process->pid();
    EXPECT_TRUE(ProcessStartTime(pid).ok());
    EXPECT_EQ(process->Wait(Deadline::After(milliseconds(1))).status().code(),
              absl::StatusCode::kDeadlineExceeded);
  }
  EXPECT_FALSE(ProcessStartTime(pid).ok());
}

TEST(Process, DiesWithItsParentIfAskedTo) {
  // The parent is killed; the end of its child closes the pipe that the child has inherited.
  int fds[2];
  ASSERT_EQ(::pipe2(fds, O_CLOEXEC), 0);
  UniqueFd ended(fds[0]), held(fds[1]);
  const pid_t parent = ::fork();
  if (parent == 0) {
    auto child = Process::Spawn(
        {.argv = {"sh", "-c", "echo; exec sleep 1000"}, .stdout_fd = held.get(), .die_with_parent = true});
    held.reset();
    while (child.ok()) ::pause();
    ::_exit(1);
  }
  held.reset();
  char byte = 0;
  ASSERT_EQ(::read(ended.get(), &byte, 1), 1);
  ASSERT_EQ(::kill(parent, SIGKILL), 0);
  pollfd poll{ended.get(), POLLIN, 0};
  ASSERT_EQ(::poll(&poll, 1, 60'000), 1) << "the child runs on";
  EXPECT_EQ(::read(ended.get(), &byte, 1), 0);
  EXPECT_EQ(::waitpid(parent, nullptr, 0), parent);
}

TEST(Process, TerminateEscalates) {
  auto polite = Process::Spawn({.argv = {"sleep", "1000"}});
  EXPECT_EQ(polite->Terminate(Soon()).signal, SIGTERM);
  int fds[2];
  ASSERT_EQ(::pipe2(fds, O_CLOEXEC), 0);
  UniqueFd ready(fds[0]), out(fds[1]);
  auto stubborn = Process::Spawn({.argv = {"sh", "-c", "trap '' TERM; echo; while :; do sleep 1000; done"},
                                  .stdout_fd = out.get(),
                                  .new_session = true});
  char byte;
  ASSERT_EQ(::read(ready.get(), &byte, 1), 1);
  EXPECT_EQ(stubborn->Terminate(Deadline::After(milliseconds(50))).signal, SIGKILL);
}

TEST(Process, DetachedIsNobodysChild) {
  auto id = SpawnDetached({.argv = {"sleep", "1000"}});
  ASSERT_TRUE(id.ok()) << id.status();
  EXPECT_TRUE(ProcessAlive(*id));
  EXPECT_NE(::getsid(id->pid), ::getsid(0));
  EXPECT_FALSE(ProcessAlive({id->pid, id->start_time + 1}));
  EXPECT_TRUE(absl::IsNotFound(OpenPidfd({id->pid, id->start_time + 1}).status()));
  EXPECT_TRUE(KillProcess({id->pid, id->start_time + 1}, Soon()).ok());
  EXPECT_TRUE(ProcessAlive(*id));  // another process is not killed in its place
  EXPECT_TRUE(KillProcess(*id, Soon()).ok());
  EXPECT_FALSE(ProcessAlive(*id));
  EXPECT_TRUE(KillProcess(*id, Soon()).ok());
}

TEST(Process, RunsUntilItsLastThreadHasEnded) {
  // A process whose first thread has ended is a zombie to /proc while others hold its files and locks.
  int fds[2];
  ASSERT_EQ(::pipe2(fds, O_CLOEXEC), 0);
  UniqueFd held(fds[0]), holder(fds[1]);
  pid_t pid = ::fork();
  ASSERT_GE(pid, 0);
  if (pid == 0) {
    held.reset();
    std::thread([] { ::pause(); }).detach();
    ::syscall(SYS_exit, 0);  // this thread only
  }
  holder.reset();
  // State and the fields behind it, proc(5).
  auto stat = [&] {
    std::ifstream file(fmt::format("/proc/{}/stat", pid));
    std::string text((std::istreambuf_iterator<char>(file)), {});
    std::istringstream rest(text.substr(text.rfind(')') + 2));
    return std::vector<std::string>(std::istream_iterator<std::string>(rest), {});
  };
  for (Deadline wait = Soon(); !wait.Expired() && stat()[0] != "Z";) ::sched_yield();
  EXPECT_EQ(stat()[0], "Z");
  ProcessId id{pid, std::stoull(stat()[19])};
  EXPECT_TRUE(ProcessAlive(id));
  auto pidfd = OpenPidfd(id);
  ASSERT_TRUE(pidfd.ok()) << pidfd.status();
  EXPECT_FALSE(WaitPidfd(pidfd->get(), Deadline::After(milliseconds(10))).ok());
  EXPECT_TRUE(KillProcess(id, Soon()).ok());
  EXPECT_FALSE(ProcessAlive(id));
  // What it held is free.
  pollfd poll{held.get(), POLLIN, 0};
  EXPECT_EQ(::poll(&poll, 1, 0), 1);
  EXPECT_EQ(::waitpid(pid, nullptr, 0), pid);
}

}  // namespace
}  // namespace baton
