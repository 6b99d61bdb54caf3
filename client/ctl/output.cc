#include "client/ctl/output.h"

#include <google/protobuf/util/json_util.h>
#include <yaml-cpp/yaml.h>

#include <nlohmann/json.hpp>

namespace baton::client {
namespace {

using Json = nlohmann::ordered_json;

Json ToJsonValue(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  // Field names are those of the .proto files, and fields at their default are there: scripts need no special
  // cases.
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string text;
  // Fails only for messages that cannot be expressed (an Any of an unknown type); Baton's resources hold
  // none.
  if (!google::protobuf::util::MessageToJsonString(message, &text, options).ok()) return Json::object();
  return Json::parse(text, nullptr, /*allow_exceptions=*/false);
}

std::string Dump(const Json& value, int indent) {
  return value.dump(indent, ' ', false, Json::error_handler_t::replace);
}

// Plain scalars that a YAML reader would not take for a string.
bool NeedsQuotes(const std::string& text) {
  if (text.empty()) return true;
  static const char* const kWords[] = {"true", "false", "yes", "no", "on", "off", "null", "~", "y", "n"};
  std::string lower;
  for (char c : text) lower += static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  for (const char* word : kWords) {
    if (lower == word) return true;
  }
  // Numbers, dates, times: everything that starts like one. 64-bit integers are strings in the JSON mapping,
  // and stay strings here.
  return (text[0] >= '0' && text[0] <= '9') || text[0] == '+' || text[0] == '-' || text[0] == '.';
}

void Emit(const Json& value, YAML::Emitter& out) {
  if (value.is_object()) {
    if (value.empty()) out << YAML::Flow;
    out << YAML::BeginMap;
    for (const auto& [key, item] : value.items()) {
      out << YAML::Key << key << YAML::Value;
      Emit(item, out);
    }
    out << YAML::EndMap;
  } else if (value.is_array()) {
    if (value.empty()) out << YAML::Flow;
    out << YAML::BeginSeq;
    for (const auto& item : value) Emit(item, out);
    out << YAML::EndSeq;
  } else if (value.is_string()) {
    auto text = value.get<std::string>();
    if (NeedsQuotes(text)) out << YAML::DoubleQuoted;
    out << text;
  } else {
    out << Dump(value, -1);
  }
}

std::string ToYamlText(const Json& value) {
  YAML::Emitter out;
  Emit(value, out);
  return std::string(out.c_str()) + "\n";
}

Json ListValue(const std::string& key, const std::vector<const google::protobuf::Message*>& items) {
  Json list = Json::array();
  for (const auto* item : items) list.push_back(ToJsonValue(*item));
  Json out;
  out[key] = std::move(list);
  return out;
}

}  // namespace

Format ParseFormat(const std::string& name) {
  if (name == "wide") return Format::kWide;
  if (name == "json") return Format::kJson;
  if (name == "yaml") return Format::kYaml;
  if (name == "name") return Format::kName;
  return Format::kTable;
}

std::string ToJson(const google::protobuf::Message& message, bool compact) {
  Json value = ToJsonValue(message);
  return compact ? Dump(value, -1) : Dump(value, 2) + "\n";
}

std::string ToYaml(const google::protobuf::Message& message) { return ToYamlText(ToJsonValue(message)); }

std::string ListToJson(const std::string& key, const std::vector<const google::protobuf::Message*>& items) {
  return Dump(ListValue(key, items), 2) + "\n";
}

std::string ListToYaml(const std::string& key, const std::vector<const google::protobuf::Message*>& items) {
  return ToYamlText(ListValue(key, items));
}

std::string JsonToYaml(const std::string& json) {
  Json value = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  return value.is_discarded() ? "" : ToYamlText(value);
}

}  // namespace baton::client
