#include "agent/vmm/qmp/qemu_command.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace baton::vmm {
namespace {

using testing::Contains;
using testing::HasSubstr;

QemuCommand Command() {
  QemuCommand command;
  command.spec.set_name("web1");
  command.spec.set_memory_bytes(256u << 20);
  command.spec.set_vcpus(2);
  command.run_dir = "/run/baton/vms/web1";
  command.memory_path = "/dev/shm/baton/web1.ram";
  return command;
}

void AddDevice(QemuCommand& command, const std::string& name, v1::DeviceClass device_class, uint32_t queues) {
  v1::DeviceSpec* device = command.spec.add_devices();
  device->set_name(name);
  device->set_class_(device_class);
  device->set_num_queues(queues);
}

// The values that follow `option`.
std::vector<std::string> Values(const std::vector<std::string>& argv, const std::string& option) {
  std::vector<std::string> values;
  for (size_t i = 0; i + 1 < argv.size(); ++i) {
    if (argv[i] == option) values.push_back(argv[i + 1]);
  }
  return values;
}

TEST(QemuCommand, MemoryIsANamedSharedFile) {
  auto argv = BuildQemuCommand(Command());
  ASSERT_TRUE(argv.ok()) << argv.status();
  EXPECT_THAT(
      Values(*argv, "-object"),
      Contains("memory-backend-file,id=mem,size=268435456,share=on,mem-path=/dev/shm/baton/web1.ram"));
  EXPECT_THAT(Values(*argv, "-machine"), Contains("q35,memory-backend=mem"));
  EXPECT_THAT(Values(*argv, "-m"), Contains("size=262144k"));
}

TEST(QemuCommand, GuestIsAlwaysCreatedStopped) {
  QemuCommand command = Command();
  EXPECT_THAT(*BuildQemuCommand(command), Contains("-S"));
  EXPECT_THAT(*BuildQemuCommand(command), testing::Not(Contains("-incoming")));
  command.incoming = true;
  EXPECT_THAT(*BuildQemuCommand(command), Contains("-S"));
  EXPECT_THAT(Values(*BuildQemuCommand(command), "-incoming"), Contains("defer"));
}

TEST(QemuCommand, HintBalloon_IsAGenericVhostUserDevice) {
  QemuCommand command = Command();
  command.spec.set_free_page_hints(true);
  auto argv = BuildQemuCommand(command);
  ASSERT_TRUE(argv.ok()) << argv.status();
  EXPECT_THAT(Values(*argv, "-chardev"),
              Contains("socket,id=char-balloon,path=/run/baton/vms/web1/dev-balloon.sock,reconnect=1"));
  EXPECT_THAT(Values(*argv, "-device"),
              Contains("vhost-user-device-pci,id=dev-balloon,chardev=char-balloon,virtio-id=5,num_vqs=4,"
                       "vq_size=128,config_size=16,disable-legacy=on,bus=pcie.0,addr=0x1d"));
}

TEST(QemuCommand, BothHostsGetTheSameHardware) {
  QemuCommand source = Command();
  AddDevice(source, "disk0", v1::BLK, 4);
  AddDevice(source, "nic0", v1::NET, 2);
  QemuCommand destination = source;
  destination.run_dir = "/elsewhere";
  destination.incoming = true;
  EXPECT_EQ(Values(*BuildQemuCommand(source), "-device"), Values(*BuildQemuCommand(destination), "-device"));
}

TEST(QemuCommand, DevicesHaveFixedSlotsAndTheFirstDiskBoots) {
  QemuCommand command = Command();
  AddDevice(command, "nic0", v1::NET, 1);
  AddDevice(command, "disk0", v1::BLK, 0);
  AddDevice(command, "disk1", v1::BLK, 3);
  command.spec.set_balloon(true);
  auto devices = Values(*BuildQemuCommand(command), "-device");
  ASSERT_EQ(devices.size(), 4u);
  EXPECT_THAT(devices[0],
              testing::AllOf(HasSubstr("virtio-net-pci"), HasSubstr("addr=0x4"), HasSubstr("mac=52:54:00:")));
  EXPECT_THAT(devices[1],
              testing::AllOf(HasSubstr("vhost-user-blk-pci"), HasSubstr("num-queues=1,queue-size=128"),
                             HasSubstr("addr=0x5"), HasSubstr("bootindex=1")));
  EXPECT_THAT(devices[2], testing::AllOf(HasSubstr("num-queues=3"), HasSubstr("addr=0x6"),
                                         testing::Not(HasSubstr("bootindex"))));
  EXPECT_THAT(devices[3], testing::AllOf(HasSubstr("virtio-balloon-pci"), HasSubstr("free-page-reporting=on"),
                                         HasSubstr("addr=0x1d")));
}

TEST(QemuCommand, ReconnectsInTheWayThatQemuKnows) {
  QemuCommand command = Command();
  AddDevice(command, "disk0", v1::BLK, 1);
  EXPECT_THAT(Values(*BuildQemuCommand(command), "-chardev"),
              Contains("socket,id=char-disk0,path=/run/baton/vms/web1/dev-disk0.sock,reconnect=1"));
  command.reconnect_ms = true;
  EXPECT_THAT(Values(*BuildQemuCommand(command), "-chardev"),
              Contains("socket,id=char-disk0,path=/run/baton/vms/web1/dev-disk0.sock,reconnect-ms=200"));
}

TEST(QemuCommand, CommasInPathsAreDoubled) {
  QemuCommand command = Command();
  command.memory_path = "/dev/shm/a,b.ram";
  EXPECT_THAT(Values(*BuildQemuCommand(command), "-object"),
              Contains(HasSubstr("mem-path=/dev/shm/a,,b.ram")));
}

TEST(QemuCommand, MultiqueueNicHasAVectorForEachQueue) {
  QemuCommand command = Command();
  command.kvm = true;
  AddDevice(command, "nic0", v1::NET, 4);
  auto argv = BuildQemuCommand(command);
  EXPECT_THAT(Values(*argv, "-netdev"), Contains("vhost-user,id=net-nic0,chardev=char-nic0,queues=4"));
  EXPECT_THAT(Values(*argv, "-device"), Contains(HasSubstr("mq=on,vectors=10")));
}

TEST(QemuCommand, NicWithoutKvmHasNoVectors) {
  QemuCommand command = Command();
  command.kvm = false;
  AddDevice(command, "nic0", v1::NET, 1);
  EXPECT_THAT(Values(*BuildQemuCommand(command), "-device"), Contains(HasSubstr(",vectors=0")));
}

TEST(QemuCommand, ExtraArgumentsComeAsTheyAre) {
  QemuCommand command = Command();
  command.qemu_args = {"-L", "/opt/qemu"};
  command.spec.add_extra_args("-rtc");
  command.spec.add_extra_args("base=utc");
  auto argv = BuildQemuCommand(command);
  EXPECT_EQ((*argv)[1], "-L");
  EXPECT_EQ(argv->back(), "base=utc");
}

TEST(QemuCommand, SocketPathTooLong_NamesIt) {
  QemuCommand command = Command();
  AddDevice(command, "disk0", v1::BLK, 1);
  command.run_dir = "/" + std::string(92, 'd');
  absl::Status status = BuildQemuCommand(command).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(status), testing::AllOf(HasSubstr("sock"), HasSubstr("107")));
}

TEST(QemuCommand, BadSpec_NamesTheField) {
  QemuCommand command = Command();
  command.spec.set_memory_bytes(1234567890);
  EXPECT_THAT(Message(BuildQemuCommand(command).status()), HasSubstr("memory"));
  command = Command();
  AddDevice(command, "disk0", v1::DEVICE_CLASS_UNSPECIFIED, 1);
  EXPECT_THAT(Message(BuildQemuCommand(command).status()), HasSubstr("devices[0].class"));
}

TEST(ParseQemuVersion, ReadsTheFirstLine) {
  auto version = ParseQemuVersion("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)");
  ASSERT_TRUE(version.ok());
  EXPECT_EQ(version->major, 7);
  EXPECT_EQ(version->minor, 2);
  EXPECT_EQ(ParseQemuVersion("GNU bash").status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace baton::vmm
