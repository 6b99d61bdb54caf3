"""batond, two agents as two hosts, a storage daemon on each over one disk image, and a guest that moves."""
import errno
import json
import os
import subprocess
import time

from .certificates import Authority
from .guest import Guest
from .lab import ROOT, LabError, listening, wait_until
from .network import Loopback, Namespaces

GUEST_MEMORY = "256MiB"
HOSTS = ("a", "b")


def yaml(value, indent=0):
    """The little YAML that configuration files need: maps of maps and scalars, JSON where it is a list."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines.append(" " * indent + f"{json.dumps(key) if '*' in key else key}:")
            lines.append(yaml(item, indent + 2))
        else:
            lines.append(" " * indent + f"{key}: {json.dumps(item)}")
    return "\n".join(lines)


def build_guest(lab):
    """Directory of the lab guest's kernel and initramfs."""
    directory = os.path.join(ROOT, "build", "guest")
    lab.run([os.path.join(ROOT, "tests/lab/guest/build.sh"), directory], timeout=300)
    return directory


# Of a guest, whose Linux uses one. In the code that QEMU's TCG makes for a machine that can only have one processor, locked
# instructions are plain ones, and so no barriers (seen with -d op: QEMU 7.2, where mfence is dropped as well, and 10.0). Linux uses
# them between what it writes for a device and what it reads of it, and devices are other threads: now and then each misses that the
# other wants to be told, and the disk is silent for good.
PROCESSORS = 2
ONE = "maxcpus=1"


class StorageDaemon:
    """qemu-storage-daemon with one vhost-user-blk export of the shared image."""

    kind = "qemu-storage-daemon"

    def __init__(self, cluster, host, program="qemu-storage-daemon"):
        self.cluster, self.host, self.program = cluster, host, program
        self.socket = os.path.join(cluster.lab.dir, f"{host}-disk0.sock")
        self.second_socket = os.path.join(cluster.lab.dir, f"{host}-disk1.sock")
        self.process = None

    def start(self):
        disks = list(zip((self.socket, self.second_socket), self.cluster.images))
        command = [self.program]
        for number, (path, image) in enumerate(disks):
            if os.path.exists(path):
                os.unlink(path)
            command += ["--blockdev", f"driver=file,node-name=file{number},filename={image},locking=off", "--export",
                        f"type=vhost-user-blk,id=disk{number},node-name=file{number},addr.type=unix,addr.path={path},"
                        "writable=on,num-queues=1"]
        self.process = self.cluster.lab.spawn(command, f"storage-{self.host}", host=self.host)
        wait_until(lambda: all(listening(path) for path, _ in disks) or self.process.poll() is not None,
                   f"storage daemon {self.host}")
        if self.process.poll() is not None:
            raise LabError(f"qemu-storage-daemon ended, see logs/{self.cluster.lab.name}/storage-{self.host}.log")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def restart(self):
        self.kill()
        self.start()


class LabStorage:
    """baton-lab-device over the shared image: suspends without completing, and does as it is told. `options`: of its
    command line."""

    kind = "lab"

    def __init__(self, cluster, host, options=()):
        self.cluster, self.host, self.options = cluster, host, list(options)
        self.socket = os.path.join(cluster.lab.dir, f"{host}-disk0.sock")
        self.second_socket = os.path.join(cluster.lab.dir, f"{host}-disk1.sock")
        self.control = os.path.join(cluster.lab.dir, f"{host}-disk0.control")
        self.second_control = os.path.join(cluster.lab.dir, f"{host}-disk1.control")
        self.processes = []

    def start(self):
        program = self.cluster.lab.program("baton-lab-device")
        sockets = list(zip((self.socket, self.second_socket), (self.control, self.second_control), self.cluster.images))
        # What a killed one left behind would look like one that is ready.
        for path in (self.socket, self.second_socket, self.control, self.second_control):
            if os.path.exists(path):
                os.unlink(path)
        for number, (path, control, image) in enumerate(sockets):
            words = [program, "--socket", path, "--image", image, "--control", control, *self.options]
            self.processes.append(self.cluster.lab.spawn(words, f"storage-{self.host}-{number}", host=self.host))
        wait_until(lambda: all(listening(path) for path, _, _ in sockets) and self.answers(), f"lab device {self.host}")

    def answers(self):
        try:
            return self.stats()["ok"]
        except LabError:
            return False

    def set(self, disk=0, **settings):
        """Faults and latencies, from now on."""
        command = json.dumps({"cmd": "set", **settings})
        self.cluster.lab.run([self.cluster.lab.program("baton-lab-device"), "ctl",
                              self.second_control if disk else self.control, command])

    def stats(self):
        result = self.cluster.lab.run([self.cluster.lab.program("baton-lab-device"), "ctl", self.control,
                                       json.dumps({"cmd": "stats"})])
        return json.loads(result.stdout)

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes = []

    def restart(self):
        self.kill()
        self.start()


