// Checks a disk image, from outside, against what the lab guest said last:
//   baton-lab-check IMAGE < console-log
// The last RESULT line of the log (its STATUS lines are not enough: writes go on after them) says how many
// writes each writer had acknowledged; from that follows what every block holds. Prints one line; exits with
// 0 only if every block holds exactly the newest acknowledged write, and the guest itself found no error.
#include <fmt/format.h>
#include <sys/stat.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "tests/lab/guest/block_format.h"

namespace baton::lab {
namespace {

// The value of `name=` in a line of name=value words; empty if it is not there.
std::string Word(const std::string& line, const std::string& name) {
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    if (word.rfind(name + "=", 0) == 0) return word.substr(name.size() + 1);
  }
  return "";
}

std::string LastResult(std::istream& log) {
  std::string result;
  for (std::string line; std::getline(log, line);) {
    size_t at = line.find("RESULT ");
    if (at != std::string::npos) result = line.substr(at);
  }
  return result;
}

std::vector<uint64_t> Numbers(const std::string& list) {
  std::vector<uint64_t> numbers;
  std::istringstream items(list);
  for (std::string item; std::getline(items, item, ',');)
    numbers.push_back(strtoull(item.c_str(), nullptr, 10));
  return numbers;
}

// Newest write of each block of a writer's region, after `count` writes.
std::vector<uint64_t> Expected(uint64_t count, uint64_t blocks) {
  std::vector<uint64_t> expected(blocks, 0);
  uint64_t first = count > 2 * blocks ? count - 2 * blocks : 0;
  for (uint64_t sequence = first + 1; sequence <= count; ++sequence)
    expected[BlockOf(sequence, blocks)] = sequence;
  return expected;
}

int Run(const char* path) {
  std::string result = LastResult(std::cin);
  if (result.empty()) {
    fmt::print(stderr, "no RESULT line in the console log\n");
    return 1;
  }
  uint64_t run = strtoull(Word(result, "run").c_str(), nullptr, 16);
  uint64_t blocks = strtoull(Word(result, "region_blocks").c_str(), nullptr, 10);
  std::vector<uint64_t> writers = Numbers(Word(result, "writers"));
  if (writers.empty() || blocks <= kHotBlocks || blocks > (uint64_t{1} << 32)) {
    fmt::print(stderr, "not a RESULT line: {}\n", result);
    return 1;
  }
  std::unique_ptr<FILE, int (*)(FILE*)> image(fopen(path, "re"), fclose);
  if (!image) {
    fmt::print(stderr, "cannot open {}\n", path);
    return 1;
  }
  uint64_t bad = 0, checked = 0, writes = 0;
  for (uint64_t writer = 0; writer < writers.size(); ++writer) {
    writes += writers[writer];
    std::vector<uint64_t> expected = Expected(writers[writer], blocks);
    for (uint64_t block = 0; block < blocks; ++block) {
      uint64_t number = writer * blocks + block;
      auto data = std::make_unique<Block>();
      if (fseeko(image.get(), static_cast<off_t>(number * kBlockSize), SEEK_SET) != 0 ||
          fread(data.get(), kBlockSize, 1, image.get()) != 1) {
        fmt::print(stderr, "cannot read block {}\n", number);
        return 1;
      }
      ++checked;
      BlockState state = CheckBlock(*data, run, writer, expected[block], number);
      if (state == BlockState::kGood || state == BlockState::kNeverWritten) continue;
      if (++bad <= 10) {
        fmt::print(stderr, "block {}: {} (sequence {}, expected {})\n", number, BlockStateName(state),
                   data->sequence, expected[block]);
      }
    }
  }
  bool guest_clean = Word(result, "errors") == "0" && Word(result, "memory_errors") == "0";
  if (!guest_clean) fmt::print(stderr, "the guest found errors: {}\n", result);
  if (bad) fmt::print(stderr, "{} of {} blocks are wrong\n", bad, checked);
  if (bad || !guest_clean) return 1;
  fmt::print("verified: {} writes, none lost, none repeated\n", writes);
  return 0;
}

}  // namespace
}  // namespace baton::lab

int main(int argc, char** argv) {
  if (argc != 2) {
    fmt::print(stderr, "usage: baton-lab-check IMAGE < console-log\n");
    return 2;
  }
  return baton::lab::Run(argv[1]);
}
