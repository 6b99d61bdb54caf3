// The lab device's commands: JSON lines on a unix socket, or calls of Command(). docs/lab.md describes them.
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>

#include "common/log.h"
#include "tests/lab/device/lab_device.h"

namespace baton::lab {
namespace {

using nlohmann::json;

constexpr size_t kMaxLine = 64 << 10;
constexpr int64_t kMaxWaitMs = 3600 * 1000;

json Failed(const std::string& why) { return {{"ok", false}, {"error", why}}; }
json Answer(const absl::Status& status) { return status.ok() ? json{{"ok", true}} : Failed(Message(status)); }

// A message by its number, or by the name that RequestName gives.
std::optional<uint32_t> MessageId(const json& value) {
  if (value.is_number_integer() && value.get<int64_t>() >= 0) return value.get<uint32_t>();
  if (!value.is_string()) return std::nullopt;
  const auto name = value.get<std::string>();
  if (name.empty()) return 0;
  for (uint32_t id = 1; id < 64; ++id) {
    if (vhost::RequestName(id) == name) return id;
  }
  return std::nullopt;
}

}  // namespace

const std::vector<std::string>& CrashPoints() {
  static const std::vector<std::string> points = {
      "before_fetch",  "fetch_counter", "fetch_flag",  "fetch_entry", "after_fetch",   "before_io",
      "after_io",      "before_link",   "link_entry",  "link_head",   "link_position", "after_link",
      "after_publish", "clear_flag",    "after_clear", "recover"};
  return points;
}

LabDevice::LabDevice(LabDeviceOptions options, std::unique_ptr<DeviceModel> model)
    : options_(std::move(options)), model_(std::move(model)) {}

absl::StatusOr<std::unique_ptr<LabDevice>> LabDevice::Create(LabDeviceOptions options,
                                                             std::unique_ptr<DeviceModel> model) {
  std::unique_ptr<LabDevice> out(new LabDevice(std::move(options), std::move(model)));
  LabDevice* device = out.get();
  json faults = json::object();
  if (!out->options_.faults.crash_at.empty()) faults["crash_at"] = out->options_.faults.crash_at;
  RETURN_IF_ERROR(out->SetFaults(faults));
  ASSIGN_OR_RETURN(out->master_, EventLoop::Create());
  ASSIGN_OR_RETURN(out->loop_, EventLoop::Create());
  out->wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!out->wake_) return ErrnoError(errno, "eventfd");
  RETURN_IF_ERROR(out->master_->Watch(out->wake_.get(), [device] { device->RunPosted(); }));
  RETURN_IF_ERROR(out->master_->Watch(out->loop_->fd(),
                                      [device] { (void)device->loop_->Poll(Deadline::After(Duration(0))); }));
  if (!out->options_.control.empty()) {
    ASSIGN_OR_RETURN(out->control_, UnixListener::Listen(out->options_.control));
    RETURN_IF_ERROR(out->master_->Watch(out->control_.fd(), [device] { device->AcceptClient(); }));
  }
  out->loop_->OnTimer([device](Clock::time_point now) {
    device->tick_at_ = Clock::time_point::max();
    device->model_->Tick(now);
  });
  out->model_->Attach(device);
  ASSIGN_OR_RETURN(out->listener_, UnixListener::Listen(out->options_.socket));
  RETURN_IF_ERROR(out->loop_->Watch(out->listener_.fd(), [device] { device->AcceptFrontend(); }));
  return out;
}

LabDevice::~LabDevice() {
  // First of all: cancels what the storage does, which points into guest memory.
  model_.reset();
}