class Batond:
    def __init__(self, cluster):
        self.cluster = cluster
        self.process = None
        network = cluster.network
        self.port = network.port("control")
        self.state_dir = os.path.join(cluster.lab.dir, "batond")
        self.metrics_port = network.port("control") + (1 if network.secure else 0)
        os.makedirs(self.state_dir)
        # The place for what batond is told; the agents and batonctl find it by address().
        self.config = os.path.join(cluster.lab.dir, "batond.yaml")
        settings = {
            "listen": f"{'0.0.0.0' if network.secure else network.address('control')}:{self.port}",
            "metrics": f"127.0.0.1:{self.metrics_port}",
            "data_dir": self.state_dir,
            # Short, so that tests need not wait long until a dead agent counts as dead.
            "heartbeat": {"interval": "500ms", "timeout": "3s"},
        }
        settings.update(cluster.batond_settings)
        if network.secure:
            settings["tls"] = cluster.authority.issue("batond", "/CN=batond", network.all_addresses("control"))
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(yaml(settings) + "\n")

    def address(self, seen_from="control"):
        return f"{self.cluster.network.address('control', seen_from)}:{self.port}"

    def start(self):
        self.process = self.cluster.lab.spawn([self.cluster.lab.program("batond"), "--config", self.config], "batond",
                                              prefix=self.cluster.network.prefix("control"))

    def kill(self):
        self.process.kill()
        self.process.wait()


