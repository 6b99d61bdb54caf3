#include "agent/vmm/libvirt/domain_description.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace baton::vmm {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

// A cloud guest with one device of each kind, as virDomainGetXMLDesc gives it for a running domain.
constexpr char kRich[] = R"(
<domain type='kvm' id='7'>
  <name>web1</name>
  <uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid>
  <memory unit='GiB'>2</memory>
  <currentMemory unit='KiB'>1048576</currentMemory>
  <memoryBacking><hugepages/><source type='memfd'/><access mode='shared'/><locked/></memoryBacking>
  <vcpu placement='static' current='2'>8</vcpu>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <cpu mode='custom' match='exact'><model fallback='forbid'>Skylake-Client</model></cpu>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='vhostuser' device='disk'>
      <driver name='qemu' type='raw' queues='4' queue_size='256'/>
      <source type='unix' path='/run/baton/vms/web1/vda.sock'><reconnect enabled='yes' timeout='1'/></source>
      <target dev='vda' bus='virtio'/><alias name='virtio-disk0'/>
    </disk>
    <disk type='vhostuser' device='disk'>
      <source type='unix' path='/var/tmp/spdk.sock'/><target dev='vdb' bus='virtio'/><alias name='virtio-disk1'/>
    </disk>
    <disk type='file' device='disk'>
      <source file='/images/web1.qcow2'/><target dev='vdc' bus='virtio'/><shareable/><alias name='virtio-disk2'/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>
    <disk type='network' device='disk'>
      <source protocol='rbd' name='pool/image'/><target dev='vdd' bus='virtio'/>
    </disk>
    <disk type='block' device='lun'><source dev='/dev/sdx'/><target dev='sdb' bus='scsi'/></disk>
    <disk type='vhostvdpa' device='disk'><source dev='/dev/vhost-vdpa-0'/><target dev='vde' bus='virtio'/></disk>
    <interface type='vhostuser'>
      <mac address='52:54:00:ee:96:6c'/><source type='unix' path='/run/ovs/vhu0' mode='server'/>
      <target dev='vhu0'/><model type='virtio'/><driver queues='2' rx_queue_size='1024'/><alias name='net0'/>
    </interface>
    <interface type='vdpa'><source dev='/dev/vhost-vdpa-1'/><model type='virtio'/><alias name='net1'/></interface>
    <interface type='bridge'><source bridge='br0'/><target dev='vnet3'/><model type='virtio'/></interface>
    <interface type='network'><source network='default'/><target dev='vnet4'/><model type='e1000'/></interface>
    <interface type='bridge'><source bridge='br1'/><model type='virtio'/><driver name='qemu'/></interface>
    <interface type='hostdev'><source><address type='pci' domain='0' bus='1' slot='2' function='3'/></source></interface>
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <source><address domain='0x0000' bus='0x06' slot='0x02' function='0x0'/></source><alias name='hostdev0'/>
    </hostdev>
    <filesystem type='mount'><driver type='virtiofs'/><source dir='/share'/><target dir='tag'/></filesystem>
    <vsock model='virtio'><cid auto='no' address='3'/><alias name='vsock0'/></vsock>
    <tpm model='tpm-crb'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <memballoon model='virtio'><alias name='balloon0'/></memballoon>
    <video><model type='vga'/></video>
  </devices>
</domain>)";

const DomainDevice* Device(const DomainDescription& domain, const std::string& name) {
  for (const DomainDevice& device : domain.devices) {
    if (device.name == name) return &device;
  }
  return nullptr;
}

TEST(ParseDomain, RichDomain_ReadsWhatTheGuestIs) {
  auto domain = ParseDomain(kRich, "/run/baton/vms");
  ASSERT_TRUE(domain.ok()) << domain.status();
  EXPECT_EQ(domain->name, "web1");
  EXPECT_EQ(domain->uuid, "4dea22b3-1d52-d8f3-2516-782e98ab3fa0");
  EXPECT_EQ(domain->vcpus, 2u) << "those that are plugged";
  EXPECT_EQ(domain->memory_bytes, uint64_t{2} << 30);
  EXPECT_EQ(domain->type, "kvm");
  EXPECT_EQ(domain->machine, "pc-q35-7.2");
  EXPECT_EQ(domain->cpu, "Skylake-Client");
  EXPECT_EQ(domain->emulator, "/usr/bin/qemu-system-x86_64");
  EXPECT_EQ(domain->memory.source, "memfd");
  EXPECT_TRUE(domain->memory.shared && domain->memory.hugepages && domain->memory.locked);
}

TEST(ParseDomain, RichDomain_ClassifiesEachDevice) {
  auto domain = ParseDomain(kRich, "/run/baton/vms");
  ASSERT_TRUE(domain.ok()) << domain.status();
  const std::vector<std::pair<std::string, Attachment>> expected = {{"vda", Attachment::kVhostUser},
                                                                    {"vdb", Attachment::kVhostUser},
                                                                    {"vdc", Attachment::kPlain},
                                                                    {"sda", Attachment::kPlain},
                                                                    {"vdd", Attachment::kPlain},
                                                                    {"sdb", Attachment::kPassthrough},
                                                                    {"vde", Attachment::kVdpa},
                                                                    {"vhu0", Attachment::kVhostUser},
                                                                    {"net1", Attachment::kVdpa},
                                                                    {"vnet3", Attachment::kVhostKernel},
                                                                    {"vnet4", Attachment::kPlain},
                                                                    {"interface4", Attachment::kPlain},
                                                                    {"interface5", Attachment::kPassthrough},
                                                                    {"hostdev0", Attachment::kPassthrough},
                                                                    {"tag", Attachment::kVhostUser},
                                                                    {"vsock0", Attachment::kVhostKernel},
                                                                    {"tpm0", Attachment::kPassthrough},
                                                                    {"rng0", Attachment::kPlain},
                                                                    {"balloon0", Attachment::kPlain}};
  EXPECT_EQ(domain->devices.size(), expected.size());
  for (const auto& [name, attachment] : expected) {
    const DomainDevice* device = Device(*domain, name);
    ASSERT_NE(device, nullptr) << name;
    EXPECT_STREQ(NameOf(device->attachment), NameOf(attachment)) << name;
  }
}

