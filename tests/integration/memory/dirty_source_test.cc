// Dirty sources against child processes that write shared memory as VMMs do. Runs with whatever the kernel
// has: on a kernel with PAGEMAP_SCAN the userfaultfd source, inside a guest with Debian's 6.1 kernel
// soft-dirty.
#include "agent/memory/dirty_source.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "agent/memory/remote_thread.h"

namespace baton::memory {
namespace {

using testing::HasSubstr;

constexpr uint64_t kPages = 4096;

// What parent and child share beside the block.
struct Board {
  std::atomic<uint32_t> ready;
  std::atomic<uint32_t> stop;
  std::atomic<uint32_t> paused;
  std::atomic<uint64_t> writes;
  // What the calls that were interrupted returned in the end.
  std::atomic<int64_t> results[8];
};

// Words of the board that one process waits for and another sets: futexes of a shared mapping (std::atomic's
// own wait is for one process only).
void AwaitChange(std::atomic<uint32_t>& word, uint32_t from) {
  while (word == from) ::syscall(SYS_futex, &word, FUTEX_WAIT, from, nullptr, nullptr, 0);
}
void Set(std::atomic<uint32_t>& word, uint32_t value) {
  word = value;
  ::syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// A process with the block mapped, killed at the end.
class Child {
 public:
  explicit Child(const std::function<void(uint8_t* memory, Board& board)>& body) : ram_(MakeRam()) {
    board_ = static_cast<Board*>(
        ::mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    pid_ = ::fork();
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      // A mapping of its own, as a VMM has.
      void* memory =
          ::mmap(nullptr, kPages * kPageSize, PROT_READ | PROT_WRITE, MAP_SHARED, ram_.blocks()[0].fd(), 0);
      ::munmap(ram_.blocks()[0].base(), kPages * kPageSize);
      body(static_cast<uint8_t*>(memory), *board_);
      ::_exit(0);
    }
    while (board_->ready == 0) std::this_thread::yield();
  }
  ~Child() {
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    ::munmap(board_, sizeof(Board));
  }
  // Lets the body end by itself; true if the process then ended with status 0.
  bool Finish() {
    Set(board_->stop, 1);
    int status = -1;
    // A tracer's thread that was joined may still be on its way out of the kernel, which lets its tracee go
    // only then (exit_ptrace()): until then a stop is reported to every thread of the tracer's process.
    while (::waitpid(pid_, &status, 0) == pid_) {
      if (!WIFSTOPPED(status)) return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    return false;
  }
  pid_t pid() const { return pid_; }
  Board& board() { return *board_; }
  const GuestRam& ram() const { return ram_; }
  uint8_t* memory() const { return ram_.blocks()[0].base(); }

 private:
  static GuestRam MakeRam() {
    UniqueFd fd(::memfd_create("guest", MFD_CLOEXEC));
    EXPECT_EQ(::ftruncate(fd.get(), kPages * kPageSize), 0);
    std::vector<RamBlock> blocks;
    blocks.push_back(RamBlock::FromFd("ram", std::move(fd)).value());
    return GuestRam(std::move(blocks));
  }
  GuestRam ram_;
  Board* board_;
  pid_t pid_ = -1;
};

void WaitUntil(const std::function<bool()>& condition) {
  while (!condition()) std::this_thread::yield();
}

size_t OpenDescriptors(pid_t pid) {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/fd")) {
    (void)entry;
    ++count;
  }
  return count;
}

// Does nothing until it is told to end.
void Idle(uint8_t*, Board& board) {
  board.ready = 1;
  AwaitChange(board.stop, 0);
}

std::vector<std::string> Modes() {
  std::vector<std::string> modes;
  GuestRam none{{}};
  for (const char* mode : {"uffd", "soft-dirty"}) {
    if (MakeVmmDirtySource(::getpid(), none, mode).ok()) modes.push_back(mode);
  }
  return modes;
}

class DirtySourceTest : public testing::TestWithParam<std::string> {
 protected:
  static std::unique_ptr<DirtySource> Make(const Child& child) {
    auto source = MakeVmmDirtySource(child.pid(), child.ram(), GetParam());
    EXPECT_TRUE(source.ok()) << source.status();
    return std::move(source).value();
  }
};
// What this kernel has; the other one is tested on the other kernel.
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(DirtySourceTest);
INSTANTIATE_TEST_SUITE_P(Mode, DirtySourceTest, testing::ValuesIn(Modes()),
                         [](const auto& info) { return info.param == "uffd" ? "Uffd" : "SoftDirty"; });

TEST_P(DirtySourceTest, ReportsExactlyTheWrittenPages) {
  Child child([](uint8_t* memory, Board& board) {
    for (uint64_t page = 0; page < 1000; ++page) memory[page * kPageSize] = 1;
    board.ready = 1;
    // On order: a page that was there, one that was not, a run, and a page that is only read.
    WaitUntil([&] { return board.paused == 1; });
    memory[5 * kPageSize + 17] = 2;
    memory[2000 * kPageSize] = 2;
    for (uint64_t page = 3000; page < 3100; ++page) memory[page * kPageSize + 4095] = 2;
    board.results[0] = memory[100 * kPageSize];
    board.paused = 2;
    WaitUntil([&] { return board.stop == 1; });
  });
  auto source = Make(child);
  ASSERT_TRUE(source->Start().ok());
  PageSets none = child.ram().MakeSets();
  ASSERT_TRUE(source->Harvest(none).ok());
  EXPECT_EQ(none[0].Count(), 0u) << "nothing was written since Start";

  child.board().paused = 1;
  WaitUntil([&] { return child.board().paused == 2; });
  PageSets dirty = child.ram().MakeSets();
  ASSERT_TRUE(source->Harvest(dirty).ok());
  EXPECT_EQ(dirty[0].Count(), 102u);
  EXPECT_TRUE(dirty[0].Test(5));
  EXPECT_TRUE(dirty[0].Test(2000));
  EXPECT_EQ(dirty[0].NextRun(3000).count, 100u);
  EXPECT_FALSE(dirty[0].Test(100));

  PageSets again = child.ram().MakeSets();
  ASSERT_TRUE(source->Harvest(again).ok());
  EXPECT_EQ(again[0].Count(), 0u);
  source->Stop();
  source->Stop();
  EXPECT_TRUE(child.Finish());
}

// The property that migration rests on: copying what each harvest names keeps a copy that is complete once
// the writers stand still, whatever they did meanwhile.
TEST_P(DirtySourceTest, NoWriteIsLost) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    Child child([seed](uint8_t* memory, Board& board) {
      std::vector<std::thread> writers;
      for (uint64_t t = 0; t < 3; ++t) {
        writers.emplace_back([&, t] {
          std::mt19937_64 random(seed * 100 + t);
          while (board.stop == 0) {
            // Bursts in a small part and single writes anywhere.
            const uint64_t base = random() % (kPages - 64);
            for (int i = 0; i < 50; ++i) {
              const uint64_t page = random() % 4 == 0 ? random() % kPages : base + random() % 64;
              uint64_t value = random();
              std::memcpy(memory + page * kPageSize + random() % 512 * 8, &value, 8);
            }
            board.writes += 50;
          }
        });
      }
      board.ready = 1;
      for (auto& writer : writers) writer.join();
      board.paused = 1;
      AwaitChange(board.stop, 1);
    });
    auto source = Make(child);
    WaitUntil([&] { return child.board().writes > 1000; });
    ASSERT_TRUE(source->Start().ok());
    std::vector<uint8_t> copy(child.memory(), child.memory() + kPages * kPageSize);
    auto round = [&] {
      PageSets dirty = child.ram().MakeSets();
      absl::Status harvested = source->Harvest(dirty);
      ASSERT_TRUE(harvested.ok()) << harvested;
      for (auto run = dirty[0].NextRun(0); run.count != 0; run = dirty[0].NextRun(run.first + run.count)) {
        std::memcpy(&copy[run.first * kPageSize], child.memory() + run.first * kPageSize,
                    run.count * kPageSize);
      }
    };
    // Emulated processors are slow.
    const Deadline enough = Deadline::After(std::chrono::seconds(8));
    for (int i = 0; i < 40 && (i < 5 || !enough.Expired()); ++i) {
      const uint64_t before = child.board().writes;
      round();
      WaitUntil([&] { return child.board().writes > before + 500; });
    }
    child.board().stop = 1;
    WaitUntil([&] { return child.board().paused == 1; });
    round();
    EXPECT_EQ(std::memcmp(copy.data(), child.memory(), copy.size()), 0) << "seed " << seed;
    Set(child.board().stop, 2);
  }
}

TEST_P(DirtySourceTest, LeavesNothingInTheProcess) {
  Child child(Idle);
  const size_t before = OpenDescriptors(child.pid());
  for (int i = 0; i < 5; ++i) {
    auto source = Make(child);
    ASSERT_TRUE(source->Start().ok());
    EXPECT_EQ(OpenDescriptors(child.pid()), before);
    PageSets dirty = child.ram().MakeSets();
    ASSERT_TRUE(source->Harvest(dirty).ok());
  }
  EXPECT_TRUE(child.Finish());
}

// Threads that wait in all kinds of system calls go on waiting, and get the answer they would have got.
TEST_P(DirtySourceTest, ThreadsInSystemCalls_DoNotNotice) {
  for (int main_waits_in = 0; main_waits_in < 6; ++main_waits_in) {
    int pipes[6][2];
    for (auto& ends : pipes) ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
    Child child([&, main_waits_in](uint8_t* memory, Board& board) {
      std::mutex mutex;
      std::condition_variable condition;
      bool told = false;
      auto wait_in = [&](int which) {
        char byte = 0;
        board.ready += 1;
        switch (which) {
          case 0:
            board.results[0] = ::read(pipes[0][0], &byte, 1);
            break;
          case 1: {
            pollfd entry{pipes[1][0], POLLIN, 0};
            board.results[1] = ::poll(&entry, 1, 600'000);
            break;
          }
          case 2: {
            UniqueFd epoll(::epoll_create1(0));
            epoll_event event{EPOLLIN, {}};
            ::epoll_ctl(epoll.get(), EPOLL_CTL_ADD, pipes[2][0], &event);
            // epoll_wait(2) may fail with EINTR after any stop (signal(7)); every program must repeat it.
            int n;
            do n = ::epoll_wait(epoll.get(), &event, 1, -1);
            while (n < 0 && errno == EINTR);
            board.results[2] = n;
            break;
          }
          case 3: {
            timespec time{0, 700'000'000};
            auto start = Clock::now();
            board.results[3] =
                ::nanosleep(&time, nullptr) == 0 && Clock::now() - start >= std::chrono::milliseconds(700);
            break;
          }
          case 4: {
            std::unique_lock lock(mutex);
            board.results[4] = condition.wait_for(lock, std::chrono::seconds(600), [&] { return told; });
            break;
          }
          case 5:
            while (board.stop == 0) memory[123 * kPageSize] += 1;  // in no system call
            board.results[5] = 1;
            break;
        }
      };
      std::vector<std::thread> threads;
      for (int i = 0; i < 6; ++i) {
        if (i != main_waits_in) threads.emplace_back(wait_in, i);
      }
      std::thread teller([&] {
        char byte;
        ::read(pipes[4][0], &byte, 1);
        std::lock_guard lock(mutex);
        told = true;
        condition.notify_all();
      });
      wait_in(main_waits_in);
      for (auto& thread : threads) thread.join();
      teller.join();
    });
    WaitUntil([&] { return child.board().ready == 6; });
    for (int i = 0; i < 3; ++i) {
      auto source = Make(child);
      absl::Status started = source->Start();
      ASSERT_TRUE(started.ok()) << started;
      for (int j = 0; j < 3; ++j) {
        PageSets dirty = child.ram().MakeSets();
        ASSERT_TRUE(source->Harvest(dirty).ok());
      }
    }
    for (int i : {0, 1, 2, 4}) ASSERT_EQ(::write(pipes[i][1], "x", 1), 1);
    EXPECT_TRUE(child.Finish());
    for (int i = 0; i < 6; ++i)
      EXPECT_EQ(child.board().results[i], 1) << "call " << i << ", main in " << main_waits_in;
    for (auto& ends : pipes) ::close(ends[0]), ::close(ends[1]);
  }
}

TEST_P(DirtySourceTest, SignalsArriveAllTheSame) {
  static std::atomic<uint64_t>* handled;
  Child child([](uint8_t*, Board& board) {
    handled = &board.writes;
    struct sigaction action {};
    action.sa_handler = [](int) { ++*handled; };
    ::sigaction(SIGUSR1, &action, nullptr);
    board.ready = 1;
    AwaitChange(board.stop, 0);
  });
  uint64_t sent = 0;
  for (int i = 0; i < 20; ++i) {
    std::atomic<bool> stop{false};
    std::thread signaller([&] {
      while (!stop) {
        // One at a time, as a pending standard signal swallows the next.
        ::kill(child.pid(), SIGUSR1);
        ++sent;
        WaitUntil([&] { return child.board().writes >= sent; });
      }
    });
    auto source = Make(child);
    EXPECT_TRUE(source->Start().ok());
    PageSets dirty = child.ram().MakeSets();
    EXPECT_TRUE(source->Harvest(dirty).ok());
    stop = true;
    signaller.join();
  }
  EXPECT_EQ(child.board().writes, sent);
  EXPECT_TRUE(child.Finish());
}

TEST_P(DirtySourceTest, MemoryMappedAnew_CountsAsWritten) {
  Child child([](uint8_t* memory, Board& board) {
    memory[0] = 1;
    board.ready = 1;
    WaitUntil([&] { return board.paused == 1; });
    char path[64];
    std::snprintf(path, sizeof(path), "/proc/self/map_files/%lx-%lx", reinterpret_cast<unsigned long>(memory),
                  reinterpret_cast<unsigned long>(memory) + kPages * kPageSize);
    int fd = ::open(path, O_RDWR);
    void* other = ::mmap(nullptr, kPages * kPageSize, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (other != MAP_FAILED) static_cast<uint8_t*>(other)[9 * kPageSize] = 1;
    board.results[0] = other != MAP_FAILED;
    board.paused = 2;
    WaitUntil([&] { return board.paused == 3; });
    static_cast<uint8_t*>(other)[11 * kPageSize] = 1;
    memory[12 * kPageSize] = 1;
    board.paused = 4;
    WaitUntil([&] { return board.stop == 1; });
  });
  auto source = Make(child);
  ASSERT_TRUE(source->Start().ok());
  child.board().paused = 1;
  WaitUntil([&] { return child.board().paused == 2; });
  if (child.board().results[0] == 0) GTEST_SKIP() << "no /proc/self/map_files";
  PageSets dirty = child.ram().MakeSets();
  ASSERT_TRUE(source->Harvest(dirty).ok());
  EXPECT_EQ(dirty[0].Count(), kPages);
  child.board().paused = 3;
  WaitUntil([&] { return child.board().paused == 4; });
  PageSets both = child.ram().MakeSets();
  ASSERT_TRUE(source->Harvest(both).ok());
  EXPECT_EQ(both[0].Count(), 2u) << "both mappings are watched from then on";
  EXPECT_TRUE(both[0].Test(11));
  EXPECT_TRUE(both[0].Test(12));
}

TEST_P(DirtySourceTest, EndedProcess_IsAnErrorAndStopIsSafe) {
  auto child = std::make_unique<Child>(Idle);
  auto source = Make(*child);
  ASSERT_TRUE(source->Start().ok());
  ::kill(child->pid(), SIGKILL);
  siginfo_t info;
  ASSERT_EQ(::waitid(P_PID, static_cast<id_t>(child->pid()), &info, WEXITED | WNOWAIT), 0);
  PageSets dirty = child->ram().MakeSets();
  EXPECT_FALSE(source->Harvest(dirty).ok());
  source->Stop();
  absl::Status again = source->Start();
  EXPECT_FALSE(again.ok());
  EXPECT_EQ(ReasonOf(again), v1::DIRTY_TRACKING_UNAVAILABLE);
}

TEST_P(DirtySourceTest, BlockThatIsNotMapped_IsNamed) {
  Child child([](uint8_t* memory, Board& board) {
    ::munmap(memory, kPages * kPageSize);
    Idle(memory, board);
  });
  auto source = Make(child);
  absl::Status status = source->Start();
  EXPECT_EQ(ReasonOf(status), v1::DIRTY_TRACKING_UNAVAILABLE);
  EXPECT_THAT(Message(status), HasSubstr("RAM block ram"));
}

// Runs `body` in a process of its own, where it may give up privileges; it returns an empty string if all is
// well.
void InOtherProcess(const std::function<std::string()>& body) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const pid_t pid = ::fork();
  if (pid == 0) {
    const std::string text = body();
    (void)!::write(ends[1], text.data(), text.size());
    ::_exit(0);
  }
  ::close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = ::read(ends[0], buffer, sizeof(buffer))) > 0;)
    text.append(buffer, static_cast<size_t>(n));
  ::close(ends[0]);
  int status = -1;
  ::waitpid(pid, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(text, "");
}

std::string StartFails(const Child& child, const std::string& mode, const std::string& expected) {
  auto source = MakeVmmDirtySource(child.pid(), child.ram(), mode);
  absl::Status status = source.ok() ? (*source)->Start() : source.status();
  if (status.ok()) return "Start succeeded";
  if (ReasonOf(status) != v1::DIRTY_TRACKING_UNAVAILABLE) return "reason of " + status.ToString();
  if (Message(status).find(expected) == std::string::npos)
    return "no '" + expected + "' in " + status.ToString();
  return "";
}

TEST_P(DirtySourceTest, NoPtracePermission_IsNamed) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to give it up";
  Child child(Idle);
  const std::string mode = GetParam();
  InOtherProcess([&]() -> std::string {
    // /proc/PID/pagemap already asks for the permission.
    if (::setuid(65534) != 0) return "setuid";
    return StartFails(child, mode, "ermission");
  });
}

