#include "client/ctl/live_display.h"

namespace baton::client {

void LiveDisplay::Draw(const std::vector<std::string>& stay, const std::vector<std::string>& block) {
  std::string body;
  for (const auto& line : stay) body += line + "\x1b[K\n";
  for (const auto& line : block) body += line + "\x1b[K\n";
  if (stay.empty() && body == last_) return;
  std::string frame;
  if (!hidden_) frame += "\x1b[?25l";
  hidden_ = true;
  if (height_ > 0) frame += "\x1b[" + std::to_string(height_) + "A\r";
  frame += body;
  // What is left of a longer block.
  frame += "\x1b[J";
  height_ = block.size();
  last_.clear();
  for (const auto& line : block) last_ += line + "\x1b[K\n";
  WriteAll(fd_, frame).IgnoreError();
}

void LiveDisplay::Clear() {
  std::string frame;
  if (height_ > 0) frame += "\x1b[" + std::to_string(height_) + "A\r\x1b[J";
  if (hidden_) frame += "\x1b[?25h";
  height_ = 0;
  hidden_ = false;
  last_.clear();
  if (!frame.empty()) WriteAll(fd_, frame).IgnoreError();
}

}  // namespace baton::client
