// A migration's life as one HTML page. Pure.
#pragma once

#include <string>

#include "baton/v1/migrations.pb.h"

namespace baton::client {

// Self-contained: styles and drawings (SVG) are inline, nothing is loaded, there is no script. Everything
// that came from elsewhere is escaped.
std::string RenderReport(const v1::Migration& migration);

// Text for HTML and for attribute values.
std::string EscapeHtml(const std::string& text);

}  // namespace baton::client
