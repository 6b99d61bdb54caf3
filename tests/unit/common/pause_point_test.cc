#include "common/pause_point.h"

#include <gtest/gtest.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <thread>

#include "common/fd.h"
#include "tests/temp_dir.h"

namespace baton {
namespace {

class PausePointTest : public testing::Test {
 protected:
  void TearDown() override { unsetenv("BATON_PAUSE_AT"); }
  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
};

TEST_F(PausePointTest, DoesNothingWhenNotNamed) {
  PausePoint(dir_, "frozen");
  setenv("BATON_PAUSE_AT", "unfrozen,frozen2", 1);
  PausePoint(dir_, "frozen");
  EXPECT_TRUE(std::filesystem::is_empty(dir_));
}

TEST_F(PausePointTest, HoldsUntilTheFileIsRemoved) {
  setenv("BATON_PAUSE_AT", "precopy,frozen", 1);
  UniqueFd watch(inotify_init1(IN_CLOEXEC));
  ASSERT_GE(inotify_add_watch(watch.get(), dir_.c_str(), IN_CREATE), 0);
  std::thread remover([&] {
    char event[4096];
    ASSERT_GT(read(watch.get(), event, sizeof event), 0);
    std::filesystem::remove(dir_ + "/pause-frozen");
  });
  PausePoint(dir_, "frozen");
  EXPECT_FALSE(std::filesystem::exists(dir_ + "/pause-frozen"));
  remover.join();
}

TEST_F(PausePointTest, EndsAtItsBound) {
  setenv("BATON_PAUSE_AT", "frozen", 1);
  PausePoint(dir_, "frozen", std::chrono::milliseconds(20));
  EXPECT_TRUE(std::filesystem::exists(dir_ + "/pause-frozen"));
}

TEST_F(PausePointTest, MissingDirectoryDoesNotHold) {
  setenv("BATON_PAUSE_AT", "frozen", 1);
  PausePoint(dir_ + "/none", "frozen");
}

}  // namespace
}  // namespace baton
