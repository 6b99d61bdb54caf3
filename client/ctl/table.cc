#include "client/ctl/table.h"

#include <algorithm>

#include "client/ctl/text.h"

namespace baton::client {

void Table::AddRow(std::vector<std::string> cells) {
  cells.resize(header_.size());
  for (std::string& cell : cells) {
    // A line break in a cell would break the table.
    cell = Harmless(cell);
    std::replace(cell.begin(), cell.end(), '\n', ' ');
    std::replace(cell.begin(), cell.end(), '\t', ' ');
    if (cell.empty()) cell = "-";
  }
  rows_.push_back(std::move(cells));
}

std::string Table::Render(size_t width) const {
  std::vector<size_t> widths(header_.size());
  for (size_t i = 0; i < header_.size(); ++i) {
    widths[i] = DisplayWidth(header_[i]);
    for (const auto& row : rows_) widths[i] = std::max(widths[i], DisplayWidth(row[i]));
  }
  std::string out;
  auto add = [&](const std::vector<std::string>& cells) {
    std::string line;
    for (size_t i = 0; i < cells.size(); ++i) {
      if (i > 0) line += "  ";
      line += i + 1 < cells.size() ? PadRight(cells[i], widths[i]) : cells[i];
    }
    if (width > 0) line = Truncate(line, width, !LocaleIsUtf8());
    out += line + "\n";
  };
  add(header_);
  for (const auto& row : rows_) add(row);
  return out;
}

}  // namespace baton::client
