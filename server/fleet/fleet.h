// Hosts, the sessions of their agents, and the VMs on them. Belongs to the event loop: every call is made
// there.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "baton/v1/agent_session.pb.h"
#include "baton/v1/fleet.pb.h"
#include "common/status.h"
#include "server/event_loop.h"
#include "server/metrics.h"
#include "server/store/records.pb.h"
#include "server/store/store.h"

namespace baton::server {

// The stream of one session, as the fleet sees it. Calls never block and may come after the stream has ended.
class AgentLink {
 public:
  virtual ~AgentLink() = default;
  virtual void Send(v1::ServerMessage message) = 0;
  // Ends the call with this status.
  virtual void Close(absl::Status status) = 0;
};

// Who wants to know. Calls come on the event loop.
class FleetObserver {
 public:
  virtual ~FleetObserver() = default;
  // A session is up; `hello` is its first message, already taken into the fleet.
  virtual void OnHostUp(const std::string& host, const v1::Hello& hello) = 0;
  virtual void OnHostDown(const std::string& host) = 0;
  virtual void OnReport(const std::string& host, const v1::SideReport& report) = 0;
  // The VM, which this host owns by the record, has ended there; `how` says so in words.
  virtual void OnVmEnded(const std::string& host, const std::string& vm, const std::string& how) = 0;
  // What the host that owns the VM says of it now; it is in the fleet already.
  virtual void OnVm(const std::string& vm) = 0;
  // Name of the migration that a VM is in ("migrations/x"), or empty.
  virtual std::string MigrationOf(const std::string& vm) const = 0;
};

// Output of a console stream; `close` ends it, with `error` if something broke. On the event loop.
using ConsoleSink = std::function<void(const std::string& data, bool close, const absl::Status& error)>;

struct FleetOptions {
  Duration heartbeat_interval = std::chrono::seconds(5);
  // A session without any message for this long is closed.
  Duration heartbeat_timeout = std::chrono::seconds(15);
  std::string server_version;
};

// All ids are without their collection ("a", not "hosts/a").
class Fleet {
 public:
  // `observer` is set once by SetObserver before the first session. All outlive the fleet.
  Fleet(EventLoop& loop, Store& store, ServerMetrics& metrics, const FleetOptions& options);
  ~Fleet();
  void SetObserver(FleetObserver* observer) { observer_ = observer; }
  // Reads hosts and VMs from the store; every host is disconnected.
  absl::Status Load();

  // --- sessions ---
  // Takes a Hello. The answer is the session's number; the link has been sent Welcome.
  absl::StatusOr<uint64_t> Connect(const v1::Hello& hello, std::shared_ptr<AgentLink> link);
  void Receive(uint64_t session, const v1::AgentMessage& message);
  void Disconnect(uint64_t session);

  // Result of a command: `answered` tells an agent's own error from one on the way.
  struct CommandReply {
    absl::Status status;
    bool answered = false;
    v1::CommandResult result;
  };
  using ReplyCallback = std::function<void(CommandReply)>;
  // Sends to the host's agent. The callback comes later on the loop, exactly once: with the result, or
  // Unavailable (no session, or it broke), or DeadlineExceeded some seconds after the command's own timeout.
  void Send(const std::string& host, v1::Command command, ReplyCallback callback);
  void SendAck(const std::string& host, const v1::ReportAck& ack);
  bool Connected(const std::string& host) const;

  // --- resources ---
  absl::StatusOr<v1::Host> GetHost(const std::string& id) const;
  // Ids after `after`, in order.
  std::vector<v1::Host> ListHosts(const std::string& after, size_t limit) const;
  absl::StatusOr<v1::Host> SetCordon(const std::string& id, bool cordoned);
  absl::StatusOr<v1::Vm> GetVm(const std::string& id) const;
  // `host` empty: of every host.
  std::vector<v1::Vm> ListVms(const std::string& host, const std::string& after, size_t limit) const;
  const VmRecord* FindVm(const std::string& id) const;

  using VmCallback = std::function<void(absl::StatusOr<v1::Vm>)>;
  void StartVm(const std::string& host, const v1::VmSpec& spec, VmCallback callback);
  void StopVm(const std::string& vm, bool force, std::function<void(absl::Status)> callback);

