// A real guest with a vhost-user disk moves between two shims on one machine; the test plays the agents.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <filesystem>
#include <mutex>
#include <thread>

#include "agent/migration/journal.h"
#include "agent/stream/dial.h"
#include "tests/integration/shim/shim_guest.h"

namespace baton::test {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

// The peer port of a host's agent: reads preambles and hands the sockets to the shim.
class PeerPort {
 public:
  PeerPort() : stop_(::eventfd(0, EFD_CLOEXEC)) {
    listener_.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    EXPECT_EQ(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(::listen(listener_.get(), 16), 0);
    EXPECT_EQ(::getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
    address_ = fmt::format("127.0.0.1:{}", ntohs(address.sin_port));
    thread_ = std::thread([this] { Run(); });
  }
  ~PeerPort() {
    uint64_t one = 1;
    (void)!::write(stop_.get(), &one, sizeof(one));
    thread_.join();
  }
  const std::string& address() const { return address_; }
  // Connections go to this host's shim from now on; null: they are closed. What was on its way has arrived.
  void Serve(ShimHost* host) {
    std::lock_guard lock(mutex_);
    host_ = host;
  }

 private:
  void Run() {
    for (;;) {
      pollfd items[2] = {{listener_.get(), POLLIN, 0}, {stop_.get(), POLLIN, 0}};
      if (::poll(items, 2, -1) < 0) continue;
      if (items[1].revents != 0) return;
      UniqueFd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
      auto preamble = stream::ReadPreamble(fd.get(), Deadline::After(seconds(5)));
      if (!preamble.ok()) continue;
      v1::ShimRequest request;
      request.mutable_accept_channel()->set_preamble(preamble->data(), preamble->size());
      std::lock_guard lock(mutex_);
      if (host_ != nullptr) (void)host_->Call(request, seconds(20), fd.get());
    }
  }
  UniqueFd stop_, listener_;
  std::string address_;
  std::mutex mutex_;
  ShimHost* host_ = nullptr;  // guarded by mutex_
  std::thread thread_;
};

class MigrationTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(HaveQemuAndQsd()) << "deps/packages.txt names the peers that tests need";
    image_ = dirs_.dir() + "/disk.img";
    ASSERT_TRUE(MakeImage(image_, 16u << 20).ok());
    auto spec = LabSpec("g", true, "lab.report=50 lab.writers=1 lab.dirty=2000");
    ASSERT_TRUE(spec.ok()) << spec.status();
    spec_ = *spec;
    params_.set_tls(false);
    params_.set_channels(2);
    params_.mutable_drain_timeout()->set_seconds(5);
    a_ = std::make_unique<ShimHost>(dirs_, "a");
    b_ = std::make_unique<ShimHost>(dirs_, "b");
    ASSERT_TRUE(a_->StartDisk(image_).ok());
    ASSERT_TRUE(b_->StartDisk(image_).ok());
  }
  void TearDown() override {
    if (HasFailure()) {
      for (ShimHost* host : {a_.get(), b_.get()}) {
        if (host) ADD_FAILURE() << "shim log:\n" << host->ShimLog();
      }
    }
    port_.Serve(nullptr);
  }

