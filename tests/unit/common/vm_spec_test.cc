#include "common/vm_spec.h"

#include <gmock/gmock.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

namespace baton {
namespace {

using ::google::protobuf::util::MessageDifferencer;
using ::testing::HasSubstr;

constexpr char kFull[] = R"(name: web1
memory: 256MiB
vcpus: 2
machine: pc-q35-7.2
cpu: max
accelerator: tcg
boot:
  kernel: /boot/vmlinuz
  initrd: /boot/initrd
  cmdline: "console=ttyS0 quiet"
devices:
  - name: disk0
    class: blk
    backend:
      socket: /run/qsd/disk0.sock
      kind: qemu-storage-daemon
      recovery: ordered
    num_queues: 2
    queue_size: 256
  - name: net0
    class: net
    mac: 52:54:00:12:34:56
extra_args: [-device, "virtio-rng-pci"]
balloon: on
qemu: "10.0"
)";

TEST(VmSpec, ReadsEveryField) {
  auto spec = ParseVmSpec(kFull, "web1.yaml");
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->name(), "web1");
  EXPECT_EQ(spec->memory_bytes(), 256ull << 20);
  EXPECT_EQ(spec->vcpus(), 2u);
  EXPECT_EQ(spec->machine(), "pc-q35-7.2");
  EXPECT_EQ(spec->cpu(), "max");
  EXPECT_EQ(spec->accelerator(), v1::ACCELERATOR_TCG);
  EXPECT_EQ(spec->boot().cmdline(), "console=ttyS0 quiet");
  ASSERT_EQ(spec->devices_size(), 2);
  EXPECT_EQ(spec->devices(0).backend().socket(), "/run/qsd/disk0.sock");
  EXPECT_EQ(spec->devices(0).backend().kind(), v1::QEMU_STORAGE_DAEMON);
  EXPECT_EQ(spec->devices(0).backend().recovery(), v1::RECOVERY_ORDERED);
  EXPECT_EQ(spec->devices(0).num_queues(), 2u);
  EXPECT_EQ(spec->devices(0).queue_size(), 256u);
  EXPECT_FALSE(spec->devices(1).has_backend());
  EXPECT_EQ(spec->devices(1).mac(), "52:54:00:12:34:56");
  EXPECT_EQ(spec->extra_args(1), "virtio-rng-pci");
  EXPECT_TRUE(spec->balloon());
  EXPECT_EQ(spec->qemu(), "10.0");
}

TEST(VmSpec, YamlRoundTrip) {
  for (const std::string& text :
       {std::string(kFull), std::string("name: a\nmemory: 64MiB\nvcpus: 1\n"),
        std::string("name: a\nmemory: 64MiB\nvcpus: 1\nfree_page_hints: on\n"),
        std::string("name: a\nmemory: 64MiB\nvcpus: 1\nboot: {kernel: /k, cmdline: \"a: 'b' # c\"}\n"
                    "extra_args: ['on', '1', '~', '- x', '']\n")}) {
    auto spec = ParseVmSpec(text, "a");
    ASSERT_TRUE(spec.ok()) << spec.status();
    auto again = ParseVmSpec(VmSpecToYaml(*spec), "b");
    ASSERT_TRUE(again.ok()) << again.status() << VmSpecToYaml(*spec);
    EXPECT_TRUE(MessageDifferencer::Equals(*spec, *again)) << VmSpecToYaml(*spec);
  }
}

TEST(VmSpec, DefaultsAreFilledInAndStable) {
  auto spec = ParseVmSpec(
      "name: a\nmemory: 64MiB\nvcpus: 1\ndevices: [{name: n, class: net}, {name: m, class: net}]\n", "a");
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->machine(), "q35");
  EXPECT_EQ(spec->devices(0).num_queues(), 1u);
  EXPECT_EQ(spec->devices(0).queue_size(), 128u);
  EXPECT_THAT(spec->devices(0).mac(), testing::StartsWith("52:54:00:"));
  EXPECT_NE(spec->devices(0).mac(), spec->devices(1).mac());
  v1::VmSpec again = *spec;
  FillVmSpecDefaults(&again);
  EXPECT_TRUE(MessageDifferencer::Equals(*spec, again));
}

