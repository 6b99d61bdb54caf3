// TLS material of a host's peer connections.
#pragma once

#include <memory>
#include <string>

#include "common/status.h"

// OpenSSL's SSL_CTX.
struct ssl_ctx_st;

namespace baton::stream {

// Certificates and settings for both directions: TLS 1.3 only, both ends present a certificate that the CA
// signed. Immutable once loaded; shared by any number of channels and threads.
class TlsContext {
 public:
  // PEM files: `ca` signs the peers, `cert` is our certificate followed by its intermediates, `key` its
  // private key, not encrypted. Errors name the file and what is wrong with it: absent, unreadable, not PEM,
  // key and certificate do not belong together, expired or not valid yet.
  static absl::StatusOr<std::shared_ptr<const TlsContext>> Load(const std::string& ca,
                                                                const std::string& cert,
                                                                const std::string& key);
  ~TlsContext();
  TlsContext(const TlsContext&) = delete;
  TlsContext& operator=(const TlsContext&) = delete;

  ssl_ctx_st* get() const { return context_; }

 private:
  explicit TlsContext(ssl_ctx_st* context) : context_(context) {}
  ssl_ctx_st* context_;
};

}  // namespace baton::stream
