#!/bin/bash
# Unpacks QEMU from the machine's own Debian release's backports, beside the installed QEMU and without installing
# anything, and prints the directory. There, bin/qemu-system-x86_64 and bin/qemu-storage-daemon are wrappers that set
# what the unpacked programs need (firmware, modules, libraries); everything else is under root/.
#
#   backports_qemu.sh [DIR]     default: build/cache/qemu-backports, or $BATON_CACHE/qemu-backports
set -euo pipefail

# shellcheck source=tests/lab/backports.sh
. "$(dirname "${BASH_SOURCE[0]}")/backports.sh"
begin_backports qemu-backports bin/qemu-system-x86_64 "$@"

mkdir -p "$work/tree/bin"
unpack_backports "$work/tree/root" qemu-system-x86 qemu-system-common qemu-system-data seabios
[ -x "$work/tree/root/usr/bin/qemu-system-x86_64" ] || fail "the packages hold no qemu-system-x86_64"

for program in qemu-system-x86_64 qemu-storage-daemon; do
  firmware=
  # shellcheck disable=SC2016 # expanded by the wrapper
  [ "$program" != qemu-system-x86_64 ] || firmware='-L "$root/usr/share/qemu" -L "$root/usr/share/seabios"'
  cat >"$work/tree/bin/$program" <<WRAPPER
#!/bin/sh
root=\$(dirname "\$(readlink -f "\$0")")/../root
export LD_LIBRARY_PATH="\$root/usr/lib/x86_64-linux-gnu:\$root/lib/x86_64-linux-gnu\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
export QEMU_MODULE_DIR="\$root/usr/lib/x86_64-linux-gnu/qemu"
exec "\$root/usr/bin/$program" $firmware "\$@"
WRAPPER
  chmod +x "$work/tree/bin/$program"
done
"$work/tree/bin/qemu-system-x86_64" --version >&2 || fail "the unpacked QEMU does not start"
end_backports "$work/tree"
