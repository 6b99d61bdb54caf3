// What goes through a tunnel, and what it refuses.
#include "agent/stream/tunnel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <future>
#include <thread>

#include "agent/stream/tunnel_relay.h"
#include "tests/unit/stream/tunnel_testing.h"

namespace baton::stream {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

INSTANTIATE_TEST_SUITE_P(, TunnelTest, testing::Values(Carrier::kCopy, Carrier::kSplice, Carrier::kTls),
                         [](const auto& with) {
                           return with.param == Carrier::kCopy     ? "Copy"
                                  : with.param == Carrier::kSplice ? "Splice"
                                                                   : "Tls";
                         });

TEST_P(TunnelTest, BothDirectionsAtOnce_EveryByteArrives) {
  Listen();
  Start();
  UniqueFd program = Connect();
  UniqueFd service = Served();
  // Far more than sockets and pipes hold, and no multiple of anything.
  const std::string there = Pattern((9u << 20) + 12345, 1), back = Pattern((7u << 20) + 54321, 2);
  std::thread writers[] = {std::thread([&] { EXPECT_TRUE(SendAll(program.get(), there)); }),
                           std::thread([&] { EXPECT_TRUE(SendAll(service.get(), back)); })};
  auto received = std::async(std::launch::async, [&] { return ReceiveAll(service.get(), there.size()); });
  EXPECT_EQ(ReceiveAll(program.get(), back.size()) == back, true);
  EXPECT_EQ(received.get() == there, true);
  for (auto& writer : writers) writer.join();
  program.reset();
  EXPECT_EQ(ReceiveAll(service.get()), "");
  service.reset();
  AwaitActive(0);
  const TunnelCounts in = entrance_->counts(TunnelService::kVmm), out = exit_->counts(TunnelService::kVmm);
  EXPECT_EQ(in.to_peer, there.size());
  EXPECT_EQ(in.from_peer, back.size());
  EXPECT_EQ(out.to_peer, back.size());
  EXPECT_EQ(out.from_peer, there.size());
  EXPECT_EQ(in.opened, 1u);
  EXPECT_EQ(in.broken + out.broken, 0u);
  EXPECT_EQ(entrance_->counts(TunnelService::kNbd).opened, 0u);
}

TEST_P(TunnelTest, HalfCloseOfTheProgram_LeavesTheAnswersWay) {
  Listen();
  Start();
  UniqueFd program = Connect();
  UniqueFd service = Served();
  const std::string question = Pattern(3u << 20, 3), answer = Pattern((2u << 20) + 1, 4);
  std::thread writer([&] {
    EXPECT_TRUE(SendAll(program.get(), question));
    EXPECT_EQ(::shutdown(program.get(), SHUT_WR), 0);
  });
  EXPECT_EQ(ReceiveAll(service.get()) == question, true) << "the service sees the end";
  writer.join();
  std::thread answerer([&] {
    EXPECT_TRUE(SendAll(service.get(), answer)) << "its own direction is open still";
    service.reset();
  });
  EXPECT_EQ(ReceiveAll(program.get()) == answer, true);
  answerer.join();
  AwaitActive(0);
  EXPECT_EQ(troubles_.size() + exit_troubles_.size(), 0u);
}

TEST_P(TunnelTest, HalfCloseOfTheService_LeavesTheQuestionsWay) {
  Listen();
  Start();
  UniqueFd program = Connect();
  UniqueFd service = Served();
  ASSERT_TRUE(SendAll(service.get(), "greeting"));
  ASSERT_EQ(::shutdown(service.get(), SHUT_WR), 0);
  EXPECT_EQ(ReceiveAll(program.get()), "greeting");
  const std::string more = Pattern(3u << 20, 5);
  std::thread writer([&] {
    EXPECT_TRUE(SendAll(program.get(), more));
    program.reset();
  });
  EXPECT_EQ(ReceiveAll(service.get()) == more, true);
  writer.join();
  AwaitActive(0);
  EXPECT_EQ(troubles_.size() + exit_troubles_.size(), 0u);
}

TEST_P(TunnelTest, ConnectionsReachTheServiceInOrder) {
  Listen();
  exit_ = std::make_unique<TunnelExit>(exit_options_);
  // Hands two connections on in the wrong order wherever there are two to choose from.
  hands_ = std::thread([this] {
    while (UniqueFd first = Accepted()) {
      const uint32_t channel = channel_;
      pollfd another{port_.get(), POLLIN, 0};
      UniqueFd second;
      if (::poll(&another, 1, 100) > 0) second = Accepted();
      if (second) exit_->Accept(std::move(second), channel_, tls_);
      exit_->Accept(std::move(first), channel, tls_);
    }
  });
  StartEntrance();
  std::vector<UniqueFd> programs;
  for (char name = 'a'; name < 'g'; ++name) {
    programs.push_back(Connect());
    ASSERT_TRUE(SendAll(programs.back().get(), std::string(1, name)));
  }
  std::string order;
  std::vector<UniqueFd> served;
  for (size_t i = 0; i < programs.size(); ++i) {
    served.push_back(Served());
    order += ReceiveAll(served.back().get(), 1);
  }
  EXPECT_EQ(order, "abcdef");
}

TEST_P(TunnelTest, ServiceAbsent_ClosesTheProgramsConnectionAndSaysWhy) {
  Start();
  UniqueFd program = Connect();
  EXPECT_EQ(ReceiveAll(program.get()), "");
  const absl::Status why = troubles_.Await();
  EXPECT_TRUE(absl::IsUnavailable(why)) << why;
  EXPECT_THAT(Message(why), HasSubstr("at the destination"));
  EXPECT_THAT(Message(why), HasSubstr(Service()));
  EXPECT_THAT(Message(exit_troubles_.Await()), HasSubstr(Service()));
  EXPECT_EQ(entrance_->counts(TunnelService::kVmm).broken, 1u);
  EXPECT_EQ(entrance_->counts(TunnelService::kVmm).opened, 0u);
  // It may come later.
  Listen();
  program = Connect();
  UniqueFd service = Served();
  ASSERT_TRUE(SendAll(program.get(), "x"));
  EXPECT_EQ(ReceiveAll(service.get(), 1), "x");
}

TEST_P(TunnelTest, ServiceThatIsNotListed_IsRefused) {
  Listen();
  Start();
  UniqueFd program = Connect(TunnelService::kNbd);
  EXPECT_EQ(ReceiveAll(program.get()), "");
  EXPECT_THAT(Message(troubles_.Await()), HasSubstr("nbd is not served here"));
}

TEST_P(TunnelTest, PeerThatDoesNotListen_ClosesTheProgramsConnection) {
  StartEntrance();
  ::shutdown(port_.get(), SHUT_RDWR);
  port_.reset();
  UniqueFd program = Connect();
  EXPECT_EQ(ReceiveAll(program.get()), "");
  const absl::Status why = troubles_.Await();
  EXPECT_EQ(ReasonOf(why), v1::PEER_CONNECTION_FAILED) << why;
  EXPECT_THAT(Message(why), HasSubstr(options_.dial.address));
}

TEST_P(TunnelTest, ConnectionThatStalls_HoldsUpNoOther) {
  Listen();
  Start();
  UniqueFd stalled = Connect();
  UniqueFd silent = Served();
  std::atomic<bool> end = false;
  std::thread writer([&] {
    while (SendAll(stalled.get(), std::string(1 << 20, 'x'))) {
    }
    end = true;
  });
  UniqueFd program = Connect();
  UniqueFd service = Served();
  const std::string bytes = Pattern(16u << 20, 6);
  std::thread other([&] { EXPECT_TRUE(SendAll(program.get(), bytes)); });
  EXPECT_EQ(ReceiveAll(service.get(), bytes.size()) == bytes, true);
  other.join();
  EXPECT_FALSE(end) << "nobody has read of the first one";
  entrance_->Stop();
  writer.join();
}

TEST_P(TunnelTest, ConnectionAboveTheLimit_IsClosed) {
  Listen();
  options_.max_connections = 2;
  Start();
  UniqueFd a = Connect(), b = Connect();
  UniqueFd served_a = Served(), served_b = Served();
  // Or it may be one because it was not two yet.
  AwaitActive(2);
  UniqueFd c = Connect();
  EXPECT_EQ(ReceiveAll(c.get()), "");
  EXPECT_TRUE(absl::IsResourceExhausted(troubles_.Await()));
  a.reset();
  served_a.reset();
  AwaitActive(1);
  UniqueFd d = Connect();
  ASSERT_TRUE(SendAll(d.get(), "x"));
  EXPECT_EQ(ReceiveAll(Served().get(), 1), "x");
}

TEST_P(TunnelTest, SocketsHaveTheOwnerAndModeThatWereAsked) {
  options_.listen.resize(1);
  // The second entrance looks whether anybody listens by connecting, and nobody answers that at the other
  // end.
  options_.connect_timeout = milliseconds(50);
  options_.listen[0].mode = 0660;
  options_.listen[0].gid = ::getegid();
  StartEntrance();
  struct stat found {};
  ASSERT_EQ(::stat(options_.listen[0].path.c_str(), &found), 0);
  EXPECT_EQ(found.st_mode & 0777, 0660u);
  EXPECT_EQ(found.st_gid, ::getegid());
  auto second = TunnelEntrance::Start(options_);
  EXPECT_TRUE(absl::IsAlreadyExists(second.status())) << second.status();
  EXPECT_THAT(Message(second.status()), HasSubstr(options_.listen[0].path));
}

absl::Status AnswerOf(const std::string& bytes) {
  auto [a, b] = ChannelPair();
  EXPECT_TRUE(a->Write(bytes.data(), bytes.size(), Soon()).ok());
  a.reset();
  return ReceiveTunnelAnswer(*b, Soon());
}

TEST(TunnelAnswer, OnlyTheAnswersThatThereAre) {
  EXPECT_TRUE(AnswerOf("\1").ok());
  EXPECT_TRUE(absl::IsUnavailable(AnswerOf("")));
  EXPECT_EQ(ReasonOf(AnswerOf("\3")), v1::PEER_PROTOCOL_ERROR);
  EXPECT_EQ(ReasonOf(AnswerOf(std::string("\0", 1))), v1::PEER_PROTOCOL_ERROR);
  EXPECT_EQ(ReasonOf(AnswerOf(std::string("\2\1\4", 3) + std::string(1025, 'x'))), v1::PEER_PROTOCOL_ERROR)
      << "1025 bytes";
  EXPECT_TRUE(absl::IsDataLoss(AnswerOf(std::string("\2\5\0abc", 6))));
  const absl::Status refused = AnswerOf(std::string("\2\6\0ab\n\x1b[c", 9));
  EXPECT_TRUE(absl::IsUnavailable(refused));
  EXPECT_EQ(Message(refused), "at the destination: ab??[c");
}

TEST(TunnelAnswer, LongReasonIsCut) {
  auto [a, b] = ChannelPair();
  ASSERT_TRUE(SendTunnelAnswer(*a, absl::NotFoundError(std::string(5000, 'x')), Soon()).ok());
  EXPECT_EQ(Message(ReceiveTunnelAnswer(*b, Soon())).size(),
            std::string("at the destination: ").size() + kMaxTunnelReason);
}

}  // namespace
}  // namespace baton::stream
