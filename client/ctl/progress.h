// The life of a migration as it is shown: lines for logs and pipes, a few lines redrawn in place for
// terminals, and a summary at the end. Pure: no clock, no descriptors.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "baton/v1/migrations.pb.h"

namespace baton::client {

// Turns successive states of one migration into lines, each thing that happened once, in the order it
// happened: phases, finished rounds, decisions, findings. States may skip things or repeat; nothing is told
// twice.
class ProgressLog {
 public:
  // Lines (without line breaks) for what is new. The first call tells everything so far.
  std::vector<std::string> Update(const v1::Migration& migration);

 private:
  size_t phases_ = 0;
  size_t findings_ = 0;
  size_t decisions_ = 0;
  int64_t last_round_ = -1;
  bool started_ = false;
  bool cancel_told_ = false;
};

struct LiveView {
  int columns = 80;
  bool ascii = false;
  bool colour = false;
  int64_t now_ns = 0;  // since the epoch; for the elapsed time
  std::string note;    // shown on the last line: "connection lost, trying again"
};

// The block that is redrawn while a migration runs: at most five lines, none wider than the terminal.
std::vector<std::string> RenderLive(const v1::Migration& migration, const LiveView& view);

// What a migration that ended came to, several lines with line breaks. For failures too: where the guest is,
// what to do.
std::string Summary(const v1::Migration& migration);

// One line for a watch of many: "migrations/1 vms/web1 a -> b PRECOPY round 2 …".
std::string StatusLine(const v1::Migration& migration);

}  // namespace baton::client
