#include "client/ctl/completion.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <CLI/CLI.hpp>

#include "client/ctl/context.h"

namespace baton::client {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::IsSupersetOf;
using ::testing::Not;

class CompletionTest : public ::testing::Test {
 protected:
  CompletionTest() : app_("", "batonctl") {
    app_.add_option("-s,--server", context_.server);
    AddGetCommands(&app_, &context_);
    AddMigrateCommands(&app_, &context_);
    AddReportCommand(&app_, &context_);
  }
  std::vector<std::string> For(const std::vector<std::string>& words) {
    return Complete(app_, words, [](Collection collection) {
      return std::vector<std::string>{CollectionName(collection) + "1", CollectionName(collection) + "2"};
    });
  }
  Context context_;
  CLI::App app_;
};

TEST_F(CompletionTest, CommandsAndSubcommands) {
  EXPECT_THAT(For({"mig"}), ElementsAre("migrate", "migration"));
  EXPECT_THAT(For({"get", ""}), ElementsAre("hosts", "migrations", "policies", "vms"));
  EXPECT_THAT(For({"get", "vm", ""}), ElementsAre("vms1", "vms2")) << "aliases lead to the same";
  EXPECT_THAT(For({"-s", "x:1", "get", "h"}), ElementsAre("hosts"));
}

TEST_F(CompletionTest, ValuesOfOptions) {
  EXPECT_THAT(For({"migrate", "web1", "--to", ""}), ElementsAre("hosts1", "hosts2"));
  EXPECT_THAT(For({"get", "vms", "-o", ""}), Contains("yaml"));
  EXPECT_THAT(For({"report", "1", "-o", ""}), IsEmpty()) << "a file";
  EXPECT_THAT(For({"migrate", "web1", "--max-downtime", ""}), IsEmpty());
}

TEST_F(CompletionTest, Options) {
  EXPECT_THAT(For({"migrate", "--"}), IsSupersetOf({"--to", "--dry-run", "--server"}));
  EXPECT_THAT(For({"get", "hosts", "--"}), Not(Contains("--to")));
}

}  // namespace
}  // namespace baton::client
