// The destination's side of moving a libvirt domain: the tunnel's exit, and what this host's libvirt makes of
// the domain that comes through it.
//
// It starts and ends nothing itself: libvirt's own protocol starts the guest here or gives it up. This side
// writes down what it sees: INCOMING, then OWNER once the domain runs here, or REFUSED once it never will in
// this migration: nothing of it is here, and no connection can bring it any more.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "agent/migration/reporter.h"
#include "agent/shim/config_store.h"
#include "agent/shim/domain_device_link.h"
#include "agent/shim/domain_side.h"
#include "agent/stream/tunnel.h"
#include "baton/v1/agent_session.pb.h"
#include "baton/v1/peer.pb.h"

namespace baton::shim {

struct DomainIncomingParts {
  ConfigStore& config;
  DomainJournal& journal;
  vmm::LibvirtConnection& local;
  DomainDevices* devices;  // null: none is mediated
  migration::ReportCallback on_report;
  // Peers may connect. On the migration's thread, as on_end.
  std::function<void()> on_ready;
  std::function<void()> on_end;
};

// Thread-safe.
class DomainIncoming {
 public:
  // Of the configuration. Waits for nothing: what keeps it from getting ready is told by failure().
  explicit DomainIncoming(DomainIncomingParts parts);
  // Ends the tunnel. What is undecided stays so; a later shim goes on.
  ~DomainIncoming();
  DomainIncoming(const DomainIncoming&) = delete;
  DomainIncoming& operator=(const DomainIncoming&) = delete;

  const std::string& id() const { return id_; }
  bool ready() const;
  bool ended() const;
  // Why it never became ready.
  absl::Status failure() const;
  absl::Status AcceptChannel(const v1::AcceptChannelRequest& request, UniqueFd socket);
  // Gives the migration up: the tunnel is closed, and what libvirt then makes of the domain is waited for.
  // `done` hears OK once it was refused, FailedPrecondition if the domain runs here or is not gone in time.
  void Abort(std::function<void(absl::Status)> done);
  // Of another kind than life cycle are those of libvirt's last steps before it lets the guest run: a look at
  // each would wait for the same locks and take the same processors.
  void OnEvent(const vmm::DomainEvent& event) {
    if (event.kind == vmm::DomainEvent::Kind::kLifecycle) mail_->Post(event);
  }
  void OnLibvirt(bool up);

 private:
  void Run();
  absl::Status Prepare(bool fresh);
  // A source whose shim was started anew, or lost its connection, asks what was seen here.
  void AnswerQuery(UniqueFd socket);
  v1::Verdict Seen() const;
  // libvirt had no definition of the domain here before the migration; durable.
  bool AbsentBefore() const;
  void AskDowntime();
  void UndefineLeftover();
  void OpenExit();
  void CloseExit();
  uint32_t Connections();
  // A connection broke, and the source has not come back since to see what became of the domain.
  bool SourceMayReturn();
  // One look; true once the migration has ended for this side.
  bool Step();
  bool GivenUpUnseen(const vmm::SideView& view) const;
  bool Absent();
  bool Owned(const vmm::SideView& view);
  bool Refused(const std::string& why);
  bool End();
  void Answer(const absl::Status& status);

  DomainIncomingParts p_;
  const std::string id_;
  const std::string uuid_;
  const uint64_t epoch_;  // of the source
  const std::shared_ptr<DomainMailbox> mail_ = std::make_shared<DomainMailbox>();
  migration::Reporter reporter_;
  DomainDeviceReceiver device_link_;

  // Of the thread alone.
  bool seen_ = false;  // the domain was here
  std::optional<uint64_t> downtime_ms_;
  std::optional<Clock::time_point> owner_since_;
  bool recovered_ = false;
  uint64_t broken_count_ = 0, opened_then_ = 0;
  Clock::time_point broken_at_{};
  std::optional<Clock::time_point> gone_since_;  // it was here and is not any more

  mutable std::mutex mutex_;
  std::shared_ptr<const stream::TlsContext> tls_;  // guarded by mutex_, as all below
  std::shared_ptr<stream::TunnelExit> exit_;
  bool ready_ = false;
  bool ended_ = false;
  absl::Status failure_;
  std::function<void(absl::Status)> abort_;
  std::optional<Clock::time_point> abort_since_;
  std::string broken_;
  // This process, and libvirt's events, were there all the time since the migration was announced.
  bool watched_ = false;
  uint64_t libvirt_lost_ = 0;  // since then
  int answering_ = 0;
  std::condition_variable answered_;
  std::thread thread_;
};

}  // namespace baton::shim
