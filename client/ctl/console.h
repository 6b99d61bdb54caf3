// The interactive console.
#pragma once

#include <absl/status/statusor.h>

#include <string>

#include "client/lib/client.h"

namespace baton::client {

// Connects standard input and output with the console of "vms/…". With a terminal as input: raw mode, Ctrl-]
// leaves. From a pipe: the end of input does not end it. Answers the exit code; the terminal is as it was
// before.
absl::StatusOr<int> RunConsole(Client* client, const std::string& vm, Duration timeout);

}  // namespace baton::client
