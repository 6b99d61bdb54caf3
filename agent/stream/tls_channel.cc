// TLS 1.3 over a non-blocking socket.
//
// An SSL object allows one call at a time, so each call holds a mutex, and waiting is done outside of it: a
// thread that waits for bytes does not keep another from writing. Records are collected in a buffer and leave
// with one system call for many of them: with one call a record (16 KiB) the system calls cost more than the
// encryption.
#include <arpa/inet.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <vector>

#include "agent/stream/channel.h"
#include "agent/stream/socket_io.h"
#include "agent/stream/tls_error.h"

namespace baton::stream {
namespace {

// Encrypted bytes that are collected before they are sent.
constexpr size_t kWriteBuffer = 256u << 10;
// AES-GCM keys wear out after about 2^24.5 records of 16 KiB (RFC 8446, 5.5), 362 GiB.
constexpr uint64_t kBytesPerKey = uint64_t{64} << 30;

// The socket under an SSL object.
struct Transport {
  UniqueFd socket;
  std::vector<uint8_t> out;  // [out_begin, out.size()) is not sent yet
  size_t out_begin = 0;
  int error = 0;  // errno of the last call that failed

  bool pending() const { return out_begin < out.size(); }

  // Sends what is collected. 1 done, 0 the socket is full, -1 error.
  int Flush() {
    while (pending()) {
      ssize_t n =
          ::send(socket.get(), out.data() + out_begin, out.size() - out_begin, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (n < 0) {
        if (errno == EINTR) continue;
        if (errno == EAGAIN || errno == EWOULDBLOCK) return 0;
        error = errno;
        return -1;
      }
      out_begin += static_cast<size_t>(n);
    }
    out.clear();
    out_begin = 0;
    return 1;
  }
};

int BioWrite(BIO* bio, const char* data, int size) {
  auto* transport = static_cast<Transport*>(BIO_get_data(bio));
  BIO_clear_retry_flags(bio);
  if (transport->out.size() + static_cast<size_t>(size) > kWriteBuffer) {
    int flushed = transport->Flush();
    if (flushed < 0) return -1;
    if (flushed == 0) {
      BIO_set_retry_write(bio);
      return -1;
    }
  }
  transport->out.insert(transport->out.end(), data, data + size);
  return size;
}

int BioRead(BIO* bio, char* data, int size) {
  auto* transport = static_cast<Transport*>(BIO_get_data(bio));
  BIO_clear_retry_flags(bio);
  for (;;) {
    ssize_t n = ::recv(transport->socket.get(), data, static_cast<size_t>(size), MSG_DONTWAIT);
    if (n > 0) return static_cast<int>(n);
    if (n == 0) {
      BIO_set_flags(bio, BIO_FLAGS_IN_EOF);
      return 0;
    }
    if (errno == EINTR) continue;
    if (errno == EAGAIN || errno == EWOULDBLOCK) {
      BIO_set_retry_read(bio);
    } else {
      transport->error = errno;
    }
    return -1;
  }
}

long BioControl(BIO* bio, int command, long, void*) {
  auto* transport = static_cast<Transport*>(BIO_get_data(bio));
  switch (command) {
    case BIO_CTRL_FLUSH: {
      BIO_clear_retry_flags(bio);
      int flushed = transport->Flush();
      if (flushed == 0) BIO_set_retry_write(bio);
      return flushed == 1 ? 1 : -1;
    }
    case BIO_CTRL_EOF:
      return BIO_test_flags(bio, BIO_FLAGS_IN_EOF) != 0;
    default:
      return 0;
  }
}

const BIO_METHOD* TransportMethod() {
  static BIO_METHOD* const method = [] {
    BIO_METHOD* m = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "baton transport");
    BIO_meth_set_write(m, BioWrite);
    BIO_meth_set_read(m, BioRead);
    BIO_meth_set_ctrl(m, BioControl);
    return m;
  }();
  return method;
}

struct SslDeleter {
  void operator()(SSL* ssl) const { SSL_free(ssl); }
};

class TlsChannel final : public Channel {
 public:
  TlsChannel(UniqueFd socket, std::shared_ptr<const TlsContext> context)
      : Channel(PeerName(socket.get())), context_(std::move(context)) {
    transport_.socket = std::move(socket);
    transport_.out.reserve(kWriteBuffer);
  }

  ~TlsChannel() override {
    // Tells the peer that the stream ends here on purpose; as far as the socket takes it without waiting.
    if (established_ && !write_closed_ && !stopped_.load(std::memory_order_acquire)) {
      ERR_clear_error();
      SSL_shutdown(ssl_.get());
      transport_.Flush();
      ERR_clear_error();
    }
  }

