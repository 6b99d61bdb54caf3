#include "server/control/policies.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/util/field_mask_util.h>
#include <google/protobuf/util/time_util.h>

#include <algorithm>

#include "common/grpc_status.h"
#include "server/names.h"
#include "server/store/records.pb.h"

namespace baton::server {
namespace {

using google::protobuf::util::FieldMaskUtil;
using google::protobuf::util::TimeUtil;

v1::Policy FromItem(const Item& item) {
  v1::Policy policy;
  policy.ParseFromString(item.value);
  policy.set_etag(fmt::format("{:x}", item.revision));
  return policy;
}

absl::Status Stale(const std::string& id) {
  return WithResource(
      Error(absl::StatusCode::kAborted,
            "policies/{} was changed by someone else; read it again, then repeat the change", id),
      "policies", "policies/" + id);
}

bool SameSubject(const v1::InflightRule& a, const v1::InflightRule& b) {
  return a.device() == b.device() && a.class_() == b.class_();
}

}  // namespace

std::string Canonical(const google::protobuf::Message& message) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    message.SerializeToCodedStream(&coded);
  }
  return bytes;
}

v1::MigrationParams DefaultParams() {
  v1::MigrationParams params;
  *params.mutable_max_downtime() = TimeUtil::MillisecondsToDuration(300);
  *params.mutable_max_duration() = TimeUtil::HoursToDuration(1);
  *params.mutable_drain_timeout() = TimeUtil::SecondsToDuration(5);
  params.set_max_stalled_rounds(5);
  params.set_on_stall(v1::ON_STALL_RAISE_DOWNTIME);
  return params;
}

v1::MigrationParams MergeParams(const v1::MigrationParams& policy, const v1::MigrationParams& own) {
  v1::MigrationParams out = DefaultParams();
  out.MergeFrom(policy);
  out.MergeFrom(own);
  // Messages are replaced, not merged field by field: 500 ms on top of 1 s is 500 ms.
  for (const v1::MigrationParams* from : {&policy, &own}) {
    if (from->has_max_downtime()) *out.mutable_max_downtime() = from->max_downtime();
    if (from->has_max_duration()) *out.mutable_max_duration() = from->max_duration();
    if (from->has_drain_timeout()) *out.mutable_drain_timeout() = from->drain_timeout();
  }
  // A caller who says what happens to requests in flight means all devices but those that he names.
  out.clear_inflight_rules();
  if (own.inflight() == v1::INFLIGHT_ANSWER_UNSPECIFIED) {
    for (const v1::InflightRule& rule : policy.inflight_rules()) {
      if (std::none_of(own.inflight_rules().begin(), own.inflight_rules().end(),
                       [&](const v1::InflightRule& mine) { return SameSubject(mine, rule); }))
        *out.add_inflight_rules() = rule;
    }
  }
  for (const v1::InflightRule& rule : own.inflight_rules()) *out.add_inflight_rules() = rule;
  return out;
}

absl::Status ValidateParams(const v1::MigrationParams& params, const std::string& prefix) {
  absl::Status status;
  auto problem = [&](const std::string& field, const std::string& description) {
    if (status.ok()) status = absl::InvalidArgumentError(fmt::format("{}{}: {}", prefix, field, description));
    status = WithField(std::move(status), prefix + field, description);
  };
  auto duration = [&](const char* field, bool has, const google::protobuf::Duration& value,
                      int64_t max_seconds) {
    if (!has) return;
    if (value.seconds() < 0 || value.nanos() < 0 || value.nanos() > 999'999'999 ||
        (value.seconds() == 0 && value.nanos() == 0)) {
      problem(field, "must be a time above 0");
    } else if (value.seconds() >= max_seconds) {
      problem(field, fmt::format("must be below {} s", max_seconds));
    }
  };
  duration("max_downtime", params.has_max_downtime(), params.max_downtime(), 3600);
  duration("max_duration", params.has_max_duration(), params.max_duration(), 30 * 86400);
  duration("drain_timeout", params.has_drain_timeout(), params.drain_timeout(), 3600);
  if (params.channels() > 64) problem("channels", "at most 64");
  if (params.bandwidth() != 0 && params.bandwidth() < 64 * 1024)
    problem("bandwidth", "at least 64 KiB a second");
  if (params.max_stalled_rounds() > 1000) problem("max_stalled_rounds", "at most 1000");
  if (!v1::OnStall_IsValid(params.on_stall())) problem("on_stall", "is not known to this version");
  if (!v1::InflightAnswer_IsValid(params.inflight())) problem("inflight", "is not known to this version");
  if (params.has_compression() && params.compression() != "" && params.compression() != "xbzrle" &&
      params.compression() != "zlib" && params.compression() != "zstd") {
    problem("compression", "is xbzrle, zlib or zstd, or empty");
  }
  if (params.inflight_rules_size() > 64) problem("inflight_rules", "at most 64");
  for (int i = 0; i < params.inflight_rules_size(); ++i) {
    const v1::InflightRule& rule = params.inflight_rules(i);
    const std::string field = fmt::format("inflight_rules[{}]", i);
    if (rule.device().empty() == (rule.class_() == v1::DEVICE_CLASS_UNSPECIFIED))
      problem(field, "names either a device or a class");
    if (rule.answer() != v1::DRAIN && rule.answer() != v1::HANDOFF)
      problem(field, "answers drain or handoff");
    if (!v1::DeviceClass_IsValid(rule.class_())) problem(field, "its class is not known to this version");
    for (int k = 0; k < i; ++k) {
      if (SameSubject(params.inflight_rules(k), rule)) problem(field, fmt::format("repeats rule {}", k));
    }
  }
  return status;
}

