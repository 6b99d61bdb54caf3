// Stands in for baton-shim in tests of the agent: the same files, journal and control socket, and a process
// that plays the VMM, but no guest. A test moves it through a migration by "retune" requests:
//   bandwidth 1: YIELDED in the journal, 2: OWNER(epoch + 1), 3: a running report, 4: the final report
//   RELEASED, 5: the final report FAILED of a source.
// BATON_FAKE_SHIM in the environment makes it misbehave: "exit", "hang", "stopped", "blocker", "stubborn"
// (does not stop).
// That of a domain has a migration to here behind it, which was refused, and says so to whoever subscribes
// until that is acknowledged. Misbehaving, it hears the first acknowledgement too late ("busy"), or ends at
// it
// ("mortal").
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "agent/migration/journal.h"
#include "baton/v1/shim.pb.h"
#include "common/durable_file.h"
#include "common/message_socket.h"
#include "common/process.h"
#include "common/unix_socket.h"

namespace baton {
namespace {

using Kind = migration::JournalRecord::Kind;

class FakeShim {
 public:
  explicit FakeShim(std::string dir) : dir_(std::move(dir)) {
    if (const char* mode = std::getenv("BATON_FAKE_SHIM")) behaviour_ = mode;
  }

  int Run() {
    if (!ReadMessage(dir_ + "/shim.conf", &conf_).ok()) return 2;
    if (behaviour_ == "exit") {
      std::fprintf(stderr, "the fake shim was told to fail\n");
      return 1;
    }
    auto journal = migration::Journal::Open(dir_ + "/journal");
    if (!journal.ok()) {
      std::fprintf(stderr, "%s\n", Message(journal.status()).c_str());
      return 3;
    }
    journal_ = *std::move(journal);
    if (!StartVmm()) return 4;
    if (behaviour_ == "hang") ::pause();
    auto listener = UnixListener::Listen(conf_.run_dir() + "/shim.sock");
    if (!listener.ok()) return 5;
    while (WaitFd(listener->fd(), 1 /* POLLIN */, Deadline::After(std::chrono::hours(1)), "accept").ok()) {
      auto fd = listener->Accept();
      if (!fd.ok() || !fd->valid()) continue;
      std::thread([this, socket = std::make_shared<MessageSocket>(*std::move(fd))] {
        Serve(*socket);
      }).detach();
    }
    return 6;
  }

 private:
  void Append(Kind kind, uint64_t epoch, const std::string& migration) {
    migration::JournalRecord record;
    record.kind = kind;
    record.epoch = epoch;
    record.migration = migration;
    absl::Status status = journal_->Append(record);
    if (!status.ok()) std::fprintf(stderr, "%s\n", Message(status).c_str());
  }

  bool StartVmm() {
    if (conf_.mode() == v1::ShimConfig::DOMAIN) {
      state_ = v1::Vm::RUNNING;
      migration_ = conf_.migration_id();
      return true;
    }
    bool adopt = conf_.mode() == v1::ShimConfig::ADOPT;
    if (adopt) {
      state_ = v1::Vm::RUNNING;
      migration_ = conf_.migration_id();
      return true;
    }
    // Carries the argument by which the agent finds a VMM that nobody wrote down.
    SpawnOptions options;
    options.argv = {"/proc/self/exe", "--vmm", "mem-path=" + conf_.memory_path()};
    auto vmm = SpawnDetached(options);
    if (!vmm.ok()) return false;
    conf_.set_vmm_pid(static_cast<uint64_t>(vmm->pid));
    conf_.set_vmm_start_time(vmm->start_time);
    if (!WriteMessageDurable(dir_ + "/shim.conf", conf_).ok()) return false;
    if (conf_.mode() == v1::ShimConfig::FRESH) {
      Append(Kind::kOwner, conf_.epoch(), "");
      state_ = v1::Vm::RUNNING;
    } else {
      migration_ = conf_.migration_id();
      Append(Kind::kIncoming, conf_.epoch(), migration_);
      state_ = v1::Vm::INCOMING;
    }
    if (behaviour_ == "stopped") state_ = v1::Vm::STOPPED;
    return true;
  }

