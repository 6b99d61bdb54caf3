#include "agent/vhost/device_memo.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "common/log.h"

namespace baton::vhost {
namespace {

constexpr uint64_t kMemoMagic = 0x4f4d454d4e544142;  // "BATNMEMO"
constexpr uint32_t kMemoVersion = 1;
constexpr size_t kMaxDeviceName = 64;

}  // namespace

// Two copies and which of them counts. A value is whole at every moment, whoever is killed.
template <typename T>
struct MemoCell {
  std::atomic<uint32_t> current;
  uint32_t padding;
  T copy[2];

  T Load() const { return copy[current.load(std::memory_order_acquire) & 1]; }
  void Store(const T& value) {
    const uint32_t next = (current.load(std::memory_order_relaxed) + 1) & 1;
    copy[next] = value;
    current.store(next, std::memory_order_release);
  }
};

namespace {

// Opened without following links; regular, ours, nobody else's.
absl::StatusOr<UniqueFd> OpenOwn(const std::string& path, uint64_t size, uint64_t inode) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!fd) return ErrnoError(errno, path);
  struct stat st;
  if (::fstat(fd.get(), &st) != 0) return ErrnoError(errno, path);
  auto bad = [&](const std::string& what) {
    return Error(absl::StatusCode::kDataLoss, "{}: {}", path, what);
  };
  if (!S_ISREG(st.st_mode)) return bad("is no regular file");
  if (st.st_uid != ::geteuid()) return bad(fmt::format("belongs to user {}", st.st_uid));
  if ((st.st_mode & 07777) != 0600) return bad(fmt::format("has mode {:o}", st.st_mode & 07777));
  if (st.st_nlink != 1) return bad(fmt::format("has {} names", st.st_nlink));
  if (static_cast<uint64_t>(st.st_size) != size)
    return bad(fmt::format("has {} bytes instead of {}", st.st_size, size));
  if (inode != 0 && st.st_ino != inode) return bad("is another file than the one that was noted");
  return fd;
}

// Room is set aside: a back-end that writes to a hole of a full tmpfs would die of SIGBUS.
absl::StatusOr<UniqueFd> MakeOwn(const std::string& path, uint64_t size) {
  ::unlink(path.c_str());
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return ErrnoError(errno, path);
  if (::fchmod(fd.get(), 0600) != 0) return ErrnoError(errno, path);
  if (int error = ::posix_fallocate(fd.get(), 0, static_cast<off_t>(size)); error != 0) {
    ::unlink(path.c_str());
    return ErrnoError(error, path);
  }
  return fd;
}