  void BootAt(ShimHost& host, const std::string& pause_at = "") {
    v1::ShimConfig config = host.MakeConfig(spec_, v1::ShimConfig::FRESH);
    UseTls(config);
    absl::Status status = host.StartShim(config, pause_at);
    ASSERT_TRUE(status.ok()) << status;
    auto ready = host.console.out.WaitFor("READY", Boot());
    ASSERT_TRUE(ready.ok()) << ready.status();
    ExpectWrites(host);
  }
  // After its check it goes on, so that it can move again.
  void ExpectChecked(ShimHost& host) {
    test::ExpectChecked(host);
    ASSERT_TRUE(host.console.Ask("g", "GO", Soon()).ok());
  }
  void UseTls(v1::ShimConfig& config) {
    if (certs_.empty()) return;
    config.set_tls_ca(certs_ + "/ca.pem");
    config.set_tls_cert(certs_ + "/host-lab.pem");
    config.set_tls_key(certs_ + "/host-lab.key");
  }
  void MakeCertificates() {
    certs_ = dirs_.dir() + "/certs";
    for (const std::vector<std::string>& words :
         {std::vector<std::string>{certs_, "ca"}, {certs_, "host", "lab", "127.0.0.1"}}) {
      SpawnOptions options;
      options.argv = {std::string(BATON_SOURCE_DIR) + "/deploy/certs/make-certs.sh"};
      options.argv.insert(options.argv.end(), words.begin(), words.end());
      auto made = RunCommand(options, Soon());
      ASSERT_TRUE(made.ok() && made->status.ok()) << (made.ok() ? made->err : made.status().ToString());
    }
  }
  absl::StatusOr<v1::Inspection> Inspect(ShimHost& host, Duration sample = Duration(0)) {
    v1::ShimRequest request;
    request.mutable_inspect()->set_vm("g");
    request.mutable_inspect()->mutable_dirty_sample()->set_nanos(static_cast<int32_t>(sample.count()));
    ASSIGN_OR_RETURN(v1::ShimReply reply, host.Call(request));
    return reply.inspection();
  }
  // PREPARING: the destination's shim and VMM wait.
  void Prepare(ShimHost& from, ShimHost& to, const std::string& id, const std::string& pause_at = "") {
    auto inspection = Inspect(from);
    ASSERT_TRUE(inspection.ok()) << inspection.status();
    ASSERT_EQ(inspection->findings_size(), 0) << inspection->ShortDebugString();
    v1::ShimConfig config = to.MakeConfig(spec_, v1::ShimConfig::INCOMING_VM);
    UseTls(config);
    config.set_migration_id(id);
    config.set_token(token_);
    config.set_epoch(inspection->epoch());
    *config.mutable_source() = *inspection;
    *config.mutable_params() = params_;
    absl::Status status = to.StartShim(config, pause_at);
    ASSERT_TRUE(status.ok()) << status;
    auto ready = to.WaitStatus(
        [](const v1::ShimStatus& s) { return s.incoming_ready() || s.vm().state() == v1::Vm::STOPPED; },
        Soon());
    ASSERT_TRUE(ready.ok() && ready->incoming_ready()) << ready.status();
    port_.Serve(&to);
    epoch_ = inspection->epoch();
  }
  absl::Status StartOutgoing(ShimHost& from, const std::string& id) {
    v1::ShimRequest request;
    v1::StartOutgoingCommand* start = request.mutable_start_outgoing();
    start->set_migration_id(id);
    start->set_vm("g");
    start->set_peer_address(port_.address());
    start->set_token(token_);
    *start->mutable_params() = params_;
    start->set_epoch(epoch_);
    return from.Call(request).status();
  }
  static absl::StatusOr<v1::SideReport> WaitDone(ShimHost& host, const std::string& id) {
    return host.WaitReport([&](const v1::SideReport& r) { return r.migration_id() == id && r.done(); },
                           Soon());
  }
  // Boots a guest at a_ and starts its migration "m" to b_, whose source waits at `point`.
  void MoveUntil(const std::string& point) {
    BootAt(*a_, point);
    if (HasFatalFailure()) return;
    Prepare(*a_, *b_, "m");
    if (HasFatalFailure()) return;
    absl::Status started = StartOutgoing(*a_, "m");
    ASSERT_TRUE(started.ok()) << started;
    absl::Status paused = a_->WaitPause(point, Soon());
    ASSERT_TRUE(paused.ok()) << paused;
  }
  // The whole way; afterwards the guest runs at `to`, and the shim of `from` has left.
  void Move(ShimHost& from, ShimHost& to, const std::string& id) {
    Prepare(from, to, id);
    if (HasFatalFailure()) return;
    absl::Status started = StartOutgoing(from, id);
    ASSERT_TRUE(started.ok()) << started;
    auto source = WaitDone(from, id);
    ASSERT_TRUE(source.ok()) << source.status();
    EXPECT_EQ(source->phase(), v1::SUCCEEDED) << source->ShortDebugString();
    EXPECT_EQ(source->handover(), v1::RELEASED);
    auto destination = WaitDone(to, id);
    ASSERT_TRUE(destination.ok()) << destination.status();
    EXPECT_EQ(destination->handover(), v1::OWNER) << destination->ShortDebugString();
    EXPECT_TRUE(destination->guest_running());
    auto running = to.WaitState(v1::Vm::RUNNING, Soon());
    ASSERT_TRUE(running.ok()) << running.status();
    EXPECT_EQ(running->vm().epoch(), epoch_ + 1);
    std::string parts;
    for (const auto& part : source->progress().downtimes().parts()) {
      parts += fmt::format("{} {} us, ", part.name(),
                           part.duration().seconds() * 1000000 + part.duration().nanos() / 1000);
    }
    fmt::print("{}: vcpu {} us; {}\n", id, source->progress().downtimes().vcpu().nanos() / 1000, parts);
    ASSERT_TRUE(from.WaitState(v1::Vm::STOPPED, Soon()).ok());
    EXPECT_FALSE(std::filesystem::exists(from.memory_path()));
    v1::ShimRequest retire;
    retire.mutable_retire();
    auto retired = from.Call(retire);
    ASSERT_TRUE(retired.ok()) << retired.status();
    ASSERT_TRUE(from.WaitShimExit(Soon()).ok());
  }
  static bool QemuAlive(const ShimHost& host) {
    auto config = host.ReadConfig();
    return config.ok() && ProcessAlive({static_cast<pid_t>(config->vmm_pid()), config->vmm_start_time()});
  }

