#include "agent/vhost/socket.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <filesystem>

namespace baton::vhost {
namespace {

using std::chrono::milliseconds;
using testing::HasSubstr;

Deadline Short() { return Deadline::After(milliseconds(50)); }

struct Pair {
  Pair() {
    int fds[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    near = Connection(UniqueFd(fds[0]));
    far.reset(fds[1]);
  }
  void Raw(const void* data, size_t size, int fds = 0) {
    iovec iov{const_cast<void*>(data), size};
    msghdr msg{};
    msg.msg_iov = &iov;
    msg.msg_iovlen = 1;
    std::vector<UniqueFd> owned;
    std::vector<int> raw;
    for (int i = 0; i < fds; ++i) {
      owned.emplace_back(::eventfd(0, EFD_CLOEXEC));
      raw.push_back(owned.back().get());
    }
    std::vector<char> control(CMSG_SPACE(sizeof(int) * raw.size()));
    if (fds) {
      msg.msg_control = control.data();
      msg.msg_controllen = control.size();
      cmsghdr* cmsg = CMSG_FIRSTHDR(&msg);
      cmsg->cmsg_level = SOL_SOCKET;
      cmsg->cmsg_type = SCM_RIGHTS;
      cmsg->cmsg_len = CMSG_LEN(sizeof(int) * raw.size());
      std::memcpy(CMSG_DATA(cmsg), raw.data(), sizeof(int) * raw.size());
    }
    ASSERT_EQ(::sendmsg(far.get(), &msg, 0), static_cast<ssize_t>(size));
  }
  Connection near;
  UniqueFd far;
};

int OpenDescriptors() {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

TEST(Connection, MessageArrivesInPiecesWithItsDescriptors) {
  Pair pair;
  const uint8_t m[20] = {12, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 3};
  pair.Raw(m, 5, 1);
  pair.Raw(m + 5, sizeof m - 5);
  auto got = pair.near.Receive(false, Short());
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->As<uint64_t>(), 3u);
  ASSERT_EQ(got->fds.size(), 1u);
  EXPECT_TRUE(::fcntl(got->fds[0].get(), F_GETFD) & FD_CLOEXEC);
}

TEST(Connection, EndsAndTruncationsAreToldApart) {
  Header header{2, kVersion, 8};
  {
    Pair pair;
    pair.far.reset();
    EXPECT_TRUE(absl::IsUnavailable(pair.near.Receive(false, Short()).status()));
  }
  {
    Pair pair;
    pair.Raw(&header, 6);
    pair.far.reset();
    EXPECT_TRUE(absl::IsDataLoss(pair.near.Receive(false, Short()).status()));
  }
  {
    Pair pair;
    pair.Raw(&header, sizeof header);
    pair.far.reset();
    EXPECT_TRUE(absl::IsDataLoss(pair.near.Receive(false, Short()).status()));
  }
  {
    Pair pair;
    EXPECT_TRUE(absl::IsDeadlineExceeded(pair.near.Receive(false, Short()).status()));
  }
  {
    // Half a message by the deadline: out of step for good.
    Pair pair;
    pair.Raw(&header, 6);
    EXPECT_TRUE(absl::IsDataLoss(pair.near.Receive(false, Short()).status()));
  }
}

TEST(Connection, DescriptorsAtAWrongPlaceAreClosedAndRefused) {
  const int before = OpenDescriptors();
  {
    Pair pair;
    Header header{2, kVersion, 8};
    uint64_t value = 0;
    pair.Raw(&header, sizeof header);
    pair.Raw(&value, sizeof value, 2);
    auto got = pair.near.Receive(false, Short());
    EXPECT_THAT(Message(got.status()), HasSubstr("first byte"));
  }
  EXPECT_EQ(OpenDescriptors(), before);
}

TEST(Connection, TooManyDescriptorsAreClosedAndRefused) {
  const int before = OpenDescriptors();
  {
    Pair pair;
    Header header{2, kVersion, 8};
    pair.Raw(&header, sizeof header, kMaxFds + 3);
    EXPECT_THAT(Message(pair.near.Receive(false, Short()).status()), HasSubstr("more than 8 descriptors"));
  }
  EXPECT_EQ(OpenDescriptors(), before);
}

TEST(Connection, NextMessageIsWaitedForAndReadAtOnce) {
  Pair pair;
  // Nobody said for how long.
  EXPECT_TRUE(absl::IsDeadlineExceeded(pair.near.ReceiveNext(Short()).status()));
  pair.near.SetPatience(milliseconds(20));
  EXPECT_TRUE(absl::IsDeadlineExceeded(pair.near.ReceiveNext(Short()).status()));
  const uint8_t usual[20] = {11, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 3};
  pair.Raw(usual, sizeof usual);
  auto got = pair.near.ReceiveNext(Short());
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->As<uint64_t>(), 3u);
  // Long ones, and pieces of one.
  uint8_t longer[52] = {9, 0, 0, 0, 1, 0, 0, 0, 40, 0, 0, 0};
  longer[51] = 7;
  pair.Raw(longer, 5);
  pair.Raw(longer + 5, sizeof longer - 5);
  pair.Raw(longer, sizeof longer);
  for (int i = 0; i < 2; ++i) {
    got = pair.near.ReceiveNext(Short());
    ASSERT_TRUE(got.ok()) << got.status();
    ASSERT_EQ(got->payload.size(), 40u);
    EXPECT_EQ(got->payload[39], 7);
  }
  EXPECT_TRUE(absl::IsDeadlineExceeded(pair.near.ReceiveNext(Short()).status()));
  pair.far.reset();
  EXPECT_TRUE(absl::IsUnavailable(pair.near.ReceiveNext(Short()).status()));
}

TEST(Connection, WhatNextReadsAheadBelongsToTheMessageBehind) {
  const uint8_t bare[12] = {34, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0};
  const uint8_t kick[20] = {12, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 3};
  for (const bool next : {false, true}) {
    Pair pair;
    pair.near.SetPatience(milliseconds(20));
    pair.Raw(bare, sizeof bare);
    pair.Raw(kick, sizeof kick, 1);
    pair.Raw(kick, sizeof kick, 1);
    auto got = pair.near.ReceiveNext(Short());
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_EQ(got->header.request, 34u);
    EXPECT_TRUE(got->payload.empty());
    EXPECT_TRUE(got->fds.empty());
    for (int i = 0; i < 2; ++i) {
      got = next ? pair.near.ReceiveNext(Short()) : pair.near.Receive(false, Short());
      ASSERT_TRUE(got.ok()) << got.status();
      EXPECT_EQ(got->header.request, 12u);
      EXPECT_EQ(got->As<uint64_t>(), 3u);
      ASSERT_EQ(got->fds.size(), 1u);
      EXPECT_TRUE(::fcntl(got->fds[0].get(), F_GETFD) & FD_CLOEXEC);
    }
  }
}

TEST(Connection, AbsurdSizeIsRefusedBeforeThePayloadIsRead) {
  Pair pair;
  Header header{5, kVersion, 0xfffffff0};
  pair.Raw(&header, sizeof header);
  EXPECT_TRUE(absl::IsInvalidArgument(pair.near.Receive(false, Short()).status()));
}

TEST(Connection, PeerThatDoesNotReadIsNoticed) {
  Pair pair;
  std::vector<uint8_t> payload(kMaxPayload);
  absl::Status status;
  for (int i = 0; i < 10000 && status.ok(); ++i) status = pair.near.Send(1, kVersion, payload, {}, Short());
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
}

TEST(Connection, AbsentSocketsAreNamed) {
  auto absent = Connection::Dial("/tmp/baton-no-such-socket", Short());
  EXPECT_TRUE(absl::IsNotFound(absent.status())) << absent.status();
  EXPECT_THAT(Message(absent.status()), HasSubstr("/tmp/baton-no-such-socket"));
}

}  // namespace
}  // namespace baton::vhost
