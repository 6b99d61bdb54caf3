#include "server/control/device_events.h"

#include <algorithm>
#include <chrono>

#include "common/log.h"
#include "server/names.h"

namespace baton::server {
namespace {

constexpr int64_t kSecond = 1'000'000'000;
constexpr int64_t kDefaultBackoff = 60 * kSecond;
constexpr int64_t kMaxBackoff = 3600 * kSecond;
// How often a migration under way is looked at when no word of its VM comes.
constexpr int64_t kFollow = 5 * kSecond;
// An event that waits for the end of a migration that somebody else began.
constexpr int64_t kBusy = 5 * kSecond;

int64_t EventWallNow() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

int64_t Ns(const google::protobuf::Timestamp& time) { return time.seconds() * kSecond + time.nanos(); }

std::string EventId(const std::string& host, const v1::Device& device) {
  return fmt::format("{}/{}/{}/{}", IdOf(host), device.name(), device.last_event().sequence(),
                     Ns(device.last_event().time()));
}

const v1::Device* NewestEvent(const v1::Vm& vm) {
  const v1::Device* newest = nullptr;
  for (const v1::Device& device : vm.devices()) {
    if (device.events() == 0) continue;
    if (newest == nullptr || Ns(device.last_event().time()) > Ns(newest->last_event().time()))
      newest = &device;
  }
  return newest;
}

std::string InWords(const v1::Device& device) {
  const v1::DeviceEvent& event = device.last_event();
  return fmt::format("device {}: its back-end reported an error of queue {}, with {} requests in flight",
                     device.name(), event.queue(), event.held());
}

}  // namespace

DeviceEvents::DeviceEvents(EventLoop& loop, Store& store, Fleet& fleet, Policies& policies,
                           Controller& controller, ServerMetrics& metrics)
    : loop_(loop),
      store_(store),
      fleet_(fleet),
      policies_(policies),
      controller_(controller),
      metrics_(metrics) {
  controller_.SetVmListener([this](const std::string& vm) { OnVm(vm); });
}

DeviceEvents::~DeviceEvents() {
  controller_.SetVmListener(nullptr);
  for (auto& [vm, entry] : entries_) {
    if (entry.timer) loop_.Cancel(*entry.timer);
  }
}

absl::Status DeviceEvents::Load() {
  return store_.ForEach("events/", [this](const Item& item) {
    Entry entry;
    if (!entry.record.ParseFromString(item.value))
      return Error(absl::StatusCode::kDataLoss, "store: {} cannot be read", item.key);
    const std::string vm = IdOf(item.key);
    Entry& kept = entries_[vm] = std::move(entry);
    if (!kept.record.settled()) Arm(vm, kept, EventWallNow());
    return absl::OkStatus();
  });
}

bool DeviceEvents::Save(const std::string& vm, Entry& entry, DeviceEventRecord record) {
  Batch batch;
  batch.Put("events/" + vm, record.SerializeAsString());
  if (absl::Status saved = store_.Commit(batch).status(); !saved.ok()) {
    LOG_ERROR("vms/{}: what is done about its device event cannot be recorded: {}", vm, Message(saved));
    return false;
  }
  entry.record = std::move(record);
  return true;
}

void DeviceEvents::Settle(const std::string& vm, Entry& entry, const std::string& answer) {
  DeviceEventRecord record = entry.record;
  record.set_settled(true);
  if (Save(vm, entry, std::move(record))) metrics_.DeviceEventAnswer(answer);
}

void DeviceEvents::Arm(const std::string& vm, Entry& entry, int64_t at_ns) {
  if (entry.timer) loop_.Cancel(*entry.timer);
  const int64_t wait = std::max<int64_t>(at_ns - EventWallNow(), 0);
  entry.timer = loop_.At(Clock::now() + std::chrono::nanoseconds(wait), [this, vm] {
    auto found = entries_.find(vm);
    if (found == entries_.end()) return;
    found->second.timer.reset();
    Consider(vm);
  });
}

void DeviceEvents::Forget(const std::string& vm) {
  auto found = entries_.find(vm);
  if (found == entries_.end()) return;
  if (found->second.timer) loop_.Cancel(*found->second.timer);
  Batch batch;
  batch.Delete("events/" + vm);
  if (store_.Commit(batch).ok()) entries_.erase(found);
}

void DeviceEvents::OnVm(const std::string& id) {
  auto vm = fleet_.GetVm(id);
  if (!vm.ok()) return;
  const v1::Device* newest = NewestEvent(*vm);
  if (newest == nullptr) return;
  auto found = entries_.find(id);
  const std::string event = EventId(vm->host(), *newest);
  if (found != entries_.end() && found->second.record.event() == event) {
    if (!found->second.record.settled() && !found->second.timer) Arm(id, found->second, 0);
    return;
  }
  Entry& entry = entries_[id];
  DeviceEventRecord record = entry.record;
  for (const v1::Device& device : vm->devices()) {
    if (device.events() == 0) continue;
    uint64_t& heard = (*record.mutable_heard())[IdOf(vm->host()) + "/" + device.name()];
    // A device that counts from the beginning belongs to a VM that was started anew.
    if (device.events() < heard) heard = 0;
    if (device.events() > heard) metrics_.DeviceEvents(device.last_event().kind(), device.events() - heard);
    heard = device.events();
  }
  LOG_WARN("vms/{} at {}: {}", id, vm->host(), InWords(*newest));
  record.set_event(event);
  // The attempts made for an event before count: a device that goes on failing must not begin a storm.
  if (record.settled()) {
    record.set_attempts(0);
    record.clear_migration();
  }
  record.set_settled(false);
  if (!Save(id, entry, std::move(record))) return;  // taken again with the VM's next word
  // Not from here: the fleet is in the middle of taking the VM's word.
  Arm(id, entry, 0);
}

bool DeviceEvents::Following(const std::string& id, Entry& entry) {
  if (entry.record.migration().empty()) return false;
  auto migration = controller_.Get(IdOf(entry.record.migration()));
  if (!migration.ok()) return false;
  switch (migration->phase()) {
    case v1::SUCCEEDED:
      Settle(id, entry, "migrated");
      return true;
    case v1::CANCELLED:
      // Somebody does not want it.
      Settle(id, entry, "cancelled");
      return true;
    case v1::FAILED:
      if (migration->guest_location() == v1::SOURCE) return false;
      Settle(id, entry, "failed");
      return true;
    default:
      Arm(id, entry, EventWallNow() + kFollow);
      return true;
  }
}

absl::StatusOr<std::string> DeviceEvents::ChooseHost(const v1::OnDeviceError& answer,
                                                     const v1::Vm& vm) const {
  auto fits = [&](const v1::Host& host) {
    return host.connected() && !host.cordoned() && host.name() != vm.host();
  };
  for (const std::string& name : answer.hosts()) {
    auto host = fleet_.GetHost(IdOf(name));
    if (host.ok() && fits(*host)) return name;
  }
  if (!answer.hosts().empty())
    return absl::NotFoundError(
        "none of the hosts that the policy names is connected, not cordoned and another one");
  std::string best;
  uint64_t most = 0;
  for (const v1::Host& host : fleet_.ListHosts("", SIZE_MAX)) {
    if (!fits(host) || (!best.empty() && host.memory_free() <= most)) continue;
    best = host.name();
    most = host.memory_free();
  }
  if (best.empty()) return absl::NotFoundError("no other host is connected and not cordoned");
  return best;
}

void DeviceEvents::Consider(const std::string& id) {
  auto found = entries_.find(id);
  if (found == entries_.end()) return;
  Entry& entry = found->second;
  if (entry.record.settled()) return;
  auto vm = fleet_.GetVm(id);
  if (!vm.ok()) return Forget(id);
  if (Following(id, entry)) return;
  const int64_t now = EventWallNow();
  const v1::Device* device = NewestEvent(*vm);
  // It moved away or was started anew meanwhile.
  if (device == nullptr || EventId(vm->host(), *device) != entry.record.event())
    return Settle(id, entry, "obsolete");
  auto policies = policies_.List("", 1000);
  if (!policies.ok()) return Arm(id, entry, now + kBusy);
  const v1::Policy* policy = PolicyForDeviceEvents(*policies, id);
  if (policy == nullptr || !policy->on_device_error().migrate()) return Settle(id, entry, "no_policy");
  if (!vm->migration().empty() || vm->state() != v1::Vm::RUNNING) return Arm(id, entry, now + kBusy);
  if (entry.record.attempts() >= kMaxAttempts) {
    LOG_ERROR("vms/{}: {} migrations for a device event failed; no more are tried: {}", id, kMaxAttempts,
              InWords(*device));
    return Settle(id, entry, "given_up");
  }
  if (now < entry.record.not_before_ns()) return Arm(id, entry, entry.record.not_before_ns());
  const v1::OnDeviceError& answer = policy->on_device_error();
  auto host = ChooseHost(answer, *vm);
  if (policy->observe_only()) {
    LOG_INFO("vms/{}: {} would move it{} because of: {}; it only observes", id, policy->name(),
             host.ok() ? " to " + *host : "", InWords(*device));
    return Settle(id, entry, "observed");
  }

  int64_t backoff = answer.has_backoff() ? answer.backoff().seconds() * kSecond + answer.backoff().nanos()
                                         : kDefaultBackoff;
  backoff = std::min(backoff << std::min(entry.record.attempts(), 12u), kMaxBackoff);
  DeviceEventRecord record = entry.record;
  record.set_attempts(record.attempts() + 1);
  record.set_not_before_ns(now + backoff);
  record.clear_migration();
  if (!host.ok()) {
    LOG_ERROR("vms/{}: {} cannot move it: {}", id, policy->name(), Message(host.status()));
    metrics_.DeviceEventAnswer("no_destination");
    Save(id, entry, std::move(record));
    return Arm(id, entry, now + backoff);
  }
  // Before the act: a batond that ends here tries again after the pause, not at once.
  if (!Save(id, entry, record)) return Arm(id, entry, now + kBusy);
  v1::CreateMigrationRequest request;
  request.set_request_id(
      fmt::format("device-event/{}/{}/{}", id, record.event(), record.attempts()).substr(0, 128));
  v1::Migration& wanted = *request.mutable_migration();
  wanted.set_vm("vms/" + id);
  wanted.set_destination(*host);
  wanted.set_policy(policy->name());
  (*wanted.mutable_labels())["cause"] = "device-event";
  (*wanted.mutable_labels())["device"] = device->name();
  (*wanted.mutable_labels())["event"] = InWords(*device).substr(0, 255);
  LOG_WARN("vms/{}: {} moves it to {} (attempt {}) because of: {}", id, policy->name(), *host,
           record.attempts(), InWords(*device));
  controller_.Create(request, [this, id](absl::StatusOr<v1::Migration> created) {
    auto found = entries_.find(id);
    if (found == entries_.end()) return;
    Entry& entry = found->second;
    if (created.ok()) {
      metrics_.DeviceEventAnswer("migrate");
      DeviceEventRecord record = entry.record;
      record.set_migration(created->name());
      Save(id, entry, std::move(record));
      return Arm(id, entry, EventWallNow() + kFollow);
    }
    LOG_ERROR("vms/{}: the migration was refused: {}", id, Message(created.status()));
    metrics_.DeviceEventAnswer("refused");
    Arm(id, entry, entry.record.not_before_ns());
  });
}

}  // namespace baton::server