TEST_P(DirtySourceTest, OtherTracer_IsNamed) {
  Child child(Idle);
  const std::string mode = GetParam();
  absl::Status held = RunAsTracer([&]() -> absl::Status {
    ASSIGN_OR_RETURN(auto thread, RemoteThread::Stop(child.pid(), Deadline::After(std::chrono::seconds(30))));
    std::string problem = StartFails(child, mode, "ptrace attach");
    return problem.empty() ? absl::OkStatus() : absl::InternalError(problem);
  });
  EXPECT_TRUE(held.ok()) << held;
  EXPECT_TRUE(child.Finish());
}

// Installs a filter that answers one system call with an error, or kills.
bool FilterSyscall(int number, uint32_t action) {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<uint32_t>(number), 0, 1),
      BPF_STMT(BPF_RET | BPF_K, action),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  sock_fprog program{4, code};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

bool HaveUffd() {
  auto modes = Modes();
  return std::find(modes.begin(), modes.end(), "uffd") != modes.end();
}

TEST(UffdSource, VmmWithSeccompFilter_IsNotKilledByIt) {
  if (!HaveUffd()) GTEST_SKIP() << "this kernel has no uffd-wp-async";
  Child child([](uint8_t* memory, Board& board) {
    board.results[0] = FilterSyscall(SYS_userfaultfd, SECCOMP_RET_KILL_PROCESS);
    Idle(memory, board);
  });
  ASSERT_EQ(child.board().results[0], 1);
  auto source = MakeVmmDirtySource(child.pid(), child.ram(), "uffd");
  ASSERT_TRUE(source.ok());
  absl::Status started = (*source)->Start();
  // Where the kernel cannot suspend filters (CONFIG_CHECKPOINT_RESTORE) the source must refuse, not try.
  if (!started.ok()) {
    EXPECT_THAT(Message(started), HasSubstr("seccomp"));
  }
  EXPECT_EQ(::kill(child.pid(), 0), 0);
  EXPECT_TRUE(child.Finish());
}

