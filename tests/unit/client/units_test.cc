#include "client/lib/units.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "client/lib/connection.h"

namespace baton::client {
namespace {

using std::chrono::hours;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;

TEST(Units, FormatBytes_KeepsThreeDigits) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1024), "1.00 KiB");
  EXPECT_EQ(FormatBytes(10 * 1024), "10.0 KiB");
  EXPECT_EQ(FormatBytes(256ull << 20), "256 MiB");
  EXPECT_EQ(FormatBytes((1ull << 30) - 1), "1.00 GiB") << "not 1024 MiB";
  EXPECT_EQ(FormatBytes(~0ull), "16.0 EiB");
}

TEST(Units, FormatDuration_PicksTheUnit) {
  EXPECT_EQ(FormatDuration(Duration(0)), "0 ms");
  EXPECT_EQ(FormatDuration(Duration(999)), "999 ns");
  EXPECT_EQ(FormatDuration(microseconds(999)), "999 us");
  EXPECT_EQ(FormatDuration(Duration(999600)), "1.00 ms") << "not 1000 us";
  EXPECT_EQ(FormatDuration(milliseconds(34)), "34.0 ms");
  EXPECT_EQ(FormatDuration(milliseconds(1250)), "1.25 s");
  EXPECT_EQ(FormatDuration(milliseconds(59949)), "59.9 s");
  EXPECT_EQ(FormatDuration(milliseconds(59999)), "1m00s");
  EXPECT_EQ(FormatDuration(seconds(125)), "2m05s");
  EXPECT_EQ(FormatDuration(hours(25)), "25h00m");
  EXPECT_EQ(FormatDuration(milliseconds(-5)), "-5.00 ms");
}

TEST(Units, ToDuration_HostileValue_DoesNotOverflow) {
  google::protobuf::Duration huge;
  huge.set_seconds(INT64_MAX);
  EXPECT_GT(ToDuration(huge).count(), 0);
  huge.set_seconds(INT64_MIN);
  EXPECT_LT(ToDuration(huge).count(), 0);
}

TEST(Units, FormatAge) {
  google::protobuf::Timestamp time;
  EXPECT_EQ(FormatAge(time, 1000), "-");
  time.set_seconds(1000);
  EXPECT_EQ(FormatAge(time, 1090), "90s");
  EXPECT_EQ(FormatAge(time, 1000 + 600), "10m");
  EXPECT_EQ(FormatAge(time, 1000 + 5 * 3600), "5h");
  EXPECT_EQ(FormatAge(time, 1000 + 9 * 86400), "9d");
  EXPECT_EQ(FormatAge(time, 10), "0s") << "clocks differ";
}

TEST(Units, ParseRate_BytesAndBits) {
  EXPECT_EQ(*ParseRate("0"), 0u);
  EXPECT_EQ(*ParseRate("unlimited"), 0u);
  EXPECT_EQ(*ParseRate("500MiB"), 500u << 20);
  EXPECT_EQ(*ParseRate("1.5GiB/s"), 3ull << 29);
  EXPECT_EQ(*ParseRate("10Gbit"), 1250000000u);
  EXPECT_EQ(*ParseRate("800 Mbit/s"), 100000000u);
  EXPECT_EQ(*ParseRate("100MB"), 100000000u);
}

TEST(Units, ParseRate_Wrong_SaysWhat) {
  for (const char* wrong :
       {"", "fast", "-1MiB", "1e9", "10Gbot", "inf", "nan", "1.2.3MiB", "99999999999TiB", "."}) {
    EXPECT_FALSE(ParseRate(wrong).ok()) << wrong;
  }
  EXPECT_THAT(std::string(ParseRate("10Gbot").status().message()), HasSubstr("unknown unit 'Gbot'"));
}

TEST(Connection, ParseServer_Forms) {
  EXPECT_EQ(ParseServer("example.org")->ToString(), "example.org:7400");
  EXPECT_EQ(ParseServer("example.org:1")->ToString(), "example.org:1");
  EXPECT_EQ(ParseServer("[::1]")->ToString(), "[::1]:7400");
  EXPECT_EQ(ParseServer("unix:/run/x.sock")->ToString(), "unix:/run/x.sock");
  for (const char* wrong : {"", "http://x:1", ":7400", "x:0", "x:port", "unix:relative", "a:b:c"}) {
    EXPECT_FALSE(ParseServer(wrong).ok()) << wrong;
  }
}

TEST(Connection, CheckOptions_PlaintextOnlyToThisMachine) {
  ConnectionOptions options;
  for (const char* local : {"127.0.0.1:7400", "localhost", "[::1]:7400", "unix:/run/x.sock"}) {
    options.server = local;
    EXPECT_TRUE(CheckConnectionOptions(options).ok()) << local;
  }
  for (const char* remote : {"10.0.0.1:7400", "example.org", "127.0.0.1.example.org:7400"}) {
    options.server = remote;
    EXPECT_FALSE(CheckConnectionOptions(options).ok()) << remote;
  }
}

}  // namespace
}  // namespace baton::client
