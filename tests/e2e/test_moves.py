"""Migrations as users know them, on loopback without TLS: there and back, dry run, cancel, retry, restarts, back-ends
that come and go, and requests that make no sense."""
import json
import os
import sys
import time
import unittest

from batonlab.case import ClusterTest
from batonlab.cluster import seconds, summary
from batonlab.lab import wait_until


class Moves(ClusterTest):
    def test_there_and_back(self):
        guest = self.have_guest("a")
        for to in ("b", "a"):
            guest.reset()
            migration = self.move(to)
            self.assertEqual(migration["reason"], "NONE")
            progress = migration["progress"]
            self.assertGreater(int(progress["bytes"]["data"]), 1 << 20)
            # Linux has touched only a part of its memory; the rest is not sent.
            self.assertGreater(int(progress["bytes"]["hole_skipped"]) + int(progress["bytes"]["zero"]), 16 << 20)
            self.assertGreaterEqual(len(progress["rounds"]), 2)
            self.assertGreater(seconds(progress["downtimes"]["vcpu"]), 0)
            phases = [time["phase"] for time in migration["phase_times"]]
            for phase in ("PREPARING", "PRECOPY", "SWITCHOVER", "FINISHING", "SUCCEEDED"):
                self.assertIn(phase, phases)
        self.assert_clean()

    def test_epoch_grows(self):
        self.have_guest("a")
        before = int(self.cluster.vm()["epoch"])
        self.move("b")
        self.assertEqual(int(self.cluster.vm()["epoch"]), before + 1)

    def test_dry_run_changes_nothing(self):
        self.have_guest("a")
        before = self.cluster.get("migrations")["migrations"]
        result = self.cluster.ctl("migrate", "vm1", "--to", "b", "--dry-run", "-o", "json")
        findings = json.loads(result.stdout).get("findings", [])
        self.assertFalse([f for f in findings if f["severity"] == "BLOCKER"], findings)
        self.assertEqual(self.cluster.get("migrations")["migrations"], before)
        self.assert_runs_only("a")

    def test_dry_run_finds_an_absent_backend(self):
        self.have_guest("a")
        storage = self.cluster.agents["b"].storage
        storage.kill()
        os.unlink(storage.socket)
        try:
            result = self.cluster.ctl("migrate", "vm1", "--to", "b", "--dry-run", "-o", "json", check=False)
            self.assertEqual(result.returncode, 10, result.stdout + result.stderr)
            findings = json.loads(result.stdout)["findings"]
            blockers = [f for f in findings if f["severity"] == "BLOCKER"]
            self.assertTrue(blockers and all(f["remedy"] for f in blockers), findings)
            self.assertIn("disk0", json.dumps(blockers))
            # A migration is refused for the same reason, and the next one works.
            migration = self.cluster.migrate("b")
            self.assertEqual((migration["phase"], migration["guest_location"]), ("FAILED", "SOURCE"), summary(migration))
            self.assert_runs_only("a")
        finally:
            storage.start()
        self.move("b")
        self.assert_clean()

    def test_cancel(self):
        self.have_guest("a")
        source = self.cluster.agents["a"]
        source.set_pause("precopy")
        name = self.cluster.migrate("b", wait=False)["name"]
        wait_until(lambda: source.paused_at("precopy"), "pause point precopy", 60)
        self.cluster.ctl("cancel", name.split("/")[1], "--no-wait", check=False)
        source.release()
        ended = self.cluster.wait_ended(name)
        self.assertEqual((ended["phase"], ended["guest_location"]), ("CANCELLED", "SOURCE"), summary(ended))
        self.assertEqual(ended["reason"], "CANCELLED_BY_REQUEST")
        self.assert_runs_only("a")
        self.move("b")
        self.assert_clean()

    def test_second_migration_of_a_vm_is_refused(self):
        self.have_guest("a")
        source = self.cluster.agents["a"]
        source.set_pause("precopy")
        name = self.cluster.migrate("b", wait=False)["name"]
        wait_until(lambda: source.paused_at("precopy"), "pause point precopy", 60)
        result = self.cluster.ctl("migrate", "vm1", "--to", "b", check=False)
        self.assertEqual(result.returncode, 5, result.stderr)
        result = self.cluster.ctl("vm", "stop", "vm1", check=False)
        self.assertEqual(result.returncode, 5, result.stderr)
        source.release()
        self.assertEqual(self.cluster.wait_ended(name)["phase"], "SUCCEEDED")

    def test_bandwidth_limit_is_kept(self):
        self.have_guest("a")
        migration = self.move("b", options=("--bandwidth", "40MiB"))
        rates = [int(r["rate"]) for r in migration["progress"]["rounds"][:1]]
        self.assertLess(rates[0], 60 << 20, migration["progress"]["rounds"])

    def test_backend_crash_under_a_running_guest(self):
        guest = self.have_guest("a")
        host = self.cluster.host_of()
        for _ in range(3):
            self.cluster.agents[host].storage.kill()
            self.cluster.agents[host].storage.start()
            guest.wait_writes(50)
        device = self.cluster.vm()["devices"][0]
        self.assertEqual(device["state"], "ACTIVE", device)
        self.assertGreaterEqual(int(device["reconnects"]), 3)
        self.assert_clean()
        self.move("b" if host == "a" else "a")

    def test_backend_silent_for_a_while(self):
        guest = self.have_guest("a")
        host = self.cluster.host_of()
        self.cluster.agents[host].storage.kill()
        wait_until(lambda: self.cluster.vm()["devices"][0]["state"] == "BACKEND_LOST", "BACKEND_LOST", 10)
        self.cluster.agents[host].storage.start()
        guest.wait_writes(50)
        self.assert_clean()

    def test_shim_killed_under_a_running_guest(self):
        guest = self.have_guest("a")
        host = self.cluster.host_of()
        agent = self.cluster.agents[host]
        for shim in agent.shims():
            shim.kill()
        wait_until(agent.shims, "a new shim", 20)
        guest.wait_writes(50)
        self.assert_clean()
        self.move("b" if host == "a" else "a")
        self.assert_clean()

    def test_agent_and_batond_restarts_leave_the_guest_alone(self):
        guest = self.have_guest("a")
        pids = sorted(p.pid for a in self.cluster.agents.values() for p in a.qemus() + a.shims())
        for agent in self.cluster.agents.values():
            agent.restart()
        self.cluster.batond.kill()
        guest_host = None
        self.cluster.batond.start()
        self.cluster.wait_hosts()
        wait_until(lambda: (self.cluster.vm() or {}).get("state") == "RUNNING", "vm1 RUNNING again", 20, pause=0.1)
        self.assertEqual(pids, sorted(p.pid for a in self.cluster.agents.values() for p in a.qemus() + a.shims()))
        guest_host = self.cluster.host_of()
        guest.wait_writes(50)
        self.move("b" if guest_host == "a" else "a")
        self.assert_clean()

    def test_vmm_killed_under_a_running_guest(self):
        self.have_guest("a")
        host = self.cluster.host_of()
        for qemu in self.cluster.agents[host].qemus():
            qemu.kill()
        wait_until(lambda: (self.cluster.vm() or {"state": "STOPPED"})["state"] == "STOPPED", "vm1 STOPPED", 20, pause=0.1)
        self.lose_guest()
        self.have_guest("a")

    def test_requests_that_make_no_sense(self):
        self.have_guest("a")
        for words, code in [
                (("migrate", "vm1", "--to", "nowhere"), (3, 5, 10)),
                (("migrate", "nobody", "--to", "b"), (3,)),
                (("migrate", "vm1", "--to", self.cluster.host_of()), (2, 5, 10)),
                (("get", "vms", "nobody"), (3,)),
                (("migrate", "vm1", "--to", "b", "--bandwidth", "fast"), (2,)),
                (("cancel", "00000000-0000-0000-0000-000000000000"), (3,)),
                (("frobnicate",), (2,)),
        ]:
            result = self.cluster.ctl(*words, check=False)
            self.assertIn(result.returncode, code, f"{words}: {result.stdout}{result.stderr}")
            self.assertTrue(result.stderr.strip() or result.stdout.strip(), words)
        self.assert_runs_only(self.cluster.host_of())

    def test_wrong_spec_names_line_and_field(self):
        path = os.path.join(self.lab.dir, "wrong.yaml")
        with open(path, "w", encoding="utf-8") as file:
            file.write("name: vm2\nmemory: 256MiB\nvcpus: none\n")
        result = self.cluster.ctl("vm", "start", path, "--host", "a", check=False)
        self.assertEqual(result.returncode, 2, result.stderr)
        self.assertIn("wrong.yaml:3: vcpus", result.stderr)

    def test_idle_shim_is_small_and_asleep(self):
        self.have_guest("a")
        shim = self.cluster.agents[self.cluster.host_of()].shims()[0]
        self.assertLess(rss_anon(shim.pid), 8 << 20)
        before = cpu_ticks(shim.pid)
        time.sleep(2)  # the time over which it must use nothing
        self.assertLessEqual(cpu_ticks(shim.pid) - before, 1)


def rss_anon(pid):
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))


def cpu_ticks(pid):
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
