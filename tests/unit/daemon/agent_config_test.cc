#include "agent/daemon/agent_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/durable_file.h"
#include "tests/temp_dir.h"

namespace baton::daemon {
namespace {

using ::testing::HasSubstr;

constexpr char kSmall[] = "name: a\nbatond: 127.0.0.1:7400\npeer: {listen: \"127.0.0.1:7410\"}\n";

std::string Problem(const std::string& text) { return Message(ParseAgentConfig(text, "c").status()); }

TEST(AgentConfig, SmallOneHasDefaults) {
  auto config = ParseAgentConfig(kSmall, "c");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->run_dir, "/run/baton");
  EXPECT_EQ(config->peer.advertise, "127.0.0.1:7410");
  EXPECT_EQ(config->qemu.at("default").path, "/usr/bin/qemu-system-x86_64");
  EXPECT_THAT(config->shim, testing::EndsWith("/baton-shim"));
  EXPECT_EQ(config->dirty_tracking, "auto");
  EXPECT_FALSE(config->kvm);
  EXPECT_FALSE(config->metrics.has_value());
}

TEST(AgentConfig, ReadsEverything) {
  auto config = ParseAgentConfig(R"(name: host-a
batond: control.example:7400
tls: {ca: /t/ca, cert: /t/cert, key: /t/key, server_name: control}
run_dir: /r
state_dir: /s
memory_dir: /m
peer:
  listen: 0.0.0.0:7410
  advertise: host-a:7410
  tls: on
  ca: /t/ca
  cert: /t/cert
  key: /t/key
metrics: 127.0.0.1:7411
qemu:
  default: {path: /usr/bin/qemu}
  "10.0": {path: /opt/qemu, args: [-L, /opt/share], env: {QEMU_MODULE_DIR: /opt/lib}}
kvm: on
backends:
  disk0: {socket: "/run/s/{vm}.sock", kind: qemu-storage-daemon, recovery: ordered}
  web1/disk0: {socket: /run/s/web1.sock}
  "*": {socket: "/run/s/{vm}-{device}.sock"}
backend_hook: {command: [/usr/lib/hook, -v], timeout: 3s}
fences:
  "*": {command: [/usr/lib/fence, "--all"]}
  web1/disk0: {command: [/usr/lib/fence], timeout: 2s}
dirty_tracking: soft-dirty
shim: /opt/baton-shim
log: {level: debug, json: on}
)",
                                 "c");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->peer.require_tls);
  EXPECT_EQ(config->session_server_name, "control");
  EXPECT_EQ(config->qemu.at("10.0").env.at("QEMU_MODULE_DIR"), "/opt/lib");
  EXPECT_EQ(config->backends.at("disk0").recovery(), v1::RECOVERY_ORDERED);
  EXPECT_EQ(config->backend_hook->timeout, std::chrono::seconds(3));
  EXPECT_EQ(config->fences.at("*").command, (std::vector<std::string>{"/usr/lib/fence", "--all"}));
  EXPECT_EQ(config->fences.at("web1/disk0").timeout, std::chrono::seconds(2));
  EXPECT_TRUE(config->log_json);
  EXPECT_EQ(PathsOf(*config, "web1").control, "/r/vms/web1/shim.sock");
  EXPECT_EQ(PathsOf(*config, "web1").memory, "/m/web1.ram");
}

