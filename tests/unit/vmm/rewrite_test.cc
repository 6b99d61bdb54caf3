#include "agent/vmm/libvirt/rewrite.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace baton::vmm {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

// What libvirt gives for a running domain, with a comment and spacing of an operator's.
constexpr char kDomain[] = R"(<?xml version="1.0" encoding="utf-8"?>
<!-- web1: ask the web team
     before touching -->
<domain type="kvm" xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0">
  <name>web1</name>
  <uuid>4dea22b3-1d52-d8f3-2516-782e98ab3fa0</uuid>
  <metadata><app:note xmlns:app="urn:x">a &lt; b &amp; c</app:note></metadata>
  <memory unit="MiB">256</memory>
  <memoryBacking><source type="memfd"/><access mode="shared"/></memoryBacking>
  <os><type arch="x86_64" machine="pc-q35-7.2">hvm</type><nvram>/images/web1/vars.fd</nvram></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2"/>
      <source file="/images/web1/root.qcow2"/>
      <backingStore type="file">
        <format type="qcow2"/>
        <source file="/images/base.qcow2"/>
        <backingStore/>
      </backingStore>
      <target dev="vda" bus="virtio"/>
    </disk>
    <disk type="block" device="disk"><source dev="/dev/vg/web1"/><target dev="vdb" bus="virtio"/></disk>
    <disk type="file" device="disk"><source file="/images2/data.raw"/><target dev="vdc" bus="virtio"/></disk>
    <disk type="network" device="disk">
      <source protocol="rbd" name="/images/web1/rbd"/><target dev="vdd" bus="virtio"/>
    </disk>
    <disk type="vhostuser" device="disk">
      <driver name="qemu" type="raw"/>
      <source type="unix" path="/run/spdk/a/vhost.1"/>
      <target dev="vde" bus="virtio"/>
    </disk>
    <interface type="bridge"><source bridge="br0"/><target dev="vnet3"/><model type="virtio"/></interface>
    <interface type="direct"><source dev="eth1" mode="bridge"/><model type="virtio"/></interface>
    <interface type="network"><source network="br0"/><model type="virtio"/></interface>
    <interface type="vhostuser">
      <source type="unix" path="/run/ovs/vhu0" mode="server"/><model type="virtio"/>
    </interface>
    <interface type="vhostuser">
      <source type="unix" path="/run/ovs/vhu1" mode="client"><reconnect enabled="no"/></source>
      <target dev="VHU_1"/>
      <model type="virtio"/>
    </interface>
    <filesystem type="mount"><driver type="virtiofs"/><source socket="/run/spdk/fs.sock"/><target dir="tag"/></filesystem>
    <graphics type="vnc" port="5900" listen="10.0.0.1"><listen type="address" address="10.0.0.1"/></graphics>
  </devices>
  <qemu:commandline><qemu:arg value="-foo"/></qemu:commandline>
</domain>
)";

using Kind = RewriteRule::Kind;

std::string Rewritten(const std::string& xml, const std::vector<RewriteRule>& rules) {
  auto out = RewriteForDestination(xml, rules);
  EXPECT_TRUE(out.ok()) << out.status();
  return out.ok() ? out->xml : "";
}

// What of kDomain's text is different in `xml`: pairs of lines.
std::vector<std::string> ChangedLines(const std::string& xml) {
  std::vector<std::string> out;
  std::istringstream before(kDomain), after(xml);
  std::string a, b;
  while (std::getline(before, a)) {
    std::getline(after, b);
    if (a != b) out.push_back(b.substr(b.find_first_not_of(' ')));
  }
  EXPECT_FALSE(std::getline(after, b)) << "lines were added: " << b;
  return out;
}

TEST(Rewrite, NoRules_ChangeNotAByte) {
  auto out = RewriteForDestination(kDomain, {});
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->xml, kDomain);
  EXPECT_THAT(out->changes, IsEmpty());
}

