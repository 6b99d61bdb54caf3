"""Moves and crashes with the lab guest (docs/lab.md): the whole product but QEMU, in seconds a case."""
import sys
import unittest

from batonlab.case import ClusterTest


class LabGuests(ClusterTest):
    LAB_GUEST = True
    # Several requests in flight, blocks that are written again and again, memory that changes all the time.
    CMDLINE = "lab.writers=8 lab.blocks=512 lab.pages=2048 lab.dirty=4000"

    def test_there_and_back(self):
        guest = self.have_guest()
        for to in reversed(self.ends()):
            guest.reset()
            migration = self.move(to)
            self.assertEqual(migration["reason"], "NONE")
            self.assertGreater(int(guest.status()["stop_us"]), 0)
        self.assert_clean()

    def test_four_moves_in_a_row(self):
        self.have_guest()
        for _ in range(4):
            self.move(self.ends()[1])
        self.assert_clean()

    def test_cancelled_migrations_leave_the_guest_where_it_was(self):
        self.have_guest()
        source, destination = self.ends()
        for point in ("precopy", "frozen"):
            name, waiting = self.start_and_wait_at("source", point)
            self.cluster.ctl("cancel", name.split("/")[1], "--no-wait", check=False)
            waiting.release()
            ended = self.cluster.wait_ended(name)
            self.assertEqual((ended["phase"], ended["guest_location"]), ("CANCELLED", "SOURCE"))
            self.assert_runs_only(source)
        self.move(destination)
        self.assert_clean()


class OneRequestAtATime(ClusterTest):
    """qemu-storage-daemon keeps no in-flight region: what it had when it died is known for sure only with one request."""
    LAB_GUEST = True
    CMDLINE = "lab.writers=1 lab.blocks=64 lab.pages=512 lab.dirty=1000"

    def test_killed_backend(self):
        guest = self.have_guest()
        storage = self.cluster.agents[self.cluster.host_of()].storage
        for _ in range(3):
            storage.kill()
            storage.start()
            guest.wait_writes(100)
        self.assert_clean()
        self.move(self.ends()[1])
        self.assert_clean()

    def test_killed_shim(self):
        guest = self.have_guest()
        for _ in range(2):
            self.kill_shim()
            guest.wait_writes(100)
        self.assert_clean()
        self.move(self.ends()[1])
        self.assert_clean()


class PackedRings(ClusterTest):
    """Packed rings on the lab device, which keeps an in-flight region: many requests in flight, whatever dies."""
    LAB_GUEST = True
    LAB_STORAGE = []
    CMDLINE = "lab.packed=1 lab.writers=16 lab.blocks=512 lab.pages=512 lab.dirty=1000"

    def test_there_and_back(self):
        self.have_guest()
        for to in reversed(self.ends()):
            self.move(to)
        self.assert_clean()

    def test_requests_in_flight_are_handed_over(self):
        self.have_guest()
        for to in reversed(self.ends()):
            self.move(to, options=("--inflight", "handoff"))
        self.assert_clean()

    def test_killed_backend(self):
        guest = self.have_guest()
        storage = self.cluster.agents[self.cluster.host_of()].storage
        for _ in range(3):
            storage.kill()
            storage.start()
            guest.wait_writes(100)
        self.assert_clean()

    def test_killed_shim(self):
        guest = self.have_guest()
        for _ in range(2):
            self.kill_shim()
            guest.wait_writes(100)
        self.assert_clean()
        self.move(self.ends()[1])
        self.assert_clean()


class SplitRings(PackedRings):
    """The same with split rings."""
    CMDLINE = "lab.writers=16 lab.blocks=512 lab.pages=512 lab.dirty=1000"


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
