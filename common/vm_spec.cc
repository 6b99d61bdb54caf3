#include "common/vm_spec.h"

#include <yaml-cpp/yaml.h>

#include <cctype>
#include <set>
#include <utility>
#include <vector>

#include "common/config.h"
#include "common/units.h"

namespace baton {

const char kNameRule[] = "small letters, digits and '-', first a letter or digit, at most 41 characters";

namespace {

constexpr uint64_t kMinMemory = 16ull << 20;  // below it not even a kernel boots
constexpr uint64_t kMaxMemory = 16ull << 40;
constexpr uint64_t kMemoryStep = 2ull << 20;
constexpr uint32_t kMaxVcpus = 255;
constexpr uint32_t kMaxQueues = 64;
constexpr uint32_t kMaxQueueSize = 1024;  // QEMU: VIRTQUEUE_MAX_SIZE
constexpr int kMaxDevices = 16;
constexpr int kMaxExtraArgs = 256;
constexpr size_t kMaxText = 4096;
constexpr char kDefaultMachine[] = "q35";
constexpr uint32_t kDefaultQueueSize = 128;

template <typename T>
using Words = std::vector<std::pair<std::string, T>>;

const Words<v1::BackendKind>& Kinds() {
  static const Words<v1::BackendKind> kWords = {{"unspecified", v1::BACKEND_KIND_UNSPECIFIED},
                                                {"qemu-storage-daemon", v1::QEMU_STORAGE_DAEMON},
                                                {"dpdk", v1::DPDK},
                                                {"spdk", v1::SPDK},
                                                {"libvhost-user", v1::LIBVHOST_USER},
                                                {"lab", v1::LAB},
                                                {"yc-libvhost", v1::YC_LIBVHOST}};
  return kWords;
}
const Words<v1::Recovery>& Recoveries() {
  static const Words<v1::Recovery> kWords = {
      {"default", v1::RECOVERY_DEFAULT}, {"exact", v1::RECOVERY_EXACT}, {"ordered", v1::RECOVERY_ORDERED}};
  return kWords;
}
const Words<v1::DeviceClass>& Classes() {
  static const Words<v1::DeviceClass> kWords = {{"blk", v1::BLK}, {"net", v1::NET}};
  return kWords;
}
const Words<v1::Accelerator>& Accelerators() {
  static const Words<v1::Accelerator> kWords = {
      {"auto", v1::ACCELERATOR_AUTO}, {"kvm", v1::ACCELERATOR_KVM}, {"tcg", v1::ACCELERATOR_TCG}};
  return kWords;
}

template <typename T>
std::string WordOf(const Words<T>& words, T value) {
  for (const auto& [word, v] : words) {
    if (v == value) return word;
  }
  return "unknown";
}
template <typename T>
bool Known(const Words<T>& words, T value) {
  for (const auto& [word, v] : words) {
    if (v == value) return true;
  }
  return false;
}

// QEMU machine types and the like: what cannot smuggle in a further option.
bool IsPlainWord(const std::string& text) {
  if (text.empty() || text.size() > 64) return false;
  for (char c : text) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '-' && c != '.' && c != '_') return false;
  }
  return true;
}

bool ParseMac(const std::string& text, unsigned (&bytes)[6]) {
  if (text.size() != 17) return false;
  for (int i = 0; i < 6; ++i) {
    for (int j = 0; j < 2; ++j) {
      if (!std::isxdigit(static_cast<unsigned char>(text[i * 3 + j]))) return false;
    }
    if (i < 5 && text[i * 3 + 2] != ':') return false;
    bytes[i] = static_cast<unsigned>(std::stoul(text.substr(i * 3, 2), nullptr, 16));
  }
  return true;
}

