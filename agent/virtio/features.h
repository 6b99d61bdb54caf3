// Feature bits of virtio and vhost-user, and their names for people.
#pragma once

#include <cstdint>
#include <string>

#include "baton/v1/vm_spec.pb.h"
#include "common/status.h"

namespace baton::virtio {

constexpr uint64_t Bit(unsigned bit) { return uint64_t{1} << bit; }

// Ring and transport features (VIRTIO 1.x, chapter 6).
inline constexpr uint64_t kFNotifyOnEmpty = Bit(24);
inline constexpr uint64_t kFAnyLayout = Bit(27);
inline constexpr uint64_t kFIndirectDesc = Bit(28);
inline constexpr uint64_t kFEventIdx = Bit(29);
inline constexpr uint64_t kFVersion1 = Bit(32);
inline constexpr uint64_t kFAccessPlatform = Bit(33);
inline constexpr uint64_t kFRingPacked = Bit(34);
inline constexpr uint64_t kFInOrder = Bit(35);
// VIRTIO 1.4: the status bit SUSPEND.
inline constexpr uint64_t kFSuspend = Bit(43);

// Experimental, and no feature of any version of VIRTIO: docs/partial-order.md. Of the bits that 1.4 reserves
// for rings and transports, the one that it will assign last.
inline constexpr uint64_t kFPartialOrder = Bit(49);

// Used between front-end and back-end only, never shown to a guest (vhost-user.rst).
inline constexpr uint64_t kVhostFLogAll = Bit(26);
inline constexpr uint64_t kVhostUserFProtocolFeatures = Bit(30);
inline constexpr uint64_t kVhostOnly = kVhostFLogAll | kVhostUserFProtocolFeatures;

// virtio-net bits that matter for a comparison of two back-ends.
inline constexpr uint64_t kNetFMtu = Bit(3);
inline constexpr uint64_t kNetFMq = Bit(22);

// Whether a driver may acknowledge these order features together: at most one of IN_ORDER and PARTIAL_ORDER
// (a device may offer both), PARTIAL_ORDER only with VERSION_1, and only where `experimental` says that both
// sides were asked to try it. InvalidArgument names what is wrong.
absl::Status CheckOrderFeatures(uint64_t acked, bool experimental);

// "VERSION_1, EVENT_IDX, bit 7": names of the bits in `features` for a device of `device_class`.
std::string FeatureNames(uint64_t features, v1::DeviceClass device_class);

// The same for vhost-user protocol features.
std::string ProtocolFeatureNames(uint64_t features);

}  // namespace baton::virtio
