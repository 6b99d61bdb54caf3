// The session with batond, against a scripted batond in this process; and the console relay.
#include "agent/daemon/session.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/ioctl.h>

#include <deque>

#include "agent/daemon/console_relay.h"
#include "common/durable_file.h"
#include "common/unix_socket.h"
#include "tests/temp_dir.h"
#include "tests/unit/daemon/fake_batond.h"

namespace baton::daemon {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class SessionTest : public testing::Test {
 protected:
  void SetUp() override {
    batond_ = std::make_unique<FakeBatond>(address_);
    Session::Handlers handlers;
    handlers.hello = [] {
      v1::Hello hello;
      hello.mutable_host()->set_name("hosts/a");
      return hello;
    };
    handlers.on_command = [this](const v1::Command& command, uint64_t session) {
      std::lock_guard lock(mutex_);
      commands_.emplace_back(command, session);
      changed_.notify_all();
    };
    handlers.on_report_ack = [](const v1::ReportAck&) {};
    handlers.on_console = [](const v1::ConsoleData&) {};
    handlers.on_state = [](bool) {};
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
    arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 100);
    session_ = std::make_unique<Session>(
        grpc::CreateCustomChannel(address_, grpc::InsecureChannelCredentials(), arguments),
        std::move(handlers), milliseconds(200));
  }
  void TearDown() override {
    session_.reset();
    batond_.reset();
  }
  static bool IsHello(const v1::AgentMessage& message) { return message.has_hello(); }
  std::pair<v1::Command, uint64_t> NextCommand() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, seconds(20), [&] { return !commands_.empty(); }));
    auto command = commands_.front();
    commands_.pop_front();
    return command;
  }

  const test::TempDir dir_;
  const std::string address_ = "unix:" + dir_ / "batond.sock";
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<v1::Command, uint64_t>> commands_;
  std::unique_ptr<FakeBatond> batond_;
  std::unique_ptr<Session> session_;
};

TEST_F(SessionTest, HelloHeartbeatsCommandsAndResults) {
  EXPECT_EQ(batond_->Next(IsHello).hello().host().name(), "hosts/a");
  batond_->Next([](const auto& m) { return m.has_heartbeat() && m.heartbeat().memory_free() > 0; });
  v1::ServerMessage message;
  message.mutable_command()->set_id(7);
  message.mutable_command()->mutable_stop_vm()->set_vm("vm1");
  batond_->Say(message);
  auto [command, number] = NextCommand();
  EXPECT_EQ(command.stop_vm().vm(), "vm1");
  v1::CommandResult result;
  result.set_id(7);
  session_->Send(result, number);
  EXPECT_EQ(batond_->Next([](const auto& m) { return m.has_result(); }).result().id(), 7u);
}

TEST_F(SessionTest, ComesBackAndDropsResultsOfTheSessionBefore) {
  batond_->Next(IsHello);
  v1::ServerMessage message;
  message.mutable_command()->set_id(7);
  message.mutable_command()->mutable_stop_vm()->set_vm("vm1");
  batond_->Say(message);
  auto [command, old_session] = NextCommand();
  batond_.reset();
  batond_ = std::make_unique<FakeBatond>(address_);
  batond_->Next(IsHello);
  v1::CommandResult stale, fresh;
  stale.set_id(7);
  session_->Send(stale, old_session);
  batond_->Say(message);
  auto [again, new_session] = NextCommand();
  EXPECT_NE(new_session, old_session);
  fresh.set_id(8);
  session_->Send(fresh, new_session);
  // The stale one was sent first and would have come first.
  EXPECT_EQ(batond_->Next([](const auto& m) { return m.has_result(); }).result().id(), 8u);
}

TEST_F(SessionTest, EventsReachBatondInOrder) {
  batond_->Next(IsHello);
  v1::Vm vm;
  vm.set_name("vms/vm1");
  session_->Send(vm);
  session_->SendGone("vm1", "stopped");
  EXPECT_TRUE(batond_->Next([](const auto& m) { return m.has_vm() || m.has_vm_gone(); }).has_vm());
  EXPECT_EQ(batond_->Next([](const auto& m) { return m.has_vm_gone(); }).vm_gone().vm(), "vm1");
  v1::SideReport report;
  report.set_migration_id("m1");
  report.set_done(true);
  session_->Send(report);
  EXPECT_TRUE(batond_->Next([](const auto& m) { return m.has_report(); }).report().done());
}

