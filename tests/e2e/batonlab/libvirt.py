"""Hosts with a libvirt of their own: each in mount and UTS namespaces, with libvirtd, virtlogd and an agent that sees
that libvirt and no other (tests/lab/libvirt/host.sh)."""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid

from .cluster import PROCESSORS, Agent, Cluster
from .guest import Guest
from .lab import ROOT, LabError, wait_until

# Of a domain, inside the host: /run is the host's own, so that the path is the same at both ends.
CONSOLE = "/run/{name}.console"
PRIVATE_DISK = "/var/lib/libvirt/images/{name}.img"
DISK_SIZE = 64 << 20
# What libvirtd found out about the installed QEMUs, which takes it seconds each time. It drops by itself what is out of
# date.
CAPABILITIES = os.path.join(os.environ.get("BATON_CACHE", os.path.join(ROOT, "build/cache")), "libvirt-capabilities")

# No cgroups, no namespaces, no labels, no users of its own: a test host is not what confines a guest.
QEMU_CONF = """user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
stdio_handler = "logd"
migration_host = "{address}"
"""

LIBVIRTD_CONF = """host_uuid = "{uuid}"
unix_sock_auth = "none"
unix_sock_group = "root"
log_outputs = "3:stderr"
"""

DOMAIN = """<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory}</memory>
  <vcpu current='1'>{processors}</vcpu>{iothreads}
  <memoryBacking>{huge_pages}<source type='memfd'/><access mode='shared'/></memoryBacking>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{guest_dir}/vmlinuz</kernel>
    <initrd>{guest_dir}/initrd.gz</initrd>
    <cmdline>console=ttyS0 quiet no_timer_check panic=-1 {cmdline}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model></cpu>
  <clock offset='utc'/>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{emulator}</emulator>
    {disk_xml}
    <controller type='usb' model='none'/>
    <serial type='unix'>
      <source mode='bind' path='{console}'/>
      <log file='{console_log}' append='on'/>
    </serial>
    {balloon}
    {devices}
  </devices>
</domain>
"""

BALLOON = "<memballoon model='virtio' freePageReporting='on'/>"
# Devices that reach into the guest's memory from a thread of their own, not from QEMU's main thread.
APART = {"iothreads": "<iothreads>1</iothreads>", "balloon": "<memballoon model='none'/>", "disk_driver": " iothread='1'"}

FILE_DISK = """<disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'{disk_driver}/>
      <source file='{path}'/>
      <target dev='vda' bus='virtio'/>
    </disk>"""
VHOST_USER_DISK = """<disk type='vhostuser' device='disk'>
      <driver name='qemu' type='raw'/>
      <source type='unix' path='{path}'/>
      <target dev='vda' bus='virtio'/>
    </disk>"""


def backports(what):
    """Directory with what lies over a host's /usr: "qemu", or "libvirt", which comes with that QEMU."""
    script = os.path.join(ROOT, f"tests/lab/backports_{what}.sh")
    directory = subprocess.run([script], check=True, capture_output=True, text=True).stdout.strip()
    return os.path.join(directory, "usr" if what == "libvirt" else "root/usr")


