#include "client/ctl/show.h"

#include <algorithm>

#include "client/ctl/exit_codes.h"
#include "client/ctl/show_domain.h"
#include "client/ctl/text.h"
#include "client/lib/errors.h"
#include "client/lib/names.h"
#include "client/lib/units.h"
#include "common/vm_spec.h"

namespace baton::client {
namespace {

std::string StateOf(const v1::Host& host) {
  if (!host.connected()) return "UNREACHABLE";
  return host.cordoned() ? "CORDONED" : "READY";
}

std::string StateOf(const v1::Device& device) {
  switch (device.state()) {
    case v1::Device::IDLE_DEVICE:
      return "IDLE";
    case v1::Device::STOPPED_DEVICE:
      return "STOPPED";
    case v1::Device::STATE_UNSPECIFIED:
      return "UNKNOWN";
    default:
      return v1::Device::State_Name(device.state());
  }
}

std::string StateOf(const v1::Vm& vm) {
  return vm.state() == v1::Vm::STATE_UNSPECIFIED ? "UNKNOWN" : v1::Vm::State_Name(vm.state());
}

// "queue error x3, 2m ago, 4 requests held"; empty without any.
std::string EventOf(const v1::Device& device, int64_t now) {
  if (device.events() == 0) return "";
  const v1::DeviceEvent& event = device.last_event();
  std::string out = event.kind() == v1::DeviceEvent::QUEUE_ERROR ? "queue error" : "event";
  if (device.events() > 1) out += fmt::format(" x{}", device.events());
  out += fmt::format(", {} ago", FormatAge(event.time(), now));
  if (event.held() > 0) out += fmt::format(", {} requests held", event.held());
  return out;
}

std::string Joined(const std::vector<std::string>& parts, const std::string& separator) {
  std::string out;
  for (const auto& part : parts) out += (out.empty() ? "" : separator) + part;
  return out;
}

// "Label:      value" lines, values aligned.
class Paragraph {
 public:
  void Add(const std::string& label, const std::string& value) {
    if (!value.empty()) lines_.emplace_back(label, value);
  }
  std::string Render() const {
    size_t width = 0;
    for (const auto& [label, value] : lines_) width = std::max(width, DisplayWidth(label));
    std::string out;
    for (const auto& [label, value] : lines_) {
      std::string text = Harmless(value);
      // Continuation lines stand under the value.
      std::string indent = "\n" + std::string(width + 3, ' ');
      for (size_t at = 0; (at = text.find('\n', at)) != std::string::npos; at += indent.size()) {
        text.replace(at, 1, indent);
      }
      out += PadRight(label + ":", width + 1) + "  " + text + "\n";
    }
    return out;
  }

