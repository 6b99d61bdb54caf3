// baton-lab-backend: the lab's block back-end as a process of its own, to be killed and stopped. Ends when
// its standard input does.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>

#include "tests/lab/backend/lab_backend.h"

int main(int argc, char** argv) {
  ::signal(SIGPIPE, SIG_IGN);
  baton::lab::LabBackendOptions options;
  CLI::App app("vhost-user block back-end for tests");
  app.add_option("--socket", options.socket)->required();
  app.add_option("--image", options.image)->required();
  app.add_flag("--inflight", options.inflight, "offer an in-flight region");
  app.add_flag("--drains", options.drains, "GET_VRING_BASE completes what is in flight");
  app.add_option("--delay-us", options.delay_us, "requests take up to so long, out of order");
  app.add_option("--queues", options.queues);
  CLI11_PARSE(app, argc, argv);
  auto backend = baton::lab::LabBackend::Create(options);
  absl::Status status = backend.ok() ? (*backend)->Run(0) : backend.status();
  if (!status.ok()) std::fprintf(stderr, "%s\n", baton::Message(status).c_str());
  return status.ok() ? 0 : 1;
}
