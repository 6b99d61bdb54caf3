"""What happens when one of the processes is killed, or the connection is cut, in each phase of a migration. Every case
ends with exactly one running guest, a clean self-check and a migration that works."""
import sys
import time
import unittest

from batonlab.case import ClusterTest
from batonlab.cluster import summary
from batonlab.lab import wait_until

# Where the shims wait while the fault is injected: {phase: (side, pause point)}. The destination's shim passes
# `prepared` and `loaded` and `owner`, the source's `precopy`, `frozen` and `yielded`.
POINTS = {
    "preparing": ("b", "prepared"),
    "precopy": ("a", "precopy"),
    "switchover": ("a", "frozen"),
    "yielded": ("a", "yielded"),
    "loaded": ("b", "loaded"),
    "owner": ("b", "owner"),
}

MOVED = {("SUCCEEDED", "DESTINATION")}
STAYED = {("FAILED", "SOURCE")}
EITHER = MOVED | STAYED
LOST = {("FAILED", "LOST")}

# process → {point: what may come of it}. Killed batonds, agents and storage daemons are started again, as a service
# manager would do. Both answers are right where it depends on which message was under way.
MATRIX = {
    "batond": {"preparing": EITHER, "precopy": MOVED, "switchover": MOVED, "yielded": MOVED, "owner": MOVED},
    "source_agent": {"preparing": EITHER, "precopy": MOVED, "switchover": MOVED, "yielded": MOVED},
    "destination_agent": {"preparing": EITHER, "precopy": MOVED, "switchover": MOVED, "loaded": MOVED, "owner": MOVED},
    "destination_shim": {"preparing": STAYED, "precopy": STAYED, "switchover": STAYED, "yielded": STAYED,
                         "loaded": STAYED, "owner": MOVED},
    "destination_qemu": {"preparing": STAYED, "precopy": STAYED, "switchover": STAYED, "yielded": STAYED,
                         "loaded": STAYED},
    "source_storage": {"preparing": EITHER, "precopy": EITHER, "switchover": EITHER},
    "destination_storage": {"preparing": EITHER, "precopy": EITHER, "switchover": EITHER},
    "connection": {"preparing": EITHER, "precopy": STAYED, "switchover": STAYED, "yielded": EITHER},
    # These may take the guest with them before the handover; then the record says so.
    "source_shim": {"preparing": STAYED | LOST, "precopy": STAYED | LOST, "switchover": STAYED | LOST, "yielded": EITHER},
    "source_qemu": {"preparing": LOST, "precopy": LOST, "switchover": LOST, "yielded": MOVED | LOST},
}


class Faults(ClusterTest):
    SECURE = True

    def one(self, program, host):
        """The VM's only process of that kind on a host."""
        found = self.cluster.agents[host].find(program)
        self.assertEqual(len(found), 1, f"{program} on {host}: {found}")
        return found[0]

    # Each answers what to do once the waiting shims go on: start again what a service manager would.

    def fault_batond(self):
        self.cluster.batond.kill()
        self.cluster.batond.start()

    def fault_source_agent(self):
        self.cluster.agents["a"].restart()

    def fault_destination_agent(self):
        self.cluster.agents["b"].restart()

    def fault_destination_shim(self):
        self.one("baton-shim", "b").kill()

    def fault_destination_qemu(self):
        self.one("qemu-system", "b").kill()

    def fault_source_storage(self):
        self.cluster.agents["a"].storage.kill()
        self.cluster.agents["a"].storage.start()

    def fault_destination_storage(self):
        self.cluster.agents["b"].storage.kill()
        self.cluster.agents["b"].storage.start()

    def fault_connection(self):
        self.cluster.network.cut()

    def fault_source_shim(self):
        self.one("baton-shim", "a").kill()

    def fault_source_qemu(self):
        self.one("qemu-system", "a").kill()

    def check(self, process, point, allowed):
        guest = self.have_guest("a")
        side, name = POINTS[point]
        waiting = self.cluster.agents[side]
        waiting.set_pause(name)
        migration = self.cluster.migrate("b", wait=False)["name"]
        wait_until(lambda: waiting.paused_at(name), lambda: f"pause point {name}; the migration is "
                   f"{summary(self.cluster.migration(migration) or {})}", 60)
        getattr(self, "fault_" + process)()
        waiting.release()
        if process == "connection" and point != "precopy":
            # Silence is noticed after 10 s; then the link is back, and the two sides must come to an agreement.
            wait_until(lambda: self.noticed(migration), "an end of the connection that both sides notice", 30, pause=0.2)
        if process == "connection":
            ended = None if point == "yielded" else self.cluster.wait_ended(migration, 60)
            self.cluster.network.join()
            ended = ended or self.cluster.wait_ended(migration, 60)
        else:
            ended = self.cluster.wait_ended(migration, 60)
        end = (ended["phase"], ended["guest_location"])
        self.assertIn(end, allowed, summary(ended))
        self.assertNotIn(ended.get("reason", ""), ("", "REASON_UNSPECIFIED", "INTERNAL"), summary(ended))
        if end == ("FAILED", "LOST"):
            self.check_lost()
            return
        self.assert_runs_only("b" if end[0] == "SUCCEEDED" else "a")
        self.assert_clean()
        # The next migration works.
        self.move("a" if end[0] == "SUCCEEDED" else "b")
        self.assertIs(guest, self.guest)

    def noticed(self, migration):
        """The cut has lasted longer than either side waits for a silent peer."""
        if not hasattr(self, "cut_at"):
            self.cut_at = time.monotonic()
        phase = (self.cluster.migration(migration) or {}).get("phase")
        return phase in ("FAILED", "CANCELLED", "SUCCEEDED") or time.monotonic() - self.cut_at > 13

    def check_lost(self):
        """The guest ended with its VMM; nothing of it runs anywhere, batond says so, and its name is free again."""
        for agent in self.cluster.agents.values():
            wait_until(lambda agent=agent: not agent.qemus(), f"no QEMU on {agent.name}", 30)
        self.lose_guest()
        wait_until(lambda: self.cluster.vm() is None, "vm1 to be forgotten", 30, pause=0.1)
        for agent in self.cluster.agents.values():
            wait_until(lambda agent=agent: not agent.shims(), f"no shim on {agent.name}", 30)
        self.have_guest("a")
        self.move("b")


def add_cases():
    for process, points in MATRIX.items():
        for point, allowed in points.items():
            def test(self, process=process, point=point, allowed=allowed):
                self.check(process, point, allowed)
            test.__doc__ = f"{process} fails at {point}"
            setattr(Faults, f"test_{process}_{point}", test)


add_cases()

if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
