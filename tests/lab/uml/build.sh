#!/bin/bash
# Builds the initramfs of the User-Mode Linux guest: build.sh WORKLOAD OUT. WORKLOAD is the statically linked /init.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: build.sh WORKLOAD OUT" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{proc,dev}
cp "$1" "$work/init"
for name in virtio_blk virtio_balloon; do
  module=$(find /usr/lib/uml/modules -name $name.ko 2>/dev/null | sort | tail -n 1)
  [ -n "$module" ] || { echo "no $name.ko under /usr/lib/uml/modules: is user-mode-linux installed?" >&2; exit 1; }
  cp "$module" "$work/$name.ko"
done
mknod "$work/dev/console" c 5 1 2>/dev/null || true
(cd "$work" && find . | cpio --quiet -o -H newc) > "$2.tmp"
mv "$2.tmp" "$2"
