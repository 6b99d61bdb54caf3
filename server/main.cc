// batond: see server/batond.h.
#include <signal.h>

#include <cstdio>

#include "common/log.h"
#include "server/batond.h"
#include "server/config.h"

int main(int argc, char** argv) {
  using namespace baton;
  using namespace baton::server;
  auto command = ParseCommandLine(argc, argv);
  if (!command.ok()) {
    std::fprintf(stderr, "batond: %s\n", Message(command.status()).c_str());
    return 2;
  }
  if (command->print) {
    std::fputs(command->print->c_str(), stdout);
    return command->exit_code;
  }
  const ServerConfig& config = command->config;
  InitLogging({.program = "batond", .level = config.log_level, .json = config.log_json, .context = ""});

  // Blocked before any thread starts, so that every thread inherits it and sigwait() below gets the signal.
  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  pthread_sigmask(SIG_BLOCK, &ends, nullptr);
  ::signal(SIGPIPE, SIG_IGN);

  auto batond = Batond::Start(config);
  if (!batond.ok()) {
    LOG_ERROR("cannot start: {}", Message(batond.status()));
    return 1;
  }
  Address listen = config.listen;
  if (listen.unix_path.empty()) listen.port = static_cast<uint16_t>((*batond)->port());
  LOG_INFO("version {} listens on {}, metrics on port {}, store in {}", config.version, listen.ToString(),
           (*batond)->metrics_port(), config.data_dir);
  int signal = 0;
  sigwait(&ends, &signal);
  LOG_INFO("{}: ending; migrations go on without batond and are taken up again at its next start",
           signal == SIGTERM ? "SIGTERM" : "SIGINT");
  batond->reset();
  return 0;
}
