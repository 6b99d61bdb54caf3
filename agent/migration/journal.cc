#include "agent/migration/journal.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "common/log.h"

namespace baton::migration {
namespace {

constexpr char kMagic[8] = {'B', 'A', 'T', 'O', 'N', 'J', 'N', 'L'};
constexpr uint32_t kVersion = 1;
constexpr size_t kSlot = Journal::kSlotSize;

// Slot 0: magic, version. Integers are little endian.
constexpr size_t kHeaderChecksumAt = 504;
// Slots 1..: checksum of the rest of the slot, position, length, kind, then the payload.
constexpr size_t kChecksumAt = 0;
constexpr size_t kPositionAt = 8;
constexpr size_t kLengthAt = 16;
constexpr size_t kKindAt = 20;
constexpr size_t kPayloadAt = 24;
constexpr size_t kFixedPayload = 16;  // epoch, time
static_assert(kPayloadAt + kFixedPayload + Journal::kMaxMigrationId <= kSlot);

template <typename T>
void Put(std::string& slot, size_t at, T value) {
  for (size_t i = 0; i < sizeof(T); ++i) slot[at + i] = static_cast<char>(value >> (8 * i));
}
template <typename T>
T Get(const char* slot, size_t at) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i)
    value |= static_cast<T>(static_cast<uint8_t>(slot[at + i])) << (8 * i);
  return value;
}

std::string HeaderSlot() {
  std::string slot(kSlot, '\0');
  std::memcpy(slot.data(), kMagic, sizeof kMagic);
  Put<uint32_t>(slot, 8, kVersion);
  Put<uint64_t>(slot, kHeaderChecksumAt, XXH3_64bits(slot.data(), kHeaderChecksumAt));
  return slot;
}

std::string RecordSlot(const JournalRecord& record, uint64_t position) {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  std::string slot(kSlot, '\0');
  Put<uint64_t>(slot, kPositionAt, position);
  Put<uint32_t>(slot, kLengthAt, static_cast<uint32_t>(kFixedPayload + record.migration.size()));
  Put<uint8_t>(slot, kKindAt, static_cast<uint8_t>(record.kind));
  Put<uint64_t>(slot, kPayloadAt, record.epoch);
  Put<uint64_t>(slot, kPayloadAt + 8, static_cast<uint64_t>(now.tv_sec) * 1000000000u + now.tv_nsec);
  std::copy(record.migration.begin(), record.migration.end(), slot.begin() + kPayloadAt + kFixedPayload);
  Put<uint64_t>(slot, kChecksumAt, XXH3_64bits(slot.data() + 8, kSlot - 8));
  return slot;
}

absl::Status WriteFailed(int error, const std::string& path, const char* what) {
  absl::Status status =
      WithReason(ErrnoError(error, fmt::format("journal {}: {}", path, what)), v1::STATE_WRITE_FAILED);
  if (error == ENOSPC || error == EDQUOT)
    status = Annotate(status, "the disk under the state directory is full");
  return status;
}

absl::Status Corrupt(const std::string& path, uint64_t slot, const char* why) {
  return Error(
      v1::STATE_MISMATCH, absl::StatusCode::kDataLoss,
      "journal {} is corrupt in slot {} ({}): this side's part in past handovers cannot be known; settle the "
      "VM with 'batonctl migration resolve' or restore the file",
      path, slot, why);
}

struct Parsed {
  std::vector<JournalRecord> records;
  uint64_t good_bytes = 0;  // header and whole records; 0 if not even the header is there
};

bool AllZero(const char* data, size_t size) {
  return std::all_of(data, data + size, [](char c) { return c == 0; });
}

