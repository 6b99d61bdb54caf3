#include "common/units.h"

#include <gtest/gtest.h>

namespace baton {
namespace {

TEST(Units, SizesInBinaryUnits) {
  EXPECT_EQ(*ParseSize("0"), 0u);
  EXPECT_EQ(*ParseSize("4096"), 4096u);
  EXPECT_EQ(*ParseSize("64B"), 64u);
  EXPECT_EQ(*ParseSize("256MiB"), 256ull << 20);
  EXPECT_EQ(*ParseSize("256 MiB"), 256ull << 20);
  EXPECT_EQ(*ParseSize("1.5GiB"), 1536ull << 20);
  EXPECT_EQ(*ParseSize("16777215TiB"), 16777215ull << 40);
}

TEST(Units, WrongSizesSayWhatToWrite) {
  for (const char* text : {"", "MiB", "-1", "1..5GiB", "1e3", "0x10", "12XiB", " 1", "1MiBs", "."})
    EXPECT_FALSE(ParseSize(text).ok()) << text;
  EXPECT_EQ(Message(ParseSize("256MB").status()), "'256MB' is not a size; write 256MiB");
  EXPECT_EQ(Message(ParseSize("1g").status()), "'1g' is not a size; write 1GiB");
  EXPECT_EQ(Message(ParseSize("16777216TiB").status()), "'16777216TiB' is not a size; it is too large");
  EXPECT_EQ(Message(ParseSize("99999999999999999999").status()),
            "'99999999999999999999' is not a size; it is too large");
  EXPECT_EQ(Message(ParseSize("0.3B").status()), "'0.3B' is not a size; it is not a whole number of bytes");
}

TEST(Units, SizesSurviveFormatting) {
  for (uint64_t bytes : {0ull, 1ull, 1000ull, 4096ull, 256ull << 20, 3ull << 30, (1ull << 40) + 1, ~0ull})
    EXPECT_EQ(*ParseSize(FormatSize(bytes)), bytes) << FormatSize(bytes);
  EXPECT_EQ(FormatSize(256ull << 20), "256MiB");
}

TEST(Units, Durations) {
  EXPECT_EQ(*ParseDuration("300ms"), std::chrono::milliseconds(300));
  EXPECT_EQ(*ParseDuration("1m30s"), std::chrono::seconds(90));
  EXPECT_EQ(*ParseDuration("1.5s"), std::chrono::milliseconds(1500));
  EXPECT_EQ(*ParseDuration("0"), Duration(0));
  for (const char* text : {"", "300", "-1s", "inf", "1x", "10000000h"})
    EXPECT_FALSE(ParseDuration(text).ok()) << text;
  EXPECT_EQ(FormatDuration(std::chrono::milliseconds(300)), "300ms");
}

TEST(Units, Addresses) {
  auto v4 = ParseAddress("10.0.0.1:7410");
  ASSERT_TRUE(v4.ok());
  EXPECT_EQ(v4->host, "10.0.0.1");
  EXPECT_EQ(v4->port, 7410);
  EXPECT_FALSE(v4->IsLocal());
  auto v6 = ParseAddress("[::1]:1");
  ASSERT_TRUE(v6.ok());
  EXPECT_EQ(v6->host, "::1");
  EXPECT_TRUE(v6->IsLocal());
  EXPECT_EQ(v6->ToString(), "[::1]:1");
  auto unix_socket = ParseAddress("unix:/run/x.sock");
  ASSERT_TRUE(unix_socket.ok());
  EXPECT_TRUE(unix_socket->IsLocal());
  EXPECT_EQ(unix_socket->ToString(), "unix:/run/x.sock");
  for (const char* text :
       {"", "host", "host:", "host:99999", "host:1x", "::1:80", "[::1:80", "unix:rel", "unix:"})
    EXPECT_FALSE(ParseAddress(text).ok()) << text;
}

TEST(Units, NearestFindsSlipsOnly) {
  std::vector<std::string> words = {"memory", "machine", "vcpus"};
  EXPECT_EQ(Nearest("memroy", words).value_or(""), "memory");
  EXPECT_EQ(Nearest("vcpu", words).value_or(""), "vcpus");
  EXPECT_FALSE(Nearest("balloon", words).has_value());
  EXPECT_FALSE(Nearest("x", words).has_value());
}

}  // namespace
}  // namespace baton
