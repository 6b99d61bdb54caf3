// A vhost-user back-end that this process serves: one device, one connection after the other, on a thread of
// its own. What the device does with its queues is the model's.
//
// Security model: the front-end is a mediator of this same shim, but what it forwards came from a VMM. Every
// message is validated (wire.h), memory is only what the VM's RAM blocks hold, rings are the checked ones of
// virtio/device_queue.h. A message that is refused closes the connection; the front-end comes back.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "agent/memory/guest_ram.h"
#include "agent/virtio/device_queue.h"
#include "agent/virtio/guest_memory.h"
#include "common/clock.h"
#include "common/status.h"

namespace baton::vhost {

// All calls come from the server's thread.
class DeviceModel {
 public:
  virtual ~DeviceModel() = default;
  // Features of device and rings to offer. The server adds those of vhost-user.
  virtual uint64_t features() const = 0;
  virtual uint32_t queues() const = 0;
  virtual uint32_t config_size() const = 0;
  virtual void ReadConfig(uint32_t offset, std::span<uint8_t> out) const = 0;
  // `front_end`: not the driver's, but what a device at another host had.
  virtual absl::Status WriteConfig(uint32_t offset, std::span<const uint8_t> data, bool front_end) = 0;
  // What the driver acknowledged.
  virtual void SetFeatures(uint64_t acked) = 0;
  // Something may be available in queue `index`: handle it, Stage and Publish.
  virtual absl::Status Serve(uint32_t index, virtio::DeviceQueue& queue,
                             const virtio::GuestMemory& memory) = 0;
  // The queue stops after this. Whatever was fetched must be returned or wound back.
  virtual void BeforeStop(uint32_t index, virtio::DeviceQueue& queue) = 0;
  // A front-end connected, or is gone (its rings have stopped). Until the next SetFeatures nothing is
  // negotiated.
  virtual void OnConnection(bool connected) = 0;
};

struct DeviceServerOptions {
  // For messages.
  std::string name;
  std::string listen_path;
  // Guest memory; its layout must be set before rings are started. Must outlive the server.
  const memory::GuestRam* ram = nullptr;
};

class DeviceServer {
 public:
  // Listens; the model must outlive the server, and is called from now on.
  static absl::StatusOr<std::unique_ptr<DeviceServer>> Start(DeviceServerOptions options, DeviceModel& model);
  // Closes the connection, joins the thread, removes the socket.
  ~DeviceServer();
  DeviceServer(const DeviceServer&) = delete;
  DeviceServer& operator=(const DeviceServer&) = delete;

  const std::string& path() const;
  // Runs `function` on the server's thread, soon; in the order of posting. Any thread.
  void Post(std::function<void()> function);
  // Tells the front-end that the configuration space changed, or the next one if there is none now. On the
  // server's thread.
  void ConfigChanged();

 private:
  class Impl;
  explicit DeviceServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace baton::vhost
