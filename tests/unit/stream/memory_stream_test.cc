// Sender and receiver together, and the receiver against frames made by hand.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/stat.h>

#include <atomic>
#include <mutex>
#include <random>
#include <thread>

#include "agent/stream/memory_frame.h"
#include "agent/stream/memory_receiver.h"
#include "agent/stream/memory_sender.h"
#include "agent/stream/page_ops.h"
#include "agent/stream/wire.h"
#include "tests/unit/stream/stream_testing.h"

namespace baton::stream {
namespace {

using memory::GuestRam;
using memory::kPageSize;
using memory::PageSets;

#if defined(__SANITIZE_THREAD__)
constexpr bool kRacyWriter = false;  // it races on purpose
#else
constexpr bool kRacyWriter = true;
#endif

uint64_t AllocatedBytes(const memory::RamBlock& block) {
  struct stat st;
  EXPECT_EQ(::fstat(block.fd(), &st), 0);
  return static_cast<uint64_t>(st.st_blocks) * 512;
}

std::pair<UniqueFd, UniqueFd> TcpPair() {
  UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  EXPECT_EQ(::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), length), 0);
  EXPECT_EQ(::listen(listener.get(), 1), 0);
  EXPECT_EQ(::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &length), 0);
  UniqueFd a(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::connect(a.get(), reinterpret_cast<sockaddr*>(&address), length), 0);
  return {std::move(a), UniqueFd(::accept(listener.get(), nullptr, nullptr))};
}

// A sender and a receiver joined by `channels` connections.
struct Pipe {
  Pipe(const GuestRam& source, const GuestRam& destination, uint32_t channels, SenderOptions options = {},
       bool tcp = false) {
    ReceiverOptions receive;
    receive.channels = channels;
    receive.page_checksums = options.page_checksums;
    receiver = std::make_unique<MemoryReceiver>(destination, receive);
    std::vector<std::unique_ptr<Channel>> ends;
    for (uint32_t i = 1; i <= channels; ++i) {
      auto [a, b] = tcp ? TcpPair() : SocketPair();
      ends.push_back(MakePlainChannel(std::move(a)).value());
      EXPECT_TRUE(receiver->AddChannel(i, MakePlainChannel(std::move(b)).value()).ok());
    }
    sender = std::make_unique<MemorySender>(source, std::move(ends), options);
  }
  void Round(const PageSets& pages, RoundOptions options = {}) {
    absl::Status sent = sender->SendRound(pages, round++, options, Soon());
    ASSERT_TRUE(sent.ok()) << sent;
    absl::Status landed = receiver->WaitForFrames(sender->frames(), Soon());
    ASSERT_TRUE(landed.ok()) << landed;
  }
  std::unique_ptr<MemoryReceiver> receiver;
  std::unique_ptr<MemorySender> sender;
  uint32_t round = 0;
};

void ExpectEqual(const GuestRam& a, const GuestRam& b) {
  for (size_t i = 0; i < a.blocks().size(); ++i) {
    for (uint64_t page = 0; page < a.blocks()[i].pages(); ++page) {
      ASSERT_EQ(std::memcmp(a.blocks()[i].base() + page * kPageSize, b.blocks()[i].base() + page * kPageSize,
                            kPageSize),
                0)
          << "block " << i << " page " << page;
    }
  }
}

// A guest that writes while rounds are sent, with a perfect dirty tracker: the harvest is atomic with the
// writes, the sender reads whenever it likes.
class Guest {
 public:
  Guest(const GuestRam& ram, uint64_t seed) : ram_(ram), dirty_(ram.MakeSets()), random_(seed) {}
  void Write(int pages) {
    for (int i = 0; i < pages; ++i) {
      std::lock_guard lock(mutex_);
      const size_t block = random_() % ram_.blocks().size();
      const uint64_t page = random_() % ram_.blocks()[block].pages();
      uint8_t* at = ram_.blocks()[block].base() + page * kPageSize;
      dirty_[block].Set(page);
      switch (random_() % 4) {
        case 0:
          std::memset(at, 0, kPageSize);
          break;
        case 1:
          at[random_() % kPageSize] = static_cast<uint8_t>(random_());
          break;
        default:
          FillPage(at, random_());
      }
    }
  }
  PageSets Harvest() {
    std::lock_guard lock(mutex_);
    return std::exchange(dirty_, ram_.MakeSets());
  }

 private:
  const GuestRam& ram_;
  std::mutex mutex_;
  PageSets dirty_;
  std::mt19937_64 random_;
};

class MemoryStream : public testing::TestWithParam<int> {};

