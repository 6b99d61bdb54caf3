// VM specs: what people write as YAML (docs/vm-spec.md), what the programs pass around as v1::VmSpec, and the
// rules that hold for both. Pure except for ReadVmSpecFile; any thread.
#pragma once

#include <cstddef>
#include <string>

#include "baton/v1/vm_spec.pb.h"
#include "common/status.h"

namespace baton {

// Reads, fills in defaults and validates. InvalidArgument with one "file:line: field: problem" line for each
// problem.
absl::StatusOr<v1::VmSpec> ReadVmSpecFile(const std::string& path);
// The same for text; `name` stands for the file in messages.
absl::StatusOr<v1::VmSpec> ParseVmSpec(const std::string& text, const std::string& name);

// Everything that must hold for a spec wherever it came from. InvalidArgument with one "field: problem" line
// for each problem, fields named as in YAML ("devices[1].mac").
absl::Status ValidateVmSpec(const v1::VmSpec& spec);

// Sets what was left out to the value that will be used, so that equal VMs have equal specs: machine "q35",
// num_queues 1, queue_size 128, and for NICs without `mac` an address made from the names of VM and device
// (QEMU would give each of them the same). Idempotent.
void FillVmSpecDefaults(v1::VmSpec* spec);

// YAML that ParseVmSpec turns into an equal spec. Fields at their defaults are left out, except name, memory
// and vcpus.
std::string VmSpecToYaml(const v1::VmSpec& spec);

// The device name of Baton's own balloon (VmSpec.free_page_hints).
inline constexpr char kHintBalloonName[] = "balloon";

inline constexpr size_t kMaxNameLength = 41;
// [a-z0-9][a-z0-9-]{0,40}: the names of VMs, hosts and devices; safe in file names and QEMU ids.
bool IsValidName(const std::string& name);
extern const char kNameRule[];

// Words of YAML for the enums ("qemu-storage-daemon", "blk", "tcg", "ordered").
std::string BackendKindName(v1::BackendKind kind);
std::string RecoveryName(v1::Recovery recovery);
std::string DeviceClassName(v1::DeviceClass device_class);
std::string AcceleratorName(v1::Accelerator accelerator);

class ConfigReader;
// Reads {socket, kind, recovery}, the fields of a back-end, from a map; shared with the agent's
// configuration.
void ReadBackend(ConfigReader& reader, v1::Backend* out);

}  // namespace baton
