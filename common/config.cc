#include "common/config.h"

#include <fcntl.h>
#include <fmt/ranges.h>
#include <sys/stat.h>
#include <unistd.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cerrno>
#include <charconv>

#include "common/fd.h"

namespace baton {
namespace {

constexpr size_t kMaxFile = 1 << 20;
constexpr size_t kMaxNodes = 100000;
constexpr int kMaxDepth = 32;

const char* KindName(ConfigNode::Kind kind) {
  switch (kind) {
    case ConfigNode::Kind::kNull:
      return "nothing";
    case ConfigNode::Kind::kScalar:
      return "a single value";
    case ConfigNode::Kind::kList:
      return "a list";
    case ConfigNode::Kind::kMap:
      return "a map";
  }
  return "something else";
}

// Copies yaml-cpp's tree into ours. Aliases are expanded, which is why values are counted.
class Copier {
 public:
  explicit Copier(std::string name) : name_(std::move(name)) {}

  absl::Status Copy(const YAML::Node& in, int depth, ConfigNode* out) {
    out->line = in.Mark().line >= 0 ? in.Mark().line + 1 : 1;
    if (++count_ > kMaxNodes)
      return Error(absl::StatusCode::kInvalidArgument, "{}:{}: more than {} values", name_, out->line,
                   kMaxNodes);
    if (depth > kMaxDepth)
      return Error(absl::StatusCode::kInvalidArgument, "{}:{}: nested more than {} deep", name_, out->line,
                   kMaxDepth);
    switch (in.Type()) {
      case YAML::NodeType::Undefined:
      case YAML::NodeType::Null:
        out->kind = ConfigNode::Kind::kNull;
        break;
      case YAML::NodeType::Scalar:
        out->kind = ConfigNode::Kind::kScalar;
        out->text = in.Scalar();
        break;
      case YAML::NodeType::Sequence:
        out->kind = ConfigNode::Kind::kList;
        for (const auto& item : in) {
          out->items.emplace_back();
          RETURN_IF_ERROR(Copy(item, depth + 1, &out->items.back()));
        }
        break;
      case YAML::NodeType::Map:
        out->kind = ConfigNode::Kind::kMap;
        for (const auto& field : in) RETURN_IF_ERROR(CopyField(field.first, field.second, depth, out));
        break;
    }
    return absl::OkStatus();
  }

 private:
  absl::Status CopyField(const YAML::Node& key, const YAML::Node& value, int depth, ConfigNode* out) {
    int line = key.Mark().line + 1;
    if (!key.IsScalar())
      return Error(absl::StatusCode::kInvalidArgument, "{}:{}: a field's name is not plain text", name_,
                   line);
    std::string name = key.Scalar();
    for (const auto& [other, node] : out->fields) {
      if (other == name)
        return Error(absl::StatusCode::kInvalidArgument, "{}:{}: {}: given a second time (first on line {})",
                     name_, line, name, node.line);
    }
    out->fields.push_back({name, ConfigNode()});
    RETURN_IF_ERROR(Copy(value, depth + 1, &out->fields.back().value));
    // What people look for is the line of the name; a block value's own mark is one below.
    out->fields.back().value.line = line;
    return absl::OkStatus();
  }

  std::string name_;
  size_t count_ = 0;
};

}  // namespace

struct ConfigDocument::State {
  std::string name;
  ConfigNode root;
  struct Found {
    int line;
    std::string text;
  };
  std::vector<Found> problems;

  // Line of the value at `field`, or of the nearest enclosing one.
  int LineOf(const std::string& field) const {
    const ConfigNode* node = &root;
    size_t at = 0;
    while (at < field.size()) {
      const ConfigNode* next = nullptr;
      if (field[at] == '[') {
        size_t index = 0;
        size_t close = field.find(']', at);
        if (close == std::string::npos) break;
        std::from_chars(field.data() + at + 1, field.data() + close, index);
        if (index < node->items.size()) next = &node->items[index];
        at = close + 1;
      } else {
        if (field[at] == '.') ++at;
        size_t end = field.find_first_of(".[", at);
        std::string name = field.substr(at, end == std::string::npos ? end : end - at);
        for (const auto& [key, value] : node->fields) {
          if (key == name) next = &value;
        }
        at = end == std::string::npos ? field.size() : end;
      }
      if (next == nullptr) break;
      node = next;
    }
    return node->line;
  }
};

absl::StatusOr<std::string> ReadFileLimited(const std::string& path, size_t limit) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return ErrnoError(errno, path);
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) return ErrnoError(errno, path);
  if (S_ISDIR(info.st_mode)) return Error(absl::StatusCode::kInvalidArgument, "{}: is a directory", path);
  std::string out;
  char buffer[16384];
  while (true) {
    ssize_t n = ::read(fd.get(), buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoError(errno, path);
    if (n == 0) return out;
    out.append(buffer, static_cast<size_t>(n));
    if (out.size() > limit)
      return Error(absl::StatusCode::kResourceExhausted, "{}: larger than {}", path, FormatSize(limit));
  }
}

