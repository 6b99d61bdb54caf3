#include "common/units.h"

#include <absl/time/time.h>
#include <arpa/inet.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <vector>

namespace baton {
namespace {

struct Unit {
  const char* name;
  uint64_t bytes;
};
constexpr Unit kUnits[] = {
    {"TiB", 1ull << 40}, {"GiB", 1ull << 30}, {"MiB", 1ull << 20}, {"KiB", 1ull << 10}, {"B", 1}};

absl::Status NotASize(const std::string& text, const std::string& hint) {
  return Error(absl::StatusCode::kInvalidArgument, "'{}' is not a size; {}", text, hint);
}

absl::Status NotAnAddress(const std::string& text, const std::string& why) {
  return Error(absl::StatusCode::kInvalidArgument,
               "'{}' is not an address: {}; write host:port or unix:/path", text, why);
}

}  // namespace

absl::StatusOr<uint64_t> ParseSize(const std::string& text) {
  const std::string usual = "write a number with B, KiB, MiB, GiB or TiB, like 256MiB";
  size_t digits = text.find_first_not_of("0123456789.");
  std::string number = text.substr(0, digits);
  std::string unit = digits == std::string::npos ? "" : text.substr(digits);
  if (!unit.empty() && unit[0] == ' ') unit.erase(0, 1);
  if (number.empty()) return NotASize(text, usual);
  uint64_t scale = 1;
  if (!unit.empty()) {
    auto found =
        std::find_if(std::begin(kUnits), std::end(kUnits), [&](const Unit& u) { return unit == u.name; });
    if (found == std::end(kUnits)) {
      for (const Unit& u : kUnits) {
        // M, MB, mb, mib: the letter tells what was meant.
        if (u.name[0] != 'B' && std::toupper(static_cast<unsigned char>(unit[0])) == u.name[0])
          return NotASize(text, fmt::format("write {}{}", number, u.name));
      }
      return NotASize(text, usual);
    }
    scale = found->bytes;
  }
  uint64_t whole = 0;
  auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), whole);
  if (error == std::errc() && end == number.data() + number.size()) {
    if (whole > std::numeric_limits<uint64_t>::max() / scale) return NotASize(text, "it is too large");
    return whole * scale;
  }
  if (error == std::errc::result_out_of_range) return NotASize(text, "it is too large");
  double value = 0;
  auto [fraction_end, fraction_error] = std::from_chars(number.data(), number.data() + number.size(), value);
  if (fraction_error != std::errc() || fraction_end != number.data() + number.size())
    return NotASize(text, usual);
  double bytes = value * static_cast<double>(scale);
  // Above 2^53 a double no longer names single bytes.
  if (bytes >= 9007199254740992.0) return NotASize(text, "it is too large for a fraction");
  if (bytes != std::floor(bytes)) return NotASize(text, "it is not a whole number of bytes");
  return static_cast<uint64_t>(bytes);
}

std::string FormatSize(uint64_t bytes) {
  for (const Unit& unit : kUnits) {
    if (bytes >= unit.bytes && bytes % unit.bytes == 0)
      return fmt::format("{}{}", bytes / unit.bytes, unit.name);
  }
  return "0B";
}

absl::StatusOr<Duration> ParseDuration(const std::string& text) {
  absl::Duration parsed;
  if (!absl::ParseDuration(text, &parsed))
    return Error(absl::StatusCode::kInvalidArgument,
                 "'{}' is not a duration; write a number with us, ms, s, m or h, like 300ms", text);
  if (parsed < absl::ZeroDuration())
    return Error(absl::StatusCode::kInvalidArgument, "'{}' is negative", text);
  // 100 years: what does not fit into int64 nanoseconds is a mistake.
  if (parsed > absl::Hours(24 * 365 * 100))
    return Error(absl::StatusCode::kInvalidArgument, "'{}' is too long", text);
  return absl::ToChronoNanoseconds(parsed);
}

std::string FormatDuration(Duration duration) { return absl::FormatDuration(absl::FromChrono(duration)); }

bool Address::IsLocal() const {
  // Other names are not resolved: what they point to may change after the check ("127.example.org" is a
  // name).
  if (!unix_path.empty() || host == "localhost") return true;
  in_addr v4;
  if (::inet_pton(AF_INET, host.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  in6_addr v6;
  return ::inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

std::string Address::ToString() const {
  if (!unix_path.empty()) return "unix:" + unix_path;
  if (host.find(':') != std::string::npos) return fmt::format("[{}]:{}", host, port);
  return fmt::format("{}:{}", host, port);
}

absl::StatusOr<Address> ParseAddress(const std::string& text) {
  Address out;
  if (text.rfind("unix:", 0) == 0) {
    out.unix_path = text.substr(5);
    if (out.unix_path.empty() || out.unix_path[0] != '/')
      return NotAnAddress(text, "the path is not absolute");
    return out;
  }
  size_t colon = text.rfind(':');
  if (colon == std::string::npos) return NotAnAddress(text, "the port is missing");
  out.host = text.substr(0, colon);
  std::string port = text.substr(colon + 1);
  if (!out.host.empty() && out.host.front() == '[') {
    if (out.host.back() != ']' || out.host.size() < 3) return NotAnAddress(text, "the bracket is not closed");
    out.host = out.host.substr(1, out.host.size() - 2);
  } else if (out.host.find(':') != std::string::npos) {
    return NotAnAddress(text, "an IPv6 address stands in brackets");
  }
  unsigned value = 0;
  auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), value);
  if (error != std::errc() || end != port.data() + port.size() || value > 65535)
    return NotAnAddress(text, fmt::format("'{}' is not a port", port));
  out.port = static_cast<uint16_t>(value);
  return out;
}

size_t EditDistance(const std::string& a, const std::string& b) {
  // Optimal string alignment; three rows are enough.
  std::vector<size_t> before(b.size() + 1), last(b.size() + 1), row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) last[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min({last[j] + 1, row[j - 1] + 1, last[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        row[j] = std::min(row[j], before[j - 2] + 1);
    }
    std::swap(before, last);
    std::swap(last, row);
  }
  return last[b.size()];
}

}  // namespace baton
