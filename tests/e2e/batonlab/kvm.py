"""Whether hardware virtualization really runs the lab guest: /dev/kvm may exist and still not boot a stock kernel."""
import os
import select
import subprocess
import time

LIMIT = 10.0


def works(guest_dir, environment, qemu="qemu-system-x86_64"):
    """Boots the guest under KVM, without a disk, until its workload says READY; False after LIMIT seconds."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    command = [qemu, "-accel", "kvm", "-m", "256", "-machine", "q35", "-nodefaults", "-vga", "none", "-display", "none",
               "-no-reboot", "-serial", "stdio", "-kernel", os.path.join(guest_dir, "vmlinuz"),
               "-initrd", os.path.join(guest_dir, "initrd.gz"), "-append", "console=ttyS0 quiet no_timer_check panic=-1"]
    deadline = time.monotonic() + LIMIT
    heard = b""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          env=environment) as trial:
        try:
            while b"READY" not in heard:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([trial.stdout], [], [], left)[0]:
                    return False
                data = trial.stdout.read1(4096)
                if not data:
                    return False
                heard += data
            return True
        finally:
            trial.kill()
