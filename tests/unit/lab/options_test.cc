// The lab guest understands the command line that Baton makes for QEMU.
#include "tests/lab/vm/options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/vmm/qmp/qemu_command.h"

namespace baton::lab {
namespace {

using testing::HasSubstr;

vmm::QemuCommand Command() {
  vmm::QemuCommand command;
  command.spec.set_name("vm1");
  command.spec.set_memory_bytes(32 << 20);
  command.spec.set_vcpus(1);
  command.spec.mutable_boot()->set_kernel("/dev/null");
  command.spec.mutable_boot()->set_cmdline("console=ttyS0 lab.outstanding=32 lab.packed=1 lab.live=2M");
  auto* disk = command.spec.add_devices();
  disk->set_name("disk0");
  disk->set_class_(v1::BLK);
  disk->set_num_queues(4);
  disk->set_queue_size(256);
  auto* nic = command.spec.add_devices();
  nic->set_name("nic0");
  nic->set_class_(v1::NET);
  nic->set_num_queues(2);
  nic->set_mac("52:54:00:12:34:56");
  command.run_dir = "/run/with,comma";
  command.memory_path = "/dev/shm/vm1.ram";
  command.spec.set_balloon(true);
  return command;
}

absl::StatusOr<LaunchOptions> Parse(const vmm::QemuCommand& command) {
  auto argv = vmm::BuildQemuCommand(command);
  if (!argv.ok()) return argv.status();
  return ParseCommandLine({argv->begin() + 1, argv->end()});
}

TEST(LabOptionsTest, BatonsBalloonIsADeviceLikeOthers) {
  vmm::QemuCommand command = Command();
  command.spec.set_balloon(false);
  command.spec.set_free_page_hints(true);
  auto options = Parse(command);
  ASSERT_TRUE(options.ok()) << options.status();
  const DeviceOptions& balloon = options->devices.back();
  EXPECT_EQ(balloon.name, "balloon");
  EXPECT_EQ(balloon.class_, v1::BALLOON);
  EXPECT_EQ(balloon.socket, "/run/with,comma/dev-balloon.sock");
  EXPECT_EQ(balloon.queues, 4u);
  EXPECT_EQ(balloon.queue_size, 128u);
}

TEST(LabOptionsTest, WhatBatonMakesForQemuIsUnderstood) {
  vmm::QemuCommand command = Command();
  command.qmp_fd = 3;
  command.reconnect_ms = true;
  command.incoming = true;
  auto launch = Parse(command);
  ASSERT_TRUE(launch.ok()) << launch.status();
  EXPECT_EQ(launch->name, "vm1");
  EXPECT_EQ(launch->memory_path, "/dev/shm/vm1.ram");
  EXPECT_EQ(launch->memory_bytes, 32u << 20);
  EXPECT_EQ(launch->qmp_fd, 3);
  EXPECT_TRUE(launch->incoming);
  EXPECT_TRUE(launch->balloon);
  EXPECT_EQ(launch->console_path, "/run/with,comma/console.sock");
  EXPECT_EQ(launch->console_log, "/run/with,comma/console.log");
  ASSERT_EQ(launch->devices.size(), 2u);
  EXPECT_EQ(launch->devices[0].name, "disk0");
  EXPECT_EQ(launch->devices[0].socket, "/run/with,comma/dev-disk0.sock");
  EXPECT_EQ(launch->devices[0].queues, 4u);
  EXPECT_EQ(launch->devices[0].queue_size, 256u);
  EXPECT_EQ(launch->devices[0].reconnect_ms, 200u);
  EXPECT_EQ(launch->devices[1].class_, v1::NET);
  EXPECT_EQ(launch->devices[1].queues, 2u);
  EXPECT_EQ(launch->devices[1].mac, "52:54:00:12:34:56");
  auto options = ParseWorkloadOptions(launch->cmdline);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->writers, 32u);
  EXPECT_TRUE(options->packed);
  EXPECT_EQ(options->live, 2u << 20);
}

TEST(LabOptionsTest, AnOlderQemusCommandLineIsUnderstood) {
  auto launch = Parse(Command());
  ASSERT_TRUE(launch.ok()) << launch.status();
  EXPECT_EQ(launch->qmp_path, "/run/with,comma/qmp.sock");
  EXPECT_EQ(launch->devices[0].reconnect_ms, 1000u);
  EXPECT_FALSE(launch->incoming);
}

TEST(LabOptionsTest, WhatIsNotKnownIsNamed) {
  vmm::QemuCommand command = Command();
  command.spec.add_extra_args("-usb");
  EXPECT_THAT(Message(Parse(command).status()), HasSubstr("-usb"));
  EXPECT_THAT(Message(ParseCommandLine({"-device", "e1000,id=dev-x"}).status()), HasSubstr("e1000"));
  EXPECT_THAT(Message(ParseCommandLine({"-S"}).status()), HasSubstr("memory-backend-file"));
}

TEST(LabOptionsTest, WrongNumbersAreNamed) {
  EXPECT_THAT(Message(ParseWorkloadOptions("lab.blocks=many").status()), HasSubstr("lab.blocks"));
  EXPECT_THAT(Message(ParseWorkloadOptions("lab.writers=0").status()), HasSubstr("lab.writers"));
  EXPECT_THAT(Message(ParseWorkloadOptions("lab.writers=100 lab.blocks=200").status()),
              HasSubstr("lab.blocks"));
  EXPECT_TRUE(ParseWorkloadOptions("quiet lab.disk=/dev/vdb lab.pages=0x10").ok());
}

}  // namespace
}  // namespace baton::lab
