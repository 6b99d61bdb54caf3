// What batonctl shows of libvirt domains, beside what it shows of every VM.
#pragma once

#include <string>
#include <vector>

#include "baton/v1/fleet.pb.h"

namespace baton::client {

// Memory and vCPUs of any VM, whoever describes them.
uint64_t MemoryOf(const v1::Vm& vm);
uint32_t VcpusOf(const v1::Vm& vm);

// "qmp", "libvirt"; with the domain's name where that is not the VM's.
std::string DriverOf(const v1::Vm& vm);

// The devices for a line of a table: "vda(vhost-user)", those that Baton mediates as "vda(mediated)".
// Balloons, random numbers and the like, which move with the guest, are left out.
std::vector<std::string> DomainDeviceNames(const v1::Domain& domain);

// The domain's part of `batonctl describe vm`.
std::string DescribeDomain(const v1::Domain& domain);

}  // namespace baton::client
