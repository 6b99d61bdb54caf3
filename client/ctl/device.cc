// batonctl device list, swap.
#include <CLI/CLI.hpp>

#include "client/ctl/context.h"
#include "client/ctl/exit_codes.h"
#include "client/ctl/show.h"
#include "client/ctl/terminal.h"
#include "client/lib/units.h"
#include "common/vm_spec.h"

namespace baton::client {
namespace {

constexpr char kSwapTimeout[] = "2m";

std::vector<std::string> KindWords() {
  std::vector<std::string> words;
  const auto* kinds = v1::BackendKind_descriptor();
  for (int i = 0; i < kinds->value_count(); ++i) {
    auto kind = static_cast<v1::BackendKind>(kinds->value(i)->number());
    if (kind != v1::BACKEND_KIND_UNSPECIFIED) words.push_back(BackendKindName(kind));
  }
  return words;
}

v1::BackendKind KindOf(const std::string& word) {
  const auto* kinds = v1::BackendKind_descriptor();
  for (int i = 0; i < kinds->value_count(); ++i) {
    auto kind = static_cast<v1::BackendKind>(kinds->value(i)->number());
    if (kind != v1::BACKEND_KIND_UNSPECIFIED && BackendKindName(kind) == word) return kind;
  }
  return v1::BACKEND_KIND_UNSPECIFIED;
}

void AddDeviceList(CLI::App* device, Context* context) {
  struct Options {
    std::string vm, format;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command =
      device->add_subcommand("list", "List devices, their back-ends and what these told last");
  command->add_option("VM", o->vm, "Only of this VM");
  AddFormatOption(command, &o->format);
  command->footer("Examples:\n  batonctl device list\n  batonctl device list web1 -o wide");
  command->callback([=] {
    context->action = [o](Context& c) -> absl::StatusOr<int> {
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      std::vector<v1::Vm> vms;
      if (o->vm.empty()) {
        ASSIGN_OR_RETURN(vms, client->ListVms());
      } else {
        ASSIGN_OR_RETURN(std::string name, FullName(Collection::kVms, o->vm));
        ASSIGN_OR_RETURN(v1::Vm vm, client->GetVm(name));
        vms.push_back(std::move(vm));
      }
      const Format format = ParseFormat(o->format);
      if (format == Format::kJson || format == Format::kYaml) {
        std::vector<const google::protobuf::Message*> items;
        for (const v1::Vm& vm : vms) {
          for (const v1::Device& d : vm.devices()) items.push_back(&d);
        }
        RETURN_IF_ERROR(
            Print(format == Format::kJson ? ListToJson("devices", items) : ListToYaml("devices", items)));
        return 0;
      }
      if (format == Format::kName) {
        std::string out;
        for (const v1::Vm& vm : vms) {
          for (const v1::Device& d : vm.devices()) out += vm.name() + "/" + d.name() + "\n";
        }
        RETURN_IF_ERROR(Print(out));
        return 0;
      }
      RETURN_IF_ERROR(Print(DeviceTable(vms, format == Format::kWide, NowSeconds()).Render(OutputWidth())));
      return 0;
    };
  });
}

struct SwapCommandOptions {
  std::string vm, device, socket, kind, inflight, drain_timeout, format, timeout = kSwapTimeout, request_id;
  bool dry_run = false;
};

absl::StatusOr<int> RunSwap(Context& c, const SwapCommandOptions& o) {
  v1::SwapDeviceRequest request;
  ASSIGN_OR_RETURN(*request.mutable_vm(), FullName(Collection::kVms, o.vm));
  request.set_device(o.device);
  request.mutable_backend()->set_socket(o.socket);
  request.mutable_backend()->set_kind(KindOf(o.kind));
  if (!o.inflight.empty()) request.set_inflight(o.inflight == "handoff" ? v1::HANDOFF : v1::DRAIN);
  if (!o.drain_timeout.empty()) {
    ASSIGN_OR_RETURN(Duration bound, DurationOption("--drain-timeout", o.drain_timeout));
    *request.mutable_drain_timeout() = FromDuration(bound);
  }
  request.set_request_id(o.request_id);
  request.set_validate_only(o.dry_run);
  ASSIGN_OR_RETURN(Duration timeout, DurationOption("--timeout", o.timeout));
  ASSIGN_OR_RETURN(Client * client, c.Connect());
  InterruptMessage interrupted(
      "\ninterrupted; the back-end may still be swapped: look with 'batonctl device list'\n");
  ASSIGN_OR_RETURN(v1::SwapDeviceResponse swapped, client->SwapDevice(request, timeout));
  const std::string name = request.vm() + "/" + o.device;
  RETURN_IF_ERROR(PrintResource(ParseFormat(o.format), swapped, name, [&] {
    std::string out = swapped.findings().empty() ? "" : DescribeFindings(swapped.findings());
    if (o.dry_run) return swapped.findings().empty() ? std::string("no findings\n") : out;
    return out + fmt::format("{} is served by {} (no back-end for {})\n", name,
                             swapped.device().backend().socket(), FormatDuration(swapped.pause()));
  }));
  for (const v1::Finding& finding : swapped.findings()) {
    if (o.dry_run && finding.severity() == v1::BLOCKER) return kExitBlocked;
  }
  return 0;
}

void AddSwap(CLI::App* device, Context* context) {
  auto o = std::make_shared<SwapCommandOptions>();
  CLI::App* command =
      device->add_subcommand("swap", "Give a device of a running VM another back-end of its host");
  command->add_option("VM", o->vm, "The VM")->required();
  command->add_option("DEVICE", o->device, "Its device, as the VM's spec names it")->required();
  command->add_option("--socket", o->socket, "Where the new back-end listens (required)")
      ->required()
      ->option_text("PATH");
  command->add_option("--kind", o->kind, "What it is; default: as the one before")
      ->check(CLI::IsMember(KindWords()))
      ->option_text("KIND");
  command->add_option("--inflight", o->inflight, "Requests in flight: drain (default) or handoff")
      ->check(CLI::IsMember({"drain", "handoff"}))
      ->option_text("ANSWER");
  command->add_option("--drain-timeout", o->drain_timeout, "Bound of stopping the old one (5s)")
      ->option_text("DURATION");
  command->add_flag("--dry-run", o->dry_run, "Only ask the new back-end whether it could take over");
  command->add_option("--timeout", o->timeout, "How long all of it may take (default 2m)")
      ->option_text("DURATION");
  command->add_option("--request-id", o->request_id, "Makes repeating the command harmless")
      ->option_text("UUID");
  AddFormatOption(command, &o->format);
  command->footer(
      "The guest runs on and notices nothing but latency. Whatever fails before the switch leaves the old "
      "back-end\n"
      "serving; after it the old one is not used again and may be ended.\n\n"
      "Examples:\n"
      "  batonctl device swap web1 disk0 --socket /run/spdk/web1-new.sock --dry-run\n"
      "  batonctl device swap web1 disk0 --socket /run/spdk/web1-new.sock\n"
      "  batonctl device swap web1 disk0 --socket /run/qsd.sock --kind qemu-storage-daemon");
  command->callback([=] { context->action = [o](Context& c) { return RunSwap(c, *o); }; });
}

}  // namespace

void AddDeviceCommands(CLI::App* app, Context* context) {
  CLI::App* device = app->add_subcommand("device", "Show devices, and swap their back-ends");
  device->require_subcommand(1);
  AddDeviceList(device, context);
  AddSwap(device, context);
}

}  // namespace baton::client