// A wrong line in an otherwise good spec, and what is said about it.
struct Wrong {
  const char* text;
  const char* message;
};
class WrongSpec : public testing::TestWithParam<Wrong> {};

TEST_P(WrongSpec, NamesLineAndField) {
  auto spec = ParseVmSpec(GetParam().text, "s");
  ASSERT_FALSE(spec.ok());
  EXPECT_EQ(spec.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(spec.status()), HasSubstr(GetParam().message));
}

#define BASE "name: a\nmemory: 64MiB\nvcpus: 1\n"
#define DEVICE BASE "devices:\n  - name: d\n    class: blk\n"
INSTANTIATE_TEST_SUITE_P(
    All, WrongSpec,
    testing::Values(
        Wrong{"memory: 64MiB\nvcpus: 1\n", "s:1: the field 'name' is missing"},
        Wrong{"name: a\nvcpus: 1\n", "s:1: the field 'memory' is missing"},
        Wrong{"name: a\nmemory: 64MiB\n", "s:1: the field 'vcpus' is missing"},
        Wrong{"name: Web_1\nmemory: 64MiB\nvcpus: 1\n", "s:1: name: 'Web_1' is not a name"},
        Wrong{"name: ../x\nmemory: 64MiB\nvcpus: 1\n", "s:1: name: '../x' is not a name"},
        Wrong{"name: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\nmemory: 64MiB\nvcpus: 1\n", "s:1: name: "},
        Wrong{"name: a\nmemory: 256MB\nvcpus: 1\n", "s:2: memory: '256MB' is not a size; write 256MiB"},
        Wrong{"name: a\nmemory: 8MiB\nvcpus: 1\n", "s:2: memory: 8MiB is outside 16MiB to 16TiB"},
        Wrong{"name: a\nmemory: 65MiB\nvcpus: 1\n", "s:2: memory: 65MiB is not a multiple of 2MiB"},
        Wrong{"name: a\nmemory: 64MiB\nvcpus: 0\n", "s:3: vcpus: 0 is outside 1 to 255"},
        Wrong{"name: a\nmemory: 64MiB\nvcpus: two\n", "s:3: vcpus: 'two' is not a whole number"},
        Wrong{BASE "memmory: 1\n", "s:4: memmory: unknown field; did you mean 'memory'?"},
        Wrong{BASE "machine: q35,dump=on\n", "s:4: machine: 'q35,dump=on' is not the name of a machine type"},
        Wrong{BASE "accelerator: hvf\n", "s:4: accelerator: 'hvf' is not one of auto, kvm, tcg"},
        Wrong{BASE "qemu: /usr/bin/qemu\n",
              "s:4: qemu: '/usr/bin/qemu' is not a name of the agent's qemu map"},
        Wrong{BASE "boot: {kernel: vmlinuz}\n", "s:4: boot.kernel: 'vmlinuz' is not an absolute path"},
        Wrong{BASE "boot: {initrd: /i}\n", "s:4: boot.initrd: needs boot.kernel"},
        Wrong{BASE "boot:\n  cmdline: x\n", "s:5: boot.cmdline: needs boot.kernel"},
        Wrong{BASE "boot:\n  kernel: /k\n  init: /i\n",
              "s:6: boot.init: unknown field; did you mean 'initrd'?"},
        Wrong{BASE "devices: {name: d}\n", "s:4: devices: expected a list, found a map"},
        Wrong{BASE "devices: [disk0]\n", "s:4: devices[0]: expected a map, found a single value"},
        Wrong{BASE "devices:\n  - name: d\n", "s:5: devices[0]: the field 'class' is missing"},
        Wrong{BASE "devices:\n  - class: blk\n", "s:5: devices[0]: the field 'name' is missing"},
        Wrong{BASE "devices:\n  - name: d\n    class: disk\n",
              "s:6: devices[0].class: 'disk' is not one of blk, net"},
        Wrong{DEVICE "  - name: d\n    class: net\n", "s:7: devices[1].name: 'd' is the name of two devices"},
        Wrong{DEVICE "    mac: 52:54:00:00:00:01\n",
              "s:7: devices[0].mac: only devices of class net have one"},
        Wrong{BASE "devices:\n  - name: n\n    class: net\n    mac: 52:54:00\n",
              "s:7: devices[0].mac: '52:54:00' is not a MAC address"},
        Wrong{BASE "devices:\n  - name: n\n    class: net\n    mac: 53:54:00:00:00:01\n",
              "s:7: devices[0].mac: '53:54:00:00:00:01' is a group address"},
        Wrong{DEVICE "    num_queues: 65\n", "s:7: devices[0].num_queues: 65 is outside 1 to 64"},
        Wrong{DEVICE "    queue_size: 100\n", "s:7: devices[0].queue_size: 100 is not a power of two"},
        Wrong{DEVICE "    backend: /run/x.sock\n",
              "s:7: devices[0].backend: expected a map, found a single value"},
        Wrong{DEVICE "    backend: {socket: x.sock}\n",
              "s:7: devices[0].backend.socket: 'x.sock' is not an absolute path"},
        Wrong{DEVICE "    backend:\n      kind: qsd\n", "s:8: devices[0].backend.kind: 'qsd' is not one of"},
        Wrong{DEVICE "    backend:\n      sokcet: /x\n",
              "s:8: devices[0].backend.sokcet: unknown field; did you mean 'socket'?"},
        Wrong{DEVICE "    backend: {recovery: guess}\n",
              "s:7: devices[0].backend.recovery: 'guess' is not one of"},
        Wrong{BASE "extra_args: -nographic\n", "s:4: extra_args: expected a list, found a single value"},
        Wrong{BASE "extra_args:\n  - -device\n  - --incoming\n",
              "s:6: extra_args[1]: '--incoming' is set by Baton; use the spec's own fields"},
        Wrong{BASE "balloon: maybe\n", "s:4: balloon: 'maybe' is neither on nor off"},
        Wrong{BASE "balloon: on\nfree_page_hints: on\n",
              "free_page_hints: a guest has one balloon; leave `balloon` out"},
        Wrong{BASE "free_page_hints: on\ndevices: [{name: balloon, class: blk}]\n",
              "devices[0].name: 'balloon' is the name of the balloon of free_page_hints"},
        Wrong{"name: [\n", "s:2: not YAML"}, Wrong{"", "s:1: the file is empty"}));

