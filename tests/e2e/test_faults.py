"""What happens when one of the processes is killed or hangs, or the connection is cut, in each phase of a migration. Every case
ends with exactly one running guest, a clean self-check and a migration that works."""
import signal
import sys
import time
import unittest

from batonlab.case import ClusterTest
from batonlab.faults import EITHER, LOST, MOVED, STAYED, FaultSteps, add_cases
from batonlab.lab import wait_until

# Where the shims wait while the fault is injected: {phase: (side, pause point)}.
POINTS = {
    "preparing": ("destination", "prepared"),
    "precopy": ("source", "precopy"),
    "switchover": ("source", "frozen"),
    "yielded": ("source", "yielded"),
    "loaded": ("destination", "loaded"),
    "owner": ("destination", "owner"),
}

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
    # Stopped by SIGSTOP until the migration has ended: silence is noticed within a bound, like an end.
    "hung_destination_shim": {"precopy": STAYED},
    "hung_destination_qemu": {"switchover": STAYED},
    "hung_destination_storage": {"precopy": EITHER},
    "hung_source_storage": {"precopy": STAYED},
    # These may take the guest with them before the handover; then the record says so.
    "source_shim": {"preparing": STAYED | LOST, "precopy": STAYED | LOST, "switchover": STAYED | LOST, "yielded": EITHER},
    "source_qemu": {"preparing": LOST, "precopy": LOST, "switchover": LOST, "yielded": MOVED | LOST},
}


class Faults(FaultSteps, ClusterTest):
    SECURE = True

    def fault_source_storage(self):
        self.cluster.agents[self.source].storage.restart()

    def fault_destination_storage(self):
        self.cluster.agents[self.destination].storage.restart()

    def fault_connection(self):
        self.cluster.network.cut()
        self.cut_at = time.monotonic()

    def hang(self, program, host):
        """Stops the processes of that kind; answers how to let them go on."""
        found = self.processes(program, host)
        self.assertTrue(found, f"no {program} on {host}")
        for process in found:
            process.kill(signal.SIGSTOP)
        self.addCleanup(lambda: [process.kill(signal.SIGCONT) for process in found])

    def fault_hung_destination_shim(self):
        self.hang("baton-shim", self.destination)

    def fault_hung_destination_qemu(self):
        self.hang("qemu-system", self.destination)

    def fault_hung_destination_storage(self):
        self.hang("qemu-storage-d", self.destination)

    def fault_hung_source_storage(self):
        self.hang("qemu-storage-d", self.source)

    def check(self, process, point, allowed):
        # The guest goes from where the case before left it.
        guest = self.have_guest()
        self.source, self.destination = self.ends()
        migration, waiting = self.start_and_wait_at(*POINTS[point])
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
        self.doCleanups()  # what hung goes on
        self.check_end(guest, ended, allowed)

    def noticed(self, migration):
        """The cut has lasted longer than either side waits for a silent peer."""
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
        self.have_guest(self.source)
        self.move(self.destination)


add_cases(Faults, MATRIX, "fails")

if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
