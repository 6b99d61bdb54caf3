// The QMP client against a peer that says what the test wants: QEMU's answers are input that must be checked.
#include "agent/vmm/qmp/qmp_client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include "common/unix_socket.h"
#include "tests/temp_dir.h"

namespace baton::vmm {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr char kGreeting[] =
    R"({"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}})"
    "\n";

class QmpClientTest : public testing::Test {
 protected:
  QmpClientTest() { listener_ = *UnixListener::Listen(path_); }
  ~QmpClientTest() override {
    if (peer_.joinable()) peer_.join();
  }
  // Runs `talk` with the accepted connection in a thread.
  void Peer(std::function<void(int)> talk) {
    peer_ = std::thread([this, talk = std::move(talk)] {
      ASSERT_TRUE(WaitFd(listener_.fd(), POLLIN, Soon(), "accept").ok());
      auto fd = listener_.Accept();
      ASSERT_TRUE(fd.ok() && fd->valid());
      talk(fd->get());
    });
  }
  static void Say(int fd, const std::string& text) {
    EXPECT_EQ(::send(fd, text.data(), text.size(), MSG_NOSIGNAL), static_cast<ssize_t>(text.size()));
  }
  // One line; "" at the end of the connection.
  static std::string Hear(int fd) {
    std::string line;
    for (;;) {
      if (!WaitFd(fd, POLLIN, Soon(), "line").ok()) return "";
      char c;
      ssize_t n = ::recv(fd, &c, 1, 0);
      if (n <= 0) return "";
      if (c == '\n') return line;
      line += c;
    }
  }
  static uint64_t IdOf(const std::string& line) { return nlohmann::json::parse(line)["id"].get<uint64_t>(); }
  static void Answer(int fd, const std::string& line, const std::string& member) {
    Say(fd, fmt::format(R"({{"id": {}, {}}})", IdOf(line), member) + "\n");
  }
  static void Greet(int fd) {
    Say(fd, kGreeting);
    Answer(fd, Hear(fd), R"("return": {})");
  }
  static Deadline Soon() { return Deadline::After(seconds(5)); }

  const test::TempDir dir_;
  const std::string path_ = dir_ / "qmp.sock";
  UnixListener listener_;
  std::thread peer_;
};

TEST_F(QmpClientTest, NegotiatesAndMatchesAnswersByIdAmongEvents) {
  Peer([](int fd) {
    Greet(fd);
    std::string line = Hear(fd);
    EXPECT_THAT(line, testing::HasSubstr("query-status"));
    Say(fd, R"({"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}})"
            "\n"
            R"({"id": 999, "return": "of somebody else"})"
            "\n");
    Answer(fd, line, R"("return": {"status": "running"})");
    Hear(fd);
  });
  auto client = QmpClient::Connect(path_, Soon());
  ASSERT_TRUE(client.ok()) << client.status();
  EXPECT_EQ((*client)->version().major, 7);
  EXPECT_EQ((*client)->version().micro, 22);
  auto answer = (*client)->Execute("query-status", nlohmann::json::object(), Soon());
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_EQ((*answer)["status"], "running");
  auto event = (*client)->WaitEvent(
      0, [](const QmpEvent& e) { return e.name == "STOP"; }, Soon());
  ASSERT_TRUE(event.ok());
  EXPECT_EQ(event->sequence, 1u);
}

TEST_F(QmpClientTest, Execute_QemuRefuses_QuotesItsWords) {
  Peer([](int fd) {
    Greet(fd);
    Answer(fd, Hear(fd), R"("error": {"class": "GenericError", "desc": "there is no spoon"})");
    Hear(fd);
  });
  auto client = QmpClient::Connect(path_, Soon());
  ASSERT_TRUE(client.ok());
  absl::Status status = (*client)->Execute("cont", nlohmann::json::object(), Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(Message(status), "cont: QEMU refuses: there is no spoon");
}

TEST_F(QmpClientTest, Execute_ConnectionEnds_ReturnsUnavailable) {
  Peer([](int fd) {
    Greet(fd);
    Hear(fd);
  });
  auto client = QmpClient::Connect(path_, Soon());
  ASSERT_TRUE(client.ok());
  EXPECT_EQ((*client)->Execute("cont", nlohmann::json::object(), Soon()).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ((*client)->Execute("cont", nlohmann::json::object(), Soon()).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST_F(QmpClientTest, Execute_NoAnswer_EndsAtTheDeadline) {
  Peer([](int fd) {
    Greet(fd);
    Hear(fd);
    Hear(fd);
  });
  auto client = QmpClient::Connect(path_, Soon());
  ASSERT_TRUE(client.ok());
  EXPECT_EQ(
      (*client)->Execute("cont", nlohmann::json::object(), Deadline::After(milliseconds(30))).status().code(),
      absl::StatusCode::kDeadlineExceeded);
  client->reset();
}

TEST_F(QmpClientTest, Connect_SilentPeer_EndsAtTheDeadline) {
  Peer([](int fd) { Hear(fd); });
  EXPECT_EQ(QmpClient::Connect(path_, Deadline::After(milliseconds(30))).status().code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST_F(QmpClientTest, Connect_NotQmp_SaysSo) {
  Peer([](int fd) {
    Say(fd, "220 smtp ready\n");
    Hear(fd);
  });
  absl::Status status = QmpClient::Connect(path_, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Message(status), testing::HasSubstr("does not speak QMP"));
}

TEST_F(QmpClientTest, OddMessages_AreSkipped) {
  Peer([](int fd) {
    Greet(fd);
    std::string line = Hear(fd);
    Say(fd,
        "[1, 2]\n\"text\"\n{}\n{\"event\": 7}\n{\"id\": -1, \"return\": {}}\n{\"id\": \"x\", \"return\": "
        "{}}\n\r\n");
    Say(fd, "{\"event\": \"A\", \"data\": [1]}\n");
    Answer(fd, line, R"("return": [])");
    Hear(fd);
  });
  auto client = QmpClient::Connect(path_, Soon());
  ASSERT_TRUE(client.ok());
  EXPECT_TRUE((*client)->Execute("x", nlohmann::json::object(), Soon()).ok());
  EXPECT_EQ((*client)->LastEvent(), 1u);
}

TEST_F(QmpClientTest, EndlessLine_EndsTheConnection) {
  Peer([](int fd) {
    Greet(fd);
    std::string chunk(1 << 20, 'x');
    for (int i = 0; i < 6; ++i) {
      size_t sent = 0;
      while (sent < chunk.size()) {
        if (!WaitFd(fd, POLLOUT, Soon(), "send").ok()) return;
        ssize_t n = ::send(fd, chunk.data() + sent, chunk.size() - sent, MSG_NOSIGNAL);
        if (n <= 0) return;
        sent += static_cast<size_t>(n);
      }
    }
  });
  auto client = QmpClient::Connect(path_, Soon());
  ASSERT_TRUE(client.ok());
  EXPECT_TRUE((*client)->WaitClosed(Soon()));
}

}  // namespace
}  // namespace baton::vmm