TEST(AgentConfig, WrongOnesNameLineAndField) {
  EXPECT_THAT(Problem("batond: 127.0.0.1:1\npeer: {listen: \"127.0.0.1:1\"}\n"),
              "c:1: the field 'name' is missing");
  EXPECT_THAT(Problem("name: A!\nbatond: 127.0.0.1:1\npeer: {listen: \"127.0.0.1:1\"}\n"),
              HasSubstr("c:1: name: 'A!' is not a name"));
  EXPECT_THAT(Problem("name: a\nbatond: control:7400\npeer: {listen: \"127.0.0.1:1\"}\n"),
              HasSubstr("c:2: batond: is not on this machine, so `tls`"));
  EXPECT_THAT(Problem("name: a\nbatond: 127.0.0.1:1\npeer: {listen: \"0.0.0.0:7410\", advertise: \"x:1\"}\n"),
              HasSubstr("c:3: peer.tls: may be off only where `listen` is a loopback address"));
  EXPECT_THAT(Problem("name: a\nbatond: 127.0.0.1:1\npeer:\n  listen: 127.0.0.1:1\n  tls: on\n"),
              HasSubstr("c:5: peer.tls: is on, but there are no ca, cert and key"));
  EXPECT_THAT(Problem("name: a\nbatond: 127.0.0.1:1\npeer:\n  listen: 127.0.0.1:1\n  cert: /x\n"),
              HasSubstr("c:3: peer: needs ca, cert and key together"));
  EXPECT_THAT(Problem("name: a\nbatond: 127.0.0.1:1\npeer: {listen: \"127.0.0.1:0\"}\n"),
              HasSubstr("c:3: peer: the field 'advertise' is missing"));
  EXPECT_THAT(Problem("name: a\nbatond: 127.0.0.1:1\npeer: {listen: x}\n"),
              HasSubstr("c:3: peer.listen: 'x' is not an address: the port is missing"));
  EXPECT_THAT(Problem(std::string(kSmall) + "run_dir: run\n"), "c:4: run_dir: 'run' is not an absolute path");
  EXPECT_THAT(Problem(std::string(kSmall) + "run_dir: /" + std::string(100, 'x') + "\n"),
              HasSubstr("c:4: run_dir: longer than"));
  EXPECT_THAT(Problem(std::string(kSmall) + "memory_dir: /a,b\n"),
              HasSubstr("c:4: memory_dir: may contain neither"));
  EXPECT_THAT(Problem(std::string(kSmall) + "metrics: unix:/x\n"), "c:4: metrics: must be host:port");
  EXPECT_THAT(Problem(std::string(kSmall) + "qemu:\n  new: {path: /q}\n"),
              "c:4: qemu: the entry 'default' is missing");
  EXPECT_THAT(Problem(std::string(kSmall) + "qemu:\n  default: {pth: /q}\n"),
              HasSubstr("c:5: qemu.default.pth: unknown field; did you mean 'path'?"));
  EXPECT_THAT(Problem(std::string(kSmall) + "backends:\n  disk0: {kind: lab}\n"),
              "c:5: backends.disk0: the field 'socket' is missing");
  EXPECT_THAT(Problem(std::string(kSmall) + "backends:\n  a/b/c: {socket: /x}\n"),
              "c:5: backends.a/b/c: is not a device's name, nor vm/device, nor \"*\"");
  EXPECT_THAT(Problem(std::string(kSmall) + "backend_hook: {command: [hook]}\n"),
              "c:4: backend_hook.command: 'hook' is not an absolute path");
  EXPECT_THAT(Problem(std::string(kSmall) + "fences: {disk0: {command: [hook]}}\n"),
              HasSubstr("command: 'hook' is not an absolute path"));
  EXPECT_THAT(Problem(std::string(kSmall) + "fences: {a/b/c: {command: [/h]}}\n"),
              HasSubstr("nor vm/device"));
  EXPECT_THAT(Problem(std::string(kSmall) + "backend_hook: {command: [/h], timeout: 3}\n"),
              HasSubstr("c:4: backend_hook.timeout: '3' is not a duration"));
  EXPECT_THAT(Problem(std::string(kSmall) + "dirty_tracking: uffdd\n"), HasSubstr("did you mean 'uffd'?"));
  EXPECT_THAT(Problem(std::string(kSmall) + "kwm: on\n"),
              HasSubstr("c:4: kwm: unknown field; did you mean 'kvm'?"));
}

class Environment : public testing::Test {
 protected:
  void SetUp() override {
    config_ = *ParseAgentConfig(kSmall, "c");
    config_.run_dir = dir_ + "/run";
    config_.state_dir = dir_ + "/state";
    config_.memory_dir = dir_ + "/memory";
    config_.shim = "/bin/true";
    config_.qemu["default"].path = "/bin/true";
  }
  std::string Check() { return Message(CheckAgentEnvironment(config_)); }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  AgentConfig config_;
};

