#include "agent/virtio/features.h"

#include <fmt/format.h>

#include <map>

namespace baton::virtio {
namespace {

using Names = std::map<unsigned, const char*>;

const Names& CommonNames() {
  static const Names names = {
      {24, "NOTIFY_ON_EMPTY"},   {26, "LOG_ALL"},           {27, "ANY_LAYOUT"},
      {28, "INDIRECT_DESC"},     {29, "EVENT_IDX"},         {30, "PROTOCOL"},
      {32, "VERSION_1"},         {33, "ACCESS_PLATFORM"},   {34, "RING_PACKED"},
      {35, "IN_ORDER"},          {36, "ORDER_PLATFORM"},    {37, "SR_IOV"},
      {38, "NOTIFICATION_DATA"}, {39, "NOTIF_CONFIG_DATA"}, {40, "RING_RESET"},
      {41, "ADMIN_VQ"},          {43, "SUSPEND"},           {49, "PARTIAL_ORDER (experimental)"}};
  return names;
}

const Names& BlkNames() {
  static const Names names = {{1, "SIZE_MAX"},      {2, "SEG_MAX"},  {4, "GEOMETRY"},      {5, "RO"},
                              {6, "BLK_SIZE"},      {9, "FLUSH"},    {10, "TOPOLOGY"},     {11, "CONFIG_WCE"},
                              {12, "MQ"},           {13, "DISCARD"}, {14, "WRITE_ZEROES"}, {15, "LIFETIME"},
                              {16, "SECURE_ERASE"}, {17, "ZONED"}};
  return names;
}

const Names& NetNames() {
  static const Names names = {{0, "CSUM"},
                              {1, "GUEST_CSUM"},
                              {2, "CTRL_GUEST_OFFLOADS"},
                              {3, "MTU"},
                              {5, "MAC"},
                              {7, "GUEST_TSO4"},
                              {8, "GUEST_TSO6"},
                              {9, "GUEST_ECN"},
                              {10, "GUEST_UFO"},
                              {11, "HOST_TSO4"},
                              {12, "HOST_TSO6"},
                              {13, "HOST_ECN"},
                              {14, "HOST_UFO"},
                              {15, "MRG_RXBUF"},
                              {16, "STATUS"},
                              {17, "CTRL_VQ"},
                              {18, "CTRL_RX"},
                              {19, "CTRL_VLAN"},
                              {21, "GUEST_ANNOUNCE"},
                              {22, "MQ"},
                              {23, "CTRL_MAC_ADDR"},
                              {56, "HOST_USO"},
                              {57, "HASH_REPORT"},
                              {59, "GUEST_HDRLEN"},
                              {60, "RSS"},
                              {61, "RSC_EXT"},
                              {62, "STANDBY"},
                              {63, "SPEED_DUPLEX"}};
  return names;
}

const Names& ProtocolNames() {
  static const Names names = {{0, "MQ"},
                              {1, "LOG_SHMFD"},
                              {2, "RARP"},
                              {3, "REPLY_ACK"},
                              {4, "NET_MTU"},
                              {5, "BACKEND_REQ"},
                              {6, "CROSS_ENDIAN"},
                              {7, "CRYPTO_SESSION"},
                              {8, "PAGEFAULT"},
                              {9, "CONFIG"},
                              {10, "BACKEND_SEND_FD"},
                              {11, "HOST_NOTIFIER"},
                              {12, "INFLIGHT_SHMFD"},
                              {13, "RESET_DEVICE"},
                              {14, "INBAND_NOTIFICATIONS"},
                              {15, "CONFIGURE_MEM_SLOTS"},
                              {16, "STATUS"},
                              {17, "XEN_MMAP"},
                              {18, "SHARED_OBJECT"},
                              {19, "DEVICE_STATE"}};
  return names;
}

std::string Join(uint64_t features, std::initializer_list<const Names*> tables) {
  std::string out;
  for (unsigned bit = 0; bit < 64; ++bit) {
    if (!(features & Bit(bit))) continue;
    if (!out.empty()) out += ", ";
    const char* name = nullptr;
    for (const Names* table : tables) {
      if (auto it = table->find(bit); it != table->end()) name = it->second;
    }
    out += name ? name : fmt::format("bit {}", bit);
  }
  return out.empty() ? "none" : out;
}

}  // namespace

absl::Status CheckOrderFeatures(uint64_t acked, bool experimental) {
  if (!(acked & kFPartialOrder)) return absl::OkStatus();
  if (!experimental) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "feature 49 was acknowledged, which is PARTIAL_ORDER only where that experiment is on");
  }
  if (acked & kFInOrder) {
    return Error(absl::StatusCode::kInvalidArgument,
                 "IN_ORDER and PARTIAL_ORDER were both acknowledged; at most one of them can be");
  }
  if (!(acked & kFVersion1)) {
    return Error(absl::StatusCode::kInvalidArgument, "PARTIAL_ORDER was acknowledged without VERSION_1");
  }
  return absl::OkStatus();
}

std::string FeatureNames(uint64_t features, v1::DeviceClass device_class) {
  if (device_class == v1::BLK) return Join(features, {&CommonNames(), &BlkNames()});
  if (device_class == v1::NET) return Join(features, {&CommonNames(), &NetNames()});
  return Join(features, {&CommonNames()});
}

std::string ProtocolFeatureNames(uint64_t features) { return Join(features, {&ProtocolNames()}); }

}  // namespace baton::virtio
