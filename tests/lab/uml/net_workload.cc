// The network workload of the User-Mode Linux guest, PID 1: sends stamped frames over eth0 to a peer that
// returns them, and checks that each comes back once, whole, and in order. Options on the kernel command line
// (lab.NAME=VALUE): window (frames on their way at a time, 16), report (frames between progress lines, 500).
// Commands on standard input, one letter: 2 and 1 set the number of queue pairs (ethtool's channels), p and n
// switch promiscuous mode on and off, q stops, waits for what is on its way, prints RESULT and powers off.
//
// A frame that has not come back when a later one does, or after eight seconds, counts as lost and is not
// waited for any more; if it comes after all, the network changed the order, which is an error.
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/ethtool.h>
#include <linux/if_packet.h>
#include <linux/reboot.h>
#include <linux/sockios.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <initializer_list>

namespace {

constexpr uint16_t kEtherType = 0x88b5;  // for local experiments (IEEE 802)
constexpr uint8_t kPeer[6] = {0x02, 0, 0, 0, 0, 0xfe};
constexpr uint64_t kLostAfterUs = 8000000, kCarrierUs = 60000000;
constexpr unsigned kMaxWindow = 256;

struct Stamp {
  uint64_t sequence;
  uint32_t length;
  uint32_t sum;
} __attribute__((packed));
constexpr size_t kHeader = 14 + sizeof(Stamp);

unsigned g_window = 16, g_report = 500;
bool g_returned_once[kMaxWindow] = {};  // of the frames before g_next, by sequence % kMaxWindow
uint64_t g_sent = 0, g_next = 1, g_returned = 0, g_lost = 0, g_errors = 0, g_twice = 0, g_gap_us = 0;

uint64_t NowUs() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000 + static_cast<uint64_t>(now.tv_nsec) / 1000;
}

// FNV-1a over the data and the sequence.
uint32_t Sum(const uint8_t* data, size_t size, uint64_t sequence) {
  uint32_t hash = 2166136261u ^ static_cast<uint32_t>(sequence);
  for (size_t i = 0; i < size; ++i) hash = (hash ^ data[i]) * 16777619u;
  return hash;
}

bool LoadNetModule(const char* path) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  bool loaded = syscall(SYS_finit_module, fd, "", 0) == 0;
  close(fd);
  return loaded;
}

void ReadNetOptions() {
  char line[4096] = {};
  if (FILE* f = std::fopen("/proc/cmdline", "r")) {
    if (!std::fgets(line, sizeof line, f)) line[0] = 0;
    std::fclose(f);
  }
  auto option = [&](const char* name, unsigned& value) {
    if (const char* at = std::strstr(line, name))
      value = static_cast<unsigned>(std::atoi(at + std::strlen(name)));
  };
  option("lab.window=", g_window);
  option("lab.report=", g_report);
  if (g_window == 0 || g_window > kMaxWindow) g_window = 16;
}

ifreq Named() {
  ifreq request{};
  std::strcpy(request.ifr_name, "eth0");
  return request;
}

void Flags(int fd, int add, int remove) {
  ifreq request = Named();
  if (ioctl(fd, SIOCGIFFLAGS, &request) != 0) {
    std::printf("ERROR eth0: %s\n", std::strerror(errno));
    return;
  }
  request.ifr_flags = static_cast<short>((request.ifr_flags | add) & ~remove);
  if (ioctl(fd, SIOCSIFFLAGS, &request) != 0) std::printf("ERROR flags of eth0: %s\n", std::strerror(errno));
}

// True once the link watch has seen the carrier. IFF_RUNNING does not tell: it is set as well while the state
// is "unknown", as it is from the registration of eth0 until the link watch looks for the first time.
bool OperstateUp() {
  int fd = open("/sys/class/net/eth0/operstate", O_RDONLY | O_CLOEXEC);
  char state[8] = {};
  const bool up = fd >= 0 && read(fd, state, sizeof state - 1) > 0 && std::strcmp(state, "up\n") == 0;
  if (fd >= 0) close(fd);
  return up;
}

