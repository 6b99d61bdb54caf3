#include "server/control/controller.h"

#include <algorithm>
#include <chrono>
#include <set>

#include "common/grpc_status.h"
#include "common/log.h"
#include "common/reason.h"
#include "server/names.h"

namespace baton::server {
namespace {

constexpr Duration kStoreRetry = std::chrono::seconds(1);

// The part of a report whose change must be stored before anything else happens.
bool OnlyFigures(const v1::SideReport& before, const v1::SideReport& after) {
  return before.migration_id() == after.migration_id() && before.phase() == after.phase() &&
         before.handover() == after.handover() && before.guest_running() == after.guest_running() &&
         !after.done() && before.reason() == after.reason() && before.guest_lost() == after.guest_lost();
}

}  // namespace

Controller::Controller(EventLoop& loop, Store& store, Fleet& fleet, Policies& policies,
                       ServerMetrics& metrics, const ControllerOptions& options)
    : loop_(loop), store_(store), fleet_(fleet), policies_(policies), metrics_(metrics), options_(options) {
  fleet_.SetObserver(this);
}

Controller::~Controller() { fleet_.SetObserver(nullptr); }

// Revision and etag are the commit's, so they are not stored with the value.
absl::StatusOr<v1::Migration> Controller::FromValue(const std::string& value, int64_t revision) {
  v1::Migration migration;
  if (!migration.ParseFromString(value)) return absl::DataLossError("a migration's record cannot be read");
  migration.set_revision(revision);
  migration.set_etag(fmt::format("{:x}", revision));
  return migration;
}

Now Controller::Time() const {
  auto wall = std::chrono::system_clock::now().time_since_epoch();
  return {MonotonicNs(), std::chrono::duration_cast<std::chrono::nanoseconds>(wall).count()};
}

absl::Status Controller::Load() {
  std::set<std::string> known;
  RETURN_IF_ERROR(store_.ForEach("migrations/", [&](const Item& item) -> absl::Status {
    std::string id = IdOf(item.key);
    known.insert(item.key);
    ASSIGN_OR_RETURN(v1::Migration migration, FromValue(item.value, item.revision));
    migration.clear_revision();
    migration.clear_etag();
    if (migration.phase() >= v1::SUCCEEDED) ended_.push_back(id);
    auto control = store_.Get("control/" + id);
    if (control.status().code() == absl::StatusCode::kNotFound) return absl::OkStatus();
    RETURN_IF_ERROR(control.status());
    MigrationControl record;
    if (!record.ParseFromString(control->value)) {
      return Error(absl::StatusCode::kDataLoss, "store: control/{} cannot be read", id);
    }
    Add(id, Machine(std::move(migration), std::move(record), options_.times));
    return absl::OkStatus();
  }));
  // Request ids live as long as what they made.
  Batch forget;
  RETURN_IF_ERROR(store_.ForEach("requests/migrations.", [&](const Item& item) {
    RequestRecord record;
    if (!record.ParseFromString(item.value) || !known.count(record.name())) forget.Delete(item.key);
    return absl::OkStatus();
  }));
  if (!forget.empty()) RETURN_IF_ERROR(store_.Commit(forget).status());
  for (auto& [id, entry] : entries_) {
    LOG_INFO("migrations/{}: going on in phase {}", id, LabelOf(entry->machine.migration().phase()));
    Apply(*entry, Tick{});
  }
  Prune();
  Schedule();
  return absl::OkStatus();
}

Controller::Entry& Controller::Add(const std::string& id, Machine machine) {
  const v1::Migration& m = machine.migration();
  auto entry = std::make_unique<Entry>(Entry{id,
                                             IdOf(m.vm()),
                                             IdOf(m.source()),
                                             IdOf(m.destination()),
                                             machine,
                                             false,
                                             {},
                                             {},
                                             {},
                                             {},
                                             false,
                                             false});
  if (!machine.ended()) busy_[entry->vm] = id;
  return *(entries_[id] = std::move(entry));
}

Controller::Entry* Controller::Find(const std::string& id) {
  auto found = entries_.find(id);
  return found == entries_.end() ? nullptr : found->second.get();
}

absl::StatusOr<Controller::Entry*> Controller::FindActive(const std::string& id) {
  Entry* entry = Find(id);
  if (entry && !entry->machine.ended()) return entry;
  ASSIGN_OR_RETURN(v1::Migration migration, Get(id));
  return WithResource(Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                            "migrations/{} has ended ({})", id, LabelOf(migration.phase())),
                      "migrations", "migrations/" + id);
}