absl::StatusOr<ConfigDocument> ConfigDocument::FromFile(const std::string& path) {
  ASSIGN_OR_RETURN(std::string text, ReadFileLimited(path, kMaxFile));
  return FromText(text, path);
}

absl::StatusOr<ConfigDocument> ConfigDocument::FromText(const std::string& text, const std::string& name) {
  auto state = std::make_shared<State>();
  state->name = name;
  try {
    std::vector<YAML::Node> documents = YAML::LoadAll(text);
    if (documents.size() > 1)
      return Error(absl::StatusCode::kInvalidArgument, "{}:{}: a second document; one a file is read", name,
                   documents[1].Mark().line + 1);
    if (documents.empty() || documents[0].IsNull())
      return Error(absl::StatusCode::kInvalidArgument, "{}:1: the file is empty", name);
    RETURN_IF_ERROR(Copier(name).Copy(documents[0], 0, &state->root));
  } catch (const YAML::Exception& e) {
    int line = e.mark.is_null() ? 1 : e.mark.line + 1;
    return Error(absl::StatusCode::kInvalidArgument, "{}:{}: not YAML: {}", name, line, e.msg);
  } catch (const std::exception& e) {
    return Error(absl::StatusCode::kInvalidArgument, "{}:1: not YAML: {}", name, e.what());
  }
  if (state->root.kind != ConfigNode::Kind::kMap)
    return Error(absl::StatusCode::kInvalidArgument, "{}:{}: expected `field: value` lines, found {}", name,
                 state->root.line, KindName(state->root.kind));
  return ConfigDocument(std::move(state));
}

ConfigReader ConfigDocument::Root() { return ConfigReader(state_, &state_->root, ""); }

void ConfigDocument::AddProblem(const std::string& field, const std::string& problem) {
  std::string text = field.empty() ? problem : fmt::format("{}: {}", field, problem);
  state_->problems.push_back({state_->LineOf(field), std::move(text)});
}

void ConfigDocument::AddProblems(const absl::Status& status) {
  if (status.ok()) return;
  std::string message = Message(status);
  size_t at = 0;
  while (at <= message.size()) {
    size_t end = std::min(message.find('\n', at), message.size());
    std::string line = message.substr(at, end - at);
    size_t colon = line.find(": ");
    if (colon == std::string::npos) {
      AddProblem("", line);
    } else {
      AddProblem(line.substr(0, colon), line.substr(colon + 2));
    }
    at = end + 1;
  }
}

absl::Status ConfigDocument::Finish(ConfigReader& root) {
  root.CheckUnknown();
  if (state_->problems.empty()) return absl::OkStatus();
  std::stable_sort(state_->problems.begin(), state_->problems.end(),
                   [](const auto& a, const auto& b) { return a.line < b.line; });
  std::string text;
  for (const auto& problem : state_->problems) {
    if (!text.empty()) text += '\n';
    text += fmt::format("{}:{}: {}", state_->name, problem.line, problem.text);
  }
  return absl::Status(absl::StatusCode::kInvalidArgument, text);
}

std::string ConfigReader::FieldPath(const std::string& name) const {
  if (name.empty()) return path_;
  return path_.empty() ? name : path_ + "." + name;
}

void ConfigReader::Problem(const std::string& name, const std::string& problem) {
  std::string field = FieldPath(name);
  int line = node_->line;
  for (const auto& [key, value] : node_->fields) {
    if (key == name) line = value.line;
  }
  state_->problems.push_back({line, field.empty() ? problem : fmt::format("{}: {}", field, problem)});
}

