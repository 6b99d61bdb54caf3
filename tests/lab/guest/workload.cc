// The workload of the lab guest: writes and reads back blocks of its disk, rewrites and checks pages of its
// memory, and measures how long it stood still. It runs as PID 1, without any library but libc, and talks on
// its console.
//
// Options, from the kernel command line (lab.NAME=VALUE):
//   disk      block device                                   /dev/vda
//   blocks    4 KiB blocks to use                            2048
//   writers   threads that write, each with its own region   2
//   delay_us  pause of a writer after each write             0
//   pages     memory pages to rewrite and check              4096
//   dirty     pages a second to rewrite                      1000
//   report    progress line every so many writes             500
//   tick_us   how often the clock is looked at; above 1000 stops are
//             not measured, and many guests share few processors   500
//   freed     bytes that the command f fills and frees       0
//
// Commands, one letter each: s status, r reset the gaps, q stop writing, check everything and print RESULT, g
// go on writing after q, f take memory, fill it and give it back (FREED), x power off. The power button
// powers off as well.
//
// Gaps are measured on CLOCK_MONOTONIC, and a guest's clocks stand still while its machine does. How long
// that was comes from the CMOS clock, whose seconds QEMU counts on the host's clock whether the guest runs or
// not: the time between two of its ticks, by the guest's own clock, is short by as much as the guest stood
// still. So
//   stop_us      longest stop of the machine that the guest's clock did not see (0: none)
//   gap_us       longest time without a completed I/O: the stop and, around it, what the guest's clock saw
//   cpu_gap_us   the same for a thread that only looks at the clock
#include <fcntl.h>
#include <linux/input.h>
#include <linux/reboot.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <termios.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <ctime>

#include "block_format.h"

namespace baton::lab {
namespace {

constexpr unsigned kMaxWriters = 64;
constexpr uint64_t kMillion = 1000000;

uint64_t MonotonicMicros() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * kMillion + now.tv_nsec / 1000;
}

void SleepMicros(uint64_t micros) {
  timespec pause{static_cast<time_t>(micros / kMillion), static_cast<long>(micros % kMillion * 1000)};
  nanosleep(&pause, nullptr);
}

// --- console ---

pthread_mutex_t console_mutex = PTHREAD_MUTEX_INITIALIZER;

__attribute__((format(printf, 1, 2))) void Say(const char* format, ...) {
  char line[1024];
  va_list args;
  va_start(args, format);
  int length = vsnprintf(line, sizeof(line) - 1, format, args);
  va_end(args);
  if (length < 0) return;
  if (length > static_cast<int>(sizeof(line)) - 2) length = sizeof(line) - 2;
  line[length++] = '\n';
  pthread_mutex_lock(&console_mutex);
  for (int done = 0; done < length;) {
    ssize_t n = write(STDOUT_FILENO, line + done, length - done);
    if (n <= 0) break;
    done += n;
  }
  pthread_mutex_unlock(&console_mutex);
}

// --- state ---

void StoreMax(std::atomic<uint64_t>& longest, uint64_t value) {
  uint64_t old = longest;
  while (value > old && !longest.compare_exchange_weak(old, value)) {
  }
}

// Longest time between two beats of any thread that shares it.
struct Gap {
  std::atomic<uint64_t> last{0};
  // Since the last reset, on the guest's clock; and with a stop of the machine added.
  std::atomic<uint64_t> longest{0}, with_stop{0};
  // Since the last tick of the CMOS clock.
  std::atomic<uint64_t> recent{0};

