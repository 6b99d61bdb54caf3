#include "server/control/filter.h"

#include <absl/strings/escaping.h>

#include <algorithm>

#include "common/grpc_status.h"

namespace baton::server {

absl::StatusOr<std::map<std::string, std::string>> ParseFilter(const std::string& text,
                                                               const std::vector<std::string>& fields) {
  std::map<std::string, std::string> out;
  size_t start = 0;
  while (start < text.size()) {
    size_t end = text.find(" AND ", start);
    std::string term = text.substr(start, end == std::string::npos ? end : end - start);
    start = end == std::string::npos ? text.size() : end + 5;
    size_t equals = term.find('=');
    if (equals == std::string::npos || equals == 0) {
      return InvalidField("filter", fmt::format("\"{}\" is not field=value", term));
    }
    std::string field = term.substr(0, equals);
    if (std::find(fields.begin(), fields.end(), field) == fields.end()) {
      return InvalidField("filter", fmt::format("there is no field \"{}\" to filter by; there are: {}", field,
                                                fmt::join(fields, ", ")));
    }
    if (!out.emplace(field, term.substr(equals + 1)).second) {
      return InvalidField("filter", fmt::format("\"{}\" stands twice", field));
    }
  }
  return out;
}

bool MigrationFilter::Matches(const v1::Migration& m) const {
  if (!vm.empty() && m.vm() != vm) return false;
  if (!source.empty() && m.source() != source) return false;
  if (!destination.empty() && m.destination() != destination) return false;
  if (phase && m.phase() != *phase) return false;
  if (active && (m.phase() < v1::SUCCEEDED) != *active) return false;
  return true;
}

absl::StatusOr<MigrationFilter> ParseMigrationFilter(const std::string& text) {
  ASSIGN_OR_RETURN(auto terms, ParseFilter(text, {"vm", "source", "destination", "phase", "active"}));
  MigrationFilter filter;
  auto name = [](const std::string& value, const char* collection) {
    return value.find('/') == std::string::npos ? std::string(collection) + "/" + value : value;
  };
  for (const auto& [field, value] : terms) {
    if (value.empty()) return InvalidField("filter", fmt::format("\"{}\" has no value", field));
    if (field == "vm") filter.vm = name(value, "vms");
    if (field == "source") filter.source = name(value, "hosts");
    if (field == "destination") filter.destination = name(value, "hosts");
    if (field == "phase") {
      v1::Phase phase;
      if (!v1::Phase_Parse(value, &phase))
        return InvalidField("filter", fmt::format("{} is no phase", value));
      filter.phase = phase;
    }
    if (field == "active") {
      if (value != "true" && value != "false") return InvalidField("filter", "active is true or false");
      filter.active = value == "true";
    }
  }
  return filter;
}

namespace {
constexpr char kSeparator = '\n';
}

std::string MakePageToken(const std::string& call, const std::string& filter, const std::string& last) {
  return absl::WebSafeBase64Escape(call + kSeparator + last + kSeparator + filter);
}

absl::StatusOr<std::string> ParsePageToken(const std::string& token, const std::string& call,
                                           const std::string& filter) {
  if (token.empty()) return std::string();
  std::string text;
  bool good = absl::WebSafeBase64Unescape(token, &text);
  size_t first = good ? text.find(kSeparator) : std::string::npos;
  size_t second = first == std::string::npos ? first : text.find(kSeparator, first + 1);
  if (second == std::string::npos) return InvalidField("page_token", "was not made by this server");
  if (text.substr(0, first) != call || text.substr(second + 1) != filter) {
    return InvalidField("page_token", "belongs to another list call or another filter");
  }
  return text.substr(first + 1, second - first - 1);
}

absl::StatusOr<size_t> PageSize(int32_t wanted) {
  if (wanted < 0) return InvalidField("page_size", "is negative");
  if (wanted == 0) return size_t{50};
  return static_cast<size_t>(std::min(wanted, 1000));
}

}  // namespace baton::server
