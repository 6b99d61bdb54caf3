// What the QEMU of a libvirt domain says of itself over its monitor: the parts that libvirt does not pass on.
//
// Uses virDomainQemuMonitorCommand, which only asks here. libvirt notes in its log that the domain's monitor
// was used
// ("tainted: custom-monitor"), once a domain.
#pragma once

#include <libvirt/libvirt.h>

#include <map>
#include <string>
#include <vector>

#include "common/status.h"

namespace baton::vmm {

// One virtio device as x-query-virtio-status shows it (QEMU 7.2 and later).
struct VirtioView {
  bool started = false;
  bool vhost_started = false;
  std::vector<std::string> guest_features;  // names only
  bool free_page_hint = false;
};

struct QemuView {
  std::string version;
  // query-migrate's blocked-reasons: why it would not be moved now.
  std::vector<std::string> blockers;
  // By the id under which libvirt created the device (its alias).
  std::map<std::string, VirtioView> devices;
};

// Sends one QMP command and returns its "return" value as JSON text; the domain's monitor may hang: call it
// by way of LibvirtConnection::Call.
absl::StatusOr<std::string> AskMonitor(virDomainPtr domain, const std::string& command);

// Asks what a migration depends on: version and blockers. libvirt writes its state of the domain to disk for
// every question, so each takes a while.
absl::StatusOr<QemuView> AskQemuForMigration(virDomainPtr domain);

// The state of its own migration as QEMU calls it ("postcopy-active"); empty where there was none.
absl::StatusOr<std::string> AskMigrationStatus(virDomainPtr domain);

// Whether a domain's QEMU may lose some of what its guest writes while it is copied: one without KVM (`type`
// of the domain's XML is "qemu") before QEMU 9.0. `version`: what it answered to query-version; without a
// usable answer it is taken for one of those, which costs rounds and no memory. Pure.
bool ForgetsWrites(const std::string& xml, const absl::StatusOr<std::string>& version);
// The same, asked of the QEMU that runs the domain: hosts may have several, and libvirt's version is that of
// its default one.
bool AskForgetsWrites(virDomainPtr domain, const std::string& xml);

// Asks everything. What a QEMU does not know (it is older) is left out; only a monitor that cannot be asked
// is an error.
absl::StatusOr<QemuView> AskQemu(virDomainPtr domain);

// --- pure: readers of the answers; InvalidArgument when they are not what QMP documents ---
absl::StatusOr<std::string> ReadQemuVersion(const std::string& json);
absl::StatusOr<std::vector<std::string>> ReadBlockers(const std::string& json);
absl::StatusOr<std::string> ReadMigrationStatus(const std::string& json);
// Of x-query-virtio: QOM path of each device's back half → the id that the path holds
// ("/machine/peripheral/ID/…").
absl::StatusOr<std::map<std::string, std::string>> ReadVirtioPaths(const std::string& json);
absl::StatusOr<VirtioView> ReadVirtioStatus(const std::string& json);

}  // namespace baton::vmm
