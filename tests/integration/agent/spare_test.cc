// Spare shims: the launcher in this process, the real baton-shim with a domain of libvirt's test driver.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <memory>
#include <optional>

#include "agent/daemon/shim_launcher.h"
#include "agent/daemon/vm_entry.h"
#include "common/config.h"
#include "common/durable_file.h"
#include "common/process.h"
#include "common/vm_spec.h"
#include "tests/temp_dir.h"

namespace baton::daemon {
namespace {

using std::chrono::seconds;

constexpr char kUuid[] = "3f8e4b52-6c1d-4f0a-9a0e-2b7d1c5e6f10";

Deadline Soon() { return Deadline::After(seconds(60)); }

std::string LinkOf(pid_t pid, int fd) {
  char target[PATH_MAX];
  const ssize_t n = ::readlink(fmt::format("/proc/{}/fd/{}", pid, fd).c_str(), target, sizeof target);
  return n < 0 ? "" : std::string(target, static_cast<size_t>(n));
}

class SpareTest : public testing::Test {
 protected:
  void SetUp() override {
    config_.run_dir = dir_ + "/run";
    config_.state_dir = dir_ + "/state";
    config_.shim = BATON_SHIM;
    room_ = std::string(DomainPathsOf(config_, std::string(kMaxNameLength, '-')).state_dir.size(), '-');
    paths_ = DomainPathsOf(config_, kUuid);
    v1::ShimConfig conf;
    conf.set_mode(v1::ShimConfig::DOMAIN);
    conf.set_run_dir(paths_.run_dir);
    conf.set_state_dir(paths_.state_dir);
    conf.set_libvirt_uri("test:///default");
    conf.set_domain_uuid(kUuid);
    ASSERT_TRUE(MakeDirectories(paths_.state_dir).ok());
    ASSERT_TRUE(WriteMessageDurable(paths_.conf, conf).ok());
    Begin();
  }
  void TearDown() override {
    End();
    // The last one is not to be taken for the next test's.
    while (const auto spare = Spare()) EXPECT_TRUE(AwaitEnd(*spare));
    if (shim_) {
      EXPECT_TRUE(KillProcess(*shim_, Soon()).ok());
    }
  }
  void Begin() {
    tasks_ = std::make_unique<TaskQueue>(1);
    launcher_ = MakeShimLauncher(config_, tasks_.get());
  }
  void End() {
    if (tasks_) tasks_->Stop();
    launcher_.reset();
    tasks_.reset();
  }

