#include "client/ctl/exit_codes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/status.h"

namespace baton::client {
namespace {

TEST(ExitCodes, EveryCodeHasOne) {
  for (int code = 1; code <= 16; ++code) {
    EXPECT_NE(ExitCodeFor(absl::Status(static_cast<absl::StatusCode>(code), "x")), kExitOk) << code;
  }
  EXPECT_EQ(ExitCodeFor(absl::OkStatus()), kExitOk);
}

TEST(ExitCodes, ReasonsThatSayMoreThanTheirCode) {
  EXPECT_EQ(ExitCodeFor(Error(v1::VALIDATION_FAILED, absl::StatusCode::kFailedPrecondition, "x")),
            kExitBlocked);
  EXPECT_EQ(ExitCodeFor(Error(v1::AGENT_UNREACHABLE, absl::StatusCode::kUnavailable, "x")), kExitUnreachable);
}

TEST(ExitCodes, WhereTheGuestIsComesFirst) {
  v1::Migration m;
  m.set_phase(v1::CANCELLED);
  m.set_guest_location(v1::SOURCE);
  EXPECT_EQ(ExitCodeFor(m), kExitMigrationCancelled);
  m.set_guest_location(v1::UNKNOWN);
  EXPECT_EQ(ExitCodeFor(m), kExitGuestUnknown);
  m.set_phase(v1::SUCCEEDED);
  EXPECT_EQ(ExitCodeFor(m), kExitOk);
  m.set_phase(v1::FAILED);
  m.set_guest_location(v1::SOURCE);
  m.set_reason(v1::VALIDATION_FAILED);
  EXPECT_EQ(ExitCodeFor(m), kExitBlocked);
  m.set_phase(v1::PRECOPY);
  EXPECT_EQ(ExitCodeFor(m), kExitFailure);
}

TEST(ExitCodes, HelpFitsATerminal) {
  std::string help = ExitCodeHelp();
  size_t begin = 0;
  while (begin < help.size()) {
    size_t end = std::min(help.find('\n', begin), help.size());
    EXPECT_LE(end - begin, 110u);
    begin = end + 1;
  }
}

}  // namespace
}  // namespace baton::client
