// The subset of QMP that agent/vmm/qmp uses, spoken as QEMU speaks it, and the state machine of a migration
// behind it. One client at a time, like QEMU's monitor.
#pragma once

#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/fd.h"
#include "common/status.h"
#include "tests/lab/vm/guest.h"

namespace baton::lab {

inline constexpr int kQemuMajor = 10, kQemuMinor = 0, kQemuMicro = 0;

// All of it on one thread.
class QmpServer {
 public:
  // `listener`: a listening socket. `guest` must outlive this object.
  QmpServer(UniqueFd listener, LabGuest& guest, bool incoming);

  // Descriptors to wait for (readable), in any order, and what to do then.
  std::vector<int> fds() const;
  void Attend(int fd);
  // The guest powered itself off (or `reason` says why the program ends): the last event. The caller then
  // ends.
  void Shutdown(const std::string& reason, bool by_guest);
  bool quit() const { return quit_; }

 private:
  using json = nlohmann::json;
  void Accept();
  void ReadClient();
  void HandleLine(const std::string& line);
  json Execute(const std::string& command, const json& arguments);
  void Send(const json& message);
  void Event(const std::string& name, json data = json::object());
  void SetMigration(const std::string& status);
  absl::StatusOr<UniqueFd> TakeFd(const std::string& uri);
  void BeginMigration();
  json Continue();
  json CancelMigration();
  void FailMigration(const absl::Status& why);
  json Cont();
  json StopGuest();
  void ReadState();
  std::string RunState() const;

  UniqueFd listener_;
  UniqueFd client_;
  LabGuest& guest_;
  std::string buffer_;
  std::vector<UniqueFd> arrived_;        // by SCM_RIGHTS, not named yet
  std::map<std::string, UniqueFd> fds_;  // by getfd
  std::map<std::string, bool> capabilities_;
  // QEMU's words: none, setup, active, pre-switchover, device, completed, failed, cancelling, cancelled.
  std::string migration_ = "none";
  std::string error_;
  std::string run_state_;  // of a guest that does not run
  bool was_running_ = false;
  UniqueFd out_, in_;
  std::string state_;                         // what came on in_
  std::vector<std::function<void()>> later_;  // after the answer was sent
  bool quit_ = false;
};

}  // namespace baton::lab