TEST(Rewrite, DiskPaths_WholeComponentsInTheWholeChain) {
  const auto out = RewriteForDestination(
      kDomain, {{Kind::kDisk, "/images/", "/srv/baton/images/"}, {Kind::kDisk, "/dev/vg", "/dev/other"}});
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_THAT(ChangedLines(out->xml), ElementsAre(HasSubstr("<nvram>/srv/baton/images/web1/vars.fd</nvram>"),
                                                  "<source file=\"/srv/baton/images/web1/root.qcow2\"/>",
                                                  "<source file=\"/srv/baton/images/base.qcow2\"/>",
                                                  HasSubstr("dev=\"/dev/other/web1\"")))
      << "not /images2, and not what only looks like a path";
  ASSERT_EQ(out->changes.size(), 4u);
  EXPECT_EQ(out->changes[1].subject, "disk vda");
  EXPECT_EQ(out->changes[1].from, "/images/web1/root.qcow2");
  EXPECT_EQ(out->changes[1].to, "/srv/baton/images/web1/root.qcow2");
}

TEST(Rewrite, EachKindTouchesItsOwn) {
  EXPECT_THAT(
      ChangedLines(Rewritten(kDomain, {{Kind::kBridge, "br0", "br7"}, {Kind::kBridge, "eth1", "eth7"}})),
      ElementsAre(HasSubstr("bridge=\"br7\""), HasSubstr("dev=\"eth7\"")));
  EXPECT_THAT(ChangedLines(Rewritten(kDomain, {{Kind::kNetwork, "br0", "net7"}})),
              ElementsAre(HasSubstr("network=\"net7\"")));
  EXPECT_THAT(ChangedLines(Rewritten(kDomain, {{Kind::kVhostUser, "/run/spdk", "/run/b"}})),
              ElementsAre(HasSubstr("path=\"/run/b/a/vhost.1\""), HasSubstr("socket=\"/run/b/fs.sock\"")));
  EXPECT_THAT(ChangedLines(Rewritten(kDomain, {{Kind::kVhostUser, "/run/ovs/vhu0", "/run/ovs/vhu9"}})),
              ElementsAre(HasSubstr("path=\"/run/ovs/vhu9\" mode=\"server\"")));
  EXPECT_THAT(ChangedLines(Rewritten(kDomain, {{Kind::kEmulator, "", "/opt/qemu"}})),
              ElementsAre("<emulator>/opt/qemu</emulator>"));
  EXPECT_THAT(ChangedLines(Rewritten(kDomain, {{Kind::kListen, "10.0.0.1", "10.0.0.2"}})),
              ElementsAre(AllOf(HasSubstr("listen=\"10.0.0.2\""), HasSubstr("address=\"10.0.0.2\""))));
  EXPECT_THAT(ChangedLines(Rewritten(kDomain, {{Kind::kEmulator, "/usr/bin", "/opt"}})), IsEmpty())
      << "an emulator is named as a whole";
}

TEST(Rewrite, FirstRuleThatMatchesHolds) {
  const std::vector<RewriteRule> rules = {{Kind::kDisk, "/images/web1", "/fast"},
                                          {Kind::kDisk, "/images", "/slow"},
                                          {Kind::kDisk, "/slow", "/never"},
                                          {Kind::kDisk, "/", "/else"}};
  const std::string xml = Rewritten(kDomain, rules);
  EXPECT_THAT(xml, HasSubstr("\"/fast/root.qcow2\""));
  EXPECT_THAT(xml, HasSubstr("\"/slow/base.qcow2\""));
  EXPECT_THAT(xml, HasSubstr("\"/else/images2/data.raw\""));
  EXPECT_THAT(xml, Not(HasSubstr("/never")));
}

TEST(Rewrite, ValuesAreEscaped) {
  const std::string xml = Rewritten(kDomain, {{Kind::kBridge, "br0", "a\"<&>'b"}});
  auto again = RewriteForDestination(xml, {{Kind::kBridge, "a\"<&>'b", "br0"}});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->xml, kDomain);
}

