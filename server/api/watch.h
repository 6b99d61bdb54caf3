// WatchMigrations streams.
#pragma once

#include "baton/v1/migrations.pb.h"
#include "server/api/unary.h"
#include "server/control/controller.h"

namespace baton::server {

// A stream that pulls from the change log whenever its last write is out, so that a slow reader costs no
// memory and misses nothing; one that falls behind the compaction ends with OUT_OF_RANGE. Deletes itself when
// gRPC is done with it.
grpc::ServerWriteReactor<v1::WatchMigrationsResponse>* StartWatch(ApiContext api, const Caller& caller,
                                                                  Controller& controller,
                                                                  const v1::WatchMigrationsRequest& request);

}  // namespace baton::server
