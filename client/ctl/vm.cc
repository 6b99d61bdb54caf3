// batonctl vm start, stop, list, console.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <iostream>

#include "client/ctl/console.h"
#include "client/ctl/context.h"
#include "client/ctl/exit_codes.h"
#include "client/ctl/show.h"
#include "client/ctl/terminal.h"
#include "client/lib/units.h"
#include "common/config.h"
#include "common/durable_file.h"
#include "common/vm_spec.h"

namespace baton::client {
namespace {

constexpr char kStartTimeout[] = "2m";
constexpr char kStopTimeout[] = "2m";

absl::StatusOr<std::string> ReadStandardInput(size_t limit) {
  std::string text;
  char buffer[4096];
  while (text.size() <= limit) {
    ssize_t n = ::read(STDIN_FILENO, buffer, sizeof buffer);
    if (n == 0) return text;
    if (n < 0 && errno != EINTR) return ErrnoError(errno, "reading standard input");
    if (n > 0) text.append(buffer, static_cast<size_t>(n));
  }
  return Error(absl::StatusCode::kInvalidArgument, "what is on standard input is larger than {} bytes",
               limit);
}

absl::StatusOr<v1::VmSpec> ReadSpec(const std::string& path) {
  if (path != "-") return ReadVmSpecFile(path);
  // A spec is a page of text; more is a mistake.
  ASSIGN_OR_RETURN(std::string text, ReadStandardInput(1 << 20));
  return ParseVmSpec(text, "<stdin>");
}

void AddStart(CLI::App* vm, Context* context) {
  struct Options {
    std::string spec, host, format, timeout = kStartTimeout, request_id;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = vm->add_subcommand("start", "Start a VM from a spec file");
  command->add_option("SPEC", o->spec, "YAML file (docs/vm-spec.md); '-' reads standard input")->required();
  command->add_option("--host", o->host, "Host that shall run it (required)")
      ->required()
      ->option_text("HOST");
  command->add_option("--timeout", o->timeout, "How long starting may take (default 2m)")
      ->option_text("DURATION");
  command->add_option("--request-id", o->request_id, "Makes repeating the command harmless")
      ->option_text("UUID");
  AddFormatOption(command, &o->format);
  command->footer(
      "Returns when the VM runs.\n\nExamples:\n  batonctl vm start web1.yaml --host a\n  batonctl vm start - "
      "--host a < web1.yaml");
  command->callback([=] {
    context->action = [o](Context& c) -> absl::StatusOr<int> {
      v1::StartVmRequest request;
      ASSIGN_OR_RETURN(*request.mutable_host(), FullName(Collection::kHosts, o->host));
      auto spec = ReadSpec(o->spec);
      if (!spec.ok()) return AsWrongInput(spec.status());
      *request.mutable_spec() = *std::move(spec);
      ASSIGN_OR_RETURN(Duration timeout, DurationOption("--timeout", o->timeout));
      request.set_request_id(o->request_id);
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      InterruptMessage interrupted(
          "\ninterrupted; the VM may still be starting: look with 'batonctl get vms'\n");
      ASSIGN_OR_RETURN(v1::Vm started, client->StartVm(std::move(request), timeout));
      RETURN_IF_ERROR(PrintResource(ParseFormat(o->format), started, started.name(), [&] {
        return fmt::format("{} runs on {}\n", started.name(), started.host());
      }));
      return 0;
    };
  });
}

void AddStop(CLI::App* vm, Context* context) {
  struct Options {
    std::string name, timeout = kStopTimeout;
    bool force = false;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = vm->add_subcommand("stop", "Power a VM off and forget it");
  command->add_option("VM", o->name, "The VM")->required();
  command->add_flag("--force", o->force, "Kill it at once; what the guest has not written is lost");
  command->add_option("--timeout", o->timeout, "How long stopping may take (default 2m)")
      ->option_text("DURATION");
  command->footer("Examples:\n  batonctl vm stop web1\n  batonctl vm stop web1 --force");
  command->callback([=] {
    context->action = [o](Context& c) -> absl::StatusOr<int> {
      ASSIGN_OR_RETURN(std::string name, FullName(Collection::kVms, o->name));
      ASSIGN_OR_RETURN(Duration timeout, DurationOption("--timeout", o->timeout));
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      RETURN_IF_ERROR(client->StopVm(name, o->force, timeout));
      RETURN_IF_ERROR(Print(name + " stopped\n"));
      return 0;
    };
  });
}

void AddList(CLI::App* vm, Context* context) {
  struct Options {
    std::string host, format;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = vm->add_subcommand("list", "List VMs (as 'get vms')");
  command->add_option("--host", o->host, "Only VMs on this host")->option_text("HOST");
  AddFormatOption(command, &o->format);
  command->callback([=] { context->action = [o](Context& c) { return ListVms(c, o->host, o->format); }; });
}

void AddConsole(CLI::App* vm, Context* context) {
  struct Options {
    std::string name, timeout;
  };
  auto o = std::make_shared<Options>();
  CLI::App* command = vm->add_subcommand("console", "Talk to a VM's serial console; Ctrl-] leaves");
  command->add_option("VM", o->name, "The VM")->required();
  command->add_option("--timeout", o->timeout, "Leave after this long (exit 8)")->option_text("DURATION");
  command->footer(
      "Starts with the tail of what was there before. From a pipe, standard input is sent and the output "
      "followed until\n"
      "the console closes, the reader of the output goes away, or --timeout.\n\n"
      "Examples:\n"
      "  batonctl vm console web1\n"
      "  batonctl vm console web1 < /dev/null | grep -m1 'login:'\n"
      "  echo poweroff | batonctl vm console web1");
  command->callback([=] {
    context->action = [o](Context& c) -> absl::StatusOr<int> {
      ASSIGN_OR_RETURN(std::string name, FullName(Collection::kVms, o->name));
      Duration timeout(0);
      if (!o->timeout.empty()) {
        ASSIGN_OR_RETURN(timeout, DurationOption("--timeout", o->timeout));
      }
      ASSIGN_OR_RETURN(Client * client, c.Connect());
      return RunConsole(client, name, timeout);
    };
  });
}

struct MediateOptions {
  std::string file, host, out, timeout = kStartTimeout, format;
  bool dry_run = false;
};

absl::StatusOr<int> RunMediate(Context& c, const MediateOptions& o) {
  constexpr size_t kLimit = 4 << 20;
  v1::MediateDomainRequest request;
  ASSIGN_OR_RETURN(*request.mutable_host(), FullName(Collection::kHosts, o.host));
  auto xml = o.file == "-" ? ReadStandardInput(kLimit) : ReadFileLimited(o.file, kLimit);
  if (!xml.ok()) return AsWrongInput(xml.status());
  request.set_xml(*std::move(xml));
  request.set_validate_only(o.dry_run);
  ASSIGN_OR_RETURN(Duration timeout, DurationOption("--timeout", o.timeout));
  ASSIGN_OR_RETURN(Client * client, c.Connect());
  ASSIGN_OR_RETURN(v1::MediateDomainResponse answer, client->MediateDomain(request, timeout));
  if (!o.out.empty() && !o.dry_run) RETURN_IF_ERROR(AsWrongInput(WriteFileDurable(o.out, answer.xml())));
  RETURN_IF_ERROR(PrintResource(ParseFormat(o.format), answer, request.host(), [&] {
    std::string findings = answer.findings().empty() ? "" : DescribeFindings(answer.findings());
    if (o.dry_run) return findings.empty() ? std::string("no findings\n") : findings;
    // The XML alone, where it goes on to `virsh define`.
    if (o.out.empty()) {
      std::cerr << findings;
      return answer.xml();
    }
    return findings + fmt::format("{} device(s) mediated; define the domain with: virsh define {}\n",
                                  answer.devices_size(), o.out);
  }));
  for (const v1::Finding& finding : answer.findings()) {
    if (o.dry_run && finding.severity() == v1::BLOCKER) return kExitBlocked;
  }
  return 0;
}

void AddMediate(CLI::App* vm, Context* context) {
  auto o = std::make_shared<MediateOptions>();
  CLI::App* command =
      vm->add_subcommand("mediate", "Put Baton between a libvirt domain and its vhost-user back-ends");
  command->add_option("DOMAIN.xml", o->file, "As 'virsh dumpxml --inactive' has it; '-' reads standard input")
      ->required();
  command->add_option("--host", o->host, "Host of the domain (required)")->required()->option_text("HOST");
  command->add_option("-o,--out", o->out, "Write the new XML here; default: standard output")
      ->option_text("FILE");
  command->add_option("--format", o->format, "Print the whole answer as json or yaml")
      ->check(CLI::IsMember({"json", "yaml"}))
      ->option_text("FORMAT");
  command->add_flag("--dry-run", o->dry_run, "Only say what would be changed and what stands against it");
  command->add_option("--timeout", o->timeout, "How long it may take (default 2m)")->option_text("DURATION");
  command->footer(
      "The domain must be defined with the new XML and started anew; from then on its devices survive a "
      "crash "
      "or an\nupgrade of their back-ends.\n\n"
      "Examples:\n"
      "  virsh dumpxml --inactive web1 > web1.xml\n"
      "  batonctl vm mediate web1.xml --host a --dry-run\n"
      "  batonctl vm mediate web1.xml --host a -o web1-mediated.xml && virsh define web1-mediated.xml");
  command->callback([=] { context->action = [o](Context& c) { return RunMediate(c, *o); }; });
}

}  // namespace

void AddVmCommands(CLI::App* app, Context* context) {
  CLI::App* vm = app->add_subcommand("vm", "Start, stop and reach VMs");
  vm->require_subcommand(1);
  AddStart(vm, context);
  AddStop(vm, context);
  AddList(vm, context);
  AddConsole(vm, context);
  AddMediate(vm, context);
}

}  // namespace baton::client
