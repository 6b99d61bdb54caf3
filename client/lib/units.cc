#include "client/lib/units.h"

#include <cmath>
#include <cstdlib>
#include <ctime>
#include <limits>
#include <utility>
#include <vector>

#include "common/status.h"

namespace baton::client {
namespace {

// Three significant digits of a value below about 1000.
std::string ThreeDigits(double value) {
  if (value < 9.995) return fmt::format("{:.2f}", value);
  if (value < 99.95) return fmt::format("{:.1f}", value);
  return fmt::format("{:.0f}", value);
}

bool IsNumberCharacter(char c) { return (c >= '0' && c <= '9') || c == '.'; }

// Splits "1.5GiB" into 1.5 and "GiB". Only plain decimal numbers: no sign, no exponent, no "inf".
bool SplitNumber(const std::string& text, size_t* position, double* value) {
  size_t end = *position;
  while (end < text.size() && IsNumberCharacter(text[end])) ++end;
  std::string number = text.substr(*position, end - *position);
  if (number.empty() || number == ".") return false;
  char* rest = nullptr;
  *value = std::strtod(number.c_str(), &rest);
  if (*rest != '\0') return false;
  *position = end;
  return true;
}

std::string Trimmed(const std::string& text) {
  size_t begin = text.find_first_not_of(' ');
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(' ') - begin + 1);
}

absl::StatusOr<uint64_t> ParseScaled(const std::string& text, const std::string& what,
                                     const std::vector<std::pair<std::string, double>>& units) {
  std::string trimmed = Trimmed(text);
  size_t position = 0;
  double value = 0;
  if (!SplitNumber(trimmed, &position, &value)) {
    return Error(absl::StatusCode::kInvalidArgument, "'{}' is not {}", text, what);
  }
  std::string unit = Trimmed(trimmed.substr(position));
  for (const auto& [name, factor] : units) {
    if (unit != name) continue;
    double amount = value * factor;
    // 2^63: everything that adds amounts up stays far from overflow.
    if (!(amount < 9223372036854775808.0)) {
      return Error(absl::StatusCode::kInvalidArgument, "'{}' is too large", text);
    }
    return static_cast<uint64_t>(std::llround(amount));
  }
  return Error(absl::StatusCode::kInvalidArgument, "'{}' is not {}: unknown unit '{}'", text, what, unit);
}

const std::vector<std::pair<std::string, double>>& ByteUnits() {
  static const auto* units = new std::vector<std::pair<std::string, double>>{
      {"", 1},         {"B", 1},      {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30},
      {"TiB", 0x1p40}, {"K", 0x1p10}, {"M", 0x1p20},   {"G", 0x1p30},   {"T", 0x1p40},
      {"kB", 1e3},     {"KB", 1e3},   {"MB", 1e6},     {"GB", 1e9},     {"TB", 1e12}};
  return *units;
}

}  // namespace

std::string FormatBytes(uint64_t bytes) {
  if (bytes < 1024) return fmt::format("{} B", bytes);
  static const char* const kUnits[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  // 999.5 of a unit would print as "1000"; 1023 of it still reads well, so the step is at 1023.5.
  while (value >= 1023.5 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return fmt::format("{} {}", ThreeDigits(value), kUnits[unit]);
}

std::string FormatRate(uint64_t bytes_per_second) {
  return bytes_per_second == 0 ? "-" : FormatBytes(bytes_per_second) + "/s";
}

std::string FormatDuration(Duration duration) {
  int64_t ns = duration.count();
  if (ns < 0) return "-" + FormatDuration(Duration(ns == std::numeric_limits<int64_t>::min() ? 0 : -ns));
  if (ns == 0) return "0 ms";
  if (ns < 1000) return fmt::format("{} ns", ns);
  if (ns < 999500) return ThreeDigits(ns / 1e3) + " us";
  if (ns < 999500000) return ThreeDigits(ns / 1e6) + " ms";
  if (ns < 59950000000) return ThreeDigits(ns / 1e9) + " s";
  int64_t seconds = (ns + 500000000) / 1000000000;
  if (seconds < 3600) return fmt::format("{}m{:02}s", seconds / 60, seconds % 60);
  return fmt::format("{}h{:02}m", seconds / 3600, seconds % 3600 / 60);
}

std::string FormatDuration(const google::protobuf::Duration& duration) {
  return FormatDuration(ToDuration(duration));
}

std::string FormatTime(const google::protobuf::Timestamp& time) {
  if (time.seconds() == 0) return "-";
  std::time_t seconds = time.seconds();
  std::tm parts{};
  if (localtime_r(&seconds, &parts) == nullptr) return "-";
  char buffer[32];
  std::strftime(buffer, sizeof buffer, "%Y-%m-%d %H:%M:%S", &parts);
  return buffer;
}

std::string FormatAge(const google::protobuf::Timestamp& time, int64_t now_seconds) {
  if (time.seconds() == 0) return "-";
  int64_t age = now_seconds - time.seconds();
  if (age < 0) age = 0;
  if (age < 120) return fmt::format("{}s", age);
  if (age < 120 * 60) return fmt::format("{}m", age / 60);
  if (age < 48 * 3600) return fmt::format("{}h", age / 3600);
  return fmt::format("{}d", age / 86400);
}

int64_t ToNs(const google::protobuf::Timestamp& time) { return time.seconds() * 1000000000 + time.nanos(); }

Duration ToDuration(const google::protobuf::Duration& duration) {
  // A peer may send any number; 200 years are enough for everyone and cannot overflow.
  constexpr int64_t kLimit = 200LL * 366 * 86400;
  int64_t seconds = std::min(std::max(duration.seconds(), -kLimit), kLimit);
  return Duration(seconds * 1000000000 + duration.nanos());
}

google::protobuf::Duration FromDuration(Duration duration) {
  google::protobuf::Duration out;
  out.set_seconds(duration.count() / 1000000000);
  out.set_nanos(static_cast<int32_t>(duration.count() % 1000000000));
  return out;
}

absl::StatusOr<uint64_t> ParseRate(const std::string& text) {
  std::string rate = Trimmed(text);
  if (rate == "unlimited") return uint64_t{0};
  if (rate.size() > 2 && rate.compare(rate.size() - 2, 2, "/s") == 0) rate.resize(rate.size() - 2);
  auto units = ByteUnits();
  for (auto [name, factor] :
       {std::pair{"bit", 1.0}, {"kbit", 1e3}, {"Kbit", 1e3}, {"Mbit", 1e6}, {"Gbit", 1e9}, {"Tbit", 1e12}}) {
    units.emplace_back(name, factor / 8);
  }
  return ParseScaled(rate, "a rate (like 500MiB or 10Gbit, a second)", units);
}

}  // namespace baton::client
