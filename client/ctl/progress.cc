#include "client/ctl/progress.h"

#include <algorithm>

#include "client/ctl/exit_codes.h"
#include "client/ctl/show.h"
#include "client/ctl/text.h"
#include "client/lib/errors.h"
#include "client/lib/names.h"
#include "client/lib/units.h"
#include "common/status.h"

namespace baton::client {
namespace {

// "+1.234s" since the creation.
std::string Elapsed(const v1::Migration& m, int64_t at_ns) {
  int64_t start = ToNs(m.create_time());
  double seconds = start == 0 || at_ns < start ? 0 : static_cast<double>(at_ns - start) / 1e9;
  return fmt::format("+{:.3f}s", seconds);
}

// In less than this a round shows neither what the connection carries nor how fast the guest writes.
constexpr Duration kTellingRound = std::chrono::milliseconds(100);

std::string RoundLine(const v1::RoundStats& r) {
  std::string line = fmt::format("round {}: sent {} in {}", r.number(), FormatBytes(r.bytes()),
                                 FormatDuration(r.duration()));
  const bool telling = ToDuration(r.duration()) >= kTellingRound;
  if (telling && r.rate() > 0) line += fmt::format(" ({})", FormatRate(r.rate()));
  if (telling && r.dirty_rate() > 0) line += fmt::format(", dirtied {}", FormatRate(r.dirty_rate() * 4096));
  if (r.has_forecast_downtime())
    line += fmt::format(", forecast blackout {}", FormatDuration(r.forecast_downtime()));
  return line;
}

std::string Bar(double part, size_t width, bool ascii) {
  part = std::min(1.0, std::max(0.0, part));
  auto full = static_cast<size_t>(part * static_cast<double>(width) + 0.5);
  std::string out;
  for (size_t i = 0; i < width; ++i) out += i < full ? (ascii ? "#" : "█") : (ascii ? "." : "░");
  return out;
}

// Parts that are joined while they fit into the width; the rest is left out, so the most important come
// first.
std::string Fitting(const std::vector<std::string>& parts, size_t width) {
  std::string line;
  for (const auto& part : parts) {
    if (part.empty()) continue;
    std::string longer = line.empty() ? part : line + "  " + part;
    if (DisplayWidth(longer) > width) {
      if (line.empty()) return Truncate(part, width);
      break;
    }
    line = longer;
  }
  return line;
}

std::string Route(const v1::Migration& m, bool ascii) {
  return ShortName(m.source()) + (ascii ? " -> " : " → ") + ShortName(m.destination());
}

const char* ColourOf(v1::Phase phase) {
  switch (phase) {
    case v1::SUCCEEDED:
      return "\x1b[32m";
    case v1::FAILED:
      return "\x1b[31m";
    case v1::CANCELLED:
    case v1::SWITCHOVER:
      return "\x1b[33m";
    default:
      return "\x1b[36m";
  }
}

uint64_t SkippedOf(const v1::ByteCounts& bytes) {
  return bytes.zero() + bytes.hole_skipped() + bytes.hint_skipped();
}

}  // namespace

std::vector<std::string> ProgressLog::Update(const v1::Migration& m) {
  // Everything new with the time it happened, so that lines come in that order although they live in several
  // lists.
  struct Line {
    int64_t at;
    std::string text;
  };
  std::vector<Line> lines;
  if (!started_) {
    started_ = true;
    lines.push_back({0, fmt::format("{}: {} {}", m.name(), m.vm(), Route(m, true))});
  }
  int64_t precopy = 0;
  for (const auto& time : m.phase_times()) {
    if (time.phase() == v1::PRECOPY) precopy = ToNs(time.time());
  }
  for (; phases_ < static_cast<size_t>(m.phase_times_size()); ++phases_) {
    const auto& phase = m.phase_times(static_cast<int>(phases_));
    lines.push_back({ToNs(phase.time()), v1::Phase_Name(phase.phase())});
  }
  int64_t latest = lines.empty() ? 0 : lines.back().at;
  for (; findings_ < static_cast<size_t>(m.findings_size()); ++findings_) {
    const auto& f = m.findings(static_cast<int>(findings_));
    if (f.severity() < v1::WARNING) continue;
    // Findings have no time; they belong to PREPARING.
    lines.push_back(
        {precopy > 0 ? precopy - 1 : latest,
         fmt::format("{} {}: {}: {}", v1::Severity_Name(f.severity()), f.code(), f.subject(), f.message())});
  }
  int64_t end = precopy;
  for (const auto& round : m.progress().rounds()) {
    // Rounds follow each other from the beginning of PRECOPY on.
    end += ToDuration(round.duration()).count();
    if (static_cast<int64_t>(round.number()) <= last_round_) continue;
    last_round_ = round.number();
    lines.push_back({end, RoundLine(round)});
  }
  for (; decisions_ < static_cast<size_t>(m.progress().decisions_size()); ++decisions_) {
    const auto& d = m.progress().decisions(static_cast<int>(decisions_));
    lines.push_back(
        {ToNs(d.time()), fmt::format("decision after round {}: {}: {}", d.round(), d.action(), d.why())});
  }
  if (m.cancel_requested() && !cancel_told_) {
    cancel_told_ = true;
    if (!HasEnded(m)) lines.push_back({latest, "cancellation asked for"});
  }
  std::stable_sort(lines.begin(), lines.end(), [](const Line& a, const Line& b) { return a.at < b.at; });
  std::vector<std::string> out;
  for (const auto& line : lines) {
    std::string text = Harmless(fmt::format("{:>10}  {}", Elapsed(m, line.at), line.text));
    std::replace(text.begin(), text.end(), '\n', ' ');
    out.push_back(std::move(text));
  }
  return out;
}

std::vector<std::string> RenderLive(const v1::Migration& m, const LiveView& view) {
  size_t width =
      static_cast<size_t>(std::max(20, view.columns - 1));  // the last column would wrap on some terminals
  const v1::Progress& p = m.progress();
  std::vector<std::string> lines;

  std::string phase = v1::Phase_Name(m.phase());
  if (m.cancel_requested() && !HasEnded(m)) phase += " (cancelling)";
  std::string shown = view.colour ? std::string(ColourOf(m.phase())) + phase + "\x1b[0m" : phase;
  int64_t start = ToNs(m.create_time());
  std::string elapsed = start > 0 && view.now_ns > start ? FormatDuration(Duration(view.now_ns - start)) : "";
  lines.push_back(
      Fitting({shown, ShortName(m.vm()), Route(m, view.ascii), elapsed, ShortName(m.name())}, width));

  if (m.phase() == v1::PRECOPY || m.phase() == v1::SWITCHOVER) {
    double part =
        p.memory_total() == 0
            ? 0
            : 1 - std::min(1.0, static_cast<double>(p.remaining()) / static_cast<double>(p.memory_total()));
    std::string tail = fmt::format(" {:>3.0f} %", part * 100);
    std::string round = fmt::format("round {:<3} ", p.round());
    size_t bar =
        std::min<size_t>(40, width > 40 ? (width - DisplayWidth(round) - DisplayWidth(tail)) / 2 : 10);
    lines.push_back(
        Fitting({round + Bar(part, bar, view.ascii) + tail, FormatBytes(p.remaining()) + " left"}, width));
    std::string skipped = SkippedOf(p.bytes()) > 0 ? FormatBytes(SkippedOf(p.bytes())) + " skipped" : "";
    lines.push_back(Fitting({"sent " + FormatBytes(p.bytes().data()), "rate " + FormatRate(p.rate()),
                             "dirtied " + FormatRate(p.dirty_rate()), skipped},
                            width));
    std::vector<std::string> forecast;
    if (p.has_forecast_remaining()) forecast.push_back("done in " + FormatDuration(p.forecast_remaining()));
    if (p.has_forecast_downtime()) forecast.push_back("blackout " + FormatDuration(p.forecast_downtime()));
    if (!forecast.empty() && m.params().has_max_downtime()) {
      forecast.push_back("limit " + FormatDuration(m.params().max_downtime()));
    }
    if (!forecast.empty()) {
      forecast[0] = "forecast: " + forecast[0];
      lines.push_back(Fitting(forecast, width));
    }
  }
  if (!view.note.empty()) lines.push_back(Truncate(view.note, width, view.ascii));
  for (std::string& line : lines) line = Truncate(line, width, view.ascii);
  return lines;
}

std::string Summary(const v1::Migration& m) {
  std::string vm = ShortName(m.vm());
  int64_t took = m.has_end_time() ? ToNs(m.end_time()) - ToNs(m.create_time()) : 0;
  const v1::Progress& p = m.progress();
  std::string out;
  if (m.phase() == v1::SUCCEEDED) {
    out = fmt::format("{} moved from {} to {}", vm, ShortName(m.source()), ShortName(m.destination()));
    if (took > 0) out += " in " + FormatDuration(Duration(took));
    out += "\n";
  } else {
    std::string how = m.phase() == v1::CANCELLED ? "was cancelled"
                      : HasEnded(m)              ? "failed"
                                                 : "is in " + v1::Phase_Name(m.phase());
    out =
        fmt::format("migration {} of {} from {} to {} {}{}\n", ShortName(m.name()), vm, ShortName(m.source()),
                    ShortName(m.destination()), how, m.message().empty() ? "" : ": " + m.message());
    if (m.reason() != v1::REASON_UNSPECIFIED) out += "  reason:   " + v1::Reason_Name(m.reason()) + "\n";
    std::string where = DescribeLocation(m.guest_location(), m.source(), m.destination());
    if (!where.empty()) out += "  guest:    " + where + "\n";
    std::string next;
    if (m.guest_location() == v1::UNKNOWN) {
      next =
          "wait until both hosts answer; if the destination is gone for good, fence it, then run "
          "'batonctl migration resolve " +
          ShortName(m.name()) + " --fenced'";
    } else if (m.phase() == v1::FAILED) {
      next = AdviceFor(m.reason());
    }
    if (!next.empty()) out += "  next:     " + next + "\n";
  }
  std::vector<std::string> times;
  const v1::Downtimes& d = p.downtimes();
  if (d.has_vcpu()) times.push_back("vCPUs " + FormatDuration(d.vcpu()));
  if (d.has_device()) times.push_back("devices " + FormatDuration(d.device()));
  if (d.has_network() && ToDuration(d.network()).count() > 0)
    times.push_back("network " + FormatDuration(d.network()));
  if (!times.empty()) {
    std::string line;
    for (const auto& time : times) line += (line.empty() ? "" : ", ") + time;
    if (m.params().has_max_downtime())
      line += fmt::format(" (limit {})", FormatDuration(m.params().max_downtime()));
    out += "  blackout: " + line + "\n";
  }
  if (p.has_bytes() && p.bytes().wire() + p.bytes().data() > 0) {
    const v1::ByteCounts& b = p.bytes();
    out += fmt::format("  sent:     {} on the wire: {} data ({} again), {} state\n", FormatBytes(b.wire()),
                       FormatBytes(b.data()), FormatBytes(b.resent()), FormatBytes(b.state()));
    out += fmt::format("  not sent: {} holes, {} zeroes, {} hinted free\n", FormatBytes(b.hole_skipped()),
                       FormatBytes(b.zero()), FormatBytes(b.hint_skipped()));
  }
  if (p.rounds_size() > 0) out += fmt::format("  rounds:   {}\n", p.rounds_size());
  return Harmless(out);
}

std::string StatusLine(const v1::Migration& m) {
  std::string line = fmt::format("{} {} {} {}", m.name(), m.vm(), Route(m, true), v1::Phase_Name(m.phase()));
  const v1::Progress& p = m.progress();
  if (m.phase() == v1::PRECOPY || m.phase() == v1::SWITCHOVER) {
    line += fmt::format(" round {} {} left, {}", p.round(), FormatBytes(p.remaining()), FormatRate(p.rate()));
  }
  if (m.phase() == v1::SUCCEEDED) {
    std::string blackout = BlackoutOf(m);
    if (!blackout.empty()) line += " blackout " + blackout;
  } else if (HasEnded(m)) {
    line += fmt::format(" {} guest {}: {}", v1::Reason_Name(m.reason()),
                        v1::GuestLocation_Name(m.guest_location()), m.message());
  }
  std::replace(line.begin(), line.end(), '\n', ' ');
  return Harmless(line);
}

}  // namespace baton::client
