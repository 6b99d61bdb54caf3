// Credentials for Baton's gRPC connections: mutual TLS, or nothing on addresses that never leave the machine.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <memory>
#include <string>

#include "common/status.h"
#include "common/units.h"

namespace baton {

// PEM files. All three empty: no TLS. Read when credentials are made; a changed file counts from the next
// start on.
struct TlsFiles {
  std::string ca;    // certificates that sign the peers
  std::string cert;  // own certificate, followed by its intermediates
  std::string key;   // private key of `cert`, not encrypted

  bool enabled() const { return !ca.empty() || !cert.empty() || !key.empty(); }
};

// Checks that the files are complete, readable, parse, that the key belongs to the certificate and that the
// certificate is valid now. Errors name the file and what to do.
absl::Status CheckTlsFiles(const TlsFiles& files);

// For a server on `listen`: requires and verifies client certificates. Without TLS files only on local
// addresses (FailedPrecondition otherwise); the caller logs the warning that nothing is protected.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const Address& listen,
                                                                               const TlsFiles& files);

// A channel to `target`; does not connect yet. Without TLS files only to local addresses. `server_name` is
// the name the server's certificate must carry when it differs from the host in `target` (unix sockets need
// it).
absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const Address& target, const TlsFiles& files,
                                                           const std::string& server_name = "",
                                                           grpc::ChannelArguments arguments = {});

// Keep-alive settings for long streams: a dead peer or path is noticed after about 20 s without traffic.
grpc::ChannelArguments LongStreamArguments();

}  // namespace baton
