// A scripted batond for tests of the agent.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "baton/v1/agent_session.grpc.pb.h"

namespace baton::daemon {

// One session at a time; what the agent says is kept, what the test wants said is sent.
class FakeBatond final : public v1::AgentSession::Service {
 public:
  explicit FakeBatond(const std::string& address) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials());
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeBatond() override {
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
  }

  grpc::Status Session(grpc::ServerContext*,
                       grpc::ServerReaderWriter<v1::ServerMessage, v1::AgentMessage>* stream) override {
    {
      std::lock_guard lock(mutex_);
      stream_ = stream;
    }
    v1::AgentMessage message;
    while (stream->Read(&message)) {
      if (message.has_hello()) {
        v1::ServerMessage welcome;
        welcome.mutable_welcome()->mutable_heartbeat_interval()->set_nanos(50000000);
        stream->Write(welcome);
      }
      std::lock_guard lock(mutex_);
      heard_.push_back(message);
      changed_.notify_all();
    }
    std::lock_guard lock(mutex_);
    stream_ = nullptr;
    return grpc::Status::OK;
  }

  void Say(const v1::ServerMessage& message) {
    std::lock_guard lock(mutex_);
    ASSERT_NE(stream_, nullptr);
    stream_->Write(message);
  }
  // The next message that `wanted` accepts; earlier ones are dropped.
  v1::AgentMessage Next(const std::function<bool(const v1::AgentMessage&)>& wanted) {
    std::unique_lock lock(mutex_);
    v1::AgentMessage found;
    bool came = changed_.wait_for(lock, std::chrono::seconds(60), [&] {
      while (!heard_.empty()) {
        v1::AgentMessage message = heard_.front();
        heard_.pop_front();
        if (!wanted(message)) continue;
        found = message;
        return true;
      }
      return false;
    });
    EXPECT_TRUE(came);
    return found;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<v1::AgentMessage> heard_;
  grpc::ServerReaderWriter<v1::ServerMessage, v1::AgentMessage>* stream_ = nullptr;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace baton::daemon