// Collects "field: problem" lines.
class Problems {
 public:
  template <typename... Args>
  void Add(const std::string& field, fmt::format_string<Args...> format, Args&&... args) {
    if (!text_.empty()) text_ += '\n';
    text_ += field + ": " + fmt::format(format, std::forward<Args>(args)...);
  }
  // A path that may be empty.
  void CheckPath(const std::string& field, const std::string& path) {
    if (path.empty()) return;
    if (path[0] != '/') Add(field, "'{}' is not an absolute path", path);
    CheckText(field, path);
  }
  void CheckText(const std::string& field, const std::string& text) {
    if (text.size() > kMaxText) Add(field, "longer than {} characters", kMaxText);
    if (text.find('\0') != std::string::npos) Add(field, "contains a NUL character");
  }
  absl::Status Result() const {
    return text_.empty() ? absl::OkStatus() : absl::Status(absl::StatusCode::kInvalidArgument, text_);
  }

 private:
  std::string text_;
};

void CheckDevice(const v1::DeviceSpec& device, const std::string& at, Problems& problems) {
  if (!IsValidName(device.name()))
    problems.Add(at + ".name", "'{}' is not a name ({})", device.name(), kNameRule);
  if (device.class_() == v1::DEVICE_CLASS_UNSPECIFIED) {
    problems.Add(at + ".class", "is missing; write blk or net");
  } else if (!Known(Classes(), device.class_())) {
    problems.Add(at + ".class", "{} is not a known class", static_cast<int>(device.class_()));
  }
  const v1::Backend& backend = device.backend();
  problems.CheckPath(at + ".backend.socket", backend.socket());
  // sun_path holds 108 bytes with the final NUL.
  if (backend.socket().size() > 107) problems.Add(at + ".backend.socket", "longer than 107 characters");
  if (!Known(Kinds(), backend.kind()))
    problems.Add(at + ".backend.kind", "{} is not a known kind", static_cast<int>(backend.kind()));
  if (!Known(Recoveries(), backend.recovery()))
    problems.Add(at + ".backend.recovery", "{} is not a known answer", static_cast<int>(backend.recovery()));
  if (device.num_queues() > kMaxQueues)
    problems.Add(at + ".num_queues", "{} is outside 1 to {}", device.num_queues(), kMaxQueues);
  uint32_t size = device.queue_size();
  if (size != 0 && (size < 2 || size > kMaxQueueSize || (size & (size - 1)) != 0))
    problems.Add(at + ".queue_size", "{} is not a power of two from 2 to {}", size, kMaxQueueSize);
  if (!device.mac().empty()) {
    unsigned bytes[6];
    if (device.class_() != v1::NET) {
      problems.Add(at + ".mac", "only devices of class net have one");
    } else if (!ParseMac(device.mac(), bytes)) {
      problems.Add(at + ".mac", "'{}' is not a MAC address like 52:54:00:12:34:56", device.mac());
    } else if ((bytes[0] & 1) != 0) {
      problems.Add(at + ".mac", "'{}' is a group address; the first byte must be even", device.mac());
    }
  }
}

// Options that Baton sets itself; a second one would change what a migration relies on.
void CheckExtraArgs(const v1::VmSpec& spec, Problems& problems) {
  static const std::set<std::string> kOurs = {
      "-incoming", "-S",   "-qmp",  "-m",         "-smp",    "-machine", "-M",      "-accel",  "-enable-kvm",
      "-no-kvm",   "-cpu", "-name", "-daemonize", "-kernel", "-initrd",  "-append", "-pidfile"};
  if (spec.extra_args_size() > kMaxExtraArgs) {
    problems.Add("extra_args", "more than {}", kMaxExtraArgs);
    return;
  }
  for (int i = 0; i < spec.extra_args_size(); ++i) {
    const std::string& arg = spec.extra_args(i);
    std::string at = fmt::format("extra_args[{}]", i);
    problems.CheckText(at, arg);
    std::string option = arg.rfind("--", 0) == 0 ? arg.substr(1) : arg;
    if (kOurs.count(option) != 0) problems.Add(at, "'{}' is set by Baton; use the spec's own fields", arg);
  }
}

