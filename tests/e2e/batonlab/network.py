"""Where the hosts of a lab live: loopback addresses, or a network namespace each."""
import os
import socket
import subprocess


def free_port(address):
    """A TCP port that nobody uses now."""
    with socket.socket(socket.AF_INET) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


class Loopback:
    """Everything on 127.0.0.0/8."""

    secure = False
    addresses = {"control": "127.0.0.1", "a": "127.0.1.1", "b": "127.0.1.2"}

    def prefix(self, place):
        del place
        return []

    def port(self, place):
        return free_port(self.addresses[place])

    def address(self, place, seen_from=None):
        del seen_from
        return self.addresses[place]


class Namespaces:
    """A network namespace for batond and one for each host, joined in a triangle of veth pairs."""

    secure = True
    links = {("control", "a"): 1, ("control", "b"): 2, ("a", "b"): 3}

    def __init__(self, lab):
        self.lab = lab
        self.names = {place: f"{lab.id}-{place}" for place in ("control", "a", "b")}
        lab.undo.callback(self.remove)
        for name in self.names.values():
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        for (one, other), number in self.links.items():
            # Interface names are limited to 15 characters and need only be unique in the namespace.
            self.ip("-n", self.names[one], "link", "add", f"to-{other}", "type", "veth", "peer", "name", f"to-{one}",
                    "netns", self.names[other])
            for place, peer, host in ((one, other, 1), (other, one, 2)):
                self.ip("-n", self.names[place], "address", "add", f"10.77.{number}.{host}/24", "dev", f"to-{peer}")
                self.ip("-n", self.names[place], "link", "set", f"to-{peer}", "up")

    @staticmethod
    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    def remove(self):
        for name in self.names.values():
            if os.path.exists(f"/run/netns/{name}"):
                self.ip("netns", "del", name)

    def prefix(self, place):
        return ["nsenter", f"--net=/run/netns/{self.names[place]}", "--"]

    def port(self, place):
        del place
        # Nobody else is in there.
        return 7400

    def address(self, place, seen_from):
        for (one, other), number in self.links.items():
            if (one, other) == (place, seen_from):
                return f"10.77.{number}.1"
            if (other, one) == (place, seen_from):
                return f"10.77.{number}.2"
        return "127.0.0.1"

    def all_addresses(self, place):
        return [self.address(place, other) for other in self.names if other != place]

    def cut(self, one="a", other="b"):
        """Packets between the two get lost from now on; connections stay open."""
        self.ip("-n", self.names[one], "link", "set", f"to-{other}", "down")

    def reset(self, port, one="a", other="b"):
        """Ends every TCP connection from one place to that port of the other, for both of them."""
        found = subprocess.run([*self.prefix(one), "ss", "-tnHK", "dst", f"{self.address(other, one)}:{port}"], check=True,
                               capture_output=True, text=True).stdout
        if not found.strip():
            raise AssertionError(f"nothing to reset from {one} to {other}")
        return found

    def join(self, one="a", other="b"):
        self.ip("-n", self.names[one], "link", "set", f"to-{other}", "up")
