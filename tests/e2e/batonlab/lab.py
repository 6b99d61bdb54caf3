"""A lab: a temporary directory and the processes that belong to it."""
import atexit
import contextlib
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "../../.."))
MARK = "BATON_LAB"
HOST_MARK = "BATON_LAB_HOST"


class LabError(AssertionError):
    """What the lab waited for did not come."""


def rss_anon(pid):
    """Memory that a process has to itself, in bytes."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


def wait_until(condition, what, timeout=30.0, pause=0.02):
    """Calls condition until it answers something true, and returns that. LabError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise LabError(f"waited {timeout:g} s in vain: {what() if callable(what) else what}")
        time.sleep(pause)


def listening(path):
    """Whether somebody listens at that unix socket. Its file is there a moment before (bind, then listen)."""
    with open("/proc/net/unix", encoding="utf-8", errors="replace") as sockets:
        found = (line.rstrip("\n").split(None, 7) for line in sockets)
        # Flags: __SO_ACCEPTCON.
        return any(len(words) == 8 and words[3] == "00010000" and words[7] == path for words in found)


class Found:
    """A process of a lab that this program may not have started itself."""

    def __init__(self, pid, host, argv, start):
        self.pid, self.host, self.argv, self.start = pid, host, argv, start
        self.program = os.path.basename(argv[0]) if argv else ""

    def alive(self):
        return start_time(self.pid) == self.start

    def kill(self, number=signal.SIGKILL):
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self, timeout=20):
        """Kills it and waits until its last thread has ended: the first is a zombie while others still run."""
        pidfd = os.pidfd_open(self.pid)
        try:
            self.kill()
            if not select.select([pidfd], [], [], timeout)[0]:
                raise LabError(f"{self} does not end")
        finally:
            os.close(pidfd)

    def __repr__(self):
        return f"{self.program}[{self.pid}]@{self.host}"


def start_time(pid):
    """Start time of a process that lives, else None (also for one that has ended and was not reaped)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rsplit(b")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19]


class Lab:
    """Use as a context manager. At the end, also on failure and on a signal, every process with the lab's mark is
    killed and everything it made is removed; log files are kept in `logs`."""

    def __init__(self, name, bin_dir, logs=None):
        self.name = name
        self.bin = os.path.abspath(bin_dir)
        self.logs = logs or os.path.join(ROOT, "logs", name)
        # Short: paths of unix sockets below it must stay under 108 bytes.
        self.dir = tempfile.mkdtemp(prefix="baton-", dir="/tmp")
        self.id = os.path.basename(self.dir)
        self.memory_dir = os.path.join("/dev/shm", self.id)
        self.children = []
        self.undo = contextlib.ExitStack()
        # Mount namespaces whose every process belongs to this lab, and the host that each is: what libvirt starts gets an
        # environment of libvirt's making.
        self.namespaces = {}
        self.closed = False
        shutil.rmtree(self.logs, ignore_errors=True)
        os.makedirs(self.logs)
        # Python's own reaction to these signals would skip every clean-up; a test runner lets only this one through.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)
        atexit.register(self.close)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def program(self, name):
        return os.path.join(self.bin, name)

    def environment(self, host="", **extra):
        env = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
        env.update({MARK: self.id, HOST_MARK: host, **extra})
        return env

    def spawn(self, argv, log, host="", prefix=(), env=None, **options):
        """Starts a process of this lab, its output appended to logs/LOG.log."""
        with open(os.path.join(self.logs, log + ".log"), "ab") as out:
            child = subprocess.Popen([*prefix, *argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                     env=self.environment(host, **(env or {})), start_new_session=True, **options)
        self.children.append(child)
        return child

    def run(self, argv, timeout=60, check=True, **options):
        """Runs a command of this lab to its end; returns the CompletedProcess with text output."""
        result = subprocess.run(argv, timeout=timeout, capture_output=True, text=True, env=self.environment(), **options)
        if check and result.returncode != 0:
            raise LabError(f"{' '.join(argv)}: exit {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def find(self, program=None, host=None, containing=None, spares=False):
        """Living processes of this lab; `spares`: with the shims that have no VM yet, which come and go with their agent."""
        found = []
        mark = f"{MARK}={self.id}".encode()
        for entry in os.listdir("/proc"):
            if not entry.isdigit() or int(entry) == os.getpid():
                continue
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    environ = file.read().split(b"\0")
                inside = self.namespaces.get(os.readlink(f"/proc/{entry}/ns/mnt")) if self.namespaces else None
                if mark not in environ and inside is None:
                    continue
                with open(f"/proc/{entry}/cmdline", "rb") as file:
                    argv = [word.decode(errors="replace") for word in file.read().split(b"\0")[:-1]]
            except OSError:
                continue
            start = start_time(entry)
            if start is None:
                continue
            where = inside or next((word.split(b"=", 1)[1].decode() for word in environ
                                    if word.startswith(HOST_MARK.encode() + b"=")), "")
            process = Found(int(entry), where, argv, start)
            if "--spare" in argv[:2] and not spares:
                continue
            if program and not process.program.startswith(program):
                continue
            if host is not None and process.host != host:
                continue
            if containing and not any(containing in word for word in argv):
                continue
            found.append(process)
        return found

    def kill_all(self):
        """Ends everything; again until nothing is left, because an agent may just be starting a shim."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            left = self.find(spares=True)
            for process in left:
                process.kill()
            for child in self.children:
                child.poll()
            if not left:
                return
            time.sleep(0.02)

    def keep_logs(self):
        """Copies what the programs logged into their own directories."""
        for parent, _, files in os.walk(self.dir):
            for file in files:
                if file.endswith(".log") or file == "journal":
                    target = os.path.relpath(os.path.join(parent, file), self.dir).replace("/", "-")
                    with contextlib.suppress(OSError):
                        shutil.copyfile(os.path.join(parent, file), os.path.join(self.logs, target))

    def close(self):
        if self.closed:
            return
        self.closed = True
        atexit.unregister(self.close)
        self.kill_all()
        with contextlib.suppress(Exception):
            self.keep_logs()
        try:
            self.undo.close()
        finally:
            shutil.rmtree(self.memory_dir, ignore_errors=True)
            shutil.rmtree(self.dir, ignore_errors=True)

    def leftovers(self):
        """What is still there after close(): for the test that nothing is."""
        left = [repr(process) for process in self.find(spares=True)]
        for path in (self.dir, self.memory_dir):
            if os.path.exists(path):
                left.append(path)
        with open("/proc/mounts", encoding="utf-8") as mounts:
            left += [line.split()[1] for line in mounts if self.id in line]
        if os.path.isdir("/run/netns"):
            left += [f"netns {name}" for name in os.listdir("/run/netns") if self.id in name]
        left += [f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if self.id in name]
        return left