void ReadDevice(ConfigReader& reader, v1::DeviceSpec* out) {
  std::string text;
  uint64_t number = 0;
  if (reader.Text("name", &text, kRequired)) out->set_name(text);
  v1::DeviceClass device_class;
  if (reader.Choice("class", Classes(), &device_class, kRequired)) out->set_class_(device_class);
  reader.Map("backend", [&](ConfigReader& backend) { ReadBackend(backend, out->mutable_backend()); });
  if (reader.Uint("num_queues", &number, 1, kMaxQueues)) out->set_num_queues(static_cast<uint32_t>(number));
  if (reader.Uint("queue_size", &number, 2, kMaxQueueSize))
    out->set_queue_size(static_cast<uint32_t>(number));
  if (reader.Text("mac", &text)) out->set_mac(text);
}

void ReadSpec(ConfigReader& reader, v1::VmSpec* out) {
  std::string text;
  uint64_t number = 0;
  if (reader.Text("name", &text, kRequired)) out->set_name(text);
  if (reader.Size("memory", &number, kRequired)) out->set_memory_bytes(number);
  if (reader.Uint("vcpus", &number, 1, kMaxVcpus, kRequired)) out->set_vcpus(static_cast<uint32_t>(number));
  if (reader.Text("machine", &text)) out->set_machine(text);
  if (reader.Text("cpu", &text)) out->set_cpu(text);
  v1::Accelerator accelerator;
  if (reader.Choice("accelerator", Accelerators(), &accelerator)) out->set_accelerator(accelerator);
  reader.Map("boot", [&](ConfigReader& boot) {
    if (boot.Path("kernel", &text)) out->mutable_boot()->set_kernel(text);
    if (boot.Path("initrd", &text)) out->mutable_boot()->set_initrd(text);
    if (boot.Text("cmdline", &text)) out->mutable_boot()->set_cmdline(text);
  });
  reader.MapList("devices", [&](ConfigReader& device) { ReadDevice(device, out->add_devices()); });
  std::vector<std::string> args;
  if (reader.TextList("extra_args", &args)) out->mutable_extra_args()->Add(args.begin(), args.end());
  bool flag = false;
  if (reader.Bool("balloon", &flag)) out->set_balloon(flag);
  if (reader.Bool("free_page_hints", &flag)) out->set_free_page_hints(flag);
  if (reader.Text("qemu", &text)) out->set_qemu(text);
}

absl::StatusOr<v1::VmSpec> FromDocument(ConfigDocument doc) {
  v1::VmSpec spec;
  ConfigReader root = doc.Root();
  ReadSpec(root, &spec);
  absl::Status shape = doc.Finish(root);
  // What could not be read would only be complained about a second time.
  if (!shape.ok()) return shape;
  FillVmSpecDefaults(&spec);
  doc.AddProblems(ValidateVmSpec(spec));
  RETURN_IF_ERROR(doc.Finish(root));
  return spec;
}

void EmitBackend(YAML::Emitter& out, const v1::Backend& backend) {
  out << YAML::Key << "backend" << YAML::Value << YAML::BeginMap;
  if (!backend.socket().empty()) out << YAML::Key << "socket" << YAML::Value << backend.socket();
  if (backend.kind() != v1::BACKEND_KIND_UNSPECIFIED)
    out << YAML::Key << "kind" << YAML::Value << BackendKindName(backend.kind());
  if (backend.recovery() != v1::RECOVERY_DEFAULT)
    out << YAML::Key << "recovery" << YAML::Value << RecoveryName(backend.recovery());
  out << YAML::EndMap;
}

void EmitDevice(YAML::Emitter& out, const v1::DeviceSpec& device) {
  out << YAML::BeginMap << YAML::Key << "name" << YAML::Value << device.name();
  out << YAML::Key << "class" << YAML::Value << DeviceClassName(device.class_());
  if (device.has_backend()) EmitBackend(out, device.backend());
  if (device.num_queues() > 1) out << YAML::Key << "num_queues" << YAML::Value << device.num_queues();
  if (device.queue_size() != 0 && device.queue_size() != kDefaultQueueSize)
    out << YAML::Key << "queue_size" << YAML::Value << device.queue_size();
  if (!device.mac().empty()) out << YAML::Key << "mac" << YAML::Value << device.mac();
  out << YAML::EndMap;
}

}  // namespace

