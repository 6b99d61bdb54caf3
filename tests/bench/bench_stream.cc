// Memory throughput over loopback: Baton's sender and receiver beside the best loop of plain send(2) and
// recv(2) that moves the same bytes between the same two memfds over as many sockets; and Baton over TLS
// beside OpenSSL pumping the same bytes. Rounds are interleaved, the first is thrown away, every round's
// result is compared byte by byte.
//
//   bench_stream [--size-mib N] [--channels N] [--rounds N] [--zero-percent N] [--cold] [--tls]
//   [--strategies] [--frame-kib N] [--no-checksums] [--json]
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "agent/memory/guest_ram.h"
#include "agent/stream/channel.h"
#include "agent/stream/memory_receiver.h"
#include "agent/stream/memory_sender.h"
#include "common/clock.h"
#include "tests/temp_dir.h"

namespace baton {
namespace {

using memory::GuestRam;
using memory::kPageSize;
using memory::RamBlock;
using stream::Channel;

struct Options {
  uint64_t size_mib = 4096;
  uint32_t channels = 2;
  int rounds = 10;
  int zero_percent = 0;
  bool cold = false;
  bool tls = false;
  bool strategies = false;
  bool json = false;
  uint32_t frame_kib = 0;
  bool no_checksums = false;
};

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "bench_stream: %s\n", what.c_str());
  std::exit(1);
}
void Check(const absl::Status& status) {
  if (!status.ok()) Die(status.ToString());
}

RamBlock Memfd(uint64_t size) {
  UniqueFd fd(::memfd_create("bench", MFD_CLOEXEC));
  if (!fd || ::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) Die("memfd");
  auto block = RamBlock::FromFd("ram", std::move(fd));
  Check(block.status());
  return std::move(block).value();
}

GuestRam OneBlock(uint64_t size) {
  std::vector<RamBlock> blocks;
  blocks.push_back(Memfd(size));
  return GuestRam(std::move(blocks));
}

// Incompressible, the same in every run (splitmix64, seed 1), with zero pages strewn in.
void Fill(const RamBlock& block, int zero_percent) {
  uint64_t state = 1;
  auto next = [&state] {
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  };
  for (uint64_t page = 0; page < block.pages(); ++page) {
    uint8_t* at = block.base() + page * kPageSize;
    if (static_cast<int>(next() % 100) < zero_percent) {
      std::memset(at, 0, kPageSize);
      continue;
    }
    for (size_t i = 0; i < kPageSize; i += 8) {
      const uint64_t word = next();
      std::memcpy(at + i, &word, 8);
    }
  }
}

struct Sockets {
  std::vector<UniqueFd> source, destination;
};
Sockets Connect(uint32_t count) {
  Sockets sockets;
  UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  if (::bind(listener.get(), reinterpret_cast<sockaddr*>(&address), length) != 0 ||
      ::listen(listener.get(), 64) != 0 ||
      ::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &length) != 0) {
    Die("listen");
  }
  for (uint32_t i = 0; i < count; ++i) {
    UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), length) != 0) Die("connect");
    const int on = 1;
    ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    sockets.source.push_back(std::move(fd));
    sockets.destination.emplace_back(::accept(listener.get(), nullptr, nullptr));
  }
  return sockets;
}

// Certificates of a throw-away authority.
class Certificates {
 public:
  Certificates() {
    const std::string quiet = " >/dev/null 2>&1";
    const std::string ec = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2";
    if (std::system(("openssl req -x509 " + ec + " -subj /CN=bench -keyout " + dir_ / "key.pem" + " -out " +
                     dir_ / "cert.pem" + quiet)
                        .c_str()) != 0) {
      Die("openssl req failed");
    }
    auto context = stream::TlsContext::Load(dir_ / "cert.pem", dir_ / "cert.pem", dir_ / "key.pem");
    Check(context.status());
    context_ = *context;
  }
  std::shared_ptr<const stream::TlsContext> context() const { return context_; }

 private:
  test::TempDir dir_;
  std::shared_ptr<const stream::TlsContext> context_;
};

double CpuSeconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

