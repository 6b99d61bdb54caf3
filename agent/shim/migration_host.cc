#include "agent/shim/migration_host.h"

#include <algorithm>
#include <cstring>

#include "agent/memory/dirty_source.h"
#include "agent/migration/mediator_devices.h"
#include "agent/stream/tls.h"
#include "common/log.h"

namespace baton::shim {
namespace {

// Engines bound everything they do themselves; this only has to be longer than any migration.
constexpr Duration kForEver = std::chrono::hours(24 * 365);

absl::StatusOr<std::shared_ptr<const stream::TlsContext>> LoadTls(const v1::ShimConfig& config, bool wanted) {
  if (!wanted) return std::shared_ptr<const stream::TlsContext>();
  if (config.tls_ca().empty() || config.tls_cert().empty() || config.tls_key().empty()) {
    return Error(absl::StatusCode::kFailedPrecondition,
                 "the migration wants TLS, but this host's agent has no peer certificates configured");
  }
  return stream::TlsContext::Load(config.tls_ca(), config.tls_cert(), config.tls_key());
}

bool HasNetwork(const v1::VmSpec& spec) {
  return std::any_of(spec.devices().begin(), spec.devices().end(),
                     [](const v1::DeviceSpec& device) { return device.class_() == v1::NET; });
}

MigrationHost::End EndOf(migration::OutgoingMigration::Outcome outcome) {
  using Outcome = migration::OutgoingMigration::Outcome;
  switch (outcome) {
    case Outcome::kReleased:
      return MigrationHost::End::kReleased;
    case Outcome::kResumed:
      return MigrationHost::End::kRunning;
    case Outcome::kLost:
      return MigrationHost::End::kLost;
    default:
      return MigrationHost::End::kPaused;
  }
}

MigrationHost::End EndOf(migration::IncomingMigration::Outcome outcome) {
  using Outcome = migration::IncomingMigration::Outcome;
  switch (outcome) {
    case Outcome::kOwner:
      return MigrationHost::End::kRunning;
    case Outcome::kRefused:
      return MigrationHost::End::kRefused;
    default:
      return MigrationHost::End::kPaused;
  }
}

}  // namespace

MigrationHost::MigrationHost(VirtualMachine& vm, Callbacks callbacks)
    : vm_(vm), callbacks_(std::move(callbacks)) {}

MigrationHost::~MigrationHost() {
  // The engines first: their end is what the waiters wait for.
  if (outgoing_) {
    outgoing_->engine.reset();
    if (outgoing_->waiter.joinable()) outgoing_->waiter.join();
  }
  if (incoming_) {
    incoming_->engine.reset();
    if (incoming_->waiter.joinable()) incoming_->waiter.join();
  }
}

void MigrationHost::MakeDevices() {
  std::vector<vhost::Mediator*> mediators;
  for (const auto& mediator : vm_.mediators()) mediators.push_back(mediator.get());
  devices_ = migration::MakeMediatorDevices(std::move(mediators), vm_.balloon());
}

absl::StatusOr<migration::SourceOptions> MigrationHost::MakeSourceOptions(
    const v1::StartOutgoingCommand& command) const {
  v1::ShimConfig config = vm_.config().Get();
  migration::SourceOptions options;
  options.migration_id = command.migration_id();
  options.vm = config.spec().name();
  options.epoch = command.epoch();
  options.params = command.params();
  options.dial.address = command.peer_address();
  ASSIGN_OR_RETURN(options.dial.token, stream::MakeToken(command.token()));
  ASSIGN_OR_RETURN(options.dial.tls, LoadTls(config, command.params().tls()));
  options.pause_dir = config.run_dir();
  options.has_network = HasNetwork(config.spec());
  return options;
}

migration::SourceParts MigrationHost::MakeSourceParts() {
  MakeDevices();
  std::string mode = vm_.config().Get().dirty_tracking();
  if (mode.empty()) mode = "auto";
  return {vm_.driver(),
          vm_.ram(),
          *devices_,
          vm_.journal(),
          [this, mode] { return memory::MakeVmmDirtySource(vm_.driver().pid(), vm_.ram(), mode); },
          [this](const v1::SideReport& report) { TakeReport(report); }};
}

absl::Status MigrationHost::StartOutgoing(const v1::StartOutgoingCommand& command) {
  if (outgoing_ && outgoing_->id == command.migration_id()) return absl::OkStatus();
  {
    std::lock_guard lock(mutex_);
    if (reports_.contains({command.migration_id(), v1::ROLE_SOURCE})) return absl::OkStatus();
  }
  if (busy()) {
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition, "the VM is in migration {}",
                 active());
  }
  if (vm_.state() != v1::Vm::RUNNING) {
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition, "the VM is {}",
                 v1::Vm::State_Name(vm_.state()));
  }
  ASSIGN_OR_RETURN(migration::Ownership ownership, vm_.ReadOwnership());
  if (ownership.state != migration::Ownership::State::kOwner || ownership.epoch != command.epoch()) {
    return Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition,
                 "the migration is for epoch {} of the guest, this host owns epoch {}", command.epoch(),
                 ownership.epoch);
  }
  ASSIGN_OR_RETURN(migration::SourceOptions options, MakeSourceOptions(command));
  RETURN_IF_ERROR(vm_.journal().Reserve(8));
  RETURN_IF_ERROR(vm_.config().Update([&](v1::ShimConfig& c) { *c.mutable_outgoing() = command; }));
  // Whoever still asks about the migration that brought the guest here asks the journal from now on.
  if (incoming_) {
    incoming_->engine.reset();
    if (incoming_->waiter.joinable()) incoming_->waiter.join();
    incoming_.reset();
  }
  Follow(migration::OutgoingMigration::Start(std::move(options), MakeSourceParts()), command.migration_id());
  return absl::OkStatus();
}