  absl::Status Handshake(TlsRole role, const std::string& expected_host, Deadline deadline) {
    ssl_.reset(SSL_new(context_->get()));
    BIO* bio = BIO_new(TransportMethod());
    if (ssl_ == nullptr || bio == nullptr) {
      BIO_free(bio);
      return Error(absl::StatusCode::kResourceExhausted, "TLS: {}", TakeTlsErrors());
    }
    BIO_set_data(bio, &transport_);
    BIO_set_init(bio, 1);
    SSL_set_bio(ssl_.get(), bio, bio);
    if (!expected_host.empty()) RETURN_IF_ERROR(Expect(expected_host, role));
    if (role == TlsRole::kClient) {
      SSL_set_connect_state(ssl_.get());
    } else {
      SSL_set_accept_state(ssl_.get());
    }
    for (;;) {
      ERR_clear_error();
      int result = SSL_do_handshake(ssl_.get());
      if (result == 1) break;
      RETURN_IF_ERROR(Annotate(Handle(SSL_get_error(ssl_.get(), result), deadline), "TLS handshake"));
    }
    RETURN_IF_ERROR(FlushAll(deadline));
    established_ = true;
    return absl::OkStatus();
  }

  absl::StatusOr<size_t> ReadSome(const iovec* buffers, int count, Deadline deadline) override {
    int first = 0;
    while (first + 1 < count && buffers[first].iov_len == 0) ++first;
    for (;;) {
      int error;
      absl::Status failure;
      {
        std::lock_guard lock(mutex_);
        ERR_clear_error();
        size_t n = 0;
        if (SSL_read_ex(ssl_.get(), buffers[first].iov_base, buffers[first].iov_len, &n) == 1) {
          read_.fetch_add(n, std::memory_order_relaxed);
          return n;
        }
        error = SSL_get_error(ssl_.get(), 0);
        if (!Retryable(error)) failure = Failure(error);
      }
      RETURN_IF_ERROR(failure);
      RETURN_IF_ERROR(Wait(error, deadline));
    }
  }

  absl::Status WriteAll(iovec* buffers, int count, Deadline deadline) override {
    while (count > 0) {
      if (buffers->iov_len == 0) {
        ++buffers, --count;
        continue;
      }
      int error;
      absl::Status failure;
      {
        std::lock_guard lock(mutex_);
        ERR_clear_error();
        RenewKey();
        size_t n = 0;
        if (SSL_write_ex(ssl_.get(), buffers->iov_base, buffers->iov_len, &n) == 1) {
          written_.fetch_add(n, std::memory_order_relaxed);
          Advance(buffers, count, n);
          continue;
        }
        error = SSL_get_error(ssl_.get(), 0);
        if (!Retryable(error)) failure = Failure(error);
      }
      RETURN_IF_ERROR(failure);
      RETURN_IF_ERROR(Wait(error, deadline));
    }
    return FlushAll(deadline);
  }

  // TLS 1.3 ends its directions one by one (RFC 8446, 6.1): close_notify ends ours. The socket stays open
  // both ways, since a FIN says nothing that close_notify has not said.
  absl::Status CloseWrite(Deadline deadline) override {
    for (;;) {
      int error;
      absl::Status failure;
      {
        std::lock_guard lock(mutex_);
        ERR_clear_error();
        // 0: sent, and the peer's has not come yet.
        const int result = SSL_shutdown(ssl_.get());
        if (result >= 0) {
          write_closed_ = true;
          break;
        }
        error = SSL_get_error(ssl_.get(), result);
        if (!Retryable(error)) failure = Failure(error);
      }
      RETURN_IF_ERROR(failure);
      RETURN_IF_ERROR(Wait(error, deadline));
    }
    return FlushAll(deadline);
  }

  void Shutdown() override {
    stopped_.store(true, std::memory_order_release);
    ::shutdown(transport_.socket.get(), SHUT_RDWR);
  }

  int plain_fd() const override { return -1; }
  int socket_fd() const override { return transport_.socket.get(); }

 private:
  static bool Retryable(int error) { return error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE; }

