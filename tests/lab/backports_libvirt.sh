#!/bin/bash
# Unpacks libvirt and QEMU from the machine's own Debian release's backports, without installing anything, and prints the
# directory. Its usr/ holds what a host's /usr must hold on top of the installed one: libvirtd looks for its drivers, its
# CPU models and its helpers at fixed paths below /usr.
#
#   backports_libvirt.sh [DIR]     default: build/cache/libvirt-backports, or $BATON_CACHE/libvirt-backports
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=tests/lab/backports.sh
. "$here/backports.sh"
dir=${1:-${BATON_CACHE:-$root/build/cache}/libvirt-backports}

fail() {
  echo "libvirt from backports: $*" >&2
  exit 1
}

mkdir -p "$(dirname "$dir")"
exec 9>"$(dirname "$dir")/libvirt-backports.lock"
flock 9
if [ -x "$dir/usr/sbin/libvirtd" ]; then
  echo "$dir"
  exit 0
fi
work=$(mktemp -d "$dir.XXXXXX")
trap 'rm -rf "$work"' EXIT
unpack_backports "$work/root" libvirt-daemon libvirt-daemon-driver-qemu libvirt-daemon-log libvirt-clients \
  qemu-system-x86 qemu-system-common qemu-system-data seabios
# On an installed system /lib is usr/lib.
for part in bin sbin lib; do [ ! -d "$work/root/$part" ] || cp -a "$work/root/$part/." "$work/root/usr/$part/"; done
[ -x "$work/root/usr/sbin/libvirtd" ] || fail "the packages hold no libvirtd"
mv "$work/root" "$dir"
echo "$dir"
