"""Tests that come from a matrix: what is done to whom, at which moment of a migration, and which ends are right then."""

from .cluster import summary

STAYED = {("FAILED", "SOURCE")}
MOVED = {("SUCCEEDED", "DESTINATION")}
# Both are right where it depends on which message was under way.
EITHER = STAYED | MOVED
# The guest died with its VMM, and the record says so.
LOST = {("FAILED", "LOST")}


class FaultSteps:
    """Before the base of a test class (ClusterTest), which has check_lost(): what can be done to a process of a migration
    from self.source to self.destination."""

    def kill_one(self, program, host):
        """Kills the only process of that kind, and waits until it is dead: a VMM takes a while to end."""
        found = self.processes(program, host)
        self.assertEqual(len(found), 1, f"{program} on {host}: {found}")
        found[0].end()

    def fault_batond(self):
        self.cluster.batond.kill()
        self.cluster.batond.start()

    def fault_source_agent(self):
        self.cluster.agents[self.source].restart()

    def fault_destination_agent(self):
        self.cluster.agents[self.destination].restart()

    def fault_source_shim(self):
        self.kill_one("baton-shim", self.source)

    def fault_destination_shim(self):
        self.kill_one("baton-shim", self.destination)

    def fault_source_qemu(self):
        self.kill_one("qemu-system", self.source)

    def fault_destination_qemu(self):
        self.kill_one("qemu-system", self.destination)

    def check_end(self, guest, ended, allowed):
        """The record is one of the right ones, there is one guest as it says, whole, and the next migration works."""
        end = (ended["phase"], ended["guest_location"])
        self.assertIn(end, allowed, summary(ended))
        self.assertNotIn(ended.get("reason", ""), ("", "REASON_UNSPECIFIED", "INTERNAL"), summary(ended))
        if end == ("FAILED", "LOST"):
            self.check_lost()
            return
        moved = end[0] == "SUCCEEDED"
        self.assert_runs_only(self.destination if moved else self.source)
        self.assert_clean()
        self.move(self.source if moved else self.destination)
        self.assertIs(guest, self.guest)


def add_cases(cls, matrix, what):
    """For each entry of `matrix`, {process: {moment: ends}}, a test that calls cls.check(process, moment, ends)."""
    for process, moments in matrix.items():
        for moment, ends in moments.items():
            def test(self, process=process, moment=moment, ends=ends):
                self.check(process, moment, ends)
            test.__doc__ = f"{process} {what} at {moment}"
            setattr(cls, f"test_{process}_{moment}", test)
