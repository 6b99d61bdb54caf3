// The peer port: connections of friends handed over, those of others closed and counted.
#include "agent/daemon/peer_port.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <netinet/in.h>
#include <poll.h>
#include <prometheus/text_serializer.h>
#include <sched.h>
#include <sys/socket.h>

#include "agent/stream/dial.h"
#include "tests/unit/daemon/agent_fixture.h"

namespace baton::daemon {
namespace {

using ::testing::HasSubstr;

class PeerPortTest : public AgentTest {
 protected:
  void SetUp() override {
    AgentTest::SetUp();
    config_.peer.listen.host = "127.0.0.1";
    tasks_ = std::make_unique<TaskQueue>(2);
    auto port = PeerPort::Start(config_, agent_->vms(), nullptr, agent_->metrics, *tasks_);
    ASSERT_TRUE(port.ok()) << port.status();
    port_ = *std::move(port);
  }
  void TearDown() override {
    tasks_.reset();
    port_.reset();
    AgentTest::TearDown();
  }

  UniqueFd Dial() {
    UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port_->port());
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    return fd;
  }
  static void Send(const UniqueFd& fd, const void* data, size_t size) {
    EXPECT_EQ(::send(fd.get(), data, size, MSG_NOSIGNAL), static_cast<ssize_t>(size));
  }
  // What comes until the other side closes, or a line.
  static std::string ReadLine(const UniqueFd& fd) {
    std::string text;
    char c;
    pollfd poll_fd{fd.get(), POLLIN, 0};
    while (::poll(&poll_fd, 1, 20000) > 0 && ::recv(fd.get(), &c, 1, 0) == 1) {
      text += c;
      if (c == '\n') break;
    }
    return text;
  }
  static bool Closed(const UniqueFd& fd) { return ReadLine(fd).empty(); }
  double Count(const std::string& outcome) {
    std::string want = "outcome=\"" + outcome + "\"} ";
    std::string text = prometheus::TextSerializer().Serialize(agent_->metrics.registry()->Collect());
    size_t at = text.find(want);
    return at == std::string::npos ? 0 : std::atof(text.c_str() + at + want.size());
  }
  stream::PreambleBytes Preamble(const std::string& migration, const std::string& token,
                                 stream::PreambleKind kind = stream::PreambleKind::kChannel) {
    stream::Preamble preamble;
    preamble.kind = kind;
    preamble.migration_id = migration;
    preamble.token = *stream::MakeToken(token);
    return *stream::EncodePreamble(preamble);
  }
  stream::DialOptions Options(const std::string& migration, const std::string& token) {
    stream::DialOptions options;
    options.address = fmt::format("127.0.0.1:{}", port_->port());
    options.migration_id = migration;
    options.token = *stream::MakeToken(token);
    return options;
  }
  absl::StatusOr<v1::Verdict> Ask(const std::string& migration, const std::string& token) {
    ASSIGN_OR_RETURN(auto channel, stream::DialVerdictQuery(Options(migration, token), Soon()));
    v1::PeerMessage query;
    query.mutable_verdict_query()->set_migration_id(migration);
    RETURN_IF_ERROR(channel->Send(query, Soon()));
    ASSIGN_OR_RETURN(v1::PeerMessage answer, channel->Receive(Soon()));
    return answer.verdict();
  }