 private:
  std::vector<std::pair<std::string, std::string>> lines_;
};

std::string Indented(const std::string& text) {
  std::string out;
  size_t begin = 0;
  while (begin < text.size()) {
    size_t end = text.find('\n', begin);
    if (end == std::string::npos) end = text.size();
    out += "  " + text.substr(begin, end - begin) + "\n";
    begin = end + 1;
  }
  return out;
}

// "drain, class:net=handoff, disk0=drain", as the option --inflight takes it.
std::string InflightOf(const v1::MigrationParams& params) {
  auto word = [](v1::InflightAnswer answer) { return answer == v1::HANDOFF ? "handoff" : "drain"; };
  std::string out = word(params.inflight());
  for (const v1::InflightRule& rule : params.inflight_rules()) {
    const std::string subject = !rule.device().empty()
                                    ? rule.device()
                                    : std::string("class:") + (rule.class_() == v1::BLK ? "blk" : "net");
    out += Harmless(fmt::format(", {}={}", subject, word(rule.answer())));
  }
  return out;
}

std::string LimitsOf(const v1::MigrationParams& params) {
  Paragraph p;
  p.Add("max downtime", params.has_max_downtime() ? FormatDuration(params.max_downtime()) : "");
  p.Add("max duration", params.has_max_duration() ? FormatDuration(params.max_duration()) : "");
  p.Add("bandwidth", params.bandwidth() == 0 ? "unlimited" : FormatRate(params.bandwidth()));
  p.Add("channels", params.channels() == 0 ? "automatic" : std::to_string(params.channels()));
  p.Add("drain timeout", params.has_drain_timeout() ? FormatDuration(params.drain_timeout()) : "");
  p.Add("stalled rounds",
        params.max_stalled_rounds() == 0 ? "" : std::to_string(params.max_stalled_rounds()));
  std::string stall = v1::OnStall_Name(params.on_stall());
  p.Add("on stall",
        params.on_stall() == v1::ON_STALL_UNSPECIFIED ? "" : stall.substr(sizeof("ON_STALL_") - 1));
  p.Add("in flight", InflightOf(params));
  p.Add("TLS", params.tls() ? "yes" : "no");
  p.Add("free page hints", params.has_free_page_hints() && !params.free_page_hints() ? "no" : "yes");
  return p.Render();
}

// How the figure came about: " (of 3.1 GiB that the guest named in 40 ms)".
std::string HintsOf(const v1::HintFigures& hints) {
  if (!hints.unused().empty()) return " (" + hints.unused() + ")";
  if (hints.hinted() == 0) return "";
  return " (of " + FormatBytes(hints.hinted()) + " that the guest named" +
         (hints.has_answer() ? " in " + FormatDuration(hints.answer()) : "") + ")";
}

std::string BytesOf(const v1::ByteCounts& bytes, const v1::HintFigures& hints) {
  Paragraph p;
  p.Add("data", FormatBytes(bytes.data()) +
                    (bytes.resent() > 0 ? " (" + FormatBytes(bytes.resent()) + " sent again)" : ""));
  p.Add("zero pages", FormatBytes(bytes.zero()));
  p.Add("holes skipped", FormatBytes(bytes.hole_skipped()));
  p.Add("hints skipped", FormatBytes(bytes.hint_skipped()) + HintsOf(hints));
  p.Add("state", FormatBytes(bytes.state()));
  p.Add("on the wire", FormatBytes(bytes.wire()));
  return p.Render();
}

}  // namespace

std::string PercentOf(const v1::Migration& migration) {
  const v1::Progress& p = migration.progress();
  if (migration.phase() != v1::PRECOPY && migration.phase() != v1::SWITCHOVER) return "";
  if (p.memory_total() == 0) return "";
  double left =
      std::min<double>(1.0, static_cast<double>(p.remaining()) / static_cast<double>(p.memory_total()));
  return fmt::format("{:.0f} %", 100 * (1 - left));
}

std::string BlackoutOf(const v1::Migration& migration) {
  const v1::Downtimes& d = migration.progress().downtimes();
  Duration longest(0);
  for (const auto* part : {&d.vcpu(), &d.device(), &d.network()})
    longest = std::max(longest, ToDuration(*part));
  return longest.count() == 0 ? "" : FormatDuration(longest);
}

Table HostTable(const std::vector<v1::Host>& hosts, bool wide, int64_t now) {
  std::vector<std::string> header = {"NAME", "STATE", "VMS", "CPUS", "MEMORY FREE", "MEMORY", "LAST SEEN"};
  if (wide) header.insert(header.end(), {"PEER ADDRESS", "AGENT", "KERNEL", "VMMS", "CAPABILITIES"});
  Table table(header);
  for (const auto& host : hosts) {
    std::vector<std::string> row = {ShortName(host.name()),          StateOf(host),
                                    std::to_string(host.vm_count()), std::to_string(host.cpus()),
                                    FormatBytes(host.memory_free()), FormatBytes(host.memory_total()),
                                    FormatAge(host.last_seen(), now)};
    if (wide) {
      std::vector<std::string> vmms;
      for (const auto& [name, version] : host.vmms()) vmms.push_back(name + "=" + version);
      std::sort(vmms.begin(), vmms.end());
      row.insert(row.end(), {host.peer_address(), host.agent_version(), host.kernel(), Joined(vmms, ","),
                             Joined({host.capabilities().begin(), host.capabilities().end()}, ",")});
    }
    table.AddRow(std::move(row));
  }
  return table;
}

Table VmTable(const std::vector<v1::Vm>& vms, bool wide, int64_t now) {
  std::vector<std::string> header = {"NAME",  "STATE",   "HOST",      "MEMORY",
                                     "VCPUS", "DEVICES", "MIGRATION", "AGE"};
  if (wide) header.insert(header.end(), {"EPOCH", "DRIVER", "VMM PID", "SHIM PID", "EVENT", "MESSAGE"});
  Table table(header);
  for (const auto& vm : vms) {
    std::vector<std::string> devices;
    for (const auto& device : vm.devices()) {
      // Devices in order need no remark; the others are why somebody looks.
      bool fine = device.state() == v1::Device::ACTIVE || device.state() == v1::Device::IDLE_DEVICE;
      devices.push_back(device.name() + (fine ? "" : "(" + StateOf(device) + ")"));
    }
    if (vm.has_domain()) devices = DomainDeviceNames(vm.domain());
    std::vector<std::string> row = {ShortName(vm.name()),        StateOf(vm),
                                    ShortName(vm.host()),        FormatBytes(MemoryOf(vm)),
                                    std::to_string(VcpusOf(vm)), Joined(devices, ","),
                                    ShortName(vm.migration()),   FormatAge(vm.start_time(), now)};
    if (wide) {
      std::vector<std::string> events;
      for (const auto& device : vm.devices()) {
        if (device.events() > 0) events.push_back(device.name() + ": " + EventOf(device, now));
      }
      row.insert(row.end(),
                 {std::to_string(vm.epoch()), DriverOf(vm), vm.vmm_pid() ? std::to_string(vm.vmm_pid()) : "",
                  vm.shim_pid() ? std::to_string(vm.shim_pid()) : "", Joined(events, "; "), vm.message()});
    }
    table.AddRow(std::move(row));
  }
  return table;
}

Table DeviceTable(const std::vector<v1::Vm>& vms, bool wide, int64_t now) {
  std::vector<std::string> header = {"VM",     "DEVICE",   "CLASS", "STATE",
                                     "QUEUES", "BACK-END", "KIND",  "LAST EVENT"};
  if (wide) header.insert(header.end(), {"HOST", "RECONNECTS", "SWAPS", "MESSAGE"});
  Table table(header);
  for (const auto& vm : vms) {
    for (const auto& d : vm.devices()) {
      int started = 0;
      for (const auto& queue : d.queues()) started += queue.started();
      std::vector<std::string> row = {
          ShortName(vm.name()),
          d.name(),
          DeviceClassName(d.class_()),
          StateOf(d),
          fmt::format("{}/{}", started, std::max<int>(d.queues_size(), static_cast<int>(d.max_queues()))),
          d.backend().socket(),
          BackendKindName(d.backend().kind()),
          EventOf(d, now)};
      if (wide) {
        row.insert(row.end(), {ShortName(vm.host()), std::to_string(d.reconnects()),
                               std::to_string(d.swaps()), d.message()});
      }
      table.AddRow(std::move(row));
    }
  }
  return table;
}

Table MigrationTable(const std::vector<v1::Migration>& migrations, bool wide, int64_t now) {
  std::vector<std::string> header = {"NAME", "VM",       "FROM",  "TO",     "PHASE",
                                     "DONE", "BLACKOUT", "GUEST", "REASON", "AGE"};
  if (wide) header.insert(header.end(), {"POLICY", "ROUNDS", "SENT", "RATE", "DURATION", "MESSAGE"});
  Table table(header);
  for (const auto& m : migrations) {
    bool quiet = m.reason() == v1::REASON_UNSPECIFIED || m.reason() == v1::NONE;
    std::string guest = m.guest_location() == v1::GUEST_LOCATION_UNSPECIFIED
                            ? ""
                            : v1::GuestLocation_Name(m.guest_location());
    std::vector<std::string> row = {
        ShortName(m.name()), ShortName(m.vm()), ShortName(m.source()), ShortName(m.destination()),
        v1::Phase_Name(m.phase()) + (m.cancel_requested() && !HasEnded(m) ? " (cancelling)" : ""),
        PercentOf(m), BlackoutOf(m), guest,
        // One that says something before its end waits for a person.
        !quiet                                 ? v1::Reason_Name(m.reason())
        : !HasEnded(m) && !m.message().empty() ? "(see MESSAGE)"
                                               : "",
        FormatAge(m.create_time(), now)};
    if (wide) {
      int64_t end = m.has_end_time() ? ToNs(m.end_time()) : now * 1000000000;
      int64_t start = ToNs(m.create_time());
      row.insert(row.end(),
                 {ShortName(m.policy()), std::to_string(m.progress().rounds_size()),
                  FormatBytes(m.progress().bytes().wire()), FormatRate(m.progress().rate()),
                  start > 0 && end > start ? FormatDuration(Duration(end - start)) : "", m.message()});
    }
    table.AddRow(std::move(row));
  }
  return table;
}

Table PolicyTable(const std::vector<v1::Policy>& policies, bool wide) {
  std::vector<std::string> header = {"NAME", "MAX DOWNTIME", "BANDWIDTH", "ON STALL", "TLS"};
  if (wide)
    header.insert(header.end(), {"MAX DURATION", "DRAIN TIMEOUT", "CHANNELS", "ENGINE", "OBSERVE ONLY"});
  Table table(header);
  for (const auto& policy : policies) {
    const auto& p = policy.params();
    std::string stall = p.on_stall() == v1::ON_STALL_UNSPECIFIED
                            ? ""
                            : v1::OnStall_Name(p.on_stall()).substr(sizeof("ON_STALL_") - 1);
    std::vector<std::string> row = {ShortName(policy.name()), FormatDuration(p.max_downtime()),
                                    p.bandwidth() == 0 ? "unlimited" : FormatRate(p.bandwidth()), stall,
                                    p.tls() ? "yes" : "no"};
    if (wide) {
      row.insert(row.end(), {FormatDuration(p.max_duration()), FormatDuration(p.drain_timeout()),
                             p.channels() == 0 ? "automatic" : std::to_string(p.channels()),
                             v1::Engine_Name(policy.engine()).substr(sizeof("ENGINE_") - 1),
                             policy.observe_only() ? "yes" : "no"});
    }
    table.AddRow(std::move(row));
  }
  return table;
}

std::string DescribeHost(const v1::Host& host, const std::vector<v1::Vm>& vms, int64_t now) {
  Paragraph p;
  p.Add("Name", host.name());
  p.Add("State", StateOf(host) + (host.cordoned() && !host.connected() ? ", cordoned" : ""));
  p.Add("Last seen", FormatTime(host.last_seen()));
  p.Add("Peer address", host.peer_address());
  p.Add("Agent", host.agent_version());
  p.Add("Kernel", host.kernel());
  p.Add("CPUs", std::to_string(host.cpus()));
  p.Add("Memory", FormatBytes(host.memory_free()) + " free of " + FormatBytes(host.memory_total()));
  std::vector<std::string> vmms;
  for (const auto& [name, version] : host.vmms()) vmms.push_back(name + " (" + version + ")");
  std::sort(vmms.begin(), vmms.end());
  p.Add("VMMs", Joined(vmms, ", "));
  p.Add("Capabilities", Joined({host.capabilities().begin(), host.capabilities().end()}, ", "));
  std::string out = p.Render();
  out += "VMs:\n";
  out += vms.empty() ? "  none\n" : Indented(VmTable(vms, false, now).Render());
  return out;
}

std::string DescribeVm(const v1::Vm& vm, int64_t now) {
  Paragraph p;
  p.Add("Name", vm.name());
  p.Add("Host", vm.host());
  p.Add("State", StateOf(vm));
  p.Add("Message", vm.message());
  p.Add("Migration", vm.migration());
  p.Add("Started", vm.has_start_time()
                       ? FormatTime(vm.start_time()) + " (" + FormatAge(vm.start_time(), now) + " ago)"
                       : "");
  p.Add("Epoch", std::to_string(vm.epoch()));
  p.Add("Driver", vm.driver());
  p.Add("VMM PID", vm.vmm_pid() ? std::to_string(vm.vmm_pid()) : "");
  p.Add("Shim PID", vm.shim_pid() ? std::to_string(vm.shim_pid()) : "");
  const v1::VmSpec& spec = vm.spec();
  p.Add("Memory", FormatBytes(MemoryOf(vm)));
  p.Add("vCPUs", std::to_string(VcpusOf(vm)));
  p.Add("Machine", spec.machine() + (spec.cpu().empty() ? "" : ", CPU " + spec.cpu()) +
                       (spec.qemu().empty() ? "" : ", QEMU " + spec.qemu()));
  std::string out = p.Render();
  if (vm.has_domain()) return out + DescribeDomain(vm.domain());
  out += "Devices:\n";
  if (vm.devices().empty()) {
    out += "  none\n";
    return out;
  }
  Table devices(
      {"NAME", "CLASS", "STATE", "QUEUES", "BACK-END", "KIND", "RECONNECTS", "LAST EVENT", "MESSAGE"});
  for (const auto& d : vm.devices()) {
    int started = 0;
    for (const auto& queue : d.queues()) started += queue.started();
    devices.AddRow(
        {d.name(), DeviceClassName(d.class_()), StateOf(d),
         fmt::format("{}/{}", started, std::max<int>(d.queues_size(), static_cast<int>(d.max_queues()))),
         d.backend().socket(), BackendKindName(d.backend().kind()), std::to_string(d.reconnects()),
         EventOf(d, now), d.message()});
  }
  return out + Indented(devices.Render());
}

bool HasBlocker(const v1::Migration& migration) {
  return std::any_of(migration.findings().begin(), migration.findings().end(),
                     [](const v1::Finding& f) { return f.severity() == v1::BLOCKER; });
}

std::string DescribeFindings(const v1::Migration& migration) {
  return DescribeFindings(migration.findings());
}

std::string DescribeFindings(const google::protobuf::RepeatedPtrField<v1::Finding>& found) {
  std::vector<const v1::Finding*> findings;
  for (const auto& finding : found) findings.push_back(&finding);
  if (findings.empty()) return "no findings\n";
  std::stable_sort(findings.begin(), findings.end(),
                   [](const auto* a, const auto* b) { return a->severity() > b->severity(); });
  std::string out;
  for (const auto* f : findings) {
    out += fmt::format("{:<8} {}  {}: {}\n", v1::Severity_Name(f->severity()), f->code(), f->subject(),
                       f->message());
    if (!f->remedy().empty()) out += "         do: " + f->remedy() + "\n";
  }
  return Harmless(out);
}

std::string DescribeMigration(const v1::Migration& m) {
  Paragraph p;
  p.Add("Name", m.name());
  p.Add("VM", m.vm());
  p.Add("From", m.source());
  p.Add("To", m.destination());
  p.Add("Policy", m.policy());
  p.Add("Phase", v1::Phase_Name(m.phase()) +
                     (m.cancel_requested() && !HasEnded(m) ? " (cancellation asked for)" : ""));
  if (m.reason() != v1::REASON_UNSPECIFIED && m.reason() != v1::NONE)
    p.Add("Reason", v1::Reason_Name(m.reason()));
  p.Add("Message", m.message());
  p.Add("Guest", DescribeLocation(m.guest_location(), m.source(), m.destination()));
  if (HasEnded(m) && m.phase() != v1::SUCCEEDED) p.Add("Next", AdviceFor(m.reason()));
  p.Add("Created", FormatTime(m.create_time()));
  if (m.has_end_time()) {
    p.Add("Ended", FormatTime(m.end_time()) + " (after " +
                       FormatDuration(Duration(ToNs(m.end_time()) - ToNs(m.create_time()))) + ")");
  }
  for (const auto& [key, value] : m.labels()) p.Add("Label " + key, value);
  std::string out = p.Render();
  const v1::Progress& progress = m.progress();

  if (m.phase_times_size() > 0) {
    out += "Phases:\n";
    Table phases({"PHASE", "AFTER", "TOOK"});
    int64_t start = m.has_create_time() ? ToNs(m.create_time()) : ToNs(m.phase_times(0).time());
    for (int i = 0; i < m.phase_times_size(); ++i) {
      int64_t at = ToNs(m.phase_times(i).time());
      std::string took = i + 1 < m.phase_times_size()
                             ? FormatDuration(Duration(ToNs(m.phase_times(i + 1).time()) - at))
                             : "";
      phases.AddRow({v1::Phase_Name(m.phase_times(i).phase()), FormatDuration(Duration(at - start)), took});
    }
    out += Indented(phases.Render());
  }
  out += "Limits:\n" + Indented(LimitsOf(m.params()));
  if (m.findings_size() > 0) out += "Findings:\n" + Indented(DescribeFindings(m));
  if (progress.has_bytes()) {
    out += fmt::format("Sent (of {} guest memory):\n", FormatBytes(progress.memory_total())) +
           Indented(BytesOf(progress.bytes(), progress.hints()));
  }
  if (progress.rounds_size() > 0) {
    out += "Rounds:\n";
    Table rounds({"ROUND", "TOOK", "PAGES", "SENT", "RATE", "DIRTIED", "FORECAST BLACKOUT"});
    for (const auto& r : progress.rounds()) {
      rounds.AddRow({std::to_string(r.number()), FormatDuration(r.duration()), std::to_string(r.pages()),
                     FormatBytes(r.bytes()), FormatRate(r.rate()), fmt::format("{} pages/s", r.dirty_rate()),
                     r.has_forecast_downtime() ? FormatDuration(r.forecast_downtime()) : ""});
    }
    out += Indented(rounds.Render());
  }
  if (progress.decisions_size() > 0) {
    out += "Decisions:\n";
    for (const auto& d : progress.decisions()) {
      out += Harmless(fmt::format("  round {}: {}: {}\n", d.round(), d.action(), d.why()));
    }
  }
  if (progress.has_downtimes()) {
    const v1::Downtimes& d = progress.downtimes();
    Paragraph times;
    times.Add("vCPUs", d.has_vcpu() ? FormatDuration(d.vcpu()) : "");
    times.Add("devices", d.has_device() ? FormatDuration(d.device()) : "");
    times.Add("network", d.has_network() ? FormatDuration(d.network()) : "");
    times.Add("drain", progress.has_drain() ? FormatDuration(progress.drain()) : "");
    for (const v1::DeviceStop& stop : progress.device_stops()) {
      times.Add("  " + Harmless(stop.device()),
                FormatDuration(stop.duration()) +
                    (stop.answer() == v1::HANDOFF ? fmt::format(", {} requests handed off", stop.handed_off())
                                                  : std::string(", drained")) +
                    (stop.why().empty() ? "" : " (" + Harmless(stop.why()) + ")"));
    }
    for (const auto& part : d.parts()) times.Add("  " + part.name(), FormatDuration(part.duration()));
    out += "Downtimes:\n" + Indented(times.Render());
  }
  return out;
}

std::string DescribePolicy(const v1::Policy& policy) {
  Paragraph p;
  p.Add("Name", policy.name());
  p.Add("Engine", v1::Engine_Name(policy.engine()).substr(sizeof("ENGINE_") - 1));
  p.Add("Observe only", policy.observe_only() ? "yes" : "no");
  if (policy.has_on_device_error()) {
    const v1::OnDeviceError& answer = policy.on_device_error();
    std::vector<std::string> hosts;
    for (const auto& host : answer.hosts()) hosts.push_back(ShortName(host));
    p.Add("Device error",
          !answer.migrate()
              ? "nothing"
              : fmt::format("move {} to {}",
                            answer.vms().empty() ? "every VM"
                                                 : Joined({answer.vms().begin(), answer.vms().end()}, ", "),
                            hosts.empty() ? "the host with the most free memory" : Joined(hosts, ", else ")));
  }
  p.Add("Created", policy.has_create_time() ? FormatTime(policy.create_time()) : "");
  p.Add("Updated", policy.has_update_time() ? FormatTime(policy.update_time()) : "");
  p.Add("Etag", policy.etag());
  return p.Render() + "Limits:\n" + Indented(LimitsOf(policy.params()));
}

}  // namespace baton::client