class LibvirtHost:
    """The namespaces of one host, and its daemons."""

    def __init__(self, cluster, name):
        self.cluster, self.name = cluster, name
        self.dir = os.path.join(cluster.lab.dir, name, "host")
        self.run_dir = os.path.join(self.dir, "run")
        self.socket = os.path.join(self.run_dir, "libvirt/libvirt-sock")
        # As whoever sees the lab's directory finds this daemon, in whatever namespace.
        self.uri = f"qemu+unix:///system?socket={self.socket}"
        self.holder = None
        self.processes = {}
        os.makedirs(os.path.join(self.dir, "etc/qemu"))
        os.makedirs(os.path.join(self.dir, "lib/images"))
        # What lies over its /usr: another libvirt and QEMU than the installed ones.
        self.usr = cluster.usr.get(name)
        self.known = CAPABILITIES + (self.usr or "").replace("/", "-")
        self.capabilities = os.path.join(self.dir, "cache/qemu/capabilities")
        other = "b" if name == "a" else "a"
        self.write("etc/qemu.conf", QEMU_CONF.format(address=cluster.network.address(name, other)) + self.more_conf())
        self.write("etc/libvirtd.conf", LIBVIRTD_CONF.format(uuid=uuid.uuid4()))

    def more_conf(self):
        return ""

    def write(self, path, text):
        with open(os.path.join(self.dir, path), "w", encoding="utf-8") as file:
            file.write(text)

    def prefix(self):
        """What a command starts with to run on this host."""
        spaces = f"/proc/{self.holder.pid}/ns"
        return ["nsenter", f"--mount={spaces}/mnt", f"--uts={spaces}/uts", f"--net={spaces}/net", "--"]

    def start(self):
        lab = self.cluster.lab
        # The host before this one may have kept them.
        if os.path.isdir(self.known):
            shutil.copytree(self.known, self.capabilities)
        script = os.path.join(ROOT, "tests/lab/libvirt/host.sh")
        words = [script, "--namespaces", self.dir, f"host-{self.name}", *([self.usr] if self.usr else [])]
        self.holder = lab.spawn(words, f"host-{self.name}", host=self.name, prefix=self.cluster.network.prefix(self.name))
        wait_until(lambda: os.path.exists(os.path.join(self.dir, "ready")) or self.holder.poll() is not None,
                   f"the namespaces of host {self.name}")
        if self.holder.poll() is not None:
            raise LabError(f"the namespaces of host {self.name} were not made, see host-{self.name}.log")
        space = f"/proc/{self.holder.pid}/ns/mnt"
        # Kept open: its number must not come to mean another namespace while this lab looks for processes in it.
        kept = os.open(space, os.O_RDONLY | os.O_CLOEXEC)
        lab.undo.callback(os.close, kept)
        lab.namespaces[os.readlink(space)] = self.name
        for daemon in ("virtlogd", "libvirtd"):
            self.launch(daemon)
        self.wait_ready()
        self.keep_capabilities()

    def keep_capabilities(self):
        """For the next lab, where they were not taken from there."""
        if os.path.isdir(self.known) or not os.path.isdir(self.capabilities):
            return
        new = f"{self.known}.{self.cluster.lab.id}"
        shutil.copytree(self.capabilities, new)
        try:
            os.rename(new, self.known)
        except OSError:
            # Another lab was first.
            shutil.rmtree(new)

    def launch(self, daemon):
        # What it knows of QEMU holds for the processor that it started on, whose number is part of what CPUID says: on one
        # processor until it is ready, it can use what was kept.
        self.processes[daemon] = self.cluster.lab.spawn(
            ["/usr/sbin/" + daemon], f"{daemon}-{self.name}", host=self.name, prefix=self.prefix(),
            preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}))

    def wait_ready(self, timeout=60):
        def ready():
            code = self.processes["libvirtd"].poll()
            if code is not None:
                raise LabError(f"libvirtd of {self.name} ended with {code}, see libvirtd-{self.name}.log")
            return os.path.exists(self.socket) and self.virsh("version", check=False).returncode == 0
        wait_until(ready, f"libvirtd of {self.name}", timeout, pause=0.05)
        for daemon in self.processes.values():
            for thread in os.listdir(f"/proc/{daemon.pid}/task"):
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(thread), os.sched_getaffinity(0))

    def kill(self, daemon="libvirtd", number=signal.SIGKILL):
        process = self.processes[daemon]
        process.send_signal(number)
        process.wait()

    def restart(self, daemon="libvirtd", number=signal.SIGKILL):
        self.kill(daemon, number)
        self.launch(daemon)
        if daemon == "libvirtd":
            self.wait_ready()

    # --- virsh ---

    def virsh_command(self, *words):
        return [*self.prefix(), "virsh", "-q", "-c", self.uri, *words]

    def virsh(self, *words, check=True, timeout=60):
        return self.cluster.lab.run(self.virsh_command(*words), check=check, timeout=timeout)

    def state(self, name):
        """"running (booted)" and the like; "" where there is no such domain, None where the daemon does not answer."""
        result = self.virsh("domstate", name, "--reason", check=False)
        if result.returncode == 0:
            return result.stdout.strip()
        return "" if "Domain not found" in result.stderr or "failed to get domain" in result.stderr else None

    def domains(self):
        """Names of the active ones."""
        return self.virsh("list", "--name").stdout.split()

    @contextlib.contextmanager
    def events(self, name, kind="lifecycle"):
        """A pipe with what libvirtd tells of a domain, a line for each event as it comes. What happens in the first moments may
        be missing. `kind` in capitals: QEMU's events of that name, as QEMU tells of them."""
        question = ["event", "--domain", name, "--event", kind]
        if kind.isupper():
            question = ["qemu-monitor-event", name, "--event", kind]
        command = ["stdbuf", "-oL", *self.virsh_command(*question, "--loop")]
        with subprocess.Popen(command, bufsize=0, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              env=self.cluster.lab.environment()) as watcher:
            try:
                yield watcher.stdout
            finally:
                watcher.kill()

    def monitor(self, name, *questions):
        """What a domain's QEMU answers to commands of its human monitor."""
        answers = (self.virsh("qemu-monitor-command", "--hmp", name, question, check=False) for question in questions)
        return "\n".join(f"{question}: {answer.stdout.strip() or answer.stderr.strip()}"
                         for question, answer in zip(questions, answers))

    def console(self, name):
        return os.path.join(self.run_dir, f"{name}.console")

    def connected(self, end):
        """How many connections there are to unix sockets of this host whose path ends so."""
        with open(f"/proc/{self.holder.pid}/net/unix", encoding="utf-8") as table:
            # Columns: …, state (03: connected), inode, path.
            return sum(words[5] == "03" and words[-1].endswith(end) for words in map(str.split, table) if len(words) > 7)

    def unread(self):
        """Of what its clients have told libvirtd and it has not read, the most of one connection, in bytes."""
        result = self.cluster.lab.run([*self.prefix(), "ss", "-xnH"])
        return max((int(words[2]) for words in map(str.split, result.stdout.splitlines())
                    if words[4].endswith("/libvirt-sock") and words[1] == "ESTAB"), default=0)

    def private_disk(self, name):
        """The domain's disk where each host has its own, as seen from outside."""
        return os.path.join(self.dir, "lib/images", f"{name}.img")


