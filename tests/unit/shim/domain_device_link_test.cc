#include "agent/shim/domain_device_link.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include <cstdlib>
#include <thread>

#include "agent/stream/preamble.h"
#include "common/unix_socket.h"
#include "tests/temp_dir.h"

namespace baton::shim {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

constexpr char kMigration[] = "m-1";
constexpr uint64_t kEpoch = 7;

Deadline Soon() { return Deadline::After(seconds(60)); }

class DomainDeviceLinkTest : public testing::Test {
 protected:
  DomainDeviceReceiver::Options ReceiverOptions() const {
    return {.migration_id = kMigration, .run_dir = dir_, .epoch = kEpoch};
  }
  // A source's connection to `receiver`, behind the preamble.
  static absl::StatusOr<std::unique_ptr<stream::MessageChannel>> Connect(DomainDeviceReceiver& receiver) {
    int fds[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0)
      return absl::InternalError("socketpair");
    UniqueFd mine(fds[0]);
    RETURN_IF_ERROR(receiver.Accept(UniqueFd(fds[1]), nullptr));
    ASSIGN_OR_RETURN(auto channel, stream::MakePlainChannel(std::move(mine)));
    return std::make_unique<stream::MessageChannel>(std::move(channel));
  }
  static v1::PeerMessage Hello(const std::string& migration, uint64_t epoch) {
    v1::PeerMessage message;
    message.mutable_hello()->set_version(stream::kProtocolVersion);
    message.mutable_hello()->set_migration_id(migration);
    message.mutable_hello()->set_epoch(epoch);
    return message;
  }
  static v1::PeerMessage States() {
    v1::PeerMessage message;
    message.mutable_devices()->add_devices()->set_name("disk");
    return message;
  }
  // `message` is refused in words, and the connection ends.
  static void ExpectRefused(stream::MessageChannel& channel, const v1::PeerMessage& message,
                            v1::Reason reason, const std::string& text) {
    ASSERT_TRUE(channel.Send(message, Soon()).ok());
    auto answer = channel.Receive(Soon());
    ASSERT_TRUE(answer.ok()) << answer.status();
    ASSERT_TRUE(answer->has_verdict()) << answer->ShortDebugString();
    EXPECT_EQ(answer->verdict().reason(), reason) << answer->verdict().message();
    EXPECT_THAT(answer->verdict().message(), HasSubstr(text));
    auto end = channel.Receive(Soon());
    EXPECT_TRUE(absl::IsOutOfRange(end.status()) || absl::IsUnavailable(end.status())) << end.status();
  }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
};

TEST_F(DomainDeviceLinkTest, StatesAreTakenAfterAHello) {
  DomainDeviceReceiver receiver(nullptr, ReceiverOptions());
  auto channel = Connect(receiver);
  ASSERT_TRUE(channel.ok()) << channel.status();
  ASSERT_TRUE((*channel)->Send(Hello(kMigration, kEpoch), Soon()).ok());
  auto welcome = (*channel)->Receive(Soon());
  ASSERT_TRUE(welcome.ok() && welcome->has_welcome()) << welcome.status();
  // More than one: QEMU stops one device after the other.
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE((*channel)->Send(States(), Soon()).ok());
    auto answer = (*channel)->Receive(Soon());
    ASSERT_TRUE(answer.ok() && answer->has_verdict()) << answer.status();
    EXPECT_THAT(answer->verdict().message(), HasSubstr("there is no device disk here"));
  }
}

TEST_F(DomainDeviceLinkTest, StatesWithoutAHelloAreRefused) {
  DomainDeviceReceiver receiver(nullptr, ReceiverOptions());
  auto channel = Connect(receiver);
  ASSERT_TRUE(channel.ok()) << channel.status();
  ExpectRefused(**channel, States(), v1::PEER_PROTOCOL_ERROR, "did not begin with a hello");
}

