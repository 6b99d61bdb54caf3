#include "tests/lab/vm/options.h"

#include <cstdlib>
#include <map>
#include <sstream>

#include "agent/vmm/qmp/qemu_command.h"
#include "tests/lab/guest/block_format.h"

namespace baton::lab {
namespace {

template <typename... Args>
absl::Status Wrong(fmt::format_string<Args...> format, Args&&... args) {
  return Error(absl::StatusCode::kInvalidArgument, format, std::forward<Args>(args)...);
}

absl::StatusOr<uint64_t> ParseNumber(const std::string& what, const std::string& text) {
  char* end = nullptr;
  errno = 0;
  uint64_t value = std::strtoull(text.c_str(), &end, 0);
  unsigned shift = 0;
  if (*end == 'k') shift = 10;
  if (*end == 'M') shift = 20;
  if (*end == 'G') shift = 30;
  if (shift) ++end;
  if (errno != 0 || text.empty() || text[0] == '-' || *end != 0 || value > (UINT64_MAX >> shift)) {
    return Wrong("{}: '{}' is no number", what, text);
  }
  return value << shift;
}

// "driver,a=b,c=d" with doubled commas in values, as QEMU has it. The first word has the key "".
std::map<std::string, std::string> Properties(const std::string& text) {
  std::map<std::string, std::string> out;
  std::string word;
  bool first = true;
  auto finish = [&] {
    size_t equals = word.find('=');
    if (first && equals == std::string::npos) {
      out[""] = word;
    } else if (equals != std::string::npos) {
      out[word.substr(0, equals)] = word.substr(equals + 1);
    } else {
      out[word] = "on";
    }
    first = false;
    word.clear();
  };
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != ',') {
      word += text[i];
    } else if (i + 1 < text.size() && text[i + 1] == ',') {
      word += ',';
      ++i;
    } else {
      finish();
    }
  }
  finish();
  return out;
}

struct Chardevs {
  std::map<std::string, std::map<std::string, std::string>> by_id;
};

