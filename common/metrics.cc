#include "common/metrics.h"

#include <prometheus/exposer.h>

#include <exception>

#include "common/listen.h"

namespace baton {

absl::StatusOr<std::unique_ptr<MetricsEndpoint>> MetricsEndpoint::Start(
    const Address& address, std::shared_ptr<prometheus::Registry> registry) {
  if (!address.unix_path.empty()) {
    return Error(absl::StatusCode::kInvalidArgument, "metrics cannot be served on {}: host:port is needed",
                 address.ToString());
  }
  // The exposer's own exception does not tell why, so the usual causes are looked for first.
  if (absl::Status status = ProbeListen(address); !status.ok()) return Annotate(status, "metrics");
  auto endpoint = std::unique_ptr<MetricsEndpoint>(new MetricsEndpoint());
  try {
    endpoint->exposer_ = std::make_unique<prometheus::Exposer>(
        address.host.empty() ? std::to_string(address.port) : address.ToString(), 1);
    endpoint->exposer_->RegisterCollectable(registry);
    for (int port : endpoint->exposer_->GetListeningPorts()) endpoint->port_ = static_cast<uint16_t>(port);
  } catch (const std::exception& error) {
    return Error(absl::StatusCode::kUnavailable, "metrics: cannot listen on {}: {}", address.ToString(),
                 error.what());
  }
  endpoint->registry_ = std::move(registry);
  return endpoint;
}

MetricsEndpoint::~MetricsEndpoint() = default;

prometheus::Histogram::BucketBoundaries DoublingBuckets(double first, int count) {
  prometheus::Histogram::BucketBoundaries bounds;
  for (int i = 0; i < count; ++i, first *= 2) bounds.push_back(first);
  return bounds;
}

}  // namespace baton
