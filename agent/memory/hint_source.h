// Where the source of a migration gets free page hints from: a balloon device. Implemented by
// vhost::BalloonBackend, and by fakes in tests.
#pragma once

#include <cstdint>
#include <string>

#include "common/status.h"

namespace baton::memory {

// What the guest says. Called on the thread of the device, between Publish and the return of Finish; must not
// call the source.
class HintListener {
 public:
  virtual ~HintListener() = default;
  virtual void OnStart() = 0;
  // Pages of a RAM block that were free after the id was published. See memory/hint_session.h.
  virtual void OnHint(uint32_t block, uint64_t first_page, uint64_t pages) = 0;
  virtual void OnStop() = 0;
  // Nothing more will come, and what came must not be used.
  virtual void OnLost(const std::string& why) = 0;
};

// All calls from any thread; none waits for the guest.
class HintSource {
 public:
  virtual ~HintSource() = default;
  // The value that the guest's driver says free pages are filled with (0 also if it says nothing).
  virtual uint32_t poison() const = 0;
  // Publishes a new command id. FailedPrecondition: the guest has no driver that gives hints, in words.
  // `listener` must live until Finish has returned.
  virtual absl::Status Publish(HintListener& listener) = 0;
  // Publishes STOP: the guest shall end, and say so in-band.
  virtual void PublishStop() = 0;
  // Publishes DONE: the guest may use what it hinted. Afterwards the listener is not called. Idempotent, and
  // without effect for a guest that was never asked or was told already.
  virtual void Finish() = 0;
  // While false, pages that the guest reports as free keep their content and their place in the file.
  virtual void AllowDiscard(bool allow) = 0;
};

}  // namespace baton::memory
