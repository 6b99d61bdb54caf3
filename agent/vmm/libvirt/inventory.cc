#include "agent/vmm/libvirt/inventory.h"

#include <google/protobuf/util/time_util.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <thread>

#include "agent/vmm/libvirt/job.h"
#include "common/log.h"
#include "common/vm_spec.h"

namespace baton::vmm {

std::string VmIdOf(const std::string& name, const std::string& uuid) {
  return IsValidName(name) ? name : uuid;
}

v1::Vm::State StateOf(int state, int reason, bool incoming, std::string* words) {
  words->clear();
  if (incoming) return v1::Vm::INCOMING;
  switch (state) {
    case VIR_DOMAIN_RUNNING:
    case VIR_DOMAIN_BLOCKED:
      return v1::Vm::RUNNING;
    case VIR_DOMAIN_PAUSED:
      switch (reason) {
        case VIR_DOMAIN_PAUSED_USER:
          *words = "paused by a user";
          break;
        case VIR_DOMAIN_PAUSED_MIGRATION:
          *words = "paused by a migration";
          break;
        case VIR_DOMAIN_PAUSED_IOERROR:
          *words = "paused by an I/O error";
          break;
        case VIR_DOMAIN_PAUSED_POSTCOPY:
          *words = "paused in post-copy";
          break;
        case VIR_DOMAIN_PAUSED_POSTCOPY_FAILED:
          *words = "paused by a post-copy that failed";
          break;
        case VIR_DOMAIN_PAUSED_CRASHED:
          *words = "paused because the guest crashed";
          break;
        default:
          *words = "paused";
      }
      return v1::Vm::PAUSED;
    case VIR_DOMAIN_PMSUSPENDED:
      *words = "suspended by the guest";
      return v1::Vm::PAUSED;
    case VIR_DOMAIN_SHUTDOWN:
      *words = "shutting down";
      return v1::Vm::RUNNING;
    case VIR_DOMAIN_SHUTOFF:
      *words = reason == VIR_DOMAIN_SHUTOFF_MIGRATED ? "moved to another host" : "shut off";
      return v1::Vm::STOPPED;
    case VIR_DOMAIN_CRASHED:
      *words = "crashed";
      return v1::Vm::STOPPED;
    default:
      *words = "libvirt does not know its state";
      return v1::Vm::STATE_UNSPECIFIED;
  }
}

v1::Domain DomainMessage(const DomainDescription& domain, const QemuView* view) {
  v1::Domain out;
  out.set_name(domain.name);
  out.set_uuid(domain.uuid);
  out.set_vcpus(domain.vcpus);
  out.set_memory_bytes(domain.memory_bytes);
  out.set_machine(domain.machine);
  out.set_arch(domain.arch);
  out.set_cpu(domain.cpu);
  out.set_memory_backing(domain.memory.source + (domain.memory.shared ? ", shared" : "") +
                         (domain.memory.hugepages ? ", huge pages" : "") +
                         (domain.memory.locked ? ", locked" : ""));
  for (const std::string& text : Shortcomings(domain)) out.add_shortcomings(text);
  for (const DomainDevice& device : domain.devices) {
    v1::DomainDevice* d = out.add_devices();
    d->set_type(NameOf(device.type));
    d->set_name(device.name);
    d->set_alias(device.alias);
    d->set_attachment(NameOf(device.attachment));
    d->set_model(device.model);
    d->set_source(device.source);
    d->set_mediated(device.mediated);
    d->set_mac(device.mac);
    d->set_queues(device.queues);
    d->set_readonly(device.readonly);
    d->set_shared(device.shared);
    if (!view) continue;
    auto seen = view->devices.find(device.alias);
    if (seen == view->devices.end()) continue;
    for (const std::string& name : seen->second.guest_features) d->add_guest_features(name);
    d->set_started(seen->second.started);
    d->set_vhost_started(seen->second.vhost_started);
    d->set_free_page_hint(seen->second.free_page_hint);
  }
  if (view) {
    out.set_vmm_version(view->version);
    for (const std::string& reason : view->blockers) out.add_migration_blockers(reason);
  }
  return out;
}

namespace {

// Of a domain that has moved away, whose definition libvirt is about to remove.
constexpr int kRereads = 10;
constexpr auto kRereadInterval = std::chrono::milliseconds(200);
// Of one that libvirt could not show.
constexpr auto kTroubleInterval = std::chrono::seconds(2);
// After an event. QEMU answers questions and switches a migration over on the same thread, and a domain's
// events are the close of one more often than not: its view can wait until that is through.
constexpr auto kQuiet = std::chrono::seconds(2);
// After an event in the midst of a switchover, unless one that ends it comes before: libvirt needs the
// domain's locks for that more than we do.
constexpr auto kSwitchover = std::chrono::milliseconds(500);

// One domain as libvirt has it now.
struct ReadDomain {
  std::string xml;
  int state = 0, reason = 0;
  bool active = false, persistent = false, incoming = false;
};

absl::StatusOr<DomainPtr> LookUp(virConnectPtr c, const std::string& uuid) {
  DomainPtr domain(virDomainLookupByUUIDString(c, uuid.c_str()));
  if (!domain) return LibvirtError(fmt::format("domain {}", uuid));
  return domain;
}

// `ran`: it was seen running here, so it is not on its way to here.
absl::StatusOr<ReadDomain> Read(virConnectPtr c, const std::string& uuid, bool ran) {
  ASSIGN_OR_RETURN(DomainPtr domain, LookUp(c, uuid));
  ReadDomain out;
  if (virDomainGetState(domain.get(), &out.state, &out.reason, 0) != 0) return LibvirtError("state");
  out.active = virDomainIsActive(domain.get()) == 1;
  out.persistent = virDomainIsPersistent(domain.get()) == 1;
  // Both ends of a migration show a paused domain near its end. (The source's QEMU would be asked for its
  // figures, in the blackout.)
  if (out.state == VIR_DOMAIN_PAUSED && !ran)
    out.incoming = AskMigrationJob(domain.get()) == MigrationJob::kIncoming;
  std::unique_ptr<char, decltype(&std::free)> xml(virDomainGetXMLDesc(domain.get(), 0), &std::free);
  if (!xml) return LibvirtError("XML");
  out.xml = xml.get();
  return out;
}

absl::StatusOr<std::vector<std::string>> ListAll(virConnectPtr c) {
  virDomainPtr* list = nullptr;
  const int count = virConnectListAllDomains(c, &list, 0);
  if (count < 0) return LibvirtError("listing domains");
  std::vector<std::string> out;
  for (int i = 0; i < count; ++i) {
    DomainPtr domain(list[i]);
    out.push_back(UuidOf(domain.get()));
  }
  std::free(list);
  return out;
}

}  // namespace

class LibvirtInventory::Impl {
 public:
  Impl(InventoryOptions options, InventoryCallbacks callbacks)
      : options_(std::move(options)), callbacks_(std::move(callbacks)) {
    LibvirtCallbacks to_libvirt;
    to_libvirt.on_state = [this](bool up, const std::string& why) {
      std::lock_guard lock(mutex_);
      up_ = up;
      why_ = why;
      tried_ = true;
      read_all_ = true;
      changed_.notify_all();
    };
    to_libvirt.on_event = [this](const DomainEvent& event) {
      // Nothing of what is shown here changes with it.
      if (event.kind == DomainEvent::Kind::kMigrationIteration) return;
      std::lock_guard lock(mutex_);
      const Clock::time_point now = Clock::now(), due = Switching(event) ? now + kSwitchover : now;
      Clock::time_point& place = pending_.try_emplace(event.uuid, due).first->second;
      place = std::min(place, due);
      touched_[event.uuid] = now;
      changed_.notify_all();
    };
    connection_ = LibvirtConnection::Start(options_.libvirt, std::move(to_libvirt));
    thread_ = std::thread([this] { Run(); });
  }

