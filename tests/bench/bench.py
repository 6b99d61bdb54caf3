"""./dev bench: Baton beside what it is compared with, interleaved in one run, ratios at the end.

  blackout  longest gap inside the guest (256 MiB, one disk, writing all the time) when Baton moves it, and when QEMU
            moves the same guest between the same storage daemons
  memory    4 GiB of incompressible shared memory over plaintext loopback: Baton, a raw loop, QEMU
  idle      what a shim costs while its guest works
  order     completions put back into order (IN_ORDER, window of 256, one core) beside a plain walk over an array
  handoff   the blackout of a guest with 32 requests in flight on a disk that takes a second for each: handed off, drained,
            with an idle disk, and moved by QEMU itself
  stop      Baton's own time to stop a device of 64 queues with 256 requests in flight each, and to collect them
  libvirt   a libvirt domain moved between the same two daemons by virsh migrate and by Baton: time and blackout, small and
            large without TLS, small with TLS
  hints     8 GiB of memory (less where that does not fit), 1 GiB live, the rest dirtied and freed: moved with free page
            hints and without
"""
import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "e2e"))

# pylint: disable=wrong-import-position
from batonlab.cluster import Cluster, seconds, summary  # noqa: E402
from batonlab.lab import Lab, LabError, wait_until  # noqa: E402
import bench_libvirt  # noqa: E402
from qemu_pair import DirectGuest, QemuPair  # noqa: E402

# From <linux/prctl.h>.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CMDLINE = "lab.pages=4096 lab.dirty=1500"


def say(text=""):
    print(text, flush=True)


def row(name, values, unit="ms"):
    values = sorted(values)
    say(f"  {name:28} min {values[0]:8.1f}  median {statistics.median(values):8.1f}  max {values[-1]:8.1f} {unit}  "
        f"(n={len(values)})")


def settle(guest, timeout=30):
    """The guest's figures once its clock meter has seen the stop."""
    for _ in range(30):
        status = guest.status(timeout)
        if int(status["stops"]):
            return status
        guest.wait_writes(100)
    raise LabError("the guest noticed no stop")


class QemuGuest:
    """The same guest, moved by QEMU itself. QEMU 7.2 under TCG loses this guest at times: it never answers again after a
    migration that QEMU calls completed. Such a run counts as lost, and a fresh guest takes its place; the figures are of
    the runs that QEMU did well."""

    def __init__(self, cluster, cmdline=CMDLINE):
        self.cluster, self.migrations, self.lost, self.cmdline = cluster, 0, 0, cmdline
        self.start()

    def start(self):
        self.pair = QemuPair(self.cluster.lab, [agent.storage.second_socket for agent in self.cluster.agents.values()],
                             os.path.join(self.cluster.guest_dir, "vmlinuz"),
                             os.path.join(self.cluster.guest_dir, "initrd.gz"), cmdline=self.cmdline)
        self.guest = DirectGuest(self.cluster, self.pair)
        self.guest.wait_ready()
        self.guest.wait_writes(1)

    def freeze(self):
        self.pair.process.send_signal(signal.SIGSTOP)

    def measure(self):
        self.pair.process.send_signal(signal.SIGCONT)
        for _ in range(10):
            try:
                self.guest.wait_writes(300)
                self.guest.reset()
                self.guest.wait_writes(300)
                self.migrations += 1
                result = self.pair.migrate()
                return {**settle(self.guest, timeout=10), "reported": float(result.get("downtime", 0))}
            except LabError as error:
                self.lost += 1
                say(f"  QEMU lost its guest ({str(error).splitlines()[0][:100]})")
                self.pair.stop()
                self.start()
        raise LabError("QEMU lost its guest ten times in a row")