  void Beat() {
    uint64_t now = MonotonicMicros();
    uint64_t before = last.exchange(now);
    if (before == 0 || now <= before) return;
    StoreMax(longest, now - before);
    StoreMax(recent, now - before);
  }
  // A stop was seen between the last two ticks.
  void Stopped(uint64_t stop) { StoreMax(with_stop, stop + recent); }
  uint64_t Longest() const { return longest > with_stop ? longest : with_stop; }
  void Reset() {
    last = 0;
    longest = 0;
    with_stop = 0;
    recent = 0;
  }
};

struct Writer {
  uint64_t id, first, blocks;
  int fd;
  std::atomic<uint64_t> sequence{0}, reads{0};
  // Newest acknowledged write of each block of the region.
  uint64_t* expected;
  Block* buffer;
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
};

Writer writers[kMaxWriters];
uint64_t writer_count = 2, delay_us = 0, page_count = 4096, dirty_rate = 1000, report_every = 500,
         tick_us = 500, freed_bytes = 0;
std::atomic<uint64_t> errors{0}, memory_errors{0}, memory_writes{0}, total_writes{0};
std::atomic<bool> stopped{false};
uint64_t run;
Gap io_gap, cpu_gap;
std::atomic<uint64_t> longest_stop{0}, stops{0};
bool have_cmos = false;

uint64_t Option(const char* cmdline, const char* name, uint64_t fallback) {
  char key[64];
  snprintf(key, sizeof(key), "lab.%s=", name);
  const char* found = strstr(cmdline, key);
  return found ? strtoull(found + strlen(key), nullptr, 0) : fallback;
}

uint64_t NextRandom(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

// --- disk ---

void CheckAgain(Writer& writer, uint64_t block) {
  uint64_t number = writer.first + block;
  ssize_t n = pread(writer.fd, writer.buffer, kBlockSize, number * kBlockSize);
  if (n != static_cast<ssize_t>(kBlockSize)) {
    errors++;
    Say("ERROR read block %lu: %s", number, n < 0 ? strerror(errno) : "short");
    return;
  }
  writer.reads++;
  BlockState state = CheckBlock(*writer.buffer, run, writer.id, writer.expected[block], number);
  if (state != BlockState::kGood && state != BlockState::kNeverWritten) {
    errors++;
    Say("ERROR block %lu: %s (sequence %lu, expected %lu)", number, BlockStateName(state),
        writer.buffer->sequence, writer.expected[block]);
  }
}

void WriteOnce(Writer& writer, uint64_t& random) {
  uint64_t sequence = writer.sequence + 1;
  uint64_t block = BlockOf(sequence, writer.blocks), number = writer.first + block;
  FillBlock(*writer.buffer, run, writer.id, sequence, number);
  ssize_t n = pwrite(writer.fd, writer.buffer, kBlockSize, number * kBlockSize);
  if (n != static_cast<ssize_t>(kBlockSize)) {
    errors++;
    Say("ERROR write block %lu sequence %lu: %s", number, sequence, n < 0 ? strerror(errno) : "short");
    SleepMicros(100000);
    return;
  }
  writer.expected[block] = sequence;
  writer.sequence = sequence;
  io_gap.Beat();
  CheckAgain(writer, block);
  io_gap.Beat();
  CheckAgain(writer, NextRandom(random) % writer.blocks);
  io_gap.Beat();
  if (sequence % 64 == 0 && fdatasync(writer.fd) != 0) {
    errors++;
    Say("ERROR flush: %s", strerror(errno));
  }
  uint64_t total = ++total_writes;
  if (report_every && total % report_every == 0) Say("PROGRESS writes=%lu errors=%lu", total, errors.load());
}

void* RunWriter(void* argument) {
  Writer& writer = *static_cast<Writer*>(argument);
  uint64_t random = 0x853c49e6748fea9b + writer.id;
  for (;;) {
    if (stopped) {
      SleepMicros(1000);
      continue;
    }
    pthread_mutex_lock(&writer.mutex);
    if (!stopped) WriteOnce(writer, random);
    pthread_mutex_unlock(&writer.mutex);
    if (delay_us) SleepMicros(delay_us);
  }
}

// --- memory ---

constexpr size_t kWords = 4096 / sizeof(uint64_t);
uint64_t* memory_pages;
// Kept apart from the pages: a page that travelled late shows an older generation than this says.
uint32_t* generations;

uint64_t PageWord(uint64_t page, uint64_t generation, size_t word) {
  return (page << 40) ^ (generation * 0x9e3779b97f4a7c15) ^ word;
}

void CheckPage(uint64_t page) {
  const uint64_t* words = memory_pages + page * kWords;
  for (size_t i = 0; i < kWords; ++i) {
    if (words[i] == PageWord(page, generations[page], i)) continue;
    memory_errors++;
    Say("ERROR memory page %lu word %zu: %016lx, expected %016lx (generation %u)", page, i, words[i],
        PageWord(page, generations[page], i), generations[page]);
    return;
  }
}

void WritePage(uint64_t page) {
  uint64_t* words = memory_pages + page * kWords;
  ++generations[page];
  for (size_t i = 0; i < kWords; ++i) words[i] = PageWord(page, generations[page], i);
}

pthread_mutex_t memory_mutex = PTHREAD_MUTEX_INITIALIZER;

void* RunMemory(void*) {
  uint64_t random = 0xda3e39cb94b95bdb;
  uint64_t start = MonotonicMicros(), done = 0;
  for (;;) {
    uint64_t due = (MonotonicMicros() - start) * dirty_rate / kMillion;
    // Never catches up more than a tenth of a second, so that a long stop is not followed by a burst.
    if (due > done + dirty_rate / 10 + 1) {
      start = MonotonicMicros();
      done = 0;
      due = 1;
    }
    for (; done < due; ++done) {
      pthread_mutex_lock(&memory_mutex);
      uint64_t page = NextRandom(random) % page_count;
      CheckPage(page);
      WritePage(page);
      pthread_mutex_unlock(&memory_mutex);
      memory_writes++;
    }
    SleepMicros(dirty_rate < 100 ? 50000 : 5000);
  }
}

// --- clocks ---

// Follows the ticks of the CMOS clock; used by one thread.
class StopMeter {
 public:
  // Called often: a tick is located between two calls.
  void Look() {
    uint64_t before = MonotonicMicros();
    unsigned second = Second();
    uint64_t after = MonotonicMicros();
    if (second != second_) {
      // Located worse than this, it tells only where to look for the next one.
      if (second_ < 60 && before - seen_ <= kVague) Tick(second, before, before - seen_);
      second_ = second;
      rough_ = before;
    }
    seen_ = after;
  }
  // When the next tick is due on the guest's clock; 0 if that is not known.
  uint64_t Due() const { return rough_ ? rough_ + kMillion + drift_ : 0; }

 private:
  static constexpr int64_t kSharp = 150;
  static constexpr uint64_t kVague = 20000;
  static constexpr int64_t kSmallestStop = 800;

  static unsigned Second() {
    outb(0, 0x70);
    unsigned bcd = inb(0x71);
    return (bcd >> 4) * 10 + (bcd & 15);
  }

  // A tick that happened at most `error` before `now`.
  void Tick(unsigned second, uint64_t now, int64_t error) {
    if (tick_) {
      int64_t seconds = (second + 60 - tick_second_) % 60;
      int64_t stop = seconds * (static_cast<int64_t>(kMillion) + drift_) - static_cast<int64_t>(now - tick_);
      if (stop > kSmallestStop + error + tick_error_) {
        // A tick within a stop is seen at its end, and the next one tells of the rest.
        stopped_ += stop;
        stops++;
        StoreMax(longest_stop, stopped_);
        io_gap.Stopped(stop);
        cpu_gap.Stopped(stop);
      } else if (error > kSharp && tick_error_ <= kSharp) {
        // The better tick before stays the one to measure from.
        return;
      } else {
        stopped_ = 0;
        // The guest's idea of a second, corrected slowly.
        if (seconds > 0 && error <= kSharp && tick_error_ <= kSharp) drift_ += (-stop / seconds) / 4;
      }
    }
    io_gap.recent = 0;
    cpu_gap.recent = 0;
    tick_ = now;
    tick_error_ = error;
    tick_second_ = second;
  }

  unsigned second_ = 60, tick_second_ = 0;
  uint64_t seen_ = 0, tick_ = 0, rough_ = 0;
  int64_t drift_ = 0, tick_error_ = 0, stopped_ = 0;
};

void* RunTimer(void*) {
  constexpr uint64_t kEarly = 700;
  sched_param high{};
  high.sched_priority = 10;
  pthread_setschedparam(pthread_self(), SCHED_FIFO, &high);
  StopMeter meter;
  for (;;) {
    cpu_gap.Beat();
    if (have_cmos && tick_us <= 1000) {
      // Just around the tick there is no pause between two looks.
      uint64_t due = meter.Due(), now = MonotonicMicros();
      meter.Look();
      if (due && now + tick_us + kEarly > due && now < due + kEarly) {
        if (now + kEarly < due) SleepMicros(due - kEarly - now);
        while (meter.Due() == due && MonotonicMicros() < due + kEarly) meter.Look();
        continue;
      }
    }
    SleepMicros(tick_us);
  }
}

// --- commands ---

void PowerOff() {
  Say("POWEROFF");
  tcdrain(STDOUT_FILENO);
  sync();
  reboot(RB_POWER_OFF);
}

void* RunPowerButton(void*) {
  pollfd devices[8];
  int count = 0;
  for (int i = 0; i < 8; ++i) {
    char path[32];
    snprintf(path, sizeof(path), "/dev/input/event%d", i);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd >= 0) devices[count++] = {.fd = fd, .events = POLLIN, .revents = 0};
  }
  while (count > 0 && poll(devices, count, -1) > 0) {
    for (int i = 0; i < count; ++i) {
      input_event event;
      if (!devices[i].revents || read(devices[i].fd, &event, sizeof(event)) != sizeof(event)) continue;
      if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1) PowerOff();
    }
  }
  return nullptr;
}