class LibvirtAgent(Agent):
    """A host with a libvirt, and its agent."""

    def __init__(self, cluster, name):
        super().__init__(cluster, name)
        self.libvirt = cluster.host_class(cluster, name)
        # Domains have their disks in the lab's directory, which is one for both hosts.
        self.settings["libvirt"] = {"uri": "qemu:///system", "shared": [cluster.lab.dir]}
        self.settings["log"] = {"level": "debug"}
        del self.settings["backends"]
        self.write_config()

    def start(self):
        if self.libvirt.holder is None:
            self.libvirt.start()
        self.process = self.cluster.lab.spawn(
            [self.cluster.lab.program("baton-agent"), "--config", self.config], f"agent-{self.name}", host=self.name,
            prefix=self.libvirt.prefix(), env={"BATON_PAUSE_AT": "@" + self.pause_file})

    def vm_dirs(self):
        parent = os.path.join(self.run_dir, "vms")
        return [os.path.join(parent, name) for name in os.listdir(parent)] if os.path.isdir(parent) else []

    def migration_directories(self):
        """Of migrations that are under way or have left something."""
        parents = [os.path.join(self.run_dir, "vms"), os.path.join(self.libvirt.run_dir, "baton-libvirt")]
        return [os.path.join(parent, name) for parent in parents if os.path.isdir(parent) for name in os.listdir(parent)]

    def paused_at(self, point, vm=None):
        return any(os.path.exists(os.path.join(directory, f"pause-{point}")) for directory in self.vm_dirs())

    def release(self, vm=None):
        self.set_pause()
        for directory in self.vm_dirs():
            with contextlib.suppress(FileNotFoundError):
                for name in os.listdir(directory):
                    if name.startswith("pause-"):
                        os.unlink(os.path.join(directory, name))

    def holdings(self, vm="web1"):
        """What there is of a domain on this host."""
        found = [process for process in self.qemus() if any(f"guest={vm}," in word for word in process.argv)]
        return found + ([f"domain {vm}: {state}"] if (state := self.libvirt.state(vm)) else [])


