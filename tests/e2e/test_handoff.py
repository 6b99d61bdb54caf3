"""Requests in flight that move with the guest: a real Linux on the lab disk, whose requests take longer than any blackout."""
import json
import sys
import time
import unittest

from batonlab.case import ClusterTest
from batonlab.cluster import seconds, summary
from batonlab.lab import wait_until
from batonlab.slow_disk import HANDOFF, SlowDisk


class Handoff(SlowDisk, ClusterTest):
    # Eight requests in flight, each of them for 600 ms.
    CMDLINE = "lab.pages=512 lab.dirty=200 lab.blocks=512 lab.writers=8"

    def assert_handed_off(self, migration):
        super().assert_handed_off(migration)
        # Nothing waited for the disk.
        progress = migration["progress"]
        self.assertLess(seconds(progress["drain"]), self.LATENCY_US / 1e6 / 2, progress["device_stops"])

    def test_there_and_back_with_requests_in_flight(self):
        for to in reversed(self.ends()):
            migration = self.move_in_flight(to, HANDOFF)
            self.assert_handed_off(migration)
        self.latency(0)
        self.assert_clean()
        described = self.cluster.ctl("describe", "migration", migration["name"].split("/")[1])
        self.assertIn("requests handed off", described.stdout)

    def test_drain_takes_as_long_as_the_disk(self):
        source, destination = self.ends()
        self.latency(0)
        self.cluster.agents[source].storage.set(no_space=True)
        try:
            wait_until(self.writes_stand_still, "the guest's writes to be held", 60, pause=0.3)
            name = self.cluster.migrate(destination, wait=False,
                                        options=("--inflight", "handoff", "--inflight", "disk0=drain"))["name"]
            self.cluster.wait_phase(name, "SWITCHOVER")
            # What is measured: the disk takes that much longer. The drain itself begins a little after the switchover.
            time.sleep(1.5)
        finally:
            self.cluster.agents[source].storage.set(no_space=False)
        migration = self.cluster.wait_ended(name)
        self.assertEqual(migration["phase"], "SUCCEEDED", summary(migration))
        progress = migration["progress"]
        self.assertEqual([stop["answer"] for stop in progress["device_stops"]], ["DRAIN"])
        self.assertGreater(seconds(progress["drain"]), 0.3)
        self.assertGreater(seconds(progress["downtimes"]["vcpu"]), seconds(progress["drain"]))
        self.assert_runs_only(destination)
        self.assert_clean()

    def test_dry_run_says_nothing_against_it(self):
        result = self.cluster.ctl("migrate", "vm1", "--to", self.ends()[1], "--dry-run", *HANDOFF, "-o", "json")
        codes = [finding["code"] for finding in json.loads(result.stdout).get("findings", [])]
        self.assertNotIn("HANDOFF_IMPOSSIBLE", codes)

    def check_killed(self, program, side, point, ends):
        source, destination = self.ends()
        host = self.cluster.agents[source if side == "source" else destination]
        host.set_pause(point)
        name = self.cluster.migrate(destination, wait=False, options=HANDOFF)["name"]
        wait_until(lambda: host.paused_at(point), f"pause point {point}", 60)
        victim = source if program[0] == "source" else destination
        found = self.cluster.agents[victim].find(program[1])
        self.assertEqual(len(found), 1, found)
        found[0].end()
        if program[1] == "baton-lab-device":
            self.cluster.agents[victim].storage.restart()
            self.latency(self.LATENCY_US)
        host.release()
        ended = self.cluster.wait_ended(name)
        self.assertIn((ended["phase"], ended["guest_location"]), ends, summary(ended))
        self.assert_runs_only(destination if ended["phase"] == "SUCCEEDED" else source)
        self.latency(0)
        self.assert_clean()

    def test_destination_vmm_dies_with_the_set_in_its_hands(self):
        self.check_killed(("destination", "qemu-system"), "destination", "loaded", {("FAILED", "SOURCE")})

    def test_destination_shim_dies_before_it_is_owner(self):
        self.check_killed(("destination", "baton-shim"), "destination", "loaded", {("FAILED", "SOURCE")})

    def test_destination_shim_dies_as_owner(self):
        self.check_killed(("destination", "baton-shim"), "destination", "owner", {("SUCCEEDED", "DESTINATION")})

    def test_source_backend_dies_after_the_stop(self):
        self.check_killed(("source", "baton-lab-device"), "source", "frozen", {("SUCCEEDED", "DESTINATION")})

    def test_destination_backend_dies_with_the_set(self):
        self.check_killed(("destination", "baton-lab-device"), "destination", "loaded",
                          {("SUCCEEDED", "DESTINATION"), ("FAILED", "SOURCE")})

    def test_held_requests_arrive_and_complete_there(self):
        source, destination = self.ends()
        self.latency(0)
        self.cluster.agents[source].storage.set(no_space=True)
        try:
            wait_until(self.writes_stand_still, "the guest's writes to be held", 60, pause=0.3)
            self.assert_handed_off(self.move(destination, options=HANDOFF))
        finally:
            self.cluster.agents[source].storage.set(no_space=False)
        self.assert_clean()


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
