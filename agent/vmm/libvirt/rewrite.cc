#include "agent/vmm/libvirt/rewrite.h"

#include <absl/strings/match.h>

#include <optional>
#include <pugixml.hpp>

#include "agent/vmm/libvirt/xml_document.h"

namespace baton::vmm {
namespace {

using Kind = RewriteRule::Kind;

constexpr std::pair<Kind, const char*> kKinds[] = {
    {Kind::kDisk, "disk"},         {Kind::kBridge, "bridge"},
    {Kind::kNetwork, "network"},   {Kind::kVhostUser, "vhost-user"},
    {Kind::kEmulator, "emulator"}, {Kind::kListen, "listen"}};

bool IsPrefixKind(Kind kind) { return kind == Kind::kDisk || kind == Kind::kVhostUser; }

std::string WithoutTrailingSlash(std::string path) {
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  return path;
}

std::optional<std::string> Apply(const RewriteRule& rule, const std::string& value) {
  if (rule.from.empty()) return rule.to;
  if (!IsPrefixKind(rule.kind)) return value == rule.from ? std::optional(rule.to) : std::nullopt;
  const std::string from = WithoutTrailingSlash(rule.from), to = WithoutTrailingSlash(rule.to);
  if (value == from) return to;
  const std::string directory = from == "/" ? from : from + "/";
  if (!absl::StartsWith(value, directory)) return std::nullopt;
  return (to == "/" ? to : to + "/") + value.substr(directory.size());
}

class Rewriter {
 public:
  Rewriter(const std::vector<RewriteRule>& rules, std::vector<XmlChange>* changes)
      : rules_(rules), changes_(changes) {}

  void Attribute(Kind kind, pugi::xml_node node, const char* name, const std::string& subject) {
    const pugi::xml_attribute attribute = node.attribute(name);
    if (!attribute) return;
    if (const auto value = NewValue(kind, attribute.value(), subject)) {
      node.attribute(name).set_value(value->c_str());
    }
  }
  void Text(Kind kind, pugi::xml_node node, const std::string& subject) {
    if (!node || node.text().empty()) return;
    if (const auto value = NewValue(kind, node.text().get(), subject)) node.text().set(value->c_str());
  }

 private:
  std::optional<std::string> NewValue(Kind kind, const std::string& value, const std::string& subject) {
    if (value.empty()) return std::nullopt;
    for (const RewriteRule& rule : rules_) {
      if (rule.kind != kind) continue;
      auto changed = Apply(rule, value);
      if (!changed) continue;
      if (*changed == value) return std::nullopt;
      changes_->push_back({subject, value, *changed});
      return changed;
    }
    return std::nullopt;
  }

  const std::vector<RewriteRule>& rules_;
  std::vector<XmlChange>* changes_;
};

std::string Type(const pugi::xml_node& node) { return node.attribute("type").value(); }

// libvirt follows 200 images of a backing chain; each takes two elements here.
constexpr int kMaxSourceDepth = 500;

// A disk's sources: its own, its backing chain's, a mirror's.
void RewriteSources(const pugi::xml_node& node, const std::string& subject, Rewriter& rewriter,
                    int depth = 0) {
  if (depth > kMaxSourceDepth) return;
  for (const pugi::xml_node& child : node.children()) {
    const std::string name = child.name();
    if (name == "source") {
      for (const char* attribute : {"file", "dev", "dir"})
        rewriter.Attribute(Kind::kDisk, child, attribute, subject);
    }
    if (name == "source" || name == "backingStore" || name == "mirror" || name == "dataStore")
      RewriteSources(child, subject, rewriter, depth + 1);
  }
}

void RewriteDevice(const pugi::xml_node& node, Rewriter& rewriter, const std::string& subject) {
  const std::string name = node.name(), type = Type(node);
  const pugi::xml_node source = node.child("source");
  if (name == "emulator") {
    rewriter.Text(Kind::kEmulator, node, subject);
  } else if (name == "disk" && type == "vhostuser") {
    rewriter.Attribute(Kind::kVhostUser, source, "path", subject);
  } else if (name == "disk" && type != "vhostvdpa") {
    RewriteSources(node, subject, rewriter);
  } else if (name == "interface") {
    if (type == "bridge") rewriter.Attribute(Kind::kBridge, source, "bridge", subject);
    if (type == "direct") rewriter.Attribute(Kind::kBridge, source, "dev", subject);
    if (type == "network") rewriter.Attribute(Kind::kNetwork, source, "network", subject);
    if (type == "vhostuser") rewriter.Attribute(Kind::kVhostUser, source, "path", subject);
  } else if (name == "filesystem") {
    rewriter.Attribute(Kind::kVhostUser, source, "socket", subject);
  } else if (name == "graphics") {
    rewriter.Attribute(Kind::kListen, node, "listen", subject);
    for (const pugi::xml_node& listen : node.children("listen"))
      rewriter.Attribute(Kind::kListen, listen, "address", subject);
  }
}

std::string SubjectOf(const pugi::xml_node& node) {
  const std::string name = node.name();
  std::string which = node.child("target").attribute("dev").value();
  if (which.empty()) which = node.child("target").attribute("dir").value();
  if (which.empty()) which = node.child("alias").attribute("name").value();
  if (which.empty() && name == "graphics") which = Type(node);
  return which.empty() ? name : name + " " + which;
}

}  // namespace

const char* NameOf(RewriteRule::Kind kind) {
  for (const auto& [value, name] : kKinds) {
    if (value == kind) return name;
  }
  return "unknown";
}

absl::StatusOr<RewriteRule::Kind> ParseRewriteKind(const std::string& name) {
  std::string all;
  for (const auto& [value, known] : kKinds) {
    if (name == known) return value;
    all += (all.empty() ? "" : ", ") + std::string(known);
  }
  return Error(absl::StatusCode::kInvalidArgument, "'{}' is no kind of rule; there are {}", name, all);
}

absl::StatusOr<RewrittenXml> RewriteForDestination(const std::string& xml,
                                                   const std::vector<RewriteRule>& rules) {
  XmlDocument document;
  RETURN_IF_ERROR(document.Load(xml));
  RewrittenXml out;
  Rewriter rewriter(rules, &out.changes);
  rewriter.Text(Kind::kDisk, document.domain().child("os").child("nvram"), "nvram");
  for (const pugi::xml_node& node : document.domain().child("devices").children())
    RewriteDevice(node, rewriter, SubjectOf(node));
  out.xml = document.Text();
  return out;
}

}  // namespace baton::vmm
