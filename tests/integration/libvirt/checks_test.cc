// The asking half of the checks, and what is made of the answers, with a real libvirtd and real QEMUs.
#include "agent/vmm/libvirt/checks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <libvirt/libvirt.h>

#include <condition_variable>
#include <fstream>
#include <mutex>

#include "agent/vmm/libvirt/rewrite.h"
#include "tests/integration/libvirt/libvirt_host.h"
#include "tests/temp_dir.h"

namespace baton::vmm {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr char kUuid[] = "4dea22b3-1d52-48f3-a516-782e98ab3fa0";

class LibvirtChecksTest : public testing::Test {
 protected:
  void SetUp() override {
    host_.emplace(dir_ + "/host");
    ASSERT_TRUE(host_->Start().ok());
    LibvirtOptions options;
    options.uri = host_->uri();
    LibvirtCallbacks callbacks;
    callbacks.on_state = [this](bool up, const std::string&) {
      std::lock_guard lock(mutex_);
      up_ = up;
      changed_.notify_all();
    };
    callbacks.on_event = [](const DomainEvent&) {};
    connection_ = LibvirtConnection::Start(options, callbacks);
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, kSoon, [this] { return up_; })) << connection_->trouble();
  }
  void TearDown() override {
    connection_.reset();
    host_->Kill();
  }

  void Image(const std::string& name, const std::string& format) {
    SpawnOptions options;
    options.argv = {"qemu-img", "create", "-q", "-f", format, dir_ + "/" + name, "4M"};
    auto made = RunCommand(options, Deadline::After(kSoon));
    ASSERT_TRUE(made.ok() && made->status.ok()) << made.status();
  }
  static std::string Disk(const std::string& path, const std::string& format, const std::string& target) {
    return "<disk type='file' device='disk'><driver name='qemu' type='" + format + "'/><source file='" +
           path + "'/><target dev='" + target + "' bus='virtio'/></disk>";
  }
  static std::string Xml(const std::string& devices, const std::string& name = "web1",
                         const std::string& uuid = kUuid, const std::string& machine = "q35",
                         const std::string& cpu = "") {
    return "<domain type='qemu'><name>" + name + "</name><uuid>" + uuid +
           "</uuid><memory unit='MiB'>16</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='" + machine +
           "'>hvm</type></os>" + cpu + "<devices>" + devices + "</devices></domain>";
  }
  absl::Status Run(const std::string& what, const std::function<bool(virConnectPtr)>& call) {
    return connection_->Call(
        what, [what, call](virConnectPtr c) { return call(c) ? absl::OkStatus() : LibvirtError(what); },
        Deadline::After(kSoon));
  }
  absl::Status Create(const std::string& xml) {
    return Run("create", [xml](virConnectPtr c) {
      return DomainPtr(virDomainCreateXML(c, xml.c_str(), 0)) != nullptr;
    });
  }
  absl::Status With(const std::function<int(virDomainPtr)>& call) {
    return Run("with", [call](virConnectPtr c) {
      const DomainPtr domain(virDomainLookupByUUIDString(c, kUuid));
      return domain && call(domain.get()) == 0;
    });
  }

  DestinationFacts Look(const std::string& xml) {
    request_.xml = xml;
    request_.domain = ParseDomain(xml).value();
    return GatherDestinationFacts(*connection_, request_, Deadline::After(kSoon));
  }
  static std::string Blockers(const std::vector<v1::Finding>& findings) {
    std::string out;
    for (const v1::Finding& finding : findings) {
      if (finding.severity() == v1::BLOCKER) out += finding.code() + ": " + finding.message() + "\n";
    }
    return out;
  }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  std::optional<LibvirtHost> host_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool up_ = false;
  std::unique_ptr<LibvirtConnection> connection_;
  DestinationRequest request_;
};

TEST_F(LibvirtChecksTest, SourceOfARunningDomain) {
  Image("a.qcow2", "qcow2");
  ASSERT_TRUE(Create(Xml(Disk(dir_ + "/a.qcow2", "qcow2", "vda"))).ok());
  auto facts = GatherSourceFacts(*connection_, kUuid, Deadline::After(kSoon));
  ASSERT_TRUE(facts.ok()) << facts.status();
  EXPECT_EQ(facts->state, VIR_DOMAIN_RUNNING);
  EXPECT_FALSE(facts->persistent);
  EXPECT_THAT(facts->vmm_version, HasSubstr("QEMU "));
  EXPECT_EQ(facts->vmm_trouble, "");
  EXPECT_THAT(facts->xml, HasSubstr("<alias name='virtio-disk0'/>"));
  EXPECT_THAT(facts->migratable_xml, HasSubstr("machine='pc-q35-"));
  ASSERT_EQ(facts->disks.size(), 1u);
  EXPECT_EQ(facts->disks[0].target(), "vda");
  EXPECT_EQ(facts->disks[0].format(), "qcow2");
  EXPECT_EQ(facts->disks[0].capacity(), 4u << 20) << "as the guest sees it";
  const DomainDescription domain = ParseDomain(facts->xml).value();
  EXPECT_EQ(Blockers(JudgeSource(*facts, domain, {})), "");

  ASSERT_TRUE(With(virDomainSuspend).ok());
  facts = GatherSourceFacts(*connection_, kUuid, Deadline::After(kSoon));
  ASSERT_TRUE(facts.ok());
  const auto findings = JudgeSource(*facts, domain, {});
  EXPECT_EQ(Blockers(findings), "");
  ASSERT_FALSE(findings.empty());
  EXPECT_EQ(findings[0].code(), "VM_PAUSED");
  EXPECT_TRUE(absl::IsNotFound(
      GatherSourceFacts(*connection_, "4dea22b3-1d52-48f3-a516-000000000000", Deadline::After(kSoon))
          .status()));
}