struct Sample {
  double seconds;
  double cpu;
};

Sample Timed(const std::function<void()>& body) {
  const double cpu = CpuSeconds();
  const auto start = Clock::now();
  body();
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return {seconds, CpuSeconds() - cpu};
}

// Every thread moves the same pages that Baton's channel of that number would.
template <typename F>
void ForEachStripe(const RamBlock& block, uint32_t lane, uint32_t lanes, F body) {
  constexpr uint64_t kStripe = 2u << 20;
  for (uint64_t at = lane * kStripe; at < block.size(); at += lanes * kStripe) {
    body(at, std::min(kStripe, block.size() - at));
  }
}

Sample Raw(const RamBlock& from, const RamBlock& to, uint32_t lanes, size_t chunk) {
  Sockets sockets = Connect(lanes);
  return Timed([&] {
    std::vector<std::thread> threads;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      threads.emplace_back([&, lane] {
        ForEachStripe(from, lane, lanes, [&](uint64_t at, uint64_t size) {
          for (uint64_t done = 0; done < size;) {
            ssize_t n = ::send(sockets.source[lane].get(), from.base() + at + done,
                               std::min<uint64_t>(chunk, size - done), MSG_NOSIGNAL);
            if (n <= 0) Die("send");
            done += static_cast<uint64_t>(n);
          }
        });
      });
      threads.emplace_back([&, lane] {
        ForEachStripe(to, lane, lanes, [&](uint64_t at, uint64_t size) {
          for (uint64_t done = 0; done < size;) {
            ssize_t n = ::recv(sockets.destination[lane].get(), to.base() + at + done,
                               std::min<uint64_t>(chunk, size - done), MSG_WAITALL);
            if (n <= 0) Die("recv");
            done += static_cast<uint64_t>(n);
          }
        });
      });
    }
    for (auto& thread : threads) thread.join();
  });
}

// OpenSSL alone: SSL_write and SSL_read of the same pages, sockets blocking.
Sample RawTls(const RamBlock& from, const RamBlock& to, uint32_t lanes, const Certificates& certificates) {
  Sockets sockets = Connect(lanes);
  std::vector<SSL*> clients, servers;
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    clients.push_back(SSL_new(certificates.context()->get()));
    servers.push_back(SSL_new(certificates.context()->get()));
    SSL_set_fd(clients[lane], sockets.source[lane].get());
    SSL_set_fd(servers[lane], sockets.destination[lane].get());
    std::thread server([&] {
      if (SSL_accept(servers[lane]) != 1) Die("SSL_accept");
    });
    if (SSL_connect(clients[lane]) != 1) Die("SSL_connect");
    server.join();
  }
  Sample sample = Timed([&] {
    std::vector<std::thread> threads;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      threads.emplace_back([&, lane] {
        ForEachStripe(from, lane, lanes, [&](uint64_t at, uint64_t size) {
          for (size_t done = 0, n = 0; done < size; done += n) {
            if (SSL_write_ex(clients[lane], from.base() + at + done, size - done, &n) != 1) Die("SSL_write");
          }
        });
      });
      threads.emplace_back([&, lane] {
        ForEachStripe(to, lane, lanes, [&](uint64_t at, uint64_t size) {
          for (size_t done = 0, n = 0; done < size; done += n) {
            if (SSL_read_ex(servers[lane], to.base() + at + done, size - done, &n) != 1) Die("SSL_read");
          }
        });
      });
    }
    for (auto& thread : threads) thread.join();
  });
  for (SSL* ssl : clients) SSL_free(ssl);
  for (SSL* ssl : servers) SSL_free(ssl);
  return sample;
}

