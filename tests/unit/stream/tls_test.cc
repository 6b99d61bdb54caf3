// TLS with certificates made by the openssl command.
#include "agent/stream/tls.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdlib>
#include <fstream>
#include <memory>
#include <thread>

#include "agent/stream/channel.h"
#include "agent/stream/memory_receiver.h"
#include "agent/stream/memory_sender.h"
#include "agent/stream/message_channel.h"
#include "tests/temp_dir.h"
#include "tests/unit/stream/stream_testing.h"

namespace baton::stream {
namespace {

// A directory with two authorities and certificates of each.
class Certificates : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    dir_ = std::make_unique<test::TempDir>();
    for (const char* ca : {"ca", "other"}) {
      Run(fmt::format(
          "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={0} "
          "-keyout {1}/{0}.key -out {1}/{0}.pem",
          ca, dir_->path()));
    }
    Issue("host-a", "ca", "DNS:host-a,IP:127.0.0.1", "-days 2");
    Issue("host-b", "ca", "DNS:host-b", "-days 2");
    Issue("stranger", "other", "DNS:host-b", "-days 2");
    Issue("expired", "ca", "DNS:host-a", "-days -1");
    Run(fmt::format("openssl pkey -in {0}/host-a.key -aes128 -passout pass:x -out {0}/encrypted.key",
                    dir_->path()));
    std::ofstream(*dir_ / "junk.pem") << "not PEM at all\n";
  }
  static void TearDownTestSuite() { dir_.reset(); }

  static void Run(const std::string& command) {
    ASSERT_EQ(std::system((command + " >/dev/null 2>&1").c_str()), 0) << command;
  }
  static void Issue(const std::string& name, const std::string& ca, const std::string& san,
                    const std::string& days) {
    std::ofstream(*dir_ / "ext") << "subjectAltName=" << san << "\n";
    Run(fmt::format(
        "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={0} -keyout {1}/{0}.key "
        "-out {1}/{0}.csr",
        name, dir_->path()));
    Run(fmt::format(
        "openssl x509 -req -in {1}/{0}.csr -CA {1}/{2}.pem -CAkey {1}/{2}.key -CAcreateserial -extfile "
        "{1}/ext {3} -out {1}/{0}.pem",
        name, dir_->path(), ca, days));
  }
  static std::string File(const std::string& name) { return *dir_ / name; }
  static absl::StatusOr<std::shared_ptr<const TlsContext>> Load(const std::string& name,
                                                                const std::string& ca = "ca") {
    return TlsContext::Load(File(ca + ".pem"), File(name + ".pem"), File(name + ".key"));
  }

  struct Ends {
    absl::StatusOr<std::unique_ptr<Channel>> client, server;
  };
  // Both handshakes; the server answers as `server`, and the client expects `host`.
  static Ends Connect(const std::string& client, const std::string& server, const std::string& host,
                      const std::string& client_ca = "ca", const std::string& server_ca = "ca") {
    auto [a, b] = SocketPair();
    auto client_context = Load(client, client_ca), server_context = Load(server, server_ca);
    EXPECT_TRUE(client_context.ok()) << client_context.status();
    EXPECT_TRUE(server_context.ok()) << server_context.status();
    Ends ends{absl::UnknownError(""), absl::UnknownError("")};
    std::thread accepting([&, &b = b] {
      ends.server = MakeTlsChannel(std::move(b), *server_context, TlsRole::kServer, "", Soon());
    });
    ends.client = MakeTlsChannel(std::move(a), *client_context, TlsRole::kClient, host, Soon());
    accepting.join();
    return ends;
  }

  static inline std::unique_ptr<test::TempDir> dir_;
};

TEST_F(Certificates, BytesTravelBothWaysAtOnce) {
  Ends ends = Connect("host-a", "host-b", "host-b");
  ASSERT_TRUE(ends.client.ok()) << ends.client.status();
  ASSERT_TRUE(ends.server.ok()) << ends.server.status();
  std::string data(5u << 20, '\0');
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(i * 17);
  auto write = [&](Channel& channel) { EXPECT_TRUE(channel.Write(data.data(), data.size(), Soon()).ok()); };
  auto read = [&](Channel& channel) {
    std::string got(data.size(), '\0');
    EXPECT_TRUE(channel.Read(got.data(), got.size(), Soon()).ok());
    EXPECT_EQ(got, data);
  };
  std::thread threads[] = {
      std::thread(write, std::ref(**ends.client)), std::thread(read, std::ref(**ends.client)),
      std::thread(write, std::ref(**ends.server)), std::thread(read, std::ref(**ends.server))};
  for (auto& thread : threads) thread.join();
}