TEST(VmSpec, ReportsSeveralProblemsAtOnce) {
  auto spec = ParseVmSpec("name: A\nmemory: 65MiB\nvcpus: 1\n", "s");
  EXPECT_THAT(Message(spec.status()), HasSubstr("s:1: name: "));
  EXPECT_THAT(Message(spec.status()), HasSubstr("\ns:2: memory: "));
}

TEST(VmSpec, ValidatesWhatCameOverTheWire) {
  v1::VmSpec spec = *ParseVmSpec(kFull, "a");
  ASSERT_TRUE(ValidateVmSpec(spec).ok());
  spec.mutable_devices(0)->set_class_(static_cast<v1::DeviceClass>(99));
  spec.mutable_devices(1)->mutable_backend()->set_kind(static_cast<v1::BackendKind>(99));
  spec.set_accelerator(static_cast<v1::Accelerator>(99));
  spec.mutable_boot()->set_kernel(std::string("/k\0x", 4));
  EXPECT_EQ(Message(ValidateVmSpec(spec)),
            "accelerator: 99 is not a known accelerator\nboot.kernel: contains a NUL character\n"
            "devices[0].class: 99 is not a known class\ndevices[1].backend.kind: 99 is not a known kind");
  for (int i = 0; i < 20; ++i) *spec.add_devices() = spec.devices(0);
  EXPECT_THAT(Message(ValidateVmSpec(spec)), HasSubstr("devices: 22 devices; at most 16"));
}

}  // namespace
}  // namespace baton