TEST(Rewrite, WhatIsNoDomain_IsRefused) {
  EXPECT_TRUE(absl::IsInvalidArgument(RewriteForDestination("", {}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(RewriteForDestination("<network/>", {}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(RewriteForDestination("<domain><name>", {}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(MediateXml("<domain/>", "/run/x").status()));
  EXPECT_TRUE(
      absl::IsInvalidArgument(RewriteForDestination(std::string(kMaxDomainXml + 1, ' '), {}).status()));
  // Deep nesting is no way to the end of the stack.
  std::string deep = "<domain><devices><disk type='file'>";
  for (int i = 0; i < 100'000; ++i) deep += "<source file='/a'>";
  for (int i = 0; i < 100'000; ++i) deep += "</source>";
  deep += "</disk></devices></domain>";
  EXPECT_TRUE(RewriteForDestination(deep, {{Kind::kDisk, "/a", "/b"}}).ok());
}

TEST(Rewrite, KindsHaveNames) {
  for (Kind kind :
       {Kind::kDisk, Kind::kBridge, Kind::kNetwork, Kind::kVhostUser, Kind::kEmulator, Kind::kListen}) {
    auto parsed = ParseRewriteKind(NameOf(kind));
    ASSERT_TRUE(parsed.ok());
    EXPECT_EQ(*parsed, kind);
  }
  EXPECT_THAT(Message(ParseRewriteKind("disc").status()), HasSubstr("disk, bridge, network"));
}

const v1::Finding* FindingOf(const MediatedXml& out, const std::string& code, const std::string& subject) {
  for (const v1::Finding& finding : out.findings) {
    if (finding.code() == code && finding.subject() == subject) return &finding;
  }
  return nullptr;
}

TEST(Mediate, PutsMediatorsBeforeTheBackends) {
  auto out = MediateXml(kDomain, "/run/baton/vms/web1/");
  ASSERT_TRUE(out.ok()) << out.status();
  ASSERT_EQ(out->devices.size(), 2u);
  EXPECT_EQ(out->devices[0].device.name, "vde");
  EXPECT_EQ(out->devices[0].backend, "/run/spdk/a/vhost.1");
  EXPECT_EQ(out->devices[0].device.source, "/run/baton/vms/web1/dev-vde.sock");
  EXPECT_TRUE(out->devices[0].device.mediated);
  EXPECT_EQ(out->devices[1].backend, "/run/ovs/vhu1");
  EXPECT_EQ(out->devices[1].device.source, "/run/baton/vms/web1/dev-vhu-1.sock");
  EXPECT_THAT(out->xml, HasSubstr("<source type=\"unix\" path=\"/run/baton/vms/web1/dev-vde.sock\">"
                                  "<reconnect enabled=\"yes\" timeout=\"1\"/></source>"));
  EXPECT_THAT(out->xml,
              HasSubstr("<source type=\"unix\" path=\"/run/baton/vms/web1/dev-vhu-1.sock\" mode=\"client\">"
                        "<reconnect enabled=\"yes\" timeout=\"1\"/></source>"));
  EXPECT_THAT(ChangedLines(out->xml), testing::SizeIs(2)) << "and nothing else changes";
  EXPECT_NE(FindingOf(*out, "RECONNECT_ADDED", "disk vde"), nullptr);
  EXPECT_NE(FindingOf(*out, "RECONNECT_ADDED", "interface VHU_1"), nullptr);
  const v1::Finding* server = FindingOf(*out, "VHOST_USER_SERVER", "interface interface3");
  ASSERT_NE(server, nullptr);
  EXPECT_EQ(server->severity(), v1::WARNING);
  EXPECT_THAT(server->message(), HasSubstr("/run/ovs/vhu0"));
  EXPECT_THAT(server->remedy(), HasSubstr("mode='client'"));
  EXPECT_NE(FindingOf(*out, "FILESYSTEM_NOT_MEDIATED", "filesystem tag"), nullptr);
  EXPECT_EQ(FindingOf(*out, "MEMORY_NOT_SHARED", "memory"), nullptr);
}

TEST(Mediate, ItsOwnOutput_StaysAsItIs) {
  auto first = MediateXml(kDomain, "/run/baton/vms/web1");
  ASSERT_TRUE(first.ok());
  auto second = MediateXml(first->xml, "/run/baton/vms/web1");
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(second->xml, first->xml);
  ASSERT_EQ(second->devices.size(), 2u);
  EXPECT_EQ(second->devices[0].device.source, "/run/baton/vms/web1/dev-vde.sock");
  EXPECT_EQ(second->devices[0].backend, "") << "the XML does not say any more";
  EXPECT_EQ(FindingOf(*second, "RECONNECT_ADDED", "disk vde"), nullptr);
}

std::string Small(const std::string& devices, const std::string& backing = "<access mode='shared'/>") {
  return "<domain><name>d</name><memoryBacking>" + backing + "</memoryBacking><devices>" + devices +
         "</devices></domain>";
}
std::string Nic(const std::string& path, const std::string& target = "") {
  return "<interface type='vhostuser'><source type='unix' path='" + path + "' mode='client'/>" +
         (target.empty() ? "" : "<target dev='" + target + "'/>") + "</interface>";
}

TEST(Mediate, NamesAreUniqueAndFollowLibvirts) {
  auto out = MediateXml(Small("<interface type='user'/>" + Nic("/b/1") + Nic("/b/2", "vhu_a") +
                              Nic("/b/3", "vhu-a") + Nic("/m/dev-vhu-a-2.sock", "x")),
                        "/m");
  ASSERT_TRUE(out.ok()) << out.status();
  std::vector<std::string> sockets;
  for (const auto& device : out->devices) sockets.push_back(device.device.source);
  EXPECT_THAT(sockets, ElementsAre("/m/dev-net1.sock", "/m/dev-vhu-a.sock", "/m/dev-vhu-a-3.sock",
                                   "/m/dev-vhu-a-2.sock"));
  DomainDevice device;
  device.name = "--Ä_";
  EXPECT_EQ(MediatorName(device), "disk");
  device.name = std::string(100, 'Q');
  EXPECT_EQ(MediatorName(device), std::string(32, 'q'));
}

TEST(Mediate, SaysWhatIsMissing) {
  auto out = MediateXml(Small(Nic("/b/1") + Nic("/m/dev-net1.sock") + Nic("/m/dev-net1.sock", "twin") +
                                  Nic("") + "<hostdev mode='subsystem' type='pci'/>",
                              ""),
                        "/m");
  ASSERT_TRUE(out.ok()) << out.status();
  ASSERT_FALSE(out->findings.empty());
  EXPECT_EQ(out->findings[0].severity(), v1::BLOCKER) << "worst first";
  const v1::Finding* memory = FindingOf(*out, "MEMORY_NOT_SHARED", "memory");
  ASSERT_NE(memory, nullptr);
  EXPECT_THAT(memory->remedy(), HasSubstr("<access mode='shared'/>"));
  EXPECT_NE(FindingOf(*out, "DEVICE_NOT_MIGRATABLE", "hostdev hostdev0"), nullptr);
  EXPECT_NE(FindingOf(*out, "BACKEND_UNKNOWN", "interface interface3"), nullptr);
  EXPECT_NE(FindingOf(*out, "MEDIATOR_SHARED", "interface twin"), nullptr);
}

TEST(Mediate, ReconnectOfTheOperator_IsKept) {
  const std::string xml = Small(
      "<disk type='vhostuser'><source type='unix' path='/b'><reconnect enabled='yes' timeout='7'/></source>"
      "<target dev='vda'/></disk>");
  auto out = MediateXml(xml, "/m");
  ASSERT_TRUE(out.ok());
  EXPECT_THAT(out->xml, HasSubstr("timeout=\"7\""));
  EXPECT_THAT(out->findings, IsEmpty());
}

TEST(Mediate, PathThatIsTooLong_IsRefused) {
  auto out = MediateXml(Small(Nic("/b/1")), "/" + std::string(100, 'x'));
  EXPECT_TRUE(absl::IsInvalidArgument(out.status())) << out.status();
}

}  // namespace
}  // namespace baton::vmm
