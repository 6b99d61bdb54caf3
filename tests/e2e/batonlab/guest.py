"""Talking to the lab guest (tests/lab/guest) over its console, by `batonctl vm console`."""
import re
import select
import subprocess
import time

from .lab import LabError, wait_until


class Guest:
    def __init__(self, cluster, name="vm1"):
        self.cluster, self.name = cluster, name
        # Number of the last answer; older ones come again at the start of every console session.
        self.answers = 0

    def ask(self, letter, word, timeout=30):
        """Sends a command and returns the fields of its answer. Asks again where the console or batond went away."""
        line = self._hear(letter, lambda text: self.answer(text, word), f"answer '{letter}' with {word}", timeout)
        fields = dict(item.split("=", 1) for item in line.split()[1:] if "=" in item)
        self.answers = int(fields["n"])
        return {**fields, "line": line}

    def wait_ready(self, timeout=60):
        """Until the workload runs. What it is told before that, it does not hear."""
        self._hear("", lambda text: "READY" in text, "boot", timeout)

    def _hear(self, letter, find, what, timeout):
        deadline = time.monotonic() + timeout
        heard = ""
        while time.monotonic() < deadline:
            # A session that says nothing may be one whose other end has just moved.
            found, heard = self._session(letter, find, min(deadline, time.monotonic() + max(10, timeout / 3)))
            if found:
                return found
            time.sleep(0.1)
        raise LabError(f"guest {self.name} did not {what} in {timeout} s; last heard: {heard[-800:]!r}")

    def _session(self, letter, find, deadline):
        command = self.cluster.ctl_command("vm", "console", self.name)
        text = ""
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=self.cluster.lab.environment()) as console:
            try:
                console.stdin.write(letter.encode())
                console.stdin.flush()
                while time.monotonic() < deadline:
                    if not select.select([console.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
                        break
                    data = console.stdout.read1(65536)
                    if not data:
                        break
                    text += data.decode(errors="replace")
                    found = find(text)
                    if found:
                        return found, text
                return None, text
            except BrokenPipeError:
                return None, text
            finally:
                console.kill()

    def answer(self, text, word):
        """The first answer in `text` that is newer than those known already; only whole lines count."""
        for match in re.finditer(rf"({word} n=(\d+)\b[^\r\n]*)\r?\n", text):
            if int(match.group(2)) > self.answers:
                return match.group(1).strip()
        return None

    def status(self, timeout=30):
        return self.ask("s", "STATUS", timeout)

    def reset(self):
        self.ask("r", "RESET")

    def go(self):
        self.ask("g", "GO")

    def wait_writes(self, more, timeout=60):
        """Waits until the guest has written so many blocks more than it had."""
        first = None

        def enough():
            nonlocal first
            writes = int(self.status(timeout)["writes"])
            first = writes if first is None else first
            return writes >= first + more
        wait_until(enough, f"guest {self.name} to write {more} blocks", timeout, pause=0.1)

    def disk(self):
        """The image of its disk."""
        return self.cluster.image

    def verify(self, go_on=True, timeout=60):
        """The guest stops writing and checks all of its disk and memory; then the disk image is checked from outside.
        Returns the guest's RESULT and the sentence of the checker; LabError if anything is wrong."""
        result = self.ask("q", "RESULT", timeout)
        check = self.cluster.lab.run([self.cluster.lab.program("baton-lab-check"), self.disk()],
                                     input=result["line"] + "\n")
        if go_on:
            self.go()
        return result, check.stdout.strip()