  absl::Status Expect(const std::string& host, TlsRole role) {
    unsigned char address[16];
    const bool is_ip =
        ::inet_pton(AF_INET, host.c_str(), address) == 1 || ::inet_pton(AF_INET6, host.c_str(), address) == 1;
    X509_VERIFY_PARAM* param = SSL_get0_param(ssl_.get());
    int ok = is_ip ? X509_VERIFY_PARAM_set1_ip_asc(param, host.c_str())
                   : X509_VERIFY_PARAM_set1_host(param, host.c_str(), host.size());
    X509_VERIFY_PARAM_set_hostflags(param, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    if (ok == 1 && !is_ip && role == TlsRole::kClient)
      ok = static_cast<int>(SSL_set_tlsext_host_name(ssl_.get(), host.c_str()));
    if (ok != 1) return Error(absl::StatusCode::kInvalidArgument, "'{}' cannot be a host's name", host);
    return absl::OkStatus();
  }

  // Waits for what an SSL call asked for. What is collected has to leave before the peer can answer.
  absl::Status Wait(int error, Deadline deadline) {
    if (stopped_.load(std::memory_order_acquire)) return StoppedError();
    return WaitSocket(transport_.socket.get(), error == SSL_ERROR_WANT_WRITE ? POLLOUT : POLLIN, deadline,
                      peer());
  }

  absl::Status Handle(int error, Deadline deadline) {
    if (!Retryable(error)) return Failure(error);
    return Wait(error, deadline);
  }

  absl::Status StoppedError() const {
    return Error(absl::StatusCode::kCancelled, "{}: connection was shut down", peer());
  }

  // Needs mutex_ (or a channel not yet shared).
  absl::Status Failure(int error) {
    if (stopped_.load(std::memory_order_acquire)) return StoppedError();
    if (error == SSL_ERROR_ZERO_RETURN)
      return Error(absl::StatusCode::kOutOfRange, "{}: closed by the peer", peer());
    if (error == SSL_ERROR_SYSCALL && transport_.error != 0) return SocketError(transport_.error, peer());
    if (long verdict = SSL_get_verify_result(ssl_.get()); !established_ && verdict != X509_V_OK) {
      TakeTlsErrors();
      return Error(absl::StatusCode::kPermissionDenied, "{}: its certificate is not accepted: {}", peer(),
                   X509_verify_cert_error_string(verdict));
    }
    const unsigned long first = ERR_peek_error();
    const int reason = ERR_GET_LIB(first) == ERR_LIB_SSL ? ERR_GET_REASON(first) : 0;
    const std::string why = TakeTlsErrors();
    // OpenSSL numbers the alerts a peer sent from SSL_AD_REASON_OFFSET on.
    if (reason >= SSL_AD_REASON_OFFSET && reason < SSL_AD_REASON_OFFSET + 256) {
      return Error(absl::StatusCode::kPermissionDenied, "{}: the peer refused the connection: {}", peer(),
                   why);
    }
    if (reason == SSL_R_DECRYPTION_FAILED_OR_BAD_RECORD_MAC) {
      return Error(absl::StatusCode::kDataLoss, "{}: {}", peer(), why);
    }
    if (reason == SSL_R_UNEXPECTED_EOF_WHILE_READING || error == SSL_ERROR_SYSCALL) {
      return Error(absl::StatusCode::kUnavailable, "{}: connection broke", peer());
    }
    return Error(absl::StatusCode::kUnavailable, "{}: TLS failed: {}", peer(), why);
  }

  absl::Status FlushAll(Deadline deadline) {
    for (;;) {
      int flushed;
      {
        std::lock_guard lock(mutex_);
        flushed = transport_.Flush();
        if (flushed < 0) return stopped_ ? StoppedError() : SocketError(transport_.error, peer());
      }
      if (flushed == 1) return absl::OkStatus();
      RETURN_IF_ERROR(Wait(SSL_ERROR_WANT_WRITE, deadline));
    }
  }

  // Needs mutex_.
  void RenewKey() {
    const uint64_t key = written_.load(std::memory_order_relaxed) / kBytesPerKey;
    if (key == key_) return;
    key_ = key;
    SSL_key_update(ssl_.get(), SSL_KEY_UPDATE_NOT_REQUESTED);
  }

  const std::shared_ptr<const TlsContext> context_;
  std::mutex mutex_;
  Transport transport_;                   // buffers guarded by mutex_; the socket is constant
  std::unique_ptr<SSL, SslDeleter> ssl_;  // guarded by mutex_
  uint64_t key_ = 0;                      // guarded by mutex_
  bool write_closed_ = false;             // guarded by mutex_
  bool established_ = false;              // constant after Handshake()
  std::atomic<bool> stopped_{false};
};

}  // namespace

absl::StatusOr<std::unique_ptr<Channel>> MakeTlsChannel(UniqueFd socket,
                                                        std::shared_ptr<const TlsContext> context,
                                                        TlsRole role, const std::string& expected_host,
                                                        Deadline deadline) {
  RETURN_IF_ERROR(PrepareSocket(socket.get()));
  auto channel = std::make_unique<TlsChannel>(std::move(socket), std::move(context));
  RETURN_IF_ERROR(channel->Handshake(role, expected_host, deadline));
  return std::unique_ptr<Channel>(std::move(channel));
}

}  // namespace baton::stream