TEST_F(Environment, MakesDirectories) {
  EXPECT_EQ(Check(), "");
  struct stat info {};
  ASSERT_EQ(::stat(config_.state_dir.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0700u);
}

TEST_F(Environment, UnusableDirectoriesAreNamed) {
  ASSERT_TRUE(WriteFileDurable(dir_ + "/file", "x").ok());
  config_.run_dir = dir_ + "/file/run";
  EXPECT_EQ(Check(), "run_dir cannot be used: " + dir_ + "/file: File exists");
  config_.run_dir = dir_ + "/run";
  config_.state_dir = "/proc/baton";
  EXPECT_EQ(Check(), "state_dir cannot be used: /proc/baton: No such file or directory");
}

TEST_F(Environment, FullOrReadOnlyStateDirIsNamed) {
  if (::geteuid() != 0) GTEST_SKIP() << "mounting needs root";
  ASSERT_TRUE(MakeDirectories(config_.state_dir).ok());
  if (::mount("tmpfs", config_.state_dir.c_str(), "tmpfs", 0, "size=4k") != 0)
    GTEST_SKIP() << "no mount here";
  // tmpfs of one page: the first file takes it.
  EXPECT_TRUE(WriteFileDurable(config_.state_dir + "/fill", std::string(4096, 'x')).ok());
  absl::Status full = CheckAgentEnvironment(config_);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(full), v1::STATE_WRITE_FAILED);
  EXPECT_THAT(Message(full), HasSubstr("state_dir " + config_.state_dir + " cannot be written: "));
  EXPECT_THAT(Message(full), HasSubstr("No space left on device"));
  EXPECT_EQ(::mount(nullptr, config_.state_dir.c_str(), nullptr, MS_REMOUNT | MS_RDONLY, nullptr), 0);
  EXPECT_THAT(Check(), HasSubstr("Read-only file system"));
  EXPECT_EQ(::umount(config_.state_dir.c_str()), 0);
}

TEST_F(Environment, MissingProgramsAreNamed) {
  config_.shim = dir_ + "/baton-shim";
  EXPECT_EQ(Check(), "shim: install baton-shim or set `shim` to its path: " + dir_ +
                         "/baton-shim: No such file or directory");
  config_.shim = "/etc/passwd";
  EXPECT_EQ(Check(), "shim: /etc/passwd: is not a program that may be executed");
  config_.shim = "/bin/true";
  config_.qemu["default"].path = "/nonexistent/qemu";
  EXPECT_EQ(Check(),
            "qemu.default: install QEMU (qemu-system-x86) or set its `path`: /nonexistent/qemu: No such file "
            "or directory");
  config_.qemu["default"].path = "/bin/true";
  config_.peer.tls = {dir_ + "/ca", dir_ + "/cert", dir_ + "/key"};
  EXPECT_EQ(Check(), "peer.ca: " + dir_ + "/ca: No such file or directory");
  config_.peer.tls = {};
  config_.backend_hook = BackendHook{{"/nonexistent/hook"}};
  EXPECT_THAT(Check(), HasSubstr("backend_hook.command: the hook must exist: /nonexistent/hook"));
}

TEST(AgentConfigTest, Libvirt_IsAWordOrAMap) {
  const std::string rest = "name: a\nbatond: 127.0.0.1:1\npeer: {listen: \"127.0.0.1:2\"}\n";
  auto word = ParseAgentConfig(rest + "libvirt: qemu:///session\n", "agent.yaml");
  ASSERT_TRUE(word.ok()) << word.status();
  EXPECT_EQ(word->libvirt.uri, "qemu:///session");
  EXPECT_EQ(word->libvirt.socket_dir, "/run/baton-libvirt");
  auto map = ParseAgentConfig(rest +
                                  "libvirt:\n  uri: qemu:///system\n  qemu_user: root\n  shared: [/mnt]\n"
                                  "  rules:\n    - {kind: bridge, from: br0, to: br1}\n",
                              "agent.yaml");
  ASSERT_TRUE(map.ok()) << map.status();
  EXPECT_EQ(map->libvirt.qemu_user, "root");
  ASSERT_EQ(map->libvirt.rules.size(), 1u);
  EXPECT_EQ(map->libvirt.rules[0].kind, vmm::RewriteRule::Kind::kBridge);
  EXPECT_EQ(map->libvirt.rules[0].to, "br1");
  auto wrong = ParseAgentConfig(rest +
                                    "libvirt:\n  uri: nonsense\n  shared: [relative]\n"
                                    "  rules:\n    - {kind: road, from: a, to: b}\n",
                                "agent.yaml");
  const std::string why = Message(wrong.status());
  EXPECT_NE(why.find("agent.yaml:5: libvirt.uri"), std::string::npos) << why;
  EXPECT_NE(why.find("libvirt.shared"), std::string::npos) << why;
  EXPECT_NE(why.find("libvirt.rules[0].kind"), std::string::npos) << why;
}

}  // namespace
}  // namespace baton::daemon
