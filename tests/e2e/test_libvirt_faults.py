"""Each process that takes part in moving a libvirt domain is killed at each moment. Afterwards there is exactly one guest,
by both libvirts' account and by batond's, it has lost nothing, and the next migration works."""
import sys
import unittest

from batonlab.cluster import summary
from batonlab.faults import EITHER, LOST, MOVED, STAYED, FaultSteps, add_cases
from batonlab.lab import wait_until
from batonlab.libvirt_case import SLOW, VM, LibvirtTest

# What is killed (and started again where something starts it: libvirtd by the test, as its unit would; a shim by its
# agent), at which moment (LibvirtTest.begin), and which ends are right.
MATRIX = {
    "batond": {"prepared": EITHER, "precopy": MOVED, "switchover": MOVED, "finish": MOVED, "confirm": MOVED},
    "source_agent": {"prepared": EITHER, "precopy": MOVED, "switchover": MOVED, "finish": MOVED, "confirm": MOVED},
    "destination_agent": {"prepared": EITHER, "precopy": MOVED, "switchover": MOVED, "finish": MOVED, "confirm": MOVED},
    # At "finish" the destination's libvirtd finds, when it goes on, both the order to start the guest and the end of the
    # connection. It carries the order out first.
    "source_libvirtd": {"prepared": EITHER, "precopy": STAYED, "switchover": EITHER, "finish": MOVED, "confirm": MOVED},
    "destination_libvirtd": {"prepared": EITHER, "precopy": STAYED, "switchover": STAYED, "finish": EITHER,
                             "confirm": MOVED},
    "source_shim": {"prepared": STAYED, "precopy": STAYED, "switchover": EITHER, "finish": EITHER, "confirm": MOVED},
    "destination_shim": {"prepared": EITHER, "precopy": STAYED, "switchover": EITHER, "finish": EITHER, "confirm": MOVED},
    "source_qemu": {"prepared": LOST, "precopy": LOST, "switchover": MOVED | LOST, "finish": MOVED | LOST,
                    "confirm": MOVED},
    # Before libvirt is asked there is none.
    "destination_qemu": {"precopy": STAYED, "switchover": STAYED, "finish": STAYED, "confirm": LOST},
    # Of both sides at once: neither knows of the other.
    "virtlogd": {"prepared": EITHER, "precopy": MOVED, "switchover": MOVED, "finish": MOVED, "confirm": MOVED},
}

# Seconds until the end is known, where a destination that was not watched for a moment must not leave the guest standing
# still until batond gives up on it (a minute). Usually 3.
LIMITS = {("destination_shim", "switchover"): 30, ("destination_shim", "finish"): 30}

# In two tests, so that each is a matter of few minutes. Faults: each moment, on each side, and all of what has lost a guest
# before. MoreFaults: the rest.
OFTEN = {
    "batond": ("prepared", "confirm"),
    "source_agent": ("prepared", "finish"),
    "destination_agent": ("precopy", "confirm"),
    "source_libvirtd": ("prepared", "precopy", "switchover", "finish", "confirm"),
    "destination_libvirtd": ("prepared", "precopy", "switchover", "finish", "confirm"),
    "source_shim": ("precopy", "finish", "confirm"),
    "destination_shim": ("prepared", "precopy"),
    "destination_qemu": ("precopy", "finish"),
    "virtlogd": ("precopy",),
}


class FaultTest(FaultSteps, LibvirtTest):
    # A guest that is busy. QEMU 7.2 does not move that without loss under TCG, see test_libvirt.py.
    BACKPORTS = {"a": "qemu", "b": "qemu"}

    def fault_source_libvirtd(self):
        self.cluster.hosts[self.source].restart()

    def fault_destination_libvirtd(self):
        self.cluster.hosts[self.destination].restart()

    def fault_virtlogd(self):
        for host in self.cluster.hosts.values():
            host.restart("virtlogd")

    def check(self, process, point, allowed):
        guest = self.have_guest()
        name = self.begin(point)
        getattr(self, "fault_" + process)()
        self.go_on(name)
        ended = self.cluster.wait_ended(name, LIMITS.get((process, point), 90))
        self.check_end(guest, ended, allowed)

    def check_lost(self):
        """The guest ended with its QEMU; nothing of it runs anywhere, batond says so, and it can be started again."""
        for host in ("a", "b"):
            wait_until(lambda host=host: not self.processes("qemu-system", host), f"no QEMU on {host}", 30)
            state = self.cluster.hosts[host].state(VM)
            self.assertTrue(state == "" or state.startswith("shut off"), f"{host}: {state}")
        wait_until(lambda: (self.vm() or {"state": "STOPPED"})["state"] == "STOPPED",
                   lambda: f"batond to know that it has ended, it says {self.vm()}", 30, pause=0.1)
        wait_until(lambda: not self.remains(), lambda: f"nothing of the migration, there is {self.remains()}", 30)
        self.lose_guest()
        self.have_guest(self.source)
        self.move(self.destination)


class Faults(FaultTest):
    def test_paused_domain_whose_confirm_is_lost(self):
        """Its user paused it when all was prepared. It has never run at the destination and is not to run: what is there
        ends, and it stays as it was."""
        guest = self.have_guest()
        name = self.begin("prepared", SLOW)
        libvirt = self.cluster.hosts[self.source]
        libvirt.virsh("suspend", VM)
        self.cluster.agents[self.source].release()
        self.wait_precopy(name)
        self.wait_finish(name, "paused (user)")
        self.wait_confirm(name, "paused (user)")
        libvirt.restart()
        self.go_on(name)
        ended = self.cluster.wait_ended(name, 90)
        self.assertEqual((ended["phase"], ended["guest_location"]), ("FAILED", "PAUSED_SOURCE"), summary(ended))
        self.assertTrue(libvirt.state(VM).startswith("paused"), self.cluster.states(VM))
        libvirt.virsh("resume", VM)
        self.assert_runs_only(self.source)
        self.assert_clean()
        self.move(self.destination)
        self.assertIs(guest, self.guest)


class MoreFaults(FaultTest):
    pass


def part(often):
    return {process: {moment: ends for moment, ends in moments.items() if (moment in OFTEN.get(process, ())) == often}
            for process, moments in MATRIX.items()}


add_cases(Faults, part(True), "is killed")
add_cases(MoreFaults, part(False), "is killed")

if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
