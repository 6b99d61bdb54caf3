"""Migrations as users know them, on loopback without TLS: there and back, dry run, cancel, retry, restarts, back-ends
that come and go, and requests that make no sense."""
import json
import os
import signal
import subprocess
import sys
import time
import unittest

from batonlab.case import ClusterTest
from batonlab.cluster import seconds, summary
from batonlab.lab import rss_anon, wait_until


class Moves(ClusterTest):
    SMALL_DISKS = True

    def test_there_and_back(self):
        guest = self.have_guest()
        for to in reversed(self.ends()):
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
        self.have_guest()
        before = int(self.cluster.vm()["epoch"])
        self.move(self.ends()[1])
        self.assertEqual(int(self.cluster.vm()["epoch"]), before + 1)

    def test_dry_run_changes_nothing(self):
        self.have_guest()
        source, destination = self.ends()
        before = self.cluster.get("migrations")["migrations"]
        result = self.cluster.ctl("migrate", "vm1", "--to", destination, "--dry-run", "-o", "json")
        findings = json.loads(result.stdout).get("findings", [])
        self.assertFalse([f for f in findings if f["severity"] == "BLOCKER"], findings)
        self.assertEqual(self.cluster.get("migrations")["migrations"], before)
        self.assert_runs_only(source)

    def test_dry_run_finds_an_absent_backend(self):
        self.have_guest()
        source, destination = self.ends()
        storage = self.cluster.agents[destination].storage
        storage.kill()
        os.unlink(storage.socket)
        try:
            result = self.cluster.ctl("migrate", "vm1", "--to", destination, "--dry-run", "-o", "json", check=False)
            self.assertEqual(result.returncode, 10, result.stdout + result.stderr)
            findings = json.loads(result.stdout)["findings"]
            blockers = [f for f in findings if f["severity"] == "BLOCKER"]
            self.assertTrue(blockers and all(f["remedy"] for f in blockers), findings)
            self.assertIn("disk0", json.dumps(blockers))
            # A migration is refused for the same reason, and the next one works.
            migration = self.cluster.migrate(destination)
            self.assertEqual((migration["phase"], migration["guest_location"]), ("FAILED", "SOURCE"), summary(migration))
            self.assert_runs_only(source)
        finally:
            storage.start()
        self.move(destination)
        self.assert_clean()

    def check_cancel(self, side, point, end):
        self.have_guest()
        source, destination = self.ends()
        name, waiting = self.start_and_wait_at(side, point)
        self.cluster.ctl("cancel", name.split("/")[1], "--no-wait", check=False)
        waiting.release()
        ended = self.cluster.wait_ended(name)
        self.assertEqual((ended["phase"], ended["guest_location"], ended["reason"]), end, summary(ended))
        stayed = end[0] == "CANCELLED"
        self.assert_runs_only(source if stayed else destination)
        self.move(destination if stayed else source)
        self.assert_clean()

    def test_cancel_in_preparing(self):
        self.check_cancel("destination", "prepared", ("CANCELLED", "SOURCE", "CANCELLED_BY_REQUEST"))

    def test_cancel_in_precopy(self):
        self.check_cancel("source", "precopy", ("CANCELLED", "SOURCE", "CANCELLED_BY_REQUEST"))

    def test_cancel_in_switchover(self):
        self.check_cancel("source", "frozen", ("CANCELLED", "SOURCE", "CANCELLED_BY_REQUEST"))

    def test_cancel_after_the_guest_was_given_away_is_too_late(self):
        self.check_cancel("source", "yielded", ("SUCCEEDED", "DESTINATION", "NONE"))

    def test_interrupted_batonctl_leaves_the_migration_alone(self):
        self.have_guest()
        source, destination = self.ends()
        waiting = self.cluster.agents[source]
        waiting.set_pause("precopy")
        with subprocess.Popen(self.cluster.ctl_command("migrate", "vm1", "--to", destination), text=True,
                              env=self.lab.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) as batonctl:
            try:
                wait_until(lambda: waiting.paused_at("precopy"), "pause point precopy", 60)
                batonctl.send_signal(signal.SIGINT)
                output = batonctl.communicate(timeout=20)[0]
            finally:
                batonctl.kill()
        self.assertEqual(batonctl.returncode, 130, output)
        self.assertIn("batonctl cancel", output)
        name = self.cluster.get("migrations", "--vm", "vm1")["migrations"][0]["name"]
        waiting.release()
        ended = self.cluster.wait_ended(name)
        self.assertEqual((ended["phase"], ended["guest_location"]), ("SUCCEEDED", "DESTINATION"), summary(ended))
        self.assert_runs_only(destination)

    def test_full_disk_at_the_source_refuses_the_migration(self):
        self.have_guest()
        self.check_full_disk(self.cluster.host_of(), "STATE_WRITE_FAILED", "No space left on device")

    def test_full_disk_at_the_destination_refuses_the_migration(self):
        self.have_guest()
        self.check_full_disk(self.ends()[1], "VALIDATION_FAILED",
                             "the journal could not be written")

    def check_full_disk(self, full, reason, words):
        source, destination = self.ends()
        disk = self.cluster.agents[full].small_disk
        disk.fill()
        try:
            ended = self.cluster.migrate(destination)
            self.assertEqual((ended["phase"], ended["guest_location"], ended["reason"]),
                             ("FAILED", "SOURCE", reason), summary(ended))
            self.assertIn(words, ended["message"])
            self.assert_runs_only(source)
        finally:
            disk.clear()
        self.move(destination)
        self.assert_clean()

    def test_disk_that_fills_up_during_a_migration_does_not_hinder_it(self):
        self.have_guest()
        source, destination = self.ends()
        # What the journals need was reserved before anything was promised.
        name, waiting = self.start_and_wait_at("source", "precopy")
        disks = [agent.small_disk for agent in self.cluster.agents.values()]
        try:
            for disk in disks:
                disk.fill()
            waiting.release()
            ended = self.cluster.wait_ended(name)
            self.assertEqual((ended["phase"], ended["guest_location"]), ("SUCCEEDED", "DESTINATION"), summary(ended))
            self.guest.wait_writes(20)
        finally:
            for disk in disks:
                disk.clear()
        # Also what could not be cleaned up while the disks were full.
        self.assert_runs_only(destination)
        self.move(source)
        self.assert_clean()

    def test_second_migration_of_a_vm_is_refused(self):
        self.have_guest()
        destination = self.ends()[1]
        name, waiting = self.start_and_wait_at("source", "precopy")
        result = self.cluster.ctl("migrate", "vm1", "--to", destination, check=False)
        self.assertEqual(result.returncode, 5, result.stderr)
        result = self.cluster.ctl("vm", "stop", "vm1", check=False)
        self.assertEqual(result.returncode, 5, result.stderr)
        waiting.release()
        self.assertEqual(self.cluster.wait_ended(name)["phase"], "SUCCEEDED")

    def test_bandwidth_limit_is_kept(self):
        self.have_guest()
        migration = self.move(self.ends()[1], options=("--bandwidth", "40MiB"))
        rates = [int(r["rate"]) for r in migration["progress"]["rounds"][:1]]
        self.assertLess(rates[0], 60 << 20, migration["progress"]["rounds"])

    def test_backend_crash_under_a_running_guest(self):
        guest = self.have_guest()
        host = self.cluster.host_of()
        for _ in range(3):
            self.cluster.agents[host].storage.kill()
            self.cluster.agents[host].storage.start()
            guest.wait_writes(50)
        self.wait_device(lambda device: device["state"] == "ACTIVE" and int(device.get("reconnects", 0)) >= 3,
                         "a device that came back three times")
        self.assert_clean()
        self.move(self.ends()[1])

    def test_backend_silent_for_a_while(self):
        guest = self.have_guest()
        host = self.cluster.host_of()
        self.cluster.agents[host].storage.kill()
        self.wait_device(lambda device: device["state"] == "BACKEND_LOST", "a device that has lost its back-end")
        self.cluster.agents[host].storage.start()
        guest.wait_writes(50)
        self.assert_clean()

    def test_shim_killed_under_a_running_guest(self):
        guest = self.have_guest()
        self.kill_shim()
        guest.wait_writes(50)
        self.assert_clean()
        self.move(self.ends()[1])
        self.assert_clean()

    def test_agent_and_batond_restarts_leave_the_guest_alone(self):
        guest = self.have_guest()
        pids = sorted(p.pid for a in self.cluster.agents.values() for p in a.qemus() + a.shims())
        for agent in self.cluster.agents.values():
            agent.restart()
        self.cluster.batond.kill()
        self.cluster.batond.start()
        self.cluster.wait_hosts()
        wait_until(lambda: (self.cluster.vm() or {}).get("state") == "RUNNING", "vm1 RUNNING again", 60, pause=0.1)
        self.assertEqual(pids, sorted(p.pid for a in self.cluster.agents.values() for p in a.qemus() + a.shims()))
        guest.wait_writes(50)
        self.move(self.ends()[1])
        self.assert_clean()

    def test_agents_come_back_after_batond_was_away(self):
        self.have_guest()
        self.cluster.batond.kill()
        time.sleep(4)  # long enough that the agents have tried in vain several times
        self.cluster.batond.start()
        self.cluster.wait_hosts()

    def test_vmm_killed_under_a_running_guest(self):
        self.have_guest()
        host = self.cluster.host_of()
        for qemu in self.cluster.agents[host].qemus():
            qemu.kill()
        wait_until(lambda: (self.cluster.vm() or {"state": "STOPPED"})["state"] == "STOPPED", "vm1 STOPPED", 60, pause=0.1)
        self.lose_guest()
        self.have_guest(host)

    def test_requests_that_make_no_sense(self):
        self.have_guest()
        for words, code in [
                (("migrate", "vm1", "--to", "nowhere"), (3, 5, 10)),
                (("migrate", "nobody", "--to", "b"), (3,)),
                (("migrate", "vm1", "--to", self.cluster.host_of()), (2, 5, 10)),
                (("get", "vms", "nobody"), (3,)),
                (("migrate", "vm1", "--to", self.ends()[1], "--bandwidth", "fast"), (2,)),
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
        self.have_guest()
        shim = self.cluster.agents[self.cluster.host_of()].shims()[0]
        self.assertLess(rss_anon(shim.pid), 8 << 20)
        before = cpu_ticks(shim.pid)
        time.sleep(2)  # the time over which it must use nothing
        self.assertLessEqual(cpu_ticks(shim.pid) - before, 1)


def cpu_ticks(pid):
    with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


class FreedMemory(ClusterTest):
    """What Linux reports as free to QEMU's balloon is a hole in guest memory, and is not sent."""
    TOTAL, FREED = 256 << 20, 144 << 20
    CMDLINE = f"lab.pages=1024 lab.dirty=500 lab.blocks=256 lab.freed={FREED}"

    def allocated(self, host):
        return os.stat(os.path.join(self.cluster.agents[host].memory_dir, "vm1.ram")).st_blocks * 512

    def fill_and_free(self, host):
        self.guest.ask("f", "FREED", timeout=60)
        # The guest has touched more than this, and has held it at one time.
        wait_until(lambda: self.allocated(host) < self.FREED, lambda: f"holes; {self.allocated(host) >> 20} MiB are there",
                   90, pause=0.1)

    def test_reported_pages_are_holes(self):
        self.have_guest()
        source, destination = self.ends()
        self.fill_and_free(source)
        migration = self.move(destination)
        self.assertGreater(int(migration["progress"]["bytes"]["hole_skipped"]), self.TOTAL - self.FREED)
        self.assertLess(self.allocated(destination), self.FREED)
        self.assert_clean()
        # The same memory is of use there, and is reported there.
        self.fill_and_free(destination)
        self.assert_clean()


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