TEST_P(MemoryStream, ConcurrentWriter_DestinationEqualsSourceAtTheEnd) {
  const uint64_t seed = static_cast<uint64_t>(GetParam());
  std::mt19937_64 random(seed);
  GuestRam source = MemfdRam({1 + random() % 3000, 1 + random() % 1200});
  GuestRam destination = MemfdRam({source.blocks()[0].pages(), source.blocks()[1].pages()});
  Guest guest(source, seed);
  guest.Write(1000);
  SenderOptions options;
  options.frame_bytes = static_cast<uint32_t>((1 + random() % 300) * kPageSize);
  Pipe pipe(source, destination, static_cast<uint32_t>(1 + random() % 4), options);

  std::atomic<bool> stop{false};
  std::thread writer;
  if (kRacyWriter) {
    writer = std::thread([&] {
      while (!stop) guest.Write(20);
    });
  }
  guest.Harvest();
  PageSets first = source.MakeSets();
  for (size_t i = 0; i < first.size(); ++i) first[i] = *source.blocks()[i].Populated();
  pipe.Round(first);
  for (int i = 0; i < 6; ++i) {
    if (!kRacyWriter) guest.Write(500);
    pipe.Round(guest.Harvest(), {.skip_holes = i % 2 == 0});
  }
  stop = true;
  if (writer.joinable()) writer.join();
  pipe.Round(guest.Harvest());
  EXPECT_EQ(pipe.receiver->doubtful_pages(), 0u);
  ExpectEqual(source, destination);
  EXPECT_EQ(pipe.sender->remaining(), 0u);
  EXPECT_EQ(pipe.sender->counts().wire(), pipe.receiver->counts().wire());
  EXPECT_EQ(pipe.sender->counts().data(), pipe.receiver->counts().data());
  EXPECT_LE(pipe.sender->counts().resent(), pipe.sender->counts().data());
}
INSTANTIATE_TEST_SUITE_P(Seeds, MemoryStream, testing::Range(1, 13));

TEST(MemoryStreamStrategies, AllDeliverTheSameBytes) {
  for (const char* name : {"write", "sendfile", "zerocopy"}) {
    GuestRam source = MemfdRam({2000}), destination = MemfdRam({2000});
    for (uint64_t page = 0; page < 2000; page += 1 + page % 3)
      FillPage(source.blocks()[0].base() + page * kPageSize, page);
    SenderOptions options;
    options.strategy = *ParseSendStrategy(name);
    Pipe pipe(source, destination, 2, options, /*tcp=*/true);
    PageSets all = source.MakeSets();
    all[0].SetAll();
    pipe.Round(all);
    ExpectEqual(source, destination);
  }
  EXPECT_FALSE(ParseSendStrategy("rdma").ok());
}

TEST(MemoryStreamCounts, EveryPageIsOfOneKind) {
  GuestRam source = MemfdRam({2048}), destination = MemfdRam({2048});
  for (uint64_t page = 0; page < 100; ++page) FillPage(source.blocks()[0].base() + page * kPageSize, page);
  Pipe pipe(source, destination, 2);
  PageSets all = source.MakeSets();
  all[0].SetAll();
  pipe.Round(all);
  EXPECT_EQ(pipe.sender->counts().data(), 100 * kPageSize);
  EXPECT_EQ(pipe.sender->counts().zero(), 1948 * kPageSize);
  EXPECT_EQ(pipe.sender->counts().resent(), 0u);
  pipe.Round(all);
  EXPECT_EQ(pipe.sender->counts().resent(), 100 * kPageSize);
  EXPECT_GT(pipe.sender->counts().wire(), 200 * kPageSize);
}

TEST(MemoryStreamHoles, StayHolesOnBothSides) {
  GuestRam source = MemfdRam({2048}), destination = MemfdRam({2048});
  for (uint64_t page = 0; page < 1024; ++page) FillPage(source.blocks()[0].base() + page * kPageSize, page);
  Pipe pipe(source, destination, 2);
  PageSets pages = source.MakeSets();
  pages[0] = *source.blocks()[0].Populated();
  EXPECT_EQ(pages[0].Count(), 1024u);
  pipe.Round(pages);
  EXPECT_EQ(AllocatedBytes(destination.blocks()[0]), 1024 * kPageSize);

  // The balloon takes half of it. A tracker calls those pages dirty.
  ASSERT_EQ(
      ::fallocate(source.blocks()[0].fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 512 * kPageSize),
      0);
  pipe.Round(pages, {.skip_holes = true});
  EXPECT_EQ(AllocatedBytes(source.blocks()[0]), 512 * kPageSize) << "not allocated by looking at them";
  EXPECT_EQ(AllocatedBytes(destination.blocks()[0]), 512 * kPageSize);
  ExpectEqual(source, destination);
}