TEST_F(DomainDeviceLinkTest, HelloOfAnotherEpochIsRefused) {
  DomainDeviceReceiver receiver(nullptr, ReceiverOptions());
  auto channel = Connect(receiver);
  ASSERT_TRUE(channel.ok()) << channel.status();
  ExpectRefused(**channel, Hello(kMigration, kEpoch - 1), v1::STATE_MISMATCH,
                "the source has the domain at epoch 6; this side was prepared for epoch 7");
}

TEST_F(DomainDeviceLinkTest, HelloOfAnotherMigrationIsRefused) {
  DomainDeviceReceiver receiver(nullptr, ReceiverOptions());
  auto channel = Connect(receiver);
  ASSERT_TRUE(channel.ok()) << channel.status();
  ExpectRefused(**channel, Hello("m-2", kEpoch), v1::PEER_PROTOCOL_ERROR, "a hello of migration 'm-2'");
}

TEST_F(DomainDeviceLinkTest, HelloOfAnotherVersionIsRefused) {
  DomainDeviceReceiver receiver(nullptr, ReceiverOptions());
  auto channel = Connect(receiver);
  ASSERT_TRUE(channel.ok()) << channel.status();
  v1::PeerMessage hello = Hello(kMigration, kEpoch);
  hello.mutable_hello()->set_version(stream::kProtocolVersion + 1);
  ExpectRefused(**channel, hello, v1::PEER_PROTOCOL_ERROR, "version 2 of the stream");
}

TEST_F(DomainDeviceLinkTest, SecondHelloIsNotTakenForStates) {
  DomainDeviceReceiver receiver(nullptr, ReceiverOptions());
  auto channel = Connect(receiver);
  ASSERT_TRUE(channel.ok()) << channel.status();
  ASSERT_TRUE((*channel)->Send(Hello(kMigration, kEpoch), Soon()).ok());
  ASSERT_TRUE((*channel)->Receive(Soon()).ok());
  ASSERT_TRUE((*channel)->Send(Hello(kMigration, kEpoch), Soon()).ok());
  auto end = (*channel)->Receive(Soon());
  EXPECT_TRUE(absl::IsOutOfRange(end.status()) || absl::IsUnavailable(end.status())) << end.status();
}

// Otherwise whoever connects first and says nothing keeps the source out for good.
TEST_F(DomainDeviceLinkTest, SilentPeerIsLetGoOf) {
  DomainDeviceReceiver::Options options = ReceiverOptions();
  options.greeting = milliseconds(50);
  DomainDeviceReceiver receiver(nullptr, options);
  auto silent = Connect(receiver);
  ASSERT_TRUE(silent.ok()) << silent.status();
  auto end = (*silent)->Receive(Soon());
  EXPECT_TRUE(absl::IsOutOfRange(end.status()) || absl::IsUnavailable(end.status())) << end.status();
}

TEST_F(DomainDeviceLinkTest, SilentPeerGivesWayToANewerConnection) {
  DomainDeviceReceiver::Options options = ReceiverOptions();
  options.greeting = std::chrono::hours(1);
  DomainDeviceReceiver receiver(nullptr, options);
  auto silent = Connect(receiver);
  ASSERT_TRUE(silent.ok()) << silent.status();
  auto source = Connect(receiver);
  ASSERT_TRUE(source.ok()) << source.status();
  auto end = (*silent)->Receive(Soon());
  EXPECT_TRUE(absl::IsOutOfRange(end.status()) || absl::IsUnavailable(end.status())) << end.status();
  ASSERT_TRUE((*source)->Send(Hello(kMigration, kEpoch), Soon()).ok());
  auto welcome = (*source)->Receive(Soon());
  ASSERT_TRUE(welcome.ok() && welcome->has_welcome()) << welcome.status();
}

