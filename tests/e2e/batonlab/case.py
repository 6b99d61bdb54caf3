"""Base of the end-to-end tests: a cluster that the tests of a class share, made anew after a test that failed."""
import itertools
import os
import signal
import sys
import time
import unittest

from .cluster import Cluster, summary
from .lab import ROOT, Lab, LabError, wait_until

BIN = os.environ.get("BATON_BIN", "build/release/bin")


class ClusterTest(unittest.TestCase):
    # Seconds for one case, with making its cluster and booting its guest: some ten times what it takes.
    LIMIT = 300
    SECURE = False
    SMALL_DISKS = False
    # VMs are the lab guest, which starts in milliseconds, instead of QEMU with Linux.
    LAB_GUEST = False
    QEMU = None
    # QEMU of the specs, a key of QEMU.
    SPEC = {}
    STORAGE = "qemu-storage-daemon"
    # Options of the lab device; None: a storage daemon serves the disk.
    LAB_STORAGE = None
    # Guest options: enough memory traffic for several rounds, a disk that is never idle, and not so much of both that
    # the full check at the end of each case takes long.
    CMDLINE = "lab.pages=2048 lab.dirty=1500 lab.blocks=512"

    lab = None
    cluster = None
    guest = None
    maxDiff = None

    @classmethod
    def tearDownClass(cls):
        cls.drop_cluster()

    @classmethod
    def drop_cluster(cls, logs=None):
        """`logs`: where its logs are to be from then on."""
        if cls.lab is None:
            return
        lab, cls.lab, cls.cluster, cls.guest = cls.lab, None, None, None
        try:
            lab.close()
        finally:
            if logs:
                os.makedirs(os.path.dirname(logs), exist_ok=True)
                os.rename(lab.logs, logs)
        left = lab.leftovers()
        if left:
            raise AssertionError("left behind: " + ", ".join(left))

    @classmethod
    def make_cluster(cls):
        return Cluster(cls.lab, secure=cls.SECURE, qemu=cls.QEMU, storage_program=cls.STORAGE,
                       small_disks=cls.SMALL_DISKS, lab_storage=cls.LAB_STORAGE, lab_guest=cls.LAB_GUEST)

    def setUp(self):
        cls = type(self)
        if cls.lab is None:
            cls.lab = Lab(os.path.join("e2e", f"{cls.__name__}-{self._testMethodName}"), BIN)
            try:
                cls.cluster = cls.make_cluster()
                cls.cluster.__enter__()
            except BaseException:
                cls.drop_cluster(self.announce_logs())
                raise
        self.mark(f"--- {self._testMethodName} begins")

    def tearDown(self):
        self.mark(f"--- {self._testMethodName} ends")

    def run(self, result=None):
        bad = len(result.failures) + len(result.errors)
        start = time.monotonic()
        signal.signal(signal.SIGALRM, self.too_long)
        signal.alarm(self.LIMIT)
        try:
            result = super().run(result)
        finally:
            signal.alarm(0)
        print(f"    {self._testMethodName}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        cls = type(self)
        if len(result.failures) + len(result.errors) > bad and cls.lab is not None:
            print((result.failures + result.errors)[-1][1], file=sys.stderr)
            logs = self.announce_logs()
            self.show_complaints()
            # What a failed test left is no ground for the next one.
            cls.drop_cluster(logs)
        return result

    def too_long(self, number, frame):
        raise LabError(f"the case took longer than {self.LIMIT} s")

    def announce_logs(self):
        """Where the logs of this test are once its cluster is gone: under its own name, whichever test the cluster was made
        for, and where no other run puts any."""
        first = os.path.join(ROOT, "logs/e2e/failed", f"{type(self).__name__}-{self._testMethodName}")
        names = itertools.chain([first], (f"{first}-{number}" for number in itertools.count(2)))
        logs = next(name for name in names if not os.path.exists(name))
        print(f"logs of the failure: {logs}", file=sys.stderr, flush=True)
        return logs

    def show_complaints(self, most=12):
        """What the programs complained of during this test: where nobody can look at the logs, this is all there is."""
        cls = type(self)
        cls.lab.keep_logs()
        lines = []
        for name in sorted(os.listdir(cls.lab.logs)):
            with open(os.path.join(cls.lab.logs, name), encoding="utf-8", errors="replace") as log:
                text = log.read().rpartition(f"--- {self._testMethodName} begins")[2]
            lines += [f"{name}: {line}" for line in text.splitlines()
                      if " warning " in line or " error " in line or name.endswith("qemu.log")]
        print("\n".join(lines[-most:]), file=sys.stderr, flush=True)

    def mark(self, text):
        """Into the logs, so that one can tell which test a line belongs to."""
        cls = type(self)
        for name in os.listdir(cls.lab.logs):
            if name.endswith(".log"):
                with open(os.path.join(cls.lab.logs, name), "a", encoding="utf-8") as log:
                    log.write(text + "\n")

    def processes(self, program, host):
        """Those of that host whose program's name begins so."""
        return self.cluster.agents[host].find(program)

    # --- steps ---

    def have_guest(self, host=None):
        """A running guest, on `host` if that is given: the one there is (moved if needed), or a new one."""
        cls = type(self)
        if cls.guest is None:
            cls.guest = cls.cluster.start_guest(host or "a", cmdline=self.CMDLINE, **self.SPEC)
        elif host and cls.cluster.host_of() != host:
            self.move(host)
        return cls.guest

    def ends(self):
        """Where the guest is, and the other host."""
        host = self.cluster.host_of()
        return host, "b" if host == "a" else "a"

    def start_and_wait_at(self, side, point):
        """A migration whose shim of that side waits at a pause point; its name, and that side's host."""
        source, destination = self.ends()
        waiting = self.cluster.agents[source if side == "source" else destination]
        waiting.set_pause(point)
        name = self.cluster.migrate(destination, wait=False)["name"]
        wait_until(lambda: waiting.paused_at(point), lambda: f"pause point {point}; the migration is "
                   f"{summary(self.cluster.migration(name) or {})}", 60)
        return name, waiting

    def kill_shim(self):
        """Kills the guest's shim and waits until batond says that another one serves the guest and its devices."""
        (shim,) = self.cluster.agents[self.cluster.host_of()].shims()
        shim.end()

        def served():
            vm = self.cluster.vm() or {}
            devices = vm.get("devices") or []
            return (vm.get("state") == "RUNNING" and int(vm.get("shim_pid", 0)) not in (0, shim.pid) and devices
                    and all(device["state"] == "ACTIVE" for device in devices))
        wait_until(served, lambda: f"a new shim of vm1: {self.cluster.vm()}", 60, pause=0.2)

    def wait_device(self, wanted, what):
        """Waits until batond says so of the guest's first device: it hears of a change later than the guest."""
        wait_until(lambda: any(wanted(device) for device in (self.cluster.vm() or {}).get("devices", [])[:1]),
                   lambda: f"{what}: {self.cluster.vm()}", 60, pause=0.1)

    def lose_guest(self):
        """The guest is gone for good; the next test starts another one."""
        cls = type(self)
        cls.cluster.ctl("vm", "stop", "vm1", "--force", check=False)
        cls.guest = None

    def move(self, to, options=()):
        migration = self.cluster.migrate(to, options=options)
        self.assertEqual(migration["phase"], "SUCCEEDED", summary(migration))
        self.assertEqual(migration["guest_location"], "DESTINATION", summary(migration))
        self.assert_runs_only(to)
        return migration

    def assert_runs_only(self, host):
        """One guest, running, at `host`: its VMM is the only one, the other host holds nothing, it goes on writing, and
        batond knows it there."""
        other = "b" if host == "a" else "a"
        wait_until(lambda: not self.cluster.agents[other].holdings(), lambda: f"nothing of vm1 on host {other}, there is "
                   f"{self.cluster.agents[other].holdings()}", 60, pause=0.1)
        wait_until(lambda: (self.cluster.vm() or {}).get("state") == "RUNNING" and self.cluster.host_of() == host,
                   lambda: f"vm1 running on {host} by batond's account, which says {self.cluster.vm()}", 60, pause=0.1)
        agent = self.cluster.agents[host]
        self.assertEqual((len(agent.qemus("vm1")), len(agent.shims("vm1"))), (1, 1))
        self.guest.wait_writes(20)

    def assert_clean(self):
        """The guest's own full check, and the disk image from outside."""
        result, sentence = self.guest.verify()
        self.assertEqual((result["errors"], result["memory_errors"]), ("0", "0"), result["line"])
        self.assertIn("none lost, none repeated", sentence)
