#include "common/durable_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>

#include "common/config.h"
#include "common/fd.h"

namespace baton {
namespace {

constexpr size_t kMaxMessage = 16u << 20;

absl::Status Failed(int error, const std::string& what) {
  return WithReason(ErrnoError(error, what), v1::STATE_WRITE_FAILED);
}

absl::Status SyncDirectoryOf(const std::string& path) {
  std::string directory = std::filesystem::path(path).parent_path().string();
  UniqueFd fd(::open(directory.empty() ? "." : directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return Failed(errno, directory);
  if (::fsync(fd.get()) != 0) return Failed(errno, "fsync " + directory);
  return absl::OkStatus();
}

absl::Status Write(const std::string& path, const std::string& content, bool sync) {
  UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd) return Failed(errno, path);
  size_t done = 0;
  while (done < content.size()) {
    ssize_t n = ::write(fd.get(), content.data() + done, content.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Failed(errno, path);
    done += static_cast<size_t>(n);
  }
  if (sync && ::fsync(fd.get()) != 0) return Failed(errno, "fsync " + path);
  return absl::OkStatus();
}

absl::Status Replace(const std::string& path, const std::string& content, bool sync) {
  std::string temporary = path + ".new";
  if (absl::Status status = Write(temporary, content, sync); !status.ok()) {
    ::unlink(temporary.c_str());
    return status;
  }
  if (::rename(temporary.c_str(), path.c_str()) != 0) {
    int error = errno;
    ::unlink(temporary.c_str());
    return Failed(error, path);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteFileDurable(const std::string& path, const std::string& content) {
  RETURN_IF_ERROR(Replace(path, content, /*sync=*/true));
  return SyncDirectoryOf(path);
}

absl::Status WriteMessageDurable(const std::string& path, const google::protobuf::MessageLite& message) {
  return WriteFileDurable(path, message.SerializeAsString());
}

absl::Status WriteFileSoon(const std::string& path, const std::string& content) {
  return Replace(path, content, /*sync=*/false);
}

absl::Status WriteMessageSoon(const std::string& path, const google::protobuf::MessageLite& message) {
  return WriteFileSoon(path, message.SerializeAsString());
}

absl::Status SyncFile(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  if (!fd) return Failed(errno, path);
  if (::fsync(fd.get()) != 0) return Failed(errno, "fsync " + path);
  return SyncDirectoryOf(path);
}

absl::Status ReadMessage(const std::string& path, google::protobuf::MessageLite* message) {
  ASSIGN_OR_RETURN(std::string bytes, ReadFileLimited(path, kMaxMessage));
  if (!message->ParseFromString(bytes))
    return Error(absl::StatusCode::kDataLoss, "{}: is damaged (does not parse as {})", path,
                 message->GetTypeName());
  return absl::OkStatus();
}

absl::Status RemoveFileDurable(const std::string& path) {
  if (::unlink(path.c_str()) != 0) return errno == ENOENT ? absl::OkStatus() : Failed(errno, path);
  return SyncDirectoryOf(path);
}

absl::Status MakeDirectories(const std::string& path, unsigned mode) {
  size_t at = 0;
  while (at != std::string::npos) {
    at = path.find('/', at + 1);
    std::string part = path.substr(0, at);
    if (part.empty() || ::mkdir(part.c_str(), mode) == 0) continue;
    int error = errno;
    struct stat info {};
    if (::stat(part.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) continue;
    return Failed(error, part);
  }
  return absl::OkStatus();
}

absl::Status RemoveTree(const std::string& path) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  if (error) return Failed(error.value(), path);
  return absl::OkStatus();
}

}  // namespace baton
