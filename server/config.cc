#include "server/config.h"

#include <CLI/CLI.hpp>
#include <limits>

#include "common/config.h"

namespace baton::server {
namespace {

constexpr char kExitCodes[] =
    "Exit codes: 0 after SIGTERM or SIGINT, 1 if it could not start, 2 for a wrong command line or "
    "configuration.\n"
    "Configuration file: docs/batond.md.";

void ReadTimes(ConfigReader& reader, MachineTimes* times) {
  reader.Time("preparing", &times->preparing);
  reader.Time("switchover", &times->switchover);
  reader.Time("finishing", &times->finishing);
  reader.Time("cleanup", &times->cleanup);
  reader.Time("overtime", &times->overtime);
  reader.Time("unreachable", &times->unreachable);
  reader.Time("lost", &times->lost);
}

// What a flag was given, or an error that names the flag.
template <typename T>
absl::StatusOr<T> FlagValue(const char* flag, absl::StatusOr<T> parsed) {
  if (!parsed.ok()) return Annotate(parsed.status(), flag);
  return parsed;
}

}  // namespace

absl::Status ReadConfigFile(const std::string& path, ServerConfig* config) {
  ASSIGN_OR_RETURN(ConfigDocument document, ConfigDocument::FromFile(path));
  ConfigReader root = document.Root();
  constexpr uint64_t kMax = std::numeric_limits<uint32_t>::max();
  auto count = [&](ConfigReader& reader, const char* name, uint32_t* out) {
    uint64_t value = *out;
    if (reader.Uint(name, &value, 0, kMax)) *out = static_cast<uint32_t>(value);
  };
  root.Endpoint("listen", &config->listen);
  std::string metrics;
  if (root.Text("metrics", &metrics)) {
    if (metrics == "off") {
      config->metrics.reset();
    } else if (auto address = ParseAddress(metrics); address.ok()) {
      config->metrics = *address;
    } else {
      root.Problem("metrics", Message(address.status()));
    }
  }
  root.Path("data_dir", &config->data_dir);
  root.Map("tls", [&](ConfigReader& tls) {
    tls.Path("ca", &config->tls.ca, kRequired);
    tls.Path("cert", &config->tls.cert, kRequired);
    tls.Path("key", &config->tls.key, kRequired);
  });
  root.Map("log", [&](ConfigReader& log) {
    log.Choice<std::string>(
        "level",
        {{"trace", "trace"}, {"debug", "debug"}, {"info", "info"}, {"warn", "warn"}, {"error", "error"}},
        &config->log_level);
    log.Choice<bool>("format", {{"text", false}, {"json", true}}, &config->log_json);
  });
  root.Map("limits", [&](ConfigReader& limits) {
    count(limits, "outgoing_per_host", &config->limits.outgoing_per_host);
    count(limits, "incoming_per_host", &config->limits.incoming_per_host);
    count(limits, "cluster", &config->limits.cluster);
  });
  root.Map("heartbeat", [&](ConfigReader& heartbeat) {
    heartbeat.Time("interval", &config->heartbeat_interval);
    heartbeat.Time("timeout", &config->heartbeat_timeout);
    if (config->heartbeat_timeout < 2 * config->heartbeat_interval) {
      heartbeat.Problem("timeout", "must be at least twice the interval");
    }
    if (config->heartbeat_interval < std::chrono::milliseconds(50)) {
      heartbeat.Problem("interval", "must be at least 50ms");
    }
  });
  root.Map("deadlines", [&](ConfigReader& times) { ReadTimes(times, &config->times); });
  root.Uint("history", &config->history, 1, 1'000'000);
  uint64_t watch_log = static_cast<uint64_t>(config->watch_log);
  if (root.Uint("watch_log", &watch_log, 100, 10'000'000))
    config->watch_log = static_cast<int64_t>(watch_log);
  root.Time("dirty_sample", &config->dirty_sample);
  return document.Finish(root);
}

absl::StatusOr<CommandLine> ParseCommandLine(int argc, const char* const* argv) {
  CommandLine out;
#ifdef BATON_VERSION
  out.config.version = BATON_VERSION;
#endif
  CLI::App app{
      "batond: the control plane of Baton. Agents dial it, batonctl and cloud control planes call it over "
      "gRPC.",
      "batond"};
  app.footer(kExitCodes);
  std::string file, listen, metrics, data_dir, level, format;
  TlsFiles tls;
  std::optional<uint32_t> outgoing, incoming, cluster;
  std::string heartbeat;
  bool version = false;
  app.add_option("-c,--config", file, "YAML configuration file; flags win over it");
  app.add_option("--listen", listen, "where to serve gRPC: host:port or unix:/path (default 127.0.0.1:7400)");
  app.add_option("--metrics", metrics, "where to serve /metrics: host:port, or off (default 127.0.0.1:7401)");
  app.add_option("--data-dir", data_dir, "directory of the store (default /var/lib/batond)");
  app.add_option("--tls-ca", tls.ca, "PEM file of the CAs that sign clients; TLS is needed off loopback");
  app.add_option("--tls-cert", tls.cert, "PEM file of the own certificate");
  app.add_option("--tls-key", tls.key, "PEM file of its key");
  app.add_option("--max-outgoing", outgoing, "migrations that may leave a host at once, 0: any (default 2)");
  app.add_option("--max-incoming", incoming, "migrations that may enter a host at once, 0: any (default 2)");
  app.add_option("--max-cluster", cluster, "migrations at once in all, 0: any (default 16)");
  app.add_option("--heartbeat", heartbeat,
                 "how often agents report, like 5s; three missed ones end a session");
  app.add_option("--log-level", level, "trace, debug, info, warn or error (default info)")
      ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error"}));
  app.add_option("--log-format", format, "text or json (default text)")
      ->check(CLI::IsMember({"text", "json"}));
  app.add_flag("--version", version, "print the version");
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    out.print = app.help();
    return out;
  } catch (const CLI::ParseError& error) {
    return Error(absl::StatusCode::kInvalidArgument, "{}; see batond --help", error.what());
  } catch (const std::exception& error) {
    return Error(absl::StatusCode::kInvalidArgument, "{}", error.what());
  }
  if (version) {
    out.print = "batond " + out.config.version + "\n";
    return out;
  }
  ServerConfig& config = out.config;
  if (!file.empty()) RETURN_IF_ERROR(ReadConfigFile(file, &config));
  if (!listen.empty()) {
    ASSIGN_OR_RETURN(config.listen, FlagValue("--listen", ParseAddress(listen)));
  }
  if (metrics == "off") {
    config.metrics.reset();
  } else if (!metrics.empty()) {
    ASSIGN_OR_RETURN(config.metrics, FlagValue("--metrics", ParseAddress(metrics)));
  }
  if (!data_dir.empty()) config.data_dir = data_dir;
  if (!tls.ca.empty()) config.tls.ca = tls.ca;
  if (!tls.cert.empty()) config.tls.cert = tls.cert;
  if (!tls.key.empty()) config.tls.key = tls.key;
  if (outgoing) config.limits.outgoing_per_host = *outgoing;
  if (incoming) config.limits.incoming_per_host = *incoming;
  if (cluster) config.limits.cluster = *cluster;
  if (!heartbeat.empty()) {
    ASSIGN_OR_RETURN(config.heartbeat_interval, FlagValue("--heartbeat", ParseDuration(heartbeat)));
    if (config.heartbeat_interval < std::chrono::milliseconds(50)) {
      return absl::InvalidArgumentError("--heartbeat: must be at least 50ms");
    }
    config.heartbeat_timeout = 3 * config.heartbeat_interval;
  }
  if (!level.empty()) config.log_level = level;
  if (!format.empty()) config.log_json = format == "json";
  return out;
}

}  // namespace baton::server
