// What a request asks for, and doing it.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "tests/lab/device/blk_model.h"
#include "tests/lab/device/blk_wire.h"

namespace baton::lab {

using namespace blk;  // NOLINT(google-build-using-namespace): the wire format of this model

void BlkModel::PointStatus(Work& w) {
  const auto& writable = w.io->writable;
  for (auto it = writable.rbegin(); it != writable.rend(); ++it) {
    if (it->len == 0) continue;
    w.status_at = it->data + it->len - 1;
    return;
  }
}

// Fills in what the request is; false if it has ended with w.status. What the driver may change meanwhile is
// copied here, once.
bool BlkModel::Parse(Work& w) {
  const IoRequest& io = *w.io;
  RequestHeader header;
  w.status = kIoErr;
  w.written = io.writable_bytes > 0 ? 1 : 0;
  if (!w.status_at || !CopyOut(io, 0, &header, sizeof header)) return false;
  w.type = header.type;
  w.sector = header.sector;
  const uint64_t out = io.readable_bytes - sizeof header, in = io.writable_bytes - 1;
  const uint64_t sectors = storage_->size() / kSector;
  auto fits = [&](uint64_t sector, uint64_t bytes) {
    return bytes % kSector == 0 && sector <= sectors && bytes / kSector <= sectors - sector;
  };
  switch (header.type) {
    case kIn:
    case kOut:
      w.length = header.type == kIn ? in : out;
      if (!fits(header.sector, w.length)) return false;
      w.offset = header.sector * kSector;
      if (header.type == kOut && journal_) {
        (void)CopyOut(io, sizeof header + options_.journal_tag_offset, &w.tag, sizeof w.tag);
      }
      return true;
    case kFlush:
      return true;
    case kGetId:
      w.length = std::min<uint64_t>(in, kIdBytes);
      return true;
    case kDiscard:
    case kWriteZeroes: {
      const uint64_t segments = out / sizeof(DiscardSegment);
      if (segments == 0 || segments > kMaxDiscardSegments || out % sizeof(DiscardSegment)) return false;
      uint64_t first = UINT64_MAX, end = 0;
      for (uint64_t i = 0; i < segments; ++i) {
        DiscardSegment s;
        if (!CopyOut(io, sizeof header + i * sizeof s, &s, sizeof s)) return false;
        if (s.num > kMaxDiscardSectors || !fits(s.sector, uint64_t{s.num} * kSector)) return false;
        if (s.flags & ~kUnmap || (header.type == kDiscard && s.flags)) {
          w.status = kUnsupp;
          return false;
        }
        first = std::min(first, s.sector);
        end = std::max(end, s.sector + s.num);
      }
      w.offset = first * kSector;
      w.length = (end - first) * kSector;
      return true;
    }
    case kZoneAppend:
    case kZoneReport:
    case kZoneReset:
      if (!zones_) break;
      w.length = header.type == kZoneAppend ? out : 0;
      w.offset = header.sector * kSector;
      if (!fits(header.sector, w.length)) return false;
      if (header.sector / options_.zone_sectors >= zones_.size() / sizeof(uint64_t) ||
          (header.type == kZoneAppend && in < sizeof(uint64_t)) ||
          (header.type != kZoneReport && header.sector % options_.zone_sectors)) {
        w.status = kZoneInvalidCmd;
        return false;
      }
      // Appends to one zone are not ordered by anybody; their extent is where they may land.
      return true;
    default:
      break;
  }
  w.status = kUnsupp;
  return false;
}

void BlkModel::Begin(Work& w) {
  if (w.refused) {
    w.state = State::kRunning;
    Ended(w);
    return;
  }
  if (options_.no_space && TakesSpace(w.type)) {
    Hold(w);
    return;
  }
  host_->CrashPoint("before_io");
  w.state = State::kRunning;
  StartOperation(w);
}

void BlkModel::GatherIo(Work& w, bool write) {
  scratch_.clear();
  uint64_t skip = write ? sizeof(RequestHeader) : 0, left = w.length;
  for (const IoSegment& s : write ? w.io->readable : w.io->writable) {
    if (skip >= s.len) {
      skip -= s.len;
      continue;
    }
    const uint64_t part = std::min<uint64_t>(s.len - skip, left);
    if (part > 0) scratch_.push_back({s.data + skip, part});
    skip = 0;
    left -= part;
  }
}

void BlkModel::StartOperation(Work& w) {
  const uint64_t tag = uint64_t{w.io->queue} << 32 | w.io->slot;
  switch (w.type) {
    case kIn:
    case kOut:
      if (w.length == 0) break;
      GatherIo(w, w.type == kOut);
      Record(JournalEvent::kBegin, w);
      w.operation = storage_->Start(w.type == kIn    ? Storage::Kind::kRead
                                    : WriteThrough() ? Storage::Kind::kWriteThrough
                                                     : Storage::Kind::kWrite,
                                    scratch_, w.offset, w.length, tag);
      return;
    case kFlush:
      w.operation = storage_->Start(Storage::Kind::kFlush, {}, 0, 0, tag);
      return;
    case kGetId: {
      char id[kIdBytes] = {};
      std::memcpy(id, options_.serial.data(), std::min(options_.serial.size(), kIdBytes));
      w.written = static_cast<uint32_t>(CopyIn(*w.io, 0, id, w.length) + 1);
      break;
    }
    case kDiscard:
    case kWriteZeroes:
      if (w.segment == 0) Record(JournalEvent::kBegin, w);
      if (StartSegment(w)) return;
      break;
    case kZoneAppend:
      StartZoneAppend(w);
      return;
    case kZoneReport:
      AppendToReport(w);
      break;
    case kZoneReset:
      __atomic_store_n(reinterpret_cast<uint64_t*>(zones_.data()) + w.sector / options_.zone_sectors, 0,
                       __ATOMIC_RELEASE);
      break;
    default:
      break;
  }
  w.status = kOk;
  Executed(w);
  Ended(w);
}

// Starts the next segment of a discard or zeroing; false when there is none left.
bool BlkModel::StartSegment(Work& w) {
  DiscardSegment s;
  for (;; ++w.segment) {
    if (!CopyOut(*w.io, sizeof(RequestHeader) + uint64_t{w.segment} * sizeof s, &s, sizeof s)) return false;
    // Checked again: the driver may have changed it since.
    const uint64_t begin = s.sector * kSector, bytes = uint64_t{s.num} * kSector;
    if (s.sector > storage_->size() / kSector || begin < w.offset || begin + bytes > w.offset + w.length) {
      return false;
    }
    if (bytes == 0) continue;
    const bool keep = w.type == kWriteZeroes && !(s.flags & kUnmap) && !w.punch;
    w.operation = storage_->Start(w.type == kDiscard ? Storage::Kind::kDiscard
                                  : keep             ? Storage::Kind::kZero
                                                     : Storage::Kind::kZeroUnmap,
                                  {}, begin, bytes, uint64_t{w.io->queue} << 32 | w.io->slot);
    ++w.segment;
    return true;
  }
}

void BlkModel::StartZoneAppend(Work& w) {
  auto* pointer = reinterpret_cast<uint64_t*>(zones_.data()) + w.sector / options_.zone_sectors;
  const uint64_t at = __atomic_fetch_add(pointer, w.length / kSector, __ATOMIC_ACQ_REL);
  if (w.length == 0 || at > options_.zone_sectors || w.length / kSector > options_.zone_sectors - at) {
    __atomic_fetch_sub(pointer, w.length / kSector, __ATOMIC_ACQ_REL);
    w.status = kZoneInvalidCmd;
    Ended(w);
    return;
  }
  w.sector += at;
  w.offset = w.sector * kSector;
  GatherIo(w, true);
  Record(JournalEvent::kBegin, w);
  w.operation = storage_->Start(Storage::Kind::kWrite, scratch_, w.offset, w.length,
                                uint64_t{w.io->queue} << 32 | w.io->slot);
}

void BlkModel::AppendToReport(Work& w) {
  const uint64_t zones = zones_.size() / sizeof(uint64_t), first = w.sector / options_.zone_sectors;
  const uint64_t room = w.io->writable_bytes - 1;
  uint64_t offset = sizeof(ZoneReportHeader);
  ZoneReportHeader header{};
  for (uint64_t zone = first; zone < zones && offset + sizeof(ZoneDescriptor) <= room; ++zone) {
    ZoneDescriptor d{};
    d.capacity = options_.zone_sectors;
    d.start = zone * options_.zone_sectors;
    const uint64_t pointer =
        __atomic_load_n(reinterpret_cast<uint64_t*>(zones_.data()) + zone, __ATOMIC_ACQUIRE);
    d.write_pointer = d.start + pointer;
    d.type = 3;                                                              // sequential write preferred
    d.state = pointer == 0 ? 1 : pointer >= options_.zone_sectors ? 14 : 2;  // empty, full, implicitly open
    offset += CopyIn(*w.io, offset, &d, sizeof d);
    ++header.zones;
  }
  if (room >= sizeof header) CopyIn(*w.io, 0, &header, sizeof header);
  w.written = static_cast<uint32_t>(std::min<uint64_t>(room + 1, UINT32_MAX));
}

void BlkModel::OperationEnded(Work& w, int result) {
  host_->CrashPoint("after_io");
  if (result == -ECANCELED && w.abandon) {
    Abandon(w);
    return;
  }
  if (result == -ENOSPC && TakesSpace(w.type) && IsIdempotent(w.type) && !w.abandon) {
    Hold(w);
    return;
  }
  const bool segments = w.type == kDiscard || w.type == kWriteZeroes;
  if (result == -EOPNOTSUPP && segments && !w.punch && !w.abandon) {
    // tmpfs has no ZERO_RANGE; a hole reads as zeroes, too.
    w.punch = true;
    --w.segment;
    if (StartSegment(w)) return;
  }
  if (result == 0 && segments && !w.abandon) {
    if (StartSegment(w)) return;
  }
  w.status = result == 0 ? kOk : result == -EOPNOTSUPP ? kUnsupp : kIoErr;
  if (w.type == kIn && result == 0) w.written = static_cast<uint32_t>(w.length + 1);
  if (w.type == kZoneAppend && result == 0) {
    // virtio_blk_zone_append's place: right before the status.
    CopyIn(*w.io, w.io->writable_bytes - 1 - sizeof w.sector, &w.sector, sizeof w.sector);
    w.written = static_cast<uint32_t>(w.io->writable_bytes);
  }
  // A discard that is given up may have segments left.
  if (result == 0 && !(segments && w.abandon)) Executed(w);
  if (w.abandon && IsIdempotent(w.type)) {
    Abandon(w);
    return;
  }
  Ended(w);
}

// What the request was to do has been done.
void BlkModel::Executed(Work& w) {
  w.executed = true;
  ++*executed_ever_;
  Record(JournalEvent::kDone, w);
}

}  // namespace baton::lab
