"""NICs in the lab: a lab net device at each host, and the network that their wires lead to."""
import json
import os
import select
import socket
import struct
import threading
import time

from .lab import LabError, listening, wait_until

OUR_MAC = bytes.fromhex("0200000000fe")
OUR_IP = bytes([10, 88, 0, 1])
BROADCAST = b"\xff" * 6
ARP, RARP, IP = 0x0806, 0x8035, 0x0800


class NetDevice:
    """baton-lab-device with a virtio-net model, at one host. `wire`: where it plugs itself in or, with `hub`, where
    others do."""

    def __init__(self, cluster, host, name, mac, wire, options=(), hub=False):
        self.cluster, self.host, self.name, self.mac, self.options = cluster, host, name, mac, options
        self.wire = ("--wire-listen" if hub else "--wire-connect", wire)
        self.socket = os.path.join(cluster.lab.dir, f"{host}-{name}.sock")
        self.control = os.path.join(cluster.lab.dir, f"{host}-{name}.ctl")
        self.process = None

    def start(self):
        for path in (self.socket, self.control):
            if os.path.exists(path):
                os.unlink(path)
        program = self.cluster.lab.program("baton-lab-device")
        self.process = self.cluster.lab.spawn(
            [program, "--net", "--mac", self.mac, "--socket", self.socket, "--control", self.control,
             *self.wire, *self.options], f"{self.name}-{self.host}", host=self.host)
        wait_until(lambda: listening(self.socket) and listening(self.control) or self.process.poll() is not None,
                   f"net device {self.host}")
        if self.process.poll() is not None:
            raise LabError(f"baton-lab-device ended, see the log {self.name}-{self.host}.log")

    def stats(self):
        result = self.cluster.lab.run([self.cluster.lab.program("baton-lab-device"), "ctl", self.control,
                                       '{"cmd":"stats"}'])
        return json.loads(result.stdout)


def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff


