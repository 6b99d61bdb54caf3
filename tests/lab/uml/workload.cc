// The workload of the User-Mode Linux guest, PID 1: threads write stamped 4 KiB blocks to /dev/vda with
// direct I/O, read them back and compare. Options on the kernel command line (lab.NAME=VALUE): threads (1),
// blocks (512, for each thread), report (writes between progress lines, 200). Commands on standard input, one
// letter: q stops, checks every block and prints RESULT, then powers off.
//
// With lab.balloon=1 it is the workload of memory.cc instead.
//
// Gaps are the longest time between two completed requests of one thread, by the guest's clock.
#include <fcntl.h>
#include <linux/reboot.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "memory.h"

namespace {

unsigned g_balloon = 0;
constexpr size_t kBlock = 4096;
constexpr unsigned kMaxThreads = 32;

unsigned g_threads = 1, g_blocks = 512, g_report = 200;
std::atomic<bool> g_stop{false};
std::atomic<uint64_t> g_writes{0}, g_errors{0}, g_gap_us{0};

struct Thread {
  unsigned number;
  pthread_t handle;
  uint64_t* sequence;  // last acknowledged stamp of each block
};

uint64_t Micros() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000 + static_cast<uint64_t>(now.tv_nsec) / 1000;
}

void Fill(uint64_t* block, uint64_t place, uint64_t sequence) {
  for (size_t i = 0; i < kBlock / 8; i += 2) {
    block[i] = place * 0x9e3779b97f4a7c15u ^ i;
    block[i + 1] = sequence;
  }
}

bool Check(int fd, uint64_t* buffer, uint64_t* expected, uint64_t place, uint64_t sequence) {
  if (pread(fd, buffer, kBlock, static_cast<off_t>(place * kBlock)) != static_cast<ssize_t>(kBlock)) {
    std::printf("ERROR read of block %llu: %s\n", static_cast<unsigned long long>(place),
                std::strerror(errno));
    return false;
  }
  Fill(expected, place, sequence);
  if (std::memcmp(buffer, expected, kBlock) == 0) return true;
  std::printf("ERROR block %llu holds stamp %llu instead of %llu\n", static_cast<unsigned long long>(place),
              static_cast<unsigned long long>(buffer[1]), static_cast<unsigned long long>(sequence));
  return false;
}

void NoteGap(uint64_t& last) {
  uint64_t now = Micros(), gap = now - last, seen = g_gap_us.load();
  last = now;
  while (gap > seen && !g_gap_us.compare_exchange_weak(seen, gap)) {
  }
}

void* Work(void* argument) {
  auto* self = static_cast<Thread*>(argument);
  int fd = open("/dev/vda", O_RDWR | O_DIRECT);
  if (fd < 0) {
    std::printf("ERROR /dev/vda: %s\n", std::strerror(errno));
    ++g_errors;
    return nullptr;
  }
  auto* buffer = static_cast<uint64_t*>(aligned_alloc(kBlock, kBlock));
  auto* expected = static_cast<uint64_t*>(aligned_alloc(kBlock, kBlock));
  uint64_t random = 88172645463325252u + self->number, last = Micros();
  for (uint64_t sequence = 1; !g_stop; ++sequence) {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    unsigned block = static_cast<unsigned>(random % g_blocks);
    uint64_t place = uint64_t{self->number} * g_blocks + block;
    if (self->sequence[block] && !Check(fd, buffer, expected, place, self->sequence[block])) ++g_errors;
    NoteGap(last);
    Fill(buffer, place, sequence);
    if (pwrite(fd, buffer, kBlock, static_cast<off_t>(place * kBlock)) != static_cast<ssize_t>(kBlock)) {
      std::printf("ERROR write of block %llu: %s\n", static_cast<unsigned long long>(place),
                  std::strerror(errno));
      ++g_errors;
    }
    NoteGap(last);
    self->sequence[block] = sequence;
    uint64_t done = ++g_writes;
    if (done % g_report == 0) {
      std::printf("PROGRESS writes=%llu gap_us=%llu errors=%llu\n", static_cast<unsigned long long>(done),
                  static_cast<unsigned long long>(g_gap_us.load()),
                  static_cast<unsigned long long>(g_errors.load()));
    }
  }
  for (unsigned block = 0; block < g_blocks; ++block) {
    if (self->sequence[block] &&
        !Check(fd, buffer, expected, uint64_t{self->number} * g_blocks + block, self->sequence[block])) {
      ++g_errors;
    }
  }
  close(fd);
  return nullptr;
}

void ReadOptions() {
  char line[4096] = {};
  if (FILE* f = std::fopen("/proc/cmdline", "r")) {
    if (!std::fgets(line, sizeof line, f)) line[0] = 0;
    std::fclose(f);
  }
  auto option = [&](const char* name, unsigned& value) {
    if (const char* at = std::strstr(line, name))
      value = static_cast<unsigned>(std::atoi(at + std::strlen(name)));
  };
  option("lab.threads=", g_threads);
  option("lab.blocks=", g_blocks);
  option("lab.report=", g_report);
  option("lab.balloon=", g_balloon);
  if (g_threads == 0 || g_threads > kMaxThreads) g_threads = 1;
}

bool LoadModule(const char* path) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  bool loaded = syscall(SYS_finit_module, fd, "", 0) == 0;
  close(fd);
  return loaded;
}

}  // namespace

int main() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  mount("proc", "/proc", "proc", 0, nullptr);
  mount("dev", "/dev", "devtmpfs", 0, nullptr);
  ReadOptions();
  if (g_balloon != 0) {
    if (!LoadModule("/virtio_balloon.ko")) std::printf("ERROR virtio_balloon.ko: %s\n", std::strerror(errno));
    RunMemoryWorkload();
    reboot(LINUX_REBOOT_CMD_POWER_OFF);
  }
  if (!LoadModule("/virtio_blk.ko")) std::printf("ERROR virtio_blk.ko: %s\n", std::strerror(errno));
  Thread threads[kMaxThreads];
  std::printf("STARTED\n");
  for (unsigned i = 0; i < g_threads; ++i) {
    threads[i] = {i, {}, static_cast<uint64_t*>(calloc(g_blocks, sizeof(uint64_t)))};
    pthread_create(&threads[i].handle, nullptr, Work, &threads[i]);
  }
  for (char c = 0; c != 'q';) {
    if (read(0, &c, 1) <= 0) break;
  }
  g_stop = true;
  for (unsigned i = 0; i < g_threads; ++i) pthread_join(threads[i].handle, nullptr);
  std::printf("RESULT %s writes=%llu errors=%llu gap_us=%llu\n", g_errors ? "FAILED" : "OK",
              static_cast<unsigned long long>(g_writes.load()),
              static_cast<unsigned long long>(g_errors.load()),
              static_cast<unsigned long long>(g_gap_us.load()));
  reboot(LINUX_REBOOT_CMD_POWER_OFF);
  return 0;
}
