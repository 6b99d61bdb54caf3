// Real libvirt daemons and QEMUs that move a domain through the tunnel: peer-to-peer, with several channels,
// with disks, in plaintext and with TLS. The sockets have one name on both hosts, each of which has a /run of
// its own.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <libvirt/libvirt.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <random>
#include <thread>

#include "agent/stream/tunnel.h"
#include "agent/vmm/libvirt/checks.h"
#include "agent/vmm/libvirt/connection.h"
#include "agent/vmm/libvirt/settlement.h"
#include "tests/integration/libvirt/libvirt_host.h"
#include "tests/temp_dir.h"

namespace baton::vmm {
namespace {

using std::chrono::seconds;
using stream::TunnelService;

constexpr char kUuid[] = "4dea22b3-1d52-48f3-a516-782e98ab3fa0";
constexpr char kTunnelDir[] = "/run/baton-tunnel";
constexpr size_t kDiskBytes = 8u << 20;
// A domain of QEMU's emulation beside others on a busy machine.
constexpr auto kMove = seconds(180);

// A host with its daemon, and our connection to it.
class Side {
 public:
  Side(const std::string& dir, const std::string& name) : dir_(dir + "/" + name), host_(dir_) {}

  void Start() {
    ASSERT_TRUE(host_.Start().ok());
    LibvirtOptions options;
    options.uri = host_.uri();
    LibvirtCallbacks callbacks;
    callbacks.on_state = [this](bool up, const std::string&) {
      std::lock_guard lock(mutex_);
      up_ = up;
      changed_.notify_all();
    };
    callbacks.on_event = [this](const DomainEvent&) {
      std::lock_guard lock(mutex_);
      ++events_;
      changed_.notify_all();
    };
    libvirt_ = LibvirtConnection::Start(options, callbacks);
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, kSoon, [this] { return up_; })) << libvirt_->trouble();
    std::filesystem::create_directories(dir_ + "/run/baton-tunnel");
    std::filesystem::create_directories(dir_ + "/lib/images");
  }
  void Stop() {
    libvirt_.reset();
    host_.Kill();
  }
  // A path of the host's /run, and the directory that it sees as /var/lib/libvirt, from outside.
  std::string run(const std::string& path) const { return dir_ + "/run/" + path; }
  std::string lib() const { return dir_ + "/lib"; }
  LibvirtConnection& libvirt() { return *libvirt_; }

  SideView Look(MigrationRole role) {
    auto state = CallFor<std::pair<int, int>>(
        *libvirt_, "state",
        [](virConnectPtr c) -> absl::StatusOr<std::pair<int, int>> {
          const DomainPtr domain(virDomainLookupByUUIDString(c, kUuid));
          if (!domain) return LibvirtError("domain");
          std::pair<int, int> out;
          if (virDomainGetState(domain.get(), &out.first, &out.second, 0) != 0) return LibvirtError("state");
          return out;
        },
        Deadline::After(kSoon));
    SideView view;
    view.condition = state.ok()                         ? ConditionOf(state->first, state->second, role)
                     : absl::IsNotFound(state.status()) ? DomainCondition::kAbsent
                                                        : DomainCondition::kUnreachable;
    return view;
  }

  // The domain is not, or no longer, here.
  bool AwaitGone() {
    const Deadline deadline = Deadline::After(kSoon);
    for (;;) {
      std::unique_lock lock(mutex_);
      const int seen = events_;
      lock.unlock();
      if (Look(MigrationRole::kDestination).condition == DomainCondition::kAbsent) return true;
      lock.lock();
      if (!changed_.wait_until(lock, deadline.when(), [&] { return events_ != seen; })) return false;
    }
  }

 private:
  const std::string dir_;
  LibvirtHost host_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool up_ = false;
  int events_ = 0;
  std::unique_ptr<LibvirtConnection> libvirt_;
};

