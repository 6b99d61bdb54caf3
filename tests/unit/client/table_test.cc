#include "client/ctl/table.h"

#include <gtest/gtest.h>

namespace baton::client {
namespace {

TEST(Table, Render_AlignsColumns) {
  Table table({"NAME", "STATE"});
  table.AddRow({"web1", "RUNNING"});
  table.AddRow({"a-much-longer-name", ""});
  EXPECT_EQ(table.Render(),
            "NAME                STATE\n"
            "web1                RUNNING\n"
            "a-much-longer-name  -\n");
}

TEST(Table, Render_CutsOnlyWhereAWidthIsGiven) {
  Table table({"NAME", "MESSAGE"});
  table.AddRow({"x", "0123456789"});
  EXPECT_EQ(table.Render().find("0123456789") != std::string::npos, true);
  setenv("LC_ALL", "C", 1);
  EXPECT_EQ(table.Render(10), "NAME  MES~\nx     012~\n");
}

TEST(Table, AddRow_LineBreaksAndControls_StayInTheirCell) {
  Table table({"A", "B"});
  table.AddRow({"1\n2", "\x1b[2J"});
  EXPECT_EQ(table.Render(), "A    B\n1 2  ?[2J\n");
}

}  // namespace
}  // namespace baton::client
