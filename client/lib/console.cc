#include "client/lib/console.h"

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>

#include "baton/v1/fleet.grpc.pb.h"
#include "client/lib/event_queue.h"

namespace baton::client {

class ConsoleSession::Reactor : public grpc::ClientBidiReactor<v1::ConsoleRequest, v1::ConsoleResponse> {
 public:
  Reactor(Client* client, const std::string& vm)
      : server_(client->options().server), stub_(client->channel()) {
    // Rides out a restart of batond, within connect_timeout, as other calls do.
    client->channel()->WaitForConnected(
        std::chrono::system_clock::now() +
        std::chrono::duration_cast<std::chrono::microseconds>(client->options().connect_timeout));
    request_.set_vm(vm);
    stub_.async()->Console(&context_, this);
    writing_ = true;
    StartWrite(&request_);
    // Reads and writes start from outside of reactions: the call must not be finished off between them. The
    // hold ends with the first read that fails, or in the destructor.
    AddHold();
    reading_ = true;
    StartRead(&response_);
    StartCall();
  }

  ~Reactor() override {
    context_.TryCancel();
    std::unique_lock<std::mutex> lock(mutex_);
    if (!reading_ && !closing_) {
      closing_ = true;
      lock.unlock();
      RemoveHold();
      lock.lock();
    }
    done_changed_.wait(lock, [this] { return done_; });
  }

  void OnReadDone(bool ok) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      reading_ = false;
      if (!ok) closing_ = true;
    }
    if (!ok) {
      RemoveHold();
      return;
    }
    ConsoleEvent event;
    event.output.swap(*response_.mutable_output());
    events_.Push(std::move(event));
    // The next read starts when the event is taken: a slow terminal slows the stream down instead of filling
    // memory.
  }

  void OnWriteDone(bool ok) override {
    std::lock_guard<std::mutex> lock(mutex_);
    writing_ = false;
    if (ok && !closing_) WriteNext();
  }

  void OnDone(const grpc::Status& status) override {
    ConsoleEvent event;
    event.ended = true;
    event.status = StatusOfCall(status, server_);
    events_.Push(std::move(event));
    std::lock_guard<std::mutex> lock(mutex_);
    done_ = true;
    done_changed_.notify_all();
  }

  std::optional<ConsoleEvent> Next() {
    auto event = events_.Pop();
    if (event && !event->ended) {
      std::lock_guard<std::mutex> lock(mutex_);
      reading_ = true;
      StartRead(&response_);
    }
    return event;
  }

  void Send(std::string input) {
    std::lock_guard<std::mutex> lock(mutex_);
    unsent_ += input.size();
    pending_.push_back(std::move(input));
    if (!writing_ && !closing_) WriteNext();
  }

  size_t Unsent() {
    std::lock_guard<std::mutex> lock(mutex_);
    return unsent_;
  }

  int fd() const { return events_.fd(); }

 private:
  // Holds mutex_.
  void WriteNext() {
    if (pending_.empty()) return;
    request_.Clear();
    request_.set_input(std::move(pending_.front()));
    pending_.pop_front();
    unsent_ -= request_.input().size();
    writing_ = true;
    StartWrite(&request_);
  }

  const std::string server_;
  v1::Fleet::Stub stub_;
  grpc::ClientContext context_;
  v1::ConsoleRequest request_;
  v1::ConsoleResponse response_;
  EventQueue<ConsoleEvent> events_;

  std::mutex mutex_;
  std::condition_variable done_changed_;
  std::deque<std::string> pending_;  // guarded by mutex_
  size_t unsent_ = 0;                // guarded by mutex_
  bool writing_ = false;             // guarded by mutex_
  bool reading_ = false;             // guarded by mutex_
  bool closing_ = false;             // guarded by mutex_; the hold is gone, nothing may be started any more
  bool done_ = false;                // guarded by mutex_
};

ConsoleSession::ConsoleSession(Client* client, const std::string& vm)
    : reactor_(std::make_unique<Reactor>(client, vm)) {}
ConsoleSession::~ConsoleSession() = default;
int ConsoleSession::fd() const { return reactor_->fd(); }
std::optional<ConsoleEvent> ConsoleSession::Next() { return reactor_->Next(); }
void ConsoleSession::Send(std::string input) { reactor_->Send(std::move(input)); }
size_t ConsoleSession::Unsent() const { return reactor_->Unsent(); }

}  // namespace baton::client
