// baton-lab-device: the lab's vhost-user back-end as a process of its own, to be commanded, killed and
// stopped.
#include <sys/signalfd.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <map>

#include "agent/virtio/features.h"
#include "common/log.h"
#include "tests/lab/device/blk_model.h"
#include "tests/lab/device/control_client.h"
#include "tests/lab/device/lab_device.h"
#include "tests/lab/net/net_model.h"

namespace {

using baton::lab::BlkModel;
using baton::lab::BlkOptions;
using baton::lab::LabDevice;
using baton::lab::LabDeviceOptions;
namespace virtio = baton::virtio;
namespace pf = baton::vhost::pf;

const std::map<std::string, uint64_t> kFeatures = {
    {"indirect", virtio::kFIndirectDesc}, {"event-idx", virtio::kFEventIdx},
    {"packed", virtio::kFRingPacked},     {"in-order", virtio::kFInOrder},
    {"log-all", virtio::kVhostFLogAll},   {"partial-order", virtio::kFPartialOrder},
    {"suspend", virtio::Bit(43)},         {"flush", virtio::Bit(9)},
    {"discard", virtio::Bit(13)},         {"write-zeroes", virtio::Bit(14)},
    {"guest-announce", virtio::Bit(21)}};
const std::map<std::string, uint64_t> kProtocol = {
    {"mq", pf::kMq},
    {"rarp", pf::kRarp},
    {"log-shmfd", pf::kLogShmfd},
    {"reply-ack", pf::kReplyAck},
    {"config", pf::kConfig},
    {"mem-slots", pf::kConfigureMemSlots},
    {"backend-req", pf::kBackendReq},
    {"reset-device", pf::kResetDevice},
    {"status", pf::kStatus},
    {"inflight", pf::kInflightShmfd | baton::lab::kPfGetBaseInflight | baton::lab::kPfGetBaseSkipDrain},
    {"base-inflight", baton::lab::kPfGetBaseInflight},
    {"skip-drain", baton::lab::kPfGetBaseSkipDrain},
    {"device-state", baton::lab::kPfDeviceState}};
const std::map<std::string, virtio::InflightKind> kKinds = {
    {"spec", virtio::InflightKind::kSpec},
    {"libvhost-user", virtio::InflightKind::kLibvhostUser},
    {"dpdk", virtio::InflightKind::kDpdk},
    {"spdk", virtio::InflightKind::kSpdk},
    {"yc", virtio::InflightKind::kYc}};
const std::map<std::string, virtio::BaseConvention> kBases = {{"avail", virtio::BaseConvention::kAvail},
                                                              {"used", virtio::BaseConvention::kUsed},
                                                              {"ignored", virtio::BaseConvention::kIgnored}};

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "baton-lab-device: %s\n", baton::Message(status).c_str());
  return 1;
}

int Control(const std::string& socket, const std::string& text) {
  const auto command = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (command.is_discarded()) return Fail(absl::InvalidArgumentError("not JSON: " + text));
  auto answer = baton::lab::CallLabDevice(socket, command, baton::Deadline::After(std::chrono::hours(1)));
  if (!answer.ok()) return Fail(answer.status());
  std::printf("%s\n", answer->dump().c_str());
  return 0;
}

int CheckJournalFile(const std::string& path, bool any_tags) {
  auto records = baton::lab::ReadJournal(path);
  if (!records.ok()) return Fail(records.status());
  auto verdict = baton::lab::CheckJournal(*records, {.tags_grow = !any_tags});
  if (!verdict.ok()) return Fail(verdict.status());
  std::printf("writes=%llu published=%llu replayed=%llu cancelled=%llu\n",
              static_cast<unsigned long long>(verdict->writes),
              static_cast<unsigned long long>(verdict->published),
              static_cast<unsigned long long>(verdict->replayed),
              static_cast<unsigned long long>(verdict->cancelled));
  return 0;
}

absl::StatusOr<virtio::MacAddress> ParseMac(const std::string& text) {
  virtio::MacAddress mac;
  int end = 0;
  if (std::sscanf(text.c_str(), "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx%n", &mac[0], &mac[1], &mac[2], &mac[3],
                  &mac[4], &mac[5], &end) != 6 ||
      static_cast<size_t>(end) != text.size()) {
    return absl::InvalidArgumentError("no MAC address: " + text);
  }
  return mac;
}

int Serve(const LabDeviceOptions& options, absl::StatusOr<std::unique_ptr<baton::lab::DeviceModel>> model,
          const std::string& settings, bool exit_on_eof) {
  ::signal(SIGPIPE, SIG_IGN);
  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  ::sigprocmask(SIG_BLOCK, &ends, nullptr);
  baton::UniqueFd stop(exit_on_eof ? ::dup(0) : ::signalfd(-1, &ends, SFD_CLOEXEC));
  if (exit_on_eof) ::sigprocmask(SIG_UNBLOCK, &ends, nullptr);
  if (!model.ok()) return Fail(model.status());
  auto device = LabDevice::Create(options, *std::move(model));
  if (!device.ok()) return Fail(device.status());
  if (!settings.empty()) {
    const auto faults = nlohmann::json::parse(settings, nullptr, /*allow_exceptions=*/false);
    if (!faults.is_object()) return Fail(absl::InvalidArgumentError("--set: not an object: " + settings));
    if (absl::Status set = (*device)->Set(faults); !set.ok()) return Fail(set);
  }
  // Who started this may wait for the line: the sockets are there.
  std::printf("ready\n");
  std::fflush(stdout);
  absl::Status ended = (*device)->Run(stop.get());
  return ended.ok() ? 0 : Fail(ended);
}

}  // namespace

