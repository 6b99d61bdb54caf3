"""What QEMU can do while libvirt moves a domain, each with a guest that verifies itself: post-copy and its recovery,
compression, auto-converge."""
import re
import select
import sys
import unittest

from batonlab.cluster import summary
from batonlab.faults import FaultSteps
from batonlab.lab import wait_until
from batonlab.libvirt import APART
from batonlab.libvirt_case import SLOW, VM, LibvirtTest


class ModesTest(LibvirtTest):
    """With libvirt 11.3 and QEMU 10.0 at both ends: QEMU 7.2 loses what a busy guest under TCG writes, see
    test_libvirt.py."""

    BACKPORTS = {"a": "libvirt", "b": "libvirt"}


class PostCopy(ModesTest):
    # Writes more than the bandwidth lets through: pre-copy alone would never end.
    CMDLINE = "lab.pages=8192 lab.dirty=4000 lab.blocks=256"
    OPTIONS = ("--post-copy", "--on-stall", "postcopy", "--bandwidth", "8MiB", "--max-downtime", "50ms")

    def begin_postcopy(self):
        self.source, self.destination = self.ends()
        self.held = []
        name = self.migrate(self.destination, wait=False, options=self.OPTIONS)["name"]
        wait_until(lambda: self.cluster.migration(name)["phase"] not in ("QUEUED", "PREPARING", "PRECOPY"),
                   lambda: f"post-copy of {self.describe(name)}", 90, pause=0.02)
        self.assertEqual(self.cluster.migration(name)["phase"], "POSTCOPY", self.describe(name))
        # Before the guest runs there, QEMU still sends its state. A QEMU 10.0 that loses its connection then takes the guest
        # up again at the source, without its disks, and ends (an assertion in its block layer).
        self.wait_state(self.destination, "running (post-copy)", name)
        return name

    def finish(self, name):
        ended = self.cluster.wait_ended(name)
        self.assertEqual((ended["phase"], ended["guest_location"]), ("SUCCEEDED", "DESTINATION"), summary(ended))
        self.assert_runs_only(self.destination)
        self.assertIn("POSTCOPY", [time["phase"] for time in ended["phase_times"]])
        self.assert_clean()
        return ended

    def test_a_guest_that_writes_too_fast_is_moved_all_the_same(self):
        self.have_guest()
        name = self.begin_postcopy()
        # The limit that was given holds for post-copy as well, and can be lifted.
        self.cluster.ctl("retune", name.split("/")[1], "--bandwidth", "unlimited")
        ended = self.finish(name)
        self.assertIn("postcopy", [decision["action"] for decision in ended["progress"]["decisions"]])


class Recovery(PostCopy):
    """Post-copy that loses its connection. With libvirt 9.0 and QEMU 10.0: the libvirtd of 11.3 ends when it is asked to
    recover at the destination (qemuProcessIncomingDefNew reads through a null pointer).

    The domain's devices have a thread of their own. QEMU's main thread would wait for a page that a device needs, for ever
    where nothing brings it, and libvirt cannot recover a QEMU that does not answer."""

    BACKPORTS = {"a": "qemu", "b": "qemu"}
    DOMAIN = APART
    # The disk has pauses: QEMU 10.0 may lose the end of requests that a disk with an <iothread> has in flight when the guest
    # is stopped, until its next request (docs/libvirt.md). The pages that are missing are those of memory, which is written
    # to without pause.
    CMDLINE = PostCopy.CMDLINE + " lab.delay_us=10000"
    OPTIONS = (*PostCopy.OPTIONS, "--max-stalled-rounds", "2")

    test_a_guest_that_writes_too_fast_is_moved_all_the_same = None

    def remaining(self):
        """Bytes of the guest that the destination has not got yet, by libvirt's account at the source."""
        info = self.cluster.hosts[self.source].virsh("domjobinfo", VM, check=False).stdout
        found = re.search(r"Memory remaining:\s+([\d.]+) (B|KiB|MiB|GiB)", info)
        return float(found[1]) * 1024 ** ("B", "KiB", "MiB", "GiB").index(found[2]) if found else None

    def cut(self):
        """Ends the connections between the hosts, and nothing else."""
        listen = self.cluster.agents[self.destination].settings["peer"]["listen"]
        self.cluster.network.reset(listen.rsplit(":", 1)[1], self.source, self.destination)

    def cut_with_memory_left(self):
        """The same while the source has memory left to send: a QEMU 10.0 that loses its connections with the last of it starts the
        guest again at the source, without its disks (migration_completion), and ends. Nothing is sent while that is looked for."""
        self.hold("baton-shim", self.source)
        self.assertTrue(self.remaining(), "the source has nothing left to send")
        self.cut()
        self.let_go("baton-shim", self.source)

    def finish(self, name):
        ended = super().finish(name)
        return [decision["action"] for decision in ended["progress"]["decisions"]].count("recover")

    def begin_postcopy(self):
        """Until the guest has answered at the destination: an interrupt whose handler needs a page that cannot come would stop
        QEMU's main thread as well, where there is no KVM. What a guest needs for that it has by then."""
        name = super().begin_postcopy()
        # What the guest waits for comes at once all the same.
        self.cluster.ctl("retune", name.split("/")[1], "--bandwidth", "1MiB")
        self.guest.wait_ready()
        return name

    def assert_waits_for_pages(self, name):
        self.assertEqual(self.cluster.states(VM), {self.source: "paused (post-copy)",
                                                   self.destination: "running (post-copy)"}, self.describe(name))

    def test_the_connections_are_cut_when_the_guest_answers_at_the_destination(self):
        self.have_guest()
        name = self.begin_postcopy()
        self.assert_waits_for_pages(name)
        self.cut_with_memory_left()
        self.assertGreaterEqual(self.finish(name), 1)

    def test_the_connections_are_cut_when_half_of_the_memory_is_there(self):
        self.have_guest()
        name = self.begin_postcopy()
        first = wait_until(self.remaining, lambda: f"what remains of {self.describe(name)}", 30)
        self.cluster.ctl("retune", name.split("/")[1], "--bandwidth", "4MiB")

        def half():
            # What it says must not be old when it is known.
            self.hold("baton-shim", self.source)
            if (self.remaining() or first) < first / 2:
                return True
            self.let_go("baton-shim", self.source)
            return False
        wait_until(half, lambda: f"half of {self.describe(name)}", 60, pause=0.2)
        self.assert_waits_for_pages(name)
        self.cut_with_memory_left()
        self.assertGreaterEqual(self.finish(name), 1)


