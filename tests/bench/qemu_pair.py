"""QEMU's own migration of the lab guest, for comparison: two QEMUs driven over QMP, no Baton anywhere."""
import json
import os
import socket
import time

from batonlab.guest import Guest
from batonlab.lab import LabError, wait_until
from batonlab.network import free_port


class Qmp:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        wait_until(lambda: self._connect(path), f"QMP at {path}", 10)
        self.file = self.socket.makefile("rw", encoding="utf-8")
        self.file.readline()
        self("qmp_capabilities")

    def _connect(self, path):
        try:
            self.socket.connect(path)
            return True
        except OSError:
            return False

    def __call__(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        while True:
            answer = json.loads(self.file.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise LabError(f"{command}: {answer['error']}")


class DirectGuest(Guest):
    """The lab guest on a console socket of QEMU's."""

    def __init__(self, cluster, pair):
        super().__init__(cluster, "qemu")
        self.pair = pair

    def _session(self, letter, find, deadline):
        text = ""
        with socket.socket(socket.AF_UNIX) as console:
            console.connect(self.pair.console)
            console.sendall(letter.encode())
            while time.monotonic() < deadline:
                console.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    data = console.recv(65536)
                except TimeoutError:
                    break
                if not data:
                    break
                text += data.decode(errors="replace")
                found = find(text)
                if found:
                    return found, text
        return None, text


class QemuPair:
    """A guest at one of two QEMUs; migrate() moves it to the other. `sockets`: of the disk's back-end at each."""

    def __init__(self, lab, sockets, kernel=None, initrd=None, memory="256M", qemu="qemu-system-x86_64", extra=(),
                 memory_files=None, cmdline="lab.pages=4096 lab.dirty=1500"):
        self.cmdline = cmdline
        self.lab, self.sockets, self.qemu, self.memory, self.extra = lab, sockets, qemu, memory, list(extra)
        self.kernel, self.initrd = kernel, initrd
        self.at = 0
        self.starts = 0
        self.memory_files = memory_files or [None, None]
        self.process, self.qmp, self.console = self._start(0, None)

    def _start(self, at, incoming):
        self.starts += 1
        name = f"qemu-{self.starts}"
        console = os.path.join(self.lab.dir, name + ".con")
        control = os.path.join(self.lab.dir, name + ".qmp")
        memory = self.memory_files[at] or os.path.join(self.lab.memory_dir, name)
        # maxcpus: see PROCESSORS of tests/e2e/batonlab/cluster.py.
        command = [self.qemu, "-accel", "tcg", "-smp", "1,maxcpus=2", "-m", self.memory,
                   "-nodefaults", "-vga", "none", "-display", "none",
                   "-object", f"memory-backend-file,id=mem,size={self.memory},share=on,mem-path={memory}",
                   "-machine", "q35,memory-backend=mem",
                   "-serial", f"unix:{console},server=on,wait=off", "-qmp", f"unix:{control},server=on,wait=off"]
        if self.kernel:
            command += ["-kernel", self.kernel, "-initrd", self.initrd, "-append",
                        f"console=ttyS0 quiet no_timer_check panic=-1 {self.cmdline}",
                        "-device", "virtio-balloon-pci,free-page-reporting=on"]
        if self.sockets:
            command += ["-chardev", f"socket,id=c0,path={self.sockets[at]}",
                        "-device", "vhost-user-blk-pci,chardev=c0,num-queues=1"]
        if incoming:
            command += ["-incoming", incoming]
        process = self.lab.spawn(command + self.extra, "bench-qemu")
        qmp = Qmp(control)
        self.memory_path = memory
        return process, qmp, console

    def migrate(self, capabilities=(), channels=None):
        """Moves the guest to the other QEMU; answers `query-migrate` of its source."""
        there = 1 - self.at
        old_memory = self.memory_path
        process, qmp, console = self._start(there, "defer")
        enabled = [{"capability": name, "state": True} for name in capabilities]
        for end in (qmp, self.qmp):
            if enabled:
                end("migrate-set-capabilities", capabilities=enabled)
            if channels:
                end("migrate-set-parameters", **{"multifd-channels": channels})
        # Unlimited, as Baton's default is; 300 ms of blackout are the default of both.
        self.qmp("migrate-set-parameters", **{"max-bandwidth": 100 << 30, "downtime-limit": 300})
        uri = f"tcp:127.0.0.1:{free_port('127.0.0.1')}"
        qmp("migrate-incoming", uri=uri)
        self.qmp("migrate", uri=uri)
        result = wait_until(self._ended, "QEMU's migration to end", 120)
        if result["status"] != "completed":
            raise LabError(f"QEMU's migration: {result}")
        self.process.kill()
        self.process.wait()
        if not self.memory_files[self.at]:
            os.unlink(old_memory)
        self.process, self.qmp, self.console, self.at = process, qmp, console, there
        return result

    def _ended(self):
        info = self.qmp("query-migrate")
        return info if info.get("status") in ("completed", "failed", "cancelled") else None

    def stop(self):
        self.process.kill()
        self.process.wait()