absl::StatusOr<Parsed> Parse(const std::string& path, const std::string& bytes) {
  Parsed out;
  // A crash while the file was made leaves no header or a part of one, and nothing behind it.
  if (bytes.size() < kSlot) return out;
  if (AllZero(bytes.data(), bytes.size())) return out;
  if (std::memcmp(bytes.data(), kMagic, sizeof kMagic) != 0) return Corrupt(path, 0, "no journal header");
  if (Get<uint64_t>(bytes.data(), kHeaderChecksumAt) != XXH3_64bits(bytes.data(), kHeaderChecksumAt))
    return Corrupt(path, 0, "the header's checksum does not match");
  if (uint32_t version = Get<uint32_t>(bytes.data(), 8); version != kVersion)
    return Error(absl::StatusCode::kFailedPrecondition,
                 "journal {} has format version {}; this program reads {}", path, version, kVersion);
  out.good_bytes = kSlot;
  for (uint64_t at = kSlot; at + kSlot <= bytes.size(); at += kSlot) {
    const char* slot = bytes.data() + at;
    const uint64_t index = at / kSlot;
    if (AllZero(slot, kSlot)) {
      if (!AllZero(slot, bytes.size() - at)) return Corrupt(path, index, "an empty slot before records");
      return out;
    }
    if (Get<uint64_t>(slot, kChecksumAt) != XXH3_64bits(slot + 8, kSlot - 8))
      return Corrupt(path, index, "the checksum does not match");
    const uint32_t length = Get<uint32_t>(slot, kLengthAt);
    const uint8_t kind = Get<uint8_t>(slot, kKindAt);
    if (Get<uint64_t>(slot, kPositionAt) != index)
      return Corrupt(path, index, "the record belongs elsewhere");
    if (length < kFixedPayload || length > kSlot - kPayloadAt)
      return Corrupt(path, index, "impossible length");
    if (kind == 0 || kind > static_cast<uint8_t>(JournalRecord::Kind::kFenced))
      return Corrupt(path, index, "a record of unknown kind");
    out.records.push_back({static_cast<JournalRecord::Kind>(kind), Get<uint64_t>(slot, kPayloadAt),
                           std::string(slot + kPayloadAt + kFixedPayload, length - kFixedPayload)});
    out.good_bytes = at + kSlot;
  }
  return out;
}

