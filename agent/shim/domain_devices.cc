#include "agent/shim/domain_devices.h"

#include <unistd.h>

#include <cerrno>
#include <chrono>

#include "agent/migration/reporter.h"
#include "common/durable_file.h"
#include "common/log.h"
#include "common/unix_socket.h"

namespace baton::shim {
namespace {

constexpr Duration kDeviceConnect = std::chrono::seconds(5);

}  // namespace

absl::StatusOr<std::unique_ptr<DomainDevices>> DomainDevices::Start(const v1::ShimConfig& config,
                                                                    bool returning,
                                                                    std::function<void()> on_change) {
  std::unique_ptr<DomainDevices> devices(new DomainDevices());
  const v1::DomainHost& host = config.domain_host();
  const std::string& dir = host.device_dir();
  const std::string parent = dir.substr(0, dir.find_last_of('/'));
  // QEMU's user has to pass, and need not see what else is there.
  RETURN_IF_ERROR(MakeDirectories(parent, 0711));
  RETURN_IF_ERROR(MakeDirectories(dir, 0711));
  for (int i = 0; i < config.devices_size() && i < config.spec().devices_size(); ++i) {
    const v1::ResolvedDevice& resolved = config.devices(i);
    vhost::MediatorOptions options;
    options.spec = config.spec().devices(i);
    options.backend = resolved.backend();
    options.fence.command.assign(resolved.fence().begin(), resolved.fence().end());
    options.fence.env = {{"BATON_VM", host.vm()}};
    if (resolved.has_fence_timeout()) options.fence.timeout = migration::ToDuration(resolved.fence_timeout());
    options.listen_path = dir + "/dev-" + options.spec.name() + ".sock";
    RETURN_IF_ERROR(CheckUnixPath(options.listen_path));
    options.backend_required = false;
    options.vmm_returns = returning;
    options.memo_dir = config.run_dir();
    options.whole_memory_tables = true;
    options.vmm_moves_memory = true;
    options.connect_timeout = kDeviceConnect;
    // The socket appears once the back-end was seen, which may be later.
    const auto give = [path = options.listen_path, uid = host.qemu_uid(), gid = host.qemu_gid()] {
      if (::geteuid() == 0 && ::chown(path.c_str(), uid, gid) != 0 && errno != ENOENT)
        LOG_WARN("{}", Message(ErrnoError(errno, path)));
    };
    vhost::MediatorCallbacks callbacks;
    callbacks.on_change = [on_change, give](const v1::Device&) {
      give();
      on_change();
    };
    callbacks.on_stopped = [stops = devices->stops_,
                            name = options.spec.name()](const absl::StatusOr<v1::DeviceState>& state) {
      std::lock_guard lock(stops->mutex);
      if (stops->handler) stops->handler(name, state);
    };
    auto mediator = vhost::Mediator::Start(std::move(options), std::move(callbacks));
    if (!mediator.ok()) return mediator.status();
    devices->mediators_.push_back(*std::move(mediator));
    give();
  }
  return devices;
}

std::vector<v1::Device> DomainDevices::Describe() const {
  std::vector<v1::Device> out;
  for (const auto& mediator : mediators_) out.push_back(mediator->Describe());
  return out;
}

std::vector<vhost::Mediator*> DomainDevices::All() const {
  std::vector<vhost::Mediator*> out;
  for (const auto& mediator : mediators_) out.push_back(mediator.get());
  return out;
}

void DomainDevices::SetStopHandler(StopHandler handler) {
  std::lock_guard lock(stops_->mutex);
  stops_->handler = std::move(handler);
}

vhost::Mediator* DomainDevices::Find(const std::string& device) const {
  for (const auto& mediator : mediators_) {
    if (mediator->name() == device) return mediator.get();
  }
  return nullptr;
}

}  // namespace baton::shim
