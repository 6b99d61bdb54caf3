// The judging half of the checks: what is said of which facts.
#include "agent/vmm/libvirt/checks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <libvirt/libvirt.h>

#include "agent/vmm/libvirt/domain_needs.h"

namespace baton::vmm {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr char kXml[] = R"(
<domain type='qemu'>
  <name>web1</name><uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid>
  <memory unit='MiB'>512</memory><vcpu>2</vcpu>
  <memoryBacking><access mode='shared'/></memoryBacking>
  <cpu mode='custom' match='exact'><model>Nehalem</model><feature policy='require' name='aes'/></cpu>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='/img/root'/><target dev='vda' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/><source dev='/dev/vg/data'/><target dev='vdb' bus='virtio'/>
    </disk>
    <disk type='file' device='cdrom'><source file='/img/iso'/><target dev='sda' bus='sata'/><readonly/></disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
    <disk type='network' device='disk'><source protocol='rbd' name='p/i'/><target dev='vdc' bus='virtio'/></disk>
    <disk type='vhostuser' device='disk'><source type='unix' path='/run/spdk'/><target dev='vdd' bus='virtio'/></disk>
    <interface type='bridge'><source bridge='br0'/><target dev='n0'/><model type='virtio'/></interface>
    <interface type='direct'><source dev='eth1'/><target dev='n1'/><model type='virtio'/></interface>
    <interface type='network'><source network='default'/><target dev='n2'/><model type='virtio'/></interface>
    <interface type='vhostuser'><source type='unix' path='/run/vhu' mode='server'/><target dev='n3'/></interface>
  </devices>
</domain>)";

TEST(DomainNeeds, AreReadFromTheXml) {
  auto needs = ReadDomainNeeds(kXml);
  ASSERT_TRUE(needs.ok()) << needs.status();
  ASSERT_EQ(needs->disks.size(), 3u) << "files and block devices that are there";
  EXPECT_EQ(needs->disks[0].target, "vda");
  EXPECT_EQ(needs->disks[0].path, "/img/root");
  EXPECT_EQ(needs->disks[0].format, "qcow2");
  EXPECT_FALSE(needs->disks[0].readonly || needs->disks[0].block);
  EXPECT_TRUE(needs->disks[1].block);
  EXPECT_EQ(needs->disks[1].path, "/dev/vg/data");
  EXPECT_TRUE(needs->disks[2].readonly);
  EXPECT_THAT(needs->bridges, ElementsAre("br0", "eth1"));
  EXPECT_THAT(needs->networks, ElementsAre("default"));
  EXPECT_EQ(needs->cpu_mode, "custom");
  EXPECT_THAT(needs->cpu_xml, HasSubstr("<model>Nehalem</model><feature policy=\"require\" name=\"aes\"/>"));
  EXPECT_FALSE(needs->hugepages);
  auto huge = ReadDomainNeeds(
      "<domain><memoryBacking><hugepages><page size='1' unit='G'/></hugepages></memoryBacking></domain>");
  ASSERT_TRUE(huge.ok());
  EXPECT_TRUE(huge->hugepages);
  EXPECT_EQ(huge->hugepage_size, 1ull << 30);
  EXPECT_EQ(huge->cpu_mode, "");
  EXPECT_EQ(ReadDomainNeeds("<domain><memoryBacking><hugepages/></memoryBacking></domain>")->hugepage_size,
            0u);
}

class DestinationTest : public testing::Test {
 protected:
  // A host on which nothing is wrong.
  void SetUp() override {
    request_.xml = kXml;
    request_.domain = ParseDomain(kXml).value();
    request_.source_vmm_version = "QEMU 7.2.22 (Debian 1:7.2+dfsg)";
    v1::DomainDisk disk;
    disk.set_target("vda");
    disk.set_capacity(10 << 20);
    request_.disks.push_back(disk);
    disk.set_target("vdb");
    disk.set_capacity(20 << 20);
    request_.disks.push_back(disk);
    facts_.host = "b";
    facts_.cpu_fits = true;
    facts_.canonical_machine = "pc-q35-7.2";
    facts_.emulator_version = "7.2.13";
    facts_.cpus = 4;
    facts_.memory_available = 8ull << 30;
    facts_.networks["default"] = "";
    DiskFacts shared;
    shared.exists = shared.directory = true;
    shared.directory_free = 1ull << 40;
    shared.size = 20 << 20;
    shared.sharing = Sharing::kShared;
    shared.filesystem = "nfs";
    facts_.disks["vda"] = facts_.disks["sda"] = shared;
    facts_.disks["vdb"] = shared;
    facts_.disks["vdb"].block_device = true;
    facts_.backends.emplace("vdd", std::vector<v1::Finding>());
  }