class SmallDisk:
    """A file system of its own that can be filled."""

    def __init__(self, lab, path):
        self.filler = os.path.join(path, "filler")
        os.makedirs(path)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "baton-lab", path], check=True)
        lab.undo.callback(subprocess.run, ["umount", "--lazy", path], check=False)

    def fill(self):
        """Until not a byte more fits."""
        with open(self.filler, "ab", buffering=0) as file:
            for size in (65536, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def clear(self):
        if os.path.exists(self.filler):
            os.unlink(self.filler)


class Agent:
    """A host."""

    def __init__(self, cluster, name):
        self.cluster, self.name = cluster, name
        lab, network = cluster.lab, cluster.network
        self.process = None
        self.dir = os.path.join(lab.dir, name)
        self.run_dir = os.path.join(self.dir, "run")
        self.state_dir = os.path.join(self.dir, "state")
        self.memory_dir = os.path.join(lab.memory_dir, name)
        os.makedirs(self.dir)
        self.small_disk = SmallDisk(lab, self.state_dir) if cluster.small_disks else None
        if cluster.lab_storage is None:
            self.storage = StorageDaemon(cluster, name, cluster.storage_program)
        else:
            self.storage = LabStorage(cluster, name, cluster.lab_storage)
        self.pause_file = os.path.join(self.dir, "pause-at")
        self.set_pause()
        other = "b" if name == "a" else "a"
        settings = {
            "name": name,
            "batond": cluster.batond.address(name),
            "run_dir": self.run_dir,
            "state_dir": self.state_dir,
            "memory_dir": self.memory_dir,
            "metrics": f"127.0.0.1:{network.port(name) + (2 if network.secure else 0)}",
            "peer": {"listen": f"{network.address(name, other)}:{network.port(name) + (1 if network.secure else 0)}"},
            "qemu": cluster.qemu,
            "kvm": cluster.kvm,
            "shim": lab.program("baton-shim"),
            "backends": {"disk0": {"socket": self.storage.socket, "kind": self.storage.kind}},
        }
        if network.secure:
            pem = cluster.authority.issue(f"agent-{name}", f"/CN=agent:{name}", network.all_addresses(name))
            settings["tls"] = pem
            settings["peer"].update({"tls": True, **pem})
        self.config = os.path.join(self.dir, "agent.yaml")
        self.settings = settings
        self.write_config()

    def write_config(self):
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(yaml(self.settings) + "\n")

    def set_pause(self, *points):
        """At which points the shims of this host wait from now on."""
        with open(self.pause_file, "w", encoding="utf-8") as file:
            file.write(",".join(points))

    def start(self):
        self.process = self.cluster.lab.spawn(
            [self.cluster.lab.program("baton-agent"), "--config", self.config], f"agent-{self.name}", host=self.name,
            prefix=self.cluster.network.prefix(self.name), env={"BATON_PAUSE_AT": "@" + self.pause_file})

    def kill(self):
        self.process.kill()
        self.process.wait()

    def restart(self):
        self.kill()
        self.start()

    def vm_dir(self, vm="vm1"):
        return os.path.join(self.run_dir, "vms", vm)

    def paused_at(self, point, vm="vm1"):
        return os.path.exists(os.path.join(self.vm_dir(vm), f"pause-{point}"))

    def release(self, vm="vm1"):
        """Lets every waiting point of this host go on."""
        self.set_pause()
        directory = self.vm_dir(vm)
        if not os.path.isdir(directory):
            return
        for name in os.listdir(directory):
            if name.startswith("pause-"):
                os.unlink(os.path.join(directory, name))

    def find(self, program, vm=None):
        return self.cluster.lab.find(program, host=self.name, containing=f"/vms/{vm}" if vm else None)

    def qemus(self, vm=None):
        return self.find("baton-lab-guest" if self.cluster.lab_guest else "qemu-system", vm)

    def shims(self, vm=None):
        return self.find("baton-shim", vm)

    def holdings(self, vm="vm1"):
        """What there is of a VM on this host: processes, guest memory, sockets."""
        paths = [os.path.join(self.memory_dir, f"{vm}.ram"), self.vm_dir(vm), os.path.join(self.state_dir, "vms", vm)]
        return self.qemus(vm) + self.shims(vm) + [path for path in paths if os.path.exists(path)]


class Cluster:
    """`with Cluster(lab) as cluster`: everything up, no guest yet. `secure`: namespaces and TLS instead of loopback;
    `small_disks`: each host's state directory is a SmallDisk; `lab_storage`: options of the lab device, which then
    serves the disks instead of qemu-storage-daemon; `lab_guest`: VMs are baton-lab-guest instead of QEMU and Linux."""

    # What a host is made of.
    agent_class = Agent
    # Beside what every batond of a lab is told.
    batond_settings = {}

    def __init__(self, lab, secure=False, qemu=None, kvm=False, storage_program="qemu-storage-daemon",
                 second_disk=False, small_disks=False, lab_storage=None, lab_guest=False):
        self.lab_storage = lab_storage
        self.lab, self.kvm, self.storage_program, self.small_disks = lab, kvm, storage_program, small_disks
        self.lab_guest = lab_guest
        self.qemu = dict(qemu or {"default": {"path": lab.program("baton-lab-guest") if lab_guest
                                              else "/usr/bin/qemu-system-x86_64"}})
        if lab_guest:
            self.qemu["lab"] = {"path": lab.program("baton-lab-guest")}
        os.makedirs(lab.memory_dir, exist_ok=True)
        self.images = [os.path.join(lab.dir, f"disk{number}.img") for number in range(2 if second_disk else 1)]
        self.image = self.images[0]
        # Of the guest, beside its disk: fields of a DeviceSpec.
        self.extra_devices = []
        for image in self.images:
            with open(image, "wb") as file:
                file.truncate(64 << 20)
        self.guest_dir = None if lab_guest else build_guest(lab)
        self.network = Namespaces(lab) if secure else Loopback()
        self.authority = Authority(os.path.join(lab.dir, "tls")) if secure else None
        self.operator = self.authority.issue("operator", "/CN=admin:lab") if secure else None
        self.batond = Batond(self)
        self.agents = {name: self.agent_class(self, name) for name in HOSTS}

    def __enter__(self):
        self.batond.start()
        for agent in self.agents.values():
            agent.storage.start()
            agent.start()
        self.wait_hosts()
        return self

    def __exit__(self, *exc):
        self.lab.close()

    # --- batonctl ---

    def ctl_command(self, *words):
        command = [*self.network.prefix("control"), self.lab.program("batonctl"), "--server", self.batond.address()]
        if self.operator:
            for name, path in self.operator.items():
                command += [f"--{name}", path]
        return [*command, *words]

    def ctl(self, *words, check=True, timeout=60):
        return self.lab.run(self.ctl_command(*words), timeout=timeout, check=check)

    def get(self, *words, timeout=10):
        """The answer of `batonctl get ... -o json`, or None where batond does not answer or knows nothing of it."""
        try:
            result = self.ctl("get", *words, "-o", "json", check=False, timeout=timeout)
        except subprocess.TimeoutExpired:
            return None
        return json.loads(result.stdout) if result.returncode == 0 and result.stdout else None

    def wait_hosts(self, names=HOSTS, timeout=60):
        def connected():
            hosts = (self.get("hosts") or {}).get("hosts", [])
            return {host["name"].split("/")[1] for host in hosts if host.get("connected")} >= set(names)
        wait_until(connected, f"hosts {', '.join(names)} connected to batond", timeout, pause=0.1)

    # --- the guest ---

    def spec(self, name="vm1", cmdline="", **fields):
        """`fields`: of the VM spec, instead of what is usual; without `devices`, disk0 and the extra devices."""
        spec = {
            "name": name,
            "memory": GUEST_MEMORY,
            "vcpus": PROCESSORS,
            "accelerator": "kvm" if self.kvm else "tcg",
            # no_timer_check: a busy host may let an emulated processor have too few interrupts of its timer for a Linux
            # that boots, which then panics.
            "boot": {
                "kernel": os.path.join(self.guest_dir, "vmlinuz"),
                "initrd": os.path.join(self.guest_dir, "initrd.gz"),
                "cmdline": f"console=ttyS0 quiet no_timer_check panic=-1 {'' if 'vcpus' in fields else ONE} {cmdline}".strip(),
            } if not self.lab_guest else {"kernel": "/dev/null", "cmdline": f"lab {cmdline}".strip()},
            "balloon": not self.lab_guest,
            **({"qemu": "lab"} if self.lab_guest else {}),
            "devices": [{"name": "disk0", "class": "blk"}, *self.extra_devices],
            **fields,
        }
        path = os.path.join(self.lab.dir, f"{name}.yaml")
        with open(path, "w", encoding="utf-8") as file:
            file.write(yaml(spec) + "\n")
        return path

    def start_guest(self, host="a", name="vm1", cmdline="", **fields):
        """Starts the lab guest and waits until it works."""
        self.ctl("vm", "start", self.spec(name, cmdline, **fields), "--host", host, timeout=120)
        guest = Guest(self, name)
        guest.wait_ready()
        if any(device["class"] == "blk" for device in fields.get("devices", [{"class": "blk"}])):
            guest.wait_writes(1)
        return guest

    def host_of(self, vm="vm1"):
        found = self.get("vm", vm)
        return found["host"].split("/")[1] if found else None

    def vm(self, vm="vm1"):
        return self.get("vm", vm)

    def migrate(self, to, vm="vm1", wait=True, options=(), timeout=120):
        """Starts a migration; with wait, follows it to its end. Returns its record."""
        started = json.loads(self.ctl("migrate", vm, "--to", to, "--no-wait", "-o", "json", *options).stdout)
        return self.wait_ended(started["name"], timeout) if wait else started

    def migration(self, name):
        return self.get("migration", name)

    def wait_ended(self, name, timeout=120):
        last = {}

        def ended():
            nonlocal last
            last = self.migration(name) or last
            return last if last.get("phase") in ("SUCCEEDED", "FAILED", "CANCELLED") else None
        return wait_until(ended, lambda: f"end of {name}, which is {summary(last)}", timeout, pause=0.1)

    def wait_phase(self, name, phase, timeout=60):
        wait_until(lambda: (self.migration(name) or {}).get("phase") == phase, f"phase {phase} of {name}", timeout)


def summary(migration):
    """A migration's end in one line."""
    return " ".join(str(migration.get(key, "")) for key in ("phase", "reason", "guest_location", "message")).strip()


def seconds(duration):
    """Seconds of a Duration as JSON has it ("0.012s")."""
    return float(duration.rstrip("s")) if duration else 0.0


def wait_seconds(condition, limit):
    """How long it took until the condition held."""
    start = time.monotonic()
    wait_until(condition, "a condition", limit)
    return time.monotonic() - start
