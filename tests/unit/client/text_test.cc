#include "client/ctl/text.h"

#include <gtest/gtest.h>

namespace baton::client {
namespace {

TEST(Text, DisplayWidth_CountsCharactersNotBytes) {
  EXPECT_EQ(DisplayWidth("abc"), 3u);
  EXPECT_EQ(DisplayWidth("a → b"), 5u);
  EXPECT_EQ(DisplayWidth("\x1b[31mred\x1b[0m"), 3u);
  EXPECT_EQ(DisplayWidth("\xff\xfe"), 2u) << "invalid bytes";
  EXPECT_EQ(DisplayWidth("\xe2\x86"), 2u) << "cut character";
}

TEST(Text, Truncate_MarksTheCut) {
  EXPECT_EQ(Truncate("hello", 5), "hello");
  EXPECT_EQ(Truncate("hello!", 5), "hell…");
  EXPECT_EQ(Truncate("hello!", 5, true), "hell~");
  EXPECT_EQ(Truncate("→→→→", 2), "→…");
  EXPECT_EQ(Truncate("\x1b[31mhello!\x1b[0m", 4), "\x1b[31mhel…\x1b[0m") << "the colour ends with the text";
  EXPECT_EQ(Truncate("x", 0), "");
}

TEST(Text, Harmless_TakesTheTeethOutOfControls) {
  EXPECT_EQ(Harmless("a\x1b[2Jb\x07\x7f"), "a?[2Jb??");
  EXPECT_EQ(Harmless("a\nb\tc"), "a\nb\tc");
  EXPECT_EQ(Harmless("\xc2\x9b"
                     "31m"),
            "??31m")
      << "C1 controls";
  EXPECT_EQ(Harmless("über"), "über");
}

TEST(Text, Pad) {
  EXPECT_EQ(PadRight("é", 3), "é  ");
  EXPECT_EQ(PadLeft("é", 3), "  é");
  EXPECT_EQ(PadRight("long", 2), "long");
}

}  // namespace
}  // namespace baton::client