  std::vector<v1::Finding> Findings() { return JudgeDestination(request_, facts_); }
  // The codes of blockers.
  std::vector<std::string> Blockers() {
    std::vector<std::string> out;
    for (const v1::Finding& finding : Findings()) {
      if (finding.severity() == v1::BLOCKER) out.push_back(finding.code() + " " + finding.subject());
    }
    return out;
  }
  bool Says(const std::string& code, v1::Severity severity) {
    for (const v1::Finding& finding : Findings()) {
      if (finding.code() == code) return finding.severity() == severity;
    }
    return false;
  }

  DestinationRequest request_;
  DestinationFacts facts_;
};

TEST_F(DestinationTest, GoodHost_HasNoBlocker) {
  EXPECT_THAT(Blockers(), IsEmpty());
  EXPECT_TRUE(Says("BACKEND_CONNECTS", v1::INFO));
  EXPECT_TRUE(Says("DISK_TAKEN_FOR_SHARED", v1::WARNING)) << "a block device may be another one";
  EXPECT_THAT(DisksToCopy(request_, facts_), IsEmpty());
}

TEST_F(DestinationTest, LibvirtThatDoesNotAnswer) {
  facts_ = DestinationFacts();
  facts_.libvirt_trouble = "not connected";
  facts_.memory_available = 8ull << 30;
  EXPECT_THAT(Blockers(), ElementsAre("LIBVIRT_UNREACHABLE host "));
}

TEST_F(DestinationTest, DomainsOfTheSameNameOrUuid) {
  facts_.same_uuid_name = "web1";
  facts_.same_uuid_state = VIR_DOMAIN_SHUTOFF;
  EXPECT_THAT(Blockers(), IsEmpty()) << "defined from an earlier stay";
  for (int state : {VIR_DOMAIN_RUNNING, VIR_DOMAIN_PAUSED, VIR_DOMAIN_CRASHED, VIR_DOMAIN_PMSUSPENDED}) {
    facts_.same_uuid_state = state;
    EXPECT_THAT(Blockers(), ElementsAre("DOMAIN_ACTIVE host b")) << state;
  }
  facts_.same_uuid_state = VIR_DOMAIN_SHUTOFF;
  facts_.same_uuid_name = "other";
  EXPECT_THAT(Blockers(), ElementsAre("UUID_IN_USE host b"));
  facts_.same_uuid_state.reset();
  facts_.same_name_state = VIR_DOMAIN_SHUTOFF;
  EXPECT_THAT(Blockers(), ElementsAre("NAME_IN_USE host b"));
}

TEST_F(DestinationTest, EmulatorMachineAndCpu) {
  facts_.capabilities_trouble = "the machine 'pc-q35-99' is not supported";
  EXPECT_THAT(Blockers(), ElementsAre("VMM_UNUSABLE VMM"));
  facts_.capabilities_trouble.clear();
  facts_.emulator_version = "6.2.0";
  EXPECT_THAT(Blockers(), IsEmpty());
  EXPECT_TRUE(Says("VMM_OLDER", v1::WARNING));
  facts_.emulator_version = "10.0.2";
  EXPECT_FALSE(Says("VMM_OLDER", v1::WARNING)) << "10 is more than 7";
  facts_.kvm_missing = true;
  EXPECT_THAT(Blockers(), ElementsAre("ACCELERATOR_DIFFERS host b"));
  facts_.kvm_missing = false;
  facts_.cpu_fits = false;
  facts_.cpu_trouble = "missing features: aes";
  EXPECT_THAT(Blockers(), ElementsAre("CPU_INCOMPATIBLE CPU"));
  EXPECT_EQ(Findings()[0].message(), "missing features: aes");
  facts_.cpu_fits.reset();
  EXPECT_THAT(Blockers(), IsEmpty());
  EXPECT_TRUE(Says("CPU_NOT_COMPARED", v1::WARNING));
  facts_.cpu_trouble.clear();
  facts_.cpu_is_hosts = true;
  EXPECT_TRUE(Says("CPU_IS_HOSTS", v1::WARNING));
  facts_.cpus = 1;
  EXPECT_TRUE(Says("CPUS_OVERCOMMITTED", v1::WARNING));
}

TEST_F(DestinationTest, NetworksAndBridges) {
  facts_.networks["default"] = "it is not active";
  facts_.missing_bridges = {"br0"};
  EXPECT_THAT(Blockers(), ElementsAre("NETWORK_MISSING network default", "BRIDGE_MISSING bridge br0"));
}

