// The tunnel's two ends in one process, with a TCP connection between them as there is between hosts.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "agent/stream/tunnel.h"
#include "common/unix_socket.h"
#include "tests/temp_dir.h"
#include "tests/unit/stream/stream_testing.h"

namespace baton::stream {

inline std::string Pattern(size_t size, uint32_t seed) {
  std::string bytes(size, '\0');
  std::minstd_rand random(seed);
  for (char& c : bytes) c = static_cast<char>(random() >> 8);
  return bytes;
}

// Blocking, as the programs' own sockets may be.
inline void SetBlocking(int fd) { ASSERT_EQ(::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) & ~O_NONBLOCK), 0); }

inline bool SendAll(int fd, const std::string& bytes) {
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t n = ::send(fd, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
    if (n <= 0) return false;
    done += static_cast<size_t>(n);
  }
  return true;
}

// Until the end, or `size` bytes.
inline std::string ReceiveAll(int fd, size_t size = SIZE_MAX) {
  std::string bytes;
  std::string buffer(1 << 16, '\0');
  while (bytes.size() < size) {
    const ssize_t n = ::recv(fd, buffer.data(), std::min(buffer.size(), size - bytes.size()), 0);
    if (n <= 0) break;
    bytes.append(buffer, 0, static_cast<size_t>(n));
  }
  return bytes;
}

// Events of a callback, for any thread.
class Troubles {
 public:
  TunnelCallbacks callbacks() {
    return {[this](TunnelService, const absl::Status& why) {
      std::lock_guard lock(mutex_);
      all_.push_back(why);
      changed_.notify_all();
    }};
  }
  absl::Status Await() {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_until(lock, Soon().when(), [this] { return !all_.empty(); }))
      return absl::DeadlineExceededError("nothing was told");
    return all_.front();
  }
  size_t size() {
    std::lock_guard lock(mutex_);
    return all_.size();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<absl::Status> all_;
};

// A directory, a certificate, and what stands for the destination agent's peer port.
enum class Carrier { kCopy, kSplice, kTls };

class TunnelTest : public testing::TestWithParam<Carrier> {
 protected:
  static void SetUpTestSuite() {
    dir_ = std::make_unique<test::TempDir>();
    std::ofstream(*dir_ / "ext") << "subjectAltName=IP:127.0.0.1\n";
    const std::string key = " -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes ";
    const std::string make = fmt::format(
        "cd {} && openssl req -x509 {} -days 2 -subj /CN=ca -keyout ca.key -out ca.pem && openssl req {} "
        "-subj /CN=h "
        "-keyout h.key -out h.csr && openssl x509 -req -in h.csr -CA ca.pem -CAkey ca.key -CAcreateserial "
        "-extfile ext -days 2 -out h.pem",
        dir_->path(), key, key);
    ASSERT_EQ(std::system(("(" + make + ") >/dev/null 2>&1").c_str()), 0);
  }
  static void TearDownTestSuite() { dir_.reset(); }

  void SetUp() override {
    if (GetParam() == Carrier::kTls) {
      auto loaded = TlsContext::Load(*dir_ / "ca.pem", *dir_ / "h.pem", *dir_ / "h.key");
      ASSERT_TRUE(loaded.ok()) << loaded.status();
      tls_ = *loaded;
    }
    OpenPort();
    options_.dial.migration_id = "m1";
    options_.dial.token.fill(7);
    options_.dial.tls = tls_;
    options_.callbacks = troubles_.callbacks();
    if (GetParam() == Carrier::kSplice) options_.transfer = exit_options_.transfer = TunnelTransfer::kSplice;
    for (TunnelService service : kTunnelServices)
      options_.listen.push_back(
          {service, Entry(service), static_cast<uid_t>(-1), static_cast<gid_t>(-1), 0600});
    exit_options_.callbacks = exit_troubles_.callbacks();
    exit_options_.paths[TunnelService::kVmm] = Service();
  }
  void TearDown() override {
    // In this order: the entrance's end is the exit's end.
    entrance_.reset();
    ::shutdown(port_.get(), SHUT_RDWR);
    if (hands_.joinable()) hands_.join();
    exit_.reset();
    port_.reset();
  }