absl::StatusOr<std::string> ReadAll(int fd, const std::string& path) {
  std::string bytes;
  char buffer[16384];
  for (uint64_t at = 0;;) {
    const ssize_t got = ::pread(fd, buffer, sizeof buffer, static_cast<off_t>(at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoError(errno, fmt::format("journal {}: read", path));
    if (got == 0) return bytes;
    bytes.append(buffer, static_cast<size_t>(got));
    at += static_cast<uint64_t>(got);
  }
}

// A new file survives a crash only once its directory entry does.
absl::Status SyncDirectoryOf(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string dir = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
  UniqueFd fd(::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd || ::fsync(fd.get()) != 0) return WriteFailed(errno, path, "sync of its directory");
  return absl::OkStatus();
}

// A process that was killed keeps its locks until the last of its threads has closed its files.
absl::Status Lock(int fd, const std::string& path, Deadline deadline) {
  UniqueFd watch;
  while (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
    if (errno == EINTR) continue;
    if (errno != EWOULDBLOCK) return WriteFailed(errno, path, "lock");
    if (deadline.Expired())
      return Error(absl::StatusCode::kFailedPrecondition, "journal {} is in use by another process", path);
    if (!watch) {
      watch.reset(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK));
      if (!watch || ::inotify_add_watch(watch.get(), path.c_str(), IN_CLOSE_WRITE) < 0)
        return WriteFailed(errno, path, "watch");
      continue;  // it may have been closed just before
    }
    // The kernel tells of the close a moment before it lets go of the lock (__fput), hence the short bound.
    pollfd poll{watch.get(), POLLIN, 0};
    (void)::poll(&poll, 1, deadline.Min(Deadline::After(std::chrono::milliseconds(20))).PollTimeoutMs());
    char events[4096];
    while (::read(watch.get(), events, sizeof events) > 0) {
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Journal>> Journal::Open(const std::string& path, Deadline deadline) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!fd) return WriteFailed(errno, path, "open");
  RETURN_IF_ERROR(Lock(fd.get(), path, deadline));
  ASSIGN_OR_RETURN(std::string bytes, ReadAll(fd.get(), path));
  ASSIGN_OR_RETURN(Parsed parsed, Parse(path, bytes));
  std::unique_ptr<Journal> journal(new Journal(path, std::move(fd)));
  if (parsed.good_bytes == 0) {
    if (::ftruncate(journal->fd_.get(), 0) != 0) return WriteFailed(errno, path, "truncate");
    RETURN_IF_ERROR(journal->WriteSlot(HeaderSlot(), 0));
    journal->created_ = false;
    parsed.good_bytes = kSlotSize;
  } else if (bytes.size() > parsed.good_bytes) {
    journal->dropped_ = bytes.size() - parsed.good_bytes;
    LOG_WARN("journal {}: dropped {} bytes of an unfinished write at its end", path, journal->dropped_);
    if (::ftruncate(journal->fd_.get(), static_cast<off_t>(parsed.good_bytes)) != 0 ||
        ::fsync(journal->fd_.get()) != 0)
      return WriteFailed(errno, path, "truncate");
  }
  journal->end_ = parsed.good_bytes;
  journal->records_ = std::move(parsed.records);
  return journal;
}

absl::StatusOr<std::vector<JournalRecord>> Journal::Read(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return ErrnoError(errno, fmt::format("journal {}", path));
  ASSIGN_OR_RETURN(std::string bytes, ReadAll(fd.get(), path));
  ASSIGN_OR_RETURN(Parsed parsed, Parse(path, bytes));
  return std::move(parsed.records);
}

Journal::~Journal() = default;

absl::Status Journal::WriteSlot(const std::string& slot, uint64_t offset) {
  for (size_t done = 0; done < slot.size();) {
    const ssize_t wrote =
        ::pwrite(fd_.get(), slot.data() + done, slot.size() - done, static_cast<off_t>(offset + done));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) return WriteFailed(errno, path_, "write");
    done += static_cast<size_t>(wrote);
  }
  return absl::OkStatus();
}

absl::Status Journal::SyncSlots() {
  if (::fdatasync(fd_.get()) != 0) return WriteFailed(errno, path_, "sync");
  return absl::OkStatus();
}

// A header that a crash loses while a record behind it is kept would look like corruption. It is written anew
// because a sync that failed before may have left it marked as written.
absl::Status Journal::FinishCreation() {
  if (created_) return absl::OkStatus();
  RETURN_IF_ERROR(WriteSlot(HeaderSlot(), 0));
  RETURN_IF_ERROR(SyncSlots());
  RETURN_IF_ERROR(SyncDirectoryOf(path_));
  created_ = true;
  return absl::OkStatus();
}

// After a failed sync the page cache says nothing about the disk; only a sync that succeeds after the record
// was cut off again makes certain that it is not there.
bool Journal::CutTail() {
  return ::ftruncate(fd_.get(), static_cast<off_t>(end_)) == 0 && ::fsync(fd_.get()) == 0;
}

absl::Status Journal::Append(const JournalRecord& record) {
  std::lock_guard lock(mutex_);
  if (!absent_)
    return Error(v1::STATE_WRITE_FAILED, absl::StatusCode::kInternal,
                 "journal {}: an earlier write failed and could not be undone", path_);
  if (record.kind == JournalRecord::Kind::kInvalid || record.migration.size() > kMaxMigrationId)
    return Error(absl::StatusCode::kInvalidArgument, "journal {}: a record of kind {} with an id of {} bytes",
                 path_, KindName(record.kind), record.migration.size());
  RETURN_IF_ERROR(FinishCreation());
  absl::Status status = WriteSlot(RecordSlot(record, end_ / kSlotSize), end_);
  if (status.ok()) status = SyncSlots();
  if (!status.ok()) {
    absent_ = CutTail();
    return status;
  }
  end_ += kSlotSize;
  records_.push_back(record);
  return absl::OkStatus();
}

bool Journal::certainly_absent() const {
  std::lock_guard lock(mutex_);
  return absent_;
}

absl::Status Journal::Repair() {
  std::lock_guard lock(mutex_);
  if (!absent_) absent_ = CutTail();
  return absent_ ? absl::OkStatus() : WriteFailed(errno, path_, "undo of a failed write");
}

std::vector<JournalRecord> Journal::Records() const {
  std::lock_guard lock(mutex_);
  return records_;
}

JournalRecord Journal::Latest() const {
  std::lock_guard lock(mutex_);
  return records_.empty() ? JournalRecord{} : records_.back();
}

absl::Status Journal::Reserve(size_t records) {
  std::lock_guard lock(mutex_);
  const int error = ::fallocate(fd_.get(), FALLOC_FL_KEEP_SIZE, static_cast<off_t>(end_),
                                static_cast<off_t>(records * kSlotSize)) == 0
                        ? 0
                        : errno;
  // A file system without reservations will tell at the write.
  if (error != 0 && error != EOPNOTSUPP) return WriteFailed(error, path_, "reserve space");
  return absl::OkStatus();
}

absl::StatusOr<JournalVerdict> DecideVerdict(RecordLog& log, const std::string& migration) {
  const std::vector<JournalRecord> records = log.Records();
  ASSIGN_OR_RETURN(Ownership now, ReplayOwnership(records));
  JournalVerdict verdict = VerdictOf(records, migration);
  if (verdict.verdict != v1::IDLE) return verdict;
  const uint64_t epoch = now.migration == migration ? now.epoch : 0;
  ASSIGN_OR_RETURN(Handover side, Handover::Recover(v1::ROLE_DESTINATION, migration, epoch, records));
  RETURN_IF_ERROR(side.Apply(Handover::Event::kRefuseBegun));
  RETURN_IF_ERROR(log.Append(side.RefusedRecord()));
  RETURN_IF_ERROR(side.Apply(Handover::Event::kRefuseDurable));
  return JournalVerdict{side.answer_to_query(), epoch};
}

}  // namespace baton::migration