TEST_F(DestinationTest, LocalDisk_IsCopiedOrInTheWay) {
  facts_.disks["vda"].sharing = Sharing::kLocal;
  facts_.disks["vda"].filesystem = "ext4";
  EXPECT_THAT(Blockers(), ElementsAre("DISK_NOT_SHARED disk vda"));
  EXPECT_THAT(DisksToCopy(request_, facts_), IsEmpty());
  request_.params.set_copy_storage(true);
  EXPECT_THAT(Blockers(), IsEmpty());
  EXPECT_TRUE(Says("DISK_COPIED", v1::INFO));
  EXPECT_THAT(DisksToCopy(request_, facts_), ElementsAre("vda"));
  facts_.disks["vda"].directory_free = 1 << 20;
  facts_.disks["vda"].size = 1 << 20;
  EXPECT_THAT(Blockers(), ElementsAre("DISK_NO_SPACE disk vda"));
  facts_.disks["vda"] = DiskFacts();
  EXPECT_THAT(Blockers(), ElementsAre("DISK_DIRECTORY_MISSING disk vda"));
  facts_.disks["vda"].directory = true;
  facts_.disks["vda"].directory_free = 1 << 30;
  EXPECT_THAT(Blockers(), IsEmpty()) << "it will be made";
  request_.disks.clear();
  EXPECT_THAT(Blockers(), ElementsAre("DISK_NOT_SHARED disk vda")) << "of unknown size";
}

// Copying a disk onto itself destroys it: whatever may be the same disk is left alone.
TEST_F(DestinationTest, WhatMayBeShared_IsNeverCopied) {
  request_.params.set_copy_storage(true);
  for (Sharing sharing : {Sharing::kShared, Sharing::kUnknown}) {
    facts_.disks["vda"].sharing = sharing;
    EXPECT_THAT(DisksToCopy(request_, facts_), IsEmpty());
    EXPECT_THAT(Blockers(), IsEmpty());
  }
  EXPECT_TRUE(Says("DISK_TAKEN_FOR_SHARED", v1::WARNING));
  facts_.disks["vdb"].sharing = Sharing::kLocal;
  facts_.disks["sda"].sharing = Sharing::kLocal;
  EXPECT_THAT(DisksToCopy(request_, facts_), IsEmpty()) << "block devices, and what is only read";
  facts_.disks["sda"].exists = facts_.disks["vdb"].exists = facts_.disks["vdb"].block_device = false;
  EXPECT_THAT(Blockers(), ElementsAre("DISK_MISSING disk vdb", "DISK_MISSING disk sda"));
  facts_.disks["vdb"].exists = facts_.disks["vdb"].block_device = true;
  facts_.disks["vdb"].size = 1 << 20;
  facts_.disks["sda"].exists = true;
  EXPECT_THAT(Blockers(), ElementsAre("DISK_DIFFERS disk vdb"));
  facts_.disks["vdb"].trouble = "Permission denied";
  EXPECT_THAT(Blockers(), ElementsAre("DISK_UNUSABLE disk vdb"));
}

TEST_F(DestinationTest, Memory) {
  facts_.memory_available = 512 << 20;
  EXPECT_THAT(Blockers(), ElementsAre("MEMORY_INSUFFICIENT host b")) << "QEMU needs some as well";
  facts_.hugepage_size = 2 << 20;
  facts_.hugepages_free = 256;
  EXPECT_THAT(Blockers(), IsEmpty()) << "huge pages are set aside";
  facts_.hugepages_free = 255;
  EXPECT_THAT(Blockers(), ElementsAre("HUGEPAGES_MISSING host b"));
  facts_.hugepages_free = 1000;
  facts_.hugepage_trouble = "this host has no huge pages of 2048 KiB";
  EXPECT_THAT(Blockers(), ElementsAre("HUGEPAGES_MISSING host b"));
}

TEST_F(DestinationTest, Backends) {
  facts_.backends.clear();
  facts_.backends.emplace("vdd", absl::NotFoundError("/run/spdk: No such file or directory"));
  EXPECT_THAT(Blockers(), ElementsAre("BACKEND_UNREACHABLE disk vdd"));
  facts_.backends.clear();
  facts_.backends.emplace("vdd", absl::DeadlineExceededError("silent"));
  EXPECT_THAT(Blockers(), ElementsAre("BACKEND_SILENT disk vdd"));
  v1::Finding own;
  own.set_severity(v1::BLOCKER);
  own.set_code("CAPACITY_DIFFERS");
  own.set_subject("disk vdd");
  facts_.backends.clear();
  facts_.backends.emplace("vdd", std::vector<v1::Finding>{own});
  EXPECT_THAT(Blockers(), ElementsAre("CAPACITY_DIFFERS disk vdd"));
}