TEST(ParseDomain, RichDomain_ReadsDetailsOfDevices) {
  auto domain = ParseDomain(kRich, "/run/baton/vms");
  ASSERT_TRUE(domain.ok()) << domain.status();
  EXPECT_TRUE(Device(*domain, "vda")->mediated);
  EXPECT_EQ(Device(*domain, "vda")->queues, 4u);
  EXPECT_EQ(Device(*domain, "vda")->queue_size, 256u);
  EXPECT_FALSE(Device(*domain, "vdb")->mediated);
  EXPECT_EQ(Device(*domain, "vdb")->source, "/var/tmp/spdk.sock");
  EXPECT_TRUE(Device(*domain, "vdc")->shared);
  EXPECT_TRUE(Device(*domain, "sda")->readonly);
  EXPECT_TRUE(Device(*domain, "vdd")->network);
  EXPECT_TRUE(Device(*domain, "vhu0")->vmm_listens);
  EXPECT_EQ(Device(*domain, "vhu0")->mac, "52:54:00:ee:96:6c");
  EXPECT_EQ(Device(*domain, "vhu0")->queue_size, 1024u);
  EXPECT_EQ(Device(*domain, "hostdev0")->source, "0x0000:0x06:0x02.0x0");
}

TEST(ParseDomain, SiblingOfMediatorDirectory_IsNotMediated) {
  auto domain = ParseDomain(kRich, "/run/baton/vms/we");
  ASSERT_TRUE(domain.ok()) << domain.status();
  EXPECT_FALSE(Device(*domain, "vda")->mediated);
}

TEST(ParseDomain, NumaCells_MemoryIsSharedOnlyIfEachIs) {
  const auto shared = [](const std::string& second) {
    auto domain = ParseDomain(
        "<domain><name>n</name><memoryBacking><access mode='shared'/></memoryBacking><cpu><numa>"
        "<cell id='0'/><cell id='1' " +
        second + "/></numa></cpu></domain>");
    return domain.ok() && domain->memory.shared;
  };
  EXPECT_TRUE(shared(""));
  EXPECT_TRUE(shared("memAccess='shared'"));
  EXPECT_FALSE(shared("memAccess='private'"));
}

TEST(ParseDomain, MalformedInput_SaysWhere) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "domain XML"},
      {"<domain><name>x</name>", "at byte"},
      {"<network/>", "no <domain>"},
      {"<domain/>", "<name>"},
      {"<domain><name>x</name><vcpu>many</vcpu></domain>", "vcpu"},
      {"<domain><name>x</name><memory unit='furlong'>3</memory></domain>", "<memory>"},
      {"<domain><name>x</name><memory unit='TiB'>99999999999</memory></domain>", "<memory>"},
      {"<domain><name>x</name><devices><disk><driver queues='-1'/></disk></devices></domain>", "queues"},
  };
  for (const auto& [xml, word] : cases) {
    auto domain = ParseDomain(xml);
    ASSERT_FALSE(domain.ok()) << xml;
    EXPECT_THAT(std::string(domain.status().message()), HasSubstr(word)) << xml;
  }
}

TEST(ParseDomain, TooManyDevices_IsRefused) {
  std::string xml = "<domain><name>x</name><devices>";
  for (size_t i = 0; i <= kMaxDomainDevices; ++i) xml += "<hostdev/>";
  EXPECT_FALSE(ParseDomain(xml + "</devices></domain>").ok());
}

TEST(Shortcomings, RichDomain_NamesWhatIsNotMediatedAndWhatCannotMove) {
  auto domain = ParseDomain(kRich, "/run/baton/vms");
  ASSERT_TRUE(domain.ok());
  std::string all;
  for (const std::string& text : Shortcomings(*domain)) all += text + "\n";
  EXPECT_THAT(all, HasSubstr("disk vdb reaches its back-end /var/tmp/spdk.sock without Baton"));
  EXPECT_THAT(all, HasSubstr("hostdev hostdev0 is a host device"));
  EXPECT_THAT(all, HasSubstr("vDPA device /dev/vhost-vdpa-1"));
  EXPECT_THAT(all, testing::Not(HasSubstr("vda")));
  EXPECT_THAT(all, testing::Not(HasSubstr("not shared")));
}

TEST(Shortcomings, VhostUserWithoutSharedMemory_IsNamed) {
  auto domain = ParseDomain(
      "<domain><name>n</name><devices><disk type='vhostuser'><source "
      "path='/run/baton/vms/n/vda.sock'/></disk></devices></domain>",
      "/run/baton/vms");
  ASSERT_TRUE(domain.ok());
  ASSERT_EQ(Shortcomings(*domain).size(), 1u);
  EXPECT_THAT(Shortcomings(*domain)[0], HasSubstr("<access mode='shared'/>"));
}

TEST(Shortcomings, PlainDomain_HasNone) {
  auto domain = ParseDomain("<domain><name>n</name><devices><disk type='file'/></devices></domain>");
  ASSERT_TRUE(domain.ok());
  EXPECT_THAT(Shortcomings(*domain), IsEmpty());
}

}  // namespace
}  // namespace baton::vmm
