// What a lab guest is told: QEMU's command line, as agent/vmm/qmp/qemu_command.cc makes it, and the options
// of its workload in -append.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "baton/v1/vm_spec.pb.h"
#include "common/status.h"

namespace baton::lab {

// Options "lab.NAME=NUMBER" of the workload, in -append (boot.cmdline of a VM spec); those without a meaning
// here are ignored, as a kernel ignores them. Numbers may end in k, M or G (powers of 1024).
struct WorkloadOptions {
  // --- ring features that the drivers ask for, where the device offers them ---
  bool packed = false;
  bool in_order = false;
  bool partial_order = false;
  bool event_idx = true;
  bool indirect = true;
  // Ask for an in-flight region as QEMU does (GET_INFLIGHT_FD), where offered.
  bool inflight = true;
  // --- disks ---
  // Writers of each disk, each with its own region and one write at a time: the requests in flight.
  // "outstanding" is another name for it.
  uint32_t writers = 2;
  // 4 KiB blocks of a disk to use; more than kHotBlocks for each writer.
  uint64_t blocks = 2048;
  // Pause of a writer after each write, microseconds.
  uint64_t delay_us = 0;
  // One write in so many is preceded by an overlapping one that nobody waits for; 0: none. For devices that
  // keep overlapping requests in order.
  uint32_t overlap = 0;
  // --- memory ---
  // Pages to rewrite and check, and how many a second.
  uint64_t pages = 1024;
  uint64_t dirty = 1000;
  // Bytes that are in use besides, and bytes that were written and then freed (for the balloon's hints).
  uint64_t live = 0;
  uint64_t freed = 0;
  // Pages a second of the freed ones that are taken into use again, until half of them are; from then on they
  // are checked like the live ones, and no hint may name them.
  uint64_t reuse = 0;
  // --- net ---
  // Packets a second that each NIC sends on each queue pair, and bytes of each.
  uint64_t packets = 1000;
  uint32_t packet_bytes = 256;
  // Drive the control queue (QEMU keeps that of a vhost-user NIC to itself).
  bool control = false;
  // --- console ---
  // A progress line every so many writes; 0: none.
  uint64_t report = 500;
};

// InvalidArgument names the option.
absl::StatusOr<WorkloadOptions> ParseWorkloadOptions(const std::string& cmdline);

// A virtio device behind a vhost-user socket.
struct DeviceOptions {
  std::string name;
  v1::DeviceClass class_ = v1::BLK;
  // The socket to connect to.
  std::string socket;
  // blk: request queues; net: queue pairs.
  uint32_t queues = 1;
  uint32_t queue_size = 128;
  bool packed = false;  // the device's own packed=on
  std::string mac;
  // Until a lost connection is tried again, and between two tries; milliseconds.
  uint32_t reconnect_ms = 200;
};

struct LaunchOptions {
  bool version = false;       // --version
  bool machine_help = false;  // -machine help
  std::string name = "lab";
  std::string memory_path;
  uint64_t memory_bytes = 0;
  std::vector<DeviceOptions> devices;
  bool balloon = false;
  // Console: a socket to listen at, and a file to which everything is appended.
  std::string console_path, console_log;
  // Monitor: a listening socket by number, or a path to listen at.
  int qmp_fd = -1;
  std::string qmp_path;
  std::string cmdline;
  bool incoming = false;
};

// Takes exactly what BuildQemuCommand makes; anything else is an InvalidArgument that names the argument, so
// that a change there is noticed here.
absl::StatusOr<LaunchOptions> ParseCommandLine(const std::vector<std::string>& argv);

}  // namespace baton::lab