// Linux drops what is sent before it has seen the carrier (noop_qdisc), which it does some time after eth0 is
// up.
void AwaitCarrier(int fd) {
  for (const uint64_t end = NowUs() + kCarrierUs; NowUs() < end; poll(nullptr, 0, 2)) {
    if (!OperstateUp()) continue;
    // The state is set before the queues are: this takes the lock under which both happen (linkwatch_do_dev).
    return Flags(fd, IFF_UP, 0);
  }
  std::printf("ERROR eth0 has no carrier\n");
}

void Channels(int fd, unsigned count) {
  ethtool_channels channels{};
  channels.cmd = ETHTOOL_SCHANNELS;
  channels.combined_count = count;
  ifreq request = Named();
  request.ifr_data = reinterpret_cast<char*>(&channels);
  if (ioctl(fd, SIOCETHTOOL, &request) != 0) {
    std::printf("ERROR %u channels: %s\n", count, std::strerror(errno));
  } else {
    std::printf("CHANNELS %u\n", count);
  }
}

void SendFrame(int fd, int index, const uint8_t* mac) {
  uint8_t frame[1514];
  const uint64_t sequence = ++g_sent;
  const size_t data = 32 + (sequence * 2654435761u) % 1400;
  std::memcpy(frame, kPeer, 6);
  std::memcpy(frame + 6, mac, 6);
  frame[12] = kEtherType >> 8;
  frame[13] = kEtherType & 0xff;
  for (size_t i = 0; i < data; ++i) frame[kHeader + i] = static_cast<uint8_t>(sequence * 31 + i * 7);
  Stamp stamp{sequence, static_cast<uint32_t>(data), Sum(frame + kHeader, data, sequence)};
  std::memcpy(frame + 14, &stamp, sizeof stamp);
  sockaddr_ll to{};
  to.sll_family = AF_PACKET;
  to.sll_ifindex = index;
  to.sll_halen = 6;
  std::memcpy(to.sll_addr, kPeer, 6);
  if (sendto(fd, frame, kHeader + data, 0, reinterpret_cast<sockaddr*>(&to), sizeof to) < 0) {
    // The queue is full for as long as the device does not take anything: it will be sent again.
    --g_sent;
    poll(nullptr, 0, 1);
  }
}

// Gives up what has not come back of the frames before `next`.
void Lose(uint64_t next) {
  g_lost += next - g_next;
  std::printf("LOST %llu to %llu\n", static_cast<unsigned long long>(g_next),
              static_cast<unsigned long long>(next - 1));
  for (; g_next < next; ++g_next) g_returned_once[g_next % kMaxWindow] = false;
}

