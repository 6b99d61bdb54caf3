#include "agent/vmm/libvirt/qemu_view.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/vmm/libvirt/inventory.h"

namespace baton::vmm {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::Pair;

TEST(QemuView, VersionOfQemu72) {
  auto version = ReadQemuVersion(R"({"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"})");
  ASSERT_TRUE(version.ok()) << version.status();
  EXPECT_EQ(*version, "QEMU 7.2.22");
}

TEST(ForgetsWrites, OnlyAnEmulatedGuestInAQemuBefore9) {
  const std::string tcg = "<domain type='qemu' id='3'>\n  <name>'kvm'</name>";
  const std::string kvm = "<domain type='kvm' id='3'>\n  <emulator>'qemu'</emulator>";
  auto version = [](int major) {
    return absl::StatusOr<std::string>(
        fmt::format(R"({{"qemu": {{"micro": 2, "minor": 1, "major": {}}}, "package": ""}})", major));
  };
  for (int major : {2, 7, 8}) {
    EXPECT_TRUE(ForgetsWrites(tcg, version(major))) << major;
    EXPECT_FALSE(ForgetsWrites(kvm, version(major))) << major;
  }
  for (int major : {9, 10, 11}) EXPECT_FALSE(ForgetsWrites(tcg, version(major))) << major;
}

TEST(ForgetsWrites, AQemuThatDoesNotSay_IsTakenForOneThatDoes) {
  const std::string tcg = "<domain type='qemu'>", kvm = "<domain type='kvm'>";
  const absl::StatusOr<std::string> answers[] = {absl::DeadlineExceededError("it hangs"),
                                                 "",
                                                 "[]",
                                                 "{}",
                                                 R"({"qemu": 10})",
                                                 R"({"qemu": {"minor": 9}})"};
  for (const auto& answer : answers) {
    EXPECT_TRUE(ForgetsWrites(tcg, answer));
    EXPECT_FALSE(ForgetsWrites(kvm, answer));
  }
}

TEST(QemuView, BlockedReasons_AreTaken) {
  auto none = ReadBlockers("{}");
  ASSERT_TRUE(none.ok());
  EXPECT_THAT(*none, IsEmpty());
  auto two = ReadBlockers(
      R"({"status": "none", "blocked-reasons": ["VFIO device doesn't support migration", 7, "x"]})");
  ASSERT_TRUE(two.ok());
  EXPECT_THAT(*two, ElementsAre("VFIO device doesn't support migration", "x"));
}

TEST(QemuView, StateOfTheMigration) {
  auto status = [](const char* answer) { return ReadMigrationStatus(answer); };
  EXPECT_EQ(status("{}").value(), "") << "there was none";
  EXPECT_EQ(status(R"({"status": "postcopy-paused", "ram": {"total": 1}})").value(), "postcopy-paused");
  EXPECT_FALSE(status(R"({"status": 7})").ok());
  EXPECT_FALSE(status("[]").ok());
  EXPECT_FALSE(status(("{\"status\": \"" + std::string(65, 'x') + "\"}").c_str()).ok());
}

TEST(QemuView, VirtioPaths_GiveTheDeviceId) {
  auto paths = ReadVirtioPaths(
      R"([{"name": "virtio-blk", "path": "/machine/peripheral/virtio-disk0/virtio-backend"},
          {"name": "virtio-net", "path": "/machine/peripheral-anon/device[0]/virtio-backend"}, {"name": "odd"}])");
  ASSERT_TRUE(paths.ok()) << paths.status();
  EXPECT_THAT(*paths, ElementsAre(Pair("/machine/peripheral/virtio-disk0/virtio-backend", "virtio-disk0")));
}

TEST(QemuView, VirtioStatus_GivesFeatureNamesAndVhost) {
  auto view = ReadVirtioStatus(
      R"({"started": true, "vhost-started": true, "guest-features": {"dev-features":
          ["VIRTIO_BLK_F_FLUSH: Flush command supported"], "transports": ["VIRTIO_F_VERSION_1: modern"]}})");
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_TRUE(view->started && view->vhost_started);
  EXPECT_THAT(view->guest_features, ElementsAre("VIRTIO_BLK_F_FLUSH", "VIRTIO_F_VERSION_1"));
}

TEST(QemuView, AnswersThatAreNoQmp_AreErrors) {
  for (const char* text : {"", "[]", "nonsense", "{\"qemu\": 7}"})
    EXPECT_FALSE(ReadQemuVersion(text).ok()) << text;
  EXPECT_FALSE(ReadBlockers("[]").ok());
  EXPECT_FALSE(ReadVirtioPaths("{}").ok());
  EXPECT_FALSE(ReadVirtioStatus("3").ok());
}

TEST(VmIdOf, NameWhereItCanBeOne_ElseUuid) {
  EXPECT_EQ(VmIdOf("web1", "u"), "web1");
  EXPECT_EQ(VmIdOf("ns_vm", "4dea22b3"), "4dea22b3");
  EXPECT_EQ(VmIdOf("Has Blanks", "4dea22b3"), "4dea22b3");
}

TEST(StateOf, EachStateOfLibvirt_HasOneOfOurs) {
  std::string words;
  EXPECT_EQ(StateOf(VIR_DOMAIN_RUNNING, 0, false, &words), v1::Vm::RUNNING);
  EXPECT_EQ(words, "");
  EXPECT_EQ(StateOf(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_IOERROR, false, &words), v1::Vm::PAUSED);
  EXPECT_EQ(words, "paused by an I/O error");
  EXPECT_EQ(StateOf(VIR_DOMAIN_PAUSED, VIR_DOMAIN_PAUSED_MIGRATION, true, &words), v1::Vm::INCOMING);
  EXPECT_EQ(StateOf(VIR_DOMAIN_SHUTOFF, VIR_DOMAIN_SHUTOFF_MIGRATED, false, &words), v1::Vm::STOPPED);
  EXPECT_EQ(words, "moved to another host");
  EXPECT_EQ(StateOf(99, 0, false, &words), v1::Vm::STATE_UNSPECIFIED);
}

}  // namespace
}  // namespace baton::vmm