absl::Status MigrationHost::ResumeOutgoing() {
  v1::StartOutgoingCommand command = vm_.config().Get().outgoing();
  if (command.migration_id().empty()) return absl::FailedPreconditionError("no outgoing migration is known");
  ASSIGN_OR_RETURN(migration::SourceOptions options, MakeSourceOptions(command));
  ASSIGN_OR_RETURN(auto engine,
                   migration::OutgoingMigration::ResumeAsking(std::move(options), MakeSourceParts()));
  Follow(std::move(engine), command.migration_id());
  return absl::OkStatus();
}

void MigrationHost::Follow(std::unique_ptr<migration::OutgoingMigration> engine, const std::string& id) {
  outgoing_.emplace();
  outgoing_->id = id;
  outgoing_->engine = std::move(engine);
  vm_.SetMigration(id);
  outgoing_->waiter = std::thread([this, id, raw = outgoing_->engine.get()] {
    if (raw->Wait(Deadline::After(kForEver)).ok()) callbacks_.on_end(id);
  });
}

absl::Status MigrationHost::Cancel(const std::string& migration_id) {
  if (!outgoing_ || outgoing_->id != migration_id) {
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "migration {} is not under way here",
                 migration_id);
  }
  return outgoing_->engine->Cancel();
}

absl::Status MigrationHost::Retune(const v1::RetuneCommand& command) {
  if (!outgoing_ || outgoing_->id != command.migration_id()) {
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "migration {} is not under way here",
                 command.migration_id());
  }
  std::optional<uint64_t> bandwidth;
  std::optional<Duration> max_downtime;
  if (command.has_bandwidth()) bandwidth = command.bandwidth();
  if (command.has_max_downtime()) max_downtime = migration::ToDuration(command.max_downtime());
  return outgoing_->engine->Retune(bandwidth, max_downtime);
}

absl::Status MigrationHost::Resolve(const v1::ResolveCommand& command) {
  if (!outgoing_ || outgoing_->id != command.migration_id()) {
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "migration {} does not wait for a verdict here",
                 command.migration_id());
  }
  return outgoing_->engine->Resolve(command.verdict(), command.fenced());
}

absl::Status MigrationHost::StartIncoming(bool recover) {
  v1::ShimConfig config = vm_.config().Get();
  migration::DestinationOptions options;
  options.migration_id = config.migration_id();
  options.vm = config.spec().name();
  options.epoch = config.source().epoch() != 0 ? config.source().epoch() : config.epoch();
  options.params = config.params();
  ASSIGN_OR_RETURN(options.token, stream::MakeToken(config.token()));
  ASSIGN_OR_RETURN(options.tls, LoadTls(config, config.params().tls()));
  options.pause_dir = config.run_dir();
  options.has_network = HasNetwork(config.spec());
  MakeDevices();
  migration::DestinationParts parts{vm_.driver(), vm_.ram(), *devices_, vm_.journal(),
                                    [this](const v1::SideReport& report) { TakeReport(report); }};
  auto engine = recover ? migration::IncomingMigration::Recover(std::move(options), std::move(parts))
                        : migration::IncomingMigration::Start(std::move(options), std::move(parts));
  if (!engine.ok()) return engine.status();
  incoming_ = Incoming{};
  incoming_->id = config.migration_id();
  incoming_->engine = *std::move(engine);
  vm_.SetMigration(incoming_->id);
  incoming_->waiter = std::thread([this, id = incoming_->id, raw = incoming_->engine.get()] {
    if (raw->Wait(Deadline::After(kForEver)).ok()) callbacks_.on_end(id);
  });
  return absl::OkStatus();
}

