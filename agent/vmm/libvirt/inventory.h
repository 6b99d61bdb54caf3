// The domains of one libvirt daemon as VMs, kept up to date by its events.
//
// One thread reads; what it reads it tells through callbacks, and keeps for Vms(). A domain is read again
// when libvirt reports something of it. QEMU's own view is asked for a while after that, too, so as not to
// be in the way of a migration's switchover, and once in a while, because no event tells that the guest's
// driver accepted a feature. A monitor that hangs costs its domain the view, and the others one time limit.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "agent/vmm/libvirt/connection.h"
#include "agent/vmm/libvirt/domain_description.h"
#include "agent/vmm/libvirt/qemu_view.h"
#include "baton/v1/fleet.pb.h"

namespace baton::vmm {

struct InventoryOptions {
  LibvirtOptions libvirt;
  // Directory below which Baton's mediators listen.
  std::string mediator_dir;
  // Of each call to libvirt.
  Duration call_timeout = std::chrono::seconds(5);
  // Between two looks at QEMU's own view of a running domain.
  Duration view_interval = std::chrono::seconds(60);
};

// Called on the inventory's thread; must not wait.
struct InventoryCallbacks {
  // New or changed. `host` is not filled in.
  std::function<void(const v1::Vm&)> on_vm;
  // Everything that the daemon had when it answered for the first time was read, or again after a break.
  std::function<void()> on_read;
  // `vm` as it was told last.
  std::function<void(const v1::Vm& vm, const std::string& message)> on_gone;
};

// Thread-safe.
class LibvirtInventory {
 public:
  static std::unique_ptr<LibvirtInventory> Start(InventoryOptions options, InventoryCallbacks callbacks);
  ~LibvirtInventory();
  LibvirtInventory(const LibvirtInventory&) = delete;
  LibvirtInventory& operator=(const LibvirtInventory&) = delete;

  // All that are known, by id. After the connection was lost: as they were last seen, with a message that
  // says so.
  std::vector<v1::Vm> Vms() const;
  // NotFound unless a domain has this id, name or UUID.
  absl::StatusOr<v1::Vm> Find(const std::string& id) const;
  // All domains of the daemon were read at least once. Waits for that, but not longer than it takes to find
  // that the daemon is not there.
  bool WaitForFirst(Deadline deadline) const;
  bool read() const;
  // A migration of the domain is about to begin: QEMU's own view, were it due just now, waits a while.
  void LookLater(const std::string& uuid);
  LibvirtConnection& connection();

 private:
  class Impl;
  explicit LibvirtInventory(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// --- pure ---

// The id of a domain: its name where that can be one, else its UUID.
std::string VmIdOf(const std::string& name, const std::string& uuid);
// What a domain is, as the API shows it; `view` may be null.
v1::Domain DomainMessage(const DomainDescription& domain, const QemuView* view);
// libvirt's state and reason (virDomainState) as Baton's, with the reason in words where it is not plainly
// running. `incoming`: a migration to here is under way.
v1::Vm::State StateOf(int state, int reason, bool incoming, std::string* words);

}  // namespace baton::vmm
