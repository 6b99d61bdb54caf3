// Logging: one line an event on stderr, `time level program message key=value…` or JSON. Any thread.
// Baton logs what an operator can act on; what a caller can act on is returned as a Status instead.
#pragma once

#include <spdlog/spdlog.h>

#include <string>

namespace baton {

struct LogOptions {
  std::string program;         // "batond", "baton-agent", "baton-shim", "batonctl"
  std::string level = "info";  // trace, debug, info, warn, error
  bool json = false;           // one JSON object a line
  std::string context;         // appended to each line as is: "vm=web1"
};

// Call once at start, before other threads. Unknown levels fall back to info.
void InitLogging(const LogOptions& options);

}  // namespace baton

#define LOG_DEBUG(...) SPDLOG_LOGGER_CALL(spdlog::default_logger_raw(), spdlog::level::debug, __VA_ARGS__)
#define LOG_INFO(...) SPDLOG_LOGGER_CALL(spdlog::default_logger_raw(), spdlog::level::info, __VA_ARGS__)
#define LOG_WARN(...) SPDLOG_LOGGER_CALL(spdlog::default_logger_raw(), spdlog::level::warn, __VA_ARGS__)
#define LOG_ERROR(...) SPDLOG_LOGGER_CALL(spdlog::default_logger_raw(), spdlog::level::err, __VA_ARGS__)
