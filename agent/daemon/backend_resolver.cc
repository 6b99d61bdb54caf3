#include "agent/daemon/backend_resolver.h"

#include <google/protobuf/util/time_util.h>

#include "common/config.h"
#include "common/log.h"
#include "common/process.h"
#include "common/vm_spec.h"

namespace baton::daemon {
namespace {

std::string Replace(std::string text, const std::string& what, const std::string& with) {
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + with.size()))
    text.replace(at, what.size(), with);
  return text;
}

// The first line of what a hook wrote to stderr, or all of a short text.
std::string FirstLine(const std::string& text) {
  return text.substr(0, std::min(text.find('\n'), size_t{200}));
}

}  // namespace

absl::StatusOr<v1::Backend> ParseHookOutput(const std::string& output) {
  size_t begin = output.find_first_not_of(" \t\r\n");
  size_t end = output.find_last_not_of(" \t\r\n");
  if (begin == std::string::npos)
    return absl::InvalidArgumentError("printed nothing; expected the socket's path");
  std::string text = output.substr(begin, end - begin + 1);
  v1::Backend backend;
  if (text[0] == '{') {
    // JSON is YAML; read by the same rules as the configuration.
    ASSIGN_OR_RETURN(ConfigDocument doc, ConfigDocument::FromText(text, "output"));
    ConfigReader root = doc.Root();
    ReadBackend(root, &backend);
    if (!root.Has("socket")) root.Problem("", "the field 'socket' is missing");
    RETURN_IF_ERROR(doc.Finish(root));
    return backend;
  }
  if (text[0] != '/' || text.find('\n') != std::string::npos || text.size() > 107)
    return Error(absl::StatusCode::kInvalidArgument,
                 "printed '{}'; expected one line with the absolute path of a socket, or a JSON object",
                 FirstLine(text));
  backend.set_socket(text);
  return backend;
}

absl::StatusOr<v1::ResolvedDevice> BackendResolver::Resolve(const std::string& vm,
                                                            const v1::DeviceSpec& device,
                                                            const std::string& migration_id,
                                                            Deadline deadline) const {
  ASSIGN_OR_RETURN(v1::ResolvedDevice out, ResolveBackend(vm, device, migration_id, deadline));
  for (const std::string& key : {vm + "/" + device.name(), device.name(), std::string("*")}) {
    auto found = config_.fences.find(key);
    if (found == config_.fences.end()) continue;
    for (const std::string& word : found->second.command) out.add_fence(word);
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(found->second.timeout).count();
    *out.mutable_fence_timeout() = google::protobuf::util::TimeUtil::MillisecondsToDuration(ms);
    break;
  }
  return out;
}

absl::StatusOr<v1::ResolvedDevice> BackendResolver::ResolveBackend(const std::string& vm,
                                                                   const v1::DeviceSpec& device,
                                                                   const std::string& migration_id,
                                                                   Deadline deadline) const {
  v1::ResolvedDevice out;
  out.set_name(device.name());
  *out.mutable_backend() = device.backend();
  bool arriving = !migration_id.empty();
  const bool named = !arriving && !device.backend().socket().empty();
  for (const std::string& key : {vm + "/" + device.name(), device.name(), std::string("*")}) {
    auto found = config_.backends.find(key);
    if (found == config_.backends.end()) continue;
    const v1::Backend& configured = found->second;
    const std::string socket = Replace(Replace(configured.socket(), "{vm}", vm), "{device}", device.name());
    if (named) {
      // It is known where it is; what kind it is may be said here alone.
      if (socket != device.backend().socket()) break;
      if (out.backend().kind() == v1::BACKEND_KIND_UNSPECIFIED)
        out.mutable_backend()->set_kind(configured.kind());
      if (out.backend().recovery() == v1::RECOVERY_DEFAULT)
        out.mutable_backend()->set_recovery(configured.recovery());
      return out;
    }
    out.mutable_backend()->set_socket(socket);
    if (configured.kind() != v1::BACKEND_KIND_UNSPECIFIED) out.mutable_backend()->set_kind(configured.kind());
    if (configured.recovery() != v1::RECOVERY_DEFAULT)
      out.mutable_backend()->set_recovery(configured.recovery());
    return out;
  }
  if (named) return out;
  if (config_.backend_hook) {
    ASSIGN_OR_RETURN(v1::Backend made, RunHook("create", vm, device, migration_id, deadline));
    out.mutable_backend()->set_socket(made.socket());
    if (made.kind() != v1::BACKEND_KIND_UNSPECIFIED) out.mutable_backend()->set_kind(made.kind());
    if (made.recovery() != v1::RECOVERY_DEFAULT) out.mutable_backend()->set_recovery(made.recovery());
    out.set_from_hook(true);
    return out;
  }
  if (!device.backend().socket().empty()) return out;
  return Error(absl::StatusCode::kNotFound,
               "neither `backends` nor `backend_hook` of this host's configuration names a back-end");
}

absl::StatusOr<v1::Backend> BackendResolver::RunHook(const std::string& action, const std::string& vm,
                                                     const v1::DeviceSpec& device,
                                                     const std::string& migration_id,
                                                     Deadline deadline) const {
  const BackendHook& hook = *config_.backend_hook;
  SpawnOptions options;
  options.argv = hook.command;
  options.argv.push_back(action);
  options.env = {{"BATON_ACTION", action},
                 {"BATON_VM", vm},
                 {"BATON_DEVICE", device.name()},
                 {"BATON_DEVICE_CLASS", device.class_() == v1::NET ? "net" : "blk"},
                 {"BATON_NUM_QUEUES", std::to_string(std::max(1u, device.num_queues()))},
                 {"BATON_SOCKET", device.backend().socket()},
                 {"BATON_MIGRATION", migration_id},
                 {"BATON_HOST", config_.name}};
  std::string name = "backend_hook " + action;
  auto ran = RunCommand(options, deadline.Min(Deadline::After(hook.timeout)));
  if (!ran.ok()) return Annotate(ran.status(), name);
  if (!ran->status.ok())
    return Error(absl::StatusCode::kFailedPrecondition, "{} {}{}{}", name, ran->status.ToString(),
                 ran->err.empty() ? "" : ": ", FirstLine(ran->err));
  if (action != "create") return v1::Backend();
  auto backend = ParseHookOutput(ran->out);
  if (!backend.ok()) return Annotate(backend.status(), name);
  return backend;
}

void BackendResolver::Release(const std::string& vm, const v1::ResolvedDevice& device,
                              const std::string& migration_id) const {
  if (!device.from_hook()) return;
  if (!config_.backend_hook) {
    LOG_WARN("back-end stays, the configuration names no hook any more: vm={} device={}", vm, device.name());
    return;
  }
  v1::DeviceSpec spec;
  spec.set_name(device.name());
  *spec.mutable_backend() = device.backend();
  auto removed = RunHook("remove", vm, spec, migration_id, Deadline::After(config_.backend_hook->timeout));
  if (!removed.ok()) {
    LOG_WARN("back-end stays: vm={} device={} error=\"{}\"", vm, device.name(), Message(removed.status()));
  }
}

}  // namespace baton::daemon
