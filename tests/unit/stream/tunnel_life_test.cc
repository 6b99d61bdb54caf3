// How a tunnel and its connections end: on purpose, with a program, or with the peer.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <thread>

#include "agent/stream/tunnel_relay.h"
#include "tests/unit/stream/tunnel_testing.h"

namespace baton::stream {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

int CountOf(const char* directory) {
  int n = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory)) ++n;
  return n;
}

TEST_P(TunnelTest, EndOfTheLastConnection_IsTold) {
  Listen();
  std::atomic<int> told = 0;
  std::promise<void> idle;
  exit_options_.callbacks.on_idle = [&] {
    if (told++ == 0) idle.set_value();
  };
  Start();
  UniqueFd one = Connect(), one_served = Served();
  UniqueFd other = Connect(), other_served = Served();
  // Both are relayed, so that one less is one.
  AwaitActive(2);
  one.reset();
  one_served.reset();
  AwaitActive(1);
  EXPECT_EQ(told, 0) << "one is still relayed";
  other.reset();
  other_served.reset();
  EXPECT_EQ(idle.get_future().wait_until(Soon().when()), std::future_status::ready);
  entrance_.reset();
  exit_->Stop();
  EXPECT_EQ(told, 1);
}

TEST_P(TunnelTest, ServiceThatDies_EndsTheProgramsConnectionInTheMiddle) {
  Listen();
  Start();
  UniqueFd program = Connect();
  UniqueFd service = Served();
  std::thread writer([&] {
    while (SendAll(program.get(), std::string(1 << 20, 'x'))) {
    }
  });
  EXPECT_EQ(ReceiveAll(service.get(), 3u << 20).size(), 3u << 20);
  service.reset();
  writer.join();  // it cannot send for ever
  AwaitActive(0);
}

TEST_P(TunnelTest, PeerThatIsLost_EndsTheProgramsConnectionAndIsTold) {
  StartEntrance();
  auto peer = std::async(std::launch::async, [this] {
    auto channel = AcceptChannel(Accepted(), tls_, "", Soon());
    EXPECT_TRUE(channel.ok()) << channel.status();
    EXPECT_TRUE(SendTunnelAnswer(**channel, absl::OkStatus(), Soon()).ok());
    return std::move(channel).value();
  });
  UniqueFd program = Connect();
  std::unique_ptr<Channel> channel = peer.get();
  std::thread writer([&] {
    while (SendAll(program.get(), std::string(1 << 16, 'x'))) {
    }
  });
  std::string some(1 << 20, '\0');
  ASSERT_TRUE(channel->Read(some.data(), some.size(), Soon()).ok());
  // With bytes unread this is a reset, as of a host that has restarted.
  channel->Shutdown();
  channel.reset();
  writer.join();
  EXPECT_EQ(ReceiveAll(program.get()), "");
  const absl::Status why = troubles_.Await();
  EXPECT_TRUE(absl::IsUnavailable(why)) << why;
  EXPECT_THAT(Message(why), HasSubstr("127.0.0.1"));
}

TEST_P(TunnelTest, Stop_EndsTrafficUnderWayAndRemovesTheSockets) {
  Listen();
  Start();
  UniqueFd program = Connect();
  UniqueFd service = Served();
  std::thread writers[] = {std::thread([&] {
                             while (SendAll(program.get(), std::string(1 << 18, 'x'))) {
                             }
                           }),
                           std::thread([&] {
                             while (SendAll(service.get(), std::string(1 << 18, 'y'))) {
                             }
                           })};
  std::thread reader([&] { ReceiveAll(program.get()); });
  EXPECT_EQ(ReceiveAll(service.get(), 8u << 20).size(), 8u << 20);
  const auto begin = Clock::now();
  entrance_->Stop();
  EXPECT_LT(Clock::now() - begin, seconds(10)) << "neither end reads any more";
  writers[0].join();
  reader.join();
  EXPECT_FALSE(std::filesystem::exists(Entry(TunnelService::kVmm)));
  ReceiveAll(service.get());
  writers[1].join();
  EXPECT_EQ(troubles_.size(), 0u) << "an end on purpose is no trouble";
  exit_->Stop();
  EXPECT_EQ(exit_->counts(TunnelService::kVmm).active, 0u);
}

