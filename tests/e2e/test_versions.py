"""The same migration with QEMU from backports at both ends, and with TLS between hosts in namespaces of their own."""
import subprocess
import sys
import os
import unittest

from batonlab.case import ClusterTest
from batonlab.lab import ROOT
from batonlab.slow_disk import HANDOFF, SlowDisk


def backports():
    result = subprocess.run([os.path.join(ROOT, "tests/lab/backports_qemu.sh")], check=True, capture_output=True, text=True)
    return result.stdout.strip()


class Backports(ClusterTest):
    """QEMU 10.0 to QEMU 10.0, with its storage daemon too."""

    SECURE = True

    @classmethod
    def setUpClass(cls):
        directory = os.path.join(backports(), "bin")
        cls.QEMU = {"default": {"path": "/usr/bin/qemu-system-x86_64"},
                    "backports": {"path": os.path.join(directory, "qemu-system-x86_64")}}
        cls.SPEC = {"qemu": "backports"}
        cls.STORAGE = os.path.join(directory, "qemu-storage-daemon")

    def test_there_and_back(self):
        self.have_guest("a")
        version = self.cluster.get("host", "a")["vmms"]["backports"]
        self.assertRegex(version, r"\b(1[0-9]|9)\.")
        self.move("b")
        self.move("a")
        self.assert_clean()


class BackportsHandoff(SlowDisk, Backports):
    """QEMU 10.0 on the lab device: requests in flight move with the guest."""

    CMDLINE = "lab.pages=512 lab.dirty=200 lab.blocks=512 lab.writers=8"

    def test_there_and_back(self):
        for host in ("b", "a"):
            self.assert_handed_off(self.move_in_flight(host, HANDOFF))
        self.latency(0)
        self.assert_clean()


class Tls(ClusterTest):
    """QEMU 7.2 between namespaces, mutual TLS on every connection."""

    SECURE = True

    def test_there_and_back(self):
        self.have_guest("a")
        self.move("b")
        migration = self.move("a")
        self.assertTrue(migration["params"]["tls"], migration["params"])
        self.assert_clean()

    def test_a_stranger_is_turned_away(self):
        self.have_guest("a")
        words = [*self.cluster.network.prefix("control"), self.lab.program("batonctl"), "--server",
                 self.cluster.batond.address(), "--ca", self.cluster.authority.ca, "get", "hosts"]
        result = self.lab.run(words, check=False)
        self.assertNotEqual(result.returncode, 0, result.stdout)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