TEST(MemoryStreamZero, RunsOverDataBecomeZero) {
  GuestRam source = MemfdRam({600}), destination = MemfdRam({600});
  for (uint64_t page = 0; page < 600; ++page) FillPage(source.blocks()[0].base() + page * kPageSize, page);
  Pipe pipe(source, destination, 1);
  PageSets all = source.MakeSets();
  all[0].SetAll();
  pipe.Round(all);
  std::memset(source.blocks()[0].base() + 3 * kPageSize, 0, 2 * kPageSize);
  std::memset(source.blocks()[0].base() + 100 * kPageSize, 0, 300 * kPageSize);
  pipe.Round(all);
  ExpectEqual(source, destination);
}

TEST(MemorySender, Cancel_EndsARoundThatNobodyReads) {
  GuestRam source = MemfdRam({4096});
  for (uint64_t page = 0; page < 4096; ++page) FillPage(source.blocks()[0].base() + page * kPageSize, page);
  auto [a, b] = ChannelPair();
  std::vector<std::unique_ptr<Channel>> ends;
  ends.push_back(std::move(a));
  MemorySender sender(source, std::move(ends), {});
  PageSets all = source.MakeSets();
  all[0].SetAll();
  std::thread canceller([&, &b = b] {
    char byte;
    EXPECT_TRUE(b->Read(&byte, 1, Soon()).ok());  // it is under way
    sender.Cancel();
  });
  EXPECT_EQ(sender.SendRound(all, 0, {}, Soon()).code(), absl::StatusCode::kCancelled);
  canceller.join();
  EXPECT_EQ(sender.SendRound(all, 1, {}, Soon()).code(), absl::StatusCode::kCancelled);
  EXPECT_GT(sender.remaining(), 0u);
}

TEST(MemorySender, Bandwidth_IsKeptAndCanBeRaised) {
  GuestRam source = MemfdRam({1024}), destination = MemfdRam({1024});
  for (uint64_t page = 0; page < 1024; ++page) FillPage(source.blocks()[0].base() + page * kPageSize, page);
  SenderOptions options;
  options.bandwidth = 20 << 20;
  Pipe pipe(source, destination, 2, options);
  PageSets all = source.MakeSets();
  all[0].SetAll();
  auto start = Clock::now();
  pipe.Round(all);
  EXPECT_GE(Clock::now() - start, std::chrono::milliseconds(130))
      << "4 MiB at 20 MiB/s, less burst and last debt";
  pipe.sender->SetBandwidth(1024);
  std::thread raise([&] {
    while (pipe.sender->remaining() == 0) std::this_thread::yield();
    pipe.sender->SetBandwidth(0);
  });
  pipe.Round(all);
  raise.join();
}