TEST_F(SessionTest, EndsWhileBatondIsAway) {
  batond_->Next(IsHello);
  batond_.reset();
  session_.reset();  // must not hang
}

class ConsoleTest : public testing::Test {
 protected:
  void SetUp() override {
    paths_.console = dir_ + "/console.sock";
    paths_.console_log = dir_ + "/console.log";
    auto listener = UnixListener::Listen(paths_.console);
    ASSERT_TRUE(listener.ok());
    listener_ = *std::move(listener);
    relay_ = std::make_unique<ConsoleRelay>([this](const v1::ConsoleData& data) {
      std::lock_guard lock(mutex_);
      if (full_ && !data.close()) {
        refused_.insert(data.stream());
        changed_.notify_all();
        return false;
      }
      heard_[data.stream()] += data.data();
      if (data.close()) closed_.insert(data.stream());
      changed_.notify_all();
      return true;
    });
  }
  void TearDown() override {
    relay_.reset();
    listener_.Close();
  }
  UniqueFd AcceptGuest() {
    EXPECT_TRUE(WaitFd(listener_.fd(), 1, Deadline::After(seconds(20)), "accept").ok());
    return *listener_.Accept();
  }
  bool Wait(const std::function<bool()>& condition) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, seconds(20), condition);
  }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  VmPaths paths_;
  UnixListener listener_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, std::string> heard_;
  std::set<uint64_t> closed_;
  bool full_ = false;
  std::set<uint64_t> refused_;
  std::unique_ptr<ConsoleRelay> relay_;
};

TEST_F(ConsoleTest, StreamsShareOneLine) {
  ASSERT_TRUE(WriteFileDurable(paths_.console_log, "earlier\n").ok());
  ASSERT_TRUE(relay_->Open(1, "vm1", paths_).ok());
  ASSERT_TRUE(relay_->Open(2, "vm1", paths_).ok());
  EXPECT_EQ(relay_->Open(2, "vm1", paths_).code(), absl::StatusCode::kAlreadyExists);
  UniqueFd guest = AcceptGuest();
  EXPECT_FALSE(listener_.Accept()->valid());
  ASSERT_EQ(::write(guest.get(), "login:", 6), 6);
  EXPECT_TRUE(Wait([&] { return heard_[1] == "earlier\nlogin:" && heard_[2] == "earlier\nlogin:"; }));
  v1::ConsoleData input;
  input.set_stream(2);
  input.set_data("root\n");
  relay_->OnData(input);
  char buffer[8] = {};
  ASSERT_TRUE(WaitFd(guest.get(), 1, Deadline::After(seconds(20)), "input").ok());
  EXPECT_EQ(::read(guest.get(), buffer, sizeof(buffer)), 5);
  input.clear_data();
  input.set_close(true);
  relay_->OnData(input);
  ASSERT_EQ(::write(guest.get(), "x", 1), 1);
  EXPECT_TRUE(Wait([&] { return heard_[1] == "earlier\nlogin:x"; }));
  EXPECT_EQ(heard_[2], "earlier\nlogin:");
  guest.reset();
  EXPECT_TRUE(Wait([&] { return closed_.count(1) == 1; }));
  EXPECT_EQ(closed_.count(2), 0u);
}

TEST_F(ConsoleTest, SlowStreamLosesOutputAndIsTold) {
  ASSERT_TRUE(relay_->Open(1, "vm1", paths_).ok());
  UniqueFd guest = AcceptGuest();
  {
    std::lock_guard lock(mutex_);
    full_ = true;
  }
  ASSERT_EQ(::write(guest.get(), "lost", 4), 4);
  // Nothing says that it was dropped; the next open stream's output does.
  ASSERT_TRUE(relay_->Open(2, "vm1", paths_).ok());
  EXPECT_TRUE(Wait([&] { return refused_.count(1) == 1; }));
  {
    std::lock_guard lock(mutex_);
    full_ = false;
  }
  ASSERT_EQ(::write(guest.get(), "seen", 4), 4);
  EXPECT_TRUE(Wait([&] { return heard_[1].find("seen") != std::string::npos; }));
  EXPECT_EQ(heard_[1], "\r\n[4 bytes of output lost]\r\nseen");
}

TEST_F(ConsoleTest, NoConsoleIsSaid) {
  VmPaths none = paths_;
  none.console = dir_ + "/none.sock";
  EXPECT_EQ(relay_->Open(1, "vm1", none).code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace baton::daemon
