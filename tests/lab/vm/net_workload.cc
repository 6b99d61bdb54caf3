#include "tests/lab/vm/net_workload.h"

#include <algorithm>
#include <climits>
#include <cstddef>

namespace baton::lab {
namespace {

constexpr uint64_t kNetMagic = 0x3130544e424e5442;
constexpr uint32_t kMaxPeers = 16, kMaxFlows = 128;
// virtio_net_hdr of a device with VERSION_1 (VIRTIO 1.x, 5.1.6).
constexpr uint32_t kVirtioHeader = 12;
constexpr uint64_t kBuffer = 2048;
// "Local experimental" of IEEE 802.
constexpr uint16_t kEtherType = 0xb588;  // 0x88b5 in network order
constexpr int64_t kPacketMillion = 1000000, kPacketPeriodUs = 1000;
constexpr uint8_t kControlMq = 4, kControlMqPairs = 0;
constexpr uint8_t kNoAck = 0xee;

struct __attribute__((packed)) Packet {
  uint8_t destination[6], source[6];
  uint16_t type;
  uint16_t bytes;  // of the whole packet
  uint64_t magic, run, sequence;
  uint32_t flow;
  uint64_t checksum;  // of everything before, and of what follows it
};

uint64_t PacketChecksum(const Packet& packet, uint32_t bytes) {
  const auto* at = reinterpret_cast<const uint8_t*>(&packet);
  return XXH3_64bits(at, offsetof(Packet, checksum)) * 31 +
         XXH3_64bits(at + sizeof packet, bytes - sizeof packet);
}

constexpr uint64_t ToPage(uint64_t bytes) { return (bytes + 4095) & ~uint64_t{4095}; }

}  // namespace

// What came from one flow of another guest: the highest number, and which of the 64 up to it were seen.
struct NetWorkload::Peer {
  uint8_t mac[6];
  uint16_t used;
  struct Flow {
    uint64_t highest, seen;
  } flows[kMaxFlows];
};

struct NetWorkload::Slot {
  uint32_t busy;
  uint32_t padding;
  int64_t since_us;
};

struct NetWorkload::Header {
  uint64_t magic, run, pairs, buffers;
  uint64_t silent, commanded;  // pairs that the device was told of
  uint64_t next[kMaxFlows];    // sequence number of each flow's next packet
  Counters counters;
  Peer peers[kMaxPeers];
};

// Header, slots of every queue (one more for the control queue), then the buffers.
uint64_t NetWorkload::Bytes(uint32_t pairs, uint32_t buffers) {
  const uint64_t queues = 2 * uint64_t{pairs} + 1;
  return ToPage(sizeof(Header) + queues * buffers * sizeof(Slot)) + queues * buffers * kBuffer;
}

NetWorkload::NetWorkload(const Ram& ram, uint64_t gpa, Setup setup, QueuePort& port, OnError on_error)
    : ram_(ram), gpa_(gpa), setup_(setup), port_(port), on_error_(std::move(on_error)) {}

NetWorkload::Slot& NetWorkload::slot(uint32_t queue, uint32_t index) const {
  return ram_.At<Slot>(gpa_ + sizeof(Header))[queue * setup_.buffers + index];
}

uint64_t NetWorkload::buffer(uint32_t queue, uint32_t index) const {
  const uint64_t queues = 2 * uint64_t{setup_.pairs} + 1;
  return gpa_ + ToPage(sizeof(Header) + queues * setup_.buffers * sizeof(Slot)) +
         (queue * setup_.buffers + index) * kBuffer;
}

const NetWorkload::Counters& NetWorkload::counters() const { return header().counters; }

void NetWorkload::Boot(uint64_t run) {
  Header& h = header();
  h = {};
  h.magic = kNetMagic;
  h.run = run;
  h.pairs = setup_.pairs;
  h.buffers = setup_.buffers;
  for (uint64_t& next : h.next) next = 1;
  for (uint32_t queue = 0; queue < 2 * setup_.pairs + 1; ++queue) {
    for (uint32_t i = 0; i < setup_.buffers; ++i) slot(queue, i) = {};
  }
}

absl::Status NetWorkload::Check() const {
  const Header& h = header();
  if (h.magic == kNetMagic && h.pairs == setup_.pairs && h.buffers == setup_.buffers) return absl::OkStatus();
  return Error(absl::StatusCode::kInvalidArgument, "guest memory at {:#x} does not hold the state of NIC {}",
               gpa_, setup_.nic);
}

void NetWorkload::Report(const std::string& what) {
  ++header().counters.errors;
  on_error_(fmt::format("nic {}: {}", setup_.nic, what));
}

void NetWorkload::Refill(uint32_t queue) {
  for (uint32_t i = 0; i < setup_.buffers; ++i) {
    if (slot(queue, i).busy) continue;
    const Piece piece{buffer(queue, i), kBuffer, true};
    if (!port_.Submit(queue, i, {&piece, 1})) return;
    slot(queue, i).busy = 1;
  }
}

bool NetWorkload::Send(uint32_t pair, int64_t now_us) {
  const uint32_t queue = 2 * pair + 1;
  for (uint32_t i = 0; i < setup_.buffers; ++i) {
    if (slot(queue, i).busy) continue;
    const uint64_t gpa = buffer(queue, i);
    const uint32_t bytes = std::max<uint32_t>(setup_.options.packet_bytes, sizeof(Packet));
    std::memset(ram_.At<uint8_t>(gpa), 0, kVirtioHeader);
    Packet& packet = *ram_.At<Packet>(gpa + kVirtioHeader);
    std::memset(packet.destination, 0xff, sizeof packet.destination);
    std::copy(setup_.mac.begin(), setup_.mac.end(), packet.source);
    packet.type = kEtherType;
    packet.bytes = static_cast<uint16_t>(bytes);
    packet.magic = kNetMagic;
    packet.run = header().run;
    packet.flow = pair;
    packet.sequence = header().next[pair];
    uint8_t* filler = ram_.At<uint8_t>(gpa + kVirtioHeader + sizeof(Packet));
    for (uint32_t at = 0; at < bytes - sizeof(Packet); ++at)
      filler[at] = static_cast<uint8_t>(packet.sequence * 7 + at);
    packet.checksum = PacketChecksum(packet, bytes);
    const Piece piece{gpa, kVirtioHeader + bytes, false};
    if (!port_.Submit(queue, i, {&piece, 1})) return false;
    slot(queue, i) = {1, 0, now_us};
    ++header().next[pair];
    ++header().counters.sent;
    return true;
  }
  return false;
}

// VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET: receive and transmit on all pairs.
void NetWorkload::Command(int64_t now_us) {
  const uint32_t queue = 2 * setup_.pairs;
  if (!setup_.control || slot(queue, 0).busy || header().commanded == setup_.pairs) return;
  const uint64_t gpa = buffer(queue, 0);
  uint8_t* at = ram_.At<uint8_t>(gpa);
  at[0] = kControlMq;
  at[1] = kControlMqPairs;
  const uint16_t pairs = static_cast<uint16_t>(setup_.pairs);
  std::memcpy(at + 2, &pairs, sizeof pairs);
  at[64] = kNoAck;
  const Piece pieces[3] = {{gpa, 2, false}, {gpa + 2, 2, false}, {gpa + 64, 1, true}};
  if (port_.Submit(queue, 0, pieces)) slot(queue, 0) = {1, 0, now_us};
}

void NetWorkload::Issue(int64_t now_us) {
  for (uint32_t pair = 0; pair < setup_.pairs; ++pair) Refill(2 * pair);
  Command(now_us);
  next_due_ = INT64_MAX;
  const uint64_t rate = setup_.options.packets;
  if (rate != 0 && header().silent == 0) {
    if (start_us_ == 0) start_us_ = now_us;
    uint64_t due = static_cast<uint64_t>(now_us - start_us_) * rate / kPacketMillion;
    if (due > done_ + rate / 10 + 1) {
      start_us_ = now_us;
      done_ = 0;
      due = 1;
    }
    for (; done_ < due; ++done_) {
      for (uint32_t pair = 0; pair < setup_.pairs; ++pair) (void)Send(pair, now_us);
    }
    next_due_ = now_us + std::max<int64_t>(kPacketPeriodUs, kPacketMillion / static_cast<int64_t>(rate));
  }
  for (uint32_t queue = 0; queue < 2 * setup_.pairs + (setup_.control ? 1 : 0); ++queue) port_.Kick(queue);
}

void NetWorkload::Resumed(int64_t now_us) {
  start_us_ = now_us;
  done_ = 0;
  next_due_ = now_us;
  for (uint32_t pair = 0; pair < setup_.pairs; ++pair) {
    for (uint32_t i = 0; i < setup_.buffers; ++i) slot(2 * pair + 1, i).since_us = now_us;
  }
  if (setup_.control) slot(2 * setup_.pairs, 0).since_us = now_us;
}

void NetWorkload::Complete(uint32_t queue, uint32_t tag, uint32_t written, int64_t) {
  if (queue > 2 * setup_.pairs || tag >= setup_.buffers || slot(queue, tag).busy != 1) {
    return Report(
        fmt::format("queue {}: a completion of buffer {}, which is not under way (repeated)", queue, tag));
  }
  slot(queue, tag).busy = 0;
  const uint64_t gpa = buffer(queue, tag);
  if (queue == 2 * setup_.pairs) {
    if (const uint8_t ack = *ram_.At<uint8_t>(gpa + 64); ack != 0)
      return Report(fmt::format("the device answers VQ_PAIRS_SET with {:#x}", ack));
    header().commanded = setup_.pairs;
  } else if (queue % 2 == 1) {
    ++header().counters.completed;
  } else {
    Receive(gpa, written);
  }
}

void NetWorkload::Receive(uint64_t gpa, uint32_t written) {
  if (written < kVirtioHeader || written > kBuffer)
    return Report(fmt::format("a received packet of {} bytes", written));
  const uint32_t bytes = written - kVirtioHeader;
  const Packet& packet = *ram_.At<Packet>(gpa + kVirtioHeader);
  // Others may be on the wire: announcements, the host's own traffic.
  if (bytes < sizeof(Packet) || packet.type != kEtherType) return;
  if (packet.magic != kNetMagic || packet.bytes != bytes || packet.flow >= kMaxFlows ||
      packet.checksum != PacketChecksum(packet, bytes)) {
    return Report(fmt::format("a corrupt packet of {} bytes", bytes));
  }
  std::array<uint8_t, 6> source;
  std::copy_n(packet.source, 6, source.begin());
  if (source == setup_.mac) return Report("a packet of its own came back");
  Account(source, packet.flow, packet.sequence);
}

void NetWorkload::Account(const std::array<uint8_t, 6>& mac, uint32_t flow, uint64_t sequence) {
  Counters& counters = header().counters;
  ++counters.received;
  for (Peer& peer : header().peers) {
    if (peer.used && !std::equal(mac.begin(), mac.end(), peer.mac)) continue;
    if (!peer.used) std::copy(mac.begin(), mac.end(), peer.mac);
    peer.used = 1;
    Peer::Flow& f = peer.flows[flow];
    if (f.highest == 0) {
      // The first one heard; what was sent before is nobody's loss.
      f = {sequence, 1};
    } else if (sequence > f.highest) {
      const uint64_t step = sequence - f.highest;
      counters.missing += step - 1;
      f.seen = step >= 64 ? 1 : f.seen << step | 1;
      f.highest = sequence;
    } else if (const uint64_t back = f.highest - sequence; back >= 64 || (f.seen >> back & 1) != 0) {
      ++counters.duplicates;
    } else {
      f.seen |= uint64_t{1} << back;
      ++counters.reordered;
      if (counters.missing > 0) --counters.missing;
    }
    return;
  }
}

void NetWorkload::Silence(bool silent) {
  header().silent = silent;
  next_due_ = 0;
}

bool NetWorkload::Quiet() const { return header().silent != 0 && outstanding() == 0; }

uint32_t NetWorkload::outstanding() const {
  uint32_t count = setup_.control && slot(2 * setup_.pairs, 0).busy == 1;
  for (uint32_t pair = 0; pair < setup_.pairs; ++pair) {
    for (uint32_t i = 0; i < setup_.buffers; ++i) count += slot(2 * pair + 1, i).busy == 1;
  }
  return count;
}

void NetWorkload::FindLost(int64_t now_us, int64_t limit_us) {
  for (uint32_t queue = 1; queue <= 2 * setup_.pairs; ++queue) {
    if (queue % 2 == 0 && queue < 2 * setup_.pairs) continue;  // what waits there waits for others
    for (uint32_t i = 0; i < setup_.buffers; ++i) {
      Slot& s = slot(queue, i);
      if (s.busy != 1 || now_us - s.since_us <= limit_us) continue;
      Report(fmt::format("queue {}: buffer {} was not given back in {} ms", queue, i,
                         (now_us - s.since_us) / 1000));
      s.busy = 2;  // said once, and not used again
    }
  }
}

uint64_t NetWorkload::Digest() const {
  const uint64_t queues = 2 * uint64_t{setup_.pairs} + 1;
  return XXH3_64bits(&header(), sizeof(Header) + queues * setup_.buffers * sizeof(Slot));
}

}  // namespace baton::lab