bool IsValidName(const std::string& name) {
  if (name.empty() || name.size() > kMaxNameLength || name[0] == '-') return false;
  for (char c : name) {
    if (!(c >= 'a' && c <= 'z') && !(c >= '0' && c <= '9') && c != '-') return false;
  }
  return true;
}

std::string BackendKindName(v1::BackendKind kind) { return WordOf(Kinds(), kind); }
std::string RecoveryName(v1::Recovery recovery) { return WordOf(Recoveries(), recovery); }
std::string DeviceClassName(v1::DeviceClass device_class) {
  return device_class == v1::BALLOON ? "balloon" : WordOf(Classes(), device_class);
}
std::string AcceleratorName(v1::Accelerator accelerator) { return WordOf(Accelerators(), accelerator); }

void ReadBackend(ConfigReader& reader, v1::Backend* out) {
  std::string socket;
  if (reader.Path("socket", &socket)) out->set_socket(socket);
  v1::BackendKind kind;
  if (reader.Choice("kind", Kinds(), &kind)) out->set_kind(kind);
  v1::Recovery recovery;
  if (reader.Choice("recovery", Recoveries(), &recovery)) out->set_recovery(recovery);
}

absl::Status ValidateVmSpec(const v1::VmSpec& spec) {
  Problems problems;
  if (!IsValidName(spec.name())) problems.Add("name", "'{}' is not a name ({})", spec.name(), kNameRule);
  if (spec.memory_bytes() < kMinMemory || spec.memory_bytes() > kMaxMemory) {
    problems.Add("memory", "{} is outside {} to {}", FormatSize(spec.memory_bytes()), FormatSize(kMinMemory),
                 FormatSize(kMaxMemory));
  } else if (spec.memory_bytes() % kMemoryStep != 0) {
    problems.Add("memory", "{} is not a multiple of 2MiB", FormatSize(spec.memory_bytes()));
  }
  if (spec.vcpus() < 1 || spec.vcpus() > kMaxVcpus)
    problems.Add("vcpus", "{} is outside 1 to {}", spec.vcpus(), kMaxVcpus);
  if (!spec.machine().empty() && !IsPlainWord(spec.machine()))
    problems.Add("machine", "'{}' is not the name of a machine type, like q35", spec.machine());
  problems.CheckText("cpu", spec.cpu());
  if (!Known(Accelerators(), spec.accelerator()))
    problems.Add("accelerator", "{} is not a known accelerator", static_cast<int>(spec.accelerator()));
  if (!spec.qemu().empty() && !IsPlainWord(spec.qemu()))
    problems.Add("qemu", "'{}' is not a name of the agent's qemu map", spec.qemu());
  problems.CheckPath("boot.kernel", spec.boot().kernel());
  problems.CheckPath("boot.initrd", spec.boot().initrd());
  problems.CheckText("boot.cmdline", spec.boot().cmdline());
  if (spec.boot().kernel().empty()) {
    if (!spec.boot().initrd().empty()) problems.Add("boot.initrd", "needs boot.kernel");
    if (!spec.boot().cmdline().empty()) problems.Add("boot.cmdline", "needs boot.kernel");
  }
  if (spec.devices_size() > kMaxDevices) {
    problems.Add("devices", "{} devices; at most {}", spec.devices_size(), kMaxDevices);
    return problems.Result();
  }
  std::set<std::string> names;
  for (int i = 0; i < spec.devices_size(); ++i) {
    std::string at = fmt::format("devices[{}]", i);
    CheckDevice(spec.devices(i), at, problems);
    if (!names.insert(spec.devices(i).name()).second)
      problems.Add(at + ".name", "'{}' is the name of two devices", spec.devices(i).name());
    if (spec.free_page_hints() && spec.devices(i).name() == kHintBalloonName)
      problems.Add(at + ".name", "'{}' is the name of the balloon of free_page_hints", kHintBalloonName);
  }
  if (spec.balloon() && spec.free_page_hints())
    problems.Add("free_page_hints", "a guest has one balloon; leave `balloon` out");
  CheckExtraArgs(spec, problems);
  return problems.Result();
}

