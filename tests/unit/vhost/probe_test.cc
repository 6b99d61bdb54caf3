#include "agent/vhost/probe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "agent/vhost/wire.h"
#include "agent/virtio/features.h"

namespace baton::vhost {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::IsEmpty;

std::vector<std::string> Codes(const std::vector<v1::Finding>& findings) {
  std::vector<std::string> codes;
  for (const auto& f : findings) {
    codes.push_back(f.code());
    EXPECT_NE(f.message(), "");
    EXPECT_NE(f.remedy(), "");
    EXPECT_EQ(f.subject(), "device disk0");
  }
  return codes;
}

v1::Device Disk() {
  v1::Device d;
  d.set_name("disk0");
  d.set_class_(v1::BLK);
  d.set_state(v1::Device::ACTIVE);
  d.set_acked_features(virtio::kFVersion1 | virtio::kFEventIdx | virtio::Bit(6));
  d.set_offered_features(d.acked_features() | virtio::kVhostFLogAll | virtio::kVhostUserFProtocolFeatures);
  d.set_protocol_features(pf::kMq | pf::kConfig | pf::kLogShmfd);
  d.set_offered_protocol_features(d.protocol_features());
  d.set_max_queues(1);
  d.set_max_memory_slots(8);
  d.set_memory_regions(2);
  std::string config(60, '\0');
  config[0] = 100;
  config[21] = 2;  // 512
  d.set_config(config);
  auto* q = d.add_queues();
  q->set_index(0);
  q->set_size(128);
  q->set_started(true);
  return d;
}

TEST(CompareForMigration, EqualBackendsHaveNoFindings) {
  EXPECT_THAT(CompareForMigration(Disk(), Disk()), IsEmpty());
}

TEST(CompareForMigration, EachDifferenceIsFound) {
  auto with = [](auto&& change) {
    v1::Device destination = Disk();
    change(destination);
    return Codes(CompareForMigration(Disk(), destination));
  };
  EXPECT_THAT(with([](v1::Device& d) { d.set_offered_features(d.offered_features() & ~virtio::kFEventIdx); }),
              Contains("FEATURES_MISSING"));
  EXPECT_THAT(with([](v1::Device& d) { d.set_offered_protocol_features(pf::kLogShmfd); }),
              Contains("PROTOCOL_FEATURES_MISSING"));
  EXPECT_THAT(with([](v1::Device& d) { d.set_offered_protocol_features(pf::kMq | pf::kConfig); }),
              Contains("NO_WAY_BACK"));
  EXPECT_THAT(with([](v1::Device& d) { (*d.mutable_config())[0] = 99; }), Contains("CAPACITY_DIFFERS"));
  EXPECT_THAT(with([](v1::Device& d) { (*d.mutable_config())[21] = 16; }), Contains("BLK_SIZE_DIFFERS"));
  EXPECT_THAT(with([](v1::Device& d) { d.clear_config(); }), Contains("NO_CONFIG"));
  EXPECT_THAT(with([](v1::Device& d) { d.set_max_memory_slots(1); }), Contains("TOO_FEW_MEMORY_SLOTS"));
  EXPECT_THAT(with([](v1::Device& d) { d.set_max_queues(0); }), Contains("TOO_FEW_QUEUES"));
}

TEST(CompareForMigration, MissingFeatureIsNamed) {
  v1::Device destination = Disk();
  destination.set_offered_features(destination.offered_features() & ~virtio::kFEventIdx);
  auto findings = CompareForMigration(Disk(), destination);
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_THAT(findings[0].message(), HasSubstr("EVENT_IDX"));
  EXPECT_EQ(findings[0].severity(), v1::BLOCKER);
}

TEST(CompareForMigration, SourceThatCannotLogOrHasLostItsBackendIsABlocker) {
  v1::Device source = Disk();
  source.set_offered_protocol_features(pf::kMq | pf::kConfig);
  EXPECT_THAT(Codes(CompareForMigration(source, Disk())), Contains("NO_DIRTY_LOG"));
  source = Disk();
  source.set_state(v1::Device::HELD);
  EXPECT_THAT(Codes(CompareForMigration(source, Disk())), Contains("SOURCE_BACKEND_LOST"));
}

}  // namespace
}  // namespace baton::vhost
