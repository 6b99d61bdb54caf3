#include "agent/stream/tls.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#include <cerrno>
#include <cstdio>
#include <ctime>
#include <vector>

#include "agent/stream/tls_error.h"

namespace baton::stream {
namespace {

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* p) const {
    Free(p);
  }
};
using FilePtr = std::unique_ptr<FILE, Deleter<::fclose>>;
using X509Ptr = std::unique_ptr<X509, Deleter<X509_free>>;
using KeyPtr = std::unique_ptr<EVP_PKEY, Deleter<EVP_PKEY_free>>;
using ContextPtr = std::unique_ptr<SSL_CTX, Deleter<SSL_CTX_free>>;

// OpenSSL would ask on the terminal for the pass phrase of an encrypted key.
int NoPassPhrase(char*, int, int, void*) { return -1; }

absl::Status FileError(const char* what, const std::string& path, const std::string& why) {
  return Error(absl::StatusCode::kInvalidArgument, "TLS {} {}: {}", what, path, why);
}

absl::StatusOr<FilePtr> OpenFile(const char* what, const std::string& path) {
  if (path.empty()) return Error(absl::StatusCode::kInvalidArgument, "TLS {}: no file is configured", what);
  FilePtr file(std::fopen(path.c_str(), "re"));
  if (!file) return ErrnoError(errno, fmt::format("TLS {} {}", what, path));
  return file;
}

std::string TimeText(const ASN1_TIME* time) {
  std::tm parts{};
  char text[32] = "unknown time";
  if (ASN1_TIME_to_tm(time, &parts)) std::strftime(text, sizeof(text), "%Y-%m-%d %H:%M:%S UTC", &parts);
  return text;
}

absl::StatusOr<std::vector<X509Ptr>> LoadCertificates(const char* what, const std::string& path) {
  ASSIGN_OR_RETURN(FilePtr file, OpenFile(what, path));
  std::vector<X509Ptr> certificates;
  for (;;) {
    X509Ptr certificate(PEM_read_X509(file.get(), nullptr, NoPassPhrase, nullptr));
    if (certificate == nullptr) break;
    if (X509_cmp_current_time(X509_get0_notBefore(certificate.get())) > 0) {
      return FileError(what, path,
                       "certificate is not valid before " + TimeText(X509_get0_notBefore(certificate.get())));
    }
    if (X509_cmp_current_time(X509_get0_notAfter(certificate.get())) < 0) {
      return FileError(what, path,
                       "certificate expired on " + TimeText(X509_get0_notAfter(certificate.get())));
    }
    certificates.push_back(std::move(certificate));
  }
  const bool at_end = ERR_GET_REASON(ERR_peek_last_error()) == PEM_R_NO_START_LINE;
  const std::string why = TakeTlsErrors();
  if (certificates.empty() && at_end) return FileError(what, path, "holds no PEM certificate");
  if (!at_end) return FileError(what, path, "a certificate in it is damaged: " + why);
  return certificates;
}

absl::StatusOr<KeyPtr> LoadKey(const std::string& path) {
  ASSIGN_OR_RETURN(FilePtr file, OpenFile("key", path));
  KeyPtr key(PEM_read_PrivateKey(file.get(), nullptr, NoPassPhrase, nullptr));
  if (key == nullptr) {
    return FileError("key", path, "holds no unencrypted PEM private key (" + TakeTlsErrors() + ")");
  }
  return key;
}

}  // namespace

std::string TakeTlsErrors() {
  std::string text;
  while (unsigned long error = ERR_get_error()) {
    char buffer[256];
    const char* reason = ERR_reason_error_string(error);
    if (reason == nullptr) {
      ERR_error_string_n(error, buffer, sizeof(buffer));
      reason = buffer;
    }
    if (!text.empty()) text += "; ";
    text += reason;
  }
  return text.empty() ? "no details" : text;
}

absl::StatusOr<std::shared_ptr<const TlsContext>> TlsContext::Load(const std::string& ca,
                                                                   const std::string& cert,
                                                                   const std::string& key) {
  ERR_clear_error();
  ASSIGN_OR_RETURN(auto authorities, LoadCertificates("CA file", ca));
  ASSIGN_OR_RETURN(auto chain, LoadCertificates("certificate", cert));
  ASSIGN_OR_RETURN(KeyPtr private_key, LoadKey(key));

  ContextPtr context(SSL_CTX_new(TLS_method()));
  if (context == nullptr) return Error(absl::StatusCode::kInternal, "TLS: {}", TakeTlsErrors());
  SSL_CTX* c = context.get();
  if (SSL_CTX_set_min_proto_version(c, TLS1_3_VERSION) != 1 ||
      SSL_CTX_set_ciphersuites(
          c, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256") != 1) {
    return Error(absl::StatusCode::kInternal, "TLS 1.3 is not available: {}", TakeTlsErrors());
  }
  X509_STORE* store = SSL_CTX_get_cert_store(c);
  for (const X509Ptr& authority : authorities) {
    if (X509_STORE_add_cert(store, authority.get()) != 1) return FileError("CA file", ca, TakeTlsErrors());
  }
  if (SSL_CTX_use_certificate(c, chain[0].get()) != 1) return FileError("certificate", cert, TakeTlsErrors());
  for (size_t i = 1; i < chain.size(); ++i) {
    if (SSL_CTX_add1_chain_cert(c, chain[i].get()) != 1)
      return FileError("certificate", cert, TakeTlsErrors());
  }
  if (X509_check_private_key(chain[0].get(), private_key.get()) != 1) {
    ERR_clear_error();
    return FileError("key", key, "does not belong to the certificate " + cert);
  }
  if (SSL_CTX_use_PrivateKey(c, private_key.get()) != 1) return FileError("key", key, TakeTlsErrors());
  SSL_CTX_set_verify(c, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  SSL_CTX_set_session_cache_mode(c, SSL_SESS_CACHE_OFF);
  // Tickets would be written into the first data that the server sends; connections are never resumed.
  SSL_CTX_set_num_tickets(c, 0);
  SSL_CTX_set_options(c, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
  SSL_CTX_set_mode(c, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  // One receive for many records.
  SSL_CTX_set_read_ahead(c, 1);
  SSL_CTX_set_default_read_buffer_len(c, 256u << 10);
  return std::shared_ptr<const TlsContext>(new TlsContext(context.release()));
}

TlsContext::~TlsContext() { SSL_CTX_free(context_); }

}  // namespace baton::stream
