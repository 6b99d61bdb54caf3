// baton-lab-contain, which starts integration and end-to-end tests. What it runs is a shell in place of a
// test; whether a process of it is left is told by a pipe that all of them hold open.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include "common/process.h"
#include "common/unix_socket.h"

namespace baton::lab {
namespace {

using std::chrono::seconds;
using testing::AllOf;
using testing::HasSubstr;

Deadline Soon() { return Deadline::After(seconds(60)); }

// A process that outlives its parent, in a session of its own and with a name to find.
constexpr char kLeaves[] = "setsid sleep 9871 & ";

absl::StatusOr<CommandOutput> Contained(const std::string& script, const std::string& grace = "60") {
  SpawnOptions options;
  options.argv = {BATON_CONTAIN, "--grace", grace, "sh", "-c", script};
  return RunCommand(options, Soon());
}

TEST(Contain, EndsAsTheTestDid) {
  auto good = Contained("echo out; echo err >&2");
  ASSERT_TRUE(good.ok()) << good.status();
  EXPECT_EQ(good->status.ToString(), "exited with 0");
  EXPECT_EQ(good->out, "out\n");
  EXPECT_EQ(good->err, "err\n");
  EXPECT_EQ(Contained("exit 3")->status.ToString(), "exited with 3");
  auto killed = Contained("kill -SEGV $$");
  EXPECT_EQ(killed->status.ToString(), "exited with 139");
  EXPECT_THAT(killed->err, HasSubstr("ended by SIGSEGV"));
  SpawnOptions options;
  options.argv = {BATON_CONTAIN, "/nonexistent/test"};
  EXPECT_EQ(RunCommand(options, Soon())->status.ToString(), "exited with 127");
}

TEST(Contain, AnOrphanThatIsAboutToEndIsNoFailure) {
  EXPECT_EQ(Contained("setsid sleep 1 & exit 0")->status.ToString(), "exited with 0");
}

// RunCommand returns once nobody holds the output's pipe any more: the process that was left is gone.
TEST(Contain, LeavingAProcess_FailsTheTest_AndEndsTheProcess) {
  auto out = Contained(std::string(kLeaves) + "exit 0", "1");
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->status.ToString(), "exited with 1");
  EXPECT_THAT(out->err, AllOf(HasSubstr("left behind, and killed now: "), HasSubstr("sleep 9871")));
  out = Contained(std::string(kLeaves) + "exit 7", "1");
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->status.ToString(), "exited with 7");
}

TEST(Contain, ATestThatASignalEnds_LeavesNothing) {
  auto out = Contained(std::string(kLeaves) + "kill -KILL $$");
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->status.ToString(), "exited with 137");
}

TEST(Contain, MemoryFilesAndNamesOfNetworks_AreTheTestsOwn) {
  const std::string name = "baton-contain-test-" + std::to_string(::getpid());
  const std::string file = "/dev/shm/" + name, network = "/run/netns/" + name;
  auto out = Contained("echo x > " + file + " && ip netns add " + name + " && ls " + file + " " + network +
                       " && kill -KILL $$");
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->status.ToString(), "exited with 137");
  EXPECT_EQ(out->out, file + "\n" + network + "\n") << out->err;
  EXPECT_NE(::access(file.c_str(), F_OK), 0);
  EXPECT_NE(::access(network.c_str(), F_OK), 0);
}

class ContainSignal : public testing::Test {
 protected:
  // Starts a test that leaves a process and runs on; returns when it does.
  void Start(const std::string& script) {
    int ends[2];
    ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
    output_.reset(ends[0]);
    UniqueFd write(ends[1]);
    SpawnOptions options;
    options.argv = {BATON_CONTAIN, "--grace", "1", "sh", "-c", kLeaves + script};
    options.stdout_fd = write.get();
    auto process = Process::Spawn(options);
    ASSERT_TRUE(process.ok()) << process.status();
    contain_.emplace(*std::move(process));
    write.reset();
    ASSERT_EQ(ReadSome(), "ready\n");
  }
  // What comes next; empty once nobody holds the pipe.
  std::string ReadSome() {
    absl::Status waited = WaitFd(output_.get(), POLLIN, Soon(), "the test's output");
    EXPECT_TRUE(waited.ok()) << waited;
    char text[256];
    const ssize_t size = waited.ok() ? ::read(output_.get(), text, sizeof(text)) : 0;
    return std::string(text, static_cast<size_t>(std::max<ssize_t>(size, 0)));
  }
  UniqueFd output_;
  std::optional<Process> contain_;
};

TEST_F(ContainSignal, Kill_OfItself_EndsEverything) {
  Start("echo ready; exec sleep 9871");
  contain_->Signal(SIGKILL);
  EXPECT_EQ(ReadSome(), "");
}

TEST_F(ContainSignal, Terminate_ReachesTheTest_WhichMayCleanUp) {
  Start("trap 'echo cleaned; exit 5' TERM; echo ready; while :; do sleep 0.1; done");
  contain_->Signal(SIGTERM);
  EXPECT_EQ(ReadSome(), "cleaned\n");
  EXPECT_EQ(ReadSome(), "");
  auto ended = contain_->Wait(Soon());
  ASSERT_TRUE(ended.ok()) << ended.status();
  EXPECT_EQ(ended->ToString(), "exited with 5");
}

}  // namespace
}  // namespace baton::lab
