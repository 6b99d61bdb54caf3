#include "common/status.h"

#include <gtest/gtest.h>

#include <cerrno>

namespace baton {
namespace {

TEST(Status, ReasonSurvivesAnnotation) {
  absl::Status status =
      Error(v1::DRAIN_TIMEOUT, absl::StatusCode::kDeadlineExceeded, "disk{} did not stop", 0);
  absl::Status outer = Annotate(status, "vm web1");
  EXPECT_EQ(Message(outer), "vm web1: disk0 did not stop");
  EXPECT_EQ(outer.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(ReasonOf(outer), v1::DRAIN_TIMEOUT);
}

TEST(Status, WithoutReasonGivesFallback) {
  EXPECT_EQ(ReasonOf(absl::InternalError("x"), v1::PEER_PROTOCOL_ERROR), v1::PEER_PROTOCOL_ERROR);
}

TEST(Status, ErrnoChoosesCodeByWhatTheCallerCanDo) {
  EXPECT_EQ(ErrnoError(ENOSPC, "journal").code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrnoError(ECONNREFUSED, "socket").code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(Message(ErrnoError(EACCES, "/x")), "/x: Permission denied");
}

}  // namespace
}  // namespace baton
