#include "common/message_socket.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <filesystem>
#include <thread>

#include "baton/v1/shim.pb.h"
#include "common/unix_socket.h"
#include "tests/temp_dir.h"

namespace baton {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

struct Pair {
  Pair() {
    int fds[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    a = MessageSocket(UniqueFd(fds[0]));
    b = MessageSocket(UniqueFd(fds[1]));
  }
  MessageSocket a, b;
};

Deadline Shortly() { return Deadline::After(seconds(5)); }

void SendRaw(int fd, const std::string& bytes) {
  ASSERT_EQ(::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
}

TEST(MessageSocket, CarriesMessagesInOrderWithTheirDescriptors) {
  Pair pair;
  int pipes[2];
  ASSERT_EQ(::pipe2(pipes, O_CLOEXEC), 0);
  UniqueFd read_end(pipes[0]), write_end(pipes[1]);
  v1::ShimRequest one, two;
  one.set_id(1);
  two.set_id(2);
  two.mutable_accept_channel()->set_preamble("p");
  ASSERT_TRUE(pair.a.Send(one, Shortly()).ok());
  ASSERT_TRUE(pair.a.Send(two, Shortly(), {write_end.get()}).ok());
  v1::ShimRequest got;
  std::vector<UniqueFd> fds;
  ASSERT_TRUE(pair.b.Receive(got, Shortly(), &fds).ok());
  EXPECT_EQ(got.id(), 1u);
  EXPECT_TRUE(fds.empty());
  ASSERT_TRUE(pair.b.Receive(got, Shortly(), &fds).ok());
  EXPECT_EQ(got.id(), 2u);
  ASSERT_EQ(fds.size(), 1u);
  EXPECT_EQ(::write(fds[0].get(), "x", 1), 1);
  char c = 0;
  EXPECT_EQ(::read(read_end.get(), &c, 1), 1);
  EXPECT_EQ(c, 'x');
}

TEST(MessageSocket, CarriesAMessageLargerThanTheSocketBuffer) {
  Pair pair;
  v1::ShimReply big;
  big.set_message(std::string(8u << 20, 'm'));
  std::thread sender([&] { EXPECT_TRUE(pair.a.Send(big, Shortly()).ok()); });
  v1::ShimReply got;
  EXPECT_TRUE(pair.b.Receive(got, Shortly()).ok());
  sender.join();
  EXPECT_EQ(got.message().size(), 8u << 20);
}

TEST(MessageSocket, Send_MessageAboveTheLimit_IsRefused) {
  Pair pair;
  v1::ShimReply big;
  big.set_message(std::string(MessageSocket::kMaxMessage + 1, 'm'));
  EXPECT_EQ(pair.a.Send(big, Shortly()).code(), absl::StatusCode::kInvalidArgument);
}

TEST(MessageSocket, Receive_LengthAboveTheLimit_ReturnsDataLoss) {
  Pair pair;
  SendRaw(pair.a.fd(), std::string("\xff\xff\xff\x7f", 4));
  v1::ShimReply got;
  EXPECT_EQ(pair.b.Receive(got, Shortly()).code(), absl::StatusCode::kDataLoss);
}

TEST(MessageSocket, Receive_BytesThatDoNotParse_ReturnsDataLoss) {
  Pair pair;
  SendRaw(pair.a.fd(), std::string("\x03\0\0\0\xff\xff\xff", 7));
  v1::ShimReply got;
  EXPECT_EQ(pair.b.Receive(got, Shortly()).code(), absl::StatusCode::kDataLoss);
}

TEST(MessageSocket, Receive_PeerClosed_TellsBetweenFromInside) {
  Pair between;
  between.a.Close();
  v1::ShimReply got;
  EXPECT_EQ(between.b.Receive(got, Shortly()).code(), absl::StatusCode::kOutOfRange);
  Pair inside;
  SendRaw(inside.a.fd(), std::string("\x03\0\0\0x", 5));
  inside.a.Close();
  EXPECT_EQ(inside.b.Receive(got, Shortly()).code(), absl::StatusCode::kDataLoss);
}

TEST(MessageSocket, Receive_NothingComes_EndsAtTheDeadlineAndCanGoOn) {
  Pair pair;
  v1::ShimRequest got, sent;
  SendRaw(pair.a.fd(), std::string("\x02\0\0\0", 4));
  EXPECT_EQ(pair.b.Receive(got, Deadline::After(milliseconds(20))).code(),
            absl::StatusCode::kDeadlineExceeded);
  SendRaw(pair.a.fd(), std::string("\x08\x07", 2));  // field 1, varint 7
  ASSERT_TRUE(pair.b.Receive(got, Shortly()).ok());
  EXPECT_EQ(got.id(), 7u);
}

TEST(MessageSocket, Enqueue_PeerThatDoesNotRead_IsGivenUp) {
  Pair pair;
  v1::ShimReply big;
  big.set_message(std::string(12u << 20, 'm'));
  absl::Status status;
  for (int i = 0; i < 10 && status.ok(); ++i) status = pair.a.Enqueue(big);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(pair.a.wants_write());
}

class UnixListenerTest : public testing::Test {
 protected:
  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
};

TEST_F(UnixListenerTest, AcceptsAndRemovesItsPath) {
  std::string path = dir_ + "/s";
  {
    auto listener = UnixListener::Listen(path);
    ASSERT_TRUE(listener.ok()) << listener.status();
    struct stat st {};
    ASSERT_EQ(::stat(path.c_str(), &st), 0);
    EXPECT_EQ(st.st_mode & 0777, 0600u);
    auto none = listener->Accept();
    ASSERT_TRUE(none.ok());
    EXPECT_FALSE(none->valid());
    auto client = ConnectUnix(path, Shortly());
    ASSERT_TRUE(client.ok()) << client.status();
    auto accepted = listener->Accept();
    ASSERT_TRUE(accepted.ok());
    EXPECT_TRUE(accepted->valid());
    EXPECT_EQ(UnixListener::Listen(path).status().code(), absl::StatusCode::kAlreadyExists);
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST_F(UnixListenerTest, Listen_FileOfADeadListener_IsReplaced) {
  std::string path = dir_ + "/s";
  auto listener = UnixListener::Listen(path);
  ASSERT_TRUE(listener.ok());
  ASSERT_EQ(::rename(path.c_str(), (path + "2").c_str()), 0);
  listener->Close();
  ASSERT_EQ(::rename((path + "2").c_str(), path.c_str()), 0);
  EXPECT_EQ(ConnectUnix(path, Shortly()).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(UnixListener::Listen(path).ok());
}

TEST_F(UnixListenerTest, PathTooLong_NamesPathAndLimit) {
  std::string path = dir_ + "/" + std::string(120, 'x');
  auto status = UnixListener::Listen(path).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(status), testing::HasSubstr("at most 107"));
  EXPECT_THAT(Message(status), testing::HasSubstr(path));
}

TEST_F(UnixListenerTest, Connect_NoSuchFile_ReturnsNotFound) {
  EXPECT_EQ(ConnectUnix(dir_ + "/none", Shortly()).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace baton
