#include "client/ctl/show.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "client/ctl/top.h"

namespace baton::client {
namespace {

using ::testing::HasSubstr;

TEST(Show, MigrationTable_ShowsWhereTheGuestIs) {
  v1::Migration m;
  m.set_name("migrations/1");
  m.set_phase(v1::FAILED);
  m.set_reason(v1::DRAIN_TIMEOUT);
  m.set_guest_location(v1::SOURCE);
  std::string table = MigrationTable({m}, false, 0).Render();
  EXPECT_THAT(table, HasSubstr("DRAIN_TIMEOUT"));
  EXPECT_THAT(table, HasSubstr("SOURCE"));
}

TEST(Show, VmTable_MarksDevicesThatNeedSomebody) {
  v1::Vm vm;
  vm.set_name("vms/web1");
  auto* disk = vm.add_devices();
  disk->set_name("disk0");
  disk->set_state(v1::Device::HELD);
  EXPECT_THAT(VmTable({vm}, false, 0).Render(), HasSubstr("disk0(HELD)"));
}

TEST(Show, DomainIsShownWithItsDevicesAndWhatItMisses) {
  v1::Vm vm;
  vm.set_name("vms/4dea22b3");
  vm.set_driver("libvirt");
  vm.mutable_domain()->set_name("ns_web");
  vm.mutable_domain()->set_vcpus(2);
  vm.mutable_domain()->set_memory_bytes(1u << 30);
  auto* disk = vm.mutable_domain()->add_devices();
  disk->set_type("disk");
  disk->set_name("vda");
  disk->set_attachment("vhost-user");
  disk->set_source("/var/tmp/spdk.sock");
  vm.mutable_domain()->add_devices()->set_attachment("plain");
  vm.mutable_domain()->add_shortcomings("disk vda reaches its back-end without Baton");
  vm.mutable_domain()->add_migration_blockers("a device that cannot");
  const std::string wide = VmTable({vm}, true, 0).Render();
  EXPECT_THAT(wide, HasSubstr("vda(vhost-user)"));
  EXPECT_THAT(wide, HasSubstr("libvirt (ns_web)"));
  EXPECT_THAT(wide, HasSubstr("1.00 GiB"));
  const std::string text = DescribeVm(vm, 0);
  for (const char* part : {"ns_web", "/var/tmp/spdk.sock", "without Baton", "a device that cannot"})
    EXPECT_THAT(text, HasSubstr(part));
}

TEST(Show, EmptyMessages_AreDescribedWithoutHarm) {
  EXPECT_NE(DescribeHost({}, {}, 0), "");
  EXPECT_NE(DescribeVm({}, 0), "");
  EXPECT_NE(DescribeMigration({}), "");
  EXPECT_NE(DescribePolicy({}), "");
}

TEST(Show, DescribeFindings_BlockersFirst) {
  v1::Migration m;
  auto* info = m.add_findings();
  info->set_severity(v1::INFO);
  info->set_code("A");
  auto* blocker = m.add_findings();
  blocker->set_severity(v1::BLOCKER);
  blocker->set_code("B");
  std::string text = DescribeFindings(m);
  EXPECT_LT(text.find("BLOCKER"), text.find("INFO"));
  EXPECT_TRUE(HasBlocker(m));
}

TEST(Top, FitsTheWindow) {
  TopView view;
  for (int i = 0; i < 100; ++i) {
    v1::Vm vm;
    vm.set_name("vms/vm" + std::to_string(i));
    view.vms.push_back(vm);
  }
  EXPECT_EQ(RenderTop(view, 40, 10, true).size(), 10u);
  for (const auto& line : RenderTop(view, 40, 10, true)) EXPECT_LE(line.size(), 40u);
  EXPECT_GT(RenderTop(view, 0, 0, true).size(), 100u);
}

}  // namespace
}  // namespace baton::client
