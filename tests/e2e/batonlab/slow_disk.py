"""Requests in flight that move with the guest: a disk that takes longer for each than any blackout lasts."""

from batonlab.lab import wait_until

HANDOFF = ("--inflight", "handoff")


class SlowDisk:
    """Before the base of a test class (ClusterTest): its disks are the lab device, which stops without completing (no
    released back-end does), and have LATENCY_US for each request while a case runs."""

    LAB_STORAGE = []
    LATENCY_US = 600000
    NEVER_US = 60_000_000
    seen = None

    def setUp(self):
        super().setUp()
        self.have_guest()
        self.latency(self.LATENCY_US)

    def tearDown(self):
        self.latency(0)
        super().tearDown()

    def latency(self, micros):
        for agent in self.cluster.agents.values():
            agent.storage.set(latency_us=micros)

    def move_in_flight(self, to, options):
        """Moves the guest with requests that are in flight for sure: none is completed where it is. (With LATENCY_US alone all
        writers' requests end at about the same time, and a stop in that moment finds none.)"""
        source, = set(self.ends()) - {to}
        self.cluster.agents[source].storage.set(latency_us=self.NEVER_US)
        self.seen = None
        wait_until(self.writes_stand_still, "the guest's writes to be held", 60, pause=2 * self.LATENCY_US / 1e6)
        migration = self.move(to, options=options)
        self.latency(self.LATENCY_US)
        return migration

    def writes_stand_still(self):
        """Nothing was written since it was asked last."""
        before, self.seen = self.seen, self.guest.status()["writes"]
        return before == self.seen

    def assert_handed_off(self, migration):
        progress = migration["progress"]
        stops = progress["device_stops"]
        self.assertEqual([stop["answer"] for stop in stops], ["HANDOFF"], stops)
        self.assertGreater(int(progress["inflight_handed_off"]), 0, stops)
