"""NICs of a switch that nobody here wrote: Open vSwitch with DPDK. The guest answers a station across the switches of both
hosts while it is moved between them, with Baton's mediator in between and without."""
import sys
import time
import unittest

from batonlab import huge_pages
from batonlab.case import ClusterTest
from batonlab.lab import LabError
from batonlab.nic import ARP, RARP
from batonlab.ovs import Switches, way_when_at
from test_libvirt_mediated import QUIET, BackendCluster, BackendTest

MAC = "52:54:00:ba:70:0c"
IP = "10.88.0.2"
NIC = f"""<interface type='vhostuser'>
      <mac address='{MAC}'/>
      <source type='unix' path='{{path}}' mode='{{mode}}'/>
      <model type='virtio'/>
      <rom enabled='no'/>
    </interface>"""


class Traffic:
    """Steps for a test that has `switches`."""

    ANNOUNCED_BY = (ARP, RARP)

    def wait_answers(self, more, timeout=60):
        try:
            self.switches.station.wait_answers(more, timeout)
        except LabError as error:
            ports = {host: switch.describe() for host, switch in self.switches.at.items()}
            raise LabError(f"{error}; the station: {self.switches.station.failed}; ports: {ports}") from error

    def recover(self):
        """Until there were answers for longer than cross() looks back."""
        self.wait_answers(100)
        self.assertEqual(self.switches.station.damaged, 0)

    def cross(self, to):
        """A move under traffic."""
        station = self.switches.station
        self.wait_answers(20)
        repeated = station.repeated
        begin = time.monotonic()
        migration = self.move(to)
        self.wait_answers(50)
        end = time.monotonic()
        self.assertEqual((station.damaged, station.repeated), (0, repeated))
        # Requests in the blackout meet a host where the guest is no longer; before and after nothing is lost.
        gap = station.longest_gap(begin, end)
        silent = [station.sent[n] for n in station.lost_between(begin - 1.0, end)]
        print(f"    to {to}: no answer for {gap:.3f} s, {len(silent)} requests lost", file=sys.stderr)
        lag = station.longest_lag(begin - 1.0, end)
        if silent:
            self.assertLess(max(silent) - min(silent), gap + lag + 0.1,
                            f"{len(silent)} requests lost, not all in one gap")
        self.assertLess(gap, 10.0)
        source = bytes.fromhex(MAC.replace(":", ""))
        announced = [at for kind in self.ANNOUNCED_BY for at, _, address in station.frames.get(kind, [])
                     if at >= begin and address == source]
        self.assertTrue(announced, "nothing announced the guest")
        # Both switches send what is for the guest to where it is now.
        self.assertEqual(self.switches.way_to(MAC), way_when_at(to))
        return migration


class SwitchCluster(BackendCluster):
    LISTENS = True
    # MiB of a guest.
    HUGE = BackendTest.MEMORY

    def __init__(self, lab, **options):
        super().__init__(lab, **options)
        self.switches = Switches(lab, self.network, IP, self.LISTENS, self.HUGE)
        for name, agent in self.agents.items():
            agent.settings["backends"]["net0"] = {"socket": self.switches.at[name].socket, "kind": "dpdk"}
            other = self.switches.at["b" if name == "a" else "a"]
            agent.settings["libvirt"]["rules"].append(
                {"kind": "vhost-user", "from": other.vmm_socket, "to": self.switches.at[name].vmm_socket})
            agent.write_config()

    def __enter__(self):
        self.switches.start()
        return super().__enter__()


class ConnectingCluster(SwitchCluster):
    LISTENS = False


class SmallCluster(SwitchCluster):
    HUGE = None


class MediatedDomain(Traffic, BackendTest):
    """Ports of type dpdkvhostuser, with Baton in between. Switches and guests have huge pages, as where they are meant to be
    fast."""

    # Without KVM, QEMU 7.2 crashes when a guest uses MSI-X on a vhost-user NIC.
    CMDLINE = f"{QUIET} lab.ip={IP} pci=nomsi"
    cluster_class = SwitchCluster
    MODE = "client"

    @property
    def switches(self):
        return self.cluster.switches

    @classmethod
    def describe_domain(cls, host):
        switch = cls.cluster.switches.at[host]
        path = switch.socket if cls.MODE == "client" else switch.vmm_socket
        pages = "" if cls.cluster.HUGE is None else huge_pages.BACKING
        return super().describe_domain(host, devices=NIC.format(path=path, mode=cls.MODE), huge_pages=pages)

    def assert_huge(self, host):
        """The guest's memory and the switch's are what they are said to be."""
        (qemu,) = self.processes("qemu-system", host)
        switch = huge_pages.used_by(self.switches.at[host].daemon.pid)
        if self.cluster.HUGE is None:
            self.assertEqual((huge_pages.used_by(qemu.pid), switch), (0, 0))
        else:
            self.assertGreaterEqual(huge_pages.used_by(qemu.pid), self.MEMORY)
            self.assertGreater(switch, 0)

    def test_packets_go_on_there_and_back(self):
        self.have_guest()
        for to in reversed(self.ends()):
            self.cross(to)
            self.assert_huge(to)
        self.assert_clean()


class SilentDomain(MediatedDomain):
    """A guest that does not announce itself: the switch does, by RARP, when Baton and QEMU ask it to. No huge pages."""

    cluster_class = SmallCluster
    ANNOUNCED_BY = (RARP,)
    EXTRA = ("<qemu:commandline><qemu:arg value='-global'/><qemu:arg value='virtio-net-pci.guest_announce=off'/>"
             "</qemu:commandline>")

    @classmethod
    def describe_domain(cls, host):
        xml = super().describe_domain(host)
        xml = xml.replace("<domain ", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' ", 1)
        return xml.replace("</domain>", f"{cls.EXTRA}</domain>")


class PlainDomain(MediatedDomain):
    """Ports of type dpdkvhostuserclient: QEMU listens, the switch connects; nothing of Baton in between."""

    MEDIATED = False
    cluster_class = ConnectingCluster
    MODE = "server"


class OwnEngine(Traffic, ClusterTest):
    """A VM of Baton's own."""

    NIC = {"name": "net0", "class": "net", "mac": MAC}

    SECURE = True
    CMDLINE = f"lab.pages=512 lab.dirty=200 lab.blocks=256 lab.ip={IP}"

    @classmethod
    def make_cluster(cls):
        cluster = super().make_cluster()
        cls.switches = Switches(cls.lab, cluster.network, IP, True)
        cls.switches.start()
        for name, agent in cluster.agents.items():
            agent.settings["backends"]["net0"] = {"socket": cls.switches.at[name].socket, "kind": "dpdk"}
            agent.write_config()
        cluster.extra_devices = [cls.NIC]
        return cluster

    def test_packets_go_on_there_and_back(self):
        self.have_guest()
        for to in reversed(self.ends()):
            self.cross(to)
        self.assert_clean()

    def test_the_switch_is_restarted_under_the_guest(self):
        self.have_guest()
        self.wait_answers(20)
        here, there = self.ends()
        self.switches.at[here].restart_daemon()
        self.recover()
        self.cross(there)
        self.assert_clean()

    def test_the_shim_dies_under_the_guest(self):
        self.have_guest()
        self.wait_answers(20)
        self.kill_shim()
        self.recover()
        self.cross(self.ends()[1])
        self.assert_clean()


class TwoQueuePairs(OwnEngine):
    SPEC = {"vcpus": 2}
    NIC = {**OwnEngine.NIC, "num_queues": 2}


# The tests of the other file are its own.
del BackendTest

if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