class DomainGuest(Guest):
    """The lab guest in a domain, on its console socket at the host where it runs."""

    def __init__(self, cluster, name, image):
        super().__init__(cluster, name)
        self.image = image

    def wait_ready(self, timeout=60):
        # Its first words may have come before anybody listened, and what it is told before them it does not hear.
        # How long an answer takes depends on what else the machine does.
        patience = 0.5

        def answers():
            nonlocal patience
            patience = min(2 * patience, 8)
            return self._session("s", lambda text: "STATUS n=" in text, time.monotonic() + patience)[0]
        wait_until(answers, f"guest {self.name} to boot", timeout)

    def _session(self, letter, find, deadline):
        host = self.cluster.runs_at(self.name)
        if host is None:
            return None, "(it runs nowhere)"
        return console_session(self.cluster.agents[host].libvirt.console(self.name), letter, find, deadline)

    def disk(self):
        """The image that the guest has now."""
        if self.image:
            return self.image
        return self.cluster.agents[self.cluster.runs_at(self.name)].libvirt.private_disk(self.name)


def console_session(path, letter, find, deadline):
    """Says a letter on a console socket and listens until `find` finds something or the other end goes."""
    text = ""
    with socket.socket(socket.AF_UNIX) as console:
        try:
            console.connect(path)
            console.sendall(letter.encode())
            while time.monotonic() < deadline:
                console.settimeout(max(0.01, deadline - time.monotonic()))
                data = console.recv(65536)
                if not data:
                    break
                text += data.decode(errors="replace")
                if found := find(text):
                    return found, text
        except OSError:
            pass
    return None, text


class LibvirtCluster(Cluster):
    """batond and two hosts with libvirt. Domains have their disk in the lab's directory, which both hosts see, or, with
    `private`, each host's own below /var/lib/libvirt/images. `usr`: by host, what lies over its /usr; `host_class`: what a
    host is made of."""

    agent_class = LibvirtAgent

    def __init__(self, lab, usr=None, batond_settings=None, host_class=LibvirtHost, **options):
        self.host_class = host_class
        self.usr = usr or {}
        self.batond_settings = batond_settings or {}
        super().__init__(lab, **options)
        self.machine = "pc-q35-7.2"
        self.emulator = "/usr/bin/qemu-system-x86_64"

    def __enter__(self):
        self.batond.start()
        for agent in self.agents.values():
            agent.start()
        self.wait_hosts()
        return self

    @property
    def hosts(self):
        return {name: agent.libvirt for name, agent in self.agents.items()}

    def domain_xml(self, name, memory=128, cmdline="", disk=None, **fields):
        fields = {"uuid": uuid.uuid4(), "machine": self.machine, "emulator": self.emulator,
                  "console": CONSOLE.format(name=name), "console_log": f"/var/log/libvirt/{name}.console.log",
                  "disk_xml": FILE_DISK.format(path=disk, disk_driver=fields.pop("disk_driver", "")), "devices": "",
                  "huge_pages": "", "iothreads": "", "balloon": BALLOON, **fields}
        return DOMAIN.format(name=name, memory=memory, cmdline=cmdline, guest_dir=self.guest_dir, processors=PROCESSORS,
                             **fields)

    @staticmethod
    def make_disk(path):
        with open(path, "wb") as file:
            file.truncate(DISK_SIZE)
        return path

    def write_xml(self, name, xml):
        path = os.path.join(self.lab.dir, f"{name}.xml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(xml)
        return path

    def start_domain(self, host="a", name="web1", private=False, persistent=True, wait=True, **options):
        """Defines and starts a domain with the lab guest and, unless told otherwise, waits until it works."""
        if private:
            images, disk = [agent.private_disk(name) for agent in self.hosts.values()], PRIVATE_DISK.format(name=name)
        else:
            disk = os.path.join(self.lab.dir, f"{name}.img")
            images = [disk]
        for image in images:
            self.make_disk(image)
        path = self.write_xml(name, self.domain_xml(name, disk=disk, **options))
        libvirt = self.hosts[host]
        if persistent:
            libvirt.virsh("define", path)
            libvirt.virsh("start", name)
        else:
            libvirt.virsh("create", path)
        guest = DomainGuest(self, name, None if private else disk)
        if wait:
            guest.wait_ready()
            guest.wait_writes(1)
        return guest

    # --- what both daemons say ---

    def states(self, name="web1"):
        return {host: libvirt.state(name) for host, libvirt in self.hosts.items()}

    def runs_at(self, name="web1"):
        """The host where the domain runs; None where it runs at neither or, for a moment, is said to run at both."""
        hosts = [host for host, state in self.states(name).items() if (state or "").startswith("running")]
        return hosts[0] if len(hosts) == 1 else None