// Answers so far; used by the thread that obeys.
uint64_t answers = 0;

void Status(const char* word) {
  uint64_t reads = 0;
  char counts[256] = "";
  size_t used = 0;
  for (uint64_t i = 0; i < writer_count; ++i) {
    reads += writers[i].reads;
    used += snprintf(counts + used, sizeof(counts) - used, "%s%lu", i ? "," : "", writers[i].sequence.load());
    if (used >= sizeof(counts)) break;
  }
  Say("%s n=%lu writes=%lu reads=%lu errors=%lu stops=%lu stop_us=%lu gap_us=%lu cpu_gap_us=%lu "
      "memory_writes=%lu "
      "memory_errors=%lu clock=%s run=%016lx region_blocks=%lu writers=%s",
      word, ++answers, total_writes.load(), reads, errors.load(), stops.load(), longest_stop.load(),
      io_gap.Longest(), cpu_gap.Longest(), memory_writes.load(), memory_errors.load(),
      have_cmos ? "cmos" : "guest", run, writers[0].blocks, counts);
}

void FinalCheck() {
  stopped = true;
  for (uint64_t i = 0; i < writer_count; ++i) {
    Writer& writer = writers[i];
    pthread_mutex_lock(&writer.mutex);
    for (uint64_t block = 0; block < writer.blocks; ++block) CheckAgain(writer, block);
    if (fdatasync(writer.fd) != 0) {
      errors++;
      Say("ERROR flush: %s", strerror(errno));
    }
    pthread_mutex_unlock(&writer.mutex);
  }
  pthread_mutex_lock(&memory_mutex);
  for (uint64_t page = 0; page < page_count; ++page) CheckPage(page);
  pthread_mutex_unlock(&memory_mutex);
  Status("RESULT");
}

