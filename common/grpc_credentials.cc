#include "common/grpc_credentials.h"

#include <grpcpp/create_channel.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <cerrno>
#include <fstream>
#include <sstream>

namespace baton {
namespace {

absl::StatusOr<std::string> ReadFile(const std::string& path, const char* what) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file) return ErrnoError(errno, fmt::format("cannot read the {} {}", what, path));
  text << file.rdbuf();
  if (!file || text.str().empty()) {
    return Error(absl::StatusCode::kInvalidArgument, "the {} {} is empty or not a file", what, path);
  }
  return text.str();
}

template <typename T, void (*Free)(T*)>
struct Freer {
  void operator()(T* object) const { Free(object); }
};
struct BioFree {
  void operator()(BIO* bio) const { BIO_free(bio); }
};
using Certificate = std::unique_ptr<X509, Freer<X509, X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Freer<EVP_PKEY, EVP_PKEY_free>>;

std::unique_ptr<BIO, BioFree> View(const std::string& text) {
  return std::unique_ptr<BIO, BioFree>(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

struct Pem {
  std::string ca, cert, key;
};

absl::StatusOr<Pem> Load(const TlsFiles& files) {
  if (files.ca.empty() || files.cert.empty() || files.key.empty()) {
    return absl::InvalidArgumentError(
        "TLS needs all three of the CA certificates, the own certificate and its key (tls.ca, tls.cert, "
        "tls.key)");
  }
  Pem pem;
  ASSIGN_OR_RETURN(pem.ca, ReadFile(files.ca, "CA file"));
  ASSIGN_OR_RETURN(pem.cert, ReadFile(files.cert, "certificate"));
  ASSIGN_OR_RETURN(pem.key, ReadFile(files.key, "key"));
  auto parse = [](const std::string& text) {
    return Certificate(PEM_read_bio_X509(View(text).get(), nullptr, nullptr, nullptr));
  };
  if (!parse(pem.ca)) {
    return Error(absl::StatusCode::kInvalidArgument, "the CA file {} holds no PEM certificate", files.ca);
  }
  Certificate cert = parse(pem.cert);
  if (!cert) {
    return Error(absl::StatusCode::kInvalidArgument, "{} holds no PEM certificate", files.cert);
  }
  // An empty password: without a callback OpenSSL would ask on the terminal.
  Key key(PEM_read_bio_PrivateKey(View(pem.key).get(), nullptr, nullptr, const_cast<char*>("")));
  if (!key) {
    return Error(absl::StatusCode::kInvalidArgument, "{} holds no unencrypted PEM private key", files.key);
  }
  if (X509_check_private_key(cert.get(), key.get()) != 1) {
    return Error(absl::StatusCode::kInvalidArgument, "the key {} does not belong to the certificate {}",
                 files.key, files.cert);
  }
  if (X509_cmp_current_time(X509_get0_notAfter(cert.get())) < 0) {
    return Error(absl::StatusCode::kFailedPrecondition, "the certificate {} has expired; renew it",
                 files.cert);
  }
  if (X509_cmp_current_time(X509_get0_notBefore(cert.get())) > 0) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 "the certificate {} is not valid yet; check the clock of this machine", files.cert);
  }
  return pem;
}

absl::Status NeedsTls(const Address& address, const char* verb) {
  return Error(
      absl::StatusCode::kFailedPrecondition,
      "{} {} without TLS is refused: only loopback addresses and unix sockets may go without. Set tls.ca, "
      "tls.cert and tls.key",
      verb, address.ToString());
}

}  // namespace

absl::Status CheckTlsFiles(const TlsFiles& files) { return Load(files).status(); }

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const Address& listen,
                                                                               const TlsFiles& files) {
  if (!files.enabled()) {
    if (!listen.IsLocal()) return NeedsTls(listen, "listening on");
    return grpc::InsecureServerCredentials();
  }
  ASSIGN_OR_RETURN(Pem pem, Load(files));
  grpc::SslServerCredentialsOptions options(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  options.pem_root_certs = pem.ca;
  options.pem_key_cert_pairs.push_back({pem.key, pem.cert});
  return grpc::SslServerCredentials(options);
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const Address& target, const TlsFiles& files,
                                                           const std::string& server_name,
                                                           grpc::ChannelArguments arguments) {
  if (!files.enabled()) {
    if (!target.IsLocal()) return NeedsTls(target, "connecting to");
    return grpc::CreateCustomChannel(target.ToString(), grpc::InsecureChannelCredentials(), arguments);
  }
  ASSIGN_OR_RETURN(Pem pem, Load(files));
  if (!server_name.empty()) arguments.SetSslTargetNameOverride(server_name);
  grpc::SslCredentialsOptions options;
  options.pem_root_certs = pem.ca;
  options.pem_private_key = pem.key;
  options.pem_cert_chain = pem.cert;
  return grpc::CreateCustomChannel(target.ToString(), grpc::SslCredentials(options), arguments);
}

grpc::ChannelArguments LongStreamArguments() {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // Reconnects are paced by the caller, who knows when to hurry.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  // In spite of its name the time that one attempt has to connect and finish the TLS handshake.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5'000);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1'000);
  return arguments;
}

}  // namespace baton
