"""Moving a libvirt domain between two hosts, in namespaces of their own and with TLS between them: there and back, with
libvirt 11.3 and QEMU 10.0 at one end, disks copied, control from outside at every point, restarts, and many at once."""
import json
import os
import subprocess
import sys
import time
import unittest

from batonlab.cluster import seconds, summary
from batonlab.lab import ROOT, wait_until
from batonlab.libvirt import LibvirtCluster
from batonlab.libvirt_case import VM, LibvirtTest


class Moves(LibvirtTest):
    def findings(self, result):
        return json.loads(result.stdout).get("findings", [])

    def test_libvirt_alone_moves_it(self):
        """What the lab stands on: the daemons' own migration between these hosts, and batond's account follows it."""
        self.have_guest()
        source, destination = self.ends()
        hosts = self.cluster.hosts
        hosts[source].virsh("migrate", "--live", "--p2p", "--unsafe", "--persistent", "--undefinesource", VM,
                            hosts[destination].uri, "--migrateuri", "unix://" + os.path.join(self.lab.dir, "mig.sock"))
        self.assert_runs_only(destination)
        self.assert_clean()

    def test_there_and_back(self):
        guest = self.have_guest()
        for to in reversed(self.ends()):
            guest.reset()
            migration = self.move(to)
            self.assertEqual(migration["reason"], "NONE")
            self.assertTrue(migration["params"]["tls"], migration["params"])
            progress = migration["progress"]
            self.assertGreater(int(progress["bytes"]["data"]), 8 << 20)
            self.assertGreater(seconds(progress["downtimes"]["vcpu"]), 0)
            phases = [time["phase"] for time in migration["phase_times"]]
            for phase in ("PREPARING", "PRECOPY", "SWITCHOVER", "FINISHING", "SUCCEEDED"):
                self.assertIn(phase, phases)
        self.assert_clean()

    def test_a_transient_domain_stays_transient(self):
        name = "passing"
        guest = self.cluster.start_domain("a", name, persistent=False, memory=64, cmdline="lab.pages=64 lab.dirty=50")
        try:
            wait_until(lambda: self.cluster.vm(name), "batond to know the domain", 30)
            migration = self.cluster.migrate("b", vm=name)
            self.assertEqual(migration["phase"], "SUCCEEDED", summary(migration))
            self.assertEqual(self.cluster.hosts["b"].virsh("list", "--name", "--transient").stdout.split(), [name])
            guest.verify(go_on=False)
        finally:
            for host in self.cluster.hosts.values():
                host.virsh("destroy", name, check=False)

    def test_several_channels(self):
        self.have_guest()
        migration = self.move(self.ends()[1], options=("--channels", "2"))
        self.assertEqual(migration["params"]["channels"], 2)
        self.assert_clean()

    def test_epoch_grows(self):
        self.have_guest()
        before = int(self.vm()["epoch"])
        self.move(self.ends()[1])
        self.assertEqual(int(self.vm()["epoch"]), before + 1)

    def test_dry_run_changes_nothing(self):
        self.have_guest()
        source, destination = self.ends()
        before = self.cluster.get("migrations")["migrations"]
        result = self.cluster.ctl("migrate", VM, "--to", destination, "--dry-run", "-o", "json")
        self.assertFalse([f for f in self.findings(result) if f["severity"] == "BLOCKER"], result.stdout)
        self.assertEqual(self.cluster.get("migrations")["migrations"], before)
        self.assert_runs_only(source)

    def test_dry_run_finds_what_stands_in_the_way(self):
        """A domain of the same name runs at the destination, and another one's bridge is not there."""
        self.have_guest()
        source, destination = self.ends()
        xml = self.cluster.domain_xml(VM, memory=64, disk="/dev/null")
        other = self.cluster.hosts[destination]
        path = self.cluster.write_xml("other", xml)
        other.virsh("create", path, "--paused")
        try:
            result = self.cluster.ctl("migrate", VM, "--to", destination, "--dry-run", "-o", "json", check=False)
            self.assertEqual(result.returncode, 10, result.stdout + result.stderr)
            blockers = [f for f in self.findings(result) if f["severity"] == "BLOCKER"]
            self.assertTrue(blockers and all(f["remedy"] for f in blockers), result.stdout)
            migration = self.migrate(destination)
            self.assertEqual((migration["phase"], migration["guest_location"]), ("FAILED", "SOURCE"), summary(migration))
        finally:
            other.virsh("destroy", VM)
        self.assert_runs_only(source)
        self.move(destination)

    def check_cancel(self, point, end):
        self.have_guest()
        name = self.begin(point)
        self.cluster.ctl("cancel", name.split("/")[1], "--no-wait", check=False)
        if point == "prepared":
            self.go_on(name)
        if end[0] != "CANCELLED":
            self.go_on(name)
        ended = self.cluster.wait_ended(name)
        self.assertEqual((ended["phase"], ended["guest_location"], ended["reason"]), end, summary(ended))
        stayed = end[1] == "SOURCE"
        self.assert_runs_only(self.source if stayed else self.destination)
        self.move(self.destination if stayed else self.source)
        self.assert_clean()

    def test_cancel_before_libvirt_is_asked(self):
        self.check_cancel("prepared", ("CANCELLED", "SOURCE", "CANCELLED_BY_REQUEST"))

    def test_cancel_in_precopy(self):
        self.check_cancel("precopy", ("CANCELLED", "SOURCE", "CANCELLED_BY_REQUEST"))

    def test_cancel_after_the_guest_was_handed_over_is_too_late(self):
        self.check_cancel("confirm", ("SUCCEEDED", "DESTINATION", "NONE"))

    def test_retune_in_precopy(self):
        """A migration that would take half a minute is over soon once its bandwidth is not limited any more."""
        self.have_guest()
        name = self.begin("precopy")
        begun = self.cluster.migration(name)
        self.assertEqual(begun["phase"], "PRECOPY", summary(begun))
        start = time.monotonic()
        self.cluster.ctl("retune", name.split("/")[1], "--bandwidth", "unlimited", "--max-downtime", "500ms")
        ended = self.cluster.wait_ended(name)
        self.assertEqual((ended["phase"], ended["guest_location"]), ("SUCCEEDED", "DESTINATION"), summary(ended))
        self.assertLess(time.monotonic() - start, 10)
        self.assert_runs_only(self.destination)

    def check_restart(self, restart):
        """The migration goes on, and is still obeyed afterwards."""
        self.have_guest()
        name = self.begin("precopy")
        before = self.bytes_sent(name)
        restart()
        self.cluster.wait_hosts()
        wait_until(lambda: self.bytes_sent(name) > before, lambda: f"progress of {self.describe(name)}", 30, pause=0.1)
        self.assertEqual(self.cluster.migration(name)["phase"], "PRECOPY")
        self.cluster.ctl("retune", name.split("/")[1], "--bandwidth", "unlimited")
        ended = self.cluster.wait_ended(name)
        self.assertEqual((ended["phase"], ended["guest_location"]), ("SUCCEEDED", "DESTINATION"), summary(ended))
        self.assert_runs_only(self.destination)

    def bytes_sent(self, name):
        return int(((self.cluster.migration(name) or {}).get("progress") or {}).get("bytes", {}).get("data", 0))

    def test_source_agent_restarts_in_precopy(self):
        self.check_restart(lambda: self.cluster.agents[self.source].restart())

    def test_destination_agent_restarts_in_precopy(self):
        self.check_restart(lambda: self.cluster.agents[self.destination].restart())

    def test_batond_restarts_in_precopy(self):
        def restart():
            self.cluster.batond.kill()
            self.cluster.batond.start()
        self.check_restart(restart)


