#include "common/guarded_mapping.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <utility>
#include <vector>

#include "common/fd.h"
#include "common/fragile_mapping.h"

namespace baton {
namespace {

constexpr size_t kGuardedPage = 4096;
constexpr size_t kGuardedPages = 4;

class GuardedMappingTest : public ::testing::Test {
 protected:
  GuardedMappingTest() : fd_(MakeFile()) {
    auto mapping = GuardedMapping::Map(fd_.get(), kGuardedPages * kGuardedPage);
    EXPECT_TRUE(mapping.ok()) << Message(mapping.status());
    if (mapping.ok()) mapping_ = *std::move(mapping);
  }
  // Page n holds n + 1.
  static UniqueFd MakeFile() {
    UniqueFd fd(::memfd_create("guarded", MFD_CLOEXEC));
    std::vector<uint8_t> content(kGuardedPages * kGuardedPage);
    for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<uint8_t>(i / kGuardedPage + 1);
    EXPECT_EQ(::pwrite(fd.get(), content.data(), content.size(), 0), static_cast<ssize_t>(content.size()));
    return fd;
  }
  uint8_t Read(size_t page) const {
    return *static_cast<volatile uint8_t*>(mapping_.base() + page * kGuardedPage);
  }

  UniqueFd fd_;
  GuardedMapping mapping_;
};

TEST_F(GuardedMappingTest, IsSharedAndIntact) {
  EXPECT_EQ(Read(3), 4);
  *static_cast<volatile uint8_t*>(mapping_.base()) = 9;
  uint8_t byte = 0;
  ASSERT_EQ(::pread(fd_.get(), &byte, 1, 0), 1);
  EXPECT_EQ(byte, 9);
  EXPECT_TRUE(mapping_.intact());
}

TEST_F(GuardedMappingTest, FileThatWasMadeShorterReadsAsZeroesAndIsToldOf) {
  const UniqueFd another = MakeFile();
  auto other = GuardedMapping::Map(another.get(), kGuardedPages * kGuardedPage);
  ASSERT_TRUE(other.ok()) << other.status();
  ASSERT_EQ(::ftruncate(fd_.get(), 2 * kGuardedPage), 0);
  EXPECT_EQ(Read(1), 2);
  EXPECT_TRUE(mapping_.intact()) << "nothing that is gone was looked at";
  EXPECT_EQ(Read(3), 0);
  EXPECT_FALSE(mapping_.intact());
  // Writing goes nowhere, and harms nothing.
  *static_cast<volatile uint8_t*>(mapping_.base() + 2 * kGuardedPage) = 7;
  EXPECT_EQ(Read(1), 2);
  // It stays broken when the file is as long as before.
  ASSERT_EQ(::ftruncate(fd_.get(), kGuardedPages * kGuardedPage), 0);
  EXPECT_FALSE(mapping_.intact());
  EXPECT_TRUE(other->intact());
}

TEST_F(GuardedMappingTest, StateGoesAlongWhenItIsMoved) {
  ASSERT_EQ(::ftruncate(fd_.get(), 0), 0);
  GuardedMapping moved(std::move(mapping_));
  EXPECT_TRUE(moved.intact());
  EXPECT_EQ(*static_cast<volatile uint8_t*>(moved.base()), 0);
  EXPECT_FALSE(moved.intact());
  EXPECT_TRUE(mapping_.intact()) << "it is empty";
  // The next one in its place begins anew.
  moved = GuardedMapping();
  const UniqueFd another = MakeFile();
  auto next = GuardedMapping::Map(another.get(), kGuardedPage);
  ASSERT_TRUE(next.ok());
  EXPECT_TRUE(next->intact());
}

TEST_F(GuardedMappingTest, FragileMappingsAreBornBesideIt) {
  auto fragile = FragileMapping::Map(fd_.get(), kGuardedPages * kGuardedPage);
  ASSERT_TRUE(fragile.ok());
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(::ftruncate(fd_.get(), kGuardedPage), 0);
    std::array<uint8_t, 2> out{};
    EXPECT_FALSE(fragile->Copy(2 * kGuardedPage, out.data(), out.size()));
    EXPECT_EQ(Read(3), 0);
    EXPECT_FALSE(fragile->Copy(2 * kGuardedPage, out.data(), out.size()));
  }
  auto touch = [&] {
    void* ordinary = ::mmap(nullptr, 2 * kGuardedPage, PROT_READ, MAP_SHARED, fd_.get(), 0);
    (void)static_cast<volatile uint8_t*>(ordinary)[kGuardedPage];
  };
  EXPECT_DEATH(touch(), "") << "which nobody guards";
}

}  // namespace
}  // namespace baton
