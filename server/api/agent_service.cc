#include "server/api/agent_service.h"

#include "server/api/bidi.h"
#include "server/names.h"

namespace baton::server {
namespace {

// Commands and acknowledgements; an agent that lets so many lie is stuck.
constexpr size_t kMaxQueuedCommands = 4096;

class SessionStream : public Bidi<v1::AgentMessage, v1::ServerMessage> {
 public:
  // What the fleet holds; the stream may be gone before the fleet lets go.
  class Link : public AgentLink {
   public:
    explicit Link(std::weak_ptr<SessionStream> stream) : stream_(std::move(stream)) {}
    void Send(v1::ServerMessage message) override {
      if (auto stream = stream_.lock()) stream->Write(std::move(message));
    }
    void Close(absl::Status status) override {
      if (auto stream = stream_.lock()) stream->End(status);
    }

   private:
    std::weak_ptr<SessionStream> stream_;
  };

  SessionStream(ApiContext api, Caller caller, std::string peer, Fleet& fleet)
      : Bidi(api.loop, kMaxQueuedCommands),
        caller_(std::move(caller)),
        peer_(std::move(peer)),
        fleet_(fleet) {}
  void Start(std::shared_ptr<SessionStream> self) {
    weak_ = self;
    Open(std::move(self));
  }

 private:
  void OnMessage(const v1::AgentMessage& message) override {
    if (session_ != 0) return fleet_.Receive(session_, message);
    if (refused_) return;
    absl::StatusOr<uint64_t> session = Open1(message);
    if (session.ok()) {
      session_ = *session;
      return;
    }
    refused_ = true;
    LOG_WARN("session from {} ({}) refused: {}", peer_, caller_.ToString(), Message(session.status()));
    End(session.status());
  }
  absl::StatusOr<uint64_t> Open1(const v1::AgentMessage& message) {
    if (!message.has_hello())
      return absl::InvalidArgumentError("the first message of a session must be Hello");
    RETURN_IF_ERROR(RequireAgent(caller_, IdOf(message.hello().host().name())));
    return fleet_.Connect(message.hello(), std::make_shared<Link>(weak_));
  }
  void OnEnd() override {
    if (session_ != 0) fleet_.Disconnect(session_);
  }

  const Caller caller_;
  const std::string peer_;
  Fleet& fleet_;
  std::weak_ptr<SessionStream> weak_;
  uint64_t session_ = 0;  // the loop's; 0 before Hello
  bool refused_ = false;  // the loop's
};

}  // namespace

grpc::ServerBidiReactor<v1::AgentMessage, v1::ServerMessage>* AgentService::Session(
    grpc::CallbackServerContext* context) {
  auto stream = std::make_shared<SessionStream>(api_, CallerOf(*context), context->peer(), fleet_);
  stream->Start(stream);
  return stream.get();
}

}  // namespace baton::server
