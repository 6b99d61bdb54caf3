#include "common/finding.h"

#include <algorithm>

namespace baton {

v1::Finding MakeFinding(v1::Severity severity, const std::string& code, const std::string& subject,
                        const std::string& message, const std::string& remedy) {
  v1::Finding finding;
  finding.set_severity(severity);
  finding.set_code(code);
  finding.set_subject(subject);
  finding.set_message(message);
  finding.set_remedy(remedy);
  return finding;
}

bool HasBlocker(const std::vector<v1::Finding>& findings) {
  return std::any_of(findings.begin(), findings.end(),
                     [](const v1::Finding& finding) { return finding.severity() == v1::BLOCKER; });
}

}  // namespace baton