def blackout(lab, runs):
    with Cluster(lab, second_disk=True) as cluster:
        guest = cluster.start_guest("a", cmdline=CMDLINE)
        other = QemuGuest(cluster)
        figures = {"baton": [], "qemu": []}
        # One more than counted: the first of each warms up.
        for run in range(runs + 1):
            # Only the guest that is measured runs.
            other.freeze()
            guest.reset()
            guest.wait_writes(300)
            here = cluster.host_of()
            record = cluster.migrate("b" if here == "a" else "a")
            if record["phase"] != "SUCCEEDED":
                raise LabError(summary(record))
            status = settle(guest)
            down = record["progress"]["downtimes"]
            figures["baton"].append({**status, "reported": seconds(down.get("vcpu")) * 1000})
            vmm = cluster.lab.find("qemu-system", host=cluster.host_of())[0]
            vmm.kill(signal.SIGSTOP)
            figures["qemu"].append(other.measure())
            vmm.kill(signal.SIGCONT)
            guest.wait_writes(300)
            say(f"  run {run:2}: " + "  ".join(
                f"{name} gap {int(f[-1]['gap_us']) / 1000:7.1f} ms stop {int(f[-1]['stop_us']) / 1000:7.1f} ms reported "
                f"{f[-1]['reported']:6.1f}" for name, f in figures.items()))
        for f in figures.values():
            del f[0]
        other.freeze()
        _, sentence = guest.verify()
        other.pair.stop()
    say("blackout, inside the guest, as the longest gap between completed I/Os")
    medians = {}
    for name, f in figures.items():
        gaps = [int(status["gap_us"]) / 1000 for status in f]
        row(name, gaps)
        row(f"  {name}, machine stopped", [int(status["stop_us"]) / 1000 for status in f])
        row(f"  {name}, as it reports", [status["reported"] for status in f])
        medians[name] = statistics.median(gaps)
    say(f"  Baton: {sentence}")
    say(f"  QEMU: {other.lost} of {other.migrations} migrations left a guest that never answered again; they are in no figure")
    return [("blackout in the guest, Baton / QEMU 7.2 (at most 1.0)", medians["baton"] / medians["qemu"])]


def qemu_memory(lab, size_gib, channels, runs):
    """GiB/s of QEMU moving incompressible memory of a paused guest, warm files at both ends."""
    rates = []
    files = [os.path.join(lab.memory_dir, f"bench-{i}") for i in range(2)]
    os.makedirs(lab.memory_dir, exist_ok=True)
    for path in files:
        with open("/dev/urandom", "rb") as source, open(path, "wb") as target:
            block = source.read(1 << 20)
            for index in range(size_gib << 10):
                # Unlike every other page, and no run of zeroes: that is all that matters to QEMU.
                target.write(index.to_bytes(8, "little") + block[8:])
    pair = QemuPair(lab, None, memory=f"{size_gib}G", extra=["-S"], memory_files=files)
    for _ in range(runs):
        result = pair.migrate(["multifd"] if channels else [], channels)
        rates.append(size_gib / (result["total-time"] / 1000))
    pair.stop()
    for path in files:
        os.unlink(path)
    return rates


def memory(lab, runs):
    output = subprocess.run([lab.program("bench_stream"), "--tls", "--json", "--rounds", str(runs)], check=True,
                            stdout=subprocess.PIPE, text=True).stdout
    *table, figures = output.strip().splitlines()
    for line in table:
        say("  " + line)
    figures = json.loads(figures)
    ratios = [("memory, Baton / raw loop (at least 0.8)", figures["ratio"]),
              ("memory, Baton over TLS / OpenSSL alone", figures["tls_ratio"])]
    for name, channels in (("plain", None), ("multifd 2", 2)):
        rates = qemu_memory(lab, 4, channels, min(runs, 5) + 1)[1:]
        row(f"QEMU {name}", rates, "GiB/s")
        ratios.append((f"memory, Baton / QEMU 7.2 {name}", figures["baton_gib_s"] / statistics.median(rates)))
    return ratios