Sample Baton(const GuestRam& from, const GuestRam& to, const Options& bench, stream::SendStrategy strategy,
             const Certificates* certificates) {
  const uint32_t lanes = bench.channels;
  Sockets sockets = Connect(lanes);
  const Deadline deadline = Deadline::After(std::chrono::minutes(5));
  stream::SenderOptions options;
  options.strategy = strategy;
  options.page_checksums = certificates == nullptr && !bench.no_checksums;
  if (bench.frame_kib != 0) options.frame_bytes = bench.frame_kib << 10;
  stream::MemoryReceiver receiver(to, {.channels = lanes, .page_checksums = options.page_checksums});
  std::vector<std::unique_ptr<Channel>> channels;
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    absl::StatusOr<std::unique_ptr<Channel>> source = absl::UnknownError(""),
                                             destination = absl::UnknownError("");
    if (certificates == nullptr) {
      source = stream::MakePlainChannel(std::move(sockets.source[lane]));
      destination = stream::MakePlainChannel(std::move(sockets.destination[lane]));
    } else {
      std::thread server([&] {
        destination = stream::MakeTlsChannel(std::move(sockets.destination[lane]), certificates->context(),
                                             stream::TlsRole::kServer, "", deadline);
      });
      source = stream::MakeTlsChannel(std::move(sockets.source[lane]), certificates->context(),
                                      stream::TlsRole::kClient, "", deadline);
      server.join();
    }
    Check(source.status());
    Check(destination.status());
    Check(receiver.AddChannel(lane + 1, std::move(destination).value()));
    channels.push_back(std::move(source).value());
  }
  stream::MemorySender sender(from, std::move(channels), options);
  memory::PageSets all = from.MakeSets();
  all[0].SetAll();
  Sample sample = Timed([&] {
    Check(sender.SendRound(all, 0, {}, deadline));
    Check(receiver.WaitForFrames(sender.frames(), deadline));
  });
  if (receiver.doubtful_pages() != 0) Die("doubtful pages on a guest that stands still");
  return sample;
}

class Bench {
 public:
  explicit Bench(const Options& options)
      : options_(options), from_(OneBlock(options.size_mib << 20)), to_(OneBlock(options.size_mib << 20)) {
    Fill(from_.blocks()[0], options.zero_percent);
    std::memset(to_.blocks()[0].base(), 1, to_.blocks()[0].size());
    if (options.tls) certificates_ = std::make_unique<Certificates>();
  }

  int Run() {
    const RamBlock& from = from_.blocks()[0];
    const RamBlock& to = to_.blocks()[0];
    using stream::SendStrategy;
    const uint32_t lanes = options_.channels;
    std::vector<std::pair<std::string, std::function<Sample()>>> entries;
    // The best of these is the limit that Baton is measured against.
    for (size_t chunk : {size_t{256} << 10, size_t{512} << 10, size_t{1} << 20}) {
      entries.push_back({"raw-" + std::to_string(chunk >> 10) + "k",
                         [=, &from, &to] { return Raw(from, to, lanes, chunk); }});
    }
    entries.push_back({"baton", [&] { return Baton(from_, to_, options_, SendStrategy::kWrite, nullptr); }});
    if (options_.strategies) {
      entries.push_back(
          {"baton-sendfile", [&] { return Baton(from_, to_, options_, SendStrategy::kSendfile, nullptr); }});
      entries.push_back(
          {"baton-zerocopy", [&] { return Baton(from_, to_, options_, SendStrategy::kZeroCopy, nullptr); }});
    }
    if (options_.tls) {
      entries.push_back({"openssl", [&] { return RawTls(from, to, lanes, *certificates_); }});
      entries.push_back({"baton-tls", [&] {
                           return Baton(from_, to_, options_, SendStrategy::kWrite, certificates_.get());
                         }});
    }
    for (int round = 0; round <= options_.rounds; ++round) {
      for (auto& [name, run] : entries) {
        Prepare();
        const Sample sample = run();
        if (std::memcmp(from.base(), to.base(), from.size()) != 0) Die(name + ": the destination differs");
        if (round > 0) samples_[name].push_back(sample);
      }
    }
    std::vector<std::string> names;
    for (auto& entry : entries) names.push_back(entry.first);
    return Report(names);
  }

 private:
  // Nothing of the last run is left to compare equal by chance; the memory stays warm unless it is to be
  // cold.
  void Prepare() {
    const RamBlock& to = to_.blocks()[0];
    if (options_.cold) {
      if (::fallocate(to.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0,
                      static_cast<off_t>(to.size())) != 0) {
        Die("punch hole");
      }
      return;
    }
    for (uint64_t page = 0; page < to.pages(); ++page) to.base()[page * kPageSize] ^= 0x5a;
  }

