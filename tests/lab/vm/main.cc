// baton-lab-guest: the lab guest as a program that takes the place of QEMU (docs/lab.md). It takes the
// command line that agent/vmm/qmp/qemu_command.cc makes, and is driven over QMP.
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>

#include "common/log.h"
#include "common/unix_socket.h"
#include "tests/lab/vm/console.h"
#include "tests/lab/vm/guest.h"
#include "tests/lab/vm/qmp_server.h"

namespace baton::lab {
namespace {

// How long the devices may take until they answer when the machine is made.
constexpr Duration kRealizeTime = std::chrono::seconds(30);

absl::StatusOr<UniqueFd> QmpListener(const LaunchOptions& launch) {
  if (launch.qmp_fd >= 0) return UniqueFd(launch.qmp_fd);
  ASSIGN_OR_RETURN(UnixListener listener, UnixListener::Listen(launch.qmp_path));
  return listener.Release();
}

absl::Status Run(const LaunchOptions& launch) {
  // Blocked before any thread starts; all of them inherit it.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  UniqueFd signal_fd(::signalfd(-1, &signals, SFD_CLOEXEC));
  UniqueFd power_off(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!signal_fd || !power_off) return absl::InternalError("no descriptors");

  ASSIGN_OR_RETURN(UniqueFd listener, QmpListener(launch));
  ASSIGN_OR_RETURN(auto console, Console::Open(launch.console_path, launch.console_log));
  GuestConfig config;
  config.name = launch.name;
  config.memory_path = launch.memory_path;
  config.memory_bytes = launch.memory_bytes;
  config.devices = launch.devices;
  config.incoming = launch.incoming;
  ASSIGN_OR_RETURN(config.options, ParseWorkloadOptions(launch.cmdline));
  GuestCallbacks callbacks;
  callbacks.say = [&](const std::string& line) { console->Say(line); };
  callbacks.on_power_off = [&] {
    const uint64_t one = 1;
    (void)!::write(power_off.get(), &one, sizeof one);
  };
  ASSIGN_OR_RETURN(auto guest, LabGuest::Create(std::move(config), callbacks, Deadline::After(kRealizeTime)));
  QmpServer qmp(std::move(listener), *guest, launch.incoming);
  while (!qmp.quit()) {
    std::vector<pollfd> items{{signal_fd.get(), POLLIN, 0}, {power_off.get(), POLLIN, 0}};
    for (int fd : console->fds()) items.push_back({fd, POLLIN, 0});
    const size_t monitor = items.size();
    for (int fd : qmp.fds()) items.push_back({fd, POLLIN, 0});
    if (::poll(items.data(), items.size(), -1) < 0) continue;
    if (items[0].revents != 0) qmp.Shutdown("host-signal", false);
    if (items[1].revents != 0) qmp.Shutdown("guest-shutdown", true);
    for (size_t i = 2; i < items.size() && !qmp.quit(); ++i) {
      if (items[i].revents == 0) continue;
      if (i < monitor) {
        console->Attend(items[i].fd, [&](char key) { guest->Type(key); });
      } else {
        qmp.Attend(items[i].fd);
      }
    }
  }
  // QEMU stops the machine, and with it the devices, before it exits.
  return guest->Pause(Deadline::After(kRealizeTime));
}

}  // namespace
}  // namespace baton::lab

int main(int argc, char** argv) {
  auto launch = baton::lab::ParseCommandLine({argv + 1, argv + argc});
  if (!launch.ok()) {
    fmt::print(stderr, "baton-lab-guest: {}\n", baton::Message(launch.status()));
    return 2;
  }
  if (launch->version) {
    fmt::print("QEMU emulator version {}.{}.{} (baton-lab-guest speaks its QMP)\n", baton::lab::kQemuMajor,
               baton::lab::kQemuMinor, baton::lab::kQemuMicro);
    return 0;
  }
  if (launch->machine_help) {
    fmt::print("Supported machines are:\nq35                  the lab guest's only machine\n");
    return 0;
  }
  baton::LogOptions log;
  log.program = "baton-lab-guest";
  log.context = "vm=" + launch->name;
  baton::InitLogging(log);
  absl::Status status = baton::lab::Run(*launch);
  if (!status.ok()) {
    LOG_ERROR("{}", baton::Message(status));
    return 1;
  }
  return 0;
}
