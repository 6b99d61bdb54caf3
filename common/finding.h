// Findings of checks: what stands in the way of a migration and what to do about it.
#pragma once

#include <string>
#include <vector>

#include "baton/v1/types.pb.h"

namespace baton {

v1::Finding MakeFinding(v1::Severity severity, const std::string& code, const std::string& subject,
                        const std::string& message, const std::string& remedy);
bool HasBlocker(const std::vector<v1::Finding>& findings);

}  // namespace baton
