#!/bin/bash
# Unpacks libvirt and QEMU from the machine's own Debian release's backports, without installing anything, and prints the
# directory. Its usr/ holds what a host's /usr must hold on top of the installed one: libvirtd looks for its drivers, its
# CPU models and its helpers at fixed paths below /usr.
#
#   backports_libvirt.sh [DIR]     default: build/cache/libvirt-backports, or $BATON_CACHE/libvirt-backports
set -euo pipefail

# shellcheck source=tests/lab/backports.sh
. "$(dirname "${BASH_SOURCE[0]}")/backports.sh"
begin_backports libvirt-backports usr/sbin/libvirtd "$@"

unpack_backports "$work/root" libvirt-daemon libvirt-daemon-driver-qemu libvirt-daemon-log libvirt-clients \
  qemu-system-x86 qemu-system-common qemu-system-data seabios
# On an installed system /lib is usr/lib.
for part in bin sbin lib; do [ ! -d "$work/root/$part" ] || cp -a "$work/root/$part/." "$work/root/usr/$part/"; done
[ -x "$work/root/usr/sbin/libvirtd" ] || fail "the packages hold no libvirtd"
end_backports "$work/root"
