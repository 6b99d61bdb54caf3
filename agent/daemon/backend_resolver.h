// Finding this host's back-end for a device: from the configuration, a hook command, or the VM's spec.
#pragma once

#include <string>

#include "agent/daemon/agent_config.h"
#include "baton/v1/shim.pb.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::daemon {

// Thread-safe. Hook commands run in the calling thread.
class BackendResolver {
 public:
  explicit BackendResolver(const AgentConfig& config) : config_(config) {}

  // For a VM that starts here: the spec's own socket (of what kind it is, `backends` may say where they name
  // the same one), else `backends` ("vm/device", "device", "*"), else the hook. `migration_id` set: for one
  // that arrives; the spec's socket, which was meant for another host, then comes last. NotFound if nothing
  // names one. A back-end made by the hook is marked and must be given to Release in the end.
  absl::StatusOr<v1::ResolvedDevice> Resolve(const std::string& vm, const v1::DeviceSpec& device,
                                             const std::string& migration_id, Deadline deadline) const;
  // Has the hook take away what it made; does nothing for other back-ends. A hook that fails is logged.
  void Release(const std::string& vm, const v1::ResolvedDevice& device,
               const std::string& migration_id) const;

 private:
  absl::StatusOr<v1::ResolvedDevice> ResolveBackend(const std::string& vm, const v1::DeviceSpec& device,
                                                    const std::string& migration_id, Deadline deadline) const;
  absl::StatusOr<v1::Backend> RunHook(const std::string& action, const std::string& vm,
                                      const v1::DeviceSpec& device, const std::string& migration_id,
                                      Deadline deadline) const;
  const AgentConfig& config_;
};

// What a hook printed for `create`: one line with the socket's path, or a JSON object {"socket": …, "kind":
// …, "recovery": …}. InvalidArgument says what is wrong with it.
absl::StatusOr<v1::Backend> ParseHookOutput(const std::string& output);

}  // namespace baton::daemon