namespace {

bool Covers(const v1::OnDeviceError& answer, const std::string& vm) {
  if (answer.vms().empty()) return true;
  for (const std::string& pattern : answer.vms()) {
    if (pattern == vm) return true;
    if (pattern.ends_with('*') && vm.starts_with(pattern.substr(0, pattern.size() - 1))) return true;
  }
  return false;
}

absl::Status ValidateOnDeviceError(const v1::OnDeviceError& answer) {
  for (const std::string& pattern : answer.vms()) {
    const std::string stem = pattern.ends_with('*') ? pattern.substr(0, pattern.size() - 1) : pattern;
    if (stem.find('*') != std::string::npos || (stem.empty() && pattern != "*")) {
      return InvalidField("policy.on_device_error.vms",
                          fmt::format("\"{}\": a VM's name, with a * at most at its end", pattern));
    }
  }
  for (const std::string& host : answer.hosts())
    RETURN_IF_ERROR(ParseName(host, "hosts", "policy.on_device_error.hosts").status());
  if (answer.has_backoff()) {
    const auto& backoff = answer.backoff();
    if (backoff.seconds() < 0 || backoff.nanos() < 0 || backoff.nanos() > 999'999'999 ||
        (backoff.seconds() == 0 && backoff.nanos() == 0) || backoff.seconds() > 3600) {
      return InvalidField("policy.on_device_error.backoff", "must be above 0 and at most 1 h");
    }
  }
  return absl::OkStatus();
}

}  // namespace

const v1::Policy* PolicyForDeviceEvents(const std::vector<v1::Policy>& policies, const std::string& vm) {
  auto rank = [](const v1::Policy& policy) {
    return std::make_pair(policy.name() == "policies/default", policy.name());
  };
  const v1::Policy* best = nullptr;
  for (const v1::Policy& policy : policies) {
    if (!policy.has_on_device_error() || !Covers(policy.on_device_error(), vm)) continue;
    if (best == nullptr || rank(policy) < rank(*best)) best = &policy;
  }
  return best;
}

absl::Status Policies::Load() {
  absl::Status found = store_.Get("policies/default").status();
  if (found.code() != absl::StatusCode::kNotFound) return found;
  v1::Policy policy;
  policy.set_name("policies/default");
  *policy.mutable_params() = DefaultParams();
  policy.mutable_params()->set_tls(peer_tls_);
  *policy.mutable_create_time() = TimeUtil::GetCurrentTime();
  return Put(std::move(policy)).status();
}

absl::StatusOr<v1::Policy> Policies::Put(v1::Policy policy, const Batch* more) {
  RETURN_IF_ERROR(ValidateParams(policy.params(), "policy.params."));
  RETURN_IF_ERROR(ValidateOnDeviceError(policy.on_device_error()));
  *policy.mutable_update_time() = TimeUtil::GetCurrentTime();
  policy.clear_etag();
  Batch batch = more ? *more : Batch();
  batch.Put(policy.name(), policy.SerializeAsString());
  ASSIGN_OR_RETURN(int64_t revision, store_.Commit(batch));
  policy.set_etag(fmt::format("{:x}", revision));
  return policy;
}

