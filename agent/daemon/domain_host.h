// What this host's libvirt is to a migration: its socket, QEMU's user, and which of a domain's disks the
// configuration declares to be the same everywhere.
#pragma once

#include <string>

#include "agent/daemon/agent_config.h"
#include "baton/v1/agent_session.pb.h"
#include "baton/v1/fleet.pb.h"
#include "baton/v1/shim.pb.h"
#include "common/status.h"

namespace baton::daemon {

// Socket, user and group; the rest is left empty. NotFound names the field of the configuration that would
// help.
absl::StatusOr<v1::DomainHost> DescribeDomainHost(const LibvirtConfig& config);

// The path is one of `shared` or below one. Pure.
bool DeclaredShared(const std::string& path, const std::vector<std::string>& shared);

// Every disk of the domain that QEMU may write, that is a file or device of this host and is not copied, is
// below one of `shared`; and there is at least one. Pure.
bool DisksAreShared(const v1::Domain& domain, const v1::DomainTarget& target,
                    const std::vector<std::string>& shared);

// --- pure ---
// The value of `field` in libvirt's qemu.conf ("user", "group"), or empty.
std::string QemuConfValue(const std::string& text, const std::string& field);

}  // namespace baton::daemon
