// Resources as people see them: one row each in tables, paragraphs in `describe`. Pure functions; `now` is in
// seconds since the epoch.
#pragma once

#include <string>
#include <vector>

#include "baton/v1/fleet.pb.h"
#include "baton/v1/migrations.pb.h"
#include "baton/v1/policies.pb.h"
#include "client/ctl/table.h"

namespace baton::client {

Table HostTable(const std::vector<v1::Host>& hosts, bool wide, int64_t now);
Table VmTable(const std::vector<v1::Vm>& vms, bool wide, int64_t now);
// One row a device.
Table DeviceTable(const std::vector<v1::Vm>& vms, bool wide, int64_t now);
Table MigrationTable(const std::vector<v1::Migration>& migrations, bool wide, int64_t now);
Table PolicyTable(const std::vector<v1::Policy>& policies, bool wide);

std::string DescribeHost(const v1::Host& host, const std::vector<v1::Vm>& vms, int64_t now);
std::string DescribeVm(const v1::Vm& vm, int64_t now);
std::string DescribeMigration(const v1::Migration& migration);
std::string DescribePolicy(const v1::Policy& policy);

// The findings of checks, most severe first, each with what to do; "no findings" if there are none.
std::string DescribeFindings(const v1::Migration& migration);
std::string DescribeFindings(const google::protobuf::RepeatedPtrField<v1::Finding>& findings);
bool HasBlocker(const v1::Migration& migration);

// "42 %" of round 0's memory or of the present round; empty when nothing can be said.
std::string PercentOf(const v1::Migration& migration);
// The longest of the three downtimes; zero if none was measured.
std::string BlackoutOf(const v1::Migration& migration);

}  // namespace baton::client
