// A few lines at the bottom of a terminal, redrawn in place, under lines that stay.
#pragma once

#include <string>
#include <vector>

#include "client/ctl/terminal.h"

namespace baton::client {

// Hides the cursor while it shows something; Clear and the destructor show it again. Frames go out in one
// write each and overwrite what was there, so that nothing flickers. One thread.
class LiveDisplay {
 public:
  explicit LiveDisplay(int fd) : fd_(fd) {}
  ~LiveDisplay() { Clear(); }
  LiveDisplay(const LiveDisplay&) = delete;
  LiveDisplay& operator=(const LiveDisplay&) = delete;

  // `stay` lines are printed above, once; `block` replaces the last block.
  void Draw(const std::vector<std::string>& stay, const std::vector<std::string>& block);
  // Removes the block.
  void Clear();

 private:
  const int fd_;
  size_t height_ = 0;  // lines of the block on the screen; the cursor stands below it
  bool hidden_ = false;
  std::string last_;
};

}  // namespace baton::client
