#include "tests/lab/backend/lab_backend.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "agent/virtio/features.h"
#include "agent/virtio/split_ring.h"

namespace baton::lab {
namespace {

using vhost::Request;
namespace pf = vhost::pf;

struct Desc {
  uint64_t addr;
  uint32_t len;
  uint16_t flags;
  uint16_t next;
};
struct BlkHeader {
  uint32_t type;
  uint32_t reserved;
  uint64_t sector;
};
struct UsedElem {
  uint32_t id;
  uint32_t len;
};
constexpr uint16_t kNext = 1, kWrite = 2;
constexpr uint32_t kIn = 0, kOut = 1, kFlush = 4, kGetId = 8;
constexpr uint64_t kStrideAlign = 64;

uint64_t Stride(uint16_t n) {
  return (16 + uint64_t{16} * n + kStrideAlign - 1) / kStrideAlign * kStrideAlign;
}

}  // namespace

absl::StatusOr<std::unique_ptr<LabBackend>> LabBackend::Create(LabBackendOptions options) {
  std::unique_ptr<LabBackend> out(new LabBackend(std::move(options)));
  out->image_.reset(::open(out->options_.image.c_str(), O_RDWR | O_CLOEXEC));
  struct stat st;
  if (!out->image_ || ::fstat(out->image_.get(), &st) != 0) return ErrnoError(errno, out->options_.image);
  out->sectors_ = static_cast<uint64_t>(st.st_size) / 512;
  ASSIGN_OR_RETURN(out->listener_, UnixListener::Listen(out->options_.socket));
  return out;
}

LabBackend::~LabBackend() { Reset(); }

void LabBackend::Reset() {
  connection_.Close();
  queues_.clear();
  for (Mapping& m : memory_) ::munmap(m.base, m.length);
  memory_.clear();
  if (log_) ::munmap(log_, log_size_);
  if (inflight_) ::munmap(inflight_, inflight_description_.mmap_size);
  log_ = inflight_ = nullptr;
  features_ = protocol_ = 0;
}

absl::Status LabBackend::Run(int stop_fd) {
  for (;;) {
    std::vector<pollfd> p = {{stop_fd, POLLIN, 0},
                             {connection_.valid() ? connection_.fd() : listener_.fd(), POLLIN, 0}};
    std::vector<uint32_t> kicked;
    Clock::time_point next = Clock::time_point::max();
    for (auto& [index, q] : queues_) {
      if (q.running && q.kick) {
        p.push_back({q.kick.get(), POLLIN, 0});
        kicked.push_back(index);
      }
      for (const auto& r : q.flight) next = std::min(next, r.due);
    }
    timespec wait{};
    if (next != Clock::time_point::max()) {
      Duration left = Deadline::At(next).Left();
      wait = {static_cast<time_t>(left.count() / 1000000000), static_cast<long>(left.count() % 1000000000)};
    }
    if (::ppoll(p.data(), p.size(), next == Clock::time_point::max() ? nullptr : &wait, nullptr) < 0 &&
        errno != EINTR) {
      return ErrnoError(errno, "poll");
    }
    if (p[0].revents) return absl::OkStatus();
    for (auto& [index, q] : queues_) CompleteDue(index, Clock::now());
    for (size_t i = 0; i < kicked.size(); ++i) {
      if (!p[i + 2].revents) continue;
      uint64_t count;
      if (::read(p[i + 2].fd, &count, sizeof count) >= 0 || errno == EAGAIN) Fetch(kicked[i]);
    }
    if (!p[1].revents) continue;
    if (!connection_.valid()) {
      ASSIGN_OR_RETURN(UniqueFd fd, listener_.Accept());
      if (fd) connection_ = vhost::Connection(std::move(fd));
      continue;
    }
    auto message = connection_.Receive(/*reply=*/false, Deadline::After(std::chrono::seconds(1)));
    if (!message.ok() || !Handle(*message).ok()) Reset();
  }
}

uint8_t* LabBackend::AtUser(uint64_t user_addr) {
  for (const Mapping& m : memory_) {
    if (user_addr >= m.region.user_addr && user_addr - m.region.user_addr < m.region.size) {
      return m.base + m.region.mmap_offset + (user_addr - m.region.user_addr);
    }
  }
  return nullptr;
}

uint8_t* LabBackend::AtGpa(uint64_t gpa, uint64_t size) {
  for (const Mapping& m : memory_) {
    if (gpa >= m.region.gpa && gpa - m.region.gpa < m.region.size &&
        size <= m.region.size - (gpa - m.region.gpa)) {
      return m.base + m.region.mmap_offset + (gpa - m.region.gpa);
    }
  }
  return nullptr;
}

absl::Status LabBackend::MapRegion(const vhost::MemRegion& region, int fd) {
  const uint64_t length = region.mmap_offset + region.size;
  void* map = ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (map == MAP_FAILED) return ErrnoError(errno, "mapping guest memory");
  memory_.push_back({region, static_cast<uint8_t*>(map), length});
  return absl::OkStatus();
}

virtio::InflightSplitHeader* LabBackend::Inflight(uint32_t index) {
  if (!inflight_ || index >= inflight_description_.num_queues) return nullptr;
  return reinterpret_cast<virtio::InflightSplitHeader*>(inflight_ +
                                                        Stride(inflight_description_.queue_size) * index);
}

void LabBackend::LogWrite(uint64_t gpa, uint64_t size) {
  if (!log_ || !(features_ & virtio::kVhostFLogAll) || size == 0) return;
  for (uint64_t page = gpa / 4096; page <= (gpa + size - 1) / 4096; ++page) {
    if (page / 8 < log_size_)
      __atomic_or_fetch(&log_[page / 8], static_cast<uint8_t>(1u << page % 8), __ATOMIC_RELEASE);
  }
}

void LabBackend::Fetch(uint32_t index) {
  Queue& q = queues_[index];
  auto* avail = reinterpret_cast<uint16_t*>(AtUser(q.addr->avail));
  if (!q.running || !avail) return;
  while (q.last_avail != __atomic_load_n(&avail[1], __ATOMIC_ACQUIRE)) {
    const uint16_t head = avail[2 + q.last_avail % q.size];
    if (head >= q.size) return;
    if (auto* region = Inflight(index)) {
      auto* desc = reinterpret_cast<virtio::InflightSplitDesc*>(region + 1);
      desc[head].counter = q.counter++;
      __atomic_store_n(&desc[head].inflight, uint8_t{1}, __ATOMIC_RELEASE);
    }
    ++q.last_avail;
    ++fetched_;
    const uint32_t delay = options_.delay_us ? random_() % options_.delay_us : 0;
    q.flight.push_back({head, Clock::now() + std::chrono::microseconds(delay)});
    uint64_t one = 1;
    if (options_.tells_errors && q.err && ::write(q.err.get(), &one, sizeof one) < 0) return;
  }
  CompleteDue(index, Clock::now());
}

void LabBackend::CompleteDue(uint32_t index, Clock::time_point now) {
  Queue& q = queues_[index];
  std::stable_sort(q.flight.begin(), q.flight.end(),
                   [](const auto& a, const auto& b) { return a.due < b.due; });
  while (!q.flight.empty() && q.flight.front().due <= now) {
    auto request = q.flight.front();
    q.flight.erase(q.flight.begin());
    Complete(index, request);
  }
}

void LabBackend::Complete(uint32_t index, const IoRequest& request) {
  Queue& q = queues_[index];
  Execute(q, request.head);
  auto* region = Inflight(index);
  auto* desc = region ? reinterpret_cast<virtio::InflightSplitDesc*>(region + 1) : nullptr;
  if (region) {
    desc[request.head].next = region->last_batch_head;
    region->last_batch_head = request.head;
  }
  uint8_t* used = AtUser(q.addr->used);
  auto* idx = reinterpret_cast<uint16_t*>(used + 2);
  const uint16_t at = *idx;
  UsedElem elem{request.head, 0};
  std::memcpy(used + 4 + 8 * (at % q.size), &elem, sizeof elem);
  __atomic_store_n(idx, static_cast<uint16_t>(at + 1), __ATOMIC_RELEASE);
  if (q.addr->flags & vhost::kVringFLog) {
    LogWrite(q.addr->log_guest_addr, 4);
    LogWrite(q.addr->log_guest_addr + 4 + 8 * (at % q.size), 8);
  }
  if (region) {
    __atomic_store_n(&desc[request.head].inflight, uint8_t{0}, __ATOMIC_RELEASE);
    __atomic_store_n(&region->used_idx, static_cast<uint16_t>(at + 1), __ATOMIC_RELEASE);
  }
  uint64_t one = 1;
  if (q.call && ::write(q.call.get(), &one, sizeof one) < 0) return;
}

void LabBackend::Execute(Queue& q, uint16_t head) {
  auto* table = reinterpret_cast<Desc*>(AtUser(q.addr->desc));
  std::vector<Desc> chain;
  for (uint16_t at = head; chain.size() < q.size;) {
    chain.push_back(table[at]);
    if (!(table[at].flags & kNext)) break;
    at = table[at].next % q.size;
  }
  if (chain.size() < 2 || chain[0].len < sizeof(BlkHeader)) return;
  auto* header = reinterpret_cast<BlkHeader*>(AtGpa(chain[0].addr, sizeof(BlkHeader)));
  uint8_t* status = AtGpa(chain.back().addr, 1);
  if (!header || !status) return;
  uint8_t result = 0;
  off_t offset = static_cast<off_t>(header->sector * 512);
  for (size_t i = 1; i + 1 < chain.size(); ++i) {
    uint8_t* data = AtGpa(chain[i].addr, chain[i].len);
    const auto length = static_cast<ssize_t>(chain[i].len);
    bool ok = data != nullptr;
    if (ok && header->type == kIn) {
      ok = ::pread(image_.get(), data, chain[i].len, offset) == length;
      LogWrite(chain[i].addr, chain[i].len);
    } else if (ok && header->type == kOut) {
      ok = ::pwrite(image_.get(), data, chain[i].len, offset) == length;
    } else if (ok && header->type == kGetId && (chain[i].flags & kWrite)) {
      std::memset(data, 0, chain[i].len);
      LogWrite(chain[i].addr, chain[i].len);
    }
    if (!ok) result = 1;
    offset += length;
  }
  if (header->type != kIn && header->type != kOut && header->type != kFlush && header->type != kGetId)
    result = 2;
  *status = result;
  LogWrite(chain.back().addr, 1);
}

void LabBackend::Recover(uint32_t index) {
  Queue& q = queues_[index];
  auto* region = Inflight(index);
  if (!region) return;
  const uint8_t* used = AtUser(q.addr->used);
  uint16_t used_idx;
  std::memcpy(&used_idx, used + 2, sizeof used_idx);
  if (region->version == 0) {
    (void)virtio::InitInflightSplit(
        {reinterpret_cast<uint8_t*>(region), Stride(inflight_description_.queue_size)},
        inflight_description_.queue_size, used_idx);
  }
  auto set = virtio::ReadInflightSplit(
      {reinterpret_cast<uint8_t*>(region), Stride(inflight_description_.queue_size)}, q.size, used_idx);
  if (!set.ok()) return;
  const std::vector<uint16_t> heads = set->Ids();
  auto* desc = reinterpret_cast<virtio::InflightSplitDesc*>(region + 1);
  for (uint16_t i = 0; i < inflight_description_.queue_size; ++i) {
    if (std::find(heads.begin(), heads.end(), i) == heads.end()) desc[i].inflight = 0;
    q.counter = std::max(q.counter, desc[i].counter + 1);
  }
  region->used_idx = used_idx;
  q.last_avail = set->last_avail();
  for (uint16_t head : heads) q.flight.push_back({head, Clock::now()});
}

absl::Status LabBackend::Handle(vhost::WireMessage& m) {
  const auto id = m.header.request;
  const Request request = m.request();
  if (id == options_.silent_at) return absl::OkStatus();
  if (id == options_.garble_at) {
    uint8_t junk[3] = {1, 2, 3};
    return connection_.Send(id + 1, 0x5, junk, {}, Deadline::After(std::chrono::seconds(1)));
  }
  auto reply = [&](std::span<const uint8_t> payload, std::span<const int> fds = {}) {
    return connection_.Send(id, vhost::kReplyFlags, payload, fds, Deadline::After(std::chrono::seconds(1)));
  };
  auto reply_u64 = [&](uint64_t value) { return reply(vhost::Bytes(value)); };
  switch (request) {
    case Request::kGetFeatures:
      return reply_u64((virtio::kFVersion1 | virtio::Bit(9) | virtio::kVhostFLogAll |
                        virtio::kVhostUserFProtocolFeatures) &
                       ~options_.less_features);
    case Request::kGetProtocolFeatures:
      return reply_u64((pf::kMq | pf::kLogShmfd | pf::kReplyAck | pf::kConfig | pf::kConfigureMemSlots |
                        (options_.inflight ? pf::kInflightShmfd : 0) |
                        (options_.suspends ? pf::kSkipDrain : 0) |
                        (options_.suspends_by_bit_20 ? pf::kGetVringBaseInflight : 0)) &
                       ~options_.less_protocol);
    case Request::kGetQueueNum:
      return reply_u64(options_.queues);
    case Request::kGetMaxMemSlots:
      return reply_u64(32);
    case Request::kGetConfig: {
      auto header = m.As<vhost::ConfigHeader>();
      if (header.offset + header.size > kConfigSize) return reply({});
      uint8_t config[kConfigSize] = {};
      std::memcpy(config, &sectors_, sizeof sectors_);
      std::copy_n(config + header.offset, header.size, m.payload.begin() + sizeof header);
      return reply(m.payload);
    }
    case Request::kGetInflightFd: {
      inflight_description_ = m.As<vhost::InflightDescription>();
      inflight_description_.mmap_size =
          Stride(inflight_description_.queue_size) * inflight_description_.num_queues;
      UniqueFd fd(::memfd_create("inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING));
      if (::ftruncate(fd.get(), static_cast<off_t>(inflight_description_.mmap_size)) != 0)
        return ErrnoError(errno, "");
      int raw = fd.get();
      return reply(vhost::Bytes(inflight_description_), {&raw, 1});
    }
    case Request::kGetVringBaseSkipDrain:
    case Request::kGetVringBase: {
      auto state = m.As<vhost::VringState>();
      Queue& q = queues_[state.index];
      if (request == Request::kGetVringBaseSkipDrain || (protocol_ & pf::kGetVringBaseInflight)) {
        q.flight.clear();
        q.running = false;
        state.num = static_cast<uint16_t>(q.last_avail + options_.base_offset);
        return reply(vhost::Bytes(state));
      }
      if (options_.drains) {
        while (!q.flight.empty()) {
          auto r = q.flight.front();
          q.flight.erase(q.flight.begin());
          Complete(state.index, r);
        }
      }
      q.running = false;
      state.num = q.last_avail;
      return reply(vhost::Bytes(state));
    }
    case Request::kSetLogBase: {
      auto log = m.As<vhost::LogDescription>();
      if (log_) ::munmap(log_, log_size_);
      void* map = ::mmap(nullptr, log.mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED, m.fds[0].get(), 0);
      if (map == MAP_FAILED) return ErrnoError(errno, "log");
      log_ = static_cast<uint8_t*>(map);
      log_size_ = log.mmap_size;
      return reply({});  // as DPDK does
    }
    case Request::kSetFeatures:
      features_ = m.As<uint64_t>();
      break;
    case Request::kSetProtocolFeatures:
      protocol_ = m.As<uint64_t>();
      break;
    case Request::kSetMemTable: {
      for (Mapping& old : memory_) ::munmap(old.base, old.length);
      memory_.clear();
      auto header = m.As<vhost::MemTableHeader>();
      for (uint32_t i = 0; i < header.nregions; ++i) {
        vhost::MemRegion region;
        std::memcpy(&region, m.payload.data() + sizeof header + i * sizeof region, sizeof region);
        RETURN_IF_ERROR(MapRegion(region, m.fds[i].get()));
      }
      break;
    }
    case Request::kAddMemReg:
      RETURN_IF_ERROR(MapRegion(m.As<vhost::MemReg>().region, m.fds[0].get()));
      break;
    case Request::kRemMemReg:
      std::erase_if(memory_, [&](const Mapping& mapping) {
        if (mapping.region.gpa != m.As<vhost::MemReg>().region.gpa) return false;
        ::munmap(mapping.base, mapping.length);
        return true;
      });
      break;
    case Request::kSetInflightFd: {
      inflight_description_ = m.As<vhost::InflightDescription>();
      void* map = ::mmap(nullptr, inflight_description_.mmap_size, PROT_READ | PROT_WRITE, MAP_SHARED,
                         m.fds[0].get(), 0);
      if (map == MAP_FAILED) return ErrnoError(errno, "in-flight region");
      inflight_ = static_cast<uint8_t*>(map);
      break;
    }
    case Request::kSetVringNum:
      queues_[m.As<vhost::VringState>().index].size = static_cast<uint16_t>(m.As<vhost::VringState>().num);
      break;
    case Request::kSetVringBase:
      queues_[m.As<vhost::VringState>().index].last_avail =
          static_cast<uint16_t>(m.As<vhost::VringState>().num);
      break;
    case Request::kSetVringAddr:
      queues_[m.As<vhost::VringAddr>().index].addr = m.As<vhost::VringAddr>();
      break;
    case Request::kSetVringErr: {
      Queue& q = queues_[static_cast<uint32_t>(m.As<uint64_t>() & vhost::kVringIndexMask)];
      q.err = m.fds.empty() ? UniqueFd() : std::move(m.fds[0]);
      break;
    }
    case Request::kSetVringCall: {
      Queue& q = queues_[static_cast<uint32_t>(m.As<uint64_t>() & vhost::kVringIndexMask)];
      q.call = m.fds.empty() ? UniqueFd() : std::move(m.fds[0]);
      break;
    }
    case Request::kSetVringKick: {
      const auto index = static_cast<uint32_t>(m.As<uint64_t>() & vhost::kVringIndexMask);
      Queue& q = queues_[index];
      q.kick = m.fds.empty() ? UniqueFd() : std::move(m.fds[0]);
      if (q.kick) ::fcntl(q.kick.get(), F_SETFL, ::fcntl(q.kick.get(), F_GETFL) | O_NONBLOCK);
      if (!q.addr || q.size == 0 || !AtUser(q.addr->desc) || !AtUser(q.addr->used))
        return absl::InvalidArgumentError("ring");
      if (!q.running && q.flight.empty()) Recover(index);
      q.running = true;
      Fetch(index);
      break;
    }
    default:
      break;
  }
  return m.need_reply() ? reply_u64(0) : absl::OkStatus();
}

}  // namespace baton::lab
