// What a domain's XML asks of the host on which it runs, as the checks need it. Pure. Internal to the checks.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "common/status.h"

namespace baton::vmm {

struct NeededDisk {
  std::string target;  // "vda"
  std::string path;    // of a file or a block device; disks of other types are not listed
  std::string format;  // "raw", "qcow2"
  bool block = false;
  bool readonly = false;
  bool shareable = false;
};

struct DomainNeeds {
  std::vector<NeededDisk> disks;
  std::set<std::string> bridges;   // bridges, and host devices of direct interfaces
  std::set<std::string> networks;  // libvirt's
  std::string cpu_mode;            // "custom", "host-model", "host-passthrough", "maximum"; empty: none
  std::string cpu_xml;             // the <cpu> element; empty: none
  bool hugepages = false;
  uint64_t hugepage_size = 0;  // bytes; 0: the host's default
};

// InvalidArgument if the XML is no domain's.
absl::StatusOr<DomainNeeds> ReadDomainNeeds(const std::string& xml);

}  // namespace baton::vmm