  using SwapCallback = std::function<void(absl::StatusOr<v1::SwapDeviceResponse>)>;
  // Fleet.SwapDevice; the request's names have been checked.
  void SwapDevice(const v1::SwapDeviceRequest& request, SwapCallback callback);
  using MediateCallback = std::function<void(absl::StatusOr<v1::MediateDomainResponse>)>;
  // Fleet.MediateDomain at the host `host`; passed on to its agent.
  void MediateDomain(const std::string& host, const v1::MediateDomainRequest& request,
                     MediateCallback callback);
  // OK, or why the VM may not migrate now: a back-end of it is being swapped.
  absl::Status CheckNotSwapping(const std::string& vm) const;

  // OK, or why nothing may be done with the VM: a host that is not its owner runs a copy of it
  // (docs/decisions/0004-stale-owners.md).
  absl::Status CheckNoStaleCopy(const std::string& vm) const;

  // The record of ownership follows a handover or a fencing.
  absl::Status SetOwner(const std::string& vm, const std::string& host, uint64_t epoch);
  absl::Status VoidClaim(const std::string& vm, const std::string& host, uint64_t epoch);

  // Opens the VM's console; the id names it in the other two.
  absl::StatusOr<uint64_t> OpenConsole(const std::string& vm, ConsoleSink sink);
  void ConsoleInput(uint64_t stream, const std::string& data);
  void CloseConsole(uint64_t stream);

 private:
  struct Session;
  struct HostEntry {
    HostRecord record;
    std::shared_ptr<Session> session;   // null while disconnected
    std::map<std::string, v1::Vm> vms;  // as its agent last reported them, by id
  };
  struct VmEntry {
    VmRecord record;
    bool starting = false;  // a StartVm is under way
    int swapping = 0;       // SwapDevice calls under way
    // Hosts (full names) that say that they run it although the record contradicts, with their claims.
    std::map<std::string, v1::Vm> stale;
  };
  struct Console {
    std::string host;
    ConsoleSink sink;
  };

  void CloseSession(const std::shared_ptr<Session>& session, const absl::Status& why);
  void ArmHeartbeat(const std::shared_ptr<Session>& session);
  void OnResult(Session& session, const v1::CommandResult& result);
  void TakeVm(HostEntry& host, const v1::Vm& vm);
  // Request ids of swaps live as long as the VM. At the start: drops those of VMs that are gone.
  absl::Status ForgetSwaps();
  // The answer of an agent to a swap: recorded together with its request.
  absl::StatusOr<v1::SwapDeviceResponse> TakeSwapped(const v1::SwapDeviceRequest& request,
                                                     const v1::DeviceSwapped& swapped);
  // Two domains of one name are two VMs: the one that came later goes by its UUID.
  std::string IdFor(const v1::Vm& reported) const;
  // The owner let go of a domain: a host that has it running, moved by other hands, is the owner now.
  void Adopt(const std::string& id);
  void SetStale(const std::string& id, VmEntry& entry, const v1::Vm& claim, bool is_void);
  void ClearStale(const std::string& id, const std::string& host);
  void DropVm(HostEntry& host, const std::string& id, const std::string& message);
  void Forget(const std::string& id);
  v1::Vm View(const std::string& id, const VmEntry& entry) const;
  v1::Host View(const HostEntry& host) const;
  absl::Status Save(const std::string& id, VmEntry& entry, VmRecord record);
  absl::Status SaveHost(HostEntry& entry, HostRecord record);
  void CountHosts();

  EventLoop& loop_;
  Store& store_;
  ServerMetrics& metrics_;
  FleetOptions options_;
  FleetObserver* observer_ = nullptr;
  std::map<std::string, HostEntry> hosts_;
  std::map<std::string, VmEntry> vms_;
  std::map<uint64_t, std::shared_ptr<Session>> sessions_;
  std::map<uint64_t, Console> consoles_;
  uint64_t next_session_ = 1;
  uint64_t next_command_ = 1;
  uint64_t next_console_ = 1;
};

}  // namespace baton::server
