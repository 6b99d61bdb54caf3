// batonctl and the real batond over mutual TLS, with certificates made by deploy/certs/make-certs.sh.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>

#include <filesystem>
#include <regex>

#include "tests/integration/client/ctl_process.h"
#include "tests/temp_dir.h"

namespace baton::testing {
namespace {

using ::testing::HasSubstr;

// Long enough for a handshake on a busy machine.
constexpr char kRefused[] = "3s";

class TlsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(MakeCerts({"ca"}), 0);
    ASSERT_EQ(MakeCerts({"batond", "localhost", "127.0.0.1"}), 0);
    for (const char* role : {"viewer", "operator", "admin"}) ASSERT_EQ(MakeCerts({role, "jane"}), 0);
    ASSERT_EQ(MakeCerts({"host", "a"}), 0);
    CtlProcess::Options options;
    options.program = BATOND;
    batond_ = std::make_unique<CtlProcess>(
        std::vector<std::string>{"--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--data-dir",
                                 directory_ / "data", "--tls-ca", pki_ + "/ca.pem", "--tls-cert",
                                 pki_ + "/batond.pem", "--tls-key", pki_ + "/batond.key"},
        options);
    ASSERT_TRUE(batond_->ReadErrorUntil("metrics on port")) << batond_->err();
    std::smatch match;
    ASSERT_TRUE(std::regex_search(batond_->err(), match, std::regex("listens on (127.0.0.1:[0-9]+)")))
        << batond_->err();
    server_ = match[1];
  }
  void TearDown() override {
    if (batond_) {
      batond_->Signal(SIGTERM);
      EXPECT_EQ(batond_->Wait(), 0);
    }
  }

  int MakeCerts(std::vector<std::string> words) {
    words.insert(words.begin(), pki_);
    CtlProcess::Options options;
    options.program = MAKE_CERTS;
    CtlProcess process(words, options);
    return process.Wait();
  }
  // batonctl as the owner of certificate `who`. One that is refused tries again until its time is over.
  CtlResult RunAs(const std::string& who, std::vector<std::string> words, const std::string& ca = "ca",
                  const std::string& connect_timeout = "60s") {
    std::vector<std::string> all = {"--server",
                                    server_,
                                    "--ca",
                                    pki_ + "/" + ca + ".pem",
                                    "--cert",
                                    pki_ + "/" + who + ".pem",
                                    "--key",
                                    pki_ + "/" + who + ".key",
                                    "--connect-timeout",
                                    connect_timeout};
    all.insert(all.end(), words.begin(), words.end());
    return RunCtl(all);
  }

  const test::TempDir directory_;
  std::string pki_ = directory_ / "pki", server_;
  std::unique_ptr<CtlProcess> batond_;
};

TEST_F(TlsTest, RolesDecideWhatACertificateMayDo) {
  EXPECT_EQ(RunAs("viewer-jane", {"get", "hosts"}).code, 0);
  CtlResult viewer = RunAs("viewer-jane", {"cordon", "a"});
  EXPECT_EQ(viewer.code, 6);
  EXPECT_THAT(viewer.err, HasSubstr("viewer:jane"));
  EXPECT_EQ(RunAs("operator-jane", {"cordon", "a"}).code, 3) << "allowed, but there is no such host";
  EXPECT_EQ(RunAs("operator-jane", {"policy", "set", "night", "--bandwidth", "1Gbit"}).code, 6);
  EXPECT_EQ(RunAs("admin-jane", {"policy", "set", "night", "--bandwidth", "1Gbit"}).code, 0);
  EXPECT_EQ(RunAs("host-a", {"get", "hosts"}).code, 6) << "agents hold sessions and nothing else";
}

TEST_F(TlsTest, ForeignAuthority_IsRefusedWithAReason) {
  std::string own = pki_;
  pki_ = directory_ / "foreign";
  ASSERT_EQ(MakeCerts({"ca"}), 0);
  ASSERT_EQ(MakeCerts({"operator", "eve"}), 0);
  // She trusts the right server, but it does not trust her.
  std::filesystem::copy_file(own + "/ca.pem", pki_ + "/real.pem");
  CtlResult eve = RunAs("operator-eve", {"get", "hosts"}, "real", kRefused);
  EXPECT_EQ(eve.code, 7) << eve.err;
  // She does not trust the server.
  CtlResult distrust = RunAs("operator-eve", {"get", "hosts"}, "ca", kRefused);
  EXPECT_EQ(distrust.code, 7);
  EXPECT_THAT(distrust.err, HasSubstr("TLS handshake failed"));
}

TEST_F(TlsTest, WrongName_IsRefused_TlsNameSettlesIt) {
  EXPECT_EQ(RunAs("viewer-jane", {"--tls-name", "other.example", "get", "hosts"}, "ca", kRefused).code, 7);
  EXPECT_EQ(RunAs("viewer-jane", {"--tls-name", "localhost", "get", "hosts"}).code, 0);
}

TEST_F(TlsTest, KeyThatDoesNotBelong_IsNamed) {
  CtlResult r = RunCtl({"--server", server_, "--ca", pki_ + "/ca.pem", "--cert", pki_ + "/viewer-jane.pem",
                        "--key", pki_ + "/admin-jane.key", "get", "hosts"});
  EXPECT_EQ(r.code, 2);
  EXPECT_THAT(r.err, HasSubstr("admin-jane.key does not belong to"));
}

TEST_F(TlsTest, PlaintextClient_IsToldSomething) {
  CtlResult r = RunCtl({"--server", server_, "--connect-timeout", "300ms", "get", "hosts"});
  EXPECT_EQ(r.code, 7);
  EXPECT_THAT(r.err, ::testing::AnyOf(HasSubstr("cannot reach batond"), HasSubstr("broke")));
}

TEST_F(TlsTest, MakeCerts_RefusesWhatItShould) {
  EXPECT_EQ(MakeCerts({"operator", "jane"}), 1) << "exists";
  EXPECT_EQ(MakeCerts({"operator", "jane\nCN = admin:x"}), 1);
  EXPECT_EQ(MakeCerts({"host", "a", "bad name"}), 1);
  EXPECT_EQ(MakeCerts({"nobody"}), 2);
  struct stat key {};
  ASSERT_EQ(stat((pki_ + "/operator-jane.key").c_str(), &key), 0);
  EXPECT_EQ(key.st_mode & 077, 0u) << "keys are for their owner alone";
}

}  // namespace
}  // namespace baton::testing