TEST_F(LibvirtChecksTest, QemusOwnReasonsAreBlockers) {
  Image("a.vmdk", "vmdk");
  ASSERT_TRUE(Create(Xml(Disk(dir_ + "/a.vmdk", "vmdk", "vda"))).ok());
  auto facts = GatherSourceFacts(*connection_, kUuid, Deadline::After(kSoon));
  ASSERT_TRUE(facts.ok()) << facts.status();
  EXPECT_THAT(Blockers(JudgeSource(*facts, ParseDomain(facts->xml).value(), {})),
              AllOf(HasSubstr("VMM_BLOCKS_MIGRATION"), HasSubstr("vmdk")));
}

TEST_F(LibvirtChecksTest, BlockJobUnderWay_IsSeen) {
  Image("a.raw", "raw");
  ASSERT_TRUE(Create(Xml(Disk(dir_ + "/a.raw", "raw", "vda"))).ok());
  const std::string copy =
      "<disk type='file'><source file='" + dir_ + "/copy.raw'/><driver type='raw'/></disk>";
  absl::Status begun = With([copy](virDomainPtr d) {
    return virDomainBlockCopy(d, "vda", copy.c_str(), nullptr, 0, VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB);
  });
  ASSERT_TRUE(begun.ok()) << begun;
  auto facts = GatherSourceFacts(*connection_, kUuid, Deadline::After(kSoon));
  ASSERT_TRUE(facts.ok());
  EXPECT_THAT(Blockers(JudgeSource(*facts, ParseDomain(facts->xml).value(), {})),
              HasSubstr("BLOCK_JOB_UNDER_WAY"));
}

TEST_F(LibvirtChecksTest, GoodDestination) {
  // What a source of the same machine sends is welcome.
  ASSERT_TRUE(Create(Xml("<interface type='user'><model type='virtio'/></interface>", "web1", kUuid, "q35",
                         "<cpu mode='custom' match='exact'><model>qemu64</model></cpu>"))
                  .ok());
  auto source = GatherSourceFacts(*connection_, kUuid, Deadline::After(kSoon));
  ASSERT_TRUE(source.ok());
  ASSERT_TRUE(With(virDomainDestroy).ok());
  request_.source_vmm_version = source->vmm_version;
  const DestinationFacts facts = Look(source->migratable_xml);
  EXPECT_EQ(facts.libvirt_trouble, "");
  EXPECT_EQ(facts.capabilities_trouble, "");
  EXPECT_EQ(facts.canonical_machine, request_.domain.machine);
  EXPECT_THAT(source->vmm_version, HasSubstr(facts.emulator_version)) << "the same QEMU";
  EXPECT_EQ(facts.cpu_fits, std::optional<bool>(true)) << facts.cpu_trouble;
  EXPECT_EQ(Blockers(JudgeDestination(request_, facts)), "");
}

TEST_F(LibvirtChecksTest, DomainsThatAreHereAlready) {
  const std::string xml = Xml("");
  ASSERT_TRUE(Create(xml).ok());
  EXPECT_THAT(Blockers(JudgeDestination(request_, Look(xml))), HasSubstr("DOMAIN_ACTIVE"));
  EXPECT_THAT(
      Blockers(JudgeDestination(request_, Look(Xml("", "web1", "4dea22b3-1d52-48f3-a516-000000000001")))),
      AllOf(HasSubstr("NAME_IN_USE"), Not(HasSubstr("DOMAIN_ACTIVE"))));
  ASSERT_TRUE(With(virDomainDestroy).ok());
  ASSERT_TRUE(Run("define", [xml](virConnectPtr c) {
                return DomainPtr(virDomainDefineXML(c, xml.c_str())) != nullptr;
              }).ok());
  EXPECT_EQ(Blockers(JudgeDestination(request_, Look(xml))), "") << "defined here from an earlier stay";
  EXPECT_THAT(Blockers(JudgeDestination(request_, Look(Xml("", "web2")))), HasSubstr("UUID_IN_USE"));
}

