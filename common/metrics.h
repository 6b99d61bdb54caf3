// The /metrics endpoint of batond and baton-agent, and the bucket bounds that their histograms share.
#pragma once

#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <memory>
#include <string>

#include "common/status.h"
#include "common/units.h"

namespace prometheus {
class Exposer;
}

namespace baton {

// Serves a registry over HTTP until it is destroyed. Thread-safe; has threads of its own.
class MetricsEndpoint {
 public:
  // `address` must be host:port. AlreadyExists if the port is in use.
  static absl::StatusOr<std::unique_ptr<MetricsEndpoint>> Start(
      const Address& address, std::shared_ptr<prometheus::Registry> registry);
  ~MetricsEndpoint();
  // The port really listened on (with port 0 the kernel's choice).
  uint16_t port() const { return port_; }

 private:
  MetricsEndpoint() = default;
  // Constant after Start. The exposer holds the registry weakly, so it stays alive here.
  std::shared_ptr<prometheus::Registry> registry_;
  std::unique_ptr<prometheus::Exposer> exposer_;
  uint16_t port_ = 0;
};

// Powers of two from `first` on, `count` of them: DoublingBuckets(0.001, 20) goes from 1 ms to about 9 min.
prometheus::Histogram::BucketBoundaries DoublingBuckets(double first, int count);

}  // namespace baton