  double Rate(double seconds) const { return static_cast<double>(options_.size_mib) / 1024 / seconds; }
  static double Median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values[values.size() / 2];
  }
  double MedianRate(const std::string& name) {
    std::vector<double> rates;
    for (const Sample& s : samples_[name]) rates.push_back(Rate(s.seconds));
    return Median(rates);
  }

  int Report(const std::vector<std::string>& names) {
    std::printf("%llu MiB, %u sockets, %d rounds, %d%% zero pages, destination %s\n",
                static_cast<unsigned long long>(options_.size_mib), options_.channels, options_.rounds,
                options_.zero_percent, options_.cold ? "cold" : "warm");
    std::printf("%-16s %10s %10s %10s %12s\n", "GiB/s", "min", "median", "max", "CPU-s/GiB");
    std::string best_raw;
    for (const std::string& name : names) {
      std::vector<double> rates, cpu;
      for (const Sample& s : samples_[name]) {
        rates.push_back(Rate(s.seconds));
        cpu.push_back(s.cpu / (static_cast<double>(options_.size_mib) / 1024));
      }
      std::printf("%-16s %10.2f %10.2f %10.2f %12.3f\n", name.c_str(),
                  *std::min_element(rates.begin(), rates.end()), Median(rates),
                  *std::max_element(rates.begin(), rates.end()), Median(cpu));
      if (name.rfind("raw-", 0) == 0 && (best_raw.empty() || MedianRate(name) > MedianRate(best_raw)))
        best_raw = name;
    }
    const double ratio = MedianRate("baton") / MedianRate(best_raw);
    std::printf("baton / %s: %.2f\n", best_raw.c_str(), ratio);
    if (options_.tls)
      std::printf("baton-tls / openssl: %.2f\n", MedianRate("baton-tls") / MedianRate("openssl"));
    if (options_.json) {
      std::printf("{\"baton_gib_s\": %.3f, \"raw_gib_s\": %.3f, \"ratio\": %.3f", MedianRate("baton"),
                  MedianRate(best_raw), ratio);
      if (options_.tls) {
        std::printf(", \"baton_tls_gib_s\": %.3f, \"openssl_gib_s\": %.3f, \"tls_ratio\": %.3f",
                    MedianRate("baton-tls"), MedianRate("openssl"),
                    MedianRate("baton-tls") / MedianRate("openssl"));
      }
      std::printf("}\n");
    }
    return 0;
  }

  const Options options_;
  GuestRam from_;
  GuestRam to_;
  std::unique_ptr<Certificates> certificates_;
  std::map<std::string, std::vector<Sample>> samples_;
};

}  // namespace
}  // namespace baton

int main(int argc, char** argv) {
  baton::Options options;
  CLI::App app("memory throughput beside plain sockets and beside OpenSSL");
  app.add_option("--size-mib", options.size_mib, "guest memory")->check(CLI::Range(1, 1 << 20));
  app.add_option("--channels", options.channels, "sockets")->check(CLI::Range(1, 64));
  app.add_option("--rounds", options.rounds, "measured rounds")->check(CLI::Range(1, 1000));
  app.add_option("--zero-percent", options.zero_percent, "share of zero pages")->check(CLI::Range(0, 100));
  app.add_flag("--cold", options.cold, "destination memory not allocated yet");
  app.add_flag("--tls", options.tls, "also over TLS, beside OpenSSL");
  app.add_flag("--strategies", options.strategies, "also sendfile and MSG_ZEROCOPY");
  app.add_option("--frame-kib", options.frame_kib, "guest memory in a frame (default: the product's)")
      ->check(CLI::Range(4, 2048));
  app.add_flag("--no-checksums", options.no_checksums,
               "plaintext without page checksums, to see what they cost");
  app.add_flag("--json", options.json, "a last line for programs");
  CLI11_PARSE(app, argc, argv);
  return baton::Bench(options).Run();
}