// --- the runner ---

absl::Status Controller::Save(Entry& entry, const Machine& machine, bool public_changed, bool control_changed,
                              const Batch* more) {
  Batch batch = more ? *more : Batch();
  bool settled = machine.settled();
  if (public_changed) batch.Put("migrations/" + entry.id, machine.migration().SerializeAsString());
  if (settled) {
    batch.Delete("control/" + entry.id);
  } else if (control_changed) {
    batch.Put("control/" + entry.id, machine.control().SerializeAsString());
  }
  if (batch.empty()) return absl::OkStatus();
  absl::Status status = store_.Commit(batch).status();
  if (status.ok()) {
    entry.last_commit = Clock::now();
    entry.public_dirty = entry.control_dirty = entry.unsaved = entry.refused = false;
    for (const auto& [number, wake] : std::map(subscribers_)) wake();
  }
  return status;
}

absl::Status Controller::TryApply(Entry& entry, const Event& event) {
  Machine next = entry.machine;
  Actions actions = next.Handle(event, Time());
  v1::Phase before = entry.machine.migration().phase();
  RETURN_IF_ERROR(Save(entry, next, actions.public_changed || entry.public_dirty,
                       actions.control_changed || entry.control_dirty));
  entry.machine = std::move(next);
  Actions held = std::move(entry.held);
  entry.held = {};
  Perform(entry, std::move(held));
  Perform(entry, std::move(actions));
  AfterSave(entry, before);
  return absl::OkStatus();
}

void Controller::Apply(Entry& entry, const Event& event, bool may_wait) {
  v1::Phase before = entry.machine.migration().phase();
  Actions actions = entry.machine.Handle(event, Time());
  entry.public_dirty |= actions.public_changed;
  entry.control_dirty |= actions.control_changed;
  std::move(actions.commands.begin(), actions.commands.end(), std::back_inserter(entry.held.commands));
  std::move(actions.acks.begin(), actions.acks.end(), std::back_inserter(entry.held.acks));
  bool dirty = entry.public_dirty || entry.control_dirty;
  const bool waits = may_wait && entry.held.commands.empty() && entry.held.acks.empty();
  if (entry.unsaved && entry.flush && (entry.refused || waits)) {
    ArmTick(entry);
    return;  // what waits goes with the flush
  }
  if (dirty && waits) {
    Clock::time_point due = entry.last_commit + options_.progress_interval;
    if (Clock::now() < due) {
      entry.unsaved = true;
      entry.flush = loop_.At(due, [this, id = entry.id] {
        if (Entry* entry = Find(id)) Flush(*entry);
      });
      ArmTick(entry);
      return;
    }
  }
  entry.unsaved = dirty;
  (void)before;
  Flush(entry);
}

// Stores what the machine says, then does what it asked for. A store that fails is asked again; until then
// nothing is done, and the agents repeat what was not acknowledged.
void Controller::Flush(Entry& entry) {
  if (entry.flush) loop_.Cancel(*entry.flush);
  entry.flush.reset();
  if (entry.public_dirty || entry.control_dirty || entry.machine.settled()) {
    auto stored = store_.Get("migrations/" + entry.id);
    v1::Phase before = v1::PHASE_UNSPECIFIED;
    if (stored.ok()) {
      if (auto migration = FromValue(stored->value, 0); migration.ok()) before = migration->phase();
    }
    absl::Status status = Save(entry, entry.machine, entry.public_dirty, entry.control_dirty);
    if (!status.ok()) {
      LOG_ERROR("migrations/{}: {}; nothing is done for it until the store takes it", entry.id,
                Message(status));
      entry.unsaved = entry.refused = true;
      entry.flush = loop_.At(Clock::now() + kStoreRetry, [this, id = entry.id] {
        if (Entry* entry = Find(id)) Flush(*entry);
      });
      return;
    }
    Actions held = std::move(entry.held);
    entry.held = {};
    Perform(entry, std::move(held));
    AfterSave(entry, before);
    return;
  }
  Actions held = std::move(entry.held);
  entry.held = {};
  Perform(entry, std::move(held));
  ArmTick(entry);
}

