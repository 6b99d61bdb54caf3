// Golden renderings of the progress of one migration.
#include "client/ctl/progress.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "client/ctl/text.h"

namespace baton::client {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int64_t kStart = 1767225600;

v1::Migration Running() {
  v1::Migration m;
  m.set_name("migrations/7c01");
  m.set_vm("vms/web1");
  m.set_source("hosts/a");
  m.set_destination("hosts/b");
  m.set_phase(v1::PRECOPY);
  m.mutable_create_time()->set_seconds(kStart);
  m.mutable_params()->mutable_max_downtime()->set_nanos(300000000);
  for (auto [phase, second] : {std::pair{v1::QUEUED, 0}, {v1::PREPARING, 1}, {v1::PRECOPY, 2}}) {
    auto* time = m.add_phase_times();
    time->set_phase(phase);
    time->mutable_time()->set_seconds(kStart + second);
  }
  auto* p = m.mutable_progress();
  p->set_memory_total(1ull << 30);
  p->set_remaining(256ull << 20);
  p->set_round(1);
  p->set_rate(800ull << 20);
  p->set_dirty_rate(45ull << 20);
  p->mutable_forecast_remaining()->set_seconds(2);
  p->mutable_forecast_downtime()->set_nanos(34000000);
  p->mutable_bytes()->set_data(768ull << 20);
  p->mutable_bytes()->set_hole_skipped(2ull << 30);
  auto* round = p->add_rounds();
  round->set_number(0);
  round->mutable_duration()->set_nanos(960000000);
  round->set_bytes(768ull << 20);
  round->set_rate(800ull << 20);
  round->set_dirty_rate(11520);
  round->mutable_forecast_downtime()->set_nanos(90000000);
  return m;
}

// 64 KiB in 0.2 ms are no 312 MiB/s.
TEST(ProgressLog, BurstHasNoRate) {
  ProgressLog log;
  v1::Migration m = Running();
  log.Update(m);
  v1::RoundStats* burst = m.mutable_progress()->add_rounds();
  burst->set_number(1);
  burst->mutable_duration()->set_nanos(200000);
  burst->set_bytes(64 << 10);
  burst->set_rate(uint64_t{64 << 10} * 5000);
  burst->set_dirty_rate(80000);
  const std::vector<std::string> lines = log.Update(m);
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_THAT(lines[0], testing::EndsWith("round 1: sent 64.0 KiB in 200 us"));
}

TEST(ProgressLog, TellsEachThingOnce_InTheOrderItHappened) {
  ProgressLog log;
  v1::Migration m = Running();
  EXPECT_THAT(log.Update(m),
              ElementsAre("   +0.000s  migrations/7c01: vms/web1 a -> b",  //
                          "   +0.000s  QUEUED",                            //
                          "   +1.000s  PREPARING",                         //
                          "   +2.000s  PRECOPY",                           //
                          "   +2.960s  round 0: sent 768 MiB in 960 ms (800 MiB/s), dirtied 45.0 MiB/s, "
                          "forecast blackout 90.0 ms"));
  EXPECT_THAT(log.Update(m), IsEmpty());
  auto* decision = m.mutable_progress()->add_decisions();
  decision->mutable_time()->set_seconds(kStart + 3);
  decision->set_round(0);
  decision->set_action("switchover");
  decision->set_why("10 MiB fit\ninto the limit");
  m.set_phase(v1::SWITCHOVER);
  auto* time = m.add_phase_times();
  time->set_phase(v1::SWITCHOVER);
  time->mutable_time()->set_seconds(kStart + 4);
  EXPECT_THAT(log.Update(m),
              ElementsAre("   +3.000s  decision after round 0: switchover: 10 MiB fit into the limit",
                          "   +4.000s  SWITCHOVER"));
}

TEST(ProgressLog, CancellationIsTold) {
  ProgressLog log;
  v1::Migration m = Running();
  log.Update(m);
  m.set_cancel_requested(true);
  EXPECT_THAT(log.Update(m), ElementsAre("   +0.000s  cancellation asked for"));
  EXPECT_THAT(log.Update(m), IsEmpty());
}

TEST(RenderLive, Golden80Columns) {
  LiveView view;
  view.ascii = true;
  view.now_ns = (kStart + 5) * 1000000000;
  EXPECT_THAT(RenderLive(Running(), view),
              ElementsAre("PRECOPY  web1  a -> b  5.00 s  7c01",                                 //
                          "round 1   #######################........  75 %  256 MiB left",       //
                          "sent 768 MiB  rate 800 MiB/s  dirtied 45.0 MiB/s  2.00 GiB skipped",  //
                          "forecast: done in 2.00 s  blackout 34.0 ms  limit 300 ms"));
}

TEST(RenderLive, EveryWidth_NoLineIsWider) {
  v1::Migration m = Running();
  m.set_vm("vms/a-virtual-machine-with-a-rather-long-name");
  for (int columns = 1; columns < 200; ++columns) {
    for (bool ascii : {true, false}) {
      LiveView view;
      view.columns = columns;
      view.ascii = ascii;
      view.colour = !ascii;
      view.note = "the connection to batond broke; trying again, the migration goes on";
      for (const auto& line : RenderLive(m, view)) {
        EXPECT_LE(DisplayWidth(line), static_cast<size_t>(std::max(20, columns - 1))) << line;
      }
    }
  }
}

TEST(RenderLive, MoreLeftThanMemory_DoesNotOverflowTheBar) {
  v1::Migration m = Running();
  m.mutable_progress()->set_remaining(~0ull);
  LiveView view;
  EXPECT_FALSE(RenderLive(m, view).empty());
}

TEST(Summary, Success) {
  v1::Migration m = Running();
  m.set_phase(v1::SUCCEEDED);
  m.set_guest_location(v1::DESTINATION);
  m.mutable_end_time()->set_seconds(kStart + 6);
  m.mutable_progress()->mutable_downtimes()->mutable_vcpu()->set_nanos(21000000);
  m.mutable_progress()->mutable_bytes()->set_wire(769ull << 20);
  EXPECT_EQ(Summary(m),
            "web1 moved from a to b in 6.00 s\n"
            "  blackout: vCPUs 21.0 ms (limit 300 ms)\n"
            "  sent:     769 MiB on the wire: 768 MiB data (0 B again), 0 B state\n"
            "  not sent: 2.00 GiB holes, 0 B zeroes, 0 B hinted free\n"
            "  rounds:   1\n");
}

TEST(Summary, LocationUnknown_SaysHowToSettleIt) {
  v1::Migration m = Running();
  m.set_phase(v1::FAILED);
  m.set_reason(v1::AGENT_UNREACHABLE);
  m.set_guest_location(v1::UNKNOWN);
  m.set_message("host b does not answer");
  std::string summary = Summary(m);
  EXPECT_NE(summary.find("failed: host b does not answer\n"), std::string::npos);
  EXPECT_NE(summary.find("reason:   AGENT_UNREACHABLE\n"), std::string::npos);
  EXPECT_NE(summary.find("'batonctl migration resolve 7c01 --fenced'"), std::string::npos);
}

}  // namespace
}  // namespace baton::client
