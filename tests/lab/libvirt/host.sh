#!/bin/bash
# host.sh DIR NAME [COMMAND...]: a libvirt host of its own. Mount, UTS and process namespaces are private; what the daemon
# writes is below DIR, and its socket is DIR/run/libvirt/libvirt-sock, outside as well. Ends, with every process in it,
# when this script is killed. With COMMAND, that runs in the host beside the daemon, and the host ends with it.
#
# host.sh --namespaces DIR NAME [USR]: only the namespaces, without one of processes and without any daemon, for as long as
# this process runs: others enter them with nsenter, and are killed one by one. DIR/ready says that they are as they should
# be. What DIR/etc holds already is kept. What is below USR lies over /usr (tests/lab/backports_libvirt.sh).
set -euo pipefail
hold=
if [ "$1" = --namespaces ]; then
  hold=$1
  shift
fi
dir=$1
name=$2
shift 2
if [ "${BATON_LIBVIRT_HOST:-}" != inside ]; then
  mkdir -p "$dir"/{run/libvirt,lib,cache,log,etc/qemu}
  uuid=$(cat /proc/sys/kernel/random/uuid)
  # No cgroups, no namespaces, no labels, no users of its own: a test host is not what confines a guest.
  [ -e "$dir/etc/qemu.conf" ] || cat >"$dir/etc/qemu.conf" <<CONF
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
stdio_handler = "file"
CONF
  [ -e "$dir/etc/libvirtd.conf" ] || cat >"$dir/etc/libvirtd.conf" <<CONF
host_uuid = "$uuid"
unix_sock_auth = "none"
unix_sock_group = "root"
log_outputs = "3:file:$dir/log/libvirtd.log"
CONF
  export BATON_LIBVIRT_HOST=inside
  [ -z "$hold" ] || exec unshare --mount --uts "$0" "$hold" "$dir" "$name" "$@"
  exec unshare --mount --uts --pid --fork --kill-child "$0" "$dir" "$name" "$@"
fi
mount --make-rprivate /
[ -n "$hold" ] || mount -t proc proc /proc
hostname "$name"
for pair in run:/run lib:/var/lib/libvirt cache:/var/cache/libvirt log:/var/log/libvirt etc:/etc/libvirt; do
  mkdir -p "${pair#*:}"
  mount --bind "$dir/${pair%%:*}" "${pair#*:}"
done
if [ -n "$hold" ]; then
  if [ $# != 0 ]; then
    mount -t overlay -o "lowerdir=$1:/usr" overlay /usr
    # Neither libvirtd nor QEMU starts that finds modules of another version there.
    for modules in lib/x86_64-linux-gnu/{libvirt,qemu}; do
      [ ! -d "$1/$modules" ] || mount --bind "$1/$modules" "/usr/$modules"
    done
  fi
  touch "$dir/ready"
  exec sleep infinity
fi
if [ $# = 0 ]; then
  # The first process of a process namespace must reap: QEMUs are the daemon's children only until they daemonize.
  libvirtd &
  wait
  exit
fi
libvirtd &
"$@"
