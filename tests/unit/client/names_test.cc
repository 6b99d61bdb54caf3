#include "client/lib/names.h"

#include <gtest/gtest.h>

namespace baton::client {
namespace {

TEST(Names, FullName_TakesBothForms) {
  EXPECT_EQ(*FullName(Collection::kVms, "web1"), "vms/web1");
  EXPECT_EQ(*FullName(Collection::kVms, "vms/web1"), "vms/web1");
  EXPECT_EQ(ShortName("migrations/7c"), "7c");
  EXPECT_EQ(ShortName("7c"), "7c");
}

TEST(Names, FullName_Wrong_IsRefused) {
  for (const char* wrong : {"", "vms/", "hosts/a", "a b", "a/b", "../x", "a\nb"}) {
    EXPECT_FALSE(FullName(Collection::kVms, wrong).ok()) << wrong;
  }
}

}  // namespace
}  // namespace baton::client
