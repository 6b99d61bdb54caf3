#include "tests/integration/vhost/peers.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "common/unix_socket.h"

namespace baton::test {
namespace {
using std::chrono::milliseconds;
using std::chrono::seconds;
}  // namespace

absl::Status MakeSparseFile(const std::string& path, uint64_t size) {
  UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(size)) < 0) return ErrnoError(errno, path);
  return absl::OkStatus();
}

absl::StatusOr<Qsd> Qsd::Start(const Options& o) {
  SpawnOptions spawn;
  spawn.argv = {"qemu-storage-daemon", "--blockdev",
                "driver=file,node-name=f0,locking=off,filename=" + o.image};
  std::string node = "f0";
  if (o.iops) {
    spawn.argv.insert(
        spawn.argv.end(),
        {"--object", fmt::format("throttle-group,id=tg,x-iops-total={},x-iops-total-max={}", o.iops, o.iops),
         "--blockdev", "driver=throttle,node-name=t0,file=f0,throttle-group=tg"});
    node = "t0";
  }
  spawn.argv.insert(
      spawn.argv.end(),
      {"--export", fmt::format("type=vhost-user-blk,id=e0,node-name={},addr.type=unix,addr.path={},"
                               "writable=on,num-queues={}",
                               node, o.socket, o.queues)});
  spawn.stderr_fd = 2;
  // A test that dies leaves nothing behind.
  spawn.die_with_parent = true;
  ASSIGN_OR_RETURN(Process process, Process::Spawn(spawn));
  Deadline deadline = Deadline::After(seconds(10));
  while (!ConnectUnix(o.socket, deadline).ok()) {
    if (deadline.Expired() || process.Wait(Deadline::After(milliseconds(10))).ok()) {
      return absl::UnavailableError("qemu-storage-daemon did not start");
    }
  }
  return Qsd(std::move(process));
}

void Qsd::Kill() {
  process_.Signal(SIGKILL);
  (void)process_.Wait(Deadline::After(seconds(10)));
}

absl::StatusOr<UmlGuest> UmlGuest::Start(const Options& o) {
  const std::string initrd = o.directory + "/initrd";
  if (!std::filesystem::exists(initrd)) {
    SpawnOptions build;
    build.argv = {std::string(BATON_SOURCE_DIR) + "/tests/lab/uml/build.sh",
                  o.net ? BATON_UML_NET_WORKLOAD : BATON_UML_WORKLOAD, initrd};
    if (o.net) build.argv.insert(build.argv.end(), {"failover", "net_failover", "virtio_net"});
    ASSIGN_OR_RETURN(CommandOutput built, RunCommand(build, Deadline::After(seconds(60))));
    if (!built.status.ok()) return absl::InternalError("build.sh: " + built.err);
  }
  int in[2], out[2];
  if (::pipe2(in, O_CLOEXEC) || ::pipe2(out, O_CLOEXEC)) return ErrnoError(errno, "pipe");
  UniqueFd in_read(in[0]), in_write(in[1]), out_read(out[0]), out_write(out[1]);
  SpawnOptions spawn;
  spawn.argv = {BATON_UML_RUN, "linux.uml",
                // Linux reports free pages only while it has more than 128 MiB of them.
                o.balloon ? "mem=320M" : "mem=128M", "initrd=" + initrd, "rdinit=/init", "con=null",
                "con0=fd:0,fd:1", "uml_dir=" + o.directory, "quiet",
                fmt::format("virtio_uml.device={}:{}", o.socket,
                            o.net       ? 1
                            : o.balloon ? 5
                                        : 2),
                fmt::format("lab.balloon={}", o.balloon ? 1 : 0), fmt::format("lab.threads={}", o.threads),
                fmt::format("lab.report={}", o.report)};
  spawn.stdin_fd = in_read.get();
  spawn.stdout_fd = out_write.get();
  spawn.stderr_fd = out_write.get();
  spawn.env = {{"HOME", o.directory}, {"TMPDIR", "/dev/shm"}};
  // UML's helper processes must end with it.
  spawn.new_session = true;
  spawn.die_with_parent = true;
  ASSIGN_OR_RETURN(Process process, Process::Spawn(spawn));
  ::fcntl(out_read.get(), F_SETFL, O_NONBLOCK);
  return UmlGuest(std::move(process), std::move(in_write), std::move(out_read));
}

absl::StatusOr<std::string> UmlGuest::WaitFor(const std::string& text, Deadline deadline) {
  for (;;) {
    size_t at = output_.find(text, position_);
    size_t end = at == std::string::npos ? at : output_.find('\n', at);
    if (end != std::string::npos) {
      position_ = end + 1;
      return output_.substr(at, end - at);
    }
    pollfd p{out_.get(), POLLIN, 0};
    if (::poll(&p, 1, deadline.PollTimeoutMs()) == 0) {
      return Error(absl::StatusCode::kDeadlineExceeded, "the guest did not print '{}'; it printed: {}", text,
                   output_.substr(output_.size() > 2000 ? output_.size() - 2000 : 0));
    }
    char buffer[4096];
    ssize_t n = ::read(out_.get(), buffer, sizeof buffer);
    if (n == 0) return Error(absl::StatusCode::kUnavailable, "the guest ended; it printed: {}", output_);
    if (n > 0) output_.append(buffer, static_cast<size_t>(n));
  }
}

void UmlGuest::Skip() {
  char buffer[4096];
  for (ssize_t n; (n = ::read(out_.get(), buffer, sizeof buffer)) > 0;)
    output_.append(buffer, static_cast<size_t>(n));
  position_ = output_.size();
}

absl::Status UmlGuest::Type(char key) {
  char line[2] = {key, '\n'};
  if (::write(in_.get(), line, 2) == 2) return absl::OkStatus();
  const int error = errno;
  Skip();
  return Annotate(ErrnoError(error, "guest console"), "the guest printed: " + output_);
}

absl::Status UmlGuest::Progress(int lines, Deadline deadline) {
  Skip();
  for (int i = 0; i < lines; ++i) RETURN_IF_ERROR(WaitFor("PROGRESS", deadline).status());
  return absl::OkStatus();
}

absl::StatusOr<std::string> UmlGuest::Finish(Deadline deadline) {
  RETURN_IF_ERROR(Type('q'));
  return WaitFor("RESULT", deadline);
}

bool HaveUmlAndQsd() {
  bool have = true;
  for (const char* program : {"linux.uml", "qemu-storage-daemon"}) {
    SpawnOptions probe;
    probe.argv = {program, "--version"};
    if (RunCommand(probe, Deadline::After(seconds(20))).ok()) continue;
    std::fprintf(stderr, "%s is not installed\n", program);
    have = false;
  }
  return have;
}

std::optional<uint64_t> NumberAfter(const std::string& line, const std::string& name) {
  size_t at = line.find(name + "=");
  if (at == std::string::npos) return std::nullopt;
  return std::strtoull(line.c_str() + at + name.size() + 1, nullptr, 10);
}

bool Eventually(const std::function<bool()>& condition, Duration limit) {
  for (Deadline deadline = Deadline::After(limit); !deadline.Expired();) {
    if (condition()) return true;
    ::poll(nullptr, 0, 5);
  }
  return condition();
}

}  // namespace baton::test