class Outside(threading.Thread):
    """Everything beyond the hosts: wires are plugged in at a path, addresses are learnt from what is heard on them as a
    switch does, and a station sends numbered echo requests to the guest and notes each answer, its wire and its time."""

    def __init__(self, path, guest_ip, interval=0.02):
        super().__init__(daemon=True)
        self.path, self.guest_ip, self.interval = path, bytes(int(b) for b in guest_ip.split(".")), interval
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(path)
        self.listener.listen(8)
        self.guest_mac = None
        self.ports = {}      # MAC address -> wire
        self.frames = {}     # ethertype -> [(time, wire, source address)]
        # A list of a dictionary's items is not made in one step (the collector of garbage may run in between, and with it
        # other threads), so that these two are written and copied under it.
        self.noting = threading.Lock()
        self.answers = {}    # sequence -> (time, wire)
        self.sent = {}       # sequence -> time
        self.damaged = self.repeated = 0
        self.stopping = threading.Event()
        self.names = {}      # wire -> number in the order of plugging in

    def run(self):
        due, sequence = time.monotonic(), 0
        while not self.stopping.is_set():
            wires = list(self.names)
            ready, _, _ = select.select([self.listener, *wires], [], [], max(0.0, due - time.monotonic()))
            for item in ready:
                if item is self.listener:
                    wire, _ = self.listener.accept()
                    wire.setblocking(False)
                    self.names[wire] = len(self.names)
                else:
                    self.hear(item)
            if time.monotonic() >= due:
                due = time.monotonic() + self.interval
                if self.guest_mac is None:
                    self.ask_for_guest()
                else:
                    sequence += 1
                    self.ping(sequence)

    def stop(self):
        self.stopping.set()
        self.join(timeout=10)
        for wire in (*self.names, self.listener):
            wire.close()
        os.unlink(self.path)

    def send(self, frame):
        wire = self.ports.get(frame[:6])
        for one in [wire] if wire in self.names else list(self.names):
            try:
                one.send(frame)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                pass

    def hear(self, wire):
        try:
            frame = wire.recv(65536)
        except BlockingIOError:
            return
        except ConnectionResetError:
            frame = b""
        if not frame:
            del self.names[wire]
            self.ports = {mac: port for mac, port in self.ports.items() if port is not wire}
            return
        destination, source, kind = frame[:6], frame[6:12], int.from_bytes(frame[12:14], "big")
        self.ports[source] = wire
        self.frames.setdefault(kind, []).append((time.monotonic(), self.names[wire], source))
        if kind == ARP and frame[28:32] == self.guest_ip:
            self.guest_mac = source
            if frame[20:22] == b"\0\1" and frame[38:42] == OUR_IP:
                self.arp(2, source, source, frame[28:32])
        if kind == IP and destination == OUR_MAC and frame[23] == 1:
            self.take_answer(frame, wire)

    def take_answer(self, frame, wire):
        icmp = frame[34:34 + int.from_bytes(frame[16:18], "big") - 20]
        if icmp[0] != 0:
            return
        sequence = int.from_bytes(icmp[8:16], "big")
        if checksum(icmp) != 0 or icmp[16:] != self.payload(sequence):
            self.damaged += 1
        elif sequence in self.answers:
            self.repeated += 1
        else:
            with self.noting:
                self.answers[sequence] = (time.monotonic(), self.names[wire])

    @staticmethod
    def payload(sequence):
        size = 32 + 2 * (sequence * 37 % 600)
        return bytes((sequence + i * 7) & 0xff for i in range(size))

    def arp(self, operation, to_mac, target_mac, target_ip):
        self.send(to_mac + OUR_MAC + struct.pack(">HHHBBH", ARP, 1, IP, 6, 4, operation) + OUR_MAC + OUR_IP +
                  target_mac + target_ip + bytes(18))

    def ask_for_guest(self):
        self.arp(1, BROADCAST, bytes(6), self.guest_ip)

    def ping(self, sequence):
        body = sequence.to_bytes(8, "big") + self.payload(sequence)
        header = struct.pack(">BBHHH", 8, 0, 0, 0xba70, sequence & 0xffff)
        header = header[:2] + struct.pack(">H", checksum(header + body)) + header[4:]
        ip = struct.pack(">BBHHHBBH", 0x45, 0, 28 + len(body), 0, 0, 64, 1, 0) + OUR_IP + self.guest_ip
        ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
        with self.noting:
            self.sent[sequence] = time.monotonic()
        self.send(self.guest_mac + OUR_MAC + struct.pack(">H", IP) + ip + header + body)

    # --- for the tests ---

    def wait_answers(self, more, timeout=30):
        """Until so many more requests than now have been answered."""
        goal = len(self.answers) + more
        wait_until(lambda: len(self.answers) >= goal, lambda: f"{goal} answers of the guest, there are "
                   f"{len(self.answers)} to {len(self.sent)} requests of a station that "
                   f"{'runs' if self.is_alive() else 'has ended'}; "
                   f"seen: {({hex(kind): len(self.frames[kind]) for kind in list(self.frames)})}",
                   timeout, pause=0.02)

    def noted(self):
        """What was sent, and what was answered."""
        with self.noting:
            return self.sent.copy(), self.answers.copy()

    def lost_between(self, begin, end):
        """Requests sent between these times that were not answered while a later one was: answers come in order, and on
        a busy host the last ones are still on their way."""
        sent, answers = self.noted()
        newest = max(answers, default=0)
        return [n for n, at in sent.items() if begin <= at <= end and n < newest and n not in answers]

    def longest_gap(self, begin, end):
        _, answers = self.noted()
        times = sorted(at for at, _ in answers.values() if begin <= at <= end)
        return max((b - a for a, b in zip(times, times[1:])), default=0.0)

    def longest_lag(self, begin, end):
        """How long a request waited for its answer at most. On a busy machine the last answer before a gap is to a request
        that was sent so long before."""
        sent, answers = self.noted()
        return max((at - sent[n] for n, (at, _) in answers.items() if begin <= at <= end), default=0.0)