absl::Status MigrationHost::AcceptChannel(const v1::AcceptChannelRequest& request, UniqueFd socket) {
  if (!socket) return absl::InvalidArgumentError("no descriptor came with the connection");
  if (request.preamble().size() != stream::kPreambleSize) {
    return Error(absl::StatusCode::kInvalidArgument, "a preamble has {} bytes, not {}", stream::kPreambleSize,
                 request.preamble().size());
  }
  stream::PreambleBytes bytes;
  std::memcpy(bytes.data(), request.preamble().data(), bytes.size());
  if (!incoming_) {
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "no migration to this host is under way");
  }
  return incoming_->engine->AcceptChannel(bytes, std::move(socket));
}

absl::Status MigrationHost::AbortIncoming(const std::string& migration_id) {
  if (!incoming_ || incoming_->id != migration_id) {
    return Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "migration {} does not come here", migration_id);
  }
  return incoming_->engine->Abort("aborted on request");
}

bool MigrationHost::OnVmmExit(const std::string& how) {
  if (outgoing_) {
    // An engine in the middle of a long round would notice only at the end of it.
    (void)outgoing_->engine->Cancel();
    return true;
  }
  if (incoming_ && !incoming_->ended) {
    (void)incoming_->engine->Abort(how);
    return true;
  }
  return false;
}

std::optional<MigrationHost::Ended> MigrationHost::OnEnd(const std::string& migration_id) {
  Ended ended;
  if (outgoing_ && outgoing_->id == migration_id) {
    ended.role = v1::ROLE_SOURCE;
    ended.end = EndOf(outgoing_->engine->outcome());
    ended.report = outgoing_->engine->report();
    outgoing_->waiter.join();
    outgoing_.reset();
  } else if (incoming_ && incoming_->id == migration_id && !incoming_->ended) {
    // The engine stays: the source may still have to ask what became of it.
    ended.role = v1::ROLE_DESTINATION;
    ended.end = EndOf(incoming_->engine->outcome());
    ended.report = incoming_->engine->report();
    incoming_->waiter.join();
    incoming_->ended = true;
  } else {
    return std::nullopt;
  }
  vm_.SetMigration("");
  return ended;
}

void MigrationHost::ReportInterrupted(const v1::StartOutgoingCommand& command) {
  v1::SideReport report;
  report.set_migration_id(command.migration_id());
  report.set_vm(vm_.config().Get().spec().name());
  report.set_role(v1::ROLE_SOURCE);
  report.set_phase(v1::FAILED);
  report.set_handover(v1::IDLE);
  report.set_epoch(command.epoch());
  report.set_guest_running(vm_.state() == v1::Vm::RUNNING);
  report.set_done(true);
  report.set_reason(v1::SOURCE_SHIM_FAILED);
  report.set_message("the source's shim died before the handover; the guest goes on at the source");
  report.set_sequence(migration::FirstSequence());
  TakeReport(report);
}

std::string MigrationHost::active() const {
  if (outgoing_) return outgoing_->id;
  if (incoming_ && !incoming_->ended) return incoming_->id;
  return "";
}

void MigrationHost::TakeReport(const v1::SideReport& report) {
  {
    std::lock_guard lock(mutex_);
    reports_[{report.migration_id(), report.role()}] = report;
  }
  callbacks_.on_report(report);
}

std::vector<v1::SideReport> MigrationHost::Reports() const {
  std::lock_guard lock(mutex_);
  std::vector<v1::SideReport> reports;
  for (const auto& [key, report] : reports_) reports.push_back(report);
  // One that is under way last: whoever keeps only one keeps that.
  std::stable_partition(reports.begin(), reports.end(), [](const v1::SideReport& r) { return r.done(); });
  return reports;
}

void MigrationHost::Acknowledge(const v1::ReportAck& ack) {
  {
    std::lock_guard lock(mutex_);
    auto it = reports_.find({ack.migration_id(), ack.role()});
    if (it == reports_.end() || !it->second.done()) return;
    reports_.erase(it);
  }
  if (ack.role() != v1::ROLE_SOURCE || vm_.config().Get().outgoing().migration_id() != ack.migration_id())
    return;
  absl::Status status = vm_.config().Update([](v1::ShimConfig& c) { c.clear_outgoing(); });
  if (!status.ok()) LOG_WARN("{}", Message(status));
}

}  // namespace baton::shim
