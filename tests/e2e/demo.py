"""./dev demo: a Linux guest that writes to its vhost-user disk all the time moves to another host and back. With --lab
the guest is baton-lab-guest (docs/lab.md), and no QEMU runs; with --libvirt it is a libvirt domain (demo_libvirt.py)."""
import argparse
import os
import subprocess
import sys

from batonlab import kvm
from batonlab.cluster import Cluster, build_guest, seconds
from batonlab.lab import Lab, LabError

# A guest that is busy with disk and memory, and small enough that its check takes no time.
LAB_OPTIONS = "lab.writers=8 lab.blocks=4096 lab.pages=8192 lab.dirty=4000"

KINDS = [("data", "sent as data"), ("resent", "of it sent again"), ("zero", "zero pages, sent as runs"),
         ("hole_skipped", "never touched, not sent"), ("hint_skipped", "free, not sent"),
         ("state", "VMM and device state"), ("wire", "on the wire")]


def say(text=""):
    print(text, flush=True)


def size(count):
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def move(cluster, guest, to, output):
    """One migration with the display of batonctl; returns its record and the guest's own figures."""
    guest.reset()
    guest.wait_writes(200)
    say(f"\n$ batonctl migrate {guest.name} --to {to}")
    code = subprocess.run(cluster.ctl_command("migrate", guest.name, "--to", to), check=False, timeout=300,
                          env=cluster.lab.environment(), stdout=output).returncode
    if code != 0:
        raise LabError(f"the migration to {to} failed (batonctl exits with {code})")
    migrations = cluster.get("migrations", "--vm", guest.name)["migrations"]
    guest.wait_writes(200)
    return migrations[0], measured(guest)


def measured(guest):
    """The guest's figures, once two seconds of its clock have passed since it moved."""
    start = guest.status()
    for _ in range(20):
        status = guest.status()
        if int(status["stop_us"]) or status["clock"] != "cmos":
            return status
        guest.wait_writes(100)
    return start


def figures(title, migration, guest):
    progress = migration.get("progress", {})
    down = progress.get("downtimes", {})
    say(f"\n{title}")
    say(f"  the guest stood still      {int(guest['stop_us']) / 1000:8.1f} ms  by its own account"
        f" ({int(guest['gap_us']) / 1000:.1f} ms from one completed I/O to the next)")
    for key, name in (("vcpu", "vCPUs"), ("device", "devices")):
        if down.get(key):
            say(f"  {name + ' stopped':26} {seconds(down[key]) * 1000:8.1f} ms  as Baton measured it")
    for part in down.get("parts", []):
        say(f"    {part['name']:24} {seconds(part.get('duration')) * 1000:8.1f} ms")
    counts = progress.get("bytes", {})
    for key, name in KINDS:
        if int(counts.get(key, 0)):
            say(f"  {name:26} {size(int(counts[key])):>11}")
    rounds = progress.get("rounds", [])
    say(f"  rounds                     {len(rounds):8}")
    for item in rounds:
        say(f"    round {item.get('number', 0):2}  {int(item.get('pages', 0)):7} pages  "
            f"{size(int(item.get('bytes', 0))):>10}  {seconds(item.get('duration')) * 1000:8.1f} ms")


def choose_accelerator(lab, arguments):
    guest_dir = build_guest(lab)
    accelerated = not arguments.tcg and kvm.works(guest_dir, lab.environment())
    say("accelerator: " + ("KVM" if accelerated else "TCG (no trial boot under KVM)" if arguments.tcg
                           else "TCG (a trial boot under KVM did not work)"))
    return accelerated


def demo(lab, arguments):
    accelerated = not arguments.lab and choose_accelerator(lab, arguments)
    with Cluster(lab, kvm=accelerated, lab_guest=arguments.lab) as cluster:
        say("\n$ batonctl get hosts")
        say(cluster.ctl("get", "hosts").stdout.rstrip())
        kind = "lab" if arguments.lab else "Linux"
        say(f"\nstarting a {kind} guest on host a, with a vhost-user disk that host b has as well")
        guest = cluster.start_guest("a", cmdline=LAB_OPTIONS if arguments.lab else "")
        say("$ batonctl get vms")
        say(cluster.ctl("get", "vms").stdout.rstrip())
        # Without a terminal batonctl prints plain lines.
        with open(os.path.join(lab.logs, "display.log"), "ab") as plain:
            output = plain if arguments.plain else None
            there = move(cluster, guest, "b", output)
            back = move(cluster, guest, "a", output)
        figures("a to b", *there)
        figures("b to a", *back)
        _, sentence = guest.verify(go_on=False)
        cluster.ctl("vm", "stop", "vm1")
        say()
        say(sentence)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", required=True, help="directory of the programs")
    parser.add_argument("--lab", action="store_true", help="with the lab guest instead of QEMU and Linux")
    parser.add_argument("--libvirt", action="store_true", help="a libvirt domain between two libvirt hosts")
    parser.add_argument("--tcg", action="store_true", help="do not try KVM")
    parser.add_argument("--plain", action="store_true", help="no live display, as in a pipe")
    arguments = parser.parse_args()
    lab = Lab("demo-lab" if arguments.lab else "demo-libvirt" if arguments.libvirt else "demo", arguments.bin)
    run = demo
    if arguments.libvirt:
        # Here, since it uses what is above.
        from demo_libvirt import demo as run
    try:
        with lab:
            run(lab, arguments)
        left = lab.leftovers()
        if left:
            raise LabError("still there: " + ", ".join(left))
    except KeyboardInterrupt:
        print("\ninterrupted; everything was ended and removed", file=sys.stderr)
        return 130
    except (LabError, subprocess.SubprocessError) as error:
        print(f"\ndemo failed: {error}\nlogs: {lab.logs}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
