// baton-shim: one a VM. Started by baton-agent; lives as long as its VM is on this host.
#include <malloc.h>
#include <pthread.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "agent/shim/domain_shim.h"
#include "agent/shim/shim.h"
#include "agent/shim/spare.h"
#include "common/log.h"
#include "common/version.h"

namespace {

// A shim holds next to nothing; what glibc would keep for speed counts for more than speed here. One arena
// instead of eight a core, and freed memory goes back to the system.
void LimitMemory() {
  ::mallopt(M_ARENA_MAX, 1);
  ::mallopt(M_TRIM_THRESHOLD, 64 << 10);
  ::mallopt(M_MMAP_THRESHOLD, 64 << 10);
  pthread_attr_t attributes;
  if (::pthread_attr_init(&attributes) == 0) {
    ::pthread_attr_setstacksize(&attributes, 256 << 10);
    ::pthread_setattr_default_np(&attributes);
    ::pthread_attr_destroy(&attributes);
  }
}

template <typename Kind>
int Serve(const std::string& dir) {
  auto shim = Kind::Create(dir);
  if (!shim.ok()) {
    LOG_ERROR("cannot start: {}", baton::Message(shim.status()));
    return 1;
  }
  return (*shim)->Run();
}

}  // namespace

int main(int argc, char** argv) {
  LimitMemory();
  std::string dir, room;
  baton::LogOptions log;
  log.program = "baton-shim";
  {
    CLI::App app{
        "Serves one VM of this host: stands between its vhost-user devices and their back-ends, and moves "
        "it.",
        "baton-shim"};
    auto* one = app.add_option_group("One of");
    one->add_option("--dir", dir, "State directory of the VM; holds shim.conf, which baton-agent wrote");
    one->add_option(
           "--spare", room,
           "Wait until baton-agent, at the other end of standard input, names the directory; ROOM is "
           "anything at least as long as that will be")
        ->option_text("ROOM");
    one->require_option(1);
    app.add_option("--log-level", log.level, "trace, debug, info, warn or error")
        ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error"}));
    app.add_flag("--log-json", log.json, "One JSON object a line");
    app.set_version_flag("--version", std::string("baton-shim ") + baton::kVersion);
    try {
      app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      return app.exit(error) == 0 ? 0 : 2;
    }
  }
  if (!room.empty()) {
    baton::shim::DomainShim::GetReady();
    auto vm = baton::shim::AwaitVm(argc, argv);
    if (!vm.ok()) {
      std::fprintf(stderr, "baton-shim: %s\n", baton::Message(vm.status()).c_str());
      return 1;
    }
    if (vm->empty()) return 0;
    dir = *vm;
  }
  log.context = "vm=" + dir.substr(dir.find_last_of('/') + 1);
  baton::InitLogging(log);
  auto config = baton::shim::ConfigStore::Load(dir);
  if (!config.ok()) {
    LOG_ERROR("cannot start: {}", baton::Message(config.status()));
    return 1;
  }
  return config->Get().mode() == baton::v1::ShimConfig::DOMAIN ? Serve<baton::shim::DomainShim>(dir)
                                                               : Serve<baton::shim::Shim>(dir);
}