void ReceiveFrames(int fd, uint64_t* heard) {
  uint8_t frame[2048];
  for (;;) {
    const ssize_t n = recv(fd, frame, sizeof frame, MSG_DONTWAIT);
    if (n <= 0) return;
    if (std::memcmp(frame + 6, kPeer, 6) != 0) continue;  // our own, seen on its way out
    Stamp stamp;
    std::memcpy(&stamp, frame + 14, sizeof stamp);
    if (n < static_cast<ssize_t>(kHeader) || static_cast<size_t>(n) < kHeader + stamp.length ||
        stamp.length > 1500 || Sum(frame + kHeader, stamp.length, stamp.sequence) != stamp.sum) {
      std::printf("ERROR a damaged frame of %zd bytes\n", n);
      ++g_errors;
      continue;
    }
    bool& returned = g_returned_once[stamp.sequence % kMaxWindow];
    if (stamp.sequence > g_sent || stamp.sequence + kMaxWindow <= g_next) {
      std::printf("ERROR frame %llu, which is not under way\n",
                  static_cast<unsigned long long>(stamp.sequence));
      ++g_errors;
      continue;
    }
    if (stamp.sequence < g_next) {
      if (returned) {
        ++g_twice;
      } else {
        std::printf("ERROR frame %llu came after %llu\n", static_cast<unsigned long long>(stamp.sequence),
                    static_cast<unsigned long long>(g_next - 1));
        ++g_errors;
        --g_lost;
        returned = true;
      }
      continue;
    }
    if (stamp.sequence > g_next) Lose(stamp.sequence);
    returned = true;
    g_next = stamp.sequence + 1;
    const uint64_t now = NowUs();
    if (now - *heard > g_gap_us) g_gap_us = now - *heard;
    *heard = now;
    if (++g_returned % g_report == 0) {
      std::printf("PROGRESS returned=%llu lost=%llu errors=%llu twice=%llu gap_us=%llu\n",
                  static_cast<unsigned long long>(g_returned), static_cast<unsigned long long>(g_lost),
                  static_cast<unsigned long long>(g_errors), static_cast<unsigned long long>(g_twice),
                  static_cast<unsigned long long>(g_gap_us));
    }
  }
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  mount("proc", "/proc", "proc", 0, nullptr);
  mkdir("/sys", 0755);
  mount("sysfs", "/sys", "sysfs", 0, nullptr);
  ReadNetOptions();
  for (const char* module : {"/failover.ko", "/net_failover.ko", "/virtio_net.ko"}) {
    if (!LoadNetModule(module)) std::printf("ERROR %s: %s\n", module, std::strerror(errno));
  }
  int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(kEtherType));
  int control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  // An address, so that the kernel has something to announce.
  ifreq address = Named();
  sockaddr_in inet{};
  inet.sin_family = AF_INET;
  inet.sin_addr.s_addr = htonl(0x0a000002);
  std::memcpy(&address.ifr_addr, &inet, sizeof inet);
  ioctl(control, SIOCSIFADDR, &address);
  Flags(control, IFF_UP, 0);
  AwaitCarrier(control);
  ifreq request = Named();
  uint8_t mac[6] = {};
  if (ioctl(control, SIOCGIFHWADDR, &request) == 0) std::memcpy(mac, request.ifr_hwaddr.sa_data, 6);
  request = Named();
  const int index = ioctl(control, SIOCGIFINDEX, &request) == 0 ? request.ifr_ifindex : 0;
  std::printf("STARTED\n");
  uint64_t heard = NowUs();
  bool quit = false, open = true;
  while (!quit || g_next <= g_sent) {
    while (!quit && g_sent + 1 - g_next < g_window) SendFrame(fd, index, mac);
    pollfd p[2] = {{fd, POLLIN, 0}, {open ? 0 : -1, POLLIN, 0}};
    poll(p, 2, 50);
    ReceiveFrames(fd, &heard);
    if (g_next <= g_sent && NowUs() - heard > kLostAfterUs) {
      Lose(g_sent + 1);
      heard = NowUs();
    }
    if (!open || !(p[1].revents & (POLLIN | POLLHUP))) continue;
    char c = 0;
    if (read(0, &c, 1) <= 0) {
      open = false;
      quit = true;
    }
    if (c == '1' || c == '2') Channels(control, static_cast<unsigned>(c - '0'));
    if (c == 'p') Flags(control, IFF_PROMISC, 0);
    if (c == 'n') Flags(control, 0, IFF_PROMISC);
    if (c == 'q') quit = true;
  }
  std::printf("RESULT %s returned=%llu lost=%llu errors=%llu twice=%llu gap_us=%llu\n",
              g_errors ? "FAILED" : "OK", static_cast<unsigned long long>(g_returned),
              static_cast<unsigned long long>(g_lost), static_cast<unsigned long long>(g_errors),
              static_cast<unsigned long long>(g_twice), static_cast<unsigned long long>(g_gap_us));
  reboot(LINUX_REBOOT_CMD_POWER_OFF);
  return 0;
}