  void OpenPort() {
    BindPort();
    ASSERT_EQ(::listen(port_.get(), 64), 0);
  }
  // Connections to it are refused until it listens, as while an agent is being restarted.
  void BindPort() {
    port_.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ASSERT_EQ(::bind(port_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    socklen_t length = sizeof address;
    ASSERT_EQ(::getsockname(port_.get(), reinterpret_cast<sockaddr*>(&address), &length), 0);
    options_.dial.address = fmt::format("127.0.0.1:{}", ntohs(address.sin_port));
  }

  static std::string Entry(TunnelService service) { return *dir_ / "in-" + NameOf(service); }
  static std::string Service() { return *dir_ / "service"; }

  // Both ends, joined by a thread that does what an agent does with a connection.
  void Start() {
    StartExit();
    StartEntrance();
  }
  void StartExit() {
    exit_ = std::make_unique<TunnelExit>(exit_options_);
    hands_ = std::thread([this] {
      while (UniqueFd socket = Accepted()) exit_->Accept(std::move(socket), channel_, tls_);
    });
  }
  void StartEntrance() {
    auto entrance = TunnelEntrance::Start(options_);
    ASSERT_TRUE(entrance.ok()) << entrance.status();
    entrance_ = *std::move(entrance);
  }
  UniqueFd Accepted() {
    UniqueFd socket(::accept4(port_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!socket) return socket;
    auto bytes = ReadPreamble(socket.get(), Soon());
    EXPECT_TRUE(bytes.ok()) << bytes.status();
    auto preamble = DecodePreamble(*bytes);
    EXPECT_TRUE(preamble.ok()) << preamble.status();
    EXPECT_EQ(preamble->kind, PreambleKind::kTunnel);
    channel_ = preamble->channel;
    return socket;
  }
  void Listen() {
    auto listener = UnixListener::Listen(Service());
    ASSERT_TRUE(listener.ok()) << listener.status();
    listener_ = *std::move(listener);
  }
  static UniqueFd Connect(TunnelService service = TunnelService::kVmm) {
    auto fd = ConnectUnix(Entry(service), Soon());
    EXPECT_TRUE(fd.ok()) << fd.status();
    if (!fd.ok()) return UniqueFd();
    SetBlocking(fd->get());
    return *std::move(fd);
  }
  UniqueFd Served() {
    EXPECT_TRUE(WaitFd(listener_.fd(), POLLIN, Soon(), "the service").ok());
    auto fd = listener_.Accept();
    EXPECT_TRUE(fd.ok() && fd->valid());
    if (!fd.ok()) return UniqueFd();
    SetBlocking(fd->get());
    return *std::move(fd);
  }
  // So many connections are relayed at each end, and no more.
  void AwaitActive(uint32_t wanted) {
    const Deadline deadline = Soon();
    while (!deadline.Expired()) {
      if (exit_->counts(TunnelService::kVmm).active == wanted &&
          entrance_->counts(TunnelService::kVmm).active == wanted)
        return;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ADD_FAILURE() << "connections are still relayed";
  }

  static inline std::unique_ptr<test::TempDir> dir_;
  std::shared_ptr<const TlsContext> tls_;
  UniqueFd port_;
  std::atomic<uint32_t> channel_{0};
  TunnelEntranceOptions options_;
  TunnelExitOptions exit_options_;
  Troubles troubles_, exit_troubles_;
  UnixListener listener_;
  std::unique_ptr<TunnelEntrance> entrance_;
  std::unique_ptr<TunnelExit> exit_;
  std::thread hands_;
};

}  // namespace baton::stream
