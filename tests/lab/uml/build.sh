#!/bin/bash
# Builds the initramfs of the User-Mode Linux guest: build.sh WORKLOAD OUT [MODULE...]. WORKLOAD is the statically linked
# /init; the modules (default: virtio_blk and virtio_balloon) are found by name and lie beside it.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: build.sh WORKLOAD OUT [MODULE...]" >&2; exit 2; }
workload=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- virtio_blk virtio_balloon
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{proc,dev}
cp "$workload" "$work/init"
for name; do
  module=$(find /usr/lib/uml/modules -name "$name.ko" 2>/dev/null | sort | tail -n 1)
  [ -n "$module" ] || { echo "no $name.ko under /usr/lib/uml/modules: is user-mode-linux installed?" >&2; exit 1; }
  cp "$module" "$work/$name.ko"
done
mknod "$work/dev/console" c 5 1 2>/dev/null || true
(cd "$work" && find . | cpio --quiet -o -H newc) > "$out.tmp"
mv "$out.tmp" "$out"
