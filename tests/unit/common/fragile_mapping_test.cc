#include "common/fragile_mapping.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <vector>

#include "common/fd.h"

namespace baton {
namespace {

constexpr size_t kPage = 4096;

class FragileMappingTest : public ::testing::Test {
 protected:
  FragileMappingTest() : fd_(::memfd_create("fragile", MFD_CLOEXEC)) {
    std::vector<uint8_t> content(3 * kPage);
    for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<uint8_t>(i / kPage + 1);
    EXPECT_EQ(::pwrite(fd_.get(), content.data(), content.size(), 0), 3 * kPage);
    auto mapping = FragileMapping::Map(fd_.get(), 3 * kPage);
    EXPECT_TRUE(mapping.ok()) << Message(mapping.status());
    if (mapping.ok()) mapping_ = *std::move(mapping);
  }

  UniqueFd fd_;
  FragileMapping mapping_;
};

TEST_F(FragileMappingTest, CopiesWhatIsThere) {
  std::array<uint8_t, 4> out{};
  ASSERT_TRUE(mapping_.Copy(kPage - 2, out.data(), out.size()));
  EXPECT_EQ(out, (std::array<uint8_t, 4>{1, 1, 2, 2}));
  // Shared: what is written later is seen.
  const uint8_t nine = 9;
  ASSERT_EQ(::pwrite(fd_.get(), &nine, 1, kPage), 1);
  ASSERT_TRUE(mapping_.Copy(kPage - 2, out.data(), out.size()));
  EXPECT_EQ(out[2], 9);
}

TEST_F(FragileMappingTest, RefusesWhatIsOutside) {
  std::array<uint8_t, 4> out{};
  EXPECT_TRUE(mapping_.Copy(3 * kPage - 4, out.data(), 4));
  EXPECT_FALSE(mapping_.Copy(3 * kPage - 3, out.data(), 4));
  EXPECT_FALSE(mapping_.Copy(SIZE_MAX, out.data(), 4));
  EXPECT_FALSE(mapping_.Copy(0, out.data(), SIZE_MAX));
  EXPECT_FALSE(FragileMapping().Copy(0, out.data(), 1));
}

TEST_F(FragileMappingTest, HintsAtNothingThatIsOutside) {
  ASSERT_NE(mapping_.Hint(0), nullptr);
  EXPECT_EQ(mapping_.Hint(3 * kPage - 1), mapping_.Hint(0) + (3 * kPage - 1));
  EXPECT_EQ(mapping_.Hint(3 * kPage), nullptr);
  EXPECT_EQ(mapping_.Hint(SIZE_MAX), nullptr);
  EXPECT_EQ(FragileMapping().Hint(0), nullptr);
}

TEST_F(FragileMappingTest, BearsAFileThatWasMadeShorterAgainAndAgain) {
  std::vector<uint8_t> out(3 * kPage);
  for (int i = 0; i < 3; ++i) {
    ASSERT_EQ(::ftruncate(fd_.get(), kPage), 0);
    EXPECT_FALSE(mapping_.Copy(0, out.data(), out.size()));
    EXPECT_FALSE(mapping_.Copy(2 * kPage, out.data(), 1));
    EXPECT_TRUE(mapping_.Copy(0, out.data(), kPage));
    ASSERT_EQ(::ftruncate(fd_.get(), 3 * kPage), 0);
    EXPECT_TRUE(mapping_.Copy(0, out.data(), out.size()));
    EXPECT_EQ(out[2 * kPage], 0);
  }
}

TEST_F(FragileMappingTest, OtherBusErrorsStillEndTheProcess) {
  ASSERT_EQ(::ftruncate(fd_.get(), kPage), 0);
  std::vector<uint8_t> out(kPage);
  EXPECT_FALSE(mapping_.Copy(kPage, out.data(), kPage));
  auto touch = [&] {
    void* ordinary = ::mmap(nullptr, 2 * kPage, PROT_READ, MAP_SHARED, fd_.get(), 0);
    (void)static_cast<volatile uint8_t*>(ordinary)[kPage];
  };
  EXPECT_DEATH(touch(), "");
}

}  // namespace
}  // namespace baton