TEST_F(DestinationTest, Parameters) {
  facts_.tunnel_trouble = "too long";
  EXPECT_THAT(Blockers(), ElementsAre("TUNNEL_IMPOSSIBLE host b"));
  request_.params.set_zero_copy(true);
  EXPECT_TRUE(Says("ZERO_COPY_LEFT_OUT", v1::WARNING));
  EXPECT_FALSE(Says("POSTCOPY_MAY_FAIL", v1::WARNING));
  facts_.userfaultfd_restricted = true;
  request_.params.set_post_copy(true);
  EXPECT_TRUE(Says("POSTCOPY_MAY_FAIL", v1::WARNING));
  EXPECT_FALSE(Says("POSTCOPY_LEFT_OUT", v1::WARNING));
  DomainDevice disk;
  disk.type = DeviceType::kDisk;
  disk.name = "vdz";
  disk.attachment = Attachment::kVhostUser;
  disk.mediated = true;
  request_.domain.devices.push_back(disk);
  EXPECT_TRUE(Says("POSTCOPY_LEFT_OUT", v1::WARNING));
}

class SourceTest : public testing::Test {
 protected:
  void SetUp() override { domain_ = ParseDomain(kXml).value(); }
  std::vector<std::string> Blockers() {
    std::vector<std::string> out;
    for (const v1::Finding& finding : JudgeSource(facts_, domain_, {})) {
      if (finding.severity() == v1::BLOCKER) out.push_back(finding.code());
    }
    return out;
  }
  bool Says(const std::string& code) {
    for (const v1::Finding& finding : JudgeSource(facts_, domain_, {})) {
      if (finding.code() == code) return true;
    }
    return false;
  }
  SourceFacts facts_ = [] {
    SourceFacts facts;
    facts.state = VIR_DOMAIN_RUNNING;
    return facts;
  }();
  DomainDescription domain_;
};

TEST_F(SourceTest, RunningDomain_HasNoBlocker) {
  EXPECT_THAT(Blockers(), IsEmpty());
  EXPECT_TRUE(Says("NOT_MEDIATED"));
}

TEST_F(SourceTest, StatesThatCanBeMovedAndNot) {
  facts_.state = VIR_DOMAIN_PAUSED;
  facts_.reason = VIR_DOMAIN_PAUSED_USER;
  EXPECT_THAT(Blockers(), IsEmpty());
  EXPECT_TRUE(Says("VM_PAUSED"));
  facts_.reason = VIR_DOMAIN_PAUSED_MIGRATION;
  EXPECT_THAT(Blockers(), ElementsAre("MIGRATION_UNSETTLED"));
  for (int state : {VIR_DOMAIN_SHUTOFF, VIR_DOMAIN_CRASHED, VIR_DOMAIN_NOSTATE}) {
    facts_.state = state;
    facts_.reason = 0;
    EXPECT_THAT(Blockers(), ElementsAre("VM_NOT_RUNNING")) << state;
  }
}

// Its copy here stands still like one that was left behind, and must be neither resumed nor destroyed.
TEST_F(SourceTest, DomainThatIsComingIsNoSource) {
  facts_.incoming = true;
  facts_.state = VIR_DOMAIN_PAUSED;
  facts_.reason = VIR_DOMAIN_PAUSED_MIGRATION;
  EXPECT_THAT(Blockers(), ElementsAre("VM_IN_MIGRATION"));
  facts_.state = VIR_DOMAIN_RUNNING;
  facts_.reason = VIR_DOMAIN_RUNNING_POSTCOPY;
  EXPECT_THAT(Blockers(), ElementsAre("VM_IN_MIGRATION"));
}

TEST_F(SourceTest, WhatIsUnderWay) {
  facts_.job = "a backup";
  facts_.block_jobs = {"vda"};
  facts_.snapshots = 2;
  facts_.blockers = {"the device is busy"};
  facts_.vmm_trouble = "timed out";
  EXPECT_THAT(Blockers(),
              ElementsAre("JOB_UNDER_WAY", "BLOCK_JOB_UNDER_WAY", "SNAPSHOTS_EXIST", "VMM_BLOCKS_MIGRATION"));
  EXPECT_TRUE(Says("VMM_SILENT"));
}

TEST_F(SourceTest, HostDevicesStay) {
  domain_ =
      ParseDomain(
          "<domain><name>d</name><devices><hostdev type='pci'/><disk type='block' device='lun'>"
          "<source dev='/dev/sdx'/><target dev='sdb'/></disk><disk type='nvme'><target dev='vda'/></disk>"
          "</devices></domain>")
          .value();
  EXPECT_THAT(Blockers(), ElementsAre("DEVICE_NOT_MIGRATABLE", "DEVICE_NOT_MIGRATABLE"))
      << "not the SCSI disk";
}

}  // namespace
}  // namespace baton::vmm