class TunnelMigrationTest : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    a_.emplace(dir_, "a");
    b_.emplace(dir_, "b");
    ASSERT_NO_FATAL_FAILURE(a_->Start());
    ASSERT_NO_FATAL_FAILURE(b_->Start());
    if (GetParam()) {
      ASSERT_NO_FATAL_FAILURE(MakeCertificates());
    }
    ASSERT_NO_FATAL_FAILURE(OpenPort());
    exit_options_.paths = {{TunnelService::kLibvirt, b_->run("libvirt/libvirt-sock")},
                           {TunnelService::kVmm, b_->run("baton-tunnel/vmm")},
                           {TunnelService::kNbd, b_->run("baton-tunnel/nbd")}};
  }
  void TearDown() override {
    a_->Stop();
    b_->Stop();
    entrance_.reset();
    ::shutdown(port_.get(), SHUT_RDWR);
    if (hands_.joinable()) hands_.join();
    exit_.reset();
  }

  void MakeCertificates() {
    std::ofstream(dir_ + "/ext") << "subjectAltName=IP:127.0.0.1\n";
    const std::string key = " -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes ";
    const std::string make = fmt::format(
        "cd {} && openssl req -x509 {} -days 2 -subj /CN=ca -keyout ca.key -out ca.pem && openssl req {} "
        "-subj /CN=h "
        "-keyout h.key -out h.csr && openssl x509 -req -in h.csr -CA ca.pem -CAkey ca.key -CAcreateserial "
        "-extfile ext -days 2 -out h.pem",
        dir_, key, key);
    ASSERT_EQ(std::system(("(" + make + ") >/dev/null 2>&1").c_str()), 0);
    auto loaded = stream::TlsContext::Load(dir_ + "/ca.pem", dir_ + "/h.pem", dir_ + "/h.key");
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    tls_ = *loaded;
  }
  void OpenPort() {
    port_.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ASSERT_EQ(::bind(port_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    ASSERT_EQ(::listen(port_.get(), 64), 0);
    socklen_t length = sizeof address;
    ASSERT_EQ(::getsockname(port_.get(), reinterpret_cast<sockaddr*>(&address), &length), 0);
    address_ = fmt::format("127.0.0.1:{}", ntohs(address.sin_port));
  }
  // Both ends, and what stands for the agent's peer port between them.
  void StartTunnel() {
    exit_.emplace(exit_options_);
    hands_ = std::thread([this] {
      for (;;) {
        UniqueFd socket(::accept4(port_.get(), nullptr, nullptr, SOCK_CLOEXEC));
        if (!socket) return;
        auto bytes = stream::ReadPreamble(socket.get(), Deadline::After(kSoon));
        auto preamble = bytes.ok() ? stream::DecodePreamble(*bytes) : bytes.status();
        if (!preamble.ok()) continue;
        exit_->Accept(std::move(socket), preamble->channel, tls_);
      }
    });
    stream::TunnelEntranceOptions options;
    for (TunnelService service : stream::kTunnelServices)
      options.listen.push_back({service, a_->run("baton-tunnel/") + NameOf(service)});
    options.dial.address = address_;
    options.dial.migration_id = "m1";
    options.dial.tls = tls_;
    options.callbacks.on_broken = [this](TunnelService service, const absl::Status& why) {
      std::lock_guard lock(mutex_);
      broken_ += fmt::format("{}: {}\n", NameOf(service), Message(why));
      changed_.notify_all();
    };
    auto entrance = stream::TunnelEntrance::Start(options);
    ASSERT_TRUE(entrance.ok()) << entrance.status();
    entrance_ = *std::move(entrance);
  }

  void Create(const std::string& devices = "") {
    const std::string xml = fmt::format(
        "<domain type='qemu'><name>web1</name><uuid>{}</uuid><memory unit='MiB'>32</memory><vcpu>1</vcpu><os>"
        "<type arch='x86_64' machine='q35'>hvm</type></os><devices>{}</devices></domain>",
        kUuid, devices);
    absl::Status created = a_->libvirt().Call(
        "create",
        [xml](virConnectPtr c) {
          return DomainPtr(virDomainCreateXML(c, xml.c_str(), 0)) ? absl::OkStatus() : LibvirtError("create");
        },
        Deadline::After(kSoon));
    ASSERT_TRUE(created.ok()) << created;
  }
  // Peer to peer, as the source's shim asks for it.
  absl::Status Migrate(unsigned flags, int channels, uint64_t mib_per_second = 0) {
    return a_->libvirt().Call(
        "migrate",
        [flags, channels, mib_per_second](virConnectPtr c) {
          const DomainPtr domain(virDomainLookupByUUIDString(c, kUuid));
          if (!domain) return LibvirtError("domain");
          virTypedParameterPtr params = nullptr;
          int count = 0, room = 0;
          const auto add = [&](const char* name, const std::string& value) {
            virTypedParamsAddString(&params, &count, &room, name, value.c_str());
          };
          add(VIR_MIGRATE_PARAM_URI, fmt::format("unix://{}/vmm", kTunnelDir));
          if (flags & VIR_MIGRATE_NON_SHARED_DISK)
            add(VIR_MIGRATE_PARAM_DISKS_URI, fmt::format("unix://{}/nbd", kTunnelDir));
          if (channels > 0)
            virTypedParamsAddInt(&params, &count, &room, VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS, channels);
          if (mib_per_second > 0)
            virTypedParamsAddULLong(&params, &count, &room, VIR_MIGRATE_PARAM_BANDWIDTH, mib_per_second);
          const std::string uri = fmt::format("qemu+unix:///system?socket={}/libvirt", kTunnelDir);
          const int moved =
              virDomainMigrateToURI3(domain.get(), uri.c_str(), params, static_cast<unsigned>(count),
                                     VIR_MIGRATE_LIVE | VIR_MIGRATE_PEER2PEER | flags);
          absl::Status status = moved == 0 ? absl::OkStatus() : LibvirtError("migrate");
          virTypedParamsFree(params, count);
          return status;
        },
        Deadline::After(kMove));
  }
  Settlement Observe(bool handed_over) {
    SettlementInput in;
    in.source = a_->Look(MigrationRole::kSource);
    in.destination = b_->Look(MigrationRole::kDestination);
    in.handed_over = handed_over;
    return Settle(in);
  }
  std::string broken() {
    std::lock_guard lock(mutex_);
    return broken_;
  }
  // libvirt may hear of a connection's end before the test does.
  bool AwaitBroken(const std::string& text) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kSoon, [&] { return broken_.find(text) != std::string::npos; });
  }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  std::string address_;
  std::optional<Side> a_, b_;
  std::shared_ptr<const stream::TlsContext> tls_;
  UniqueFd port_;
  stream::TunnelExitOptions exit_options_;
  std::optional<stream::TunnelExit> exit_;
  std::unique_ptr<stream::TunnelEntrance> entrance_;
  std::thread hands_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string broken_;  // guarded by mutex_
};