absl::StatusOr<v1::Policy> Policies::Create(const v1::CreatePolicyRequest& request) {
  ASSIGN_OR_RETURN(std::string id, ParseName("policies/" + request.policy_id(), "policies", "policy_id"));
  v1::CreatePolicyRequest body = request;
  body.clear_request_id();
  std::string request_key = "requests/policies." + request.request_id();
  if (!request.request_id().empty()) {
    auto before = store_.Get(request_key);
    if (before.ok()) {
      RequestRecord record;
      record.ParseFromString(before->value);
      if (record.body() == Canonical(body)) return Get(IdOf(record.name()));
      return Error(absl::StatusCode::kAlreadyExists, "request_id {} was used with another body",
                   request.request_id());
    }
    if (before.status().code() != absl::StatusCode::kNotFound) return before.status();
  }
  absl::Status present = store_.Get("policies/" + id).status();
  if (present.ok()) {
    return WithResource(Error(absl::StatusCode::kAlreadyExists, "policies/{} exists", id), "policies",
                        "policies/" + id);
  }
  if (present.code() != absl::StatusCode::kNotFound) return present;
  v1::Policy policy = request.policy();
  policy.set_name("policies/" + id);
  *policy.mutable_params() = MergeParams(DefaultParams(), request.policy().params());
  *policy.mutable_create_time() = TimeUtil::GetCurrentTime();
  Batch more;
  if (!request.request_id().empty()) {
    RequestRecord record;
    record.set_name(policy.name());
    record.set_body(Canonical(body));
    more.Put(request_key, record.SerializeAsString());
  }
  return Put(std::move(policy), &more);
}

absl::StatusOr<v1::Policy> Policies::Get(const std::string& id) {
  auto item = store_.Get("policies/" + id);
  if (item.status().code() == absl::StatusCode::kNotFound) return NoSuch("policies", id);
  RETURN_IF_ERROR(item.status());
  return FromItem(*item);
}

absl::StatusOr<std::vector<v1::Policy>> Policies::List(const std::string& after, size_t limit) {
  ASSIGN_OR_RETURN(auto items, store_.Scan("policies/", after.empty() ? "" : "policies/" + after,
                                           static_cast<int>(limit)));
  std::vector<v1::Policy> policies;
  for (const Item& item : items) policies.push_back(FromItem(item));
  return policies;
}

absl::StatusOr<v1::Policy> Policies::Update(const v1::UpdatePolicyRequest& request) {
  ASSIGN_OR_RETURN(std::string id, ParseName(request.policy().name(), "policies", "policy.name"));
  ASSIGN_OR_RETURN(v1::Policy policy, Get(id));
  if (!request.policy().etag().empty() && request.policy().etag() != policy.etag()) return Stale(id);
  google::protobuf::FieldMask mask = request.update_mask();
  // Without a mask everything that a caller may set is replaced.
  if (mask.paths().empty() || (mask.paths_size() == 1 && mask.paths(0) == "*")) {
    mask.Clear();
    for (const char* path : {"params", "engine", "schedule", "observe_only", "on_device_error"})
      mask.add_paths(path);
  }
  for (const std::string& path : mask.paths()) {
    if (!FieldMaskUtil::IsValidPath<v1::Policy>(path)) {
      return InvalidField("update_mask", fmt::format("a policy has no field \"{}\"", path));
    }
    if (path == "name" || path == "etag" || path == "create_time" || path == "update_time") {
      return InvalidField("update_mask", fmt::format("\"{}\" cannot be changed", path));
    }
  }
  FieldMaskUtil::MergeOptions options;
  options.set_replace_message_fields(true);
  options.set_replace_repeated_fields(true);
  FieldMaskUtil::MergeMessageTo(request.policy(), mask, options, &policy);
  return Put(std::move(policy));
}

absl::Status Policies::Delete(const std::string& id, const std::string& etag) {
  if (id == "default") {
    return Error(absl::StatusCode::kFailedPrecondition, "policies/default cannot be deleted, only changed");
  }
  ASSIGN_OR_RETURN(v1::Policy policy, Get(id));
  if (!etag.empty() && etag != policy.etag()) return Stale(id);
  Batch batch;
  batch.Delete("policies/" + id);
  return store_.Commit(batch).status();
}

}  // namespace baton::server