  std::unique_ptr<TaskQueue> tasks_;
  std::unique_ptr<PeerPort> port_;
};

TEST_F(PeerPortTest, HandsTheSocketToTheRightShim) {
  auto first = Prepare("m1", false, Spec("vm1"));
  auto second = Prepare("m2", false, Spec("vm2"));
  ASSERT_TRUE(first.ok() && second.ok());
  UniqueFd fd = Dial();
  stream::PreambleBytes bytes = Preamble("m2", second->token());
  // In two pieces: the second one arrives when the first has been read.
  Send(fd, bytes.data(), 50);
  Send(fd, bytes.data() + 50, bytes.size() - 50);
  EXPECT_EQ(ReadLine(fd), "served by vm2\n");
  UniqueFd other = Dial();
  bytes = Preamble("m1", first->token());
  Send(other, bytes.data(), bytes.size());
  EXPECT_EQ(ReadLine(other), "served by vm1\n");
}

TEST_F(PeerPortTest, GarbageIsClosedAndCounted) {
  auto prepared = Prepare("m1");
  ASSERT_TRUE(prepared.ok());
  std::string garbage(128, 'G');
  UniqueFd http = Dial();
  Send(http, garbage.data(), garbage.size());
  EXPECT_TRUE(Closed(http));
  stream::PreambleBytes bytes = Preamble("m1", prepared->token());
  bytes[8] = 99;  // version
  UniqueFd version = Dial();
  Send(version, bytes.data(), bytes.size());
  EXPECT_TRUE(Closed(version));
  EXPECT_EQ(Count("bad_preamble"), 2);
  UniqueFd unknown = Dial();
  bytes = Preamble("m7", prepared->token());
  Send(unknown, bytes.data(), bytes.size());
  EXPECT_TRUE(Closed(unknown));
  EXPECT_EQ(Count("unknown_migration"), 1);
  UniqueFd token = Dial();
  bytes = Preamble("m1", std::string(32, 't'));
  Send(token, bytes.data(), bytes.size());
  EXPECT_TRUE(Closed(token));
  EXPECT_EQ(Count("bad_token"), 1);
  UniqueFd part = Dial();
  Send(part, bytes.data(), 100);
  ::shutdown(part.get(), SHUT_WR);
  EXPECT_TRUE(Closed(part));
  EXPECT_EQ(Count("closed"), 1);
  // And none of that hurt.
  UniqueFd good = Dial();
  bytes = Preamble("m1", prepared->token());
  Send(good, bytes.data(), bytes.size());
  EXPECT_EQ(ReadLine(good), "served by vm1\n");
}

TEST_F(PeerPortTest, SilentConnectionsAreBoundedInNumberAndTime) {
  auto prepared = Prepare("m1");
  ASSERT_TRUE(prepared.ok());
  std::vector<UniqueFd> silent;
  for (size_t i = 0; i < PeerPort::kMaxUnknown + 10; ++i) silent.push_back(Dial());
  // The surplus is closed at once, the others when their time is up.
  EXPECT_TRUE(Closed(silent.back()));
  EXPECT_TRUE(Closed(silent.front()));
  for (const UniqueFd& fd : silent) EXPECT_TRUE(Closed(fd));
  EXPECT_EQ(Count("too_many"), 10);
  EXPECT_EQ(Count("timeout"), static_cast<double>(PeerPort::kMaxUnknown));
  UniqueFd good = Dial();
  stream::PreambleBytes bytes = Preamble("m1", prepared->token());
  Send(good, bytes.data(), bytes.size());
  EXPECT_EQ(ReadLine(good), "served by vm1\n");
}

TEST_F(PeerPortTest, AnswersVerdictsForDeadShims) {
  auto prepared = Prepare("m1");
  ASSERT_TRUE(prepared.ok());
  ASSERT_TRUE(KillProcess(Shim(), Soon()).ok());
  auto verdict = Ask("m1", prepared->token());
  ASSERT_TRUE(verdict.ok()) << verdict.status();
  EXPECT_EQ(verdict->verdict(), v1::REFUSED);
  EXPECT_EQ(Ask("m1", prepared->token())->verdict(), v1::REFUSED);  // and again, from what is remembered
  EXPECT_FALSE(Ask("m1", std::string(32, 'x')).ok());
  // Counted once the answer is out, which is a moment before the asker has read it or after.
  for (Deadline wait = Soon(); Count("verdict_answered") < 2 && !wait.Expired();) ::sched_yield();
  EXPECT_EQ(Count("verdict_answered"), 2);
}

TEST_F(PeerPortTest, OwnerWhoseShimDiedIsAdoptedAndAnswers) {
  auto prepared = Prepare("m1");
  ASSERT_TRUE(prepared.ok());
  ASSERT_TRUE(Drive(2, "").ok());
  ASSERT_TRUE(KillProcess(Shim(), Soon()).ok());
  // By the new shim (which in this test says only who it is) or by the agent: never REFUSED.
  auto channel = stream::DialVerdictQuery(Options("m1", prepared->token()), Soon());
  ASSERT_TRUE(channel.ok());
  v1::PeerMessage query;
  query.mutable_verdict_query()->set_migration_id("m1");
  ASSERT_TRUE((*channel)->Send(query, Soon()).ok());
  auto answer = (*channel)->Receive(Soon());
  EXPECT_TRUE(!answer.ok() || answer->verdict().verdict() == v1::OWNER);
  EXPECT_TRUE(ProcessAlive(Vmm()));
}

TEST_F(PeerPortTest, PortInUseIsSaid) {
  AgentConfig second = config_;
  second.peer.listen.port = port_->port();
  auto port = PeerPort::Start(second, agent_->vms(), nullptr, agent_->metrics, *tasks_);
  EXPECT_EQ(port.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(Message(port.status()),
              HasSubstr(fmt::format("peer.listen: 127.0.0.1:{} is in use", port_->port())));
  second.peer.listen.host = "192.0.2.1";  // TEST-NET-1: nobody's
  second.peer.listen.port = 0;
  EXPECT_THAT(Message(PeerPort::Start(second, agent_->vms(), nullptr, agent_->metrics, *tasks_).status()),
              HasSubstr("peer.listen: 192.0.2.1:0: Cannot assign requested address"));
}

}  // namespace
}  // namespace baton::daemon
