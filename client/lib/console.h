// A VM's serial console as a stream of bytes.
#pragma once

#include <absl/status/status.h>

#include <memory>
#include <optional>
#include <string>

#include "client/lib/client.h"

namespace baton::client {

// What came from the console.
struct ConsoleEvent {
  std::string output;
  bool ended = false;   // nothing follows
  absl::Status status;  // how it ended
};

// An open console. Nothing blocks: input is queued, events are announced by a descriptor. One thread uses it;
// the client must outlive it.
class ConsoleSession {
 public:
  // Opens the console of "vms/…"; errors come as the first event.
  ConsoleSession(Client* client, const std::string& vm);
  // Cancels the call and waits for its end.
  ~ConsoleSession();
  ConsoleSession(const ConsoleSession&) = delete;
  ConsoleSession& operator=(const ConsoleSession&) = delete;

  // Readable while events wait.
  int fd() const;
  std::optional<ConsoleEvent> Next();
  void Send(std::string input);
  // Bytes given to Send that the transport has not taken yet; senders of much data wait while it is large.
  size_t Unsent() const;

 private:
  class Reactor;
  const std::unique_ptr<Reactor> reactor_;
};

}  // namespace baton::client
