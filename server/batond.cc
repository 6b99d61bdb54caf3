#include "server/batond.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server_builder.h>

#include "common/listen.h"
#include "common/log.h"
#include "server/api/agent_service.h"
#include "server/api/fleet_service.h"
#include "server/api/migrations_service.h"
#include "server/api/policies_service.h"
#include "server/control/controller.h"
#include "server/control/device_events.h"
#include "server/store/measured_store.h"
#include "server/store/sqlite_store.h"

namespace baton::server {

// In the order they are made; destroyed in reverse after the loop has stopped.
struct Batond::Parts {
  ServerMetrics metrics;
  std::unique_ptr<Store> store;
  EventLoop loop;
  std::unique_ptr<Fleet> fleet;
  std::unique_ptr<Policies> policies;
  std::unique_ptr<Controller> controller;
  std::unique_ptr<DeviceEvents> device_events;
  std::unique_ptr<AgentService> agents;
  std::unique_ptr<FleetService> fleet_api;
  std::unique_ptr<MigrationsService> migrations;
  std::unique_ptr<PoliciesService> policies_api;
  DrainsService drains;
  std::unique_ptr<grpc::Server> server;
  std::unique_ptr<MetricsEndpoint> endpoint;
  int port = 0;
};

namespace {

absl::Status OpenParts(const ServerConfig& config, Batond*, auto& parts) {
  SqliteOptions store_options;
  store_options.directory = config.data_dir;
  store_options.log_length = config.watch_log;
  ASSIGN_OR_RETURN(auto sqlite, SqliteStore::Open(store_options));
  parts.store = std::make_unique<MeasuredStore>(std::move(sqlite), parts.metrics);
  FleetOptions fleet_options;
  fleet_options.heartbeat_interval = config.heartbeat_interval;
  fleet_options.heartbeat_timeout = config.heartbeat_timeout;
  fleet_options.server_version = config.version;
  parts.fleet = std::make_unique<Fleet>(parts.loop, *parts.store, parts.metrics, fleet_options);
  parts.policies = std::make_unique<Policies>(*parts.store, config.tls.enabled());
  ControllerOptions options;
  options.limits = config.limits;
  options.times = config.times;
  options.history = config.history;
  options.dirty_sample = config.dirty_sample;
  parts.controller = std::make_unique<Controller>(parts.loop, *parts.store, *parts.fleet, *parts.policies,
                                                  parts.metrics, options);
  RETURN_IF_ERROR(parts.fleet->Load());
  RETURN_IF_ERROR(parts.policies->Load());
  RETURN_IF_ERROR(parts.controller->Load());
  parts.device_events = std::make_unique<DeviceEvents>(parts.loop, *parts.store, *parts.fleet,
                                                       *parts.policies, *parts.controller, parts.metrics);
  return parts.device_events->Load();
}

absl::Status Listen(const ServerConfig& config, auto& parts) {
  RETURN_IF_ERROR(ProbeListen(config.listen));
  ASSIGN_OR_RETURN(auto credentials, MakeServerCredentials(config.listen, config.tls));
  if (!config.tls.enabled()) {
    LOG_WARN("no TLS: everyone who can reach {} may do everything", config.listen.ToString());
  }
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  // Without this a second batond would share the port and get half of the connections.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Agents ping every 10 s, with or without calls; see LongStreamArguments().
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  std::string address = config.listen.ToString();
  if (config.listen.unix_path.empty() && config.listen.host.empty()) {
    address = fmt::format("[::]:{}", config.listen.port);
  }
  builder.AddListeningPort(address, credentials, &parts.port);
  ApiContext api{parts.loop, parts.metrics};
  parts.agents = std::make_unique<AgentService>(api, *parts.fleet);
  parts.fleet_api = std::make_unique<FleetService>(api, *parts.fleet);
  parts.migrations = std::make_unique<MigrationsService>(api, *parts.controller);
  parts.policies_api = std::make_unique<PoliciesService>(api, *parts.policies);
  builder.RegisterService(parts.agents.get());
  builder.RegisterService(parts.fleet_api.get());
  builder.RegisterService(parts.migrations.get());
  builder.RegisterService(parts.policies_api.get());
  builder.RegisterService(&parts.drains);
  parts.server = builder.BuildAndStart();
  if (!parts.server || (config.listen.unix_path.empty() && parts.port == 0)) {
    return Error(absl::StatusCode::kUnavailable, "cannot listen on {}", config.listen.ToString());
  }
  return absl::OkStatus();
}

}  // namespace

Batond::Batond() : parts_(std::make_unique<Parts>()) {}

absl::StatusOr<std::unique_ptr<Batond>> Batond::Start(const ServerConfig& config) {
  auto batond = std::unique_ptr<Batond>(new Batond());
  Parts& parts = *batond->parts_;
  if (config.metrics) {
    ASSIGN_OR_RETURN(parts.endpoint, MetricsEndpoint::Start(*config.metrics, parts.metrics.registry()));
  }
  // Everything on the loop's thread, as later: the store and all state belong to it.
  absl::Status status;
  parts.loop.Post([&] { status = OpenParts(config, nullptr, parts); });
  parts.loop.Drain();
  RETURN_IF_ERROR(status);
  RETURN_IF_ERROR(Listen(config, parts));
  return batond;
}

Batond::~Batond() {
  if (parts_->server) {
    // Streams have no end of their own: those that go on after this are cancelled.
    parts_->server->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
    parts_->server->Wait();
  }
  parts_->loop.Stop();
}

int Batond::port() const { return parts_->port; }
uint16_t Batond::metrics_port() const { return parts_->endpoint ? parts_->endpoint->port() : 0; }

}  // namespace baton::server
