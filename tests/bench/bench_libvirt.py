"""The same libvirt domain moved between the same daemons by `virsh migrate --live --p2p` and by batonctl, in turn. With QEMU
10.0 from backports: QEMU before 9.0 loses what a busy guest under TCG writes, whoever asks for the migration.

QEMU's limit of the stop is 300 ms by default, and the policy's as well, of which Baton tells QEMU a tenth at first. So virsh
comes twice: as it is, which the limits of the ratios are for, and with that tenth, which leaves what Baton's hands cost."""
import os
import statistics
import time

from batonlab.cluster import seconds, summary
from batonlab.lab import Lab, LabError, wait_until
from batonlab.libvirt import LibvirtCluster, LibvirtHost, backports

VM = "web1"
# MiB of memory and what the guest does with it: a small one, most of whose memory is empty, and one that has written 768 MiB
# of its own.
SMALL = (256, "lab.pages=4096 lab.dirty=1500")
LARGE = (1024, "lab.pages=196608 lab.dirty=1500")
PKI = "/etc/libvirt/pki"
# In milliseconds.
FIRST_LIMIT = 30
FIGURES = (("total", "whole command"), ("stop", "machine stopped, in the guest"), ("gap", "between two I/Os, in the guest"))


class TlsHost(LibvirtHost):
    """Has certificates for QEMU's own TLS."""

    def more_conf(self):
        addresses = self.cluster.network.all_addresses(self.name)
        pki = os.path.join(self.dir, "etc/pki")
        os.makedirs(pki)
        pem = self.cluster.authority.issue(f"qemu-{self.name}", f"/CN=host-{self.name}", addresses)
        for file, source in (("ca-cert", "ca"), ("server-cert", "cert"), ("server-key", "key"), ("client-cert", "cert"),
                             ("client-key", "key")):
            os.link(pem[source], os.path.join(pki, file + ".pem"))
        return f'migrate_tls_x509_cert_dir = "{PKI}"\nmigrate_tls_x509_verify = 1\n'


def by_virsh(cluster, source, destination, tls):
    hosts = cluster.hosts
    # As between any two hosts: only here both could reach a unix socket. With TLS, QEMU checks the name of the host that it
    # connects to.
    uri = f"tcp://{cluster.network.address(destination, source)}"
    more = ["--tls"] if tls else []
    command = hosts[source].virsh_command("migrate", "--live", "--p2p", "--persistent", "--undefinesource", "--unsafe", *more,
                                          VM, hosts[destination].uri, "--migrateuri", uri)
    cluster.lab.run(command, timeout=120)


def by_baton(cluster, source, destination, tls):
    del source, tls
    cluster.ctl("migrate", VM, "--to", destination, timeout=120)


def limit_stop(cluster, source):
    cluster.hosts[source].virsh("migrate-setmaxdowntime", VM, str(FIRST_LIMIT))


WAYS = {"virsh": (None, by_virsh), "virsh, 30 ms": (limit_stop, by_virsh), "batonctl": (None, by_baton)}


def measure(cluster, guest, way, tls):
    """One migration; the guest's own figures and the time that the command took, in milliseconds."""
    source = cluster.runs_at(VM)
    destination = "b" if source == "a" else "a"
    wait_until(lambda: cluster.host_of(VM) == source, f"batond to know that {VM} is at {source}", 30)
    guest.wait_writes(300)
    guest.reset()
    guest.wait_writes(300)
    before, move = way
    if before:
        before(cluster, source)
    start = time.monotonic()
    move(cluster, source, destination, tls)
    total = (time.monotonic() - start) * 1000
    if cluster.runs_at(VM) != destination:
        raise LabError(f"after the migration {VM} is {cluster.states(VM)}")
    status = wait_until(lambda: noticed(guest), "the guest to notice its stop", 30, pause=0.2)
    return {"total": total, "stop": int(status["stop_us"]) / 1000, "gap": int(status["gap_us"]) / 1000}


def noticed(guest):
    status = guest.status()
    return status if int(status["stops"]) else None


def compare(lab, runs, size, tls, say, row):
    memory, cmdline = size
    figures = {name: [] for name in WAYS}
    own = []
    qemu = backports("qemu")
    with LibvirtCluster(lab, secure=tls, usr={"a": qemu, "b": qemu}, host_class=TlsHost if tls else LibvirtHost) as cluster:
        guest = cluster.start_domain("a", VM, memory=memory, cmdline=cmdline)
        # One more than counted: the first of each warms up. Each goes as often from a to b as from b to a.
        for run in range(runs + 1):
            for name in list(WAYS)[::1 if run % 2 else -1]:
                figures[name].append(measure(cluster, guest, WAYS[name], tls))
                if name == "batonctl":
                    record = cluster.get("migrations", "--vm", VM)["migrations"][0]
                    if record["phase"] != "SUCCEEDED" or bool(record["params"].get("tls")) != tls:
                        raise LabError(summary(record))
                    own.append(seconds(record["progress"]["downtimes"].get("vcpu")) * 1000)
            say(f"  run {run:2}: " + "  ".join(f"{name} {f[-1]['total']:7.1f} ms, stop {f[-1]['stop']:6.1f} ms"
                                               for name, f in figures.items()))
        _, sentence = guest.verify()
    for f in (*figures.values(), own):
        del f[0]
    for key, title in FIGURES:
        say(f" {title}")
        for name, f in figures.items():
            row(name, [item[key] for item in f])
    row("batonctl, as it reports", own)
    say(f"  {sentence}")
    words = f"{memory} MiB, " + ("TLS, QEMU's own beside Baton's" if tls else "no TLS")
    ratios = []
    for other in ("virsh", "virsh, 30 ms"):
        for key, title in FIGURES:
            limit = " (at most 1.1)" if other == "virsh" and not tls and key != "gap" else ""
            ratios.append((f"libvirt, {words}: {title}, Baton / {other}{limit}",
                           statistics.median(f[key] for f in figures["batonctl"]) /
                           statistics.median(f[key] for f in figures[other])))
    return ratios


def bench(lab, runs, say, row):
    say("without TLS")
    ratios = compare(lab, runs, SMALL, False, say, row)
    lab.close()
    say("without TLS, 1 GiB, most of it used")
    with Lab(os.path.join("bench", "libvirt-large"), lab.bin) as large:
        ratios += compare(large, runs, LARGE, False, say, row)
    say("with TLS")
    with Lab(os.path.join("bench", "libvirt-tls"), lab.bin) as secure:
        return ratios + compare(secure, runs, SMALL, True, say, row)
