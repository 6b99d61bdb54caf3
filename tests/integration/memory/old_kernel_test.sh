#!/bin/bash
# Runs dirty_source_test inside a guest with Debian's own kernel, which keeps soft-dirty bits and knows no PAGEMAP_SCAN:
# the other half of what it tests. Under TCG, as hardware virtualisation is not to be had everywhere.
#
#   old_kernel_test.sh DIRTY_SOURCE_TEST
set -euo pipefail

test=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=$(mktemp -d /tmp/baton-old-kernel-XXXXXX)
trap 'rm -rf "$dir"' EXIT

strip -g -o "$dir/dirty_source_test" "$test"
"$here/../../lab/guest/build.sh" --init "$here/old_kernel_init" --modules virtio_pci \
  --add "$dir/dirty_source_test:/dirty_source_test" --libs "$dir/dirty_source_test" "$dir/guest"

# The guest ends by itself. no_timer_check: on a busy host it may get too few interrupts of its emulated timer to trust it.
timeout --kill-after=10 560 qemu-system-x86_64 -accel tcg -machine q35 -smp 2 -m 768 -nodefaults -no-user-config \
  -no-reboot -display none -serial stdio -kernel "$dir/guest/vmlinuz" -initrd "$dir/guest/initrd.gz" \
  -append "console=ttyS0 quiet no_timer_check panic=-1" </dev/null | tr -d '\r' | tee "$dir/console"

if ! grep -q '^VERDICT 0$' "$dir/console"; then
  echo "the test failed inside the guest, or the guest did not get there" >&2
  exit 1
fi
# Skipping everything would be a success as well.
if ! grep -q 'OK.*NoWriteIsLost/SoftDirty' "$dir/console"; then
  echo "soft-dirty was not tested" >&2
  exit 1
fi
