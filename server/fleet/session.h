// One agent's session. Belongs to the event loop.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "server/fleet/fleet.h"

namespace baton::server {

struct Fleet::Session {
  struct Pending {
    ReplyCallback callback;
    EventLoop::TimerId timer;
  };
  uint64_t number = 0;
  std::string host;  // id
  uint64_t start_counter = 0;
  std::shared_ptr<AgentLink> link;
  Clock::time_point last_heard;
  EventLoop::TimerId timer;             // of the heartbeat
  std::map<uint64_t, Pending> pending;  // commands that wait for their result, by id
};

}  // namespace baton::server
