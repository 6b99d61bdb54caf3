"""Libvirt domains with a vhost-user disk of a real back-end: one that QEMU reaches itself, and one with Baton's mediator in
between (batonctl vm mediate). Both move, the guest verifies its disk and memory."""
import os
import sys
import time
import unittest
import uuid

from batonlab.cluster import summary
from batonlab.lab import wait_until
from batonlab.libvirt import VHOST_USER_DISK, DomainGuest, LibvirtCluster
from batonlab.libvirt_case import VM, LibvirtTest, backports_of
from batonlab.nic import ARP, RARP, NetDevice, Outside
from batonlab.slow_disk import HANDOFF, SlowDisk

# See test_libvirt.py: QEMU before 9.0 loses what a busy guest under TCG writes during a migration.
QUIET = "lab.pages=256 lab.dirty=20 lab.blocks=64 lab.writers=1 lab.delay_us=20000"


class BackendCluster(LibvirtCluster):
    """Each host has a back-end of its own over the one image, at a socket of its own name."""

    def __init__(self, lab, **options):
        super().__init__(lab, **options)
        here = {name: agent.storage.socket for name, agent in self.agents.items()}
        for name, agent in self.agents.items():
            agent.settings["backends"] = {"vda": {"socket": agent.storage.socket, "kind": agent.storage.kind}}
            # Domains without a mediator have the back-end's path in their XML.
            agent.settings["libvirt"]["rules"] = [{"kind": "vhost-user", "from": path, "to": agent.storage.socket}
                                                  for other, path in here.items() if other != name]
            agent.write_config()

    def __enter__(self):
        for agent in self.agents.values():
            agent.storage.start()
        return super().__enter__()


class BackendTest(LibvirtTest):
    CMDLINE = QUIET
    # To tell the state of a back-end's ring QEMU asks for its base, which stops it.
    DISK_QUESTIONS = LibvirtTest.DISK_QUESTIONS[:-1]
    MEDIATED = True
    cluster_class = BackendCluster
    uuid = None

    @classmethod
    def make_cluster(cls):
        return cls.cluster_class(cls.lab, secure=cls.SECURE, lab_storage=cls.LAB_STORAGE, usr=backports_of(cls.BACKPORTS))

    @classmethod
    def describe_domain(cls, host, **fields):
        """XML of a domain that knows nothing of Baton."""
        cls.uuid = str(uuid.uuid4())
        disk = VHOST_USER_DISK.format(path=cls.cluster.agents[host].storage.socket)
        return cls.cluster.domain_xml(VM, cls.MEMORY, cls.CMDLINE, disk_xml=disk, uuid=cls.uuid, **fields)

    def have_guest(self, host=None):
        cls = type(self)
        if cls.guest is None:
            host = host or "a"
            LibvirtCluster.make_disk(cls.cluster.image)
            for agent in cls.cluster.agents.values():
                agent.storage.restart()
            path = cls.cluster.write_xml(VM, self.describe_domain(host))
            libvirt = cls.cluster.hosts[host]
            if cls.MEDIATED:
                mediated = cls.cluster.ctl("vm", "mediate", path, "--host", host, "-o", f"{path}.mediated")
                self.assertNotIn("WARNING", mediated.stdout)
                path += ".mediated"
            libvirt.virsh("define", path)
            libvirt.virsh("start", VM)
            cls.guest = DomainGuest(cls.cluster, VM, cls.cluster.image)
            cls.guest.wait_ready()
            cls.guest.wait_writes(1)
            wait_until(lambda: (self.vm() or {}).get("state") == "RUNNING", "batond to know the domain", 30)
        elif host and self.host() != host:
            self.move(host)
        return cls.guest

    def lose_guest(self):
        super().lose_guest()
        wait_until(lambda: not self.remains(nowhere=True), lambda: f"nothing of the domain, there is "
                   f"{self.remains(nowhere=True)}", 30)

    def remains(self, nowhere=False):
        """Where a mediated domain runs, its shim stays."""
        if not self.MEDIATED or nowhere:
            return super().remains()
        stays = self.cluster.runs_at(VM)
        left = []
        for name, agent in self.cluster.agents.items():
            shims, directories = agent.shims(), agent.migration_directories()
            if name == stays:
                # The shim of the domain, its directory, and the one of its sockets.
                shims = shims[1:]
                directories = [path for path in directories if not path.endswith(("/" + self.uuid, "/vm-" + self.uuid))]
            left += [*shims, *directories]
        return left


class Direct(BackendTest):
    """What QEMU itself can do for a vhost-user disk."""

    MEDIATED = False

    def test_there_and_back(self):
        self.have_guest()
        described = self.cluster.ctl("describe", "vm", VM).stdout
        self.assertIn("What it misses", described)
        self.assertIn("without Baton", described)
        for to in reversed(self.ends()):
            self.move(to)
        self.assert_clean()


class Mediated(BackendTest):
    """With what Debian has: libvirt 9.0, QEMU 7.2 and its storage daemon."""

    def device(self):
        (device,) = self.vm()["devices"]
        return device

    def test_there_and_back(self):
        self.have_guest()
        for to in reversed(self.ends()):
            migration = self.move(to)
            self.assertEqual(self.device()["state"], "ACTIVE", self.device())
            self.assertEqual(self.device()["backend"]["socket"], self.cluster.agents[to].storage.socket)
        self.assert_clean()

    def test_described(self):
        self.have_guest()
        described = self.cluster.ctl("describe", "vm", VM).stdout
        self.assertRegex(described, r"disk +vda +mediated +virtio +/run/baton-libvirt/vm-")
        self.assertNotIn("What it misses", described)


