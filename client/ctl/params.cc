#include "client/ctl/params.h"

#include <CLI/CLI.hpp>

#include "client/ctl/context.h"
#include "client/lib/units.h"

namespace baton::client {
namespace {

absl::Status SetDuration(const std::string& option, const std::string& text,
                         google::protobuf::Duration* out) {
  ASSIGN_OR_RETURN(Duration duration, DurationOption(option, text));
  *out = FromDuration(duration);
  return absl::OkStatus();
}

// "handoff", "disk0=drain", "class:net=drain".
absl::Status SetInflight(const std::vector<std::string>& answers, v1::MigrationParams* params) {
  for (const std::string& text : answers) {
    const size_t equals = text.rfind('=');
    const std::string subject = equals == std::string::npos ? "" : text.substr(0, equals);
    const std::string word = equals == std::string::npos ? text : text.substr(equals + 1);
    if (word != "drain" && word != "handoff") {
      return Error(absl::StatusCode::kInvalidArgument, "--inflight {}: \"{}\" is neither drain nor handoff",
                   text, word);
    }
    const v1::InflightAnswer answer = word == "drain" ? v1::DRAIN : v1::HANDOFF;
    if (equals == std::string::npos) {
      params->set_inflight(answer);
      continue;
    }
    v1::InflightRule* rule = params->add_inflight_rules();
    rule->set_answer(answer);
    if (subject == "class:blk") {
      rule->set_class_(v1::BLK);
    } else if (subject == "class:net") {
      rule->set_class_(v1::NET);
    } else if (subject.empty() || subject.rfind("class:", 0) == 0) {
      return Error(absl::StatusCode::kInvalidArgument,
                   "--inflight {}: \"{}\" is neither a device's name nor class:blk or class:net", text,
                   subject);
    } else {
      rule->set_device(subject);
    }
  }
  return absl::OkStatus();
}

}  // namespace

std::shared_ptr<ParamOptions> AddParamOptions(CLI::App* command) {
  auto o = std::make_shared<ParamOptions>();
  const std::string group = "Parameters";
  auto text = [&](const std::string& name, std::string* field, const std::string& help,
                  const std::string& value) {
    return command->add_option(name, *field, help)->option_text(value)->group(group);
  };
  text("--max-downtime", &o->max_downtime, "Blackout to aim at (300ms)", "DURATION");
  text("--max-duration", &o->max_duration, "Give up after this long (1h)", "DURATION");
  text("--bandwidth", &o->bandwidth, "Limit a second (500MiB, 10Gbit, unlimited)", "RATE");
  text("--drain-timeout", &o->drain_timeout, "Bound of stopping a device (5s)", "DURATION");
  text("--on-stall", &o->on_stall,
       "When rounds bring no progress: abort, raise-downtime, switchover or postcopy", "ANSWER")
      ->check(CLI::IsMember({"abort", "raise-downtime", "switchover", "postcopy"}));
  command
      ->add_option("--inflight", o->inflight,
                   "Requests in flight when the devices stop: drain or handoff; NAME=ANSWER for one device, "
                   "class:blk=ANSWER for a class. May be repeated")
      ->option_text("[NAME=]ANSWER")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group(group);
  command
      ->add_option("--max-stalled-rounds", o->max_stalled_rounds, "Rounds without progress before that (5)")
      ->option_text("N")
      ->group(group);
  command->add_option("--channels", o->channels, "Parallel connections; 0: chosen by the agent")
      ->check(CLI::Range(0, 64))
      ->option_text("N")
      ->group(group);
  command
      ->add_flag_callback(
          "--tls", [o] { o->tls = o->tls_given = true; }, "Encrypt the stream between the hosts")
      ->group(group);
  command
      ->add_flag_callback(
          "--no-tls",
          [o] {
            o->tls = false;
            o->tls_given = true;
          },
          "Do not encrypt it")
      ->excludes("--tls")
      ->group(group);
  command
      ->add_flag_callback(
          "--free-page-hints", [o] { o->free_page_hints = true; },
          "Leave out what the guest says is free, where its balloon can say so (the default)")
      ->group(group);
  command
      ->add_flag_callback(
          "--no-free-page-hints", [o] { o->free_page_hints = false; }, "Do not ask the guest")
      ->excludes("--free-page-hints")
      ->group(group);
  // What QEMU does itself when libvirt moves a domain.
  const std::string libvirt = "Parameters for libvirt domains";
  command->add_option("--compression", o->compression, "How QEMU compresses: none, xbzrle, zlib or zstd")
      ->check(CLI::IsMember({"none", "xbzrle", "zlib", "zstd"}))
      ->option_text("METHOD")
      ->group(libvirt);
  auto flag = [&](const std::string& name, std::optional<bool> ParamOptions::*field, const std::string& yes,
                  const std::string& no) {
    command
        ->add_flag_callback(
            "--" + name, [o, field] { (*o).*field = true; }, yes)
        ->group(libvirt);
    command
        ->add_flag_callback(
            "--no-" + name, [o, field] { (*o).*field = false; }, no)
        ->excludes("--" + name)
        ->group(libvirt);
  };
  flag("auto-converge", &ParamOptions::auto_converge, "Slow the guest down while it writes too fast",
       "Do not slow it down");
  flag("post-copy", &ParamOptions::post_copy, "Allow post-copy; --on-stall postcopy makes use of it",
       "Do not allow it");
  flag("zero-copy", &ParamOptions::zero_copy, "Send without copies in the kernel, where QEMU can", "Do not");
  flag("copy-storage", &ParamOptions::copy_storage, "Copy the disks that the destination does not have",
       "Do not copy disks");
  return o;
}

absl::StatusOr<v1::MigrationParams> BuildParams(const ParamOptions& o, std::vector<std::string>* paths) {
  v1::MigrationParams params;
  auto given = [&](const std::string& path) {
    if (paths != nullptr) paths->push_back(path);
  };
  if (!o.max_downtime.empty()) {
    RETURN_IF_ERROR(SetDuration("--max-downtime", o.max_downtime, params.mutable_max_downtime()));
    given("max_downtime");
  }
  if (!o.max_duration.empty()) {
    RETURN_IF_ERROR(SetDuration("--max-duration", o.max_duration, params.mutable_max_duration()));
    given("max_duration");
  }
  if (!o.bandwidth.empty()) {
    ASSIGN_OR_RETURN(uint64_t bandwidth, RateOption("--bandwidth", o.bandwidth));
    params.set_bandwidth(bandwidth);
    given("bandwidth");
  }
  if (!o.drain_timeout.empty()) {
    RETURN_IF_ERROR(SetDuration("--drain-timeout", o.drain_timeout, params.mutable_drain_timeout()));
    given("drain_timeout");
  }
  if (!o.on_stall.empty()) {
    params.set_on_stall(o.on_stall == "abort"            ? v1::ON_STALL_ABORT
                        : o.on_stall == "raise-downtime" ? v1::ON_STALL_RAISE_DOWNTIME
                        : o.on_stall == "postcopy"       ? v1::ON_STALL_POSTCOPY
                                                         : v1::ON_STALL_SWITCHOVER);
    given("on_stall");
  }
  RETURN_IF_ERROR(SetInflight(o.inflight, &params));
  if (params.inflight() != v1::INFLIGHT_ANSWER_UNSPECIFIED) given("inflight");
  if (!params.inflight_rules().empty()) given("inflight_rules");
  if (o.max_stalled_rounds) {
    params.set_max_stalled_rounds(*o.max_stalled_rounds);
    given("max_stalled_rounds");
  }
  if (o.channels) {
    params.set_channels(*o.channels);
    given("channels");
  }
  if (o.tls_given) {
    params.set_tls(o.tls);
    given("tls");
  }
  if (o.free_page_hints) {
    params.set_free_page_hints(*o.free_page_hints);
    given("free_page_hints");
  }
  if (o.compression) {
    params.set_compression(*o.compression == "none" ? "" : *o.compression);
    given("compression");
  }
  if (o.auto_converge) {
    params.set_auto_converge(*o.auto_converge);
    given("auto_converge");
  }
  if (o.post_copy) {
    params.set_post_copy(*o.post_copy);
    given("post_copy");
  }
  if (o.zero_copy) {
    params.set_zero_copy(*o.zero_copy);
    given("zero_copy");
  }
  if (o.copy_storage) {
    params.set_copy_storage(*o.copy_storage);
    given("copy_storage");
  }
  return params;
}

}  // namespace baton::client
