#include "client/ctl/top.h"

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <map>
#include <optional>
#include <sstream>

#include "client/ctl/context.h"
#include "client/ctl/exit_codes.h"
#include "client/ctl/show.h"
#include "client/ctl/table.h"
#include "client/ctl/terminal.h"
#include "client/ctl/text.h"
#include "client/lib/units.h"

namespace baton::client {
namespace {

void Append(const Table& table, std::vector<std::string>* lines) {
  std::istringstream text(table.Render());
  std::string line;
  while (std::getline(text, line)) lines->push_back(line);
}

// Memory of a host in use, as a bar of ten.
std::string MemoryBar(const v1::Host& host, bool ascii) {
  if (host.memory_total() == 0) return "";
  uint64_t used = host.memory_total() - std::min(host.memory_free(), host.memory_total());
  double part = static_cast<double>(used) / static_cast<double>(host.memory_total());
  std::string bar;
  for (int i = 0; i < 10; ++i) bar += i < part * 10 - 0.5 ? (ascii ? "#" : "█") : (ascii ? "." : "░");
  return fmt::format("{} {:>3.0f} % of {}", bar, part * 100, FormatBytes(host.memory_total()));
}

}  // namespace

std::vector<std::string> RenderTop(const TopView& view, size_t columns, size_t rows, bool ascii) {
  std::vector<std::string> lines;
  size_t running = 0;
  std::map<std::string, int> outgoing, incoming;
  std::vector<const v1::Migration*> active, ended;
  for (const auto& m : view.migrations) {
    if (HasEnded(m)) {
      ended.push_back(&m);
      continue;
    }
    active.push_back(&m);
    ++outgoing[m.source()];
    ++incoming[m.destination()];
  }
  for (const auto& vm : view.vms) running += vm.state() == v1::Vm::RUNNING;
  size_t connected = 0;
  for (const auto& host : view.hosts) connected += host.connected();
  lines.push_back(fmt::format("baton {}  hosts {}/{} up  VMs {}/{} running  migrations {}", view.server,
                              connected, view.hosts.size(), running, view.vms.size(), active.size()));
  if (!view.problem.empty()) lines.push_back("! " + Harmless(view.problem));
  lines.emplace_back();

  Table hosts({"HOST", "STATE", "VMS", "OUT", "IN", "MEMORY IN USE", "LAST SEEN"});
  for (const auto& host : view.hosts) {
    std::string state = !host.connected() ? "UNREACHABLE" : host.cordoned() ? "CORDONED" : "READY";
    hosts.AddRow({ShortName(host.name()), state, std::to_string(host.vm_count()),
                  std::to_string(outgoing[host.name()]), std::to_string(incoming[host.name()]),
                  MemoryBar(host, ascii), FormatAge(host.last_seen(), view.now_ns / 1000000000)});
  }
  Append(hosts, &lines);

  if (!active.empty()) {
    lines.emplace_back();
    Table table(
        {"MIGRATION", "VM", "FROM", "TO", "PHASE", "ROUND", "DONE", "RATE", "DIRTIED", "BLACKOUT", "FOR"});
    for (const auto* m : active) {
      const auto& p = m->progress();
      int64_t start = ToNs(m->create_time());
      table.AddRow({ShortName(m->name()), ShortName(m->vm()), ShortName(m->source()),
                    ShortName(m->destination()), v1::Phase_Name(m->phase()), std::to_string(p.round()),
                    PercentOf(*m), FormatRate(p.rate()), FormatRate(p.dirty_rate()),
                    p.has_forecast_downtime() ? FormatDuration(p.forecast_downtime()) : "",
                    start > 0 && view.now_ns > start ? FormatDuration(Duration(view.now_ns - start)) : ""});
    }
    Append(table, &lines);
  }
  if (!ended.empty()) {
    lines.emplace_back();
    Table table({"ENDED", "VM", "FROM", "TO", "OUTCOME", "BLACKOUT", "GUEST", "AGO"});
    for (size_t i = 0; i < std::min<size_t>(ended.size(), 5); ++i) {
      const auto* m = ended[i];
      std::string outcome = v1::Phase_Name(m->phase());
      if (m->phase() == v1::FAILED) outcome += " " + v1::Reason_Name(m->reason());
      table.AddRow({ShortName(m->name()), ShortName(m->vm()), ShortName(m->source()),
                    ShortName(m->destination()), outcome, BlackoutOf(*m),
                    v1::GuestLocation_Name(m->guest_location()),
                    FormatAge(m->end_time(), view.now_ns / 1000000000)});
    }
    Append(table, &lines);
  }
  // VMs last: they are the longest list, and the one that a small window may cut.
  if (!view.vms.empty()) {
    lines.emplace_back();
    Append(VmTable(view.vms, false, view.now_ns / 1000000000), &lines);
  }
  if (rows > 0 && lines.size() > rows) lines.resize(rows);
  if (columns > 0) {
    for (auto& line : lines) line = Truncate(line, columns, ascii);
  }
  return lines;
}

namespace {

// Reads the fleet; what cannot be read leaves the old figures and says why.
void Refresh(Client* client, TopView* view) {
  view->now_ns = NowNs();
  view->problem.clear();
  auto hosts = client->ListHosts();
  auto vms = hosts.ok() ? client->ListVms() : absl::StatusOr<std::vector<v1::Vm>>(hosts.status());
  auto migrations =
      vms.ok() ? client->ListMigrations("", 50) : absl::StatusOr<Client::MigrationList>(vms.status());
  if (!migrations.ok()) {
    view->problem = Message(migrations.status());
    return;
  }
  view->hosts = *std::move(hosts);
  view->vms = *std::move(vms);
  view->migrations = std::move(migrations->migrations);
}

// The alternate screen for as long as it lives: what was on the terminal comes back.
class AlternateScreen {
 public:
  AlternateScreen() { Print("\x1b[?1049h\x1b[?25l").IgnoreError(); }
  ~AlternateScreen() { Print("\x1b[?25h\x1b[?1049l").IgnoreError(); }
  AlternateScreen(const AlternateScreen&) = delete;
  AlternateScreen& operator=(const AlternateScreen&) = delete;
};

void Draw(const TopView& view) {
  TerminalSize size = SizeOf(STDOUT_FILENO);
  auto lines =
      RenderTop(view, static_cast<size_t>(size.columns), static_cast<size_t>(size.rows) - 1, !LocaleIsUtf8());
  std::string frame = "\x1b[H";
  for (const auto& line : lines) frame += line + "\x1b[K\r\n";
  frame += "\x1b[J\x1b[" + std::to_string(size.rows) + ";1H\x1b[2mq leaves\x1b[0m\x1b[K";
  Print(frame).IgnoreError();
}

// Waits for the next refresh. True: leave, with `*code`.
bool LeaveBefore(Signals* signals, Deadline refresh, const TopView& view, int* code) {
  bool keys = IsTerminal(STDIN_FILENO);
  while (!refresh.Expired()) {
    pollfd fds[] = {{signals->fd(), POLLIN, 0}, {keys ? STDIN_FILENO : -1, POLLIN, 0}};
    if (poll(fds, 2, refresh.PollTimeoutMs()) <= 0) continue;
    if (fds[1].revents != 0) {
      char key = 0;
      if (::read(STDIN_FILENO, &key, 1) <= 0) return true;
      if (key == 'q' || key == 'Q') return true;
      if (key == 0x03) {
        *code = kExitInterrupted;
        return true;
      }
    }
    while (auto signal = signals->Next()) {
      if (*signal == SIGWINCH) {
        Draw(view);
        continue;
      }
      *code = 128 + *signal;
      return true;
    }
  }
  return false;
}

absl::StatusOr<int> Top(Context& context, const std::string& interval_text, bool once) {
  ASSIGN_OR_RETURN(Duration interval, DurationOption("--interval", interval_text));
  if (interval < std::chrono::milliseconds(100)) {
    return Error(absl::StatusCode::kInvalidArgument, "--interval {}: at least 100ms", interval_text);
  }
  ASSIGN_OR_RETURN(Client * client, context.Connect());
  TopView view;
  view.server = client->options().server;
  bool terminal = IsTerminal(STDOUT_FILENO);
  if (once || !terminal) {
    Refresh(client, &view);
    if (!view.problem.empty()) return client->ListHosts().status();
    std::string out;
    for (const auto& line : RenderTop(view, OutputWidth(), 0, !LocaleIsUtf8())) out += line + "\n";
    RETURN_IF_ERROR(Print(out));
    return kExitOk;
  }
  Signals signals({SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH});
  AlternateScreen screen;
  std::optional<RawMode> raw;
  if (IsTerminal(STDIN_FILENO)) {
    ASSIGN_OR_RETURN(RawMode mode, RawMode::Enter(STDIN_FILENO));
    raw.emplace(std::move(mode));
  }
  int code = kExitOk;
  while (true) {
    Refresh(client, &view);
    Draw(view);
    if (LeaveBefore(&signals, Deadline::After(interval), view, &code)) return code;
  }
}

}  // namespace

void AddTopCommand(CLI::App* app, Context* context) {
  struct Options {
    std::string interval = "1s";
    bool once = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = app->add_subcommand("top", "Live view of hosts, migrations and VMs; q leaves");
  command->add_option("--interval", o->interval, "Time between refreshes (1s)")->option_text("DURATION");
  command->add_flag("--once", o->once, "Print it once and leave (always in a pipe)");
  command->callback([=] { context->action = [o](Context& c) { return Top(c, o->interval, o->once); }; });
}

}  // namespace baton::client