  void EndVmm() {
    (void)KillProcess({static_cast<pid_t>(conf_.vmm_pid()), conf_.vmm_start_time()},
                      Deadline::After(std::chrono::seconds(5)));
    state_ = v1::Vm::STOPPED;
  }

  v1::ShimStatus Status() {
    v1::ShimStatus status;
    status.set_pid(static_cast<uint64_t>(::getpid()));
    status.mutable_vm()->set_state(state_);
    status.mutable_vm()->set_vmm_pid(conf_.vmm_pid());
    status.mutable_vm()->set_epoch(conf_.epoch());
    if (state_ == v1::Vm::STOPPED) status.mutable_vm()->set_message("the fake VMM says no");
    status.set_incoming_ready(state_ == v1::Vm::INCOMING && behaviour_ != "blocker");
    if (behaviour_ == "blocker") {
      v1::Finding* finding = status.add_findings();
      finding->set_severity(v1::BLOCKER);
      finding->set_subject("device disk0");
      finding->set_message("is not to the fake shim's taste");
    }
    return status;
  }

  void Publish(const v1::ShimReply& event) {
    for (MessageSocket* subscriber : subscribers_)
      (void)subscriber->Send(event, Deadline::After(std::chrono::seconds(1)));
  }

  void PublishStatus() {
    v1::ShimReply event;
    *event.mutable_event_status() = Status();
    Publish(event);
  }

  void Report(v1::Role role, v1::Phase phase, v1::HandoverState handover, bool done, v1::Reason reason) {
    v1::ShimReply event;
    v1::SideReport* report = event.mutable_event_report();
    report->set_migration_id(migration_);
    report->set_vm(conf_.spec().name());
    report->set_role(role);
    report->set_phase(phase);
    report->set_handover(handover);
    report->set_done(done);
    report->set_reason(reason);
    report->set_sequence(++sequence_);
    Publish(event);
  }

  void Retune(const v1::RetuneCommand& command) {
    if (!command.migration_id().empty()) migration_ = command.migration_id();
    switch (command.bandwidth()) {
      case 1:
        return Append(Kind::kYielded, conf_.epoch(), migration_);
      case 2:
        state_ = v1::Vm::RUNNING;
        conf_.set_epoch(conf_.epoch() + 1);
        return Append(Kind::kOwner, conf_.epoch(), migration_);
      case 3:
        return Report(v1::ROLE_SOURCE, v1::PRECOPY, v1::IDLE, false, v1::REASON_UNSPECIFIED);
      case 4:
        EndVmm();
        Append(Kind::kReleased, conf_.epoch(), migration_);
        Report(v1::ROLE_SOURCE, v1::SUCCEEDED, v1::RELEASED, true, v1::NONE);
        return PublishStatus();
      case 5:
        return Report(v1::ROLE_SOURCE, v1::FAILED, v1::IDLE, true, v1::PEER_CONNECTION_FAILED);
      default:
        return;
    }
  }

  void Acknowledge(const v1::ReportAck& ack) {
    if (ack.migration_id() != conf_.migration_id() || ack.role() != v1::ROLE_DESTINATION) return;
    const std::string mark = dir_ + "/acknowledged";
    const bool first = ::access(mark.c_str(), F_OK) != 0;
    (void)WriteFileDurable(mark, "");
    if (first && behaviour_ == "mortal") ::_exit(1);
    // Longer than the agent waits for the answer.
    if (first && behaviour_ == "busy") std::this_thread::sleep_for(std::chrono::milliseconds(2300));
    conf_.clear_migration_id();
    (void)WriteMessageDurable(dir_ + "/shim.conf", conf_);
  }

