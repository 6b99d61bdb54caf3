#!/bin/bash
# Builds the lab guest: a Debian kernel and an initramfs that holds busybox, the virtio modules and a workload.
#
#   build.sh [options] OUTDIR      makes OUTDIR/vmlinuz and OUTDIR/initrd.gz; quick when nothing has changed
#
#   --init FILE        /init instead of the one beside this script (then /workload is still there)
#   --add HOST[:GUEST] another file for the initramfs (GUEST defaults to /NAME); may be repeated. For a program that is
#                      not static, add what `ldd` names as well: --libs does that.
#   --libs HOST        the shared libraries and the loader that this program needs, each at its own path
#   --modules "A B"    modules instead of "virtio_pci virtio_blk virtio_balloon virtio_net button evdev"
#   --kernel           only fetch the kernel and print its directory (boot/, lib/modules/)
#
# The kernel is what linux-image-cloud-amd64 depends on now, by apt's own account, unpacked and not installed. It is
# kept under build/cache (or $BATON_CACHE). Needs: apt-get, dpkg, cpio, kmod, busybox-static, g++, libxxhash-dev.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../../.." && pwd)
cache=${BATON_CACHE:-$root/build/cache}

fail() {
  echo "lab guest: $*" >&2
  exit 1
}

init=$here/init
modules="virtio_pci virtio_blk virtio_balloon virtio_net button evdev"
kernel_only=
out=
declare -a adds=() libs=()
while [ $# -gt 0 ]; do
  case $1 in
    --init) init=$2; shift 2 ;;
    --add) adds+=("$2"); shift 2 ;;
    --libs) libs+=("$2"); shift 2 ;;
    --modules) modules=$2; shift 2 ;;
    --kernel) kernel_only=1; shift ;;
    -*) fail "unknown option $1" ;;
    *) out=$1; shift ;;
  esac
done
[ -n "$out" ] || [ -n "$kernel_only" ] || fail "usage: build.sh [options] OUTDIR"

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

# What the meta package stands for. A kernel in the cache is good without asking, so that a machine without a network
# can go on; `./dev clean` forgets it.
fetch_kernel() {
  local package dir
  if [ -s "$cache/kernel-name" ] && [ -d "$cache/$(cat "$cache/kernel-name")/boot" ]; then
    cat "$cache/kernel-name"
    return
  fi
  package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ {print $2; exit}')
  if [ -z "$package" ]; then
    apt-get -qq update >&2 || fail "apt-get update failed"
    package=$(apt-cache depends linux-image-cloud-amd64 | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ {print $2; exit}')
  fi
  [ -n "$package" ] || fail "apt knows no linux-image-cloud-amd64"
  dir=$(mktemp -d "$cache/fetch.XXXXXX")
  if ! (cd "$dir" && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2); then
    # The index may be older than the archive.
    apt-get -qq update >&2
    (cd "$dir" && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2) || fail "cannot download $package"
  fi
  dpkg -x "$dir"/*.deb "$dir/root"
  rm -rf "${cache:?}/$package"
  mv "$dir/root" "$cache/$package"
  rm -rf "$dir"
  depmod -b "$cache/$package" "$(ls "$cache/$package/lib/modules")"
  echo "$package" >"$cache/kernel-name"
  echo "$package"
}

kernel=$cache/$(fetch_kernel)
if [ -n "$kernel_only" ]; then
  echo "$kernel"
  exit 0
fi
version=$(ls "$kernel/lib/modules")
mkdir -p "$out"
out=$(cd "$out" && pwd)

# One checksum over everything that goes in says whether the initramfs is still right.
key=$(
  {
    echo "$kernel $modules ${adds[*]-} ${libs[*]-}"
    cat "$init" "$here/build.sh" "$here/workload.cc" "$here/block_format.h" "$(command -v busybox)"
    for add in ${adds[@]+"${adds[@]}"}; do cat "${add%%:*}"; done
    for lib in ${libs[@]+"${libs[@]}"}; do cat "$lib"; done
  } | sha256sum
)
if [ -s "$out/initrd.gz" ] && [ -s "$out/vmlinuz" ] && [ "$(cat "$out/key" 2>/dev/null)" = "$key" ]; then
  exit 0
fi

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree"/{bin,dev,proc,sys,tmp,lib/modules}
install -m 755 "$(command -v busybox)" "$tree/bin/busybox"
ldd "$tree/bin/busybox" >/dev/null 2>&1 && fail "busybox is not static: install busybox-static"
ln -s busybox "$tree/bin/sh"
install -m 755 "$init" "$tree/init"
g++ -std=c++20 -O2 -Wall -Wextra -Werror -static -fno-exceptions -fno-rtti -o "$tree/workload" "$here/workload.cc"
strip "$tree/workload"

# shellcheck disable=SC2086 # a list of words
modprobe -d "$kernel" -S "$version" -a --show-depends $modules | awk '$1 == "insmod" && !seen[$2]++ {print $2}' |
  while read -r module; do
    cp "$module" "$tree/lib/modules/"
    echo "/lib/modules/$(basename "$module")" >>"$tree/modules"
  done

for add in ${adds[@]+"${adds[@]}"}; do
  target=${add#*:}
  [ "$target" != "$add" ] || target=/$(basename "$add")
  install -D -m "$(stat -c %a "${add%%:*}")" "${add%%:*}" "$tree$target"
done
for program in ${libs[@]+"${libs[@]}"}; do
  ldd "$program" | grep -o '/[^ ]*' | while read -r lib; do install -D -m 755 "$lib" "$tree$lib"; done
done

(cd "$tree" && find . -print0 | LC_ALL=C sort -z | cpio --null --create --format=newc --quiet --reproducible) |
  gzip -1n >"$out/initrd.gz.new"
install -m 644 "$kernel/boot/vmlinuz-$version" "$out/vmlinuz"
mv "$out/initrd.gz.new" "$out/initrd.gz"
echo "$key" >"$out/key"
