// A domain's XML changed for another host, or for Baton's mediators. Pure: nothing is looked up or touched.
//
// What is not changed stays as it was written, comments and white space included, as far as an XML parser
// keeps it (quotes of attributes become double).
#pragma once

#include <string>
#include <vector>

#include "agent/vmm/libvirt/domain_description.h"
#include "baton/v1/types.pb.h"
#include "common/status.h"

namespace baton::vmm {

// One rule of a destination: what is called `from` at other hosts is called `to` here.
struct RewriteRule {
  enum class Kind {
    kDisk,       // path of a disk's file or device, its backing files, and firmware variables: prefix
    kBridge,     // bridge of an interface, or host device of a direct one: whole name
    kNetwork,    // libvirt network of an interface: whole name
    kVhostUser,  // socket of a vhost-user disk, interface or file system: prefix
    kEmulator,   // path of QEMU: whole path
    kListen,     // address on which graphics (VNC, SPICE) listen: whole address
  };
  Kind kind = Kind::kDisk;
  // A prefix matches whole components: "/a" matches "/a" and "/a/b", not "/ab". Empty matches everything, and
  // `to` is then the new value as a whole.
  std::string from;
  std::string to;
};
// "disk", "bridge", "network", "vhost-user", "emulator", "listen": as configuration names them.
const char* NameOf(RewriteRule::Kind kind);
// InvalidArgument names the kinds that there are.
absl::StatusOr<RewriteRule::Kind> ParseRewriteKind(const std::string& name);

// Something that was changed.
struct XmlChange {
  // "disk vda", "interface net0", "emulator".
  std::string subject;
  std::string from;
  std::string to;
};

struct RewrittenXml {
  std::string xml;
  std::vector<XmlChange> changes;
};

// For each value the first rule of its kind that matches holds. InvalidArgument if the XML is no domain's.
absl::StatusOr<RewrittenXml> RewriteForDestination(const std::string& xml,
                                                   const std::vector<RewriteRule>& rules);

// A device that is behind a mediator in the XML that MediateXml returns.
struct MediatedDevice {
  DomainDevice device;  // as it is described now; device.source is the mediator's socket
  std::string backend;  // the back-end's socket; empty if the XML named the mediator's already
};

struct MediatedXml {
  std::string xml;
  // All devices that are behind mediators now.
  std::vector<MediatedDevice> devices;
  // What could not be put behind one and why, and what the domain lacks.
  std::vector<v1::Finding> findings;
};

// Puts the mediators' sockets, `mediator_dir`/dev-NAME.sock, in the place of the vhost-user back-ends' (disks
// and interfaces), and adds what the mediators need: <reconnect> where it is missing. NAME is the device's
// name, made fit for a file (see MediatorName). Given its own output it changes nothing. InvalidArgument if
// the XML is no domain's, or a mediator's path would be too long for a socket.
absl::StatusOr<MediatedXml> MediateXml(const std::string& xml, const std::string& mediator_dir);

// The name of a device in Baton (a VM's DeviceSpec.name) and in its mediator's socket: its target where it
// has one
// ("vda", "vhu0"), else "net0", "net1" … in document order; small letters, digits and '-'.
std::string MediatorName(const DomainDevice& device);

}  // namespace baton::vmm