  // True: reply, then exit.
  bool Handle(const v1::ShimRequest& request, std::vector<UniqueFd>& fds, MessageSocket& socket,
              v1::ShimReply& reply) {
    switch (request.body_case()) {
      case v1::ShimRequest::kStatus:
        *reply.mutable_status() = Status();
        return false;
      case v1::ShimRequest::kSubscribe: {
        subscribers_.push_back(&socket);
        v1::ShimReply event;
        *event.mutable_event_status() = Status();
        (void)socket.Send(event, Deadline::After(std::chrono::seconds(1)));
        if (conf_.mode() == v1::ShimConfig::DOMAIN && !conf_.migration_id().empty())
          Report(v1::ROLE_DESTINATION, v1::FAILED, v1::REFUSED, true, v1::PEER_CONNECTION_FAILED);
        return false;
      }
      case v1::ShimRequest::kReportAck:
        if (conf_.mode() == v1::ShimConfig::DOMAIN) Acknowledge(request.report_ack());
        return false;
      case v1::ShimRequest::kInspect:
        reply.mutable_inspection()->set_vmm_version("QEMU emulator version 7.2.22");
        return false;
      case v1::ShimRequest::kStartOutgoing:
        migration_ = request.start_outgoing().migration_id();
        Report(v1::ROLE_SOURCE, v1::PRECOPY, v1::IDLE, false, v1::REASON_UNSPECIFIED);
        return false;
      case v1::ShimRequest::kRetune:
        Retune(request.retune());
        return false;
      case v1::ShimRequest::kAcceptChannel: {
        if (fds.size() != 1) {
          reply.set_code(3);
          return false;
        }
        std::string text = "served by " + conf_.spec().name() + "\n";
        (void)!::send(fds[0].get(), text.data(), text.size(), MSG_NOSIGNAL);
        return false;
      }
      case v1::ShimRequest::kStop:
        if (behaviour_ == "stubborn" && !request.stop().force()) {
          reply.set_code(4);
          reply.set_message("the guest does not power off");
          return false;
        }
        EndVmm();
        return true;
      case v1::ShimRequest::kAbortIncoming:
        if (state_ != v1::Vm::INCOMING) {
          reply.set_code(9);
          reply.set_message("owns the guest");
          return false;
        }
        Append(Kind::kRefused, conf_.epoch(), migration_);
        EndVmm();
        Report(v1::ROLE_DESTINATION, v1::FAILED, v1::REFUSED, true, v1::CANCELLED_BY_REQUEST);
        return true;
      case v1::ShimRequest::kRetire:
        return true;
      default:
        return false;
    }
  }

  void Serve(MessageSocket& socket) {
    while (true) {
      v1::ShimRequest request;
      std::vector<UniqueFd> fds;
      absl::Status got = socket.Receive(request, Deadline::After(std::chrono::hours(1)), &fds);
      if (!got.ok()) break;
      std::lock_guard lock(mutex_);
      v1::ShimReply reply;
      reply.set_id(request.id());
      bool exit = Handle(request, fds, socket, reply);
      (void)socket.Send(reply, Deadline::After(std::chrono::seconds(1)));
      if (exit) ::_exit(0);
    }
    std::lock_guard lock(mutex_);
    std::erase(subscribers_, &socket);
  }

  const std::string dir_;
  std::string behaviour_;
  v1::ShimConfig conf_;
  std::unique_ptr<migration::Journal> journal_;
  std::mutex mutex_;
  std::vector<MessageSocket*> subscribers_;
  v1::Vm::State state_ = v1::Vm::STARTING;
  std::string migration_;
  uint64_t sequence_ = 0;
};

}  // namespace
}  // namespace baton

int main(int argc, char** argv) {
  ::signal(SIGPIPE, SIG_IGN);
  if (argc != 3) return 64;
  if (std::string(argv[1]) == "--vmm") return ::pause();
  return baton::FakeShim(argv[2]).Run();
}
