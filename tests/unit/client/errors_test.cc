#include "client/lib/errors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "common/grpc_status.h"

namespace baton::client {
namespace {

using ::testing::HasSubstr;

TEST(Errors, RenderError_SaysWhatWhereAndNext) {
  absl::Status status = Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kAborted, "disk0 did not stop within 5 s");
  status = WithMetadata(status, "guest_location", "SOURCE");
  status = WithMetadata(status, "source", "hosts/a");
  EXPECT_EQ(RenderError(status),
            "error: disk0 did not stop within 5 s\n"
            "  guest: runs at the source, host a\n"
            "  next:  the storage was too slow to finish its requests: try again, or allow more with "
            "--drain-timeout\n");
}

TEST(Errors, RenderError_ListsFields) {
  absl::Status status = absl::InvalidArgumentError("2 fields are wrong");
  status = WithField(status, "migration.vm", "is empty");
  status = WithField(status, "migration.destination", "is the source");
  EXPECT_THAT(RenderError(status),
              HasSubstr("  - migration.vm: is empty\n  - migration.destination: is the source\n"));
}

TEST(Errors, RenderErrorJson_IsOneLineOfJson) {
  std::string text = RenderErrorJson(Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "no \"x\"\n\xff"));
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
  auto error = nlohmann::json::parse(text)["error"];
  EXPECT_EQ(error["code"], "NOT_FOUND");
  EXPECT_EQ(error["reason"], "NOT_FOUND");
}

TEST(Errors, DescribeLocation_CoversTheEnum) {
  for (int i = v1::GuestLocation_MIN; i <= v1::GuestLocation_MAX; ++i) {
    if (!v1::GuestLocation_IsValid(i) || i == v1::GUEST_LOCATION_UNSPECIFIED) continue;
    EXPECT_NE(DescribeLocation(static_cast<v1::GuestLocation>(i), "hosts/a", "hosts/b"), "") << i;
  }
}

}  // namespace
}  // namespace baton::client
