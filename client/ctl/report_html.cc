#include "client/ctl/report_html.h"

#include <algorithm>
#include <vector>

#include "client/ctl/exit_codes.h"
#include "client/ctl/output.h"
#include "client/ctl/show.h"
#include "client/ctl/text.h"
#include "client/lib/errors.h"
#include "client/lib/names.h"
#include "client/lib/units.h"
#include "common/status.h"

namespace baton::client {
namespace {

constexpr char kStyle[] = R"(
:root{--bg:#fff;--fg:#1c2330;--dim:#5b6575;--line:#d5dae2;--c0:#3b76c4;--c1:#d98324;--c2:#3f9a5f;--c3:#8a5bb5;--c4:#c24b5a;--c5:#7b8794}
@media (prefers-color-scheme:dark){:root{--bg:#14181f;--fg:#e3e8ef;--dim:#97a3b4;--line:#333c49;--c0:#6aa3ea;--c1:#eda552;--c2:#6cc28b;--c3:#b28ce0;--c4:#e77a88;--c5:#9aa6b5}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p.sub,.dim{color:var(--dim)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .75rem .25rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--dim)}td.n,th.n{text-align:right}
.ok{color:var(--c2)}.bad{color:var(--c4)}.warn{color:var(--c1)}
svg{width:100%;height:auto;display:block}svg text{fill:var(--fg);font:12px system-ui,sans-serif}svg text.dim{fill:var(--dim)}
.tiles{display:flex;flex-wrap:wrap;gap:.75rem;margin:1rem 0}.tile{border:1px solid var(--line);border-radius:.5rem;padding:.5rem .9rem;min-width:8rem}
.tile b{display:block;font-size:1.25rem}pre{overflow:auto;border:1px solid var(--line);padding:.75rem;font-size:12px}
)";

constexpr double kWidth = 900;

struct Slice {
  std::string name;
  double amount = 0;
  std::string label;
};

std::string Rect(double x, double y, double width, double height, int colour, const std::string& title) {
  return fmt::format(
      "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.1f}\" rx=\"2\" "
      "fill=\"var(--c{})\"><title>{}</title>"
      "</rect>",
      x, y, std::max(width, 1.0), height, colour % 6, EscapeHtml(title));
}

std::string Text(double x, double y, const std::string& text, const std::string& anchor = "start",
                 const std::string& css = "") {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\"{}>{}</text>", x, y, anchor,
                     css.empty() ? "" : " class=\"" + css + "\"", EscapeHtml(text));
}

// One horizontal bar of slices in order, with a legend under it.
std::string StackedBar(const std::vector<Slice>& slices, const std::string& description) {
  double total = 0;
  for (const auto& slice : slices) total += slice.amount;
  if (total <= 0) return "";
  std::string body;
  double x = 0;
  for (size_t i = 0; i < slices.size(); ++i) {
    double width = kWidth * slices[i].amount / total;
    if (slices[i].amount <= 0) continue;
    body += Rect(x, 0, width - 1, 28, static_cast<int>(i), slices[i].name + ": " + slices[i].label);
    x += width;
  }
  double y = 50;
  double at = 0;
  for (size_t i = 0; i < slices.size(); ++i) {
    std::string text = slices[i].name + "  " + slices[i].label;
    double width = 30 + 7.2 * static_cast<double>(DisplayWidth(text));
    if (at > 0 && at + width > kWidth) {
      at = 0;
      y += 20;
    }
    body += Rect(at, y - 10, 10, 10, static_cast<int>(i), text) + Text(at + 15, y, text);
    at += width;
  }
  return fmt::format("<svg viewBox=\"0 0 {:.0f} {:.0f}\" role=\"img\" aria-label=\"{}\">{}</svg>", kWidth,
                     y + 8, EscapeHtml(description), body);
}

// Bytes of each round as bars; rate and dirty rate as lines over them.
std::string RoundsChart(const v1::Progress& progress) {
  constexpr double kTop = 24, kHeight = 200, kLeft = 70, kRight = 80;
  int count = progress.rounds_size();
  if (count == 0) return "";
  double most_bytes = 1, most_rate = 1;
  for (const auto& r : progress.rounds()) {
    most_bytes = std::max(most_bytes, static_cast<double>(r.bytes()));
    most_rate =
        std::max({most_rate, static_cast<double>(r.rate()), static_cast<double>(r.dirty_rate()) * 4096});
  }
  double step = (kWidth - kLeft - kRight) / count;
  double bottom = kTop + kHeight;
  std::string body;
  for (int i = 0; i <= 4; ++i) {
    double y = bottom - kHeight * i / 4;
    body += fmt::format("<line x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"var(--line)\"/>",
                        kLeft, kWidth - kRight, y, y);
    if (i == 0) continue;
    body += Text(kLeft - 6, y + 4, FormatBytes(static_cast<uint64_t>(most_bytes * i / 4)), "end", "dim");
    body += Text(kWidth - kRight + 6, y + 4, FormatRate(static_cast<uint64_t>(most_rate * i / 4)), "start",
                 "dim");
  }
  std::string rate_points, dirty_points;
  for (int i = 0; i < count; ++i) {
    const auto& r = progress.rounds(i);
    double middle = kLeft + step * (i + 0.5);
    double height = kHeight * static_cast<double>(r.bytes()) / most_bytes;
    double width = std::min(step * 0.6, 60.0);
    body += Rect(
        middle - width / 2, bottom - height, width, height, 0,
        fmt::format("round {}: {} in {}", r.number(), FormatBytes(r.bytes()), FormatDuration(r.duration())));
    rate_points +=
        fmt::format("{:.1f},{:.1f} ", middle, bottom - kHeight * static_cast<double>(r.rate()) / most_rate);
    dirty_points += fmt::format("{:.1f},{:.1f} ", middle,
                                bottom - kHeight * static_cast<double>(r.dirty_rate()) * 4096 / most_rate);
    // With many rounds only some fit a label.
    if (count <= 25 || i % (count / 20 + 1) == 0)
      body += Text(middle, bottom + 16, std::to_string(r.number()), "middle", "dim");
  }
  for (const auto& [points, colour] : {std::pair{rate_points, 2}, {dirty_points, 1}}) {
    body += fmt::format("<polyline points=\"{}\" fill=\"none\" stroke=\"var(--c{})\" stroke-width=\"2\"/>",
                        points, colour);
  }
  body += Rect(kLeft, 4, 10, 10, 0, "") + Text(kLeft + 15, 13, "bytes of the round");
  body += Rect(kLeft + 170, 4, 10, 10, 2, "") + Text(kLeft + 185, 13, "rate");
  body += Rect(kLeft + 240, 4, 10, 10, 1, "") + Text(kLeft + 255, 13, "written by the guest meanwhile");
  return fmt::format(
      "<svg viewBox=\"0 0 {:.0f} {:.0f}\" role=\"img\" aria-label=\"Rounds of pre-copy\">{}</svg>", kWidth,
      bottom + 26, body);
}

std::string PhaseBar(const v1::Migration& m) {
  std::vector<Slice> slices;
  for (int i = 0; i + 1 < m.phase_times_size(); ++i) {
    int64_t took = ToNs(m.phase_times(i + 1).time()) - ToNs(m.phase_times(i).time());
    slices.push_back({v1::Phase_Name(m.phase_times(i).phase()),
                      static_cast<double>(std::max<int64_t>(took, 0)), FormatDuration(Duration(took))});
  }
  return StackedBar(slices, "Phases");
}

std::string Tile(const std::string& name, const std::string& value) {
  if (value.empty()) return "";
  return "<div class=\"tile\"><span class=\"dim\">" + EscapeHtml(name) + "</span><b>" + EscapeHtml(value) +
         "</b></div>";
}

class HtmlTable {
 public:
  explicit HtmlTable(const std::vector<std::string>& header) { AddCells(header, "th"); }
  void AddRow(const std::vector<std::string>& cells) { AddCells(cells, "td"); }
  std::string Render() const { return "<table>" + rows_ + "</table>"; }

 private:
  void AddCells(const std::vector<std::string>& cells, const std::string& tag) {
    rows_ += "<tr>";
    for (const auto& cell : cells) rows_ += "<" + tag + ">" + EscapeHtml(cell) + "</" + tag + ">";
    rows_ += "</tr>\n";
  }
  std::string rows_;
};

std::string Section(const std::string& title, const std::string& body) {
  return body.empty() ? "" : "<h2>" + EscapeHtml(title) + "</h2>\n" + body + "\n";
}

std::string RoundsSection(const v1::Progress& p) {
  if (p.rounds_size() == 0) return "";
  HtmlTable table({"Round", "Took", "Pages", "Sent", "Rate", "Written meanwhile", "Forecast blackout"});
  for (const auto& r : p.rounds()) {
    table.AddRow({std::to_string(r.number()), FormatDuration(r.duration()), std::to_string(r.pages()),
                  FormatBytes(r.bytes()), FormatRate(r.rate()), fmt::format("{} pages/s", r.dirty_rate()),
                  r.has_forecast_downtime() ? FormatDuration(r.forecast_downtime()) : ""});
  }
  return RoundsChart(p) + table.Render();
}

std::string DowntimeSection(const v1::Migration& m) {
  const v1::Progress& p = m.progress();
  if (!p.has_downtimes()) return "";
  const v1::Downtimes& d = p.downtimes();
  std::string tiles =
      Tile("vCPUs", d.has_vcpu() ? FormatDuration(d.vcpu()) : "") +
      Tile("devices", d.has_device() ? FormatDuration(d.device()) : "") +
      Tile("network", d.has_network() ? FormatDuration(d.network()) : "") +
      Tile("drain", p.has_drain() ? FormatDuration(p.drain()) : "") +
      Tile("limit", m.params().has_max_downtime() ? FormatDuration(m.params().max_downtime()) : "");
  std::vector<Slice> slices;
  for (const auto& part : d.parts()) {
    slices.push_back({part.name(),
                      static_cast<double>(std::max<int64_t>(ToDuration(part.duration()).count(), 0)),
                      FormatDuration(part.duration())});
  }
  return "<div class=\"tiles\">" + tiles + "</div>" + StackedBar(slices, "Parts of the blackout");
}

std::string BytesSection(const v1::Progress& p) {
  if (!p.has_bytes()) return "";
  const v1::ByteCounts& b = p.bytes();
  uint64_t first = b.data() - std::min(b.resent(), b.data());
  auto slice = [](const std::string& name, uint64_t amount) {
    return Slice{name, static_cast<double>(amount), FormatBytes(amount)};
  };
  return StackedBar({slice("data", first), slice("sent again", b.resent()), slice("zero pages", b.zero()),
                     slice("holes skipped", b.hole_skipped()), slice("hints skipped", b.hint_skipped()),
                     slice("state", b.state())},
                    "Bytes by kind") +
         fmt::format("<p class=\"dim\">{} guest memory; {} went over the wire.</p>",
                     FormatBytes(p.memory_total()), FormatBytes(b.wire()));
}

std::string DecisionsSection(const v1::Migration& m) {
  if (m.progress().decisions_size() == 0) return "";
  HtmlTable table({"After", "Round", "Decision", "Why"});
  for (const auto& d : m.progress().decisions()) {
    table.AddRow({FormatDuration(Duration(ToNs(d.time()) - ToNs(m.create_time()))), std::to_string(d.round()),
                  d.action(), d.why()});
  }
  return table.Render();
}

std::string StopsSection(const v1::Progress& p) {
  if (p.device_stops_size() == 0) return "";
  HtmlTable table({"Device", "Requests in flight", "Stopped within", "Handed off", "Why it drained"});
  for (const auto& stop : p.device_stops()) {
    table.AddRow({stop.device(), stop.answer() == v1::HANDOFF ? "handed off" : "drained",
                  FormatDuration(stop.duration()), std::to_string(stop.handed_off()), stop.why()});
  }
  return table.Render();
}

std::string FindingsSection(const v1::Migration& m) {
  if (m.findings_size() == 0) return "";
  HtmlTable table({"Severity", "Code", "Subject", "Found", "What to do"});
  for (const auto& f : m.findings()) {
    table.AddRow({v1::Severity_Name(f.severity()), f.code(), f.subject(), f.message(), f.remedy()});
  }
  return table.Render();
}

}  // namespace

std::string EscapeHtml(const std::string& text) {
  std::string out;
  for (char c : Harmless(text)) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string RenderReport(const v1::Migration& m) {
  std::string title =
      fmt::format("{} from {} to {}", ShortName(m.vm()), ShortName(m.source()), ShortName(m.destination()));
  std::string css = m.phase() == v1::SUCCEEDED ? "ok" : m.phase() == v1::FAILED ? "bad" : "warn";
  std::string out =
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
      "content=\"width=device-width,initial-scale=1\"><title>" +
      EscapeHtml(title) + "</title><style>" + kStyle + "</style></head><body>\n";
  out += "<h1>" + EscapeHtml(title) + " <span class=\"" + css + "\">" + v1::Phase_Name(m.phase()) +
         "</span></h1>\n";
  out += "<p class=\"sub\">" + EscapeHtml(m.name()) + ", created " + EscapeHtml(FormatTime(m.create_time())) +
         ", " + EscapeHtml(m.policy()) + "</p>\n";
  if (!m.message().empty()) out += "<p>" + EscapeHtml(m.message()) + "</p>\n";

  bool quiet = m.reason() == v1::REASON_UNSPECIFIED || m.reason() == v1::NONE;
  out += "<div class=\"tiles\">";
  if (m.has_end_time()) {
    out += Tile("took", FormatDuration(Duration(ToNs(m.end_time()) - ToNs(m.create_time()))));
  }
  out += Tile("blackout", BlackoutOf(m)) +
         Tile("rounds", m.progress().rounds_size() > 0 ? std::to_string(m.progress().rounds_size()) : "") +
         Tile("on the wire", m.progress().has_bytes() ? FormatBytes(m.progress().bytes().wire()) : "") +
         Tile("guest", DescribeLocation(m.guest_location(), m.source(), m.destination())) +
         Tile("reason", quiet ? "" : v1::Reason_Name(m.reason())) +
         Tile("next", m.phase() == v1::FAILED ? AdviceFor(m.reason()) : "");
  out += "</div>\n";

  out += Section("Phases", PhaseBar(m));
  out += Section("Blackout", DowntimeSection(m));
  out += Section("Devices", StopsSection(m.progress()));
  out += Section("Rounds", RoundsSection(m.progress()));
  out += Section("Bytes by kind", BytesSection(m.progress()));
  out += Section("Decisions", DecisionsSection(m));
  out += Section("Findings of the checks", FindingsSection(m));
  out += "<h2>Record</h2>\n<details><summary>as JSON</summary><pre>" + EscapeHtml(ToJson(m)) +
         "</pre></details>\n";
  return out + "</body></html>\n";
}

}  // namespace baton::client
