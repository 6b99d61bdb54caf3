#include "tests/lab/vm/qmp_server.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>

#include "common/log.h"

namespace baton::lab {
namespace {

using nlohmann::json;

constexpr size_t kLongestLine = 1 << 20;
constexpr size_t kMostFds = 16;
constexpr Duration kGuestTime = std::chrono::seconds(60);
constexpr Duration kWriteTime = std::chrono::seconds(10);
// What the stream begins with, before the guest stands still; the state itself follows it.
constexpr char kPreamble[] = "baton-lab-guest state\n";

Deadline GuestDeadline() { return Deadline::After(kGuestTime); }

json Refusal(const std::string& words) { return {{"error", {{"class", "GenericError"}, {"desc", words}}}}; }
json Empty() { return {{"return", json::object()}}; }

absl::Status SendAll(int fd, const std::string& bytes) {
  const Deadline deadline = Deadline::After(kWriteTime);
  for (size_t done = 0; done < bytes.size();) {
    ssize_t n = ::send(fd, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n > 0) {
      done += static_cast<size_t>(n);
      continue;
    }
    if (errno == EINTR) continue;
    if (errno != EAGAIN) return ErrnoError(errno, "write");
    pollfd p{fd, POLLOUT, 0};
    if (::poll(&p, 1, deadline.PollTimeoutMs()) == 0) return absl::DeadlineExceededError("nobody reads");
  }
  return absl::OkStatus();
}

}  // namespace

QmpServer::QmpServer(UniqueFd listener, LabGuest& guest, bool incoming)
    : listener_(std::move(listener)), guest_(guest), run_state_(incoming ? "inmigrate" : "prelaunch") {}

std::vector<int> QmpServer::fds() const {
  std::vector<int> out{client_ ? client_.get() : listener_.get()};
  if (in_) out.push_back(in_.get());
  return out;
}

void QmpServer::Attend(int fd) {
  if (in_ && fd == in_.get()) return ReadState();
  if (client_) return ReadClient();
  Accept();
}

void QmpServer::Accept() {
  client_.reset(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!client_) return;
  buffer_.clear();
  Send({{"QMP",
         {{"version",
           {{"qemu", {{"major", kQemuMajor}, {"minor", kQemuMinor}, {"micro", kQemuMicro}}},
            {"package", "baton-lab-guest"}}},
          {"capabilities", json::array()}}}});
}

void QmpServer::ReadClient() {
  char chunk[8192];
  iovec iov{chunk, sizeof chunk};
  alignas(cmsghdr) char control[CMSG_SPACE(kMostFds * sizeof(int))];
  msghdr header{};
  header.msg_iov = &iov;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof control;
  ssize_t n = ::recvmsg(client_.get(), &header, MSG_CMSG_CLOEXEC);
  if (n < 0 && (errno == EINTR || errno == EAGAIN)) return;
  if (n <= 0) {
    client_.reset();
    arrived_.clear();
    return;
  }
  for (cmsghdr* c = CMSG_FIRSTHDR(&header); c; c = CMSG_NXTHDR(&header, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    for (size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof fd);
      arrived_.emplace_back(fd);
    }
  }
  buffer_.append(chunk, static_cast<size_t>(n));
  for (size_t eol; (eol = buffer_.find('\n')) != std::string::npos;) {
    const std::string line = buffer_.substr(0, eol);
    buffer_.erase(0, eol + 1);
    HandleLine(line);
  }
  if (buffer_.size() > kLongestLine) client_.reset();
}

void QmpServer::Send(const json& message) {
  if (!client_) return;
  if (!SendAll(client_.get(), message.dump(-1, ' ', false, json::error_handler_t::replace) + "\r\n").ok())
    client_.reset();
}

void QmpServer::Event(const std::string& name, json data) {
  const auto now = std::chrono::duration_cast<std::chrono::microseconds>(
                       std::chrono::system_clock::now().time_since_epoch())
                       .count();
  Send({{"timestamp", {{"seconds", now / 1000000}, {"microseconds", now % 1000000}}},
        {"event", name},
        {"data", std::move(data)}});
}

void QmpServer::HandleLine(const std::string& line) {
  const json message = json::parse(line, nullptr, /*allow_exceptions=*/false);
  json answer;
  if (message.is_discarded() || !message.is_object() || !message.contains("execute") ||
      !message["execute"].is_string()) {
    if (line.find_first_not_of(" \r\t") == std::string::npos) return;
    answer = Refusal("not a command");
  } else {
    const json arguments = message.value("arguments", json::object());
    // A missing argument or one of another type is an exception of the JSON library.
    try {
      answer = Execute(message["execute"].get<std::string>(), arguments);
    } catch (const json::exception& error) {
      answer =
          Refusal(fmt::format("arguments of {}: {}", message["execute"].get<std::string>(), error.what()));
    }
  }
  if (message.is_object() && message.contains("id")) answer["id"] = message["id"];
  Send(answer);
  for (const auto& work : std::exchange(later_, {})) work();
}

std::string QmpServer::RunState() const { return guest_.running() ? "running" : run_state_; }

json QmpServer::Execute(const std::string& command, const json& arguments) {
  if (command == "qmp_capabilities" || command == "migrate-set-parameters" || command == "announce-self")
    return Empty();
  if (command == "query-status") {
    return {{"return", {{"status", RunState()}, {"running", guest_.running()}, {"singlestep", false}}}};
  }
  if (command == "query-version") {
    return {{"return",
             {{"qemu", {{"major", kQemuMajor}, {"minor", kQemuMinor}, {"micro", kQemuMicro}}},
              {"package", "baton-lab-guest"}}}};
  }
  if (command == "query-migrate") {
    json info = json::object();
    if (migration_ != "none") info["status"] = migration_;
    if (!error_.empty()) info["error-desc"] = error_;
    return {{"return", info}};
  }
  // A migration is put away before it is said to have ended.
  if (command == "query-yank") return {{"return", json::array()}};
  if (command == "query-named-block-nodes") return {{"return", json::array()}};
  if (command == "migrate-set-capabilities") {
    if (migration_ == "active" || migration_ == "pre-switchover" || migration_ == "device")
      return Refusal("There's a migration process in progress");
    for (const json& item : arguments.at("capabilities"))
      capabilities_[item.at("capability").get<std::string>()] = item.at("state").get<bool>();
    return Empty();
  }
  if (command == "getfd") {
    if (arrived_.empty()) return Refusal("No file descriptor supplied via SCM_RIGHTS");
    fds_[arguments.at("fdname").get<std::string>()] = std::move(arrived_.front());
    arrived_.erase(arrived_.begin());
    return Empty();
  }
  if (command == "closefd") {
    if (fds_.erase(arguments.at("fdname").get<std::string>()) == 0)
      return Refusal("File descriptor not found");
    return Empty();
  }
  if (command == "migrate") {
    if (run_state_ == "inmigrate" && !guest_.running())
      return Refusal("Guest is waiting for an incoming migration");
    if (out_ || migration_ == "device") return Refusal("There's a migration process in progress");
    // Memory is not in the stream, and the guest is stopped before the state is asked for.
    if (!capabilities_["x-ignore-shared"] || !capabilities_["pause-before-switchover"])
      return Refusal("the lab guest migrates with x-ignore-shared and pause-before-switchover only");
    auto fd = TakeFd(arguments.at("uri").get<std::string>());
    if (!fd.ok()) return Refusal(Message(fd.status()));
    out_ = *std::move(fd);
    later_.emplace_back([this] { BeginMigration(); });
    return Empty();
  }
  if (command == "migrate-continue") return Continue();
  if (command == "migrate_cancel") return CancelMigration();
  if (command == "migrate-incoming") {
    if (run_state_ != "inmigrate") return Refusal("'-incoming' was not specified on the command line");
    auto fd = TakeFd(arguments.at("uri").get<std::string>());
    if (!fd.ok()) return Refusal(Message(fd.status()));
    in_ = *std::move(fd);
    state_.clear();
    later_.emplace_back([this] { SetMigration("active"); });
    return Empty();
  }
  if (command == "cont") return Cont();
  if (command == "stop") return StopGuest();
  if (command == "system_powerdown") {
    guest_.PowerDown();
    later_.emplace_back([this] { Event("POWERDOWN"); });
    return Empty();
  }
  if (command == "quit") {
    later_.emplace_back([this] { Shutdown("host-qmp-quit", false); });
    return Empty();
  }
  return {
      {"error", {{"class", "CommandNotFound"}, {"desc", "The command " + command + " has not been found"}}}};
}

absl::StatusOr<UniqueFd> QmpServer::TakeFd(const std::string& uri) {
  if (uri.rfind("fd:", 0) != 0) return absl::InvalidArgumentError("only fd: is known");
  auto found = fds_.find(uri.substr(3));
  if (found == fds_.end())
    return Error(absl::StatusCode::kNotFound, "No file descriptor named {}", uri.substr(3));
  UniqueFd fd = std::move(found->second);
  fds_.erase(found);
  return fd;
}

void QmpServer::SetMigration(const std::string& status) {
  migration_ = status;
  if (capabilities_["events"]) Event("MIGRATION", {{"status", status}});
}

void QmpServer::BeginMigration() {
  error_.clear();
  SetMigration("setup");
  SetMigration("active");
  was_running_ = guest_.running();
  // Bytes of the set-up stage, so that whoever reads the stream meets both.
  absl::Status status = SendAll(out_.get(), kPreamble);
  if (status.ok()) status = guest_.Pause(GuestDeadline());
  if (!status.ok()) return FailMigration(status);
  run_state_ = "finish-migrate";
  Event("STOP");
  SetMigration("pre-switchover");
}

json QmpServer::Continue() {
  if (migration_ != "pre-switchover") return Refusal("Migration not in expected state: " + migration_);
  later_.emplace_back([this] {
    SetMigration("device");
    auto state = guest_.Save(GuestDeadline());
    absl::Status status = state.ok() ? SendAll(out_.get(), *state) : state.status();
    if (!status.ok()) return FailMigration(status);
    out_.reset();
    run_state_ = "postmigrate";
    SetMigration("completed");
  });
  return Empty();
}

void QmpServer::FailMigration(const absl::Status& why) {
  LOG_ERROR("migration: {}", Message(why));
  error_ = Message(why);
  out_.reset();
  SetMigration("failed");
  if (was_running_ && guest_.Run(GuestDeadline()).ok()) Event("RESUME");
}

json QmpServer::CancelMigration() {
  if (out_) {
    later_.emplace_back([this] {
      SetMigration("cancelling");
      out_.reset();
      SetMigration("cancelled");
      // QEMU starts a guest again that it stopped for the migration.
      if (was_running_ && guest_.Run(GuestDeadline()).ok()) Event("RESUME");
    });
  }
  return Empty();
}

json QmpServer::Cont() {
  if (run_state_ == "inmigrate") return Refusal("Guest is waiting for an incoming migration");
  if (out_) return Refusal("Migration is not finalized yet");
  if (guest_.running()) return Empty();
  absl::Status status = guest_.Run(GuestDeadline());
  if (!status.ok()) return Refusal(Message(status));
  Event("RESUME");
  return Empty();
}

json QmpServer::StopGuest() {
  if (!guest_.running()) return Empty();
  absl::Status status = guest_.Pause(GuestDeadline());
  if (!status.ok()) return Refusal(Message(status));
  run_state_ = "paused";
  Event("STOP");
  return Empty();
}

void QmpServer::ReadState() {
  char chunk[65536];
  ssize_t n = ::recv(in_.get(), chunk, sizeof chunk, MSG_DONTWAIT);
  if (n < 0 && (errno == EINTR || errno == EAGAIN)) return;
  if (n > 0) state_.append(chunk, static_cast<size_t>(n));
  constexpr size_t kSkip = sizeof kPreamble - 1;
  const bool named = state_.size() >= kSkip;
  if (named && state_.compare(0, kSkip, kPreamble) == 0 && n > 0 && !LabGuest::Complete(state_.substr(kSkip)))
    return;
  if (!named && n > 0) return;
  in_.reset();
  absl::Status status = !named ? absl::DataLossError("the state ends before it begins")
                        : state_.compare(0, kSkip, kPreamble) != 0
                            ? absl::DataLossError("not the state of a lab guest")
                            : guest_.Load(state_.substr(kSkip), GuestDeadline());
  if (status.ok()) {
    run_state_ = "paused";
    return SetMigration("completed");
  }
  LOG_ERROR("incoming migration: {}", Message(status));
  error_ = Message(status);
  SetMigration("failed");
}

void QmpServer::Shutdown(const std::string& reason, bool by_guest) {
  Event("SHUTDOWN", {{"guest", by_guest}, {"reason", reason}});
  quit_ = true;
}

}  // namespace baton::lab