TEST_F(Certificates, GoodEndIsToldApartFromABrokenConnection) {
  {
    Ends ends = Connect("host-a", "host-b", "host-b");
    ends.client->reset();
    char byte;
    EXPECT_EQ((*ends.server)->Read(&byte, 1, Soon()).code(), absl::StatusCode::kOutOfRange);
  }
  {
    Ends ends = Connect("host-a", "host-b", "host-b");
    (*ends.client)->Shutdown();
    char byte;
    EXPECT_EQ((*ends.server)->Read(&byte, 1, Soon()).code(), absl::StatusCode::kUnavailable);
    EXPECT_EQ((*ends.client)->Read(&byte, 1, Soon()).code(), absl::StatusCode::kCancelled);
  }
}

TEST_F(Certificates, CloseWriteEndsOneDirection) {
  Ends ends = Connect("host-a", "host-b", "host-b");
  char buffer[8] = "";
  ASSERT_TRUE((*ends.client)->Write("abc", 3, Soon()).ok());
  ASSERT_TRUE((*ends.client)->CloseWrite(Soon()).ok());
  ASSERT_TRUE((*ends.server)->Read(buffer, 3, Soon()).ok());
  EXPECT_EQ((*ends.server)->Read(buffer, 1, Soon()).code(), absl::StatusCode::kOutOfRange);
  // The other direction goes on, in several records.
  const std::string data(100'000, 'd');
  ASSERT_TRUE((*ends.server)->Write(data.data(), data.size(), Soon()).ok());
  std::string got(data.size(), '\0');
  ASSERT_TRUE((*ends.client)->Read(got.data(), got.size(), Soon()).ok());
  EXPECT_EQ(got, data);
  ends.server->reset();
  EXPECT_EQ((*ends.client)->Read(buffer, 1, Soon()).code(), absl::StatusCode::kOutOfRange);
}

TEST_F(Certificates, ShutdownAndDeadlineEndAWait) {
  Ends ends = Connect("host-a", "host-b", "host-b");
  char byte;
  EXPECT_EQ((*ends.client)->Read(&byte, 1, Deadline::After(std::chrono::milliseconds(10))).code(),
            absl::StatusCode::kDeadlineExceeded);
  std::thread reader(
      [&] { EXPECT_EQ((*ends.client)->Read(&byte, 1, Soon()).code(), absl::StatusCode::kCancelled); });
  (*ends.client)->Shutdown();
  reader.join();
}

TEST_F(Certificates, ServerOfAnotherName_IsRefused) {
  Ends ends = Connect("host-a", "host-b", "host-c");
  EXPECT_EQ(ends.client.status().code(), absl::StatusCode::kPermissionDenied) << ends.client.status();
  EXPECT_NE(Message(ends.client.status()).find("ostname mismatch"), std::string::npos)
      << ends.client.status();
  EXPECT_FALSE(ends.server.ok());
  EXPECT_TRUE(Connect("host-b", "host-a", "127.0.0.1").client.ok()) << "IP addresses are names as well";
  EXPECT_FALSE(Connect("host-b", "host-a", "127.0.0.2").client.ok());
}

TEST_F(Certificates, PeersOfAnotherAuthority_AreRefused) {
  Ends ends = Connect("host-a", "stranger", "host-b");
  EXPECT_EQ(ends.client.status().code(), absl::StatusCode::kPermissionDenied) << ends.client.status();

  // In TLS 1.3 the client has finished before the server has looked at its certificate: it hears of it when
  // it reads.
  ends = Connect("stranger", "host-b", "host-b", "ca");
  EXPECT_EQ(ends.server.status().code(), absl::StatusCode::kPermissionDenied) << ends.server.status();
  ASSERT_TRUE(ends.client.ok());
  char byte;
  EXPECT_FALSE((*ends.client)->Read(&byte, 1, Soon()).ok());
}

TEST_F(Certificates, PlaintextAndSilentPeers_AreRefused) {
  auto context = Load("host-a");
  auto [a, b] = SocketPair();
  ASSERT_EQ(::write(b.get(), "GET / HTTP/1.0\r\n\r\n", 18), 18);
  EXPECT_FALSE(MakeTlsChannel(std::move(a), *context, TlsRole::kServer, "", Soon()).ok());
  auto [c, d] = SocketPair();
  EXPECT_EQ(MakeTlsChannel(std::move(c), *context, TlsRole::kServer, "",
                           Deadline::After(std::chrono::milliseconds(20)))
                .status()
                .code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST_F(Certificates, BadFiles_AreNamedWithWhatIsWrong) {
  auto message = [](const std::string& ca, const std::string& cert, const std::string& key) {
    auto context = TlsContext::Load(ca, cert, key);
    EXPECT_FALSE(context.ok());
    return Message(context.status());
  };
  auto has = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  };
  const std::string ca = File("ca.pem"), cert = File("host-a.pem"), key = File("host-a.key");
  std::string text = message(File("absent.pem"), cert, key);
  EXPECT_TRUE(has(text, "CA file") && has(text, "absent.pem") && has(text, "No such file")) << text;
  text = message(ca, File("junk.pem"), key);
  EXPECT_TRUE(has(text, "junk.pem") && has(text, "no PEM certificate")) << text;
  text = message(ca, cert, File("host-b.key"));
  EXPECT_TRUE(has(text, "host-b.key") && has(text, "does not belong")) << text;
  text = message(ca, cert, File("encrypted.key"));
  EXPECT_TRUE(has(text, "encrypted.key") && has(text, "unencrypted")) << text;
  text = message(ca, cert, ca);
  EXPECT_TRUE(has(text, "key")) << text;
  text = message(ca, File("expired.pem"), File("expired.key"));
  EXPECT_TRUE(has(text, "expired.pem") && has(text, "expired on")) << text;
  text = message(ca, cert, "");
  EXPECT_TRUE(has(text, "key: no file")) << text;
}

TEST_F(Certificates, MemoryAndMessagesTravelOverTls) {
  memory::GuestRam source = MemfdRam({3000}), destination = MemfdRam({3000});
  for (uint64_t page = 0; page < 3000; page += 1 + page % 5) {
    FillPage(source.blocks()[0].base() + page * memory::kPageSize, page);
  }
  SenderOptions options;
  options.page_checksums = false;
  options.strategy = SendStrategy::kSendfile;  // becomes plain writes
  MemoryReceiver receiver(destination, {.channels = 2, .page_checksums = false});
  std::vector<std::unique_ptr<Channel>> channels;
  for (uint32_t i = 1; i <= 2; ++i) {
    Ends ends = Connect("host-a", "host-b", "host-b");
    ASSERT_TRUE(ends.client.ok() && ends.server.ok());
    channels.push_back(std::move(*ends.client));
    ASSERT_TRUE(receiver.AddChannel(i, std::move(*ends.server)).ok());
  }
  MemorySender sender(source, std::move(channels), options);
  memory::PageSets all = source.MakeSets();
  all[0].SetAll();
  ASSERT_TRUE(sender.SendRound(all, 0, {}, Soon()).ok());
  ASSERT_TRUE(receiver.WaitForFrames(sender.frames(), Soon()).ok());
  EXPECT_EQ(std::memcmp(source.blocks()[0].base(), destination.blocks()[0].base(), source.blocks()[0].size()),
            0);

  Ends ends = Connect("host-a", "host-b", "host-b");
  MessageChannel left(std::move(*ends.client)), right(std::move(*ends.server));
  v1::PeerMessage message;
  message.mutable_yield()->set_migration_id("m1");
  ASSERT_TRUE(left.Send(message, Soon()).ok());
  EXPECT_EQ(right.Receive(Soon())->yield().migration_id(), "m1");
}

}  // namespace
}  // namespace baton::stream
