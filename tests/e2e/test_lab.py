"""Moves and crashes with the lab guest (docs/lab.md): the whole product but QEMU, in seconds a case."""
import json
import os
import sys
import unittest

from batonlab.case import ClusterTest
from batonlab.cluster import seconds
from batonlab.lab import wait_until
from batonlab.nic import NetDevice


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


class Crashes:
    """Before the base of a test class (ClusterTest): what its guest survives."""

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


class OneRequestAtATime(Crashes, ClusterTest):
    """qemu-storage-daemon keeps no in-flight region: what it had when it died is known for sure only with one request."""
    LAB_GUEST = True
    CMDLINE = "lab.writers=1 lab.blocks=64 lab.pages=512 lab.dirty=1000"


class PackedRings(Crashes, ClusterTest):
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


class SplitRings(PackedRings):
    """The same with split rings."""
    CMDLINE = "lab.writers=16 lab.blocks=512 lab.pages=512 lab.dirty=1000"


class PartialOrder(ClusterTest):
    """The experiment of docs/partial-order.md, on packed rings: the device leaves the order of requests and returns to
    it, also while the guest moves."""
    LAB_GUEST = True
    LAB_STORAGE = ["--with", "partial-order", "--set", json.dumps({"latency_us": 100, "latency_max_us": 2000})]
    CMDLINE = "lab.packed=1 lab.partial_order=1 lab.writers=16 lab.blocks=512 lab.pages=512 lab.dirty=1000"

    def set_order(self, in_order):
        for agent in self.cluster.agents.values():
            agent.storage.set(in_order=in_order)

    def test_order_comes_and_goes(self):
        guest = self.have_guest()
        storage = self.cluster.agents[self.cluster.host_of()].storage
        self.assertTrue(storage.stats()["features"] >> 49 & 1, "PARTIAL_ORDER was accepted")
        for in_order in (False, True, False, True):
            self.set_order(in_order)
            guest.wait_writes(200)
        self.assert_clean()

    def test_there_and_back(self):
        self.have_guest()
        for in_order, option in ((False, "handoff"), (True, "drain"), (True, "handoff"), (False, "drain")):
            self.set_order(in_order)
            self.move(self.ends()[1], options=("--inflight", option))
        self.assert_clean()


class PartialOrderSplit(PartialOrder):
    """The same with split rings, where the two sides agree on order by flags."""
    CMDLINE = "lab.partial_order=1 lab.writers=16 lab.blocks=512 lab.pages=512 lab.dirty=1000"


class Nic(ClusterTest):
    """A guest with a NIC moves, and another guest on its wire counts what it hears: every packet, once."""
    LAB_GUEST = True
    RATE = 500
    PAIRS = 1
    CMDLINE = f"lab.blocks=128 lab.pages=512 lab.dirty=500 lab.packets={RATE}"
    DEVICE_OPTIONS = ()

    def setUp(self):
        cls = type(self)
        fresh = cls.lab is None
        super().setUp()
        if not fresh:
            return
        wire = os.path.join(cls.lab.dir, "wire.sock")
        macs = {"net0": "52:54:00:ba:70:0a", "net1": "52:54:00:ba:70:0b"}
        cls.devices = {}
        for host, name in (("a", "net0"), ("b", "net0"), ("b", "net1")):
            device = NetDevice(cls.cluster, host, name, macs[name], wire, cls.DEVICE_OPTIONS, hub=host == "a")
            device.start()
            cls.devices[host, name] = device
            cls.cluster.agents[host].settings["backends"][name] = {"socket": device.socket, "kind": "lab"}
        for agent in cls.cluster.agents.values():
            agent.write_config()
            agent.restart()
        cls.cluster.wait_hosts()
        nic0, nic1 = ({"name": name, "class": "net", "mac": mac, "num_queues": cls.PAIRS} for name, mac in macs.items())
        cls.cluster.extra_devices = [nic0]
        cls.witness = cls.cluster.start_guest("b", "vm2", cmdline=cls.CMDLINE, devices=[nic1])

    def heard(self, key="packets_received"):
        return int(self.witness.status()[key])

    def test_every_packet_arrives_once(self):
        guest = self.have_guest()
        blackout = 0.0
        for to in ("b", "a"):
            before = self.heard()
            wait_until(lambda: self.heard() > before + self.RATE, "packets of the guest", 60, pause=0.1)
            blackout += seconds(self.move(to)["progress"]["downtimes"]["network"])
            before = self.heard()
            wait_until(lambda: self.heard() > before + self.RATE, "packets of the guest that has moved", 60, pause=0.1)
            self.check_device(to)
        result, _ = guest.verify(go_on=False)
        self.assertEqual((result["errors"], result["memory_errors"], result["packet_duplicates"]), ("0", "0", "0"))
        # What the other one sent in the blackout met no device; what came before and after arrived.
        self.assertLess(int(result["packets_missing"]), self.PAIRS * self.RATE * (1 + 2 * blackout))
        self.assertGreater(int(result["packets_received"]), 2 * self.RATE)
        wait_until(lambda: self.heard() >= int(result["packets_sent"]), lambda: f"all packets of {result['line']}; heard: "
                   f"{self.witness.status()['line']}", 60, pause=0.1)
        told = self.witness.status()
        self.assertEqual((told["packets_received"], told["packets_missing"], told["packet_duplicates"], told["errors"]),
                         (result["packets_sent"], "0", "0", "0"))

    def check_device(self, host):
        self.assertEqual(self.devices[host, "net0"].stats()["model"]["pairs"], self.PAIRS)
        (nic,) = (device for device in self.cluster.vm()["devices"] if device["name"] == "net0")
        self.assertEqual(int(nic.get("reconnects", 0)), 0, nic)