void FillAndFree() {
  void* memory =
      mmap(nullptr, freed_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) {
    errors++;
    return Say("ERROR memory: %s", strerror(errno));
  }
  memset(memory, 0x5a, freed_bytes);
  munmap(memory, freed_bytes);
  Say("FREED n=%lu bytes=%lu", ++answers, freed_bytes);
}

void Obey(char command) {
  switch (command) {
    case 's':
      return Status("STATUS");
    case 'r':
      io_gap.Reset();
      cpu_gap.Reset();
      stops = 0;
      longest_stop = 0;
      return Say("RESET n=%lu", ++answers);
    case 'q':
      return FinalCheck();
    case 'g':
      io_gap.Reset();
      stopped = false;
      return Say("GO n=%lu", ++answers);
    case 'f':
      return FillAndFree();
    case 'x':
      return PowerOff();
    default:
      return;
  }
}

template <typename T>
T* Pages(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED) {
    Say("ERROR memory: %s", strerror(errno));
    PowerOff();
  }
  return static_cast<T*>(memory);
}

void Start(void* (*function)(void*), void* argument) {
  pthread_t thread;
  if (pthread_create(&thread, nullptr, function, argument) != 0) Say("ERROR cannot start a thread");
}

int Run() {
  char cmdline[4096] = "";
  if (FILE* file = fopen("/proc/cmdline", "re")) {
    if (!fgets(cmdline, sizeof(cmdline), file)) cmdline[0] = 0;
    fclose(file);
  }
  termios tty;
  if (tcgetattr(STDIN_FILENO, &tty) == 0) {
    cfmakeraw(&tty);
    tty.c_oflag |= OPOST | ONLCR;
    tcsetattr(STDIN_FILENO, TCSANOW, &tty);
  }
  have_cmos = iopl(3) == 0;
  if (getrandom(&run, sizeof(run), 0) != sizeof(run)) run = MonotonicMicros();

  char disk[64] = "/dev/vda";
  if (const char* found = strstr(cmdline, "lab.disk=")) sscanf(found, "lab.disk=%63s", disk);
  uint64_t blocks = Option(cmdline, "blocks", 2048);
  writer_count = Option(cmdline, "writers", writer_count);
  delay_us = Option(cmdline, "delay_us", delay_us);
  page_count = Option(cmdline, "pages", page_count);
  dirty_rate = Option(cmdline, "dirty", dirty_rate);
  freed_bytes = Option(cmdline, "freed", freed_bytes);
  report_every = Option(cmdline, "report", report_every);
  tick_us = Option(cmdline, "tick_us", tick_us);
  if (writer_count > kMaxWriters) writer_count = kMaxWriters;
  if (page_count == 0) page_count = 1;

  memory_pages = Pages<uint64_t>(page_count * 4096);
  generations = Pages<uint32_t>(page_count * sizeof(uint32_t));
  for (uint64_t page = 0; page < page_count; ++page) WritePage(page);

  for (uint64_t i = 0; i < writer_count; ++i) {
    Writer& writer = writers[i];
    writer.id = i;
    writer.blocks = blocks / writer_count;
    writer.first = i * writer.blocks;
    writer.expected = Pages<uint64_t>(writer.blocks * sizeof(uint64_t));
    writer.buffer = Pages<Block>(kBlockSize);
    writer.fd = open(disk, O_RDWR | O_DIRECT | O_CLOEXEC);
    if (writer.fd < 0) {
      errors++;
      Say("ERROR open %s: %s", disk, strerror(errno));
    }
  }
  Say("READY clock=%s disk=%s", have_cmos ? "cmos" : "guest", disk);
  for (uint64_t i = 0; i < writer_count; ++i) {
    if (writers[i].fd >= 0) Start(RunWriter, &writers[i]);
  }
  if (dirty_rate) Start(RunMemory, nullptr);
  Start(RunTimer, nullptr);
  Start(RunPowerButton, nullptr);

  for (;;) {
    pollfd ready{.fd = STDIN_FILENO, .events = POLLIN, .revents = 0};
    if (poll(&ready, 1, -1) < 0) continue;
    char command;
    if (read(STDIN_FILENO, &command, 1) == 1)
      Obey(command);
    else
      SleepMicros(100000);
  }
}

}  // namespace
}  // namespace baton::lab

int main() { return baton::lab::Run(); }