class MoreRecovery(FaultSteps, Recovery):
    """The same where a shim that carried the connections is killed, and with two breaks. libvirt 9.0 may call the recovery
    between them failed, and not notice the second one at the destination (docs/libvirt.md). And where what carries no memory is
    killed in post-copy."""

    # Pre-copy never ends, and Baton leaves it as it is: the moment is this test's.
    OPTIONS = ("--post-copy", "--on-stall", "postcopy", "--max-stalled-rounds", "1000", "--bandwidth", "16MiB",
               "--max-downtime", "1ms")
    # Pages that the guest rewrites before post-copy begins: two of three of those that it has, which then are to be sent.
    REWRITTEN = 8192
    # Moves whose post-copy may be over before it is interrupted.
    ATTEMPTS = 3

    test_the_connections_are_cut_when_the_guest_answers_at_the_destination = None
    test_the_connections_are_cut_when_half_of_the_memory_is_there = None

    def job(self, figure):
        """A line of libvirt's account at the source, "" where it has none."""
        info = self.cluster.hosts[self.source].virsh("domjobinfo", VM, check=False).stdout
        found = re.search(rf"^{figure}:\s+(.*?)\s*$", info, re.MULTILINE)
        return found[1] if found else ""

    def begin_postcopy(self):
        """Post-copy with much to send and a bandwidth that makes it last, until the guest has answered at the destination: an
        interrupt whose handler needs a page that cannot come would stop QEMU's main thread as well, where there is no KVM.
        What a guest needs for that it has by then."""
        self.source, self.destination = self.ends()
        self.held = []
        name = self.migrate(self.destination, wait=False, options=self.OPTIONS)["name"]
        # The first pass brings what the guest hardly changes.
        wait_until(lambda: int(self.job("Iteration") or 0) >= 2, lambda: f"a second pass of {self.describe(name)}", 60,
                   pause=0.05)
        # Less than the guest writes, in pre-copy and afterwards. What the guest waits for comes at once all the same.
        self.cluster.ctl("retune", name.split("/")[1], "--bandwidth", "1MiB")
        first = int(self.guest.status()["memory_writes"])
        wait_until(lambda: int(self.guest.status()["memory_writes"]) >= first + self.REWRITTEN,
                   lambda: f"the guest to rewrite its memory; {self.describe(name)}", 60, pause=0.1)
        self.cluster.hosts[self.source].virsh("migrate-postcopy", VM)
        wait_until(lambda: (self.cluster.hosts[self.destination].state(VM) or "").startswith("running"),
                   lambda: f"{VM} to run at {self.destination}; {self.describe(name)}", 60, pause=0.02)
        self.guest.wait_ready()
        return name

    def wait_status(self, events, wanted, name):
        """Until QEMU has gone over to one of those states, by its `events`; which one."""
        seen = []

        def told():
            if select.select([events], [], [], 1)[0]:
                seen.extend(re.findall(rb'"status":"([a-z-]+)"', events.readline()))
            return seen[-1].decode() if seen and seen[-1].decode() in wanted else None
        return wait_until(told, lambda: f"{wanted} of QEMU at {self.source}, it told of {seen}; {self.describe(name)}, it is "
                          f"{self.cluster.states(VM)}", 90, pause=0)

    def recoveries(self, name):
        decisions = self.cluster.migration(name)["progress"].get("decisions", [])
        return [decision["action"] for decision in decisions].count("recover")

    def interrupted(self, interrupt, times):
        """How often post-copy of a move was interrupted, by QEMU's account, and went on afterwards; not more than `times`."""
        self.have_guest()
        with self.cluster.hosts[self.host()].events(VM, "MIGRATION") as events:
            name = self.begin_postcopy()
            count = 0
            while count < times and self.remaining():
                interrupt(name)
                if self.wait_status(events, ("postcopy-paused", "completed"), name) == "completed":
                    break
                # QEMU is connected again and goes on.
                self.wait_status(events, ("postcopy-active",), name)
                count += 1
        # What libvirt's own state says of it then depends on the moment.
        self.cluster.ctl("retune", name.split("/")[1], "--bandwidth", "unlimited", check=False)
        self.assertGreaterEqual(self.finish(name), count)
        return count

    def check(self, interrupt, times=1):
        """A move whose post-copy is interrupted so often is a success, and its record has the recoveries. One that was over
        before it could be interrupted shows nothing, and another one is begun."""
        for attempt in range(self.ATTEMPTS):
            count = self.interrupted(interrupt, times)
            if count == times:
                return
            print(f"    attempt {attempt + 1}: post-copy was over after {count} interruptions", file=sys.stderr, flush=True)
        self.fail(f"post-copy could not be interrupted in {self.ATTEMPTS} moves")

    def cut_within_limit(self, name):
        """A recovery leaves the limit that was set before it."""
        known = self.cluster.hosts[self.source].monitor(VM, "info migrate_parameters")
        self.assertRegex(known, rf"max-postcopy-bandwidth: {1 << 20}\b")
        self.cut()

    def kill_shim(self, host):
        found = self.processes("baton-shim", host)
        self.assertEqual(len(found), 1, found)
        found[0].end()

    def check_goes_on(self, *kills):
        """What carries no memory is killed and started again, and post-copy goes on."""
        self.have_guest()
        name = self.begin_postcopy()
        for kill in kills:
            kill()
        self.cluster.wait_hosts()
        self.assertEqual(self.cluster.hosts[self.destination].state(VM), "running (post-copy)", self.describe(name))
        self.cluster.ctl("retune", name.split("/")[1], "--bandwidth", "unlimited")
        self.finish(name)
        self.move(self.source)

    def test_the_connections_are_cut_twice(self):
        self.check(self.cut_within_limit, times=2)

    def test_the_shim_of_the_source_is_killed(self):
        self.check(lambda name: self.kill_shim(self.source))

    def test_the_shim_of_the_destination_is_killed(self):
        self.check(lambda name: self.kill_shim(self.destination))

    def test_batond_both_agents_both_virtlogd_and_the_libvirtd_of_the_source_are_killed(self):
        def restart_virtlogd():
            for host in self.cluster.hosts.values():
                host.restart("virtlogd")
        self.check_goes_on(self.fault_batond, self.fault_source_agent, self.fault_destination_agent, restart_virtlogd,
                           lambda: self.cluster.hosts[self.source].restart())

    def test_the_libvirtd_of_the_destination_is_killed(self):
        self.check_goes_on(lambda: self.cluster.hosts[self.destination].restart())

    def begin_halves(self):
        """Post-copy with memory left at the source, of which nothing is sent: its shim is held. The migration's name."""
        for attempt in range(self.ATTEMPTS):
            self.have_guest()
            name = self.begin_postcopy()
            self.hold("baton-shim", self.source)
            if self.remaining() and self.cluster.hosts[self.source].state(VM) == "paused (post-copy)":
                return name
            print(f"    attempt {attempt + 1}: post-copy was over", file=sys.stderr, flush=True)
            self.let_go()
            self.finish(name)
        self.fail(f"nothing was left to send in {self.ATTEMPTS} moves")

    def start_anew(self):
        """Nothing is in the way of the next start and move."""
        wait_until(lambda: not self.remains(), lambda: f"nothing of the migration, there is {self.remains()}", 40)
        source = self.cluster.hosts[self.source]
        if not source.state(VM).startswith("paused"):
            # libvirt 9.0 never lets go of the job of a QEMU that ended in post-copy (docs/libvirt.md).
            source.restart()
            self.cluster.wait_hosts()
        self.lose_guest()
        self.have_guest(self.source)
        self.move(self.destination)

    def test_the_qemu_of_the_destination_is_killed(self):
        """The guest is lost, which the record says soon. What the source has is nobody's to end but a person's."""
        name = self.begin_halves()
        self.fault_destination_qemu()
        self.let_go()
        ended = self.cluster.wait_ended(name, 40)
        self.assertEqual((ended["phase"], ended["guest_location"], ended["reason"]),
                         ("FAILED", "LOST", "DESTINATION_VMM_FAILED"), summary(ended))
        self.assertIn("must not run", ended["message"])
        self.assertIn("virsh destroy", ended["message"])
        self.assertEqual(self.cluster.hosts[self.source].state(VM), "paused (post-copy failed)", summary(ended))
        self.assertEqual(len(self.processes("qemu-system", self.source)), 1)
        self.start_anew()

    def test_the_qemu_of_the_source_is_killed(self):
        """A half of the guest is gone, and the other one may run for a while: when that is to end a person decides, and is told
        so. Then the guest is lost."""
        name = self.begin_halves()
        self.fault_source_qemu()
        self.let_go()
        told = wait_until(lambda: self.cluster.migration(name).get("message"), lambda: f"word of {self.describe(name)}", 40)
        self.assertIn("virsh destroy", told)
        record = self.cluster.migration(name)
        self.assertEqual(record["phase"], "POSTCOPY", summary(record))
        self.assertIn(record["guest_location"], ("DESTINATION", "PAUSED_DESTINATION"), summary(record))
        self.assertIn("(see MESSAGE)", self.cluster.ctl("get", "migrations").stdout)
        self.assertIn("virsh destroy", self.cluster.ctl("get", "migrations", "-o", "wide").stdout)
        self.assertIn("virsh destroy", " ".join(self.cluster.ctl("describe", "migration", name.split("/")[1]).stdout.split()))
        refused = self.cluster.ctl("migration", "resolve", name.split("/")[1], "--fenced", check=False)
        self.assertNotEqual(refused.returncode, 0)
        self.assertIn("virsh destroy", refused.stderr)
        self.assertEqual(len(self.processes("qemu-system", self.destination)), 1)
        self.cluster.hosts[self.destination].virsh("destroy", VM)
        ended = self.cluster.wait_ended(name, 40)
        self.assertEqual((ended["phase"], ended["guest_location"]), ("FAILED", "LOST"), summary(ended))
        self.start_anew()


