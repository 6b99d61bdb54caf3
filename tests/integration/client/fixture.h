// A fake batond with a small fleet, and batonctl run against it.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/integration/client/ctl_process.h"
#include "tests/integration/client/fake_batond.h"
#include "tests/temp_dir.h"

namespace baton::testing {

class CtlTest : public ::testing::Test {
 protected:
  CtlTest();
  ~CtlTest() override;

  // Runs "batonctl --server … arguments".
  CtlResult Run(const std::vector<std::string>& arguments, const std::string& input = "");
  std::unique_ptr<CtlProcess> StartPiped(const std::vector<std::string>& arguments, bool keep_input = false);
  std::unique_ptr<CtlProcess> StartOnTerminal(const std::vector<std::string>& arguments, int columns = 80);
  // Writes a file into the test's directory and answers its path.
  std::string WriteFile(const std::string& name, const std::string& text);

  const test::TempDir directory_;
  std::unique_ptr<FakeBatond> batond_;
};

// A migration of vms/web1 from hosts/a to hosts/b in `phase`, with the phases before it and figures that fit.
v1::Migration ExampleMigration(const std::string& id, v1::Phase phase);
// The same ended badly.
v1::Migration FailedMigration(const std::string& id, v1::Reason reason, v1::GuestLocation location,
                              const std::string& message);

}  // namespace baton::testing