TEST_F(LibvirtChecksTest, WhatTheHostCannotGive) {
  EXPECT_THAT(Blockers(JudgeDestination(request_, Look(Xml("", "web1", kUuid, "pc-q35-99.9")))),
              AllOf(HasSubstr("VMM_UNUSABLE"), HasSubstr("pc-q35-99.9")));
  EXPECT_THAT(Blockers(JudgeDestination(request_, Look(Xml("<emulator>/opt/no-such-qemu</emulator>")))),
              AllOf(HasSubstr("VMM_UNUSABLE"), HasSubstr("/opt/no-such-qemu")));
  // No QEMU emulates this one without KVM.
  EXPECT_THAT(
      Blockers(JudgeDestination(request_, Look(Xml("", "web1", kUuid, "q35",
                                                   "<cpu mode='custom' match='exact'><model>qemu64</model>"
                                                   "<feature policy='require' name='avx512f'/></cpu>")))),
      AllOf(HasSubstr("CPU_INCOMPATIBLE"), HasSubstr("avx512f")));
  const std::string devices =
      "<interface type='network'><source network='no-net'/></interface>"
      "<interface type='bridge'><source bridge='no-br'/></interface>"
      "<interface type='bridge'><source bridge='lo'/></interface>" +
      Disk(dir_ + "/none/a.raw", "raw", "vda");
  const std::string found = Blockers(JudgeDestination(request_, Look(Xml(devices))));
  EXPECT_THAT(found, HasSubstr("NETWORK_MISSING"));
  EXPECT_THAT(found, HasSubstr("BRIDGE_MISSING"));
  EXPECT_THAT(found, HasSubstr("DISK_NOT_SHARED"));
  EXPECT_THAT(found, Not(HasSubstr("lo:")));
}

TEST_F(LibvirtChecksTest, DisksAsTheyAreHere) {
  Image("a.raw", "raw");
  ASSERT_EQ(::symlink((dir_ + "/a.raw").c_str(), (dir_ + "/link.raw").c_str()), 0);
  const DestinationFacts facts =
      Look(Xml(Disk(dir_ + "/a.raw", "raw", "vda") + Disk(dir_ + "/link.raw", "raw", "vdb") +
               Disk(dir_ + "/new.raw", "raw", "vdc") + Disk(dir_, "raw", "vdd")));
  const DiskFacts& a = facts.disks.at("vda");
  EXPECT_TRUE(a.exists && a.directory && !a.block_device);
  EXPECT_EQ(a.size, 4u << 20);
  EXPECT_GT(a.directory_free, 0u);
  EXPECT_EQ(a.sharing, Sharing::kLocal) << a.filesystem;
  EXPECT_EQ(facts.disks.at("vdb").size, 4u << 20);
  EXPECT_TRUE(!facts.disks.at("vdc").exists && facts.disks.at("vdc").directory);
  EXPECT_NE(facts.disks.at("vdd").trouble, "") << "a directory is no disk";
}

TEST_F(LibvirtChecksTest, BackendsAreAskedWithTheDevicesOfThisHost) {
  std::vector<std::string> asked;
  request_.probe = [&](const DomainDevice& device, Deadline) -> absl::StatusOr<std::vector<v1::Finding>> {
    asked.push_back(device.name + " " + device.source);
    return absl::UnavailableError("nobody listens");
  };
  auto rewritten = RewriteForDestination(
      Xml("<disk type='vhostuser'><source type='unix' path='/run/a/d'/><target dev='vda' "
          "bus='virtio'/></disk>"
          "<interface type='vhostuser'><source type='unix' path='/run/a/n' mode='server'/><target "
          "dev='n'/></interface>"
          "<interface type='vdpa'><source dev='/dev/no-vdpa'/><target dev='v'/></interface>"),
      {{RewriteRule::Kind::kVhostUser, "/run/a", "/run/b"}});
  ASSERT_TRUE(rewritten.ok());
  const std::string found = Blockers(JudgeDestination(request_, Look(rewritten->xml)));
  EXPECT_THAT(asked, testing::ElementsAre("vda /run/b/d")) << "not the one that connects to QEMU";
  EXPECT_THAT(found, HasSubstr("BACKEND_UNREACHABLE: nobody listens"));
  EXPECT_THAT(found, HasSubstr("/dev/no-vdpa"));
}

TEST_F(LibvirtChecksTest, DaemonThatIsGone_IsAFinding) {
  host_->Kill();
  {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, kSoon, [this] { return !up_; }));
  }
  EXPECT_THAT(Blockers(JudgeDestination(request_, Look(Xml("")))), HasSubstr("LIBVIRT_UNREACHABLE"));
  EXPECT_TRUE(absl::IsUnavailable(GatherSourceFacts(*connection_, kUuid, Deadline::After(kSoon)).status()));
}

}  // namespace
}  // namespace baton::vmm
