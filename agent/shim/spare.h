// A shim that was started before there is a VM for it. Starting one takes tens of milliseconds of a migration
// otherwise, nearly all of it spent on loading libvirt's client library and what that needs.
#pragma once

#include <string>

#include "common/status.h"

namespace baton::shim {

// Waits on descriptor 0, a stream socket to the agent, for the VM that this process is to serve: a ShimConfig
// with only `state_dir`, and with it the descriptor of the log. Then 0 is /dev/null, 1 and 2 are the log, and
// the command line is that of any shim of that VM, "PROGRAM --dir STATE_DIR": by it the agent finds shims
// again. The agent gets an empty ShimConfig as the answer. Returns the directory; "" if the agent has ended
// first. FailedPrecondition if the command line that the process was started with has no room for the
// directory. To be called before there are other threads.
absl::StatusOr<std::string> AwaitVm(int argc, char** argv);

}  // namespace baton::shim