TEST_P(TunnelTest, Drain_LetsConnectionsEndInGoodOrder) {
  Listen();
  Start();
  UniqueFd program = Connect();
  UniqueFd service = Served();
  AwaitActive(1);
  EXPECT_FALSE(entrance_->Drain(Deadline::After(milliseconds(20)))) << "it is open";
  ASSERT_TRUE(SendAll(program.get(), "bye"));
  program.reset();
  std::thread other([&] {
    EXPECT_EQ(ReceiveAll(service.get()), "bye");
    service.reset();
  });
  EXPECT_TRUE(entrance_->Drain(Soon()));
  entrance_->Stop();
  other.join();
  AwaitActive(0);
  EXPECT_EQ(exit_->counts(TunnelService::kVmm).broken, 0u);
  EXPECT_EQ(exit_troubles_.size(), 0u);
  EXPECT_TRUE(entrance_->Drain(Deadline::After(Duration(0)))) << "nothing is left to wait for";
}

TEST_P(TunnelTest, Stop_EndsTheWaitForAnAnswer) {
  // With TLS the handshake waits.
  options_.connect_timeout = seconds(300);
  StartEntrance();
  UniqueFd program = Connect();
  UniqueFd socket = Accepted();
  const auto begin = Clock::now();
  entrance_->Stop();
  EXPECT_LT(Clock::now() - begin, seconds(60));
  ReceiveAll(socket.get());  // its end
  EXPECT_EQ(ReceiveAll(program.get()), "");
  EXPECT_EQ(troubles_.size(), 0u);
}

// Connections of this network namespace that were refused.
uint64_t RefusedConnections() {
  std::ifstream file("/proc/net/snmp");
  std::string names, values;
  while (std::getline(file, names) && !names.starts_with("Tcp:")) {
  }
  std::getline(file, values);
  std::istringstream name(names), value(values);
  for (std::string n, v; name >> n && value >> v;) {
    if (n == "AttemptFails") return std::stoull(v);
  }
  return 0;
}

TEST_P(TunnelTest, AgentAway_IsDialledAgain) {
  BindPort();
  options_.connect_timeout = options_.agent_patience = seconds(60);
  Listen();
  const uint64_t before = RefusedConnections();
  StartEntrance();
  UniqueFd program = Connect();
  ASSERT_TRUE(SendAll(program.get(), "still there"));
  const Deadline deadline = Soon();
  while (RefusedConnections() == before && !deadline.Expired()) std::this_thread::yield();
  ASSERT_NE(RefusedConnections(), before);
  ASSERT_EQ(::listen(port_.get(), 64), 0);
  StartExit();
  UniqueFd service = Served();
  EXPECT_EQ(ReceiveAll(service.get(), 11), "still there");
  EXPECT_EQ(troubles_.size(), 0u);
}

TEST_P(TunnelTest, AgentThatStaysAway_IsSaidAfterItsTime) {
  port_.reset();
  options_.agent_patience = milliseconds(100);
  StartEntrance();
  UniqueFd program = Connect();
  EXPECT_EQ(ReceiveAll(program.get()), "");
  const absl::Status why = troubles_.Await();
  EXPECT_THAT(Message(why), HasSubstr(options_.dial.address));
  EXPECT_EQ(ReasonOf(why, v1::NONE), v1::PEER_CONNECTION_FAILED);
  // Stop() does not wait for it.
  entrance_.reset();
  options_.agent_patience = options_.connect_timeout = seconds(300);
  StartEntrance();
  const uint64_t before = RefusedConnections();
  program = Connect();
  const Deadline deadline = Soon();
  while (RefusedConnections() == before && !deadline.Expired()) std::this_thread::yield();
  entrance_->Stop();
  EXPECT_EQ(ReceiveAll(program.get()), "");
}

