#include "common/grpc_status.h"

#include <absl/strings/cord.h>

namespace baton {
namespace {

constexpr char kDomain[] = "baton.dev";
constexpr char kTypePrefix[] = "type.googleapis.com/";
// Metadata that waits for its ErrorInfo; never leaves the process under this name.
constexpr char kMetadataUrl[] = "baton.dev/metadata";

template <typename Message>
std::string UrlOf() {
  return kTypePrefix + Message::descriptor()->full_name();
}

template <typename Message>
Message Detail(const absl::Status& status) {
  Message message;
  auto payload = status.GetPayload(UrlOf<Message>());
  if (payload && !message.ParseFromString(std::string(*payload))) message.Clear();
  return message;
}

template <typename Message>
absl::Status SetDetail(absl::Status status, const Message& message) {
  if (!status.ok()) status.SetPayload(UrlOf<Message>(), absl::Cord(message.SerializeAsString()));
  return status;
}

google::rpc::ErrorInfo Metadata(const absl::Status& status) {
  google::rpc::ErrorInfo info;
  auto payload = status.GetPayload(kMetadataUrl);
  if (payload && !info.ParseFromString(std::string(*payload))) info.Clear();
  return info;
}

}  // namespace

google::rpc::Status ToRpcStatus(const absl::Status& status) {
  google::rpc::Status out;
  out.set_code(static_cast<int>(status.code()));
  out.set_message(Message(status));
  if (v1::Reason reason = ReasonOf(status, v1::REASON_UNSPECIFIED); reason != v1::REASON_UNSPECIFIED) {
    google::rpc::ErrorInfo info = Metadata(status);
    info.set_reason(v1::Reason_Name(reason));
    info.set_domain(kDomain);
    auto* any = out.add_details();
    any->set_type_url(UrlOf<google::rpc::ErrorInfo>());
    any->set_value(info.SerializeAsString());
  }
  status.ForEachPayload([&](auto url, const absl::Cord& payload) {
    std::string name(url.data(), url.size());
    if (name.rfind(kTypePrefix, 0) != 0 || name == UrlOf<google::rpc::ErrorInfo>()) return;
    auto* any = out.add_details();
    any->set_type_url(name);
    any->set_value(std::string(payload));
  });
  return out;
}

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  google::rpc::Status details = ToRpcStatus(status);
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), Message(status),
                      details.details().empty() ? "" : details.SerializeAsString());
}

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status out(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  google::rpc::Status details;
  if (status.error_details().empty() || !details.ParseFromString(status.error_details())) return out;
  for (const auto& any : details.details()) {
    if (any.type_url() == UrlOf<google::rpc::ErrorInfo>()) {
      google::rpc::ErrorInfo info;
      v1::Reason reason;
      if (!info.ParseFromString(any.value()) || info.domain() != kDomain) continue;
      // A reason of a newer peer is kept as "internal": the message still says what happened.
      out = WithReason(std::move(out), v1::Reason_Parse(info.reason(), &reason) ? reason : v1::INTERNAL);
      for (const auto& [key, value] : info.metadata()) out = WithMetadata(std::move(out), key, value);
    } else {
      out.SetPayload(any.type_url(), absl::Cord(any.value()));
    }
  }
  return out;
}

absl::Status WithField(absl::Status status, const std::string& field, const std::string& description) {
  auto detail = Detail<google::rpc::BadRequest>(status);
  auto* violation = detail.add_field_violations();
  violation->set_field(field);
  violation->set_description(description);
  return SetDetail(std::move(status), detail);
}

absl::Status WithResource(absl::Status status, const std::string& type, const std::string& name) {
  google::rpc::ResourceInfo detail;
  detail.set_resource_type(type);
  detail.set_resource_name(name);
  return SetDetail(std::move(status), detail);
}

absl::Status WithRetry(absl::Status status, Duration delay) {
  google::rpc::RetryInfo detail;
  detail.mutable_retry_delay()->set_seconds(delay.count() / 1'000'000'000);
  detail.mutable_retry_delay()->set_nanos(static_cast<int32_t>(delay.count() % 1'000'000'000));
  return SetDetail(std::move(status), detail);
}

absl::Status WithPrecondition(absl::Status status, const std::string& type, const std::string& subject,
                              const std::string& description) {
  auto detail = Detail<google::rpc::PreconditionFailure>(status);
  auto* violation = detail.add_violations();
  violation->set_type(type);
  violation->set_subject(subject);
  violation->set_description(description);
  return SetDetail(std::move(status), detail);
}

absl::Status WithMetadata(absl::Status status, const std::string& key, const std::string& value) {
  if (status.ok()) return status;
  google::rpc::ErrorInfo info = Metadata(status);
  (*info.mutable_metadata())[key] = value;
  status.SetPayload(kMetadataUrl, absl::Cord(info.SerializeAsString()));
  return status;
}

absl::Status InvalidField(const std::string& field, const std::string& description) {
  return WithField(absl::InvalidArgumentError(fmt::format("{}: {}", field, description)), field, description);
}

google::rpc::BadRequest BadRequestOf(const absl::Status& status) {
  return Detail<google::rpc::BadRequest>(status);
}

google::rpc::ResourceInfo ResourceInfoOf(const absl::Status& status) {
  return Detail<google::rpc::ResourceInfo>(status);
}

google::rpc::PreconditionFailure PreconditionFailureOf(const absl::Status& status) {
  return Detail<google::rpc::PreconditionFailure>(status);
}

std::map<std::string, std::string> MetadataOf(const absl::Status& status) {
  google::rpc::ErrorInfo info = Metadata(status);
  return {info.metadata().begin(), info.metadata().end()};
}

Duration RetryDelayOf(const absl::Status& status) {
  auto detail = Detail<google::rpc::RetryInfo>(status);
  return std::chrono::seconds(detail.retry_delay().seconds()) +
         std::chrono::nanoseconds(detail.retry_delay().nanos());
}

}  // namespace baton