// A process that may not call userfaultfd(2), with /dev/userfaultfd hidden.
TEST(UffdSource, MissingDevUserfaultfd_IsNamed) {
  if (!HaveUffd()) GTEST_SKIP() << "this kernel has no uffd-wp-async";
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, for a mount namespace";
  InOtherProcess([]() -> std::string {
    if (::unshare(CLONE_NEWNS) != 0 || ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0)
      return "unshare";
    if (::mount("none", "/dev", "tmpfs", 0, nullptr) != 0) return "hide /dev";
    if (!FilterSyscall(SYS_userfaultfd, SECCOMP_RET_ERRNO | EPERM)) return "filter";
    absl::Status status = MakeVmmDirtySource(::getpid(), GuestRam({}), "uffd").status();
    if (ReasonOf(status) != v1::DIRTY_TRACKING_UNAVAILABLE) return status.ToString();
    if (Message(status).find("/dev/userfaultfd") == std::string::npos) return status.ToString();
    return "";
  });
}

TEST(UffdSource, DeviceIsUsedWhereTheSystemCallIsForbidden) {
  if (!HaveUffd()) GTEST_SKIP() << "this kernel has no uffd-wp-async";
  if (::access("/dev/userfaultfd", R_OK | W_OK) != 0) GTEST_SKIP() << "no /dev/userfaultfd here";
  Child child([](uint8_t* memory, Board& board) {
    board.results[0] = FilterSyscall(SYS_userfaultfd, SECCOMP_RET_ERRNO | EPERM);
    Idle(memory, board);
  });
  ASSERT_EQ(child.board().results[0], 1);
  auto source = MakeVmmDirtySource(child.pid(), child.ram(), "uffd");
  ASSERT_TRUE(source.ok());
  absl::Status started = (*source)->Start();
  if (!started.ok()) {
    EXPECT_THAT(Message(started), HasSubstr("seccomp"));
  }
  EXPECT_TRUE(child.Finish());
}

