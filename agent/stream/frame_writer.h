// How batches of frames leave through a channel. Internal to the stream.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstdint>
#include <memory>

#include "agent/stream/channel.h"
#include "agent/stream/memory_frame.h"
#include "agent/stream/memory_sender.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::stream {

// Frames that leave together: pieces of headers and checksums, kept in the batch, and pieces of guest memory,
// which are only pointed at.
class FrameBatch {
 public:
  struct Piece {
    iovec bytes;
    int fd = -1;          // guest memory: its file, else -1
    uint64_t offset = 0;  // in that file
  };

  // Room for one more frame of at most one stripe.
  bool full() const { return pieces_used_ + 2 > kPieces || scratch_used_ + kFrameMetaMax > kScratch; }
  bool empty() const { return pieces_used_ == 0; }
  // Guest memory in the batch, bytes.
  uint64_t data_bytes() const { return data_bytes_; }
  uint64_t wire_bytes() const { return scratch_used_ + data_bytes_; }
  // Appends a header; returns where `checksums` u64 values that follow it are to be written.
  uint8_t* AddHeader(const FrameHeader& header, uint32_t checksums);
  // Appends the memory of the frame.
  void AddData(uint8_t* base, int fd, uint64_t offset, uint32_t length);
  void Clear() { pieces_used_ = 0, scratch_used_ = 0, data_bytes_ = 0; }

  Piece* pieces() { return pieces_.data(); }
  int piece_count() const { return static_cast<int>(pieces_used_); }

 private:
  static constexpr size_t kPieces = 512;
  static constexpr size_t kFrameMetaMax = kFrameHeaderSize + kPagesPerStripe * 8;
  static constexpr size_t kScratch = 32u << 10;
  std::array<Piece, kPieces> pieces_;
  size_t pieces_used_ = 0;
  std::array<uint8_t, kScratch> scratch_;
  size_t scratch_used_ = 0;
  uint64_t data_bytes_ = 0;
};

// One strategy on one channel. One thread at a time.
class FrameWriter {
 public:
  virtual ~FrameWriter() = default;
  virtual absl::Status Write(FrameBatch& batch, Deadline deadline) = 0;
  // After the last batch of a round: the kernel holds no reference to guest memory any more.
  virtual absl::Status Finish(Deadline) { return absl::OkStatus(); }
};

// `channel` must outlive the writer. Strategies that need a plain socket become kWrite on a TLS channel.
std::unique_ptr<FrameWriter> MakeFrameWriter(Channel& channel, SendStrategy strategy);

}  // namespace baton::stream