// The same while TLS is being set up: neither a newer connection nor the end waits for it.
TEST_F(DomainDeviceLinkTest, SilentTlsHandshakeGivesWayAndIsStopped) {
  const std::string make =
      "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=h -keyout " +
      dir_ + "/key -out " + dir_ + "/pem >/dev/null 2>&1";
  ASSERT_EQ(std::system(make.c_str()), 0);
  auto tls = stream::TlsContext::Load(dir_ + "/pem", dir_ + "/pem", dir_ + "/key");
  ASSERT_TRUE(tls.ok()) << tls.status();
  DomainDeviceReceiver::Options options = ReceiverOptions();
  options.greeting = std::chrono::hours(1);
  DomainDeviceReceiver receiver(nullptr, options);
  UniqueFd ends[2];
  for (UniqueFd& mine : ends) {
    int fds[2];
    ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    mine.reset(fds[0]);
    const absl::Status accepted = receiver.Accept(UniqueFd(fds[1]), *tls);
    ASSERT_TRUE(accepted.ok()) << accepted;
  }
  receiver.Stop();
  for (const UniqueFd& mine : ends) {
    ASSERT_TRUE(WaitFd(mine.get(), POLLIN, Soon(), "the end").ok());
    char byte;
    EXPECT_EQ(::recv(mine.get(), &byte, 1, MSG_DONTWAIT), 0);
  }
}

// The source itself is not pushed out by whoever comes later.
TEST_F(DomainDeviceLinkTest, OneThatHasSaidItsHelloStays) {
  DomainDeviceReceiver receiver(nullptr, ReceiverOptions());
  auto source = Connect(receiver);
  ASSERT_TRUE(source.ok()) << source.status();
  ASSERT_TRUE((*source)->Send(Hello(kMigration, kEpoch), Soon()).ok());
  ASSERT_TRUE((*source)->Receive(Soon()).ok());
  const absl::Status later = Connect(receiver).status();
  EXPECT_EQ(later.code(), absl::StatusCode::kFailedPrecondition) << later;
  ASSERT_TRUE((*source)->Send(States(), Soon()).ok());
  auto answer = (*source)->Receive(Soon());
  EXPECT_TRUE(answer.ok() && answer->has_verdict()) << answer.status();
}

// Both ends: the source hears why, with the reason that lets it end the migration.
TEST_F(DomainDeviceLinkTest, SourceOfAnotherEpochHearsWhy) {
  const std::string path = dir_ + "/peer.sock";
  auto listener = UnixListener::Listen(path);
  ASSERT_TRUE(listener.ok()) << listener.status();
  DomainDeviceReceiver receiver(nullptr, ReceiverOptions());
  std::thread port([&] {
    ASSERT_TRUE(WaitFd(listener->fd(), POLLIN, Soon(), "the source").ok());
    auto socket = listener->Accept();
    ASSERT_TRUE(socket.ok() && *socket);
    ASSERT_TRUE(stream::ReadPreamble(socket->get(), Soon()).ok());
    EXPECT_TRUE(receiver.Accept(*std::move(socket), nullptr).ok());
  });
  v1::ShimConfig config;
  config.mutable_domain_host()->set_device_dir(dir_ + "/vm/devices");
  auto devices = DomainDevices::Start(config, /*returning=*/false, [] {});
  ASSERT_TRUE(devices.ok()) << devices.status();
  stream::DialOptions dial;
  dial.address = "unix:" + path;
  dial.migration_id = kMigration;
  DomainDeviceSender::Options options;
  options.migration_id = kMigration;
  options.epoch = kEpoch + 1;
  DomainDeviceSender sender(**devices, options);
  const absl::Status begun = sender.Begin(dial, Soon());
  port.join();
  EXPECT_EQ(ReasonOf(begun), v1::STATE_MISMATCH) << begun;
  EXPECT_THAT(Message(begun), HasSubstr("at epoch 8; this side was prepared for epoch 7"));
}

}  // namespace
}  // namespace baton::shim