bool ConfigReader::Has(const std::string& name) const {
  return std::any_of(node_->fields.begin(), node_->fields.end(),
                     [&](const auto& f) { return f.name == name; });
}

bool ConfigReader::IsMap(const std::string& name) const {
  return std::any_of(node_->fields.begin(), node_->fields.end(),
                     [&](const auto& f) { return f.name == name && f.value.kind == ConfigNode::Kind::kMap; });
}

const ConfigNode* ConfigReader::Find(const std::string& name, Presence presence) {
  known_.push_back(name);
  for (const auto& [key, value] : node_->fields) {
    if (key != name) continue;
    if (value.kind == ConfigNode::Kind::kNull) {
      Problem(name, "has no value; leave the field out or give it one");
      return nullptr;
    }
    return &value;
  }
  if (presence == kRequired) Problem("", fmt::format("the field '{}' is missing", name));
  return nullptr;
}

const ConfigNode* ConfigReader::FindKind(const std::string& name, ConfigNode::Kind kind, Presence presence) {
  const ConfigNode* node = Find(name, presence);
  if (node == nullptr || node->kind == kind) return node;
  Problem(name, fmt::format("expected {}, found {}", KindName(kind), KindName(node->kind)));
  return nullptr;
}

const ConfigNode* ConfigReader::FindScalar(const std::string& name, Presence presence) {
  return FindKind(name, ConfigNode::Kind::kScalar, presence);
}

bool ConfigReader::Text(const std::string& name, std::string* out, Presence presence) {
  const ConfigNode* node = FindScalar(name, presence);
  if (node == nullptr) return false;
  if (node->text.find('\0') != std::string::npos) {
    Problem(name, "contains a NUL character");
    return false;
  }
  if (presence == kRequired && node->text.empty()) {
    Problem(name, "is empty");
    return false;
  }
  *out = node->text;
  return true;
}

bool ConfigReader::Bool(const std::string& name, bool* out, Presence presence) {
  static const std::vector<std::pair<std::string, bool>> kWords = {
      {"on", true}, {"off", false}, {"true", true}, {"false", false}, {"yes", true}, {"no", false}};
  const ConfigNode* node = FindScalar(name, presence);
  if (node == nullptr) return false;
  for (const auto& [word, value] : kWords) {
    if (node->text == word) {
      *out = value;
      return true;
    }
  }
  Problem(name, fmt::format("'{}' is neither on nor off", node->text));
  return false;
}

bool ConfigReader::Uint(const std::string& name, uint64_t* out, uint64_t min, uint64_t max,
                        Presence presence) {
  const ConfigNode* node = FindScalar(name, presence);
  if (node == nullptr) return false;
  uint64_t value = 0;
  const std::string& text = node->text;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || end != text.data() + text.size() || error == std::errc::invalid_argument) {
    Problem(name, fmt::format("'{}' is not a whole number", text));
    return false;
  }
  if (error == std::errc::result_out_of_range || value < min || value > max) {
    Problem(name, fmt::format("{} is outside {} to {}", text, min, max));
    return false;
  }
  *out = value;
  return true;
}

namespace {
// Common end of the getters that parse a scalar's text.
template <typename T>
bool Store(ConfigReader& reader, const std::string& name, absl::StatusOr<T> parsed, T* out) {
  if (!parsed.ok()) {
    reader.Problem(name, Message(parsed.status()));
    return false;
  }
  *out = *std::move(parsed);
  return true;
}
}  // namespace

bool ConfigReader::Size(const std::string& name, uint64_t* out, Presence presence) {
  const ConfigNode* node = FindScalar(name, presence);
  return node != nullptr && Store(*this, name, ParseSize(node->text), out);
}

bool ConfigReader::Time(const std::string& name, Duration* out, Presence presence) {
  const ConfigNode* node = FindScalar(name, presence);
  return node != nullptr && Store(*this, name, ParseDuration(node->text), out);
}

bool ConfigReader::Endpoint(const std::string& name, Address* out, Presence presence) {
  const ConfigNode* node = FindScalar(name, presence);
  return node != nullptr && Store(*this, name, ParseAddress(node->text), out);
}

