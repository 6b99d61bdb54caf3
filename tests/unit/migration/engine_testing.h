// What tests of both engines have: a host at each end, a connection that can be cut, and what must be so at
// the end of each migration, whatever became of it.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "agent/migration/destination.h"
#include "agent/migration/source.h"
#include "tests/unit/migration/cutting_proxy.h"
#include "tests/unit/migration/fake_host.h"

namespace baton::migration::test {

// For a machine that does many other things at the time.
inline constexpr Duration kEnd = std::chrono::seconds(120);

struct Host {
  Host(bool runs, std::vector<JournalRecord> records)
      : ram(MakeRam()), vmm(ram, faults, runs), devices(ram, faults), journal(faults, std::move(records)) {}
  Faults faults;
  memory::GuestRam ram;
  FakeVmm vmm;
  FakeDevices devices;
  MemoryLog journal;
};

class EngineTest : public testing::Test {
 protected:
  EngineTest() {
    source_ = std::make_unique<Host>(true, std::vector<JournalRecord>{{JournalRecord::Kind::kOwner, 1, ""}});
  }
  ~EngineTest() override {
    proxy_.set_filter(nullptr);
    proxy_.set_accept(nullptr);
    out_.reset();
    in_.reset();
  }

  SourceOptions MakeSourceOptions() {
    SourceOptions options;
    options.migration_id = id_;
    options.vm = "vm";
    options.epoch = 1;
    options.params = params_;
    options.dial.address = proxy_.address();
    options.dial.token = token_;
    options.ask_backoff = std::chrono::milliseconds(5);
    options.ask_backoff_max = std::chrono::milliseconds(50);
    options.verdict_timeout = verdict_timeout_;
    return options;
  }
  SourceParts MakeSourceParts() {
    return {source_->vmm,
            source_->ram,
            source_->devices,
            source_->journal,
            [this]() -> absl::StatusOr<std::unique_ptr<memory::DirtySource>> {
              return std::make_unique<FakeDirtySource>(source_->vmm, source_->faults);
            },
            [this](const v1::SideReport& report) { Keep(source_reports_, report); }};
  }
  DestinationOptions MakeDestinationOptions() {
    DestinationOptions options;
    options.migration_id = id_;
    options.vm = "vm";
    options.epoch = 1;
    options.params = params_;
    options.token = token_;
    return options;
  }
  DestinationParts MakeDestinationParts() {
    return {destination_->vmm, destination_->ram, destination_->devices, destination_->journal,
            [this](const v1::SideReport& report) { Keep(destination_reports_, report); }};
  }
  static void Keep(std::vector<v1::SideReport>& reports, const v1::SideReport& report) {
    if (!reports.empty()) {
      EXPECT_GT(report.sequence(), reports.back().sequence());
    }
    reports.push_back(report);
  }

  // A new destination and a new migration.
  void Prepare(const std::string& id) {
    out_.reset();
    proxy_.set_accept(nullptr);
    in_.reset();
    id_ = id;
    token_.fill(static_cast<uint8_t>(id.back()));
    source_reports_.clear();
    destination_reports_.clear();
    destination_ = std::make_unique<Host>(false, std::vector<JournalRecord>{});
    params_.mutable_max_downtime()->set_nanos(300'000'000);
  }
  void StartDestination() {
    auto started = IncomingMigration::Start(MakeDestinationOptions(), MakeDestinationParts());
    ASSERT_TRUE(started.ok()) << started.status();
    in_ = *std::move(started);
    proxy_.set_accept([this](const stream::PreambleBytes& preamble, UniqueFd fd) {
      return in_->AcceptChannel(preamble, std::move(fd));
    });
  }
  void StartSource() { out_ = OutgoingMigration::Start(MakeSourceOptions(), MakeSourceParts()); }

  OutgoingMigration::Outcome SourceEnd() {
    auto end = out_->Wait(Deadline::After(kEnd));
    EXPECT_TRUE(end.ok()) << end.status() << out_->report().ShortDebugString();
    return end.value_or(OutgoingMigration::Outcome::kNone);
  }
  IncomingMigration::Outcome DestinationEnd() {
    auto end = in_->Wait(Deadline::After(kEnd));
    EXPECT_TRUE(end.ok()) << end.status() << in_->report().ShortDebugString();
    return end.value_or(IncomingMigration::Outcome::kNone);
  }

  // Exactly one guest runs, its memory is right, and it got further since.
  void ExpectOneGuest(bool at_destination) {
    Host& winner = at_destination ? *destination_ : *source_;
    Host& loser = at_destination ? *source_ : *destination_;
    EXPECT_TRUE(winner.vmm.runs());
    EXPECT_FALSE(loser.vmm.runs());
    EXPECT_TRUE(loser.vmm.dead());
    EXPECT_FALSE(source_->vmm.tracking);
    const absl::Status memory = winner.vmm.Verify();
    EXPECT_TRUE(memory.ok()) << memory;
    EXPECT_TRUE(ReplayOwnership(source_->journal.Records()).ok());
    EXPECT_TRUE(ReplayOwnership(destination_->journal.Records()).ok());
    if (!at_destination) {
      EXPECT_TRUE(winner.vmm.Resume(Deadline::After(kEnd)).ok());
    }
  }
  void ExpectMoved() {
    EXPECT_EQ(SourceEnd(), OutgoingMigration::Outcome::kReleased);
    EXPECT_EQ(DestinationEnd(), IncomingMigration::Outcome::kOwner);
    ExpectOneGuest(true);
    EXPECT_EQ(out_->report().phase(), v1::SUCCEEDED);
    EXPECT_EQ(in_->report().phase(), v1::SUCCEEDED);
    EXPECT_EQ(in_->report().epoch(), 2u);
  }
  void ExpectStayed(v1::Reason reason) {
    EXPECT_EQ(SourceEnd(), OutgoingMigration::Outcome::kResumed);
    EXPECT_EQ(DestinationEnd(), IncomingMigration::Outcome::kRefused);
    EXPECT_EQ(out_->report().reason(), reason) << out_->report().ShortDebugString();
    EXPECT_TRUE(out_->report().guest_running());
    EXPECT_TRUE(out_->report().done());
    EXPECT_TRUE(in_->report().done());
    EXPECT_FALSE(in_->report().guest_running());
    EXPECT_FALSE(source_->devices.armed);
    EXPECT_EQ(destination_->journal.Records().back().kind, JournalRecord::Kind::kRefused);
    ExpectOneGuest(false);
  }
  // After a failure: clear all faults and move the same guest.
  void ExpectRetryWorks() {
    source_->faults.Clear();
    source_->devices.lose_page = false;
    proxy_.set_filter(nullptr);
    Prepare("m9");
    StartDestination();
    StartSource();
    ExpectMoved();
  }

  CuttingProxy proxy_;
  std::unique_ptr<Host> source_, destination_;
  std::string id_;
  stream::Token token_{};
  v1::MigrationParams params_;
  Duration verdict_timeout_ = std::chrono::seconds(30);
  std::vector<v1::SideReport> source_reports_, destination_reports_;
  std::unique_ptr<OutgoingMigration> out_;
  std::unique_ptr<IncomingMigration> in_;
};

}  // namespace baton::migration::test
