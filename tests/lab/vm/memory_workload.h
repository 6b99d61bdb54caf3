// Guest memory that the lab guest rewrites at a set rate, and checks: a page that did not travel, or
// travelled late, shows an older generation than the table (which travels, too) says.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "common/status.h"
#include "tests/lab/vm/options.h"
#include "tests/lab/vm/ram.h"

namespace baton::lab {

// Pure: no clock, no thread. Not thread-safe.
class MemoryWorkload {
 public:
  using OnError = std::function<void(const std::string&)>;

  // Bytes of guest memory: the table and the pages to rewrite, then `live`, then `freed` bytes, which are
  // taken into use again (`reuse`) from their end on.
  static uint64_t Bytes(const WorkloadOptions& options);
  MemoryWorkload(const Ram& ram, uint64_t gpa, const WorkloadOptions& options, OnError on_error);

  // A new guest: fills the live area, and dirties the freed one.
  void Boot();
  // Rewrites what is due; never catches up more than a tenth of a second.
  void Issue(int64_t now_us);
  int64_t NextDue() const { return next_due_; }
  void Resumed(int64_t now_us);
  // Checks every page that was ever written, the live area, and what was taken into use again.
  void Verify();

  // The area that the guest has freed and not taken again; its content is of no interest to anybody.
  uint64_t freed_gpa() const;
  uint64_t freed_bytes() const;
  uint64_t writes() const;
  uint64_t errors() const;
  uint64_t Digest() const;

 private:
  struct Header;
  Header& header() const { return *ram_.At<Header>(gpa_); }
  uint32_t* generations() const;
  uint64_t* page(uint64_t index) const;
  uint64_t live_gpa() const;
  void CheckPage(uint64_t index);
  void WritePage(uint64_t index);
  void Rewrite(int64_t now_us);
  void Reuse(int64_t now_us);
  void CheckArea(const char* what, uint64_t gpa, uint64_t bytes, uint64_t generation);
  void Report(const std::string& what);

  const Ram& ram_;
  const uint64_t gpa_;
  const uint64_t pages_, rate_, live_, freed_, reuse_;
  const OnError on_error_;
  // So many a second since then, and how many of them are done.
  struct Pace {
    int64_t start_us = 0;
    uint64_t done = 0;
    // How many are to be done now.
    uint64_t Due(int64_t now_us, uint64_t rate);
  };
  Pace rewrites_, reuses_;
  int64_t next_due_ = 0;
};

}  // namespace baton::lab