class Parameters(ModesTest):
    def check_compressed(self, method, channels):
        self.have_guest()
        name = self.begin("precopy", options=("--compression", method, "--channels", str(channels)))
        if method == "xbzrle":
            # What QEMU's cache of pages has seen so far is part of libvirt's account of such a job only.
            info = self.cluster.hosts[self.source].virsh("domjobinfo", VM).stdout
            self.assertIn("Compression", info)
        self.go_on(name)
        ended = self.cluster.wait_ended(name)
        self.assertEqual((ended["phase"], ended["guest_location"]), ("SUCCEEDED", "DESTINATION"), summary(ended))
        self.assert_runs_only(self.destination)
        self.assert_clean()

    def test_xbzrle(self):
        self.check_compressed("xbzrle", 1)

    def test_zstd(self):
        self.check_compressed("zstd", 2)

    def test_zlib(self):
        self.check_compressed("zlib", 2)


class AutoConverge(ModesTest):
    CMDLINE = PostCopy.CMDLINE

    def test_a_guest_that_writes_too_fast_is_slowed_down(self):
        self.have_guest()
        self.source, self.destination = self.ends()
        self.held = []
        name = self.migrate(self.destination, wait=False,
                            options=("--auto-converge", "--bandwidth", "16MiB", "--max-downtime", "50ms",
                                     "--on-stall", "raise-downtime"))["name"]
        libvirt = self.cluster.hosts[self.source]
        wait_until(lambda: "Auto converge throttle" in libvirt.virsh("domjobinfo", VM, check=False).stdout,
                   lambda: f"QEMU to slow the guest down in {self.describe(name)}", 90, pause=0.1)
        self.go_on(name)
        ended = self.cluster.wait_ended(name)
        self.assertEqual((ended["phase"], ended["guest_location"]), ("SUCCEEDED", "DESTINATION"), summary(ended))
        self.assert_runs_only(self.destination)
        self.assert_clean()


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