void FillVmSpecDefaults(v1::VmSpec* spec) {
  if (spec->machine().empty()) spec->set_machine(kDefaultMachine);
  for (v1::DeviceSpec& device : *spec->mutable_devices()) {
    if (device.num_queues() == 0) device.set_num_queues(1);
    if (device.queue_size() == 0) device.set_queue_size(kDefaultQueueSize);
    if (device.class_() != v1::NET || !device.mac().empty()) continue;
    // FNV-1a; stable across builds, unlike std::hash.
    uint32_t hash = 2166136261u;
    for (char c : spec->name() + "/" + device.name())
      hash = (hash ^ static_cast<unsigned char>(c)) * 16777619u;
    device.set_mac(
        fmt::format("52:54:00:{:02x}:{:02x}:{:02x}", hash >> 16 & 0xff, hash >> 8 & 0xff, hash & 0xff));
  }
}

absl::StatusOr<v1::VmSpec> ReadVmSpecFile(const std::string& path) {
  ASSIGN_OR_RETURN(ConfigDocument doc, ConfigDocument::FromFile(path));
  return FromDocument(std::move(doc));
}

absl::StatusOr<v1::VmSpec> ParseVmSpec(const std::string& text, const std::string& name) {
  ASSIGN_OR_RETURN(ConfigDocument doc, ConfigDocument::FromText(text, name));
  return FromDocument(std::move(doc));
}

std::string VmSpecToYaml(const v1::VmSpec& spec) {
  YAML::Emitter out;
  out << YAML::BeginMap;
  out << YAML::Key << "name" << YAML::Value << spec.name();
  out << YAML::Key << "memory" << YAML::Value << FormatSize(spec.memory_bytes());
  out << YAML::Key << "vcpus" << YAML::Value << spec.vcpus();
  if (!spec.machine().empty() && spec.machine() != kDefaultMachine)
    out << YAML::Key << "machine" << YAML::Value << spec.machine();
  if (!spec.cpu().empty()) out << YAML::Key << "cpu" << YAML::Value << spec.cpu();
  if (spec.accelerator() != v1::ACCELERATOR_AUTO)
    out << YAML::Key << "accelerator" << YAML::Value << AcceleratorName(spec.accelerator());
  const v1::Boot& boot = spec.boot();
  if (!boot.kernel().empty()) {
    out << YAML::Key << "boot" << YAML::Value << YAML::BeginMap;
    out << YAML::Key << "kernel" << YAML::Value << boot.kernel();
    if (!boot.initrd().empty()) out << YAML::Key << "initrd" << YAML::Value << boot.initrd();
    if (!boot.cmdline().empty()) out << YAML::Key << "cmdline" << YAML::Value << boot.cmdline();
    out << YAML::EndMap;
  }
  if (spec.devices_size() > 0) {
    out << YAML::Key << "devices" << YAML::Value << YAML::BeginSeq;
    for (const v1::DeviceSpec& device : spec.devices()) EmitDevice(out, device);
    out << YAML::EndSeq;
  }
  if (spec.extra_args_size() > 0) {
    out << YAML::Key << "extra_args" << YAML::Value << YAML::BeginSeq;
    for (const std::string& arg : spec.extra_args()) out << arg;
    out << YAML::EndSeq;
  }
  if (spec.balloon()) out << YAML::Key << "balloon" << YAML::Value << true;
  if (spec.free_page_hints()) out << YAML::Key << "free_page_hints" << YAML::Value << true;
  if (!spec.qemu().empty()) out << YAML::Key << "qemu" << YAML::Value << spec.qemu();
  out << YAML::EndMap;
  return std::string(out.c_str(), out.size()) + "\n";
}

}  // namespace baton
