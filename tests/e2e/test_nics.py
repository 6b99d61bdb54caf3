"""A guest with a vhost-user NIC moves between two hosts: its packets go on, its device's state goes along, and the
network hears where it is now."""
import os
import time
import unittest

from batonlab.case import ClusterTest
from batonlab.cluster import seconds
from batonlab.lab import LabError
from batonlab.nic import ARP, RARP, NetDevice, Outside

MAC = "52:54:00:ba:70:0a"
IP = "10.88.0.2"


class Nics(ClusterTest):
    CMDLINE = f"lab.pages=512 lab.dirty=200 lab.blocks=256 lab.ip={IP}"
    DEVICE_OPTIONS = ()

    def setUp(self):
        cls = type(self)
        fresh = cls.lab is None
        super().setUp()
        if not fresh:
            return
        wire = os.path.join(cls.lab.dir, "wire.sock")
        cls.outside = Outside(wire, IP)
        cls.outside.start()
        cls.lab.undo.callback(cls.outside.stop)
        cls.devices = {}
        for name, agent in cls.cluster.agents.items():
            device = NetDevice(cls.cluster, name, "net0", MAC, wire, self.DEVICE_OPTIONS)
            device.start()
            cls.devices[name] = device
            agent.settings["backends"]["net0"] = {"socket": device.socket, "kind": "lab"}
            agent.write_config()
            agent.restart()
        cls.cluster.wait_hosts()
        cls.cluster.extra_devices = [{"name": "net0", "class": "net", "mac": MAC}]

    def wait_answers(self, more):
        try:
            self.outside.wait_answers(more, timeout=60)
        except LabError as error:
            stats = {name: device.stats() for name, device in self.devices.items()}
            raise LabError(f"{error}; devices: {stats}") from error

    def cross(self):
        """One move under traffic; the record of the migration and the times around it."""
        self.have_guest()
        self.wait_answers(20)
        begin = time.monotonic()
        migration = self.move(self.ends()[1])
        self.wait_answers(50)
        return migration, begin, time.monotonic()

    def check_traffic(self, migration, begin, end):
        self.assertEqual((self.outside.damaged, self.outside.repeated), (0, 0))
        # Requests in the blackout meet a host where the guest is no longer; before and after nothing is lost.
        lost = self.outside.lost_between(begin - 1.0, end)
        gap = self.outside.longest_gap(begin, end)
        lag = self.outside.longest_lag(begin - 1.0, end)
        silent = [self.outside.sent[n] for n in lost]
        if silent:
            self.assertLess(max(silent) - min(silent), gap + lag + 0.1,
                            f"{len(lost)} requests lost, not all in one gap")
        self.assertLess(gap, 10.0)
        downtimes = migration["progress"]["downtimes"]
        self.assertIn("network", downtimes, migration)
        self.assertGreater(seconds(downtimes["network"]), 0)

    def test_packets_go_on_there_and_back(self):
        for _ in range(2):
            migration, begin, end = self.cross()
            self.check_traffic(migration, begin, end)
            host = self.cluster.host_of()
            # Announced from where it is now: RARP by the back-end, or the guest's own ARP.
            wires = {wire for kind in (ARP, RARP) for at, wire, source in self.outside.frames.get(kind, [])
                     if at >= begin and source == bytes.fromhex(MAC.replace(":", ""))}
            self.assertTrue(wires, "nothing announced the guest")
            last = self.outside.answers[max(self.outside.answers)][1]
            self.assertIn(last, wires, "the announcement and the answers come over the same wire")
            self.assertGreater(self.devices[host].stats()["model"]["pairs"], 0)
        self.assert_clean()


class NicsWithRarp(Nics):
    """A guest that does not announce itself: the back-end does."""
    DEVICE_OPTIONS = ("--without", "guest-announce")

    def test_packets_go_on_there_and_back(self):
        migration, begin, end = self.cross()
        self.check_traffic(migration, begin, end)
        source = bytes.fromhex(MAC.replace(":", ""))
        self.assertTrue([at for at, _, mac in self.outside.frames.get(RARP, []) if at >= begin and mac == source])


if __name__ == "__main__":
    unittest.main()
