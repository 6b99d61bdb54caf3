// Tables of text for people: columns as wide as their widest cell, two spaces between, no lines.
#pragma once

#include <string>
#include <vector>

namespace baton::client {

class Table {
 public:
  explicit Table(std::vector<std::string> header) : header_(std::move(header)) {}

  // Cells beyond the header's are dropped, missing ones are empty; empty cells print as "-".
  void AddRow(std::vector<std::string> cells);

  // With `width` > 0 (a terminal) lines are cut there; 0 never cuts, so that pipes get everything.
  std::string Render(size_t width = 0) const;

 private:
  std::vector<std::string> header_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace baton::client