absl::Status LabDevice::Run(int stop_fd) {
  bool stopped = false;
  absl::Status result;
  if (stop_fd >= 0) RETURN_IF_ERROR(master_->Watch(stop_fd, [&] { stopped = true; }));
  try {
    while (!stopped && result.ok()) {
      result = master_->Poll(NextWaitEnd());
      if (!stopped) AfterEvents();
    }
    if (result.ok()) CloseFrontend("the device ends");
  } catch (const CrashNow& crash) {
    result = Error(absl::StatusCode::kAborted, "crashed at {}", crash.point);
    connection_.Close();
    listener_.Close();
  }
  if (stop_fd >= 0) master_->Unwatch(stop_fd);
  FailWaits();
  return result;
}

void LabDevice::AfterEvents() {
  if (!frozen_) {
    PublishAll();
    if (absl::Status answered = AnswerBases(); !answered.ok()) CloseFrontend(Message(answered));
    ServeStashed();
    PublishAll();
  }
  CheckWaits();
}

void LabDevice::TickAt(Clock::time_point when) {
  if (when != Clock::time_point::max() && when >= tick_at_) return;
  tick_at_ = when;
  loop_->SetTimer(when);
}

void LabDevice::Watch(int fd, std::function<void()> ready) {
  absl::Status watched = loop_->Watch(fd, std::move(ready));
  if (!watched.ok()) LOG_ERROR("{}", Message(watched));
}

void LabDevice::CrashPoint(const char* name) {
  const LabFaults& faults = options_.faults;
  if (faults.crash_at.empty() || faults.crash_at != name) return;
  if (++crash_passed_ >= faults.crash_after) Crash(name);
}

void LabDevice::Crash(const std::string& point) {
  if (!options_.crash_kills) throw CrashNow{point};
  ::kill(::getpid(), SIGKILL);
  for (;;) ::pause();
}

nlohmann::json LabDevice::Command(const json& command) {
  auto posted = std::make_shared<Posted>();
  posted->command = command;
  std::future<json> answer = posted->answer.get_future();
  {
    std::lock_guard lock(mutex_);
    if (ended_) return Failed("the device has ended");
    posted_.push_back(posted);
  }
  const uint64_t one = 1;
  if (::write(wake_.get(), &one, sizeof one) < 0) return Failed("cannot wake the device");
  return answer.get();
}

void LabDevice::RunPosted() {
  uint64_t count;
  if (::read(wake_.get(), &count, sizeof count) < 0 && errno != EAGAIN) return;
  std::deque<std::shared_ptr<Posted>> posted;
  {
    std::lock_guard lock(mutex_);
    posted.swap(posted_);
  }
  while (!posted.empty()) {
    auto next = std::move(posted.front());
    posted.pop_front();
    try {
      Dispatch(next->command, [next](json answer) { next->answer.set_value(std::move(answer)); });
    } catch (...) {
      next->answer.set_value(Failed("the device crashed"));
      throw;
    }
  }
}

void LabDevice::Dispatch(const json& command, std::function<void(json)> answer) {
  if (!command.is_object() || !command.contains("cmd") || !command["cmd"].is_string()) {
    answer(Failed("a command is an object with \"cmd\""));
    return;
  }
  if (command["cmd"] != "wait") {
    answer(RunCommand(command));
    return;
  }
  const json timeout = command.value("timeout_ms", json(5000));
  const bool counted = command.contains("counter") && command["counter"].is_string();
  if (!counted || !timeout.is_number_integer() || timeout.get<int64_t>() < 0 ||
      timeout.get<int64_t>() > kMaxWaitMs) {
    answer(Failed("wait: \"counter\" is a name, \"timeout_ms\" a number up to an hour"));
    return;
  }
  for (const char* bound : {"at_least", "at_most", "equals"}) {
    if (command.contains(bound) && !command[bound].is_number_integer()) {
      answer(Failed(fmt::format("wait: \"{}\" is a number", bound)));
      return;
    }
  }
  waits_.push_back(
      {command, Deadline::After(std::chrono::milliseconds(timeout.get<int64_t>())), std::move(answer)});
}

