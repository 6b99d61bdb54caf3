#include "server/api/console.h"

#include "server/api/bidi.h"
#include "server/names.h"

namespace baton::server {
namespace {

// Messages of console output are a few KiB each.
constexpr size_t kMaxQueuedOutput = 1024;

class Console : public Bidi<v1::ConsoleRequest, v1::ConsoleResponse> {
 public:
  Console(ApiContext api, Caller caller, Fleet& fleet)
      : Bidi(api.loop, kMaxQueuedOutput), api_(api), caller_(std::move(caller)), fleet_(fleet) {}
  void Start(std::shared_ptr<Console> self) {
    weak_ = self;
    Open(std::move(self));
    if (absl::Status status = Require(caller_, Role::kOperator); !status.ok()) End(status);
  }

 private:
  void OnMessage(const v1::ConsoleRequest& request) override {
    if (stream_ != 0) return fleet_.ConsoleInput(stream_, request.input());
    if (!Require(caller_, Role::kOperator).ok()) return;
    auto id = ParseName(request.vm(), "vms", "vm");
    if (!id.ok()) return End(id.status());
    auto opened = fleet_.OpenConsole(
        *id, [weak = weak_](const std::string& data, bool close, const absl::Status& error) {
          auto self = weak.lock();
          if (!self) return;
          if (!data.empty()) {
            v1::ConsoleResponse response;
            response.set_output(data);
            self->Write(std::move(response));
          }
          if (close) self->End(error);
        });
    LOG_INFO("audit caller={} method=Console subject={} code={}", caller_.ToString(), request.vm(),
             static_cast<int>(opened.status().code()));
    if (!opened.ok()) return End(opened.status());
    stream_ = *opened;
    if (!request.input().empty()) fleet_.ConsoleInput(stream_, request.input());
  }
  void OnEnd() override {
    if (stream_ != 0) fleet_.CloseConsole(stream_);
    api_.metrics.ApiCall("Console", 0);
  }

  ApiContext api_;
  const Caller caller_;
  Fleet& fleet_;
  std::weak_ptr<Console> weak_;
  uint64_t stream_ = 0;  // the loop's; 0: not open
};

}  // namespace

grpc::ServerBidiReactor<v1::ConsoleRequest, v1::ConsoleResponse>* StartConsole(ApiContext api,
                                                                               const Caller& caller,
                                                                               Fleet& fleet) {
  auto console = std::make_shared<Console>(api, caller, fleet);
  console->Start(console);
  return console.get();
}

}  // namespace baton::server
