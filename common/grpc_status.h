// Errors on their way through gRPC: absl::Status with Baton's Reason and typed google.rpc details on one
// side, grpc::Status with a serialised google.rpc.Status in `grpc-status-details-bin` on the other. Nothing
// is lost either way.
//
// Details live in the absl::Status as payloads under "type.googleapis.com/google.rpc.*". The reason becomes
// ErrorInfo{reason, domain "baton.dev"}, whose metadata a caller may fill.
#pragma once

#include <grpcpp/support/status.h>

#include <map>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/status.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace baton {

// For the wire. An error without a reason carries no ErrorInfo.
grpc::Status ToGrpc(const absl::Status& status);
// From the wire; understands peers that send no details, or details that this version does not know (those
// are kept).
absl::Status FromGrpc(const grpc::Status& status);
// The google.rpc.Status that ToGrpc puts on the wire; for output in JSON.
google::rpc::Status ToRpcStatus(const absl::Status& status);

// Each returns `status` with a detail added; OK stays OK.
// BadRequest: `field` as a path in the request ("migration.vm"). Repeated calls collect violations.
absl::Status WithField(absl::Status status, const std::string& field, const std::string& description);
// ResourceInfo: `type` as in resource names ("migrations"), `name` the full name.
absl::Status WithResource(absl::Status status, const std::string& type, const std::string& name);
// RetryInfo: the caller may try again after `delay`.
absl::Status WithRetry(absl::Status status, Duration delay);
// PreconditionFailure: what does not hold (`type` as in Reason names), of which subject.
absl::Status WithPrecondition(absl::Status status, const std::string& type, const std::string& subject,
                              const std::string& description);
// Metadata of the ErrorInfo; shown only with a reason. Keys as in the proto fields: "guest_location".
absl::Status WithMetadata(absl::Status status, const std::string& key, const std::string& value);

// InvalidArgument about one field, the commonest case.
absl::Status InvalidField(const std::string& field, const std::string& description);

// The details again, for clients. Default instances when absent.
google::rpc::BadRequest BadRequestOf(const absl::Status& status);
google::rpc::ResourceInfo ResourceInfoOf(const absl::Status& status);
google::rpc::PreconditionFailure PreconditionFailureOf(const absl::Status& status);
std::map<std::string, std::string> MetadataOf(const absl::Status& status);
// Zero if absent.
Duration RetryDelayOf(const absl::Status& status);

}  // namespace baton
