"""A back-end tells of an error, and a policy moves the guest away: with drain, and with what it holds handed over."""
import sys
import unittest

from batonlab.lab import wait_until
from test_devices import Errors


class ErrorsMove(Errors):
    test_an_error_is_seen_and_outlives_the_shim = None  # in its own suite

    def first_migration(self):
        found = wait_until(lambda: self.migrations()[self.before:], "a migration", 120, pause=0.1)
        self.assertEqual((found[0]["labels"]["cause"], found[0]["labels"]["device"]), ("device-event", "disk0"))
        return self.cluster.wait_ended(found[0]["name"], 60)

    def test_what_is_held_does_not_drain_and_the_guest_stays(self):
        self.cluster.ctl("policy", "set", "default", "--on-device-error", "migrate", "--event-backoff", "1s")
        self.storage.set(no_space=True)
        first = self.first_migration()
        self.assertEqual((first["phase"], first["reason"], first["guest_location"]), ("FAILED", "DRAIN_TIMEOUT", "SOURCE"))
        # There is room again: the next attempt succeeds.
        self.storage.set(no_space=False)
        wait_until(lambda: self.cluster.host_of() == self.destination, f"the guest on {self.destination}", 120, pause=0.2)
        self.assert_runs_only(self.destination)
        self.assert_clean()

    def test_what_is_held_is_handed_over_and_done_at_the_destination(self):
        self.cluster.ctl("policy", "set", "default", "--on-device-error", "migrate", "--inflight", "handoff")
        self.storage.set(no_space=True)
        first = self.first_migration()
        self.assertEqual(first["phase"], "SUCCEEDED", first.get("message"))
        self.assertGreater(int(first["progress"]["inflight_handed_off"]), 0)
        self.assert_runs_only(self.destination)
        self.assert_clean()


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", "ErrorsMove", *sys.argv[1:]])
