// The Migrations service.
#pragma once

#include "baton/v1/migrations.grpc.pb.h"
#include "server/api/unary.h"
#include "server/control/controller.h"

namespace baton::server {

// Thread-safe. The controller outlives every call.
class MigrationsService : public v1::Migrations::CallbackService {
 public:
  MigrationsService(ApiContext api, Controller& controller) : api_(api), controller_(controller) {}

  grpc::ServerUnaryReactor* CreateMigration(grpc::CallbackServerContext* context,
                                            const v1::CreateMigrationRequest* request,
                                            v1::Migration* response) override;
  grpc::ServerUnaryReactor* GetMigration(grpc::CallbackServerContext* context,
                                         const v1::GetMigrationRequest* request,
                                         v1::Migration* response) override;
  grpc::ServerUnaryReactor* ListMigrations(grpc::CallbackServerContext* context,
                                           const v1::ListMigrationsRequest* request,
                                           v1::ListMigrationsResponse* response) override;
  grpc::ServerWriteReactor<v1::WatchMigrationsResponse>* WatchMigrations(
      grpc::CallbackServerContext* context, const v1::WatchMigrationsRequest* request) override;
  grpc::ServerUnaryReactor* CancelMigration(grpc::CallbackServerContext* context,
                                            const v1::CancelMigrationRequest* request,
                                            v1::Migration* response) override;
  grpc::ServerUnaryReactor* RetuneMigration(grpc::CallbackServerContext* context,
                                            const v1::RetuneMigrationRequest* request,
                                            v1::Migration* response) override;
  grpc::ServerUnaryReactor* ResolveMigration(grpc::CallbackServerContext* context,
                                             const v1::ResolveMigrationRequest* request,
                                             v1::Migration* response) override;

 private:
  ApiContext api_;
  Controller& controller_;
};

}  // namespace baton::server
