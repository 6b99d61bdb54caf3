// What of a device must outlive its shim: which rings ran where, and the region in which the back-end notes
// what it has in flight. Kept in two files of the VM's runtime directory (a tmpfs), mode 0600:
//
//   DEVICE.memo           written by the mediator only, mapped; small, of fixed size
//   DEVICE.inflight-N     the in-flight region (vhost-user.rst, "Inflight I/O tracking"), shared with the
//   back-end
//
// A shim that takes a VM over opens both, and knows of each ring whether a back-end served it, under which
// addresses, and what it had come to. They end with the VM, or with the host: nothing here survives a reboot,
// and neither does a guest.
//
// Crash consistency: the writer may be killed between any two instructions. Every value is kept twice, and
// one aligned store says which copy counts, so a reader sees the old value or the new one. There is one
// writer (the shim's journal lock sees to that). Nothing is written per request.
//
// Security model: the back-end holds the descriptor of the region and may write anything into it or truncate
// it; the region is therefore only copied from, with pread or through a mapping that bears that, written with
// pwrite, and judged afterwards (agent/virtio/inflight.h). The memo's descriptor is given to nobody. Found
// files are opened without following links and must be regular, ours, 0600 and of the size that was noted.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "agent/vhost/wire.h"
#include "common/fd.h"
#include "common/fragile_mapping.h"
#include "common/status.h"

namespace baton::vhost {

// The device as a whole. Plain data: it is stored as it is.
struct MemoDevice {
  // What the guest's driver accepted, without the bits that belong to vhost alone.
  uint64_t features = 0;
  // Of the memory table: another value means another guest, or one that was set up anew.
  uint64_t memory_digest = 0;
  // The region; mmap_size 0: none.
  InflightDescription inflight{};
  uint64_t inflight_inode = 0;
  uint32_t inflight_file = 0;  // N of DEVICE.inflight-N
  uint32_t backend_kind = 0;   // v1::BackendKind of the back-end that laid the region out
  // Device events so far, and the last one (see v1::DeviceEvent).
  uint64_t events = 0;
  int64_t event_time_ns = 0;
  uint32_t event_kind = 0;
  uint32_t event_queue = 0;
  uint64_t event_held = 0;
};

struct MemoRing {
  enum Flag : uint32_t {
    kKnown = 1,    // the rest means something
    kRunning = 2,  // a back-end may have requests of it
    kTold = 4,     // `told` is what the VMM was answered when it stopped the ring
    kBase = 8,     // `base` is the back-end's own answer to GET_VRING_BASE
    // The region holds requests that another host's back-end had in flight, and the ring has not been started
    // with them yet. Nothing but `num` is meant.
    kTakenOver = 16,
  };
  uint32_t flags = 0;
  uint32_t num = 0;
  uint64_t desc = 0, used = 0, avail = 0;  // user addresses, as in SET_VRING_ADDR
  uint32_t told = 0;
  uint32_t base = 0;

  bool known() const { return (flags & kKnown) != 0; }
  bool running() const { return (flags & kRunning) != 0; }
};

// The in-flight region in use.
struct InflightRegion {
  InflightDescription description{};
  UniqueFd fd;
  FragileMapping map;  // of description.mmap_size bytes, from the beginning of the file
  explicit operator bool() const { return fd.valid(); }
};

// Not thread-safe; the mediator's thread.
class DeviceMemo {
 public:
  // `directory` empty: nothing outlives this object. `fresh`: whatever an earlier VM of that name left is
  // removed. Otherwise an existing memo is taken over if it is whole and ours; one that is not is removed,
  // with a warning. Errors: of the file system.
  static absl::StatusOr<std::unique_ptr<DeviceMemo>> Open(const std::string& directory,
                                                          const std::string& device, bool fresh);
  // The files stay.
  ~DeviceMemo();
  DeviceMemo(const DeviceMemo&) = delete;
  DeviceMemo& operator=(const DeviceMemo&) = delete;

  // Something was found of an earlier mediator.
  bool found() const { return found_; }
  MemoDevice device() const;
  void set_device(const MemoDevice& device);
  // `index` below kMaxVrings.
  MemoRing ring(uint32_t index) const;
  void set_ring(uint32_t index, const MemoRing& ring);
  // Forgets all rings; the region and the events stay.
  void ForgetRings();

  // Makes a region of description.mmap_size bytes, filled with `content` (padded with zeros), and notes it as
  // the device's. The one before is removed only then. description.mmap_offset becomes 0: some back-ends add
  // it twice.
  absl::StatusOr<InflightRegion> MakeRegion(InflightDescription description,
                                            const std::vector<uint8_t>& content, uint32_t backend_kind);
  // The region that was noted. NotFound: none. DataLoss: it is not what it was.
  absl::StatusOr<InflightRegion> OpenRegion() const;

  // Removes all files of a device, whether or not they are in order.
  static void Remove(const std::string& directory, const std::string& device);

 private:
  struct Layout;
  DeviceMemo(std::string directory, std::string device)
      : directory_(std::move(directory)), device_(std::move(device)) {}
  std::string RegionPath(uint32_t n) const;

  const std::string directory_, device_;
  Layout* layout_ = nullptr;
  UniqueFd memory_region_;  // without a directory: the region itself
  bool found_ = false;
};

}  // namespace baton::vhost