TEST(MemorySender, WrongShape_IsRefused) {
  GuestRam source = MemfdRam({10});
  auto [a, b] = ChannelPair();
  std::vector<std::unique_ptr<Channel>> ends;
  ends.push_back(std::move(a));
  MemorySender sender(source, std::move(ends), {});
  EXPECT_EQ(sender.SendRound({}, 0, {}, Soon()).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(sender.SendRound(PageSets{memory::PageSet(11)}, 0, {}, Soon()).code(),
            absl::StatusCode::kInvalidArgument);
}

// --- the receiver against frames made by hand ---

struct Hand {
  Hand()
      : ram(MemfdRam({1024})),
        receiver(ram, {.channels = 1, .page_checksums = true}, [this](const absl::Status& s) {
          std::lock_guard lock(mutex);
          reported = s;
        }) {
    auto [a, b] = ChannelPair();
    peer = std::move(a);
    EXPECT_TRUE(receiver.AddChannel(1, std::move(b)).ok());
  }
  void Data(uint64_t first, const std::string& data, uint64_t xor_sum = 0) {
    FrameHeader header;
    header.type = FrameType::kData;
    header.flags = kFlagPageChecksums;
    header.offset = first * kPageSize;
    header.length = header.payload = static_cast<uint32_t>(data.size());
    std::string bytes(kFrameHeaderSize + header.pages() * 8, '\0');
    uint8_t* at = reinterpret_cast<uint8_t*>(bytes.data());
    EncodeFrameHeader(header, at);
    for (uint32_t i = 0; i < header.pages(); ++i) {
      StoreLe<uint64_t>(
          at + kFrameHeaderSize + i * 8,
          PageChecksum(reinterpret_cast<const uint8_t*>(data.data()) + i * kPageSize) ^ xor_sum);
    }
    bytes += data;
    ASSERT_TRUE(peer->Write(bytes.data(), bytes.size(), Soon()).ok());
  }
  void Run(FrameType type, uint64_t first, uint64_t count) {
    FrameHeader header;
    header.type = type;
    header.offset = first * kPageSize;
    header.length = static_cast<uint32_t>(count * kPageSize);
    FrameHeaderBytes bytes;
    EncodeFrameHeader(header, bytes.data());
    ASSERT_TRUE(peer->Write(bytes.data(), bytes.size(), Soon()).ok());
  }
  absl::Status Wait(uint64_t frames) { return receiver.WaitForFrames({frames}, Soon()); }

  GuestRam ram;
  std::mutex mutex;
  absl::Status reported;
  std::unique_ptr<Channel> peer;
  MemoryReceiver receiver;
};

TEST(MemoryReceiver, DamagedPage_IsDoubtfulUntilAGoodCopyComes) {
  Hand hand;
  const std::string data(3 * kPageSize, 'd');
  hand.Data(5, data, /*xor_sum=*/1);
  ASSERT_TRUE(hand.Wait(1).ok());
  EXPECT_EQ(hand.receiver.doubtful_pages(), 3u);
  EXPECT_TRUE(hand.receiver.doubtful()[0].Test(6));
  hand.Data(5, data.substr(0, kPageSize));
  hand.Run(FrameType::kZero, 6, 1);
  ASSERT_TRUE(hand.Wait(3).ok());
  EXPECT_EQ(hand.receiver.doubtful_pages(), 1u);
  hand.Data(7, data, 1);
  hand.Run(FrameType::kFree, 0, 10);
  ASSERT_TRUE(hand.Wait(5).ok());
  EXPECT_EQ(hand.receiver.doubtful_pages(), 0u);
}

TEST(MemoryReceiver, BadHeader_EndsWithOneReport) {
  Hand hand;
  std::string junk(kFrameHeaderSize, 'j');
  ASSERT_TRUE(hand.peer->Write(junk.data(), junk.size(), Soon()).ok());
  absl::Status status = hand.Wait(1);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(ReasonOf(status), v1::PEER_PROTOCOL_ERROR);
  hand.receiver.Stop();
  std::lock_guard lock(hand.mutex);
  EXPECT_EQ(hand.reported, status);
  EXPECT_EQ(hand.receiver.status(), status);
}

TEST(MemoryReceiver, EndInsideAFrame_IsAnErrorAndBetweenFramesIsNot) {
  {
    Hand hand;
    hand.Run(FrameType::kZero, 0, 1);
    hand.peer.reset();
    EXPECT_TRUE(hand.Wait(1).ok());
    EXPECT_EQ(hand.Wait(2).code(), absl::StatusCode::kUnavailable);
    EXPECT_TRUE(hand.receiver.status().ok());
  }
  {
    Hand hand;
    FrameHeader header;
    header.type = FrameType::kData;
    header.flags = kFlagPageChecksums;
    header.length = header.payload = 2 * kPageSize;
    std::string bytes(kFrameHeaderSize + 16 + kPageSize, '\0');
    EncodeFrameHeader(header, reinterpret_cast<uint8_t*>(bytes.data()));
    ASSERT_TRUE(hand.peer->Write(bytes.data(), bytes.size(), Soon()).ok());
    hand.peer.reset();
    EXPECT_EQ(hand.Wait(1).code(), absl::StatusCode::kDataLoss);
  }
}

TEST(MemoryReceiver, Misuse_IsRefused) {
  GuestRam ram = MemfdRam({16});
  MemoryReceiver receiver(ram, {.channels = 2, .page_checksums = true});
  auto [a, b] = ChannelPair();
  auto [c, d] = ChannelPair();
  auto [e, f] = ChannelPair();
  EXPECT_EQ(receiver.AddChannel(0, std::move(a)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(receiver.AddChannel(3, std::move(b)).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(receiver.AddChannel(1, std::move(c)).ok());
  EXPECT_EQ(receiver.AddChannel(1, std::move(f)).code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(receiver.WaitForFrames({0}, Soon()).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(receiver.WaitForFrames({1, 1}, Deadline::After(std::chrono::milliseconds(5))).code(),
            absl::StatusCode::kDeadlineExceeded);
  std::thread stopper([&] { receiver.Stop(); });
  EXPECT_FALSE(receiver.WaitForFrames({1, 1}, Soon()).ok());
  stopper.join();
  EXPECT_EQ(receiver.AddChannel(2, std::move(e)).code(), absl::StatusCode::kCancelled);
}

}  // namespace
}  // namespace baton::stream