void Controller::Perform(Entry& entry, Actions actions) {
  for (OutgoingCommand& out : actions.commands) {
    const std::string& host = out.to == v1::ROLE_SOURCE ? entry.source : entry.destination;
    fleet_.Send(host, std::move(out.command),
                [this, id = entry.id, kind = out.kind](Fleet::CommandReply reply) {
                  Entry* entry = Find(id);
                  if (!entry) return;
                  if (reply.answered && !reply.status.ok()) {
                    LOG_INFO("migrations/{}: {}", id, Message(reply.status));
                  }
                  Apply(*entry, CommandDone{kind, reply.status, reply.answered, std::move(reply.result)});
                });
  }
  for (const AckToSend& out : actions.acks) {
    fleet_.SendAck(out.to == v1::ROLE_SOURCE ? entry.source : entry.destination, out.ack);
  }
}

// What follows from a new state that the store has. May remove the entry.
void Controller::AfterSave(Entry& entry, v1::Phase before) {
  const v1::Migration& m = entry.machine.migration();
  v1::Phase phase = m.phase();
  if (phase != before) {
    LOG_INFO("{}: {} {} to {}: {}{}{}", m.name(), m.vm(), m.source(), m.destination(), LabelOf(phase),
             m.message().empty() ? "" : ": ", m.message());
    if (phase == v1::PREPARING) metrics_.MigrationStarted(m);
  }
  const v1::SideReport& destination = entry.machine.control().destination();
  if (destination.handover() == v1::OWNER && !entry.machine.control().fenced()) {
    if (absl::Status status = fleet_.SetOwner(entry.vm, entry.destination, destination.epoch());
        !status.ok()) {
      LOG_ERROR("vms/{}: {}", entry.vm, Message(status));
    }
  }
  bool ended_now = entry.machine.ended() && before < v1::SUCCEEDED;
  if (ended_now) {
    metrics_.MigrationEnded(m);
    if (!m.progress().rounds().empty() && m.progress().rounds(0).rate() > 0) {
      last_rate_ = static_cast<double>(m.progress().rounds(0).rate());
    }
    if (auto busy = busy_.find(entry.vm); busy != busy_.end() && busy->second == entry.id) busy_.erase(busy);
    ended_.push_back(entry.id);
  }
  if (entry.machine.settled()) {
    if (entry.tick) loop_.Cancel(*entry.tick);
    entries_.erase(entry.id);
  } else {
    ArmTick(entry);
  }
  if (ended_now) Prune();
  if (phase != before) Schedule();
}

void Controller::ArmTick(Entry& entry) {
  if (entry.tick) loop_.Cancel(*entry.tick);
  entry.tick.reset();
  auto when = entry.machine.next_tick();
  if (!when) return;
  Duration left = std::chrono::nanoseconds(std::max<int64_t>(*when - MonotonicNs(), 0));
  entry.tick = loop_.At(Clock::now() + left, [this, id = entry.id] {
    Entry* entry = Find(id);
    if (!entry) return;
    entry->tick.reset();
    Apply(*entry, Tick{});
  });
}

void Controller::Schedule() {
  // Admission changes phases, which asks for scheduling again.
  if (scheduling_) return;
  scheduling_ = true;
  std::vector<Slot> active, queued;
  std::map<v1::Phase, int> phases;
  for (const auto& [id, entry] : entries_) {
    if (entry->machine.ended()) continue;
    bool waits = entry->machine.control().step() == MigrationControl::WAITING;
    (waits ? queued : active).push_back({id, entry->source, entry->destination});
    ++phases[entry->machine.migration().phase()];
  }
  for (const std::string& id : Admit(options_.limits, active, queued)) {
    if (Entry* entry = Find(id)) {
      --phases[v1::QUEUED];
      ++phases[v1::PREPARING];
      Apply(*entry, Admitted{});
    }
  }
  metrics_.SetActive(phases);
  scheduling_ = false;
}