int main(int argc, char** argv) {
  LabDeviceOptions options;
  BlkOptions blk;
  baton::lab::NetModelOptions net;
  std::string settings, level = "warn", mac;
  bool is_net = false;
  std::vector<std::string> without, with;
  bool exit_on_eof = false, no_drain = false, synchronous = false;
  CLI::App app(
      "A vhost-user device for tests, benchmarks and the demo: does on command what real back-ends do now "
      "and "
      "then. Not for guests that anybody needs. docs/lab.md describes it.");
  app.add_option("--socket", options.socket, "where the front-end connects");
  app.add_option("--image", blk.image, "the disk; exists, and has the disk's size");
  app.add_option("--control", options.control, "socket for commands (JSON lines)");
  app.add_flag("--net", is_net, "a network interface instead of a disk");
  app.add_option("--pairs", net.max_pairs, "its queue pairs")->check(CLI::Range(1, 127));
  app.add_option("--mac", mac, "its address");
  app.add_option("--mtu", net.mtu);
  app.add_flag("--steering", net.steering, "the steering command of the 2012 proposal instead of MQ and RSS");
  app.add_option("--wire-listen", net.wire_listen, "where other interfaces plug in");
  app.add_option("--wire-connect", net.wire_connect, "where this one plugs in");
  app.add_option("--queues", blk.queues, "virtqueues of a disk")->check(CLI::Range(1, 256));
  app.add_option("--serial", blk.serial, "what GET_ID answers");
  app.add_flag("--synchronous", synchronous, "without io_uring");
  app.add_option("--zone-sectors", blk.zone_sectors, "a zoned disk with zones of so many sectors");
  app.add_option("--kind", options.kind, "in-flight region and ring bases as of this back-end")
      ->transform(CLI::CheckedTransformer(kKinds));
  app.add_option_function<std::string>(
         "--base", [&](const std::string& name) { options.base = kBases.at(name); },
         "what a ring's base means with requests in flight: avail, used, ignored")
      ->check(CLI::IsMember(std::vector<std::string>{"avail", "used", "ignored"}));
  app.add_option("--without", without, "not offered (names of features, protocol features)")->delimiter(',');
  app.add_option("--with", with, "offered, which otherwise are not: partial-order, suspend")->delimiter(',');
  app.add_flag("--no-drain", no_drain, "GET_VRING_BASE does not wait for requests in flight");
  app.add_option("--latency-us", blk.latency_us, "each request takes so long");
  app.add_option("--latency-max-us", blk.latency_max_us, "or up to so long, at random");
  app.add_flag("--latency-after", blk.latency_after,
               "between the storage's work and the guest's hearing of it");
  app.add_option("--shuffle", blk.shuffle, "collect so many ended requests, complete them in random order");
  app.add_flag("--no-space", blk.no_space, "writes are held until {\"cmd\":\"set\",\"no_space\":false}");
  app.add_option("--seed", blk.seed, "of everything that is random");
  app.add_option("--journal", blk.journal, "append what is done to the disk to this file");
  app.add_option("--journal-tag-offset", blk.journal_tag_offset, "where a write's data has its number (u64)");
  app.add_option("--set", settings, "settings as of the command \"set\", a JSON object");
  app.add_flag("--exit-on-eof", exit_on_eof, "end with standard input");
  app.add_option("--log-level", level);
  CLI::App* control = app.add_subcommand("ctl", "sends one command to a control socket, prints the answer");
  std::string control_socket, command;
  control->add_option("socket", control_socket)->required();
  control->add_option("command", command, "a JSON object")->required();
  CLI::App* check =
      app.add_subcommand("check-journal", "says whether anything was done twice or out of order");
  std::string journal;
  bool any_tags = false;
  check->add_option("file", journal)->required();
  check->add_flag("--any-tags", any_tags, "the numbers in the data mean nothing");
  CLI11_PARSE(app, argc, argv);
  baton::InitLogging({.program = "baton-lab-device", .level = level, .json = false, .context = {}});
  if (*control) return Control(control_socket, command);
  if (*check) return CheckJournalFile(journal, any_tags);
  if (options.socket.empty() || (blk.image.empty() && !is_net)) {
    return Fail(absl::InvalidArgumentError("--socket, and --image or --net, are needed"));
  }
  for (const std::string& name : without) {
    if (kFeatures.count(name)) {
      options.without_features |= kFeatures.at(name);
    } else if (kProtocol.count(name)) {
      options.without_protocol |= kProtocol.at(name);
    } else {
      return Fail(absl::InvalidArgumentError("--without: no feature " + name));
    }
  }
  for (const std::string& name : with) {
    if (name != "partial-order" && name != "suspend") {
      return Fail(absl::InvalidArgumentError("--with: not " + name));
    }
    options.extra_features |= kFeatures.at(name);
  }
  options.drains = !no_drain;
  blk.io_uring = !synchronous;
  if (!is_net) return Serve(options, BlkModel::Create(blk), settings, exit_on_eof);
  if (!mac.empty()) {
    auto parsed = ParseMac(mac);
    if (!parsed.ok()) return Fail(parsed.status());
    net.mac = *parsed;
  }
  net.less_features = options.without_features;
  return Serve(options, baton::lab::NetModel::Create(net), settings, exit_on_eof);
}