def idle(lab, runs):
    del runs
    with Cluster(lab) as cluster:
        guest = cluster.start_guest("a", cmdline=CMDLINE)
        shim = cluster.agents["a"].shims()[0]
        before, writes = usage(shim.pid), int(guest.status()["writes"])
        guest.wait_writes(2000)
        after, writes = usage(shim.pid), int(guest.status()["writes"]) - writes
        say("a shim while its guest works")
        say(f"  RssAnon                      {after['rss'] / 1048576:8.2f} MiB (limit 8)")
        say(f"  CPU during {writes} writes    {after['ticks'] - before['ticks']:8} ticks of 10 ms")
        say(f"  wake-ups during them         {after['switches'] - before['switches']:8} (kicks and calls pass it by)")
    return [("idle shim, RssAnon / 8 MiB (at most 1.0)", after["rss"] / (8 << 20)),
            ("idle shim, CPU seconds during them (at most 0.01)", (after["ticks"] - before["ticks"]) / 100)]


def handoff(lab, runs):
    """Three ways of moving the same guest, and QEMU's, one after the other in each run."""
    cmdline = "lab.pages=512 lab.dirty=200 lab.blocks=2048 lab.writers=32"
    slow, ways = {"latency_us": 1000000}, ("handoff", "drain", "idle")
    figures = {name: {"inside": [], "reported": []} for name in (*ways, "qemu")}

    def latency(disk=0, **settings):
        for agent in cluster.agents.values():
            agent.storage.set(disk, **settings)

    def stop_of(guest):
        """Milliseconds that the machine stood still, by its own account, whose second half may come with the next tick of
        its clock."""
        wait_until(lambda: int(guest.status()["stops"]), "the guest to notice its stop", 30, pause=0.2)
        time.sleep(1.2)
        return int(guest.status()["stop_us"]) / 1000

    def note(name, inside, reported):
        figures[name]["inside"].append(inside)
        figures[name]["reported"].append(reported)
        say(f"  {name:8} stopped {inside:7.1f} ms, reported {reported:7.1f} ms")

    with Cluster(lab, second_disk=True, lab_storage=[]) as cluster:
        guest = cluster.start_guest("a", cmdline=cmdline)
        other = QemuGuest(cluster, cmdline)
        for _ in range(min(runs, 5)):
            other.freeze()
            for way in ways:
                latency(latency_us=0)
                if way == "idle":
                    guest.verify(go_on=False)
                else:
                    latency(**slow)
                    guest.wait_writes(32)
                guest.reset()
                answer = "handoff" if way == "idle" else way
                record = cluster.migrate("b" if cluster.host_of() == "a" else "a",
                                         options=("--inflight", answer, "--drain-timeout", "20s"))
                if record["phase"] != "SUCCEEDED":
                    raise LabError(summary(record))
                moved = int(record["progress"].get("inflight_handed_off", 0))
                if (way == "handoff") != (moved >= 24):
                    raise LabError(f"{way}: {moved} requests handed off: {record['progress'].get('device_stops')}")
                note(way, stop_of(guest), seconds(record["progress"]["downtimes"]["vcpu"]) * 1000)
            guest.go()
            vmm = cluster.lab.find("qemu-system", host=cluster.host_of())[0]
            vmm.kill(signal.SIGSTOP)
            other.pair.process.send_signal(signal.SIGCONT)
            latency(disk=1, **slow)
            other.guest.wait_writes(32)
            other.guest.reset()
            result = other.pair.migrate()
            note("qemu", stop_of(other.guest), float(result.get("downtime", 0)))
            latency(disk=1, latency_us=0)
            vmm.kill(signal.SIGCONT)
        other.freeze()
        latency(latency_us=0)
        _, sentence = guest.verify()
        other.pair.stop()
    say("32 requests in flight, each for a second")
    for name, measured in figures.items():
        row(f"{name}, machine stopped", measured["inside"])
        row("  as reported", measured["reported"])
    say(f"  Baton: {sentence}")

    def ratio(a, b, where):
        return statistics.median(figures[a][where]) / statistics.median(figures[b][where])
    return [("handoff / drain, inside the guest (at most 0.05)", ratio("handoff", "drain", "inside")),
            ("handoff / drain, as reported (at most 0.05)", ratio("handoff", "drain", "reported")),
            ("handoff / idle disk, inside the guest (at most 2)", ratio("handoff", "idle", "inside")),
            ("handoff / idle disk, as reported (at most 2)", ratio("handoff", "idle", "reported")),
            ("handoff / QEMU 7.2, inside the guest", ratio("handoff", "qemu", "inside"))]


