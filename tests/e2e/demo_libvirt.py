"""./dev demo --libvirt: a libvirt domain, which Baton did not create, moves to another libvirt host and back."""
import os

from batonlab.lab import wait_until
from batonlab.libvirt import LibvirtCluster
from demo import figures, move, say

VM = "web1"

# QEMU 7.2 under TCG may lose what a busy guest writes at the wrong moment (tests/e2e/test_libvirt.py).
OPTIONS = "lab.pages=256 lab.dirty=20 lab.blocks=64 lab.writers=1 lab.delay_us=5000"


def demo(lab, arguments):
    with LibvirtCluster(lab) as cluster:
        say("two hosts, each with a libvirt of its own; accelerator: TCG")
        say("\n$ batonctl get hosts")
        say(cluster.ctl("get", "hosts").stdout.rstrip())
        say("\n$ virsh define web1.xml && virsh start web1        (on host a)")
        guest = cluster.start_domain("a", VM, cmdline=OPTIONS)
        wait_until(lambda: cluster.vm(VM), "the agent to find the domain", 30)
        say(cluster.hosts["a"].virsh("dominfo", VM).stdout.rstrip())
        say("\n$ batonctl describe vm web1")
        say(cluster.ctl("describe", "vm", VM).stdout.rstrip())
        say("\n$ batonctl migrate web1 --to b --dry-run")
        say(cluster.ctl("migrate", VM, "--to", "b", "--dry-run").stdout.rstrip())
        # Without a terminal batonctl prints plain lines.
        with open(os.path.join(lab.logs, "display.log"), "ab") as plain:
            output = plain if arguments.plain else None
            there = move(cluster, guest, "b", output)
            where(cluster)
            back = move(cluster, guest, "a", output)
            where(cluster)
        figures("a to b", *there)
        figures("b to a", *back)
        _, sentence = guest.verify(go_on=False)
        cluster.hosts["a"].virsh("destroy", VM)
        stops = [f"{int(status['stop_us']) / 1000:.1f} ms" for _, status in (there, back)]
        say(f"\nthe domain {VM} moved from a to b and back; by its own account it stood still for {stops[0]} and {stops[1]}")
        say(sentence)


def where(cluster):
    """What both libvirts say."""
    say("")
    for name, host in cluster.hosts.items():
        say(f"libvirt of host {name}: web1 is {host.state(VM) or 'not there'}")
