// Amounts as people read them, and rates as they write them; common/units.h reads sizes and durations. Pure
// functions, any thread.
#pragma once

#include <absl/status/statusor.h>
#include <google/protobuf/duration.pb.h>
#include <google/protobuf/timestamp.pb.h>

#include <cstdint>
#include <string>

#include "common/clock.h"
#include "common/units.h"

namespace baton::client {

// Three significant digits and a binary unit: "0 B", "512 B", "1.25 GiB", "16.0 MiB", "256 MiB".
std::string FormatBytes(uint64_t bytes);

// FormatBytes with "/s" behind it; "-" for 0, because no rate is known then.
std::string FormatRate(uint64_t bytes_per_second);

// Three significant digits: "0 ms", "850 ns", "34.2 ms", "1.25 s"; from a minute on "2m05s", "1h02m".
std::string FormatDuration(Duration duration);
std::string FormatDuration(const google::protobuf::Duration& duration);

// "2026-05-01 12:00:00" in local time; "-" for an unset one.
std::string FormatTime(const google::protobuf::Timestamp& time);

// Time since `time`, short, for AGE columns: "12s", "5m", "3h", "9d"; "-" for an unset one.
std::string FormatAge(const google::protobuf::Timestamp& time, int64_t now_seconds);

// Nanoseconds since the epoch; 0 for an unset one.
int64_t ToNs(const google::protobuf::Timestamp& time);
Duration ToDuration(const google::protobuf::Duration& duration);
google::protobuf::Duration FromDuration(Duration duration);

// Bytes a second: "500MiB", "1.5GiB/s", decimal units ("100MB"), and bit rates: "10Gbit", "800Mbit/s".
// "unlimited" and "0" give 0.
absl::StatusOr<uint64_t> ParseRate(const std::string& text);

}  // namespace baton::client
