// All of batond behind one object, for main() and for tests that run it in their own process.
#pragma once

#include <grpcpp/server.h>

#include <memory>
#include <optional>
#include <string>

#include "common/grpc_credentials.h"
#include "common/metrics.h"
#include "common/status.h"
#include "server/config.h"

namespace baton::server {

// Serves from Start until it is destroyed. Thread-safe.
class Batond {
 public:
  // Opens the store, takes up every migration, then listens. Errors say what is wrong and what to do.
  static absl::StatusOr<std::unique_ptr<Batond>> Start(const ServerConfig& config);
  // Ends every call, waits for what is being decided, closes the store.
  ~Batond();

  // The port really listened on; 0 for unix sockets.
  int port() const;
  uint16_t metrics_port() const;

 private:
  struct Parts;
  Batond();
  std::unique_ptr<Parts> parts_;
};

}  // namespace baton::server
