#include "agent/vhost/wire.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>

namespace baton::vhost {
namespace {

using testing::HasSubstr;

constexpr uint64_t kEverything = ~uint64_t{0};

template <typename T>
WireMessage Make(Request request, const T& payload, int fds = 0) {
  WireMessage m;
  auto bytes = Bytes(payload);
  m.header = {static_cast<uint32_t>(request), kVersion, static_cast<uint32_t>(bytes.size())};
  m.payload.assign(bytes.begin(), bytes.end());
  for (int i = 0; i < fds; ++i) m.fds.emplace_back(::eventfd(0, EFD_CLOEXEC));
  return m;
}

WireMessage MemTable(std::vector<MemRegion> regions, int fds, uint32_t claimed) {
  WireMessage m = Make(Request::kSetMemTable, MemTableHeader{claimed, 0}, fds);
  for (const MemRegion& r : regions) {
    auto bytes = Bytes(r);
    m.payload.insert(m.payload.end(), bytes.begin(), bytes.end());
  }
  return m;
}

TEST(Wire, GetFeaturesLooksAsSpecified) {
  Header header{static_cast<uint32_t>(Request::kGetFeatures), kVersion, 0};
  const uint8_t expected[12] = {1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0};
  EXPECT_EQ(std::memcmp(&header, expected, sizeof expected), 0);
}

TEST(Wire, InflightDescriptionIs24BytesLong) {
  EXPECT_EQ(FindRequest(32)->min_size, 0x18u);
  EXPECT_FALSE(
      ValidateRequest(Make(Request::kSetInflightFd, std::array<uint8_t, 20>{}, 1), kEverything).ok());
}

TEST(Wire, HeadersWithWrongVersionFlagsOrSizeAreRefused) {
  EXPECT_TRUE(CheckHeader({1, 0x1, 0}, false).ok());
  EXPECT_TRUE(CheckHeader({1, 0x9, 0}, false).ok());
  EXPECT_TRUE(CheckHeader({1, 0x5, 8}, true).ok());
  EXPECT_THAT(Message(CheckHeader({1, 0x2, 0}, false)), HasSubstr("version"));
  EXPECT_FALSE(CheckHeader({1, 0x5, 0}, false).ok());
  EXPECT_FALSE(CheckHeader({1, 0x1, 8}, true).ok());
  EXPECT_FALSE(CheckHeader({1, 0xd, 8}, true).ok());
  EXPECT_THAT(Message(CheckHeader({1, 0x1, 0xffffffff}, false)), HasSubstr("payload"));
}

TEST(Wire, UnknownAndUnnegotiatedRequestsAreNamed) {
  EXPECT_THAT(Message(ValidateRequest(Make(static_cast<Request>(28), uint64_t{0}), kEverything)),
              HasSubstr("POSTCOPY_ADVISE is not supported"));
  EXPECT_THAT(Message(ValidateRequest(Make(static_cast<Request>(999), uint64_t{0}), kEverything)),
              HasSubstr("request 999"));
  EXPECT_THAT(Message(ValidateRequest(Make(Request::kSetStatus, uint64_t{0}), 0)), HasSubstr("STATUS"));
}

TEST(Wire, PayloadSizesAndDescriptorsMustFit) {
  EXPECT_TRUE(ValidateRequest(Make(Request::kSetFeatures, uint64_t{1}), 0).ok());
  EXPECT_THAT(Message(ValidateRequest(Make(Request::kSetFeatures, uint32_t{1}), 0)), HasSubstr("4 bytes"));
  EXPECT_THAT(Message(ValidateRequest(Make(Request::kSetFeatures, uint64_t{1}, 1), 0)),
              HasSubstr("1 descriptors"));
  EXPECT_THAT(Message(ValidateRequest(Make(Request::kSetVringKick, uint64_t{0}, 0), 0)),
              HasSubstr("0 descriptors"));
  EXPECT_TRUE(ValidateRequest(Make(Request::kSetVringKick, uint64_t{kVringNoFd}, 0), 0).ok());
  EXPECT_FALSE(ValidateRequest(Make(Request::kSetVringKick, uint64_t{kVringNoFd}, 1), 0).ok());
  EXPECT_FALSE(ValidateRequest(Make(Request::kSetVringKick, uint64_t{0x200}, 1), 0).ok());
  // Some front-ends send a descriptor with REM_MEM_REG.
  MemReg reg{0, {0, 4096, 0, 0}};
  EXPECT_TRUE(ValidateRequest(Make(Request::kRemMemReg, reg, 1), kEverything).ok());
  EXPECT_FALSE(ValidateRequest(Make(Request::kRemMemReg, reg, 2), kEverything).ok());
}

TEST(Wire, MemoryTablesAreCheckedAgainstThemselves) {
  MemRegion a{0, 0x10000, 0x7f0000000000, 0}, b{0x10000, 0x10000, 0x7f0000010000, 0x10000};
  EXPECT_TRUE(ValidateRequest(MemTable({a, b}, 2, 2), 0).ok());
  EXPECT_THAT(Message(ValidateRequest(MemTable({a, b}, 2, 9), 0)), HasSubstr("9 regions"));
  EXPECT_THAT(Message(ValidateRequest(MemTable({a}, 2, 2), 0)), HasSubstr("2 regions"));
  EXPECT_THAT(Message(ValidateRequest(MemTable({a, b}, 1, 2), 0)), HasSubstr("1 descriptors"));
}

TEST(Regions, OverlapOverflowAndAlignment) {
  auto why = [](std::vector<MemRegion> regions) { return Message(CheckRegions(regions)); };
  MemRegion a{0, 0x10000, 0x100000, 0};
  EXPECT_EQ(why({a, {0x10000, 0x1000, 0x110000, 0}}), "");
  EXPECT_THAT(why({a, {0xf000, 0x1000, 0x200000, 0}}), HasSubstr("guest physical"));
  EXPECT_THAT(why({a, {0x20000, 0x1000, 0x10f000, 0}}), HasSubstr("user addresses"));
  EXPECT_THAT(why({{0, 0, 0, 0}}), HasSubstr("empty"));
  EXPECT_THAT(why({{~uint64_t{0xfff}, 0x2000, 0, 0}}), HasSubstr("overflow"));
  EXPECT_THAT(why({{0, 0x2000, ~uint64_t{0xfff}, 0}}), HasSubstr("overflow"));
  EXPECT_THAT(why({{0, 0x2000, 0, ~uint64_t{0xfff}}}), HasSubstr("overflow"));
  EXPECT_THAT(why({{0x800, 0x1000, 0, 0}}), HasSubstr("multiples"));
}

TEST(Wire, RingRequestsAreChecked) {
  EXPECT_FALSE(ValidateRequest(Make(Request::kSetVringNum, VringState{256, 128}), 0).ok());
  EXPECT_FALSE(ValidateRequest(Make(Request::kSetVringNum, VringState{0, 0}), 0).ok());
  EXPECT_FALSE(ValidateRequest(Make(Request::kSetVringNum, VringState{0, 32769}), 0).ok());
  EXPECT_FALSE(ValidateRequest(Make(Request::kSetVringEnable, VringState{0, 2}), 0).ok());
  EXPECT_FALSE(ValidateRequest(Make(Request::kSetVringAddr, VringAddr{0, 2, 0, 0, 0, 0}), 0).ok());
}

TEST(Wire, ConfigSizesMustAgree) {
  struct {
    ConfigHeader header;
    uint8_t data[8];
  } config{{0, 8, 0}, {}};
  EXPECT_TRUE(ValidateRequest(Make(Request::kGetConfig, config), kEverything).ok());
  config.header.size = 9;
  EXPECT_FALSE(ValidateRequest(Make(Request::kGetConfig, config), kEverything).ok());
  config.header = {0xffffffff, 8, 0};
  EXPECT_FALSE(ValidateRequest(Make(Request::kGetConfig, config), kEverything).ok());
  config.header = {0, 8, 7};
  EXPECT_FALSE(ValidateRequest(Make(Request::kSetConfig, config), kEverything).ok());
}

WireMessage ReplyOf(Request request, size_t size, int fds = 0) {
  WireMessage m;
  m.header = {static_cast<uint32_t>(request), kReplyFlags, static_cast<uint32_t>(size)};
  m.payload.resize(size);
  for (int i = 0; i < fds; ++i) m.fds.emplace_back(::eventfd(0, EFD_CLOEXEC));
  return m;
}

TEST(Replies, SetLogBaseComesInThreeSizes) {
  for (size_t size : {0, 8, 16})
    EXPECT_TRUE(ValidateReply(Request::kSetLogBase, ReplyOf(Request::kSetLogBase, size), 16).ok());
  EXPECT_FALSE(ValidateReply(Request::kSetLogBase, ReplyOf(Request::kSetLogBase, 4), 16).ok());
}

TEST(Replies, GetConfigWithoutPayloadIsARefusal) {
  EXPECT_TRUE(
      absl::IsFailedPrecondition(ValidateReply(Request::kGetConfig, ReplyOf(Request::kGetConfig, 0), 20)));
  EXPECT_TRUE(
      absl::IsInvalidArgument(ValidateReply(Request::kGetConfig, ReplyOf(Request::kGetConfig, 16), 20)));
}

TEST(Replies, DescriptorsAndIdsMustFit) {
  EXPECT_TRUE(ValidateReply(Request::kGetInflightFd, ReplyOf(Request::kGetInflightFd, 24, 1), 24).ok());
  EXPECT_FALSE(ValidateReply(Request::kGetInflightFd, ReplyOf(Request::kGetInflightFd, 24, 0), 24).ok());
  EXPECT_FALSE(ValidateReply(Request::kGetFeatures, ReplyOf(Request::kGetFeatures, 8, 1), 0).ok());
  EXPECT_FALSE(ValidateReply(Request::kGetFeatures, ReplyOf(Request::kGetQueueNum, 8), 0).ok());
}

TEST(BackendRequests, OnlyConfigChangeIsUnderstood) {
  WireMessage m;
  m.header = {2, kVersion, 0};
  EXPECT_TRUE(ValidateBackendRequest(m).ok());
  m.header.request = 3;
  EXPECT_THAT(Message(ValidateBackendRequest(m)), HasSubstr("VRING_HOST_NOTIFIER"));
}

}  // namespace
}  // namespace baton::vhost