bool LabDevice::WaitMet(const Wait& wait) {
  const int64_t value = counters_[wait.command["counter"].get<std::string>()];
  const json& c = wait.command;
  return (!c.contains("at_least") || value >= c["at_least"].get<int64_t>()) &&
         (!c.contains("at_most") || value <= c["at_most"].get<int64_t>()) &&
         (!c.contains("equals") || value == c["equals"].get<int64_t>());
}

void LabDevice::CheckWaits() {
  for (size_t i = 0; i < waits_.size();) {
    const bool met = WaitMet(waits_[i]);
    if (!met && !waits_[i].deadline.Expired()) {
      ++i;
      continue;
    }
    Wait wait = std::move(waits_[i]);
    waits_.erase(waits_.begin() + static_cast<ptrdiff_t>(i));
    const auto name = wait.command["counter"].get<std::string>();
    json answer = met ? json{{"ok", true}} : Failed(fmt::format("{} is {}", name, counters_[name]));
    answer["value"] = counters_[name];
    wait.answer(std::move(answer));
  }
}

void LabDevice::FailWaits() {
  std::deque<std::shared_ptr<Posted>> posted;
  {
    std::lock_guard lock(mutex_);
    ended_ = true;
    posted.swap(posted_);
  }
  for (auto& p : posted) p->answer.set_value(Failed("the device has ended"));
  std::vector<Wait> waits;
  waits.swap(waits_);
  for (Wait& wait : waits) wait.answer(Failed("the device has ended"));
}

Deadline LabDevice::NextWaitEnd() const {
  Deadline end = Deadline::After(std::chrono::hours(1));
  for (const Wait& wait : waits_) end = end.Min(wait.deadline);
  return end;
}

json LabDevice::RunCommand(const json& command) {
  const auto name = command["cmd"].get<std::string>();
  json settings = command;
  settings.erase("cmd");
  if (name == "stats") return Stats();
  if (name == "set") return Answer(SetFaults(settings));
  if (!settings.empty()) return Failed(fmt::format("{} takes no \"{}\"", name, settings.begin().key()));
  if (name == "freeze" || name == "thaw") {
    const bool freeze = name == "freeze";
    if (freeze == frozen_) return Answer(absl::OkStatus());
    frozen_ = freeze;
    if (freeze) {
      master_->Unwatch(loop_->fd());
      return Answer(absl::OkStatus());
    }
    return Answer(master_->Watch(loop_->fd(), [this] { (void)loop_->Poll(Deadline::After(Duration(0))); }));
  }
  if (name == "crash") Crash("command");
  if (name == "disconnect") {
    CloseFrontend("commanded");
    return Answer(absl::OkStatus());
  }
  if (name == "config_changed") {
    ConfigChanged();
    return Answer(absl::OkStatus());
  }
  return Failed(fmt::format("no command {}", name));
}

json LabDevice::Stats() {
  json rings = json::array();
  for (const auto& [index, ring] : rings_) {
    json r = {{"index", index},          {"size", ring.size},     {"running", ring.started && !ring.stopping},
              {"enabled", ring.enabled}, {"broken", ring.broken}, {"in_flight", ring.outstanding}};
    if (ring.queue) r["base"] = ring.queue->base();
    rings.push_back(std::move(r));
  }
  return {{"ok", true},
          {"counters", counters_},
          {"rings", rings},
          {"features", features_},
          {"protocol", protocol_},
          {"status", status_},
          {"frozen", frozen_},
          {"model", model_->Describe()}};
}

