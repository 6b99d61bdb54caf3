// One connection between two shims: a byte stream, plaintext or TLS 1.3. Everything that waits takes a
// deadline.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "agent/stream/tls.h"
#include "common/clock.h"
#include "common/fd.h"
#include "common/status.h"

namespace baton::stream {

// Thread rules: one thread may read while another writes; Shutdown() and the counters are for any thread.
//
// Errors: OutOfRange "closed by the peer" if the stream ended in good order, DeadlineExceeded, Cancelled
// after Shutdown(), Unavailable if the connection broke, DataLoss if TLS found the bytes wrong. After any
// error but DeadlineExceeded of ReadSome() the channel is of no further use.
class Channel {
 public:
  virtual ~Channel() = default;

  // Reads at least one byte, at most what the `count` (≥ 1) buffers hold, in their order; returns how many.
  virtual absl::StatusOr<size_t> ReadSome(const iovec* buffers, int count, Deadline deadline) = 0;
  // Fills all buffers; may change the array `buffers` while it does. A stream that ends inside them is
  // DataLoss, one that ends before them OutOfRange.
  virtual absl::Status ReadAll(iovec* buffers, int count, Deadline deadline);
  // Writes all buffers; may change the array `buffers` while it does.
  virtual absl::Status WriteAll(iovec* buffers, int count, Deadline deadline) = 0;
  // Ends our direction: the peer reads what was written, then "closed by the peer", and can still write.
  // Nothing may be written after it. For the writing thread.
  virtual absl::Status CloseWrite(Deadline deadline) = 0;
  // Makes every call that waits, now and later, return Cancelled; the peer sees the connection end.
  virtual void Shutdown() = 0;
  // From now on what waits sleeps at once, instead of giving its processor away a few times before: for
  // channels whose ends are programs that have something else to do meanwhile. Before anything waits.
  virtual void SleepAtOnce() {}
  // The socket of a plaintext channel, for sendfile(2) and MSG_ZEROCOPY; -1 where bytes must go through
  // WriteAll().
  virtual int plain_fd() const = 0;
  // The socket below, encrypted or not, for its options; -1 where there is none.
  virtual int socket_fd() const { return plain_fd(); }

  // Exactly `size` bytes, as ReadAll().
  absl::Status Read(void* data, size_t size, Deadline deadline);
  absl::Status Write(const void* data, size_t size, Deadline deadline);

  // Bytes of the stream so far (without TLS overhead).
  uint64_t bytes_written() const { return written_.load(std::memory_order_relaxed); }
  uint64_t bytes_read() const { return read_.load(std::memory_order_relaxed); }
  // "10.0.0.2:7410"; for messages.
  const std::string& peer() const { return peer_; }
  // Strategies that write to plain_fd() themselves account for it here.
  void AddWritten(uint64_t bytes) { written_.fetch_add(bytes, std::memory_order_relaxed); }

 protected:
  explicit Channel(std::string peer) : peer_(std::move(peer)) {}
  // What a read returns when it had begun: a stream that is over is DataLoss then.
  absl::Status EndedInside(const absl::Status& status) const;
  std::atomic<uint64_t> written_{0};
  std::atomic<uint64_t> read_{0};

 private:
  std::string peer_;
};

// Sets what every peer connection gets: non-blocking, close-on-exec, TCP_NODELAY, TCP_USER_TIMEOUT of 10 s,
// and keepalive probes after 5 s of silence: a host that is gone is noticed within 15 s, on a connection on
// which nothing is sent as well; and CongestionControlFor(). Unix sockets are left as they are apart from the
// first two.
absl::Status PrepareSocket(int fd);

// The congestion control (tcp(7), TCP_CONGESTION) for a connection that has `current` and whose handshake
// took `round_trip`: another one within a site where `current` is BBR, otherwise `current`. BBR paces: it
// sends in bursts of its own small size at times of a timer, for queues of long paths that are not there.
// Between two hosts of a site that costs nearly twice the processor time for the same bytes
// (docs/decisions/0009-congestion-control.md), which QEMU and its guest need. Pure.
std::string_view CongestionControlFor(std::string_view current, std::chrono::microseconds round_trip);

// For a TCP connection whose reader is not Baton: how long the other end may take nothing before the
// connection counts as broken. TCP_USER_TIMEOUT ends one with a closed window too, however alive the host is
// (tcp(7)). Other sockets are left alone.
absl::Status SetStallLimit(int fd, std::chrono::milliseconds limit);

// Address of the other end, for messages: "10.0.0.2:7410", or "unix".
std::string PeerName(int fd);

// A plaintext channel over a connected stream socket (the preamble, if any, is through).
absl::StatusOr<std::unique_ptr<Channel>> MakePlainChannel(UniqueFd socket);

enum class TlsRole { kClient, kServer };
// Runs the TLS handshake and returns the channel. The peer's certificate must be signed by the context's CA
// and, unless `expected_host` is empty, carry that DNS name or IP address. PermissionDenied if it does not,
// with the reason in OpenSSL's words.
absl::StatusOr<std::unique_ptr<Channel>> MakeTlsChannel(UniqueFd socket,
                                                        std::shared_ptr<const TlsContext> context,
                                                        TlsRole role, const std::string& expected_host,
                                                        Deadline deadline);

}  // namespace baton::stream