class CopiedDisks(LibvirtTest):
    """Each host has a disk of its own; QEMU copies it over NBD."""

    PRIVATE = True

    def test_there_and_back(self):
        self.have_guest()
        source, destination = self.ends()
        # Without being asked to, nobody copies a disk.
        result = self.cluster.ctl("migrate", VM, "--to", destination, "--dry-run", "-o", "json", check=False)
        for to in (destination, source):
            self.move(to, options=("--copy-storage",))
            self.assert_clean()
        self.assertEqual(result.returncode, 10, result.stdout + result.stderr)


class Versions(LibvirtTest):
    """libvirt 9.0 with QEMU 7.2 at host a, libvirt 11.3 with QEMU 10.0 from backports at host b."""

    @classmethod
    def make_cluster(cls):
        result = subprocess.run([os.path.join(ROOT, "tests/lab/backports_libvirt.sh")], check=True, capture_output=True,
                                text=True)
        return LibvirtCluster(cls.lab, secure=cls.SECURE, usr={"b": os.path.join(result.stdout.strip(), "usr")})

    def test_there_and_back(self):
        self.have_guest("a")
        for host, libvirt, qemu in (("a", "9.0.", "7.2."), ("b", "11.", "10.")):
            version = self.cluster.hosts[host].virsh("version").stdout
            self.assertIn(f"Using library: libvirt {libvirt}", version)
            self.assertIn(f"Running hypervisor: QEMU {qemu}", version)
        self.move("b")
        self.assert_clean()
        self.move("a")
        self.assert_clean()


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