class NicWithControlQueue(Nic):
    """Two queue pairs, packed rings, and a control queue: what the driver set there once, before it moved, holds."""
    LAB_STORAGE = []  # which has packed rings, too
    PAIRS = 2
    CMDLINE = Nic.CMDLINE + " lab.control=1 lab.packed=1"
    DEVICE_OPTIONS = ("--pairs", "2")

    def check_device(self, host):
        super().check_device(host)
        stats = self.devices[host, "net0"].stats()
        self.assertEqual(stats["counters"].get("control_ok", 0), 0 if host == "b" else 1, "the driver says it once")


class FreePageHints(ClusterTest):
    """Baton's balloon: what the guest has written and freed is not sent, and what it takes again meanwhile is."""
    LAB_GUEST = True
    LAB_STORAGE = []  # keeps an in-flight region, so that a shim may die with requests under way
    SPEC = {"free_page_hints": True}
    FREED = 128 << 20
    # Some of what is freed comes into use again all the time.
    CMDLINE = "lab.blocks=128 lab.pages=1024 lab.dirty=500 lab.live=16M lab.freed=128M lab.reuse=200"

    def new_guest(self):
        """One none of whose memory is a hole yet."""
        if type(self).guest is not None:
            self.lose_guest()
            wait_until(lambda: self.cluster.vm() is None, "vm1 to be forgotten", 30, pause=0.1)
        self.have_guest()

    def hinted_move(self):
        migration = self.move(self.ends()[1])
        progress = migration["progress"]
        self.assertEqual(progress.get("hints", {}).get("unused", ""), "", progress)
        return migration, {kind: int(count) for kind, count in progress["bytes"].items()}

    def test_what_is_free_is_not_sent(self):
        self.new_guest()
        migration, sent = self.hinted_move()
        self.assertGreater(sent["hint_skipped"], self.FREED // 2)
        self.assertLess(sent["data"], self.FREED // 2)
        told = self.cluster.ctl("describe", "migration", migration["name"].split("/")[1]).stdout
        self.assertRegex(told, r"(?i)hint")
        self.assert_clean()
        # What was not sent has become a hole.
        _, sent = self.hinted_move()
        self.assertGreater(sent["hole_skipped"], self.FREED // 4)
        self.assert_clean()

    def begin_hinting(self):
        self.new_guest()
        return self.start_and_wait_at("source", "hinting")

    def check_hints_again(self, source):
        self.assert_runs_only(source)
        self.assert_clean()
        _, sent = self.hinted_move()
        self.assertGreater(sent["hint_skipped"], self.FREED // 4, "the guest is asked again, and answers")
        self.assert_clean()

    def test_cancelled_while_the_guest_is_asked(self):
        name, waiting = self.begin_hinting()
        source, _ = self.ends()
        self.cluster.ctl("cancel", name.split("/")[1], "--no-wait")
        waiting.release()
        ended = self.cluster.wait_ended(name)
        self.assertEqual((ended["phase"], ended["guest_location"]), ("CANCELLED", "SOURCE"))
        self.check_hints_again(source)

    def test_shim_killed_while_the_guest_is_asked(self):
        name, waiting = self.begin_hinting()
        source, _ = self.ends()
        waiting.shims()[0].end()
        waiting.release()
        ended = self.cluster.wait_ended(name)
        self.assertEqual((ended["phase"], ended["guest_location"]), ("FAILED", "SOURCE"))
        self.check_hints_again(source)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
