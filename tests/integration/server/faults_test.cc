// What batond says and does when something around it is wrong: its disk, its port, its certificates, its
// signals.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <fstream>

#include "tests/integration/server/fake_agent.h"
#include "tests/integration/server/until.h"
#include "tests/integration/server/watcher.h"
#include "tests/temp_dir.h"

namespace baton::test {
namespace {

using Kind = v1::Command::BodyCase;

class FaultsTest : public ::testing::Test {
 protected:
  // Runs batond until it ends by itself.
  CommandOutput Run(std::vector<std::string> arguments) {
    SpawnOptions options;
    options.argv = {BATOND_PATH};
    options.argv.insert(options.argv.end(), arguments.begin(), arguments.end());
    auto output = RunCommand(options, Deadline::After(std::chrono::seconds(60)));
    EXPECT_TRUE(output.ok()) << output.status();
    return output.ok() ? *output : CommandOutput{};
  }
  const TempDir temp_;
  const std::string& dir_ = temp_.path();
};

TEST_F(FaultsTest, APortInUseIsNamed) {
  BatondHarness first;
  ASSERT_TRUE(first.Start().ok());
  CommandOutput second =
      Run({"--listen", "unix:" + first.socket(), "--metrics", "off", "--data-dir", dir_ + "/other"});
  EXPECT_EQ(second.status.code, 1);
  EXPECT_NE(second.err.find("in use by another process"), std::string::npos) << second.err;
  EXPECT_NE(second.err.find(first.socket()), std::string::npos) << second.err;
  CommandOutput third =
      Run({"--listen", "unix:" + dir_ + "/s", "--metrics", "off", "--data-dir", first.data()});
  EXPECT_EQ(third.status.code, 1);
  EXPECT_NE(third.err.find("another batond"), std::string::npos) << third.err;
}

TEST_F(FaultsTest, WrongConfigurationEndsWith2AndSaysWhere) {
  std::ofstream(dir_ + "/c.yaml") << "listen: 127.0.0.1:0\nlimit: {cluster: 3}\n";
  CommandOutput wrong = Run({"--config", dir_ + "/c.yaml"});
  EXPECT_EQ(wrong.status.code, 2);
  EXPECT_NE(wrong.err.find("c.yaml:2: limit"), std::string::npos) << wrong.err;
  EXPECT_EQ(Run({"--no-such-flag"}).status.code, 2);
  CommandOutput open = Run({"--listen", "0.0.0.0:0", "--metrics", "off", "--data-dir", dir_ + "/d"});
  EXPECT_EQ(open.status.code, 1);
  EXPECT_NE(open.err.find("without TLS is refused"), std::string::npos) << open.err;
}

TEST_F(FaultsTest, AnUnusableDataDirectoryIsNamed) {
  std::ofstream(dir_ + "/file") << "x";
  CommandOutput unusable =
      Run({"--listen", "unix:" + dir_ + "/s", "--metrics", "off", "--data-dir", dir_ + "/file/d"});
  EXPECT_EQ(unusable.status.code, 1);
  EXPECT_NE(unusable.err.find(dir_ + "/file/d"), std::string::npos) << unusable.err;
  std::filesystem::create_directories(dir_ + "/d");
  std::ofstream(dir_ + "/d/baton.db") << std::string(5000, 'x');
  CommandOutput damaged =
      Run({"--listen", "unix:" + dir_ + "/s", "--metrics", "off", "--data-dir", dir_ + "/d"});
  EXPECT_EQ(damaged.status.code, 1);
  EXPECT_NE(damaged.err.find("damaged or not a store"), std::string::npos) << damaged.err;
}

TEST_F(FaultsTest, SigtermEndsCleanlyWithStreamsOpen) {
  BatondHarness batond;
  ASSERT_TRUE(batond.Start().ok());
  FakeAgent agent("a", batond.NewChannel());
  ASSERT_TRUE(agent.AwaitSession());
  Watcher watcher(batond.NewChannel(), "");
  ExitStatus status = batond.Terminate();
  EXPECT_EQ(status.signal, 0) << status.ToString();
  EXPECT_EQ(status.code, 0);
}

// A file system of its own, in a mount namespace of its own, that fills up.
TEST_F(FaultsTest, AFullDiskRefusesAndDoesNotAct) {
  if (std::system("unshare -rm true 2>/dev/null") != 0) GTEST_SKIP() << "no mount namespaces here";
  BatondHarness batond;
  std::filesystem::create_directories(batond.data());
  std::string script = "mount -t tmpfs -o size=3m none " + batond.data() +
                       " && head -c 2000000 /dev/zero > " + batond.data() + "/filler && exec \"$@\"";
  batond.set_wrapper({"unshare", "-rm", "sh", "-c", script, "sh"});
  ASSERT_TRUE(batond.Start().ok());
  FakeAgent a("a", batond.NewChannel()), b("b", batond.NewChannel());
  ASSERT_TRUE(a.AwaitSession() && b.AwaitSession());
  Api api(batond.channel());
  a.AddVm("web1", 1);
  ASSERT_TRUE(Until([&] { return api.GetVm("web1").ok(); }));
  a.Hold(Kind::kInspectVm);
  v1::CreateMigrationRequest request;
  request.mutable_migration()->set_vm("vms/web1");
  request.mutable_migration()->set_destination("hosts/b");
  for (int i = 0; i < 32; ++i) {
    (*request.mutable_migration()->mutable_labels())["label" + std::to_string(i)] = std::string(250, 'x');
  }
  absl::Status status;
  std::string last;
  int created = 0;
  for (; created < 500; ++created) {
    auto made = api.Call(api.migrations(), &v1::Migrations::Stub::CreateMigration, request);
    status = made.status();
    if (!status.ok()) break;
    last = made->name();
    status = api.Cancel(last).status();
    if (!status.ok()) break;
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << created << " " << status;
  EXPECT_EQ(ReasonOf(status), v1::STATE_WRITE_FAILED);
  EXPECT_NE(Message(status).find("disk is full"), std::string::npos) << status;
  // What could not be recorded is not done, and what is recorded can still be read.
  EXPECT_TRUE(api.Get(last).ok());
  EXPECT_LE(a.CommandCount(Kind::kInspectVm), created + 1);
  // Space is back: everything goes on, without a restart.
  std::filesystem::remove("/proc/" + std::to_string(batond.pid()) + "/root" + batond.data() + "/filler");
  Watcher watcher(batond.NewChannel(), last);
  (void)api.Cancel(last);
  EXPECT_EQ(watcher.AwaitPhase(v1::CANCELLED).phase(), v1::CANCELLED);
  EXPECT_TRUE(api.Call(api.migrations(), &v1::Migrations::Stub::CreateMigration, request).ok());
}

class TlsTest : public FaultsTest {
 protected:
  void SetUp() override {
    std::string script = R"(set -e; cd ")" + dir_ + R"("
      openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=ca -keyout ca.key -out ca.pem
      make() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$2" -keyout $1.key -out $1.csr
        printf "subjectAltName=$3" > ext
        openssl x509 -req -in $1.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out $1.pem; }
      make server batond DNS:batond
      make agent agent-a URI:baton://agent/a
      make operator operator:jane DNS:x
      make viewer viewer:bob DNS:x
      make nobody nobody DNS:x)";
    ASSERT_EQ(std::system(("(" + script + ") >/dev/null 2>&1").c_str()), 0);
  }
  TlsFiles Files(const std::string& name) {
    return {dir_ + "/ca.pem", dir_ + "/" + name + ".pem", dir_ + "/" + name + ".key"};
  }
  std::shared_ptr<grpc::Channel> Channel(const BatondHarness& batond, const std::string& who) {
    Address address;
    address.unix_path = batond.socket();
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    return *MakeChannel(address, Files(who), "batond", arguments);
  }
};

TEST_F(TlsTest, RolesComeFromCertificates) {
  TlsFiles own = Files("server");
  BatondHarness batond({"--tls-ca", own.ca, "--tls-cert", own.cert, "--tls-key", own.key});
  batond.set_tls(Files("viewer"), "batond");
  ASSERT_TRUE(batond.Start().ok());
  FakeAgent a("a", Channel(batond, "agent"));
  ASSERT_TRUE(a.AwaitSession());
  // An agent may speak for its own host only, and an operator for none.
  FakeAgent stranger("b", Channel(batond, "agent")), usurper("a", Channel(batond, "operator"));
  for (FakeAgent* wrong : {&stranger, &usurper}) {
    ASSERT_TRUE(Until([&] { return !wrong->last_status().ok(); }));
    EXPECT_EQ(wrong->last_status().error_code(), grpc::StatusCode::PERMISSION_DENIED);
  }
  Api operators(Channel(batond, "operator")), viewers(Channel(batond, "viewer")),
      nobody(Channel(batond, "nobody")), agents(Channel(batond, "agent"));
  EXPECT_TRUE(operators.GetHost("a").ok());
  EXPECT_TRUE(viewers.GetHost("a").ok());
  EXPECT_EQ(nobody.GetHost("a").status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(agents.GetHost("a").status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(viewers.Create("web1", "b").status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(operators.Create("web1", "b").status().code(), absl::StatusCode::kNotFound);
  v1::DeletePolicyRequest remove;
  remove.set_name("policies/x");
  absl::Status denied =
      operators.Call(operators.policies(), &v1::Policies::Stub::DeletePolicy, remove).status();
  EXPECT_EQ(denied.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(ReasonOf(denied), v1::PERMISSION_DENIED_REASON);
  // Without a certificate there is not even a connection.
  Address address;
  address.unix_path = batond.socket();
  auto plain = *MakeChannel(address, {});
  EXPECT_FALSE(v1::Fleet::NewStub(plain) == nullptr);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
  v1::Host host;
  v1::GetHostRequest get;
  get.set_name("hosts/a");
  EXPECT_EQ(v1::Fleet::NewStub(plain)->GetHost(&context, get, &host).error_code(),
            grpc::StatusCode::UNAVAILABLE);
}

}  // namespace
}  // namespace baton::test
