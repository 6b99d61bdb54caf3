#include "agent/shim/config_store.h"

#include "agent/vmm/qmp/qemu_command.h"
#include "common/durable_file.h"
#include "common/unix_socket.h"
#include "common/vm_spec.h"

namespace baton::shim {

absl::Status ValidateShimConfig(const v1::ShimConfig& config) {
  auto missing = [](const char* field) {
    return Error(absl::StatusCode::kInvalidArgument, "shim.conf: {} is missing", field);
  };
  if (config.mode() == v1::ShimConfig::MODE_UNSPECIFIED) return missing("mode");
  if (config.run_dir().empty()) return missing("run_dir");
  if (config.state_dir().empty()) return missing("state_dir");
  if (config.mode() == v1::ShimConfig::DOMAIN) {
    if (config.libvirt_uri().empty()) return missing("libvirt_uri");
    if (config.domain_uuid().empty()) return missing("domain_uuid");
    if (config.migration_id().empty()) return absl::OkStatus();
    if (config.token().empty()) return missing("token");
    if (config.domain().tunnel_dir().empty()) return missing("domain.tunnel_dir");
    if (config.domain_host().socket().empty()) return missing("domain_host.socket");
    return CheckUnixPath(config.domain().tunnel_dir() + "/libvirt");
  }
  if (config.memory_path().empty()) return missing("memory_path");
  if (config.qemu_path().empty()) return missing("qemu_path");
  v1::VmSpec spec = config.spec();
  FillVmSpecDefaults(&spec);
  RETURN_IF_ERROR(ValidateVmSpec(spec));
  if (config.devices_size() != spec.devices_size()) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "shim.conf: back-ends for {} devices, but the spec has {}", config.devices_size(),
                 spec.devices_size());
  }
  for (int i = 0; i < spec.devices_size(); ++i) {
    if (config.devices(i).name() != spec.devices(i).name()) {
      return Error(absl::StatusCode::kInvalidArgument, "shim.conf: devices[{}] is {}, in the spec it is {}",
                   i, config.devices(i).name(), spec.devices(i).name());
    }
    if (config.devices(i).backend().socket().empty()) {
      return Error(absl::StatusCode::kInvalidArgument, "device {}: no socket of a back-end is configured",
                   spec.devices(i).name());
    }
    RETURN_IF_ERROR(CheckUnixPath(config.devices(i).backend().socket()));
    RETURN_IF_ERROR(CheckUnixPath(vmm::DeviceSocketPath(config.run_dir(), spec.devices(i).name())));
  }
  if (config.mode() == v1::ShimConfig::INCOMING_VM) {
    if (config.migration_id().empty()) return missing("migration_id");
    if (config.token().empty()) return missing("token");
  }
  return absl::OkStatus();
}

absl::StatusOr<ConfigStore> ConfigStore::Load(const std::string& dir) {
  std::string path = dir + "/shim.conf";
  v1::ShimConfig config;
  RETURN_IF_ERROR(ReadMessage(path, &config));
  RETURN_IF_ERROR(ValidateShimConfig(config));
  if (config.mode() != v1::ShimConfig::DOMAIN) FillVmSpecDefaults(config.mutable_spec());
  return ConfigStore(path, std::move(config));
}

v1::ShimConfig ConfigStore::Get() const {
  std::lock_guard lock(mutex_);
  return config_;
}

absl::Status ConfigStore::Update(const std::function<void(v1::ShimConfig&)>& change) {
  std::lock_guard lock(mutex_);
  change(config_);
  return WriteMessageDurable(path_, config_);
}

absl::Status ConfigStore::UpdateSoon(const std::function<void(v1::ShimConfig&)>& change) {
  std::lock_guard lock(mutex_);
  change(config_);
  return WriteMessageSoon(path_, config_);
}

absl::Status ConfigStore::Sync() const { return SyncFile(path_); }

}  // namespace baton::shim