absl::Status AddDevice(const std::string& text, Chardevs& chardevs,
                       const std::map<std::string, std::map<std::string, std::string>>& netdevs,
                       LaunchOptions& out) {
  auto properties = Properties(text);
  const std::string driver = properties[""];
  if (driver == "virtio-balloon-pci") {
    out.balloon = true;
    return absl::OkStatus();
  }
  DeviceOptions device;
  const std::string id = properties["id"];
  if (id.rfind("dev-", 0) != 0) return Wrong("-device {}: the id is not dev-NAME", text);
  device.name = id.substr(4);
  std::string chardev = properties["chardev"];
  if (driver == "vhost-user-blk-pci") {
    ASSIGN_OR_RETURN(uint64_t queues, ParseNumber("num-queues", properties["num-queues"]));
    ASSIGN_OR_RETURN(uint64_t size, ParseNumber("queue-size", properties["queue-size"]));
    device.queues = static_cast<uint32_t>(queues);
    device.queue_size = static_cast<uint32_t>(size);
  } else if (driver == "virtio-net-pci") {
    device.class_ = v1::NET;
    device.mac = properties["mac"];
    ASSIGN_OR_RETURN(uint64_t size, ParseNumber("rx_queue_size", properties["rx_queue_size"]));
    device.queue_size = static_cast<uint32_t>(size);
    auto netdev = netdevs.find(properties["netdev"]);
    if (netdev == netdevs.end()) return Wrong("-device {}: its netdev is not known", text);
    auto found = netdev->second;
    chardev = found["chardev"];
    ASSIGN_OR_RETURN(uint64_t queues, ParseNumber("queues", found["queues"]));
    device.queues = static_cast<uint32_t>(queues);
  } else if (driver == vmm::kGenericDevice && properties["virtio-id"] == "5") {
    // Baton's balloon, behind QEMU's generic vhost-user device.
    device.class_ = v1::BALLOON;
    ASSIGN_OR_RETURN(uint64_t queues, ParseNumber("num_vqs", properties["num_vqs"]));
    ASSIGN_OR_RETURN(uint64_t size, ParseNumber("vq_size", properties["vq_size"]));
    device.queues = static_cast<uint32_t>(queues);
    device.queue_size = static_cast<uint32_t>(size);
  } else {
    return Wrong("-device {}: not a device of the lab guest", driver);
  }
  device.packed = properties["packed"] == "on";
  auto found = chardevs.by_id.find(chardev);
  if (found == chardevs.by_id.end()) return Wrong("-device {}: its chardev is not known", text);
  device.socket = found->second["path"];
  if (found->second.count("reconnect-ms") != 0) {
    ASSIGN_OR_RETURN(uint64_t ms, ParseNumber("reconnect-ms", found->second["reconnect-ms"]));
    device.reconnect_ms = static_cast<uint32_t>(ms);
  } else if (found->second.count("reconnect") != 0) {
    device.reconnect_ms = 1000;
  }
  if (device.queues == 0 || device.queues > 128 || device.queue_size == 0 || device.queue_size > 32768) {
    return Wrong("-device {}: queues or queue size out of range", text);
  }
  out.devices.push_back(std::move(device));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<WorkloadOptions> ParseWorkloadOptions(const std::string& cmdline) {
  WorkloadOptions out;
  std::map<std::string, uint64_t> numbers;
  std::istringstream words(cmdline);
  for (std::string word; words >> word;) {
    size_t equals = word.find('=');
    if (word.rfind("lab.", 0) != 0 || equals == std::string::npos) continue;
    const std::string name = word.substr(4, equals - 4);
    if (name == "disk") continue;  // a path; of the Linux guest
    ASSIGN_OR_RETURN(numbers[name], ParseNumber(word.substr(0, equals), word.substr(equals + 1)));
  }
  auto take = [&](const char* name, auto& value) {
    if (auto it = numbers.find(name); it != numbers.end())
      value = static_cast<std::remove_reference_t<decltype(value)>>(it->second);
  };
  take("packed", out.packed);
  take("in_order", out.in_order);
  take("partial_order", out.partial_order);
  take("event_idx", out.event_idx);
  take("indirect", out.indirect);
  take("inflight", out.inflight);
  take("writers", out.writers);
  take("outstanding", out.writers);
  take("blocks", out.blocks);
  take("delay_us", out.delay_us);
  take("overlap", out.overlap);
  take("pages", out.pages);
  take("dirty", out.dirty);
  take("live", out.live);
  take("freed", out.freed);
  take("reuse", out.reuse);
  take("packets", out.packets);
  take("packet_bytes", out.packet_bytes);
  take("control", out.control);
  take("report", out.report);
  if (out.writers == 0 || out.writers > 4096) return Wrong("lab.writers: {} is not 1 to 4096", out.writers);
  if (out.blocks / out.writers <= kHotBlocks || out.blocks > (uint64_t{1} << 28)) {
    return Wrong("lab.blocks: {} for {} writers; each needs more than {}", out.blocks, out.writers,
                 kHotBlocks);
  }
  if (out.in_order && out.partial_order)
    return Wrong("lab.in_order and lab.partial_order exclude each other");
  if (out.packet_bytes < 64 || out.packet_bytes > 1514)
    return Wrong("lab.packet_bytes: {} is not 64 to 1514", out.packet_bytes);
  return out;
}

absl::StatusOr<LaunchOptions> ParseCommandLine(const std::vector<std::string>& argv) {
  LaunchOptions out;
  Chardevs chardevs;
  std::map<std::string, std::map<std::string, std::string>> netdevs;
  for (size_t i = 0; i < argv.size(); ++i) {
    const std::string& word = argv[i];
    if (word == "--version" || word == "-version") {
      out.version = true;
      return out;
    }
    if (word == "-nodefaults" || word == "-no-user-config" || word == "-S") continue;
    if (i + 1 >= argv.size()) return Wrong("{}: not an argument of the lab guest", word);
    const std::string& value = argv[++i];
    auto properties = Properties(value);
    if (word == "-name") {
      out.name = properties[""];
    } else if (word == "-object") {
      if (properties[""] != "memory-backend-file" || properties["share"] != "on")
        return Wrong("-object {}: not shared memory in a file", value);
      out.memory_path = properties["mem-path"];
      ASSIGN_OR_RETURN(out.memory_bytes, ParseNumber("size", properties["size"]));
    } else if (word == "-machine") {
      if (value == "help") {
        out.machine_help = true;
        return out;
      }
    } else if (word == "-chardev") {
      if (properties[""] != "socket") return Wrong("-chardev {}: not a socket", value);
      if (properties["id"] == "qmp") {
        out.qmp_path = properties["path"];
        if (properties.count("fd") != 0) {
          ASSIGN_OR_RETURN(uint64_t fd, ParseNumber("fd", properties["fd"]));
          out.qmp_fd = static_cast<int>(fd);
        }
      } else if (properties["id"] == "console") {
        out.console_path = properties["path"];
        out.console_log = properties["logfile"];
      }
      chardevs.by_id[properties["id"]] = properties;
    } else if (word == "-netdev") {
      netdevs[properties["id"]] = properties;
    } else if (word == "-device") {
      RETURN_IF_ERROR(AddDevice(value, chardevs, netdevs, out));
    } else if (word == "-append") {
      out.cmdline = value;
    } else if (word == "-incoming") {
      if (value != "defer") return Wrong("-incoming {}: only defer is known", value);
      out.incoming = true;
    } else if (word != "-accel" && word != "-m" && word != "-smp" && word != "-cpu" && word != "-display" &&
               word != "-vga" && word != "-serial" && word != "-mon" && word != "-kernel" &&
               word != "-initrd" && word != "-msg") {
      return Wrong("{}: not an argument of the lab guest", word);
    }
  }
  if (out.memory_path.empty() || out.memory_bytes == 0)
    return Wrong("-object memory-backend-file is missing");
  if (out.qmp_fd < 0 && out.qmp_path.empty()) return Wrong("-chardev of the monitor is missing");
  return out;
}

}  // namespace baton::lab