INSTANTIATE_TEST_SUITE_P(, TunnelMigrationTest, testing::Bool(),
                         [](const auto& with) { return with.param ? "Tls" : "Plain"; });

TEST_P(TunnelMigrationTest, ADomainMovesWithOneChannel) {
  ASSERT_NO_FATAL_FAILURE(StartTunnel());
  ASSERT_NO_FATAL_FAILURE(Create());
  absl::Status moved = Migrate(0, 0);
  ASSERT_TRUE(moved.ok()) << moved << broken();
  const Settlement end = Observe(true);
  EXPECT_EQ(end.location, v1::DESTINATION) << end.why;
  EXPECT_EQ(end.action, SettlementAction::kNothing) << end.why;
  EXPECT_EQ(entrance_->counts(TunnelService::kVmm).opened, 1u);
  EXPECT_GT(entrance_->counts(TunnelService::kVmm).to_peer, 100'000u);
  EXPECT_GE(entrance_->counts(TunnelService::kLibvirt).opened, 1u);
  EXPECT_EQ(entrance_->counts(TunnelService::kVmm).broken, 0u) << broken();
}

TEST_P(TunnelMigrationTest, ADomainMovesWithEightChannels) {
  ASSERT_NO_FATAL_FAILURE(StartTunnel());
  ASSERT_NO_FATAL_FAILURE(Create());
  absl::Status moved = Migrate(VIR_MIGRATE_PARALLEL, 8);
  ASSERT_TRUE(moved.ok()) << moved << broken();
  const Settlement end = Observe(true);
  EXPECT_EQ(end.location, v1::DESTINATION) << end.why;
  EXPECT_EQ(entrance_->counts(TunnelService::kVmm).opened, 9u) << "the main channel and eight";
}

TEST_P(TunnelMigrationTest, ADisksContentMovesWithIt) {
  std::string content(kDiskBytes, '\0');
  std::minstd_rand random(1);
  for (char& c : content) c = static_cast<char>(random() >> 8);
  std::ofstream(a_->lib() + "/images/vda", std::ios::binary) << content;
  std::ofstream(b_->lib() + "/images/vda", std::ios::binary) << std::string(kDiskBytes, 'x');
  ASSERT_NO_FATAL_FAILURE(StartTunnel());
  ASSERT_NO_FATAL_FAILURE(
      Create("<disk type='file' device='disk'><driver name='qemu' type='raw'/><source "
             "file='/var/lib/libvirt/images/vda'/><target dev='vda' bus='virtio'/></disk>"));
  absl::Status moved = Migrate(VIR_MIGRATE_NON_SHARED_DISK, 0);
  ASSERT_TRUE(moved.ok()) << moved << broken();
  EXPECT_EQ(Observe(true).location, v1::DESTINATION);
  EXPECT_GE(entrance_->counts(TunnelService::kNbd).to_peer, kDiskBytes);
  std::ifstream copy(b_->lib() + "/images/vda", std::ios::binary);
  const std::string copied{std::istreambuf_iterator<char>(copy), {}};
  EXPECT_EQ(copied == content, true);
}

TEST_P(TunnelMigrationTest, StreamThatIsRefused_LeavesTheGuestAtItsSource) {
  exit_options_.paths.erase(TunnelService::kVmm);
  ASSERT_NO_FATAL_FAILURE(StartTunnel());
  ASSERT_NO_FATAL_FAILURE(Create());
  EXPECT_FALSE(Migrate(0, 0).ok());
  EXPECT_TRUE(AwaitBroken("vmm is not served here")) << broken();
  const Settlement end = Observe(false);
  EXPECT_EQ(end.location, v1::SOURCE) << end.why;
  EXPECT_EQ(end.action, SettlementAction::kNothing) << end.why;
}

TEST_P(TunnelMigrationTest, TunnelThatEndsUnderAMigration_LeavesTheGuestAtItsSource) {
  ASSERT_NO_FATAL_FAILURE(StartTunnel());
  ASSERT_NO_FATAL_FAILURE(Create());
  std::thread cutter([this] {
    // As soon as the stream is there. At 1 MiB/s the firmware alone takes far longer than that.
    const Deadline deadline = Deadline::After(kMove);
    while (entrance_->counts(TunnelService::kVmm).to_peer == 0 && !deadline.Expired())
      std::this_thread::yield();
    exit_->Stop();
  });
  absl::Status moved = Migrate(0, 0, 1);
  cutter.join();
  EXPECT_FALSE(moved.ok());
  // The destination's daemon notices by itself that its client is gone.
  EXPECT_TRUE(b_->AwaitGone());
  const Settlement end = Observe(false);
  EXPECT_EQ(end.location, v1::SOURCE) << end.why << moved;
  EXPECT_EQ(end.action, SettlementAction::kNothing) << end.why;
}

// A domain while it is on its way.
class IncomingDomainTest : public TunnelMigrationTest {};
INSTANTIATE_TEST_SUITE_P(, IncomingDomainTest, testing::Values(false),
                         [](const auto&) { return std::string("Plain"); });

TEST_P(IncomingDomainTest, IsNoSourceYet) {
  ASSERT_NO_FATAL_FAILURE(StartTunnel());
  ASSERT_NO_FATAL_FAILURE(Create());
  absl::StatusOr<SourceFacts> facts = absl::UnavailableError("nothing came");
  std::thread asks([&] {
    // At 1 MiB/s the firmware alone takes far longer than the questions.
    const Deadline deadline = Deadline::After(kMove);
    while (entrance_->counts(TunnelService::kVmm).to_peer == 0 && !deadline.Expired())
      std::this_thread::yield();
    facts = GatherSourceFacts(b_->libvirt(), kUuid, Deadline::After(kSoon));
    exit_->Stop();
  });
  absl::Status moved = Migrate(0, 0, 1);
  asks.join();
  EXPECT_FALSE(moved.ok()) << "it was over before it was asked about";
  ASSERT_TRUE(facts.ok()) << facts.status();
  EXPECT_TRUE(facts->incoming);
  EXPECT_EQ(facts->job, "") << "libvirt gives no figures of it";
  auto domain = ParseDomain(facts->xml);
  ASSERT_TRUE(domain.ok()) << domain.status();
  const auto findings = JudgeSource(*facts, *domain, v1::MigrationParams());
  ASSERT_FALSE(findings.empty());
  EXPECT_EQ(findings[0].code(), "VM_IN_MIGRATION") << findings[0].message();
  EXPECT_TRUE(b_->AwaitGone());
}

}  // namespace
}  // namespace baton::vmm