bool ConfigReader::Path(const std::string& name, std::string* out, Presence presence) {
  std::string text;
  if (!Text(name, &text, presence)) return false;
  if (text.empty() || text[0] != '/') {
    Problem(name, fmt::format("'{}' is not an absolute path", text));
    return false;
  }
  *out = text;
  return true;
}

bool ConfigReader::ChoiceIndex(const std::string& name, const std::vector<std::string>& words, size_t* index,
                               Presence presence) {
  const ConfigNode* node = FindScalar(name, presence);
  if (node == nullptr) return false;
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i] == node->text) {
      *index = i;
      return true;
    }
  }
  auto near = Nearest(node->text, words);
  Problem(name, fmt::format("'{}' is not one of {}{}", node->text, fmt::join(words, ", "),
                            near ? fmt::format("; did you mean '{}'?", *near) : ""));
  return false;
}

bool ConfigReader::TextList(const std::string& name, std::vector<std::string>* out, Presence presence) {
  const ConfigNode* node = FindKind(name, ConfigNode::Kind::kList, presence);
  if (node == nullptr) return false;
  std::vector<std::string> values;
  for (size_t i = 0; i < node->items.size(); ++i) {
    if (node->items[i].kind != ConfigNode::Kind::kScalar) {
      state_->problems.push_back(
          {node->items[i].line, fmt::format("{}[{}]: expected a single value, found {}", FieldPath(name), i,
                                            KindName(node->items[i].kind))});
      return false;
    }
    values.push_back(node->items[i].text);
  }
  *out = std::move(values);
  return true;
}

bool ConfigReader::TextMap(const std::string& name, std::map<std::string, std::string>* out,
                           Presence presence) {
  const ConfigNode* node = FindKind(name, ConfigNode::Kind::kMap, presence);
  if (node == nullptr) return false;
  std::map<std::string, std::string> values;
  for (const auto& [key, value] : node->fields) {
    if (value.kind != ConfigNode::Kind::kScalar) {
      state_->problems.push_back({value.line, fmt::format("{}.{}: expected a single value, found {}",
                                                          FieldPath(name), key, KindName(value.kind))});
      return false;
    }
    values[key] = value.text;
  }
  *out = std::move(values);
  return true;
}

bool ConfigReader::Map(const std::string& name, const std::function<void(ConfigReader&)>& read,
                       Presence presence) {
  const ConfigNode* node = FindKind(name, ConfigNode::Kind::kMap, presence);
  if (node == nullptr) return false;
  ConfigReader inner(state_, node, FieldPath(name));
  read(inner);
  inner.CheckUnknown();
  return true;
}

bool ConfigReader::MapList(const std::string& name, const std::function<void(ConfigReader&)>& read,
                           Presence presence) {
  const ConfigNode* node = FindKind(name, ConfigNode::Kind::kList, presence);
  if (node == nullptr) return false;
  for (size_t i = 0; i < node->items.size(); ++i) {
    ConfigReader inner(state_, &node->items[i], fmt::format("{}[{}]", FieldPath(name), i));
    if (node->items[i].kind != ConfigNode::Kind::kMap) {
      inner.Problem("", fmt::format("expected a map, found {}", KindName(node->items[i].kind)));
      continue;
    }
    read(inner);
    inner.CheckUnknown();
  }
  return true;
}

bool ConfigReader::NamedMaps(const std::string& name,
                             const std::function<void(const std::string&, ConfigReader&)>& read,
                             Presence presence) {
  const ConfigNode* node = FindKind(name, ConfigNode::Kind::kMap, presence);
  if (node == nullptr) return false;
  for (const auto& [key, value] : node->fields) {
    ConfigReader inner(state_, &value, FieldPath(name) + "." + key);
    if (value.kind != ConfigNode::Kind::kMap) {
      inner.Problem("", fmt::format("expected a map, found {}", KindName(value.kind)));
      continue;
    }
    read(key, inner);
    inner.CheckUnknown();
  }
  return true;
}

void ConfigReader::CheckUnknown() {
  for (const auto& [key, value] : node_->fields) {
    if (std::find(known_.begin(), known_.end(), key) != known_.end()) continue;
    auto near = Nearest(key, known_);
    Problem(key, near ? fmt::format("unknown field; did you mean '{}'?", *near)
                      : fmt::format("unknown field; known are {}", fmt::join(known_, ", ")));
  }
}

}  // namespace baton
