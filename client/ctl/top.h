// The live view of the fleet, as text. Pure.
#pragma once

#include <string>
#include <vector>

#include "baton/v1/fleet.pb.h"
#include "baton/v1/migrations.pb.h"

namespace baton::client {

struct TopView {
  std::vector<v1::Host> hosts;
  std::vector<v1::Vm> vms;
  // Newest first, running and ended ones.
  std::vector<v1::Migration> migrations;
  std::string server;
  std::string problem;  // why the figures are old; empty if they are not
  int64_t now_ns = 0;
};

// At most `rows` lines of at most `columns` columns; 0 sets no bound.
std::vector<std::string> RenderTop(const TopView& view, size_t columns, size_t rows, bool ascii);

}  // namespace baton::client
