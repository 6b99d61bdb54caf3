// Bytes of a VMM (and, by the first byte, of a back-end) into the vhost-user parser: the stream is read from
// a socket pair as the mediator reads it. The input after the first byte is what the peer wrote; descriptors
// come with a message as the input's byte before it says.
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <cstdint>
#include <cstring>

#include "agent/vhost/memory_table.h"
#include "agent/vhost/socket.h"
#include "agent/vhost/wire.h"

namespace {

using baton::Deadline;
using baton::UniqueFd;
using namespace baton::vhost;

void Write(int fd, const uint8_t* data, size_t size, int descriptors) {
  iovec iov{const_cast<uint8_t*>(data), size};
  msghdr msg{};
  msg.msg_iov = &iov;
  msg.msg_iovlen = 1;
  std::vector<UniqueFd> owned;
  std::vector<int> raw;
  for (int i = 0; i < descriptors; ++i) {
    owned.emplace_back(::eventfd(0, EFD_CLOEXEC));
    raw.push_back(owned.back().get());
  }
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 16)] = {};
  if (descriptors) {
    msg.msg_control = control;
    msg.msg_controllen = CMSG_SPACE(sizeof(int) * raw.size());
    cmsghdr* cmsg = CMSG_FIRSTHDR(&msg);
    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(sizeof(int) * raw.size());
    std::memcpy(CMSG_DATA(cmsg), raw.data(), sizeof(int) * raw.size());
  }
  (void)!::sendmsg(fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2 || size > 16384) return 0;
  const bool reply = (data[0] & 0x80) != 0;
  const uint64_t features = data[0] & 1 ? ~uint64_t{0} : 0;
  int pair[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0) return 0;
  Connection near{UniqueFd(pair[0])};
  UniqueFd far(pair[1]);
  Write(far.get(), data + 2, size - 2, data[1] % 12);
  far.reset();
  for (;;) {
    auto message = near.Receive(reply, Deadline::After(baton::Duration(0)));
    if (!message.ok()) break;
    if (reply) {
      (void)ValidateReply(static_cast<Request>(message->header.request), *message, 20);
      continue;
    }
    (void)ValidateBackendRequest(*message);
    if (!ValidateRequest(*message, features).ok()) break;
    if (message->request() == Request::kAddMemReg) {
      MemoryTable table;
      (void)table.Add(message->As<MemReg>().region, std::move(message->fds[0]));
    }
  }
  return 0;
}
