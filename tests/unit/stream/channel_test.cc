#include "agent/stream/channel.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <thread>

#include "agent/stream/dial.h"
#include "agent/stream/message_channel.h"
#include "tests/unit/stream/stream_testing.h"

namespace baton::stream {
namespace {

TEST(Channel, ReadAndWrite_MoveEveryByte) {
  auto [a, b] = ChannelPair();
  std::string sent(3u << 20, '\0');
  for (size_t i = 0; i < sent.size(); ++i) sent[i] = static_cast<char>(i * 131);
  std::thread writer([&, &a = a] {
    iovec parts[3] = {{sent.data(), 5}, {sent.data() + 5, 0}, {sent.data() + 5, sent.size() - 5}};
    EXPECT_TRUE(a->WriteAll(parts, 3, Soon()).ok());
  });
  std::string received(sent.size(), '\0');
  ASSERT_TRUE(b->Read(received.data(), received.size(), Soon()).ok());
  writer.join();
  EXPECT_EQ(received, sent);
  EXPECT_EQ(a->bytes_written(), sent.size());
  EXPECT_EQ(b->bytes_read(), sent.size());
}

TEST(CongestionControl, WithinASite_IsNotPaced) {
  using std::chrono::microseconds;
  for (const char* paced : {"bbr", "bbr2", "bbr3"}) {
    EXPECT_EQ(CongestionControlFor(paced, microseconds(80)), "cubic");
    EXPECT_EQ(CongestionControlFor(paced, microseconds(40'000)), paced);
    EXPECT_EQ(CongestionControlFor(paced, microseconds(0)), paced) << "not measured";
  }
  for (const char* other : {"reno", "cubic", "dctcp", ""})
    EXPECT_EQ(CongestionControlFor(other, microseconds(80)), other);
}

TEST(Channel, End_IsToldApartFromDamage) {
  auto [a, b] = ChannelPair();
  char buffer[8];
  ASSERT_TRUE(a->Write("abc", 3, Soon()).ok());
  a.reset();
  EXPECT_EQ(b->Read(buffer, 8, Soon()).code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(b->Read(buffer, 8, Soon()).code(), absl::StatusCode::kOutOfRange);
  // No SIGPIPE.
  EXPECT_EQ(b->Write("x", 1, Soon()).code(), absl::StatusCode::kUnavailable);
}

TEST(Channel, CloseWrite_EndsOneDirection) {
  auto [a, b] = ChannelPair();
  char buffer[8] = "";
  ASSERT_TRUE(a->Write("abc", 3, Soon()).ok());
  ASSERT_TRUE(a->CloseWrite(Soon()).ok());
  ASSERT_TRUE(b->Read(buffer, 3, Soon()).ok());
  EXPECT_EQ(b->Read(buffer, 1, Soon()).code(), absl::StatusCode::kOutOfRange);
  ASSERT_TRUE(b->Write("defg", 4, Soon()).ok());
  ASSERT_TRUE(a->Read(buffer, 4, Soon()).ok());
  EXPECT_EQ(std::string(buffer, 4), "defg");
  b.reset();
  EXPECT_EQ(a->Read(buffer, 1, Soon()).code(), absl::StatusCode::kOutOfRange);
}

TEST(Channel, Deadline_BoundsReadAndWrite) {
  auto [a, b] = ChannelPair();
  char byte;
  EXPECT_EQ(b->Read(&byte, 1, Deadline::After(std::chrono::milliseconds(10))).code(),
            absl::StatusCode::kDeadlineExceeded);
  std::string much(8u << 20, 'x');
  EXPECT_EQ(a->Write(much.data(), much.size(), Deadline::After(std::chrono::milliseconds(50))).code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST(Channel, Shutdown_EndsWaitsOfOtherThreads) {
  auto [a, b] = ChannelPair();
  std::thread reader([&, &b = b] {
    char byte;
    EXPECT_EQ(b->Read(&byte, 1, Soon()).code(), absl::StatusCode::kCancelled);
  });
  std::thread writer([&, &b = b] {
    std::string much(8u << 20, 'x');
    EXPECT_EQ(b->Write(much.data(), much.size(), Soon()).code(), absl::StatusCode::kCancelled);
  });
  // Once this byte is here the writer is at work, and soon waits, as nobody reads on.
  char first;
  ASSERT_TRUE(a->Read(&first, 1, Soon()).ok());
  b->Shutdown();
  reader.join();
  writer.join();
  char byte;
  EXPECT_EQ(b->Read(&byte, 1, Soon()).code(), absl::StatusCode::kCancelled);
}

v1::PeerMessage SampleMessage(uint32_t round) {
  v1::PeerMessage message;
  message.mutable_round_begin()->set_round(round);
  message.mutable_round_begin()->set_bytes(round * 1000);
  return message;
}

TEST(MessageChannel, MessagesOfSeveralThreads_DoNotMix) {
  auto [a, b] = ChannelPair();
  MessageChannel left(std::move(a)), right(std::move(b));
  std::vector<std::thread> senders;
  for (int t = 0; t < 4; ++t) {
    senders.emplace_back([&, t] {
      for (uint32_t i = 0; i < 100; ++i) {
        v1::PeerMessage message;
        message.mutable_vmm_state()->set_data(std::string(i * 37, static_cast<char>('a' + t)));
        ASSERT_TRUE(left.Send(message, Soon()).ok());
      }
    });
  }
  for (int i = 0; i < 400; ++i) {
    auto message = right.Receive(Soon());
    ASSERT_TRUE(message.ok()) << message.status();
    const std::string& data = message->vmm_state().data();
    EXPECT_EQ(data.find_first_not_of(data.empty() ? 'a' : data[0]), std::string::npos);
  }
  for (auto& sender : senders) sender.join();
}

TEST(MessageChannel, BigMessage_PassesAndTooBigDoesNot) {
  auto [a, b] = ChannelPair();
  MessageChannel left(std::move(a)), right(std::move(b));
  v1::PeerMessage message;
  message.mutable_vmm_state()->set_data(std::string(MessageChannel::kMaxMessage - 100, 'x'));
  std::thread sender([&] { EXPECT_TRUE(left.Send(message, Soon()).ok()); });
  auto received = right.Receive(Soon());
  sender.join();
  ASSERT_TRUE(received.ok()) << received.status();
  EXPECT_EQ(received->vmm_state().data(), message.vmm_state().data());
  message.mutable_vmm_state()->set_data(std::string(MessageChannel::kMaxMessage, 'x'));
  EXPECT_EQ(left.Send(message, Soon()).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(left.Send(SampleMessage(1), Soon()).ok()) << "a refused message leaves the channel as it was";
}

TEST(MessageChannel, Timeout_KeepsWhatHasArrived) {
  auto [a, b] = ChannelPair();
  MessageChannel right(std::move(b));
  std::string body = SampleMessage(5).SerializeAsString();
  std::string bytes = std::string(1, static_cast<char>(body.size())) + std::string(3, '\0') + body;
  for (char byte : bytes) {
    EXPECT_EQ(right.Receive(Deadline::After(std::chrono::milliseconds(1))).status().code(),
              absl::StatusCode::kDeadlineExceeded);
    ASSERT_TRUE(a->Write(&byte, 1, Soon()).ok());
  }
  auto message = right.Receive(Soon());
  ASSERT_TRUE(message.ok()) << message.status();
  EXPECT_EQ(message->round_begin().round(), 5u);
  a.reset();
  EXPECT_EQ(right.Receive(Soon()).status().code(), absl::StatusCode::kOutOfRange);
}

TEST(MessageChannel, BadBytes_AreDataLoss) {
  auto received = [](std::string bytes) {
    auto [a, b] = ChannelPair();
    MessageChannel right(std::move(b));
    EXPECT_TRUE(a->Write(bytes.data(), bytes.size(), Soon()).ok());
    a.reset();
    auto status = right.Receive(Soon()).status();
    EXPECT_EQ(ReasonOf(status), v1::PEER_PROTOCOL_ERROR) << status;
    return status.code();
  };
  EXPECT_EQ(received(std::string(4, '\0')), absl::StatusCode::kDataLoss) << "length 0";
  EXPECT_EQ(received(std::string("\1\0\0\1", 4)), absl::StatusCode::kDataLoss) << "16 MiB + 1";
  EXPECT_EQ(received(std::string("\xff\xff\xff\xff", 4)), absl::StatusCode::kDataLoss);
  EXPECT_EQ(received(std::string("\2\0\0\0\xff\xff", 6)), absl::StatusCode::kDataLoss) << "does not parse";
  EXPECT_EQ(received(std::string("\2\0\0\0\xf8\x07", 6)), absl::StatusCode::kDataLoss) << "ends inside";
  EXPECT_EQ(received(std::string("\1\0", 2)), absl::StatusCode::kDataLoss) << "ends inside the length";
}

// A listening socket on a free loopback port.
struct Listener {
  Listener() : fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    EXPECT_EQ(::listen(fd.get(), 16), 0);
    socklen_t length = sizeof(address);
    EXPECT_EQ(::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &length), 0);
    name = "127.0.0.1:" + std::to_string(ntohs(address.sin_port));
  }
  UniqueFd fd;
  std::string name;
};

TEST(Dial, ConnectsAllChannelsWithTheirPreambles) {
  Listener listener;
  DialOptions options;
  options.address = listener.name;
  options.migration_id = "m1";
  options.token.fill(9);
  options.data_channels = 3;
  auto connections = DialPeer(options, Soon());
  ASSERT_TRUE(connections.ok()) << connections.status();
  ASSERT_EQ(connections->data.size(), 3u);
  for (uint32_t i = 0; i <= 3; ++i) {
    UniqueFd accepted(::accept(listener.fd.get(), nullptr, nullptr));
    auto bytes = ReadPreamble(accepted.get(), Soon());
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    auto preamble = DecodePreamble(*bytes);
    ASSERT_TRUE(preamble.ok()) << preamble.status();
    EXPECT_EQ(preamble->channel, i);
    EXPECT_EQ(preamble->migration_id, "m1");
    EXPECT_TRUE(TokensEqual(preamble->token, options.token));
    auto channel = AcceptChannel(std::move(accepted), nullptr, "", Soon());
    ASSERT_TRUE(channel.ok());
    int value = 0;
    socklen_t length = sizeof(value);
    EXPECT_EQ(::getsockopt((*channel)->plain_fd(), IPPROTO_TCP, TCP_NODELAY, &value, &length), 0);
    EXPECT_NE(value, 0);
    EXPECT_EQ(::getsockopt((*channel)->plain_fd(), IPPROTO_TCP, TCP_USER_TIMEOUT, &value, &length), 0);
    EXPECT_EQ(value, 10'000);
    EXPECT_TRUE(SetStallLimit((*channel)->socket_fd(), std::chrono::minutes(2)).ok());
    EXPECT_EQ(::getsockopt((*channel)->plain_fd(), IPPROTO_TCP, TCP_USER_TIMEOUT, &value, &length), 0);
    EXPECT_EQ(value, 120'000);
    EXPECT_EQ(::getsockopt((*channel)->plain_fd(), SOL_SOCKET, SO_KEEPALIVE, &value, &length), 0);
    EXPECT_NE(value, 0);
  }
}

TEST(Dial, NobodyListens_NamesTheAddress) {
  DialOptions options;
  {
    Listener listener;
    options.address = listener.name;
  }
  options.migration_id = "m1";
  auto connections = DialPeer(options, Soon());
  EXPECT_EQ(connections.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(connections.status()), v1::PEER_CONNECTION_FAILED);
  EXPECT_NE(Message(connections.status()).find(options.address), std::string::npos);
}

TEST(Dial, BadAddresses_AreErrors) {
  DialOptions options;
  options.migration_id = "m1";
  for (const char* address : {"", "no-port", "unix:/does/not/exist.sock"}) {
    options.address = address;
    EXPECT_FALSE(DialPeer(options, Soon()).ok()) << address;
    EXPECT_FALSE(DialVerdictQuery(options, Soon()).ok()) << address;
  }
}

}  // namespace
}  // namespace baton::stream