TEST(RemoteThread, DeadlineBoundsAThreadThatCannotBeStopped) {
  // In vfork(2) a thread waits for its child in a way that only a fatal signal ends.
  Child child([](uint8_t*, Board& board) {
    Board* shared = &board;
    shared->ready = 1;
    if (::vfork() == 0) {
      while (shared->stop == 0) ::syscall(SYS_sched_yield);
      ::_exit(0);
    }
  });
  bool seen = false;
  for (int i = 0; i < 2000 && !seen; ++i) {
    absl::Status status = RunAsTracer([&]() -> absl::Status {
      return RemoteThread::Stop(child.pid(), Deadline::After(std::chrono::milliseconds(50))).status();
    });
    seen = status.code() == absl::StatusCode::kDeadlineExceeded;
  }
  EXPECT_TRUE(seen);
  EXPECT_TRUE(child.Finish()) << "and it is let go nevertheless";
}

TEST(RemoteThread, SystemCallsRunInTheThread) {
  Child child(Idle);
  absl::Status status = RunAsTracer([&]() -> absl::Status {
    ASSIGN_OR_RETURN(auto thread, RemoteThread::Stop(child.pid(), Deadline::After(std::chrono::seconds(30))));
    ASSIGN_OR_RETURN(int64_t pid, thread->Syscall(SYS_getpid, {}));
    EXPECT_EQ(pid, child.pid());
    ASSIGN_OR_RETURN(int64_t error, thread->Syscall(SYS_close, {123456}));
    EXPECT_EQ(error, -EBADF);
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_TRUE(child.Finish());
}

TEST(DirtyTracking, UnknownMode_IsRefused) {
  EXPECT_EQ(MakeVmmDirtySource(::getpid(), GuestRam({}), "guess").status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(DirtyTracking, AutoPicksWhatTheKernelHas) {
  auto modes = Modes();
  if (modes.empty()) GTEST_SKIP() << "neither uffd-wp-async nor soft-dirty here";
  auto probed = ProbeDirtyTracking();
  ASSERT_TRUE(probed.ok()) << probed.status();
  EXPECT_EQ(*probed, modes[0] == "uffd" ? "uffd-wp-async" : "soft-dirty");
  EXPECT_EQ((*MakeVmmDirtySource(::getpid(), GuestRam({}), "auto"))->name(), *probed);
  // Set by the test that runs this binary inside a guest with an old kernel.
  if (const char* expected = std::getenv("BATON_EXPECT_TRACKING")) {
    EXPECT_EQ(*probed, expected);
  }
}

}  // namespace
}  // namespace baton::memory
