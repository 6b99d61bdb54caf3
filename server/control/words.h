// What batond says to people at the end of a migration: what happened, where the guest is, what to do.
#pragma once

#include <string>

#include "baton/v1/migrations.pb.h"

namespace baton::server {

// "the guest runs at hosts/a".
std::string WhereInWords(const v1::Migration& migration);
// What to do after an end for this reason; empty if there is nothing to do.
std::string Advice(v1::Reason reason, v1::GuestLocation location);
// All three joined. `what` is what happened, without a full stop.
std::string EndMessage(const v1::Migration& migration, v1::Reason reason, const std::string& what);

}  // namespace baton::server
