"""Huge pages of the host, for as long as a lab needs them."""
import fcntl
import time

from .lab import LabError

SIZE_MIB = 2
POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
# Moves pages together, so that there are huge ones again.
COMPACT = "/proc/sys/vm/compact_memory"
PATIENCE = 30

# Of a domain, in its <memoryBacking>.
BACKING = f"<hugepages><page size='{SIZE_MIB}' unit='MiB'/></hugepages>"


def change(pages):
    """The host's pool by so many; how many it then has, and how many it was to have."""
    with open(POOL, "r+", encoding="ascii") as pool:
        # Another lab may be at it.
        fcntl.flock(pool, fcntl.LOCK_EX)
        wanted = int(pool.read()) + pages
        pool.seek(0)
        pool.write(str(wanted))
        pool.flush()
        pool.seek(0)
        return int(pool.read()), wanted


def reserve(lab, mib):
    """So many MiB of them beside those that the host has now, until the lab's end. LabError where the host does not give
    them."""
    pages = mib // SIZE_MIB
    deadline = time.monotonic() + PATIENCE
    while True:
        have, wanted = change(pages)
        lab.undo.callback(change, -(pages - (wanted - have)))
        pages = wanted - have
        if pages <= 0:
            return
        if time.monotonic() > deadline:
            raise LabError(f"this host has no {mib} MiB of huge pages for the test: {pages} pages of {SIZE_MIB} MiB are missing "
                           f"of {wanted} (vm.nr_hugepages)")
        with open(COMPACT, "w", encoding="ascii") as compact:
            compact.write("1")


def used_by(pid):
    """How many MiB of them a process has mapped and touched."""
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("HugetlbPages:"))