// An agent that was killed before it had handed the connection to the shim.
TEST_P(TunnelTest, AgentThatDropsTheHandshake_IsDialledAgain) {
  if (GetParam() != Carrier::kTls) return;
  Listen();
  StartEntrance();
  UniqueFd program = Connect();
  ASSERT_TRUE(SendAll(program.get(), "still there"));
  Accepted().reset();
  StartExit();
  UniqueFd service = Served();
  EXPECT_EQ(ReceiveAll(service.get(), 11), "still there");
  EXPECT_EQ(troubles_.size(), 0u);
}

TEST_P(TunnelTest, Stop_EndsADialThatNobodyAnswers) {
  // A listener whose backlog is full leaves a connection in SYN-SENT, as a host does that is gone.
  OpenPort();
  ASSERT_EQ(::listen(port_.get(), 0), 0);
  std::vector<UniqueFd> fillers;
  sockaddr_in address{};
  socklen_t length = sizeof address;
  ASSERT_EQ(::getsockname(port_.get(), reinterpret_cast<sockaddr*>(&address), &length), 0);
  for (int i = 0; i < 4; ++i) {
    fillers.emplace_back(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    (void)::connect(fillers.back().get(), reinterpret_cast<sockaddr*>(&address), length);
  }
  options_.connect_timeout = seconds(300);
  // Connections to the port that are not answered (state 02 of /proc/net/tcp).
  const auto unanswered = [port = ntohs(address.sin_port)] {
    std::ifstream file("/proc/net/tcp");
    int n = 0;
    for (std::string line; std::getline(file, line);)
      n += line.find(fmt::format(":{:04X} 02 ", port)) != line.npos;
    return n;
  };
  const int before = unanswered();
  StartEntrance();
  UniqueFd program = Connect();
  const Deadline deadline = Soon();
  while (unanswered() == before && !deadline.Expired()) std::this_thread::yield();
  ASSERT_EQ(unanswered(), before + 1);
  const auto begin = Clock::now();
  entrance_->Stop();
  EXPECT_LT(Clock::now() - begin, seconds(60));
  EXPECT_EQ(ReceiveAll(program.get()), "");
}

TEST_P(TunnelTest, ManyConnectionsAtOnce_LeaveNothingBehind) {
  Listen();
  Start();
  auto round = [this](uint32_t seed) {
    std::vector<std::thread> threads;
    for (uint32_t i = 0; i < 32; ++i) {
      threads.emplace_back([=] {
        const std::string question = Pattern((512u << 10) + i, seed + i);
        UniqueFd program = Connect();
        std::thread writer([&] {
          EXPECT_TRUE(SendAll(program.get(), question));
          ::shutdown(program.get(), SHUT_WR);
        });
        EXPECT_EQ(ReceiveAll(program.get()) == question, true);
        writer.join();
      });
    }
    // The service gives back what it got, once it has all of it.
    std::vector<std::thread> echoes;
    for (int i = 0; i < 32; ++i) {
      echoes.emplace_back([fd = std::make_shared<UniqueFd>(Served())] {
        EXPECT_TRUE(SendAll(fd->get(), ReceiveAll(fd->get())));
      });
    }
    for (auto& thread : threads) thread.join();
    for (auto& thread : echoes) thread.join();
    AwaitActive(0);
  };
  round(100);
  entrance_->Stop();
  exit_->Stop();
  ::shutdown(port_.get(), SHUT_RDWR);
  hands_.join();
  EXPECT_EQ(entrance_->counts(TunnelService::kVmm).opened, 32u);
  const int descriptors = CountOf("/proc/self/fd"), threads = CountOf("/proc/self/task");
  // And again, with new ends: the process is as it was.
  TearDown();
  OpenPort();
  Start();
  round(200);
  entrance_->Stop();
  exit_->Stop();
  ::shutdown(port_.get(), SHUT_RDWR);
  hands_.join();
  EXPECT_EQ(CountOf("/proc/self/fd"), descriptors);
  EXPECT_EQ(CountOf("/proc/self/task"), threads);
}

}  // namespace
}  // namespace baton::stream
