// DomainOutgoing: post-copy that lost its connection. What libvirt says of it and what QEMU says, and having
// libvirt connect both halves of the domain again.
#include <algorithm>
#include <chrono>

#include "agent/shim/domain_outgoing.h"
#include "agent/vmm/libvirt/qemu_view.h"
#include "common/log.h"

namespace baton::shim {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

// For QEMU to say how its migration is.
constexpr Duration kAskQemu = seconds(2);
// Between attempts to recover post-copy, doubling: each is an entry of the record, and a host that is gone
// stays away for long.
constexpr Duration kRecoverPause = milliseconds(500);
constexpr Duration kRecoverPauseMax = seconds(20);
// A destination whose QEMU answers has noticed within milliseconds that its connection is gone.
constexpr Duration kNoticeTime = seconds(3);
// One whose QEMU answers is prepared for the recovery, and connected, within a second.
constexpr Duration kRecoveryTime = seconds(15);

// After so many attempts in a row a person is told what there is to do.
constexpr int kManyAttempts = 6;
constexpr char kRemedy[] =
    ". If the hosts reach each other, restart libvirt's daemon at the destination: the guest stays as it is, "
    "and the daemon asks its QEMU anew";

}  // namespace

// Its word for the state of its migration; empty if it does not answer.
std::string DomainOutgoing::AskSourceQemu() {
  auto status = vmm::CallFor<std::string>(
      p_.local, "asking QEMU how its migration is",
      [uuid = uuid_](virConnectPtr c) -> absl::StatusOr<std::string> {
        vmm::DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
        if (!domain) return vmm::LibvirtError("domain");
        return vmm::AskMigrationStatus(domain.get());
      },
      Deadline::After(kAskQemu));
  if (!status.ok()) LOG_DEBUG("migration {}: {}", id(), Message(status.status()));
  return status.value_or("");
}

// What libvirt says of post-copy that lost its connection is not all that there is to know. The destination's
// QEMU cannot be asked: libvirt's job there lets no question through.
void DomainOutgoing::LookAtBreak(vmm::SettlementInput* in) {
  using Condition = vmm::DomainCondition;
  if (in->source.condition != Condition::kPausedPostcopyFailed) {
    unnoticed_since_.reset();
    if (in->source.condition == Condition::kPausedPostcopy) not_recovered_ = 0;
    return;
  }
  const vmm::SourceStream stream = vmm::SourceStreamOf(in->source_qemu);
  if (stream == vmm::SourceStream::kConnected) not_recovered_ = 0;
  const bool broken = stream == vmm::SourceStream::kBroken || stream == vmm::SourceStream::kUnknown;
  const bool noticed = in->destination.condition != Condition::kRunningPostcopy &&
                       in->destination.condition != Condition::kPausedPostcopy;
  if (!broken || noticed) {
    unnoticed_since_.reset();
  } else if (!unnoticed_since_) {
    unnoticed_since_ = Clock::now();
  }
  in->unnoticed = unnoticed_since_ && Clock::now() - *unnoticed_since_ >= kNoticeTime;
  in->recovery_lasts = call_active_ && recovering_ && Clock::now() - call_began_ >= kRecoveryTime;
}

// Both ends hold a part of the guest and wait: libvirt is asked to connect them again, until that holds.
void DomainOutgoing::Recover(const std::string& why) {
  if (Clock::now() < recover_again_) return;
  recover_pause_ =
      recover_pause_ == Duration(0) ? kRecoverPause : std::min(2 * recover_pause_, kRecoverPauseMax);
  recover_again_ = Clock::now() + recover_pause_;
  Decided("recover", why);
  absl::Status begun = entrance_ ? absl::OkStatus() : OpenTunnel();
  if (begun.ok() && !remote_) OpenRemote();
  if (begun.ok()) begun = BeginCall(/*recover=*/true);
  recovering_ = begun.ok();
  if (!begun.ok()) NotRecovered(begun);
}

// libvirt may call a recovery failed that its QEMU goes on with.
void DomainOutgoing::RecoveryEnded(const absl::Status& status) {
  if (status.ok()) return;
  const std::string qemu = AskSourceQemu();
  const vmm::SourceStream stream = vmm::SourceStreamOf(qemu);
  if (stream == vmm::SourceStream::kBroken || stream == vmm::SourceStream::kUnknown)
    return NotRecovered(status);
  LOG_WARN("migration {}: libvirt gives the recovery up, and QEMU goes on ({}): {}", id(), qemu,
           Message(status));
  Decided("recovered", fmt::format("the source's QEMU has another connection ({}), although libvirt says: {}",
                                   qemu, Message(status)));
}

void DomainOutgoing::NotRecovered(const absl::Status& why) {
  LOG_WARN("migration {}: post-copy is not recovered: {}", id(), Message(why));
  Decided(
      "not recovered",
      fmt::format("{}; the guest is at the destination, and the memory that it still misses at the source: "
                  "neither domain may be ended. It is tried again by itself{}",
                  Message(why), ++not_recovered_ < kManyAttempts ? "" : kRemedy));
}

}  // namespace baton::shim
