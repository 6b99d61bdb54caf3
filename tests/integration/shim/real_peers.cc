#include "tests/integration/shim/real_peers.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/inotify.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace baton::test {
namespace {
using std::chrono::seconds;
}

std::string FindProgram(const std::string& env, const std::string& name) {
  if (const char* path = std::getenv(env.c_str()); path != nullptr && *path != 0) return path;
  std::istringstream path(std::getenv("PATH") != nullptr ? std::getenv("PATH") : "/usr/bin:/bin");
  for (std::string dir; std::getline(path, dir, ':');) {
    if (::access((dir + "/" + name).c_str(), X_OK) == 0) return dir + "/" + name;
  }
  return "";
}

std::string QemuPath() { return FindProgram("BATON_QEMU", "qemu-system-x86_64"); }
std::string QsdPath() { return FindProgram("BATON_QSD", "qemu-storage-daemon"); }
bool HaveQemuAndQsd() { return !QemuPath().empty() && !QsdPath().empty(); }

absl::StatusOr<std::string> LabGuest() {
  std::string out = std::string(BATON_BINARY_DIR) + "/lab-guest";
  SpawnOptions options;
  options.argv = {std::string(BATON_SOURCE_DIR) + "/tests/lab/guest/build.sh", out};
  ASSIGN_OR_RETURN(CommandOutput output, RunCommand(options, Deadline::After(seconds(300))));
  if (!output.status.ok()) return Error(absl::StatusCode::kInternal, "build.sh: {}", output.err);
  return out;
}

absl::StatusOr<v1::VmSpec> LabSpec(const std::string& name, bool disk, const std::string& cmdline) {
  ASSIGN_OR_RETURN(std::string guest, LabGuest());
  v1::VmSpec spec;
  spec.set_name(name);
  spec.set_memory_bytes(128u << 20);
  // Linux uses one. Where there is no other, TCG's code has no barriers, though devices are other threads,
  // and now and then the guest's disk is silent for good (PROCESSORS of tests/e2e/batonlab/cluster.py).
  spec.set_vcpus(2);
  spec.set_accelerator(v1::ACCELERATOR_TCG);
  spec.mutable_boot()->set_kernel(guest + "/vmlinuz");
  spec.mutable_boot()->set_initrd(guest + "/initrd.gz");
  // Linux counts the interrupts of its timer while it boots, and panics ("IO-APIC + timer doesn't work!")
  // when a busy host does not let an emulated processor have enough of them; with KVM it does not ask either.
  spec.mutable_boot()->set_cmdline("console=ttyS0 quiet no_timer_check maxcpus=1 " + cmdline);
  if (disk) {
    v1::DeviceSpec* device = spec.add_devices();
    device->set_name("disk0");
    device->set_class_(v1::BLK);
  }
  return spec;
}

absl::StatusOr<StorageDaemon> StorageDaemon::Start(const std::string& socket, const std::string& image,
                                                   int queues) {
  // The socket is made here and inherited, so that connecting works from now on, without waiting for the
  // daemon.
  constexpr int kFd = 3;
  ASSIGN_OR_RETURN(UnixListener listener, UnixListener::Listen(socket));
  SpawnOptions options;
  options.argv = {
      QsdPath(), "--blockdev", "driver=file,node-name=f0,filename=" + image + ",locking=off", "--export",
      fmt::format("type=vhost-user-blk,id=e0,node-name=f0,addr.type=fd,addr.str={},writable=on,num-queues={}",
                  kFd, queues)};
  options.inherit = {{listener.fd(), kFd}};
  options.stderr_fd = 2;
  // A test that dies leaves nothing behind.
  options.die_with_parent = true;
  ASSIGN_OR_RETURN(Process process, Process::Spawn(options));
  UniqueFd fd = listener.Release();
  return StorageDaemon(std::move(process));
}

void StorageDaemon::Kill() {
  process_.Signal(9);
  (void)process_.Wait(Deadline::After(seconds(10)));
}

absl::Status MakeImage(const std::string& path, uint64_t size) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(size)) < 0) return ErrnoError(errno, path);
  return absl::OkStatus();
}

GrowingFile::GrowingFile(std::string path)
    : path_(std::move(path)), inotify_(::inotify_init1(IN_CLOEXEC | IN_NONBLOCK)) {}

std::string GrowingFile::All() const {
  std::ifstream in(path_, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

void GrowingFile::SkipToEnd() { position_ = All().size(); }

absl::StatusOr<std::string> GrowingFile::WaitFor(const std::string& text, Deadline deadline) {
  // The directory is watched as well, for a file that does not exist yet.
  std::string dir = std::filesystem::path(path_).parent_path();
  int watch = ::inotify_add_watch(inotify_.get(), dir.c_str(), IN_MODIFY | IN_CREATE);
  if (watch < 0) return ErrnoError(errno, dir);
  for (;;) {
    char events[4096];
    while (::read(inotify_.get(), events, sizeof(events)) > 0) {
    }
    std::string all = All();
    size_t at = position_ <= all.size() ? all.find(text, position_) : std::string::npos;
    if (at != std::string::npos) {
      size_t end = all.find('\n', at);
      if (end != std::string::npos) {
        size_t start = all.rfind('\n', at);
        start = start == std::string::npos ? 0 : start + 1;
        position_ = end + 1;
        return all.substr(start, end - start);
      }
    }
    absl::Status waited = WaitFd(inotify_.get(), POLLIN, deadline, path_);
    if (!waited.ok()) {
      return Error(waited.code(), "'{}' did not appear in {}; it ends with: {}", text, path_,
                   all.substr(all.size() > 500 ? all.size() - 500 : 0));
    }
  }
}

absl::Status Console::Type(const std::string& keys) {
  ASSIGN_OR_RETURN(UniqueFd fd, ConnectUnix(socket_, Deadline::After(seconds(5))));
  if (::write(fd.get(), keys.data(), keys.size()) != static_cast<ssize_t>(keys.size())) {
    return ErrnoError(errno, socket_);
  }
  // QEMU reads what was sent before it sees the end.
  return absl::OkStatus();
}

absl::StatusOr<std::string> Console::Ask(const std::string& keys, const std::string& answer,
                                         Deadline deadline) {
  out.SkipToEnd();
  RETURN_IF_ERROR(Type(keys));
  return out.WaitFor(answer, deadline);
}

std::optional<uint64_t> NumberIn(const std::string& line, const std::string& name) {
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    if (word.rfind(name + "=", 0) == 0) return std::strtoull(word.c_str() + name.size() + 1, nullptr, 10);
  }
  return std::nullopt;
}

}  // namespace baton::test
