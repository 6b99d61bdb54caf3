// Reading YAML that people write: configuration files and VM specs. Every problem is reported as
// "file:line: field: problem", all problems of a file at once; fields that nobody asked for are refused, with
// the nearest known name. No exceptions leave; nothing of yaml-cpp is visible here.
//
//   ASSIGN_OR_RETURN(auto doc, ConfigDocument::FromFile(path));
//   ConfigReader root = doc.Root();
//   root.Text("name", &out.name, kRequired);
//   root.Map("peer", [&](ConfigReader& peer) { peer.Text("listen", &out.listen); });
//   RETURN_IF_ERROR(doc.Finish(root));
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/clock.h"
#include "common/status.h"
#include "common/units.h"

namespace baton {

// A value of the document, independent of the YAML library.
struct ConfigField;
struct ConfigNode {
  enum class Kind { kNull, kScalar, kList, kMap };
  Kind kind = Kind::kNull;
  int line = 0;  // 1-based
  std::string text;
  std::vector<ConfigNode> items;
  std::vector<ConfigField> fields;  // in file order, names unique
};
struct ConfigField {
  std::string name;
  ConfigNode value;
};

enum Presence { kOptional, kRequired };

class ConfigReader;

// A parsed file and the problems found in it. Move-only; readers point into it. One thread.
class ConfigDocument {
 public:
  // NotFound/PermissionDenied with the path, or InvalidArgument for text that is not one YAML map. Files
  // above 1 MiB and documents above 100 000 values (alias bombs) are refused.
  static absl::StatusOr<ConfigDocument> FromFile(const std::string& path);
  // `name` stands for the file in messages.
  static absl::StatusOr<ConfigDocument> FromText(const std::string& text, const std::string& name);

  ConfigReader Root();
  // Adds a problem at `field` ("peer.tls", "devices[1].mac"), placed at that field's line or that of the
  // nearest enclosing one.
  void AddProblem(const std::string& field, const std::string& problem);
  // Adds each "field: problem" line of a validator's message with its line in the file; nothing if OK.
  void AddProblems(const absl::Status& status);
  // Complains about unknown fields of `root`, then answers OK, or InvalidArgument with one line a problem, in
  // file order.
  absl::Status Finish(ConfigReader& root);

 private:
  friend class ConfigReader;
  struct State;
  explicit ConfigDocument(std::shared_ptr<State> state) : state_(std::move(state)) {}
  std::shared_ptr<State> state_;
};

// Reads the fields of one map. A getter leaves `out` alone when the field is absent or wrong, answers whether
// a good value was there, and records problems in the document. A field written without a value counts as a
// mistake.
class ConfigReader {
 public:
  bool Text(const std::string& name, std::string* out, Presence presence = kOptional);
  bool Bool(const std::string& name, bool* out, Presence presence = kOptional);
  bool Uint(const std::string& name, uint64_t* out, uint64_t min, uint64_t max,
            Presence presence = kOptional);
  // See ParseSize, ParseDuration, ParseAddress.
  bool Size(const std::string& name, uint64_t* out, Presence presence = kOptional);
  bool Time(const std::string& name, Duration* out, Presence presence = kOptional);
  bool Endpoint(const std::string& name, Address* out, Presence presence = kOptional);
  // An absolute path.
  bool Path(const std::string& name, std::string* out, Presence presence = kOptional);
  bool TextList(const std::string& name, std::vector<std::string>* out, Presence presence = kOptional);
  bool TextMap(const std::string& name, std::map<std::string, std::string>* out,
               Presence presence = kOptional);
  // One of a list of words.
  template <typename T>
  bool Choice(const std::string& name, const std::vector<std::pair<std::string, T>>& choices, T* out,
              Presence presence = kOptional) {
    std::vector<std::string> words;
    for (const auto& [word, value] : choices) words.push_back(word);
    size_t index = 0;
    if (!ChoiceIndex(name, words, &index, presence)) return false;
    *out = choices[index].second;
    return true;
  }
  // A map under `name`; unknown fields in it are refused after `read`.
  bool Map(const std::string& name, const std::function<void(ConfigReader&)>& read,
           Presence presence = kOptional);
  // A list of maps.
  bool MapList(const std::string& name, const std::function<void(ConfigReader&)>& read,
               Presence presence = kOptional);
  // A map from names that the user chooses to maps.
  bool NamedMaps(const std::string& name, const std::function<void(const std::string&, ConfigReader&)>& read,
                 Presence presence = kOptional);
  // The field stands in the file (whatever its value).
  bool Has(const std::string& name) const;
  // The field is there and has fields of its own.
  bool IsMap(const std::string& name) const;
  // Adds a problem at a field of this map; with an empty name, at the map itself.
  void Problem(const std::string& name, const std::string& problem);
  // "devices[1]", empty at the root.
  const std::string& path() const { return path_; }

 private:
  friend class ConfigDocument;
  ConfigReader(std::shared_ptr<ConfigDocument::State> state, const ConfigNode* node, std::string path)
      : state_(std::move(state)), node_(node), path_(std::move(path)) {}
  const ConfigNode* Find(const std::string& name, Presence presence);
  // Also null, with a problem told, if it is of another kind.
  const ConfigNode* FindKind(const std::string& name, ConfigNode::Kind kind, Presence presence);
  const ConfigNode* FindScalar(const std::string& name, Presence presence);
  bool ChoiceIndex(const std::string& name, const std::vector<std::string>& words, size_t* index,
                   Presence presence);
  std::string FieldPath(const std::string& name) const;
  void CheckUnknown();

  std::shared_ptr<ConfigDocument::State> state_;
  const ConfigNode* node_;
  std::string path_;
  std::vector<std::string> known_;
};

// The whole of a small file. NotFound, PermissionDenied, or ResourceExhausted above `limit` bytes.
absl::StatusOr<std::string> ReadFileLimited(const std::string& path, size_t limit);

}  // namespace baton
