// A domain's XML that is changed in places and written again as it was. Internal to the libvirt driver.
#pragma once

#include <pugixml.hpp>
#include <sstream>
#include <string>

#include "agent/vmm/libvirt/domain_description.h"
#include "common/status.h"

namespace baton::vmm {

class XmlDocument {
 public:
  // InvalidArgument if it is no domain's XML, or too big.
  absl::Status Load(const std::string& xml) {
    if (xml.size() > kMaxDomainXml)
      return Error(absl::StatusCode::kInvalidArgument, "domain XML: {} bytes are more than {}", xml.size(),
                   kMaxDomainXml);
    // Everything is kept: comments, declarations, the space between elements, the ends of lines.
    // "Fragment" keeps the space outside of the root element.
    constexpr unsigned kKeep =
        (pugi::parse_full | pugi::parse_ws_pcdata | pugi::parse_fragment) & ~pugi::parse_eol;
    const pugi::xml_parse_result parsed = document_.load_buffer(xml.data(), xml.size(), kKeep);
    if (!parsed)
      return Error(absl::StatusCode::kInvalidArgument, "domain XML: {} at byte {}", parsed.description(),
                   parsed.offset);
    if (!domain()) return Error(absl::StatusCode::kInvalidArgument, "domain XML: there is no <domain>");
    return absl::OkStatus();
  }

  pugi::xml_node domain() const { return document_.child("domain"); }

  std::string Text() const {
    std::ostringstream out;
    document_.save(out, "", pugi::format_raw | pugi::format_no_declaration, pugi::encoding_utf8);
    return out.str();
  }

 private:
  pugi::xml_document document_;
};

}  // namespace baton::vmm
