"""Devices of a running guest: another back-end under load, by batonctl; what is refused, and what outlives restarts."""
import json
import os
import sys
import unittest

from batonlab.case import ClusterTest
from batonlab.cluster import LabStorage, StorageDaemon
from batonlab.lab import wait_until


class Devices(ClusterTest):
    def setUp(self):
        super().setUp()
        self.have_guest()
        self.host, self.other = self.ends()
        self.agent = self.cluster.agents[self.host]

    def second_storage(self):
        """Another storage daemon over the same image, on the guest's host."""
        storage = StorageDaemon(self.cluster, self.host, self.cluster.storage_program)
        storage.socket = os.path.join(self.cluster.lab.dir, f"{self.host}-new0.sock")
        storage.start()
        self.addCleanup(storage.kill)
        return storage

    def swap(self, socket, *options, check=True):
        result = self.cluster.ctl("device", "swap", "vm1", "disk0", "--socket", socket, "-o", "json", *options, check=check)
        return json.loads(result.stdout) if result.returncode == 0 else result

    def device(self):
        """As batond knows it; nothing while no shim has told it."""
        devices = json.loads(self.cluster.ctl("device", "list", "vm1", "-o", "json").stdout)["devices"]
        return devices[0] if devices else {"state": "", "backend": {"socket": ""}}

    def back(self):
        """Ends with the storage daemon that the host's configuration names, as the next test expects it."""
        self.swap(self.agent.storage.socket)
        self.guest.wait_writes(20)

    def test_swap_there_and_back(self):
        storage = self.second_storage()
        for _ in range(2):
            swapped = self.swap(storage.socket)
            self.assertEqual(swapped["device"]["backend"]["socket"], storage.socket)
            self.guest.wait_writes(20)
            self.back()
        # What was left is not needed any more.
        self.swap(storage.socket)
        self.agent.storage.kill()
        self.guest.wait_writes(50)
        self.wait_device(lambda device: device["state"] == "ACTIVE", "an active device")
        self.agent.storage.start()
        self.back()
        self.assert_clean()

    def test_swap_outlives_shim_agent_and_batond(self):
        storage = self.second_storage()
        self.swap(storage.socket, "--request-id", "e2e-swap-1")
        self.cluster.batond.kill()
        self.cluster.batond.start()
        self.agent.restart()
        self.cluster.wait_hosts()
        (shim,) = self.agent.shims()
        shim.end()
        wait_until(lambda: self.device()["backend"]["socket"] == storage.socket and self.device()["state"] == "ACTIVE",
                   lambda: f"the new shim to use the new back-end: {self.device()}", 60, pause=0.2)
        self.guest.wait_writes(20)
        self.back()
        # Carried out already: not again.
        self.swap(storage.socket, "--request-id", "e2e-swap-1")
        self.wait_device(lambda device: device["backend"]["socket"] == self.agent.storage.socket, "the back-end of before")
        self.assert_clean()

    def test_what_cannot_take_over_is_refused(self):
        old = self.agent.storage.socket
        absent = self.swap("/nowhere.sock", check=False)
        self.assertEqual(absent.returncode, 5, absent.stderr)
        self.assertIn("stays at back-end", absent.stderr)
        checked = self.cluster.ctl("device", "swap", "vm1", "disk0", "--socket", "/nowhere.sock", "--dry-run", check=False)
        self.assertEqual(checked.returncode, 10, checked.stderr)
        self.assertIn("BACKEND_UNREACHABLE", checked.stdout)
        self.assertEqual(self.swap(old + "x", "--inflight", "handoff", check=False).returncode, 5)
        self.assertEqual(self.device()["backend"]["socket"], old)
        self.guest.wait_writes(20)

    def test_not_during_a_migration(self):
        storage = self.second_storage()
        migration, waiting = self.start_and_wait_at("source", "precopy")
        refused = self.swap(storage.socket, check=False)
        self.assertEqual(refused.returncode, 5, refused.stderr)
        self.assertIn(migration, refused.stderr)
        waiting.release()
        ended = self.cluster.wait_ended(migration)
        self.assertEqual(ended["phase"], "SUCCEEDED", ended.get("message"))
        self.assert_clean()


class InFlight(ClusterTest):
    """Another back-end that is given what the one before had in flight."""
    LAB_STORAGE = ()
    CMDLINE = "lab.pages=512 lab.dirty=200 lab.blocks=512 lab.writers=8"

    def test_swap_with_requests_in_flight(self):
        self.have_guest()
        host = self.cluster.host_of()
        first = self.cluster.agents[host].storage
        second = LabStorage(self.cluster, host)
        second.socket, second.control = (os.path.join(self.lab.dir, f"{host}-new0.{end}") for end in ("sock", "control"))
        second.start()
        self.addCleanup(second.kill)
        for storage in (first, second):
            storage.set(latency_us=600000)
        self.guest.wait_writes(8)
        for storage in (second, first, second, first):
            result = self.cluster.ctl("device", "swap", "vm1", "disk0", "--socket", storage.socket, "--inflight", "handoff",
                                      "-o", "json")
            self.assertGreater(json.loads(result.stdout)["handed_off"], 0, result.stdout)
            self.guest.wait_writes(8)
        for storage in (first, second):
            storage.set(latency_us=0)
        self.assert_clean()


class Errors(ClusterTest):
    """A device that runs out of space holds its writes and says so."""
    LAB_STORAGE = ()

    def setUp(self):
        super().setUp()
        self.have_guest()
        self.source, self.destination = self.ends()
        self.storage = self.cluster.agents[self.source].storage
        self.before = len(self.migrations())
        self.addCleanup(self.cluster.ctl, "policy", "set", "default", "--on-device-error", "nothing", "--inflight", "drain")
        self.addCleanup(self.storage.set, no_space=False)

    def device(self):
        return (self.cluster.vm().get("devices") or [{"state": "", "events": "0"}])[0]

    def events(self):
        return int(self.device()["events"])

    def migrations(self):
        """Oldest first."""
        return list(reversed((self.cluster.get("migrations") or {}).get("migrations", [])))

    def test_an_error_is_seen_and_outlives_the_shim(self):
        seen = self.events()
        self.storage.set(no_space=True)
        wait_until(lambda: self.events() > seen, "an event of the device", 60, pause=0.1)
        self.assertGreater(int(self.device()["last_event"]["held"]), 0)
        self.assertIn("requests held", self.cluster.ctl("device", "list", "vm1").stdout)
        self.storage.set(no_space=False)
        self.guest.wait_writes(5)
        # Nobody said that the guest shall be moved.
        self.assertEqual(len(self.migrations()), self.before)
        seen = self.events()
        self.kill_shim()
        self.assertEqual(self.events(), seen)
        self.guest.wait_writes(5)
        self.assert_clean()


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