  ~Impl() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
    connection_.reset();
  }

  std::vector<v1::Vm> Vms() const {
    std::lock_guard lock(mutex_);
    std::vector<v1::Vm> out;
    for (const auto& [uuid, entry] : domains_) out.push_back(entry.vm);
    return out;
  }

  absl::StatusOr<v1::Vm> Find(const std::string& id) const {
    std::lock_guard lock(mutex_);
    for (const auto& [uuid, entry] : domains_) {
      if (uuid == id || entry.vm.domain().name() == id) return entry.vm;
    }
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "libvirt {} has no domain {}",
                 options_.libvirt.uri, id);
  }

  bool WaitForFirst(Deadline deadline) const {
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, deadline.when(), [this] { return first_done_ || (tried_ && !up_); });
    return first_done_;
  }

  bool read() const {
    std::lock_guard lock(mutex_);
    return first_done_;
  }

  void LookLater(const std::string& uuid) {
    std::lock_guard lock(mutex_);
    if (domains_.count(uuid) > 0) touched_[uuid] = Clock::now();
  }

  LibvirtConnection& connection() { return *connection_; }

 private:
  struct Entry {
    v1::Vm vm;
    QemuView view;
    bool viewed = false;
    Clock::time_point read_at{};
    Clock::time_point looked_at = Clock::time_point::min();  // at QEMU
    bool active = false;
    // libvirt tells that a domain has moved away before it removes its definition, and of that it tells
    // nothing: it is read again so many times more.
    int rereads = 0;
    // A look at QEMU that has not returned: no second one is begun.
    std::shared_ptr<std::atomic<bool>> looking = std::make_shared<std::atomic<bool>>(false);
  };

  void Run() {
    for (;;) {
      std::set<std::string> todo;
      bool all = false, up = false;
      {
        std::unique_lock lock(mutex_);
        while (!stopping_ && !read_all_) {
          const auto due = up_ ? NextDue() : std::nullopt;
          if (due && *due <= Clock::now()) break;
          if (due) {
            changed_.wait_until(lock, *due);
          } else {
            changed_.wait(lock);
          }
        }
        if (stopping_) return;
        all = std::exchange(read_all_, false);
        up = up_;
        if (up) {
          for (auto& [uuid, entry] : domains_) {
            if (const auto due = DueOf(uuid, entry); due && *due <= Clock::now()) todo.insert(uuid);
          }
          for (auto* waiting : {&pending_, &again_}) {
            for (auto it = waiting->begin(); it != waiting->end();) {
              if (it->second > Clock::now()) {
                ++it;
                continue;
              }
              todo.insert(it->first);
              it = waiting->erase(it);
            }
          }
        }
      }
      if (!up) {
        MarkLost();
        continue;
      }
      if (all && !ReadAll(todo)) all = false;
      for (const std::string& uuid : todo) {
        if (Stopping()) return;
        ReadOne(uuid);
      }
      if (!all) continue;
      {
        std::lock_guard lock(mutex_);
        first_done_ = true;
        changed_.notify_all();
      }
      if (callbacks_.on_read) callbacks_.on_read();
    }
  }

  bool Stopping() const {
    std::lock_guard lock(mutex_);
    return stopping_;
  }

  // What libvirt tells before its next event lets the guest run, at either end of a migration.
  bool Switching(const DomainEvent& event) const {
    if (event.kind == DomainEvent::Kind::kLifecycle)
      return event.event == VIR_DOMAIN_EVENT_SUSPENDED && event.detail == VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED;
    const auto known = domains_.find(event.uuid);
    return event.kind == DomainEvent::Kind::kDefinition && known != domains_.end() &&
           (known->second.vm.state() == v1::Vm::INCOMING || known->second.vm.state() == v1::Vm::PAUSED);
  }

  // When QEMU is to be asked: some time after an event, else once in a while.
  Clock::time_point LookDue(const std::string& uuid, const Entry& entry) const {
    const auto touched = touched_.find(uuid);
    return touched != touched_.end() && touched->second > entry.looked_at
               ? touched->second + kQuiet
               : entry.looked_at + options_.view_interval;
  }

  // When the domain is to be read again by itself.
  std::optional<Clock::time_point> DueOf(const std::string& uuid, const Entry& entry) const {
    if (entry.rereads > 0) return entry.read_at + kRereadInterval;
    if (!entry.active) return std::nullopt;
    return entry.vm.state() == v1::Vm::RUNNING ? LookDue(uuid, entry)
                                               : entry.read_at + options_.view_interval;
  }

  std::optional<Clock::time_point> NextDue() const {
    std::optional<Clock::time_point> due;
    for (const auto& [uuid, entry] : domains_) {
      if (const auto at = DueOf(uuid, entry); at && (!due || *at < *due)) due = at;
    }
    for (const auto* waiting : {&pending_, &again_}) {
      for (const auto& [uuid, when] : *waiting) {
        if (!due || when < *due) due = when;
      }
    }
    return due;
  }

  bool ReadAll(std::set<std::string>& todo) {
    auto list = CallFor<std::vector<std::string>>(*connection_, "listing domains", &ListAll,
                                                  Deadline::After(options_.call_timeout));
    if (!list.ok()) {
      LOG_WARN("{}", Message(list.status()));
      // The next connection reads all; one that stays up is asked again.
      std::lock_guard lock(mutex_);
      if (absl::IsDeadlineExceeded(list.status())) read_all_ = up_;
      return false;
    }
    const std::set<std::string> there(list->begin(), list->end());
    std::vector<std::string> gone;
    {
      std::lock_guard lock(mutex_);
      for (const auto& [uuid, entry] : domains_) {
        if (!there.count(uuid)) gone.push_back(uuid);
      }
    }
    for (const std::string& uuid : gone) Drop(uuid, "libvirt does not have it any more");
    todo.insert(there.begin(), there.end());
    return true;
  }

  void ReadOne(const std::string& uuid) {
    Entry entry;
    Clock::time_point look_due;
    {
      std::lock_guard lock(mutex_);
      if (auto found = domains_.find(uuid); found != domains_.end()) entry = found->second;
      look_due = LookDue(uuid, entry);
    }
    const bool ran = entry.active && entry.vm.state() == v1::Vm::RUNNING;
    auto read = CallFor<ReadDomain>(
        *connection_, fmt::format("reading domain {}", uuid),
        [uuid, ran](virConnectPtr c) { return Read(c, uuid, ran); }, Deadline::After(options_.call_timeout));
    if (absl::IsNotFound(read.status())) return Drop(uuid, "it has ended");
    if (!read.ok()) return Trouble(uuid, Message(read.status()));
    auto domain = ParseDomain(read->xml, options_.mediator_dir);
    if (!domain.ok()) return Trouble(uuid, Message(domain.status()));

    entry.read_at = Clock::now();
    const bool moved_away = read->state == VIR_DOMAIN_SHUTOFF && read->reason == VIR_DOMAIN_SHUTOFF_MIGRATED;
    entry.rereads = !moved_away ? 0 : entry.active ? kRereads : std::max(0, entry.rereads - 1);
    std::string words;
    entry.vm.set_name("vms/" + VmIdOf(domain->name, uuid));
    entry.vm.set_driver("libvirt");
    entry.vm.set_state(StateOf(read->state, read->reason, read->incoming, &words));
    entry.active = read->active;
    looked_ = false;
    if (!read->active) {
      entry.viewed = false;
    } else if (entry.vm.state() == v1::Vm::RUNNING && look_due <= Clock::now()) {
      if (std::string trouble = Look(uuid, entry); !trouble.empty())
        words += (words.empty() ? "" : "; ") + trouble;
    }
    const auto asked = entry.vm.domain().vmm_asked();
    *entry.vm.mutable_domain() = DomainMessage(*domain, entry.viewed ? &entry.view : nullptr);
    entry.vm.mutable_domain()->set_persistent(read->persistent);
    if (entry.viewed)
      *entry.vm.mutable_domain()->mutable_vmm_asked() =
          looked_ ? google::protobuf::util::TimeUtil::GetCurrentTime() : asked;
    entry.vm.set_message(words);
    Keep(uuid, std::move(entry));
  }

  // QEMU's own view. Returns what is wrong with it, in words.
  std::string Look(const std::string& uuid, Entry& entry) {
    entry.looked_at = Clock::now();
    if (entry.looking->exchange(true)) return "QEMU's monitor does not answer";
    auto view = CallFor<QemuView>(
        *connection_, fmt::format("asking the QEMU of domain {}", uuid),
        [uuid, looking = entry.looking](virConnectPtr c) -> absl::StatusOr<QemuView> {
          auto domain = LookUp(c, uuid);
          auto seen = domain.ok() ? AskQemu(domain->get()) : absl::StatusOr<QemuView>(domain.status());
          looking->store(false);
          return seen;
        },
        Deadline::After(options_.call_timeout));
    if (absl::IsUnavailable(view.status()) || absl::IsResourceExhausted(view.status()))
      entry.looking->store(false);
    if (!view.ok()) return absl::IsNotFound(view.status()) ? "" : Message(view.status());
    entry.view = *std::move(view);
    entry.viewed = looked_ = true;
    return "";
  }

  void Keep(const std::string& uuid, Entry entry) {
    v1::Vm vm = entry.vm;
    {
      std::lock_guard lock(mutex_);
      Entry& place = domains_[uuid];
      v1::Vm before = place.vm, after = vm;
      before.mutable_domain()->clear_vmm_asked();
      after.mutable_domain()->clear_vmm_asked();
      const bool same = before.SerializeAsString() == after.SerializeAsString();
      place = std::move(entry);
      if (same) return;
    }
    callbacks_.on_vm(vm);
  }

  void Drop(const std::string& uuid, const std::string& message) {
    v1::Vm vm;
    {
      std::lock_guard lock(mutex_);
      auto found = domains_.find(uuid);
      if (found == domains_.end()) return;
      vm = std::move(found->second.vm);
      domains_.erase(found);
      touched_.erase(uuid);
    }
    callbacks_.on_gone(vm, message);
  }

  // A domain that cannot be read stays as it was last seen.
  void Trouble(const std::string& uuid, const std::string& why) {
    LOG_WARN("domain {}: {}", uuid, why);
    Entry entry;
    {
      std::lock_guard lock(mutex_);
      // What hung, a monitor during a migration, mostly comes to itself soon; nothing tells of that.
      again_[uuid] = Clock::now() + kTroubleInterval;
      auto found = domains_.find(uuid);
      if (found == domains_.end()) return;
      entry = found->second;
    }
    entry.read_at = entry.looked_at = Clock::now();
    entry.vm.set_message(why);
    Keep(uuid, std::move(entry));
  }

  void MarkLost() {
    std::string why;
    std::vector<std::pair<std::string, Entry>> all;
    {
      std::lock_guard lock(mutex_);
      why = why_;
      all.assign(domains_.begin(), domains_.end());
    }
    for (auto& [uuid, entry] : all) {
      entry.vm.set_message(fmt::format("as last seen; {}", why));
      Keep(uuid, std::move(entry));
    }
  }

  const InventoryOptions options_;
  const InventoryCallbacks callbacks_;
  bool looked_ = false;  // reader's thread: the last Look() had an answer
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::map<std::string, Entry> domains_;              // by UUID; guarded by mutex_, as all below
  std::map<std::string, Clock::time_point> pending_;  // to be read, when
  std::map<std::string, Clock::time_point> touched_;  // the last event
  std::map<std::string, Clock::time_point> again_;    // could not be read
  bool read_all_ = false, up_ = false, tried_ = false, first_done_ = false, stopping_ = false;
  std::string why_;
  std::unique_ptr<LibvirtConnection> connection_;
  std::thread thread_;
};

std::unique_ptr<LibvirtInventory> LibvirtInventory::Start(InventoryOptions options,
                                                          InventoryCallbacks callbacks) {
  return std::unique_ptr<LibvirtInventory>(
      new LibvirtInventory(std::make_unique<Impl>(std::move(options), std::move(callbacks))));
}

LibvirtInventory::LibvirtInventory(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
LibvirtInventory::~LibvirtInventory() = default;
std::vector<v1::Vm> LibvirtInventory::Vms() const { return impl_->Vms(); }
absl::StatusOr<v1::Vm> LibvirtInventory::Find(const std::string& id) const { return impl_->Find(id); }
bool LibvirtInventory::WaitForFirst(Deadline deadline) const { return impl_->WaitForFirst(deadline); }
bool LibvirtInventory::read() const { return impl_->read(); }
void LibvirtInventory::LookLater(const std::string& uuid) { impl_->LookLater(uuid); }
LibvirtConnection& LibvirtInventory::connection() { return impl_->connection(); }

}  // namespace baton::vmm
