// shim.conf: what the shim was told and what it must remember for a shim after it.
#pragma once

#include <functional>
#include <mutex>
#include <string>

#include "baton/v1/shim.pb.h"
#include "common/status.h"

namespace baton::shim {

// Thread-safe.
class ConfigStore {
 public:
  // Reads `dir`/shim.conf and checks what every mode needs. Errors name the file and the field.
  static absl::StatusOr<ConfigStore> Load(const std::string& dir);
  ConfigStore(ConfigStore&& other) noexcept
      : path_(std::move(other.path_)), config_(std::move(other.config_)) {}

  v1::ShimConfig Get() const;
  // Changes the configuration and makes it durable; `change` must not use this object. On STATE_WRITE_FAILED
  // the change is kept in memory only.
  absl::Status Update(const std::function<void(v1::ShimConfig&)>& change);
  // The same for a shim that follows this one on a host that lives on; durable after Sync().
  absl::Status UpdateSoon(const std::function<void(v1::ShimConfig&)>& change);
  absl::Status Sync() const;

 private:
  ConfigStore(std::string path, v1::ShimConfig config) : path_(std::move(path)), config_(std::move(config)) {}
  std::string path_;
  mutable std::mutex mutex_;
  v1::ShimConfig config_;  // guarded by mutex_
};

// Everything that must hold for a configuration, whoever wrote it.
absl::Status ValidateShimConfig(const v1::ShimConfig& config);

}  // namespace baton::shim
