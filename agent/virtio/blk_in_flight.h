// Reads from guest memory what the requests of an in-flight set are, without a queue object: for whoever
// decides about a device that another process serves. Pure: memory comes through MemoryView.
//
// Security model: chains and headers are the guest's, and it may change them while it runs. Every walk is
// bounded, each value is read once, and a request whose chain is malformed is of the class that allows
// nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "agent/virtio/inflight.h"
#include "agent/virtio/memory_view.h"
#include "agent/virtio/request_class.h"

namespace baton::virtio {

// A piece of guest memory.
struct GuestSpan {
  uint64_t gpa = 0;
  uint64_t size = 0;
};

// `desc`: guest physical address of the ring's descriptors (of a split ring the table; a packed set holds its
// own). `n`: size of the ring. One for each request of `set`, in its order. `buffers`, if given, gets what
// the device may write of them: addresses and lengths are the guest's, and not checked.
std::vector<BlkRequest> ReadBlkRequests(const MemoryView& memory, uint64_t desc, uint16_t n,
                                        const InflightView& set, std::vector<GuestSpan>* buffers = nullptr);

// The classes of the set's requests, without the rest of what ReadBlkRequests finds. Of a disk they are read
// from memory, of other devices ClassesOf.
ClassesPresent ReadClasses(const MemoryView& memory, uint64_t desc, uint16_t n, const InflightView& set,
                           v1::DeviceClass device_class, std::vector<GuestSpan>* buffers = nullptr);

}  // namespace baton::virtio
