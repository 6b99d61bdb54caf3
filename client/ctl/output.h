// Machine-readable output: protobuf's JSON mapping with the field names of the .proto files, and YAML made
// from it. The contract is docs/cli-json.md.
#pragma once

#include <google/protobuf/message.h>

#include <string>
#include <vector>

namespace baton::client {

enum class Format { kTable, kWide, kJson, kYaml, kName };

// Names for the -o option.
Format ParseFormat(const std::string& name);
inline bool IsMachineFormat(Format format) { return format == Format::kJson || format == Format::kYaml; }

// One line without a line break (compact), or indented with one.
std::string ToJson(const google::protobuf::Message& message, bool compact = false);
std::string ToYaml(const google::protobuf::Message& message);
// {"<key>": [ … ]} in either form, with a line break at the end.
std::string ListToJson(const std::string& key, const std::vector<const google::protobuf::Message*>& items);
std::string ListToYaml(const std::string& key, const std::vector<const google::protobuf::Message*>& items);
// YAML of any JSON text; empty if it is not JSON.
std::string JsonToYaml(const std::string& json);

}  // namespace baton::client
