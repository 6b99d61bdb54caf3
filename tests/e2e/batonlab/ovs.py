"""Open vSwitch with DPDK at the hosts of a lab: a switch each, joined by a wire, and a station at one of them that asks the
guest, wherever it is."""
import ctypes
import os
import socket

from . import huge_pages
from .lab import LabError, wait_until
from .nic import Outside

BRIDGE = "br0"
# Port numbers of OpenFlow, by which the switch says where it has learnt an address.
GUEST, JOIN, STATION = 1, 2, 3
PROGRAM = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"
SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"
# No buses, no files in /var/run/dpdk. Open vSwitch adds --in-memory by itself: huge pages without a file system of theirs.
EAL = "--no-pci --no-shconf --no-telemetry --iova-mode=va"
# What a vhost-user port moves is copied by the processor, to no device, so that a switch can do without huge pages. EAL
# refuses --in-memory beside --no-huge, and Open vSwitch does not add it where it finds --legacy-mem, which --no-huge means
# anyhow.
EAL_SMALL = f"--no-huge --legacy-mem -m 512 {EAL}"
# What a switch takes of huge pages at most.
SWITCH_MIB = 256
# A poll thread without work sleeps, up to so long (other_config:pmd-maxsleep, from 3.2 on pmd-sleep-max); without that
# each takes a whole processor.
MAX_SLEEP_US = 500

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3


class Switch:
    """ovsdb-server and ovs-vswitchd of one host: a user space bridge with the guest's port, and the wires of the lab."""

    def __init__(self, lab, network, host, huge):
        self.lab, self.network, self.host, self.huge = lab, network, host, huge
        self.dir = os.path.join(lab.dir, host, "ovs")
        os.makedirs(self.dir)
        self.database = os.path.join(self.dir, "db.sock")
        self.control = os.path.join(self.dir, "vswitchd.ctl")
        # Where a port of type dpdkvhostuser listens, and where one of type dpdkvhostuserclient looks for a VMM that does.
        self.socket = os.path.join(self.dir, "net0")
        self.vmm_socket = os.path.join(self.dir, "vmm.sock")
        self.daemon = None

    def spawn(self, argv, log):
        env = {name: self.dir for name in ("OVS_RUNDIR", "OVS_DBDIR", "OVS_LOGDIR", "OVS_SYSCONFDIR", "RUNTIME_DIRECTORY")}
        return self.lab.spawn(argv, f"{log}-{self.host}", host=self.host, prefix=self.network.prefix(self.host), env=env)

    def vsctl(self, *words):
        """Without --no-wait it waits until ovs-vswitchd has done it."""
        return self.lab.run(["ovs-vsctl", f"--db=unix:{self.database}", "--timeout=30", "--retry", *words]).stdout.strip()

    def appctl(self, *words):
        return self.lab.run(["ovs-appctl", "-t", self.control, *words]).stdout

    def start(self, processor):
        """`processor`: which one its poll thread runs on."""
        database = os.path.join(self.dir, "conf.db")
        self.lab.run(["ovsdb-tool", "create", database, SCHEMA])
        self.spawn(["ovsdb-server", database, f"--remote=punix:{self.database}",
                    f"--unixctl={os.path.join(self.dir, 'ovsdb.ctl')}"], "ovsdb")
        self.vsctl("--no-wait", "init")
        memory = [f"other_config:dpdk-extra={EAL_SMALL}"]
        if self.huge:
            memory = [f"other_config:dpdk-extra={EAL}", f"other_config:dpdk-socket-limit={SWITCH_MIB}"]
        self.vsctl("--no-wait", "set", "Open_vSwitch", ".", "other_config:dpdk-init=true", *memory,
                   f"other_config:pmd-cpu-mask={1 << processor:#x}", f"other_config:pmd-maxsleep={MAX_SLEEP_US}",
                   "other_config:per-port-memory=true")
        self.start_daemon()
        self.vsctl("add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=netdev")

    def start_daemon(self):
        self.daemon = self.spawn([PROGRAM, f"unix:{self.database}", f"--unixctl={self.control}"], "vswitchd")

    def restart_daemon(self):
        """As an upgrade does. (Of one that was killed the port's socket would stay, and the next could not listen there.)"""
        self.daemon.terminate()
        self.daemon.wait(timeout=30)
        self.start_daemon()
        wait_until(lambda: os.path.exists(self.socket), f"the port of {self.host}'s switch")

    def add_port(self, name, number, *options):
        self.vsctl("add-port", BRIDGE, name, "--", "set", "Interface", name, f"ofport_request={number}", *options)

    def add_guest_port(self, switch_listens):
        if switch_listens:
            self.add_port("net0", GUEST, "type=dpdkvhostuser")
        else:
            self.add_port("net0", GUEST, "type=dpdkvhostuserclient", f"options:vhost-server-path={self.vmm_socket}")

    def learnt(self, mac):
        """The number of the port behind which it has heard that address; None where it has not."""
        for line in self.appctl("fdb/show", BRIDGE).splitlines()[1:]:
            port, _, address, _ = line.split()
            if address == mac:
                return int(port) if port.isdigit() else port
        return None

    def describe(self):
        """What the switch says of the guest's port, and how many packets it has counted there."""
        return self.vsctl("get", "Interface", "net0", "status", "statistics")