  std::optional<ProcessId> Spare() const {
    const auto found = FindByCommandLine(std::string("--spare") + '\0' + room_ + '\0');
    return found.empty() ? std::nullopt : std::optional(found.front());
  }
  // Nothing tells when it is there: a program that exec has started closes its starter's descriptors before
  // it has a command line (Linux: begin_new_exec(), then the loader), and the next one comes by a clock.
  std::optional<ProcessId> AwaitSpare() const {
    const Deadline deadline = Soon();
    while (!deadline.Expired()) {
      if (auto spare = Spare()) return spare;
      ::usleep(10'000);
    }
    return std::nullopt;
  }
  static bool AwaitEnd(const ProcessId& id) {
    auto pidfd = OpenPidfd(id);
    return pidfd.ok() ? WaitPidfd(pidfd->get(), Soon()).ok() : absl::IsNotFound(pidfd.status());
  }
  void Start() {
    auto started = launcher_->Start(kUuid, paths_);
    ASSERT_TRUE(started.ok()) << started.status();
    shim_ = *started;
  }
  // What the shim at the control socket says of itself.
  v1::ShimStatus Ask() {
    VmEntry entry(kUuid, paths_);
    entry.set_shim(*shim_);
    const absl::Status connected =
        entry.Connect({.on_event = [](const v1::ShimReply&) {}, .on_close = [] {}}, Soon());
    EXPECT_TRUE(connected.ok()) << connected << TailOfShimLog(paths_);
    v1::ShimRequest request;
    request.mutable_status();
    auto reply = entry.Call(request, Soon());
    EXPECT_TRUE(reply.ok()) << reply.status();
    entry.Disconnect();
    return reply.ok() ? reply->status() : v1::ShimStatus();
  }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  // What stands in a spare's command line: by its length those of other agents are told apart.
  std::string room_;
  AgentConfig config_;
  VmPaths paths_;
  std::unique_ptr<TaskQueue> tasks_;
  std::unique_ptr<ShimLauncher> launcher_;
  std::optional<ProcessId> shim_;
};

TEST_F(SpareTest, BecomesTheShimAndIsFollowedByAnother) {
  launcher_->KeepSpare();
  launcher_->KeepSpare();  // there is one
  const auto spare = AwaitSpare();
  ASSERT_TRUE(spare);
  Start();
  EXPECT_EQ(shim_->pid, spare->pid);
  EXPECT_EQ(Ask().pid(), static_cast<uint64_t>(spare->pid));
  // As one that was started for the domain.
  const auto found = FindByCommandLine(paths_.state_dir + '\0');
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].pid, spare->pid);
  const auto words = ReadFileLimited(fmt::format("/proc/{}/cmdline", spare->pid), 65536);
  ASSERT_TRUE(words.ok());
  EXPECT_THAT(*words,
              testing::StartsWith(std::string(BATON_SHIM) + '\0' + "--dir" + '\0' + paths_.state_dir + '\0'));
  EXPECT_EQ(LinkOf(spare->pid, 0), "/dev/null");
  EXPECT_EQ(LinkOf(spare->pid, 1), paths_.shim_log);
  EXPECT_EQ(LinkOf(spare->pid, 2), paths_.shim_log);
  const auto next = AwaitSpare();
  ASSERT_TRUE(next);
  EXPECT_NE(next->pid, spare->pid);
}

TEST_F(SpareTest, OneThatIsGoneIsNotMissed) {
  launcher_->KeepSpare();
  const auto spare = AwaitSpare();
  ASSERT_TRUE(spare);
  ASSERT_TRUE(KillProcess(*spare, Soon()).ok());
  Start();
  EXPECT_NE(shim_->pid, spare->pid);
  EXPECT_EQ(Ask().pid(), static_cast<uint64_t>(shim_->pid));
}

TEST_F(SpareTest, OneThatDoesNotAnswerIsReplaced) {
  launcher_->KeepSpare();
  const auto spare = AwaitSpare();
  ASSERT_TRUE(spare);
  ASSERT_EQ(::kill(spare->pid, SIGSTOP), 0);
  Start();
  EXPECT_NE(shim_->pid, spare->pid);
  EXPECT_EQ(Ask().pid(), static_cast<uint64_t>(shim_->pid));
  EXPECT_FALSE(ProcessAlive(*spare));
}

TEST_F(SpareTest, ProgramThatKnowsNoSparesIsStartedAsUsual) {
  End();
  const std::string program = dir_ + "/shim";
  ASSERT_TRUE(
      WriteFileDurable(program,
                       fmt::format("#!/bin/sh\n[ \"$1\" = --spare ] && exit 2\nexec {} \"$@\"\n", BATON_SHIM))
          .ok());
  ASSERT_EQ(::chmod(program.c_str(), 0755), 0);
  config_.shim = program;
  Begin();
  launcher_->KeepSpare();
  Start();
  EXPECT_EQ(Ask().pid(), static_cast<uint64_t>(shim_->pid));
}

TEST_F(SpareTest, EndsWithItsLauncher) {
  launcher_->KeepSpare();
  const auto spare = AwaitSpare();
  ASSERT_TRUE(spare);
  End();
  EXPECT_TRUE(AwaitEnd(*spare));
}

TEST_F(SpareTest, ThereIsNoneWithoutBeingAskedFor) {
  Start();
  EXPECT_EQ(Ask().pid(), static_cast<uint64_t>(shim_->pid));
  End();
  launcher_ = MakeShimLauncher(config_);
  launcher_->KeepSpare();
  EXPECT_FALSE(Spare());
}

}  // namespace
}  // namespace baton::daemon
