// A directory of a test's own.
#pragma once

#include <stdlib.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>

namespace baton::test {

// Made with this object and gone with it, whatever is in it. What writes there must have ended: a fixture has
// it as its first member, which is the last to be destroyed. With BATON_TEST_KEEP in the environment it
// stays, to be looked at.
class TempDir {
 public:
  // A directory in `parent`. Its name is short, for the sake of sockets: their paths end at 107 bytes
  // (unix(7)).
  explicit TempDir(const std::string& parent = "/tmp") : path_(parent + "/bt-XXXXXX") {
    if (::mkdtemp(path_.data()) != nullptr) return;
    std::perror(path_.c_str());
    std::abort();
  }
  ~TempDir() {
    if (std::getenv("BATON_TEST_KEEP") != nullptr) return;
    std::error_code error;
    std::filesystem::remove_all(path_, error);
    if (error) std::fprintf(stderr, "%s is left behind: %s\n", path_.c_str(), error.message().c_str());
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }
  // The path of `name` in it.
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace baton::test
