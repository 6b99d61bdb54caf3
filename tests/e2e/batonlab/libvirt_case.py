"""Base of the end-to-end tests with libvirt: a cluster of libvirt hosts that the tests of a class share."""
import re
import select
import signal

from .case import ClusterTest
from .cluster import summary
from .lab import LabError, wait_until
from .libvirt import LibvirtCluster, backports

VM = "web1"

# Slow enough that pre-copy lasts until something is done about it, fast enough that a cancel is noticed at once.
SLOW = ("--bandwidth", "4MiB")

# Where libvirt has the first virtio disk.
DISK = "/machine/peripheral/virtio-disk0/virtio-backend"


def backports_of(wanted):
    return {host: backports(what) for host, what in wanted.items()}


class LibvirtTest(ClusterTest):
    SECURE = True
    # Enough memory traffic for several iterations, a disk that is never idle, and a full check that does not take long.
    CMDLINE = "lab.pages=2048 lab.dirty=1000 lab.blocks=512"
    MEMORY = 128
    # What QEMU is asked when the guest does not use its disk.
    DISK_QUESTIONS = ("info status", "info lapic", "info registers", f"info virtio-status {DISK}", "info blockstats",
                      f"info virtio-queue-status {DISK} 0")
    # Disks of their own at each host, which the migration copies.
    PRIVATE = False

    # More of the domain's XML, see LibvirtCluster.domain_xml().
    DOMAIN = {}

    # What hosts have from backports instead of the installed ones: "qemu" or "libvirt", by host.
    BACKPORTS = {}
    BATOND = {}

    @classmethod
    def make_cluster(cls):
        return LibvirtCluster(cls.lab, secure=cls.SECURE, batond_settings=cls.BATOND, usr=backports_of(cls.BACKPORTS))

    def have_guest(self, host=None):
        cls = type(self)
        if cls.guest is None:
            cls.guest = cls.cluster.start_domain(host or "a", VM, private=cls.PRIVATE, memory=cls.MEMORY,
                                                 cmdline=self.CMDLINE, **self.DOMAIN)
            wait_until(lambda: (self.vm() or {}).get("state") == "RUNNING", "batond to know the domain", 30)
        elif host and self.host() != host:
            self.move(host)
        return cls.guest

    def vm(self):
        return self.cluster.vm(VM)

    def host(self):
        """Where both daemons say that it runs."""
        return wait_until(lambda: self.cluster.runs_at(VM), lambda: f"{VM} to run at one host, it is "
                          f"{self.cluster.states(VM)}", 30, pause=0.1)

    def ends(self):
        host = self.host()
        return host, "b" if host == "a" else "a"

    def migrate(self, to, wait=True, options=()):
        return self.cluster.migrate(to, vm=VM, wait=wait, options=options)

    def move(self, to, options=()):
        migration = self.migrate(to, options=options)
        self.assertEqual((migration["phase"], migration["guest_location"]), ("SUCCEEDED", "DESTINATION"),
                         summary(migration))
        self.assert_runs_only(to)
        return migration

    def lose_guest(self):
        cls = type(self)
        cls.guest = None
        for libvirt in self.cluster.hosts.values():
            libvirt.virsh("destroy", VM, check=False)
            libvirt.virsh("undefine", VM, check=False)

    # --- moments of a migration ---

    def begin(self, point, options=()):
        """Starts a migration and holds it at a moment; returns its name.

        preparing   the destination is about to say that it is ready
        prepared    Baton has checked and prepared both ends, libvirt has not been asked yet
        precopy     QEMU copies memory, slowly
        switchover  the source's QEMU has stopped the guest, and the source's libvirtd does nothing more
        finish      the source's QEMU has sent everything and stands still, the destination's has not been started: its
                    libvirtd does not answer
        confirm     the guest runs at the destination, and the source has not heard of it: its shim relays nothing
        """
        self.source, self.destination = self.ends()
        self.held = []
        if point in ("preparing", "prepared"):
            host, pause = (self.destination, "prepared") if point == "preparing" else (self.source, "source-prepared")
            agent = self.cluster.agents[host]
            agent.set_pause(pause)
            name = self.migrate(self.destination, wait=False, options=options)["name"]
            wait_until(lambda: agent.paused_at(pause), lambda: f"pause point {pause} of {self.describe(name)}", 30)
            return name
        name = self.migrate(self.destination, wait=False, options=(*options, *SLOW))["name"]
        self.wait_precopy(name)
        if point == "precopy":
            return name
        if point == "switchover":
            self.hold_at_stop(name)
            return name
        self.wait_finish(name, "paused (migrating)")
        if point == "confirm":
            self.wait_confirm(name, "running (migrated)")
        return name

    def hold_at_stop(self, name):
        """From pre-copy to the moment "switchover". It is over soon, so the event is waited for that tells of it, and nothing
        is looked for between the event and the signal."""
        libvirt = self.cluster.hosts[self.source]
        daemon = self.processes("libvirtd", self.source)
        with libvirt.events(VM) as events:
            self.cluster.ctl("retune", name.split("/")[1], "--bandwidth", "unlimited")
            wait_until(lambda: (select.select([events], [], [], 1)[0] and b"Suspended" in events.readline()) or
                       libvirt.state(VM) == "paused (migrating)",
                       lambda: f"{VM} to stand still at {self.source}; {self.describe(name)}", 30, pause=0)
            self.hold("libvirtd", self.source, daemon)

    def wait_finish(self, name, source):
        """From pre-copy to the moment "finish"; `source`: how the guest stands still there."""
        self.hold("libvirtd", self.destination)
        self.cluster.ctl("retune", name.split("/")[1], "--bandwidth", "unlimited")
        self.wait_state(self.source, source, name)
        # The guest's last state is sent after it was stopped. What libvirt tells the other daemon after that has an XML
        # document in it; everything else that it has not read yet is small.
        libvirt = self.cluster.hosts[self.destination]
        wait_until(lambda: not libvirt.connected("/vmm") and libvirt.unread() > 300,
                   lambda: f"the end of QEMU's part of {self.describe(name)}; {libvirt.unread()} bytes unread", 30)

    def wait_confirm(self, name, destination):
        """From there to the moment "confirm"; `destination`: how the guest is there."""
        self.hold("baton-shim", self.source)
        self.let_go("libvirtd", self.destination)
        self.wait_state(self.destination, destination, name)

    def wait_precopy(self, name):
        """Until libvirt's job is under way."""
        libvirt = self.cluster.hosts[self.source]

        def moving():
            info = libvirt.virsh("domjobinfo", VM, check=False).stdout
            return "Outgoing migration" in info and "Memory processed" in info
        wait_until(moving, lambda: f"libvirt's job of {self.describe(name)}", 30, pause=0.05)

    def wait_state(self, host, state, name):
        libvirt = self.cluster.hosts[host]
        wait_until(lambda: libvirt.state(VM) == state, lambda: f"{VM} to be {state} at {host}, it is "
                   f"{libvirt.state(VM)}; {self.describe(name)}", 30, pause=0.02)

    def describe(self, name):
        return f"the migration {summary(self.cluster.migration(name) or {})}"

    def processes(self, program, host):
        found = super().processes(program, host)
        if program == "qemu-system":
            # libvirt's questions about QEMU's capabilities run QEMUs as well.
            found = [process for process in found if any(f"guest={VM}," in word for word in process.argv)]
        return found

    def hold(self, program, host, found=None):
        """Stops the processes of that kind (`found`, if they have been looked for), until let_go() or the end of the test."""
        found = found or self.processes(program, host)
        if not found:
            raise LabError(f"no {program} on {host}")
        for process in found:
            process.kill(signal.SIGSTOP)
        self.held.append((program, host, found))
        self.addCleanup(lambda: [process.kill(signal.SIGCONT) for process in found])

    def let_go(self, program=None, host=None):
        for entry in list(self.held):
            if program in (None, entry[0]) and host in (None, entry[1]):
                self.held.remove(entry)
                for process in entry[2]:
                    process.kill(signal.SIGCONT)

    def go_on(self, name):
        """What begin() held goes on."""
        self.let_go()
        for agent in self.cluster.agents.values():
            agent.release()
        # Refused where the migration has ended or is beyond pre-copy.
        self.cluster.ctl("retune", name.split("/")[1], "--bandwidth", "unlimited", check=False)

    # --- what must be so afterwards ---

    def assert_runs_only(self, host):
        """One guest, running, at `host`, by both daemons' account and by batond's; nothing of the migration is left."""
        other = "b" if host == "a" else "a"

        def settled():
            return (self.cluster.hosts[other].state(VM) == "" and not self.processes("qemu-system", other) and
                    len(self.processes("qemu-system", host)) == 1 and
                    (self.cluster.hosts[host].state(VM) or "").startswith("running"))
        wait_until(settled, lambda: f"{VM} to run at {host} only, it is {self.cluster.states(VM)}", 30, pause=0.1)
        wait_until(lambda: (self.vm() or {}).get("state") == "RUNNING" and self.cluster.host_of(VM) == host,
                   lambda: f"{VM} running on {host} by batond's account, which says {self.vm()}", 30, pause=0.1)
        wait_until(lambda: not self.remains(), lambda: f"nothing of a migration, there is {self.remains()}", 30, pause=0.1)
        self.assert_writes(host)

    def assert_writes(self, host):
        """The guest uses its disk, or the error says what its QEMU knows of it: whether requests wait for QEMU, or their ends
        for the guest."""
        try:
            self.guest.wait_writes(20)
        except LabError as error:
            libvirt = self.cluster.hosts[host]
            known = libvirt.monitor(VM, *self.DISK_QUESTIONS)
            # Flags and index of both rings, as the guest sees them.
            rings = re.findall(r"(?:avail|used):\s+(0x[0-9a-f]+)", known)
            raise LabError(f"{error}\n{known}\n{libvirt.monitor(VM, *(f'xp /2hx {at}' for at in rings))}") from error

    def remains(self):
        """What migrations have left: shims, and the directories of their sockets."""
        return [entry for agent in self.cluster.agents.values()
                for entry in (*agent.shims(), *agent.migration_directories())]