class Handoff(SlowDisk, BackendTest):
    """With requests that take longer than any blackout: they go from mediator to mediator while QEMU waits for its device to
    stop."""

    CMDLINE = "lab.pages=256 lab.dirty=20 lab.blocks=64 lab.writers=4"

    def test_requests_in_flight_go_along_there_and_back(self):
        for to in reversed(self.ends()):
            self.assert_handed_off(self.move_in_flight(to, HANDOFF))
        self.latency(0)
        self.assert_clean()

    def test_a_drain_that_does_not_end_ends_the_migration(self):
        """QEMU waits for its disk; what it would send of it would be wrong, and is never sent."""
        source, destination = self.ends()
        self.latency(0)
        storage = self.cluster.agents[source].storage
        storage.set(no_space=True)
        try:
            wait_until(self.writes_stand_still, "the guest's writes to be held", 30, pause=0.3)
            migration = self.migrate(destination, options=("--inflight", "drain", "--drain-timeout", "1s"))
        finally:
            storage.set(no_space=False)
        self.assertEqual((migration["phase"], migration["guest_location"], migration["reason"]),
                         ("FAILED", "SOURCE", "DRAIN_TIMEOUT"), summary(migration))
        self.assert_runs_only(source)
        self.move(destination)
        self.assert_clean()

    def test_a_destination_that_takes_requests_and_is_not_heard_of_gets_no_guest(self):
        """Its mediator has the requests in its hands and does not say so: they are completed at the source, and only there."""
        source, destination = self.ends()
        there = self.cluster.agents[destination]
        there.set_pause("devices-taken")
        name = self.migrate(destination, wait=False, options=HANDOFF)["name"]
        wait_until(lambda: there.paused_at("devices-taken"), lambda: f"the devices' states; the migration is "
                   f"{summary(self.cluster.migration(name))}", 60)
        try:
            ended = self.cluster.wait_ended(name)
        finally:
            there.release()
        self.assertEqual((ended["phase"], ended["guest_location"]), ("FAILED", "SOURCE"), summary(ended))
        self.assert_runs_only(source)
        self.latency(0)
        self.assert_clean()


class HandoffNewer(SlowDisk, BackendTest):
    """The same with QEMU 10.0 from backports."""

    BACKPORTS = {"a": "qemu", "b": "qemu"}
    CMDLINE = Handoff.CMDLINE

    def test_requests_in_flight_go_along_there_and_back(self):
        for to in reversed(self.ends()):
            self.assert_handed_off(self.move_in_flight(to, HANDOFF))
        self.latency(0)
        self.assert_clean()


MAC = "52:54:00:ba:70:0b"
IP = "10.88.0.2"
NIC = f"""<interface type='vhostuser'>
      <mac address='{MAC}'/>
      <source type='unix' path='{{path}}' mode='client'/>
      <model type='virtio'/>
      <rom enabled='no'/>
    </interface>"""


class NicCluster(BackendCluster):
    def __init__(self, lab, **options):
        super().__init__(lab, **options)
        wire = os.path.join(lab.dir, "wire.sock")
        self.outside = Outside(wire, IP)
        lab.undo.callback(self.outside.stop)
        self.nics = {name: NetDevice(self, name, "net0", MAC, wire) for name in self.agents}
        for name, agent in self.agents.items():
            agent.settings["backends"]["net0"] = {"socket": self.nics[name].socket, "kind": "lab"}
            agent.write_config()

    def __enter__(self):
        self.outside.start()
        for nic in self.nics.values():
            nic.start()
        return super().__enter__()


class MediatedNic(BackendTest):
    """A NIC (the lab net device) and a disk: packets go on where the guest is."""

    # Without KVM, QEMU 7.2 crashes when a guest uses MSI-X on a vhost-user NIC (virtio_pci_vector_unmask goes on to KVM's
    # irqfds).
    CMDLINE = f"{QUIET} lab.ip={IP} pci=nomsi"
    cluster_class = NicCluster

    @classmethod
    def describe_domain(cls, host):
        return super().describe_domain(host, devices=NIC.format(path=cls.cluster.nics[host].socket))

    def test_packets_go_on_there_and_back(self):
        self.have_guest()
        outside = self.cluster.outside
        for to in reversed(self.ends()):
            outside.wait_answers(20, timeout=60)
            begin = time.monotonic()
            self.move(to)
            outside.wait_answers(50, timeout=60)
            end = time.monotonic()
            self.assertEqual((outside.damaged, outside.repeated), (0, 0))
            self.assertLess(outside.longest_gap(begin, end), 10.0)
            # Announced from where it is now: RARP by the back-end, or the guest's own ARP.
            wires = {wire for kind in (ARP, RARP) for at, wire, source in outside.frames.get(kind, [])
                     if at >= begin and source == bytes.fromhex(MAC.replace(":", ""))}
            self.assertTrue(wires, "nothing announced the guest")
            self.assertIn(outside.answers[max(outside.answers)][1], wires)
        self.assert_clean()


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
