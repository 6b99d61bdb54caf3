"""Tests that come from a matrix: what is done to whom, at which moment of a migration, and which ends are right then."""

STAYED = {("FAILED", "SOURCE")}
MOVED = {("SUCCEEDED", "DESTINATION")}
# Both are right where it depends on which message was under way.
EITHER = STAYED | MOVED
# The guest died with its VMM, and the record says so.
LOST = {("FAILED", "LOST")}


def add_cases(cls, matrix, what):
    """For each entry of `matrix`, {process: {moment: ends}}, a test that calls cls.check(process, moment, ends)."""
    for process, moments in matrix.items():
        for moment, ends in moments.items():
            def test(self, process=process, moment=moment, ends=ends):
                self.check(process, moment, ends)
            test.__doc__ = f"{process} {what} at {moment}"
            setattr(cls, f"test_{process}_{moment}", test)
