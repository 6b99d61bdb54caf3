// The tunnel's two ends in one process, with a TCP connection between them as there is between hosts.
#include "agent/stream/tunnel.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <mutex>
#include <thread>

#include "agent/stream/tunnel_relay.h"
#include "common/unix_socket.h"
#include "tests/unit/stream/stream_testing.h"

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

std::string Pattern(size_t size, uint32_t seed) {
  std::string bytes(size, '\0');
  std::minstd_rand random(seed);
  for (char& c : bytes) c = static_cast<char>(random() >> 8);
  return bytes;
}

// Blocking, as the programs' own sockets may be.
void SetBlocking(int fd) { ASSERT_EQ(::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) & ~O_NONBLOCK), 0); }

bool SendAll(int fd, const std::string& bytes) {
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t n = ::send(fd, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
    if (n <= 0) return false;
    done += static_cast<size_t>(n);
  }
  return true;
}

// Until the end, or `size` bytes.
std::string ReceiveAll(int fd, size_t size = SIZE_MAX) {
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
    char path[] = "/tmp/baton-tunnel-test-XXXXXX";
    ASSERT_NE(::mkdtemp(path), nullptr);
    dir_ = new std::string(path);
    std::ofstream(*dir_ + "/ext") << "subjectAltName=IP:127.0.0.1\n";
    const std::string key = " -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes ";
    const std::string make = fmt::format(
        "cd {} && openssl req -x509 {} -days 2 -subj /CN=ca -keyout ca.key -out ca.pem && openssl req {} "
        "-subj /CN=h "
        "-keyout h.key -out h.csr && openssl x509 -req -in h.csr -CA ca.pem -CAkey ca.key -CAcreateserial "
        "-extfile ext -days 2 -out h.pem",
        *dir_, key, key);
    ASSERT_EQ(std::system(("(" + make + ") >/dev/null 2>&1").c_str()), 0);
  }
  static void TearDownTestSuite() {
    std::filesystem::remove_all(*dir_);
    delete dir_;
  }

  void SetUp() override {
    if (GetParam() == Carrier::kTls) {
      auto loaded = TlsContext::Load(*dir_ + "/ca.pem", *dir_ + "/h.pem", *dir_ + "/h.key");
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
    port_.reset(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ASSERT_EQ(::bind(port_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    ASSERT_EQ(::listen(port_.get(), 64), 0);
    socklen_t length = sizeof address;
    ASSERT_EQ(::getsockname(port_.get(), reinterpret_cast<sockaddr*>(&address), &length), 0);
    options_.dial.address = fmt::format("127.0.0.1:{}", ntohs(address.sin_port));
  }

  static std::string Entry(TunnelService service) { return *dir_ + "/in-" + NameOf(service); }
  static std::string Service() { return *dir_ + "/service"; }

  // Both ends, joined by a thread that does what an agent does with a connection.
  void Start() {
    exit_ = std::make_unique<TunnelExit>(exit_options_);
    hands_ = std::thread([this] {
      while (UniqueFd socket = Accepted()) exit_->Accept(std::move(socket), channel_, tls_);
    });
    StartEntrance();
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
      std::this_thread::sleep_for(milliseconds(1));
    }
    ADD_FAILURE() << "connections are still relayed";
  }

  static std::string* dir_;
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
std::string* TunnelTest::dir_ = nullptr;

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

TEST_P(TunnelTest, ConnectionAboveTheLimit_IsClosed) {
  Listen();
  options_.max_connections = 2;
  Start();
  UniqueFd a = Connect(), b = Connect();
  UniqueFd served_a = Served(), served_b = Served();
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
