#include "server/api/migrations_service.h"

#include "server/api/watch.h"
#include "server/control/filter.h"
#include "server/names.h"

namespace baton::server {

grpc::ServerUnaryReactor* MigrationsService::CreateMigration(grpc::CallbackServerContext* context,
                                                             const v1::CreateMigrationRequest* request,
                                                             v1::Migration* response) {
  Role needed = request->validate_only() ? Role::kViewer : Role::kOperator;
  return Unary(api_, context, "CreateMigration", needed,
               request->migration().vm() + ">" + request->migration().destination(), [=, this](Done done) {
                 controller_.Create(*request, [response, done](absl::StatusOr<v1::Migration> result) {
                   done(Store1(std::move(result), response));
                 });
               });
}

grpc::ServerUnaryReactor* MigrationsService::GetMigration(grpc::CallbackServerContext* context,
                                                          const v1::GetMigrationRequest* request,
                                                          v1::Migration* response) {
  return Unary(api_, context, "GetMigration", Role::kViewer, request->name(), [=, this](Done done) {
    auto id = ParseName(request->name(), "migrations", "name");
    if (!id.ok()) return done(id.status());
    done(Store1(controller_.Get(*id), response));
  });
}

grpc::ServerUnaryReactor* MigrationsService::ListMigrations(grpc::CallbackServerContext* context,
                                                            const v1::ListMigrationsRequest* request,
                                                            v1::ListMigrationsResponse* response) {
  auto list = [=, this]() -> absl::Status {
    ASSIGN_OR_RETURN(MigrationFilter filter, ParseMigrationFilter(request->filter()));
    ASSIGN_OR_RETURN(size_t size, PageSize(request->page_size()));
    ASSIGN_OR_RETURN(std::string after,
                     ParsePageToken(request->page_token(), "migrations", request->filter()));
    ASSIGN_OR_RETURN(Controller::Page page, controller_.List(filter, after, size));
    for (v1::Migration& migration : page.migrations) *response->add_migrations() = std::move(migration);
    response->set_revision(page.revision);
    if (!page.last.empty()) {
      response->set_next_page_token(MakePageToken("migrations", request->filter(), page.last));
    }
    return absl::OkStatus();
  };
  return Unary(api_, context, "ListMigrations", Role::kViewer, "", [list](Done done) { done(list()); });
}

grpc::ServerWriteReactor<v1::WatchMigrationsResponse>* MigrationsService::WatchMigrations(
    grpc::CallbackServerContext* context, const v1::WatchMigrationsRequest* request) {
  return StartWatch(api_, CallerOf(*context), controller_, *request);
}

grpc::ServerUnaryReactor* MigrationsService::CancelMigration(grpc::CallbackServerContext* context,
                                                             const v1::CancelMigrationRequest* request,
                                                             v1::Migration* response) {
  return Unary(api_, context, "CancelMigration", Role::kOperator, request->name(), [=, this](Done done) {
    auto id = ParseName(request->name(), "migrations", "name");
    if (!id.ok()) return done(id.status());
    done(Store1(controller_.Cancel(*id), response));
  });
}

grpc::ServerUnaryReactor* MigrationsService::RetuneMigration(grpc::CallbackServerContext* context,
                                                             const v1::RetuneMigrationRequest* request,
                                                             v1::Migration* response) {
  return Unary(api_, context, "RetuneMigration", Role::kOperator, request->name(), [=, this](Done done) {
    auto id = ParseName(request->name(), "migrations", "name");
    if (!id.ok()) return done(id.status());
    v1::RetuneCommand retune;
    if (request->has_bandwidth()) retune.set_bandwidth(request->bandwidth());
    if (request->has_max_downtime()) *retune.mutable_max_downtime() = request->max_downtime();
    done(Store1(controller_.Retune(*id, retune), response));
  });
}

grpc::ServerUnaryReactor* MigrationsService::ResolveMigration(grpc::CallbackServerContext* context,
                                                              const v1::ResolveMigrationRequest* request,
                                                              v1::Migration* response) {
  return Unary(api_, context, "ResolveMigration", Role::kAdmin, request->name(), [=, this](Done done) {
    auto id = ParseName(request->name(), "migrations", "name");
    if (!id.ok()) return done(id.status());
    done(Store1(controller_.Resolve(*id, request->fenced()), response));
  });
}

}  // namespace baton::server
