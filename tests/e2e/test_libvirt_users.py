"""QEMU under a user of its own, and the libvirt of a user (qemu:///session) with the agent of that user."""
import os
import pwd
import shutil
import sys
import unittest

from batonlab.libvirt import LibvirtAgent, LibvirtCluster, LibvirtHost
from batonlab.libvirt_case import VM, LibvirtTest
from test_libvirt import QUIET

USER = pwd.getpwnam("libvirt-qemu")
RUNTIME = "/run/user-baton"


def let_pass(path, top):
    """Others may go through the directories above `path`, from `top` on."""
    while path.startswith(top):
        path = os.path.dirname(path)
        if path.startswith(top):
            os.chmod(path, 0o711)


class UsersCluster(LibvirtCluster):
    def __init__(self, lab, **options):
        super().__init__(lab, **options)
        os.chmod(lab.dir, 0o711)
        # libvirt changes the owner of what it gives to a guest.
        self.guest_dir = shutil.copytree(self.guest_dir, os.path.join(lab.dir, "guest"))
        for name, agent in self.agents.items():
            let_pass(os.path.join(agent.libvirt.dir, "x"), lab.dir)


class QemuUserHost(LibvirtHost):
    def write(self, path, text):
        if path == "etc/qemu.conf":
            text = text.replace('user = "root"', f'user = "{USER.pw_name}"').replace('group = "root"', 'group = "kvm"')
        super().write(path, text)

    def launch(self, daemon):
        if daemon == "virtlogd" and os.path.exists("/dev/kvm"):
            # As udev has it for QEMU's user. libvirt asks QEMU again and again for what it can do where the two do not agree
            # on whether there is KVM.
            self.cluster.lab.run([*self.prefix(), "sh", "-c", "mknod /run/kvm c 10 232 && chmod 666 /run/kvm && "
                                  "mount --bind /run/kvm /dev/kvm"])
        super().launch(daemon)


class UsersTest(LibvirtTest):
    CMDLINE = QUIET
    cluster_class = UsersCluster
    host_class = LibvirtHost

    @classmethod
    def make_cluster(cls):
        return cls.cluster_class(cls.lab, secure=cls.SECURE, host_class=cls.host_class)

    def check_there_and_back(self):
        self.have_guest()
        for to in reversed(self.ends()):
            self.move(to)
            (qemu,) = self.processes("qemu-system", to)
            self.assertEqual(os.stat(f"/proc/{qemu.pid}").st_uid, USER.pw_uid)
        self.assert_clean()


class QemuUser(UsersTest):
    """The daemon is root's, QEMU is not: the sockets of a migration are made for QEMU's user."""

    host_class = QemuUserHost

    def test_there_and_back(self):
        self.check_there_and_back()


class SessionHost(LibvirtHost):
    """libvirtd of a user, with that user's files below /run/user-baton."""

    def write(self, path, text):
        if path == "etc/qemu.conf":
            # The user's own QEMU runs as that user.
            text = "".join(line + "\n" for line in text.splitlines() if not line.startswith(("user", "group")))
        super().write(path, text)

    def __init__(self, cluster, name):
        super().__init__(cluster, name)
        self.runtime = os.path.join(self.run_dir, os.path.basename(RUNTIME))
        self.socket = os.path.join(self.runtime, "libvirt/libvirt-sock")
        self.uri = f"qemu+unix:///session?socket={self.socket}"
        for directory in ("libvirt", "config/libvirt", "home"):
            os.makedirs(os.path.join(self.runtime, directory))
        for conf in ("libvirtd.conf", "qemu.conf"):
            shutil.copyfile(os.path.join(self.dir, "etc", conf), os.path.join(self.runtime, "config/libvirt", conf))
        for parent, _, files in os.walk(self.runtime):
            for path in (parent, *(os.path.join(parent, file) for file in files)):
                os.chown(path, USER.pw_uid, USER.pw_gid)
        os.chmod(self.runtime, 0o700)

    def as_user(self):
        return [*self.prefix(), "setpriv", f"--reuid={USER.pw_uid}", f"--regid={USER.pw_gid}", "--clear-groups", "--",
                "env", f"HOME={RUNTIME}/home", f"XDG_RUNTIME_DIR={RUNTIME}", f"XDG_CONFIG_HOME={RUNTIME}/config"]

    def keep_capabilities(self):
        """They are this user's, and another place's."""

    def launch(self, daemon):
        if daemon != "libvirtd":
            return  # a user's libvirtd starts it by itself
        self.processes[daemon] = self.cluster.lab.spawn(["/usr/sbin/libvirtd"], f"libvirtd-{self.name}", host=self.name,
                                                        prefix=self.as_user())

    def console(self, name):
        return os.path.join(self.runtime, f"{name}.console")


class SessionAgent(LibvirtAgent):
    def __init__(self, cluster, name):
        super().__init__(cluster, name)
        # The programs may lie where only root comes.
        self.programs = {program: shutil.copy2(cluster.lab.program(program), self.dir)
                         for program in ("baton-agent", "baton-shim")}
        self.settings["shim"] = self.programs["baton-shim"]
        self.settings["libvirt"].update({"uri": "qemu:///session", "socket_dir": f"{RUNTIME}/baton"})
        self.write_config()
        for directory in (self.run_dir, self.state_dir, self.memory_dir):
            os.makedirs(directory, exist_ok=True)
        for path in (self.dir, self.run_dir, self.state_dir, self.memory_dir, self.config, self.pause_file,
                     self.settings["tls"]["key"]):
            os.chown(path, USER.pw_uid, USER.pw_gid)

    def start(self):
        if self.libvirt.holder is None:
            self.libvirt.start()
        self.process = self.cluster.lab.spawn(
            [*self.libvirt.as_user(), f"BATON_PAUSE_AT=@{self.pause_file}", self.programs["baton-agent"],
             "--config", self.config], f"agent-{self.name}", host=self.name)

    def migration_directories(self):
        parents = [os.path.join(self.run_dir, "vms"), os.path.join(self.libvirt.runtime, "baton")]
        return [os.path.join(parent, name) for parent in parents if os.path.isdir(parent) for name in os.listdir(parent)]


class SessionCluster(UsersCluster):
    agent_class = SessionAgent

    def __init__(self, lab, **options):
        super().__init__(lab, **options)
        os.chmod(os.path.join(lab.dir, "tls"), 0o755)
        os.chmod(lab.memory_dir, 0o711)

    def domain_xml(self, name, *words, **fields):
        return super().domain_xml(name, *words, console=f"{RUNTIME}/{name}.console",
                                  console_log=f"{RUNTIME}/{name}.console.log", **fields)

    @staticmethod
    def make_disk(path):
        os.chown(LibvirtCluster.make_disk(path), USER.pw_uid, USER.pw_gid)
        return path


class Session(UsersTest):
    cluster_class = SessionCluster
    host_class = SessionHost

    def test_there_and_back(self):
        self.check_there_and_back()


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], "-v", *sys.argv[1:]])
