// baton-agent: see --help and docs/operations.md.
#include <signal.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "agent/daemon/agent.h"
#include "common/log.h"
#include "common/version.h"

namespace {

constexpr char kFooter[] =
    R"(Runs in the foreground and logs to stderr. SIGTERM and SIGINT end it; shims, guests and
migrations under way go on, and the next start picks them up.

Exit codes: 0 ended by a signal or --check-config found nothing wrong, 1 could not start (one line says why), 2 wrong
arguments or configuration.

The configuration is described in docs/operations.md. A small one:
  name: a
  batond: 127.0.0.1:7400
  peer: {listen: "127.0.0.1:7410"}
  metrics: 127.0.0.1:7411
  backends:
    disk0: {socket: /run/storage/disk0.sock, kind: qemu-storage-daemon})";

constexpr char kDefaultConfig[] = "/etc/baton/agent.yaml";

int Serve(baton::daemon::AgentConfig config) {
  // Blocked in all threads; taken one by one below.
  sigset_t signals;
  sigemptyset(&signals);
  for (int s : {SIGTERM, SIGINT}) sigaddset(&signals, s);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);
  std::string name = config.name;
  auto agent = baton::daemon::Agent::Start(std::move(config));
  if (!agent.ok()) {
    LOG_ERROR("cannot start: {}", baton::Message(agent.status()));
    return 1;
  }
  LOG_INFO("host {} is served, peer port {}", name, (*agent)->peer_port());
  int taken = 0;
  sigwait(&signals, &taken);
  LOG_INFO("ends on signal {}; shims go on", taken);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"The agent of one host: starts and finds VMs, talks to batond, receives peers.",
               "baton-agent"};
  app.footer(kFooter);
  app.set_version_flag("--version", std::string("baton-agent ") + baton::kVersion);
  std::string path = kDefaultConfig, level;
  bool check = false, json = false;
  app.add_option("-c,--config", path, "Configuration file")->capture_default_str();
  app.add_flag("--check-config", check,
               "Check the configuration and what it names (directories, programs, certificates), then end");
  app.add_option("--log-level", level, "trace, debug, info, warn or error; overrides the configuration")
      ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error"}));
  app.add_flag("--log-json", json, "Log JSON objects; overrides the configuration");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  auto config = baton::daemon::ReadAgentConfig(path);
  if (!config.ok()) {
    std::fprintf(stderr, "%s\n", baton::Message(config.status()).c_str());
    return 2;
  }
  if (!level.empty()) config->log_level = level;
  if (json) config->log_json = true;
  if (check) {
    absl::Status status = baton::daemon::CheckAgentEnvironment(*config);
    if (!status.ok()) std::fprintf(stderr, "%s\n", baton::Message(status).c_str());
    return status.ok() ? 0 : 1;
  }
  baton::InitLogging({"baton-agent", config->log_level, config->log_json, "host=" + config->name});
  return Serve(*std::move(config));
}
