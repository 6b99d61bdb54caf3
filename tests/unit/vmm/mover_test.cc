// What libvirt is asked for, and what is read from its answers. Pure.
#include "agent/vmm/libvirt/mover.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <libvirt/libvirt.h>

#include <cstring>

namespace baton::vmm {
namespace {

using testing::HasSubstr;

v1::DomainTarget Target() {
  v1::DomainTarget target;
  target.set_xml("<domain/>");
  target.set_uri("qemu:///system?socket=/elsewhere/sock");
  target.set_tunnel_dir("/run/t/m1");
  return target;
}

std::vector<MoveCall::Value> All(const MoveCall& call, const std::string& name) {
  std::vector<MoveCall::Value> out;
  for (const auto& [key, value] : call.params) {
    if (key == name) out.push_back(value);
  }
  return out;
}

MoveCall::Value Text(const std::string& text) { return text; }

TEST(MoveCall, TransientDomain_StaysTransientAndGoesThroughTheTunnel) {
  auto call = MakeMoveCall({false, "<domain/>", false}, Target(), {});
  ASSERT_TRUE(call.ok());
  EXPECT_EQ(call->flags, static_cast<unsigned>(VIR_MIGRATE_LIVE | VIR_MIGRATE_PEER2PEER));
  // The destination's own socket is its business: here only the tunnel's is known.
  EXPECT_EQ(call->destination, "qemu+unix:///system?socket=/run/t/m1/libvirt");
  EXPECT_THAT(All(*call, VIR_MIGRATE_PARAM_URI), testing::ElementsAre(Text("unix:///run/t/m1/vmm")));
  EXPECT_THAT(All(*call, VIR_MIGRATE_PARAM_DEST_XML), testing::ElementsAre(Text("<domain/>")));
  EXPECT_TRUE(All(*call, VIR_MIGRATE_PARAM_BANDWIDTH).empty());
}

TEST(MoveCall, PersistentDomain_DefinitionIsRewrittenOnlyWhereTheDestinationWantsIt) {
  auto same = MakeMoveCall({true, "<domain/>", false}, Target(), {});
  ASSERT_TRUE(same.ok());
  EXPECT_TRUE(same->flags & VIR_MIGRATE_PERSIST_DEST);
  EXPECT_TRUE(same->flags & VIR_MIGRATE_UNDEFINE_SOURCE);
  EXPECT_TRUE(All(*same, VIR_MIGRATE_PARAM_PERSIST_XML).empty());
  auto other = MakeMoveCall({true, "<domain><!-- as here --></domain>", false}, Target(), {});
  ASSERT_TRUE(other.ok());
  EXPECT_THAT(All(*other, VIR_MIGRATE_PARAM_PERSIST_XML), testing::ElementsAre(Text("<domain/>")));
}

TEST(MoveCall, CopiedDisks_AreNamedAndGoThroughTheTunnel) {
  v1::DomainTarget target = Target();
  target.add_copied_disks("vda");
  target.add_copied_disks("vdb");
  auto call = MakeMoveCall({false, "", false}, target, {});
  ASSERT_TRUE(call.ok());
  EXPECT_TRUE(call->flags & VIR_MIGRATE_NON_SHARED_DISK);
  EXPECT_THAT(All(*call, VIR_MIGRATE_PARAM_MIGRATE_DISKS), testing::ElementsAre(Text("vda"), Text("vdb")));
  EXPECT_THAT(All(*call, VIR_MIGRATE_PARAM_DISKS_URI), testing::ElementsAre(Text("unix:///run/t/m1/nbd")));
  EXPECT_FALSE(call->flags & VIR_MIGRATE_UNSAFE);
}

TEST(MoveCall, OperatorsWordAboutDisks_OverridesLibvirt) {
  auto call = MakeMoveCall({false, "", true}, Target(), {});
  ASSERT_TRUE(call.ok());
  EXPECT_TRUE(call->flags & VIR_MIGRATE_UNSAFE);
}

TEST(MoveCall, Bandwidth_IsRoundedUpToMiB) {
  v1::MigrationParams params;
  params.set_bandwidth((10u << 20) + 1);
  auto call = MakeMoveCall({}, Target(), params);
  ASSERT_TRUE(call.ok());
  EXPECT_THAT(All(*call, VIR_MIGRATE_PARAM_BANDWIDTH), testing::ElementsAre(MoveCall::Value(uint64_t{11})));
}

TEST(MoveCall, SeveralChannels_AreParallelConnections) {
  v1::MigrationParams params;
  params.set_channels(4);
  auto call = MakeMoveCall({}, Target(), params);
  ASSERT_TRUE(call.ok());
  EXPECT_TRUE(call->flags & VIR_MIGRATE_PARALLEL);
  EXPECT_THAT(All(*call, VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS), testing::ElementsAre(MoveCall::Value(4)));
  params.set_channels(1);
  call = MakeMoveCall({}, Target(), params);
  ASSERT_TRUE(call.ok());
  EXPECT_FALSE(call->flags & VIR_MIGRATE_PARALLEL);
}

TEST(MoveCall, Compression_FitsTheChannelsOrIsRefused) {
  v1::MigrationParams params;
  params.set_compression("zstd");
  auto call = MakeMoveCall({}, Target(), params);
  ASSERT_TRUE(call.ok());
  EXPECT_TRUE(call->flags & VIR_MIGRATE_COMPRESSED);
  EXPECT_TRUE(call->flags & VIR_MIGRATE_PARALLEL) << "QEMU has zstd for multifd only";
  params.set_compression("xbzrle");
  call = MakeMoveCall({}, Target(), params);
  ASSERT_TRUE(call.ok());
  EXPECT_FALSE(call->flags & VIR_MIGRATE_PARALLEL);
  params.set_channels(2);
  EXPECT_THAT(Message(MakeMoveCall({}, Target(), params).status()), HasSubstr("single channel"));
}

TEST(MoveCall, ZeroCopy_IsLeftOut) {
  v1::MigrationParams params;
  params.set_zero_copy(true);
  auto call = MakeMoveCall({}, Target(), params);
  ASSERT_TRUE(call.ok());
  EXPECT_EQ(call->flags, static_cast<unsigned>(VIR_MIGRATE_LIVE | VIR_MIGRATE_PEER2PEER));
}

TEST(MoveCall, PostCopy_OnlyWhereItIsAllowed) {
  v1::MigrationParams params;
  params.set_on_stall(v1::ON_STALL_POSTCOPY);
  auto call = MakeMoveCall({}, Target(), params);
  ASSERT_TRUE(call.ok());
  EXPECT_FALSE(call->flags & VIR_MIGRATE_POSTCOPY);
  params.set_post_copy(true);
  params.set_auto_converge(true);
  call = MakeMoveCall({}, Target(), params);
  ASSERT_TRUE(call.ok());
  EXPECT_TRUE(call->flags & VIR_MIGRATE_POSTCOPY);
  EXPECT_TRUE(call->flags & VIR_MIGRATE_AUTO_CONVERGE);
  EXPECT_TRUE(All(*call, VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY).empty());
  params.set_bandwidth(5 << 20);
  call = MakeMoveCall({}, Target(), params);
  ASSERT_TRUE(call.ok());
  EXPECT_THAT(All(*call, VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY),
              testing::ElementsAre(MoveCall::Value(uint64_t{5})));
  params.set_channels(2);
  EXPECT_THAT(Message(MakeMoveCall({}, Target(), params).status()), HasSubstr("single channel"));
}

TEST(MoveCall, Recovery_LeavesTheBandwidthAsItIs) {
  v1::MigrationParams params;
  params.set_post_copy(true);
  params.set_bandwidth(5 << 20);
  auto call = MakeRecoverCall({true, "<domain/>", false}, Target(), params);
  ASSERT_TRUE(call.ok());
  EXPECT_TRUE(call->flags & VIR_MIGRATE_POSTCOPY);
  EXPECT_TRUE(call->flags & VIR_MIGRATE_POSTCOPY_RESUME);
  EXPECT_TRUE(call->flags & VIR_MIGRATE_PERSIST_DEST);
  EXPECT_EQ(call->destination, "qemu+unix:///system?socket=/run/t/m1/libvirt");
  // It may have been changed since the call that began the migration.
  EXPECT_TRUE(All(*call, VIR_MIGRATE_PARAM_BANDWIDTH).empty());
  EXPECT_TRUE(All(*call, VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY).empty());
}

TEST(MoveCall, SessionUri_KeepsItsPath) {
  v1::DomainTarget target = Target();
  target.set_uri("qemu+unix:///session");
  EXPECT_EQ(TunnelUri(target), "qemu+unix:///session?socket=/run/t/m1/libvirt");
}

virTypedParameter Number(const char* name, unsigned long long value) {
  virTypedParameter out{};
  std::strncpy(out.field, name, VIR_TYPED_PARAM_FIELD_LENGTH - 1);
  out.type = VIR_TYPED_PARAM_ULLONG;
  out.value.ul = value;
  return out;
}

TEST(JobFigures, UnknownAndOddFields_AreLeftOut) {
  virTypedParameter odd{};
  std::strncpy(odd.field, VIR_DOMAIN_JOB_MEMORY_TOTAL, VIR_TYPED_PARAM_FIELD_LENGTH - 1);
  odd.type = VIR_TYPED_PARAM_STRING;
  virTypedParameter negative{};
  std::strncpy(negative.field, VIR_DOMAIN_JOB_MEMORY_REMAINING, VIR_TYPED_PARAM_FIELD_LENGTH - 1);
  negative.type = VIR_TYPED_PARAM_LLONG;
  negative.value.l = -5;
  const virTypedParameter params[] = {odd, negative, Number("new_in_libvirt", 7),
                                      Number(VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE, 0)};
  const JobFigures job = ReadJobFigures(VIR_DOMAIN_JOB_UNBOUNDED, params, 4);
  EXPECT_EQ(job.memory_total, 0u);
  EXPECT_EQ(job.memory_remaining, 0u);
  EXPECT_EQ(job.page_size, 4096u);
  EXPECT_FALSE(job.downtime_ms.has_value());
}

TEST(JobFigures, Progress_TellsWhatWasSentAgain) {
  const virTypedParameter params[] = {
      Number(VIR_DOMAIN_JOB_OPERATION, VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT),
      Number(VIR_DOMAIN_JOB_MEMORY_TOTAL, 100u << 20),
      Number(VIR_DOMAIN_JOB_MEMORY_NORMAL_BYTES, 90u << 20),
      Number(VIR_DOMAIN_JOB_MEMORY_CONSTANT, (30u << 20) / 4096),
      Number(VIR_DOMAIN_JOB_MEMORY_REMAINING, 10u << 20),
      Number(VIR_DOMAIN_JOB_MEMORY_BPS, 20u << 20),
      Number(VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE, 100),
      Number(VIR_DOMAIN_JOB_MEMORY_ITERATION, 3),
      Number(VIR_DOMAIN_JOB_DOWNTIME, 42),
  };
  const JobFigures job = ReadJobFigures(VIR_DOMAIN_JOB_UNBOUNDED, params, 9);
  EXPECT_TRUE(job.outgoing());
  EXPECT_EQ(job.downtime_ms, 42u);
  v1::Progress progress;
  FillProgress(job, &progress);
  EXPECT_EQ(progress.bytes().data(), 90u << 20);
  EXPECT_EQ(progress.bytes().zero(), 30u << 20);
  EXPECT_EQ(progress.bytes().resent(), 20u << 20);
  EXPECT_EQ(progress.remaining(), 10u << 20);
  EXPECT_EQ(progress.round(), 3u);
  EXPECT_EQ(progress.dirty_rate(), 100u * 4096);
  EXPECT_EQ(progress.forecast_remaining().nanos(), 500'000'000);
}

}  // namespace
}  // namespace baton::vmm