  TempDirs dirs_;
  std::string image_, certs_;
  v1::VmSpec spec_;
  v1::MigrationParams params_;
  std::string token_ = std::string(32, 't');
  uint64_t epoch_ = 0;
  PeerPort port_;
  std::unique_ptr<ShimHost> a_, b_;
};

TEST_F(MigrationTest, ThereAndBack_Plaintext) {
  BootAt(*a_);
  if (HasFatalFailure()) return;
  Move(*a_, *b_, "there");
  if (HasFatalFailure()) return;
  ExpectWrites(*b_);
  ExpectChecked(*b_);
  // What the source host kept of the VM is removed by its agent.
  std::filesystem::remove_all(a_->state_dir() + "/journal");
  Move(*b_, *a_, "back");
  if (HasFatalFailure()) return;
  ExpectWrites(*a_);
  ExpectChecked(*a_);
}

TEST_F(MigrationTest, Tls) {
  MakeCertificates();
  if (HasFatalFailure()) return;
  params_.set_tls(true);
  BootAt(*a_);
  if (HasFatalFailure()) return;
  Move(*a_, *b_, "tls");
  if (HasFatalFailure()) return;
  ExpectWrites(*b_);
  ExpectChecked(*b_);
}

TEST_F(MigrationTest, Inspect_MeasuresTheDirtyRate) {
  BootAt(*a_);
  if (HasFatalFailure()) return;
  auto inspection = Inspect(*a_, milliseconds(900));
  ASSERT_TRUE(inspection.ok()) << inspection.status();
  EXPECT_EQ(inspection->findings_size(), 0) << inspection->ShortDebugString();
  EXPECT_GT(inspection->dirty_rate(), 0u);
  EXPECT_GT(inspection->memory_used(), 10u << 20);
  EXPECT_LE(inspection->memory_used(), spec_.memory_bytes());
  ASSERT_EQ(inspection->blocks_size(), 1);
  EXPECT_EQ(inspection->blocks(0).size(), spec_.memory_bytes());
  EXPECT_THAT(inspection->vmm_version(), HasSubstr("QEMU emulator version"));
  ExpectWrites(*a_);
}

TEST_F(MigrationTest, Cancel_InPrecopy_GuestGoesOnAndTheNextAttemptWorks) {
  BootAt(*a_, "precopy");
  if (HasFatalFailure()) return;
  Prepare(*a_, *b_, "first");
  if (HasFatalFailure()) return;
  ASSERT_TRUE(StartOutgoing(*a_, "first").ok());
  absl::Status paused = a_->WaitPause("precopy", Soon());
  ASSERT_TRUE(paused.ok()) << paused;
  v1::ShimRequest cancel;
  cancel.mutable_cancel()->set_migration_id("first");
  ASSERT_TRUE(a_->Call(cancel).ok());
  a_->Continue("precopy");
  auto source = WaitDone(*a_, "first");
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ(source->phase(), v1::CANCELLED) << source->ShortDebugString();
  EXPECT_TRUE(source->guest_running());
  auto destination = WaitDone(*b_, "first");
  ASSERT_TRUE(destination.ok()) << destination.status();
  EXPECT_EQ(destination->handover(), v1::REFUSED);
  EXPECT_FALSE(QemuAlive(*b_));
  ExpectWrites(*a_);
  b_->KillShim();
  std::filesystem::remove_all(b_->state_dir() + "/journal");

  Prepare(*a_, *b_, "second");
  if (HasFatalFailure()) return;
  ASSERT_TRUE(StartOutgoing(*a_, "second").ok());
  ASSERT_TRUE(a_->WaitPause("precopy", Soon()).ok());
  a_->Continue("precopy");
  auto done = WaitDone(*a_, "second");
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(done->phase(), v1::SUCCEEDED) << done->ShortDebugString();
  ExpectWrites(*b_);
  ExpectChecked(*b_);
}

TEST_F(MigrationTest, SilentBackend_DrainTimesOutAndTheGuestGoesOn) {
  BootAt(*a_, "precopy");
  if (HasFatalFailure()) return;
  params_.mutable_drain_timeout()->set_seconds(1);
  Prepare(*a_, *b_, "drain");
  if (HasFatalFailure()) return;
  ASSERT_TRUE(StartOutgoing(*a_, "drain").ok());
  ASSERT_TRUE(a_->WaitPause("precopy", Soon()).ok());
  a_->disk().Signal(SIGSTOP);
  a_->Continue("precopy");
  auto source = WaitDone(*a_, "drain");
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ(source->phase(), v1::FAILED) << source->ShortDebugString();
  EXPECT_EQ(source->reason(), v1::DRAIN_TIMEOUT) << source->ShortDebugString();
  EXPECT_TRUE(source->guest_running());
  a_->disk().Signal(SIGCONT);
  ExpectWrites(*a_);
  ExpectChecked(*a_);
  auto destination = WaitDone(*b_, "drain");
  ASSERT_TRUE(destination.ok()) << destination.status();
  EXPECT_EQ(destination->handover(), v1::REFUSED);
  EXPECT_FALSE(QemuAlive(*b_));
}

TEST_F(MigrationTest, SourceShimKilledInPrecopy_IsAdoptedAndSaysSo) {
  MoveUntil("precopy");
  if (HasFatalFailure()) return;
  a_->KillShim();
  auto destination = WaitDone(*b_, "m");
  ASSERT_TRUE(destination.ok()) << destination.status();
  EXPECT_EQ(destination->handover(), v1::REFUSED);
  absl::Status status = a_->StartShimAgain(v1::ShimConfig::ADOPT);
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_TRUE(a_->WaitState(v1::Vm::RUNNING, Soon()).ok());
  auto source = WaitDone(*a_, "m");
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ(source->reason(), v1::SOURCE_SHIM_FAILED);
  ExpectWrites(*a_);
  ExpectChecked(*a_);
}

TEST_F(MigrationTest, SourceShimKilledWhenYielded_NextShimHearsTheVerdict) {
  MoveUntil("yielded");
  if (HasFatalFailure()) return;
  a_->KillShim();
  a_->Continue("yielded");
  auto destination = WaitDone(*b_, "m");
  ASSERT_TRUE(destination.ok()) << destination.status();
  EXPECT_EQ(destination->handover(), v1::REFUSED);
  // The guest must not run before the destination has been heard.
  absl::Status status = a_->StartShimAgain(v1::ShimConfig::ADOPT);
  ASSERT_TRUE(status.ok()) << status;
  auto source = WaitDone(*a_, "m");
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ(source->handover(), v1::REFUSED) << source->ShortDebugString();
  EXPECT_TRUE(source->guest_running()) << source->ShortDebugString();
  ExpectWrites(*a_);
  ExpectChecked(*a_);
}

TEST_F(MigrationTest, DestinationShimKilledAfterOwner_NextShimStartsTheGuest) {
  BootAt(*a_);
  if (HasFatalFailure()) return;
  Prepare(*a_, *b_, "m", "owner");
  if (HasFatalFailure()) return;
  ASSERT_TRUE(StartOutgoing(*a_, "m").ok());
  absl::Status paused = b_->WaitPause("owner", Soon());
  ASSERT_TRUE(paused.ok()) << paused;
  port_.Serve(nullptr);
  b_->KillShim();
  b_->Continue("owner");
  absl::Status status = b_->StartShimAgain(v1::ShimConfig::ADOPT);
  ASSERT_TRUE(status.ok()) << status;
  port_.Serve(b_.get());
  ASSERT_TRUE(b_->WaitState(v1::Vm::RUNNING, Soon()).ok());
  auto source = WaitDone(*a_, "m");
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_EQ(source->handover(), v1::RELEASED) << source->ShortDebugString();
  EXPECT_FALSE(QemuAlive(*a_));
  ExpectWrites(*b_);
  ExpectChecked(*b_);
}

TEST_F(MigrationTest, DestinationQemuKilled_GuestGoesOnAtTheSource) {
  MoveUntil("precopy");
  if (HasFatalFailure()) return;
  ::kill(static_cast<pid_t>(b_->ReadConfig()->vmm_pid()), SIGKILL);
  auto destination = WaitDone(*b_, "m");
  ASSERT_TRUE(destination.ok()) << destination.status();
  EXPECT_EQ(destination->handover(), v1::REFUSED);
  a_->Continue("precopy");
  auto source = WaitDone(*a_, "m");
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_TRUE(source->guest_running());
  ExpectWrites(*a_);
  ExpectChecked(*a_);
}

TEST_F(MigrationTest, SourceQemuKilledInPrecopy_IsReportedAsLost) {
  MoveUntil("precopy");
  if (HasFatalFailure()) return;
  ::kill(static_cast<pid_t>(a_->ReadConfig()->vmm_pid()), SIGKILL);
  a_->Continue("precopy");
  auto source = WaitDone(*a_, "m");
  ASSERT_TRUE(source.ok()) << source.status();
  EXPECT_TRUE(source->guest_lost()) << source->ShortDebugString();
  EXPECT_EQ(source->reason(), v1::SOURCE_VMM_FAILED) << source->ShortDebugString();
  ASSERT_TRUE(a_->WaitState(v1::Vm::STOPPED, Soon()).ok());
  auto destination = WaitDone(*b_, "m");
  ASSERT_TRUE(destination.ok()) << destination.status();
  EXPECT_EQ(destination->handover(), v1::REFUSED);
}

TEST_F(MigrationTest, AbortIncoming_RefusesAndLeaves) {
  BootAt(*a_);
  if (HasFatalFailure()) return;
  Prepare(*a_, *b_, "m");
  if (HasFatalFailure()) return;
  v1::ShimRequest request;
  request.mutable_abort_incoming()->set_migration_id("m");
  auto aborted = b_->Call(request);
  ASSERT_TRUE(aborted.ok()) << aborted.status();
  ASSERT_TRUE(b_->WaitShimExit(Soon()).ok());
  auto records = migration::Journal::Read(b_->state_dir() + "/journal");
  ASSERT_TRUE(records.ok());
  ASSERT_FALSE(records->empty());
  EXPECT_EQ(records->back().kind, migration::JournalRecord::Kind::kRefused);
  EXPECT_FALSE(std::filesystem::exists(b_->memory_path()));
  EXPECT_FALSE(QemuAlive(*b_));
}

}  // namespace
}  // namespace baton::test