absl::Status LabDevice::SetFaults(const json& settings) {
  LabFaults next = options_.faults;
  json for_model = json::object();
  std::optional<bool> in_order;
  for (const auto& [key, value] : settings.items()) {
    uint32_t* message = key == "silent_at"       ? &next.silent_at
                        : key == "lose_reply_at" ? &next.lose_reply_at
                        : key == "garble_at"     ? &next.garble_at
                        : key == "refuse_at"     ? &next.refuse_at
                        : key == "disconnect_at" ? &next.disconnect_at
                                                 : nullptr;
    auto bad = [&, key = key, value = value] {
      return Error(absl::StatusCode::kInvalidArgument, "{} cannot be {}", key, value.dump());
    };
    if (message) {
      const auto id = MessageId(value);
      if (!id) return bad();
      *message = *id;
    } else if (key == "crash_at") {
      if (!value.is_string()) return bad();
      next.crash_at = value.get<std::string>();
      const auto& points = CrashPoints();
      if (!next.crash_at.empty() && std::find(points.begin(), points.end(), next.crash_at) == points.end()) {
        return bad();
      }
    } else if (key == "crash_after") {
      if (!value.is_number_integer() || value.get<int64_t>() < 1) return bad();
      next.crash_after = value.get<uint64_t>();
    } else if (key == "base_offset") {
      if (!value.is_number_integer()) return bad();
      next.base_offset = value.get<int32_t>();
    } else if (key == "in_order") {
      if (!value.is_boolean()) return bad();
      in_order = value.get<bool>();
    } else if (key == "drains") {
      if (!value.is_boolean()) return bad();
      options_.drains = value.get<bool>();
    } else {
      for_model[key] = value;
    }
  }
  RETURN_IF_ERROR(model_->Set(for_model));
  options_.faults = next;
  crash_passed_ = 0;
  if (in_order && *in_order != options_.in_order) {
    options_.in_order = *in_order;
    for (auto& [index, ring] : rings_) {
      if (!ring.queue || !(features_ & virtio::kFPartialOrder)) continue;
      ring.queue->SetOrdering(*in_order ? virtio::Ordering::kInOrder : virtio::Ordering::kAsCompleted);
      MarkForPublishing(ring);
    }
  }
  return absl::OkStatus();
}

void LabDevice::AcceptClient() {
  auto fd = control_.Accept();
  if (!fd.ok() || !*fd) return;
  const int raw = fd->get();
  clients_[raw] = {*std::move(fd), ++client_serial_, {}};
  if (!master_->Watch(raw, [this, raw] { ReadClient(raw); }).ok()) clients_.erase(raw);
}

void LabDevice::ReadClient(int fd) {
  char buffer[4096];
  const ssize_t n = ::recv(fd, buffer, sizeof buffer, MSG_DONTWAIT);
  if (n < 0 && errno == EAGAIN) return;
  Client& client = clients_[fd];
  if (n > 0) client.input.append(buffer, static_cast<size_t>(n));
  if (n <= 0 || client.input.size() > kMaxLine) {
    master_->Unwatch(fd);
    clients_.erase(fd);
    return;
  }
  // A command may end the client; what it said before still counts.
  std::vector<std::string> lines;
  for (size_t end; (end = client.input.find('\n')) != std::string::npos;) {
    lines.push_back(client.input.substr(0, end));
    client.input.erase(0, end + 1);
  }
  const uint64_t serial = client.serial;
  for (const std::string& line : lines) {
    const json command = json::parse(line, nullptr, /*allow_exceptions=*/false);
    auto answer = [this, fd, serial](const json& a) { AnswerClient(fd, serial, a); };
    if (command.is_discarded()) {
      answer(Failed("not JSON"));
    } else {
      Dispatch(command, answer);
    }
  }
}

void LabDevice::AnswerClient(int fd, uint64_t serial, const json& answer) {
  auto it = clients_.find(fd);
  if (it == clients_.end() || it->second.serial != serial) return;  // gone before its answer
  const std::string line = answer.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
  // Answers fit into the socket's buffer; a client that lets them pile up is dropped.
  if (::send(fd, line.data(), line.size(), MSG_NOSIGNAL | MSG_DONTWAIT) ==
      static_cast<ssize_t>(line.size())) {
    return;
  }
  master_->Unwatch(fd);
  clients_.erase(it);
}

}  // namespace baton::lab