void Controller::Prune() {
  while (ended_.size() > options_.history) {
    std::string id = ended_.front();
    if (Find(id)) return;  // not settled yet: it and those after it stay
    Batch batch;
    batch.Delete("migrations/" + id);
    if (!store_.Commit(batch).ok()) return;
    ended_.pop_front();
  }
}

// --- from the fleet ---

void Controller::Connect(Entry& entry) {
  for (v1::Role role : {v1::ROLE_SOURCE, v1::ROLE_DESTINATION}) {
    if (fleet_.Connected(role == v1::ROLE_SOURCE ? entry.source : entry.destination)) {
      entry.machine.Handle(HostUp{role, std::nullopt, role == v1::ROLE_SOURCE}, Time());
    }
  }
}

void Controller::OnHostUp(const std::string& host, const v1::Hello& hello) {
  std::vector<std::pair<std::string, v1::Role>> sides;
  for (const auto& [id, entry] : entries_) {
    if (entry->source == host) sides.emplace_back(id, v1::ROLE_SOURCE);
    if (entry->destination == host) sides.emplace_back(id, v1::ROLE_DESTINATION);
  }
  std::set<std::pair<std::string, v1::Role>> taken;
  for (const auto& [id, role] : sides) {
    Entry* entry = Find(id);
    if (!entry) continue;
    HostUp event{role, std::nullopt, false};
    for (const v1::SideReport& report : hello.reports()) {
      if (report.migration_id() == id && report.role() == role) event.report = report;
    }
    for (const v1::Vm& vm : hello.vms()) {
      if (IdOf(vm.name()) == entry->vm && vm.state() != v1::Vm::INCOMING && vm.state() != v1::Vm::STOPPED) {
        event.has_vm = true;
      }
    }
    taken.insert({id, role});
    Apply(*entry, event);
  }
  for (const v1::SideReport& report : hello.reports()) {
    if (!taken.count({report.migration_id(), report.role()})) OnReport(host, report);
  }
}

void Controller::OnHostDown(const std::string& host) {
  std::vector<std::pair<std::string, v1::Role>> sides;
  for (const auto& [id, entry] : entries_) {
    if (entry->source == host) sides.emplace_back(id, v1::ROLE_SOURCE);
    if (entry->destination == host) sides.emplace_back(id, v1::ROLE_DESTINATION);
  }
  for (const auto& [id, role] : sides) {
    if (Entry* entry = Find(id)) Apply(*entry, HostDown{role});
  }
}

void Controller::OnVmEnded(const std::string& host, const std::string& vm, const std::string& how) {
  std::vector<std::string> ids;
  for (const auto& [id, entry] : entries_) {
    if (entry->source == host && entry->vm == vm) ids.push_back(id);
  }
  for (const std::string& id : ids) {
    if (Entry* entry = Find(id)) Apply(*entry, VmEnded{how});
  }
}

void Controller::OnReport(const std::string& host, const v1::SideReport& report) {
  Entry* entry = Find(IdOf(report.migration_id()));
  if (!entry) {
    // Settled long ago (the acknowledgement got lost), or never known here: nobody waits for it.
    if (report.done()) {
      v1::ReportAck ack;
      ack.set_migration_id(report.migration_id());
      ack.set_role(report.role());
      ack.set_sequence(report.sequence());
      fleet_.SendAck(host, ack);
    } else {
      LOG_WARN("hosts/{}: a report on migrations/{}, of which nothing is known here", host,
               report.migration_id());
    }
    return;
  }
  const std::string& expected = report.role() == v1::ROLE_SOURCE ? entry->source : entry->destination;
  if (host != expected || report.role() == v1::ROLE_UNSPECIFIED) {
    LOG_WARN("hosts/{}: a report on migrations/{} in a role that is not its own was ignored", host,
             entry->id);
    return;
  }
  const MigrationControl& control = entry->machine.control();
  bool figures =
      OnlyFigures(report.role() == v1::ROLE_SOURCE ? control.source() : control.destination(), report);
  Apply(*entry, Reported{report}, figures);
}

std::string Controller::MigrationOf(const std::string& vm) const {
  auto found = busy_.find(vm);
  return found == busy_.end() ? "" : "migrations/" + found->second;
}

}  // namespace baton::server