absl::Status WriteAll(int fd, const std::vector<uint8_t>& content, const std::string& what) {
  for (size_t done = 0; done < content.size();) {
    ssize_t n = ::pwrite(fd, content.data() + done, content.size() - done, static_cast<off_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return ErrnoError(n < 0 ? errno : ENOSPC, what);
    done += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

}  // namespace

struct DeviceMemo::Layout {
  uint64_t magic;
  uint32_t version;
  uint32_t rings;
  char name[kMaxDeviceName];
  MemoCell<MemoDevice> device;
  MemoCell<MemoRing> ring[kMaxVrings];
};

std::string DeviceMemo::RegionPath(uint32_t n) const {
  return fmt::format("{}/{}.inflight-{}", directory_, device_, n);
}

absl::StatusOr<std::unique_ptr<DeviceMemo>> DeviceMemo::Open(const std::string& directory,
                                                             const std::string& device, bool fresh) {
  static_assert(std::atomic<uint32_t>::is_always_lock_free);
  if (device.size() >= kMaxDeviceName || device.find('/') != std::string::npos)
    return Error(absl::StatusCode::kInvalidArgument, "'{}' is no name of a device", device);
  std::unique_ptr<DeviceMemo> memo(new DeviceMemo(directory, device));
  const std::string path = fmt::format("{}/{}.memo", directory, device);
  auto map = [&](int fd) -> absl::Status {
    void* at = ::mmap(nullptr, sizeof(Layout), PROT_READ | PROT_WRITE,
                      fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) return ErrnoError(errno, path);
    memo->layout_ = static_cast<Layout*>(at);
    return absl::OkStatus();
  };
  if (directory.empty()) {
    RETURN_IF_ERROR(map(-1));
  } else {
    if (!fresh) {
      auto fd = OpenOwn(path, sizeof(Layout), 0);
      if (fd.ok()) {
        RETURN_IF_ERROR(map(fd->get()));
        const Layout& l = *memo->layout_;
        if (l.magic == kMemoMagic && l.version == kMemoVersion && l.rings == kMaxVrings &&
            ::strnlen(l.name, kMaxDeviceName) < kMaxDeviceName && device == l.name) {
          memo->found_ = true;
          return memo;
        }
        LOG_WARN("device {}: {} was not written by this version of the program; it is not used", device,
                 path);
        ::munmap(memo->layout_, sizeof(Layout));
        memo->layout_ = nullptr;
      } else if (!absl::IsNotFound(fd.status())) {
        LOG_WARN("device {}: what an earlier shim noted is not used: {}", device, Message(fd.status()));
      }
    }
    Remove(directory, device);
    ASSIGN_OR_RETURN(UniqueFd fd, MakeOwn(path, sizeof(Layout)));
    RETURN_IF_ERROR(map(fd.get()));
  }
  Layout& l = *memo->layout_;
  l.version = kMemoVersion;
  l.rings = kMaxVrings;
  std::memcpy(l.name, device.data(), device.size());
  std::atomic_thread_fence(std::memory_order_release);
  l.magic = kMemoMagic;
  return memo;
}

DeviceMemo::~DeviceMemo() {
  if (layout_) ::munmap(layout_, sizeof(Layout));
}

MemoDevice DeviceMemo::device() const { return layout_->device.Load(); }
void DeviceMemo::set_device(const MemoDevice& device) { layout_->device.Store(device); }
MemoRing DeviceMemo::ring(uint32_t index) const { return layout_->ring[index].Load(); }
void DeviceMemo::set_ring(uint32_t index, const MemoRing& ring) { layout_->ring[index].Store(ring); }

void DeviceMemo::ForgetRings() {
  for (uint32_t i = 0; i < kMaxVrings; ++i) {
    if (ring(i).known()) set_ring(i, MemoRing());
  }
}

absl::StatusOr<InflightRegion> DeviceMemo::MakeRegion(InflightDescription description,
                                                      const std::vector<uint8_t>& content,
                                                      uint32_t backend_kind) {
  if (content.size() > description.mmap_size)
    return absl::InternalError("the content of an in-flight region is longer than the region");
  MemoDevice device = this->device();
  const uint32_t before = device.inflight_file;
  InflightRegion out;
  description.mmap_offset = 0;
  out.description = description;
  if (directory_.empty()) {
    out.fd.reset(::memfd_create("inflight", MFD_CLOEXEC));
    if (!out.fd || ::ftruncate(out.fd.get(), static_cast<off_t>(description.mmap_size)) != 0)
      return ErrnoError(errno, "in-flight region");
  } else {
    device.inflight_file = before + 1;
    ASSIGN_OR_RETURN(out.fd, MakeOwn(RegionPath(device.inflight_file), description.mmap_size));
  }
  RETURN_IF_ERROR(WriteAll(out.fd.get(), content, "writing the in-flight region"));
  ASSIGN_OR_RETURN(out.map, FragileMapping::Map(out.fd.get(), description.mmap_size));
  struct stat st;
  if (::fstat(out.fd.get(), &st) != 0) return ErrnoError(errno, "in-flight region");
  device.inflight = description;
  device.inflight_inode = st.st_ino;
  device.backend_kind = backend_kind;
  set_device(device);
  if (directory_.empty()) {
    memory_region_.reset(::fcntl(out.fd.get(), F_DUPFD_CLOEXEC, 0));
  } else if (before != 0) {
    ::unlink(RegionPath(before).c_str());
  }
  return out;
}

absl::StatusOr<InflightRegion> DeviceMemo::OpenRegion() const {
  const MemoDevice device = this->device();
  if (device.inflight.mmap_size == 0) return absl::NotFoundError("no in-flight region was noted");
  InflightRegion out;
  out.description = device.inflight;
  if (directory_.empty()) {
    out.fd.reset(::fcntl(memory_region_.get(), F_DUPFD_CLOEXEC, 0));
    if (!out.fd) return ErrnoError(errno, "in-flight region");
    ASSIGN_OR_RETURN(out.map, FragileMapping::Map(out.fd.get(), out.description.mmap_size));
    return out;
  }
  auto fd = OpenOwn(RegionPath(device.inflight_file), device.inflight.mmap_size, device.inflight_inode);
  if (absl::IsNotFound(fd.status())) return absl::DataLossError(Message(fd.status()));
  if (!fd.ok()) return fd.status();
  out.fd = std::move(*fd);
  ASSIGN_OR_RETURN(out.map, FragileMapping::Map(out.fd.get(), out.description.mmap_size));
  return out;
}

void DeviceMemo::Remove(const std::string& directory, const std::string& device) {
  std::error_code error;
  const std::string prefix = device + ".inflight-";
  std::vector<std::filesystem::path> found{std::filesystem::path(directory) / (device + ".memo")};
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    if (entry.path().filename().string().starts_with(prefix)) found.push_back(entry.path());
  }
  for (const auto& path : found) std::filesystem::remove(path, error);
}

}  // namespace baton::vhost