def stop(lab, runs):
    output = subprocess.run([lab.program("bench_stop"), "--json", "--runs", str(max(runs, 10))], check=True,
                            stdout=subprocess.PIPE, text=True).stdout
    *table, figures = output.strip().splitlines()
    for line in table:
        say("  " + line)
    figures = json.loads(figures)
    return [(f"stop and collect 64 x 256, {name}, ms (at most 1)", value) for name, value in figures.items()]


def available_gib():
    with open("/proc/meminfo", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) >> 20


def hints(lab, runs):
    """8 GiB of which 1 GiB is live; the rest was dirtied and freed. Without hints all of it is there twice: where there is
    not as much memory as that, a smaller guest of the same make."""
    available = available_gib()
    gib = next((size for size in (8, 4, 2) if 2 * size + 1 <= available), 1)
    say(f"  {gib} GiB of guest memory; {available} GiB are available")
    output = subprocess.run([lab.program("bench_hints"), "--gib", str(gib), "--rounds", str(min(runs, 3))], check=True,
                            stdout=subprocess.PIPE, text=True).stdout
    *table, figures = output.strip().splitlines()
    for line in table:
        say("  " + line)
    figures = json.loads(figures)
    return [("hints, bytes sent / bytes live (at most 1.1)", figures["bytes_ratio"]),
            ("hints, time with / without (at most 0.25)", figures["time_ratio"])]


def libvirt(lab, runs):
    return bench_libvirt.bench(lab, runs, say, row)


def usage(pid):
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    rss = switches = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/status", encoding="utf-8") as status:
            for line in status:
                if line.startswith("voluntary_ctxt_switches"):
                    switches += int(line.split()[1])
                if line.startswith("RssAnon"):
                    rss = int(line.split()[1]) * 1024
    return {"rss": rss, "ticks": int(fields[11]) + int(fields[12]), "switches": switches}


def order(lab, runs):
    del runs
    for line in subprocess.run([lab.program("bench_rings"), "--benchmark_counters_tabular=true"], check=True,
                               stdout=subprocess.PIPE, text=True).stdout.strip().splitlines():
        say("  " + line)
    output = subprocess.run([lab.program("bench_rings"), "--ratio"], check=True, stdout=subprocess.PIPE, text=True).stdout
    buffer, walk, ratio = (float(figure) for figure in output.split())
    say(f"  reorder buffer {buffer:.1f} million completions a second, array walk {walk:.1f}")
    return [("IN_ORDER buffer, completions a second / 20 million (at least 1)", buffer / 20),
            ("IN_ORDER buffer / array walk, time (at most 2, or the above)", ratio)]


BENCHMARKS = {"blackout": blackout, "memory": memory, "idle": idle, "order": order, "handoff": handoff,
              "stop": stop, "libvirt": libvirt, "hints": hints}


def reap():
    """Goes on in a child, while this process ends what the child's programs leave behind. libvirt asks every 200 ms whether a
    QEMU that it has ended is gone, and one that nobody has reaped is not. An init process does so at once; the first process
    of a container may do so seconds later, which would be most of a migration's time."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        return
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    while True:
        pid, status = os.wait()
        if pid == child:
            # Not sys.exit(): the lab's clean-up is the child's.
            os._exit(os.waitstatus_to_exitcode(status) & 0xff)


def main():
    reap()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", required=True, help="directory of the programs")
    parser.add_argument("--runs", type=int, default=10, help="measurements of each (default 10)")
    parser.add_argument("names", nargs="*", choices=[*BENCHMARKS, []], help="default: all")
    arguments = parser.parse_args()
    ratios = []
    for name in arguments.names or BENCHMARKS:
        say(f"== {name}")
        with Lab(os.path.join("bench", name), arguments.bin) as lab:
            ratios += BENCHMARKS[name](lab, arguments.runs)
    say("== ratios")
    for name, ratio in ratios:
        say(f"  {name:55} {ratio:6.2f}")


if __name__ == "__main__":
    main()