class Station(Outside):
    """Behind a port of host a's switch: a network interface in the namespace of batond, where nothing else listens on it."""

    def __init__(self, network, path, guest_ip, interface):
        super().__init__(path, guest_ip)
        self.namespace = f"/run/netns/{network.names['control']}"
        self.interface = interface
        self.failed = None

    def run(self):
        try:
            # Of this thread alone; a socket stays in the namespace that it was made in.
            with open(self.namespace, "rb") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), "setns")
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            wire.bind((self.interface, ETH_P_ALL))
            wire.setblocking(False)
            self.names[wire] = 0
            super().run()
        except OSError as error:
            self.failed = error
            raise


class Switches:
    """The switches of both hosts, joined, and the station. `network`: Namespaces; `huge`: with huge pages, and so many MiB
    of them for a guest at each host."""

    def __init__(self, lab, network, guest_ip, switch_listens, huge=None):
        if not os.path.exists(PROGRAM):
            raise LabError("needs Open vSwitch with DPDK: section switch of deps/packages.txt")
        self.lab, self.network = lab, network
        self.at = {host: Switch(lab, network, host, huge is not None) for host in ("a", "b")}
        self.huge = huge
        self.switch_listens = switch_listens
        names = network.names
        network.ip("-n", names["a"], "link", "add", "join", "type", "veth", "peer", "name", "join", "netns", names["b"])
        network.ip("-n", names["a"], "link", "add", "station", "type", "veth", "peer", "name", "station", "netns",
                   names["control"])
        for place, name in (("a", "join"), ("b", "join"), ("a", "station"), ("control", "station")):
            network.ip("-n", names[place], "link", "set", name, "up")
        self.station = Station(network, os.path.join(lab.dir, "wire.sock"), guest_ip, "station")

    def start(self):
        if self.huge is not None:
            huge_pages.reserve(self.lab, len(self.at) * (SWITCH_MIB + self.huge))
        processors = sorted(os.sched_getaffinity(0))
        for number, (host, switch) in enumerate(self.at.items()):
            switch.start(processors[number % len(processors)])
            switch.add_guest_port(self.switch_listens)
            switch.add_port("join", JOIN)
            if host == "a":
                switch.add_port("station", STATION)
        self.station.start()
        self.lab.undo.callback(self.station.stop)

    def way_to(self, mac):
        """By host, behind which port its switch has learnt the guest."""
        return {host: switch.learnt(mac) for host, switch in self.at.items()}


def way_when_at(host):
    """What way_to() says of a guest that has been heard at that host."""
    return {name: GUEST if name == host else JOIN for name in ("a", "b")}
