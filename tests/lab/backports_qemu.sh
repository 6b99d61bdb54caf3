#!/bin/bash
# Unpacks QEMU from the machine's own Debian release's backports, beside the installed QEMU and without installing
# anything, and prints the directory. There, bin/qemu-system-x86_64 and bin/qemu-storage-daemon are wrappers that set
# what the unpacked programs need (firmware, modules, libraries); everything else is under root/.
#
#   backports_qemu.sh [DIR]     default: build/cache/qemu-backports, or $BATON_CACHE/qemu-backports
#
# The package source is derived from the one the machine already uses: same address, suite CODENAME-backports, in apt
# lists and caches of its own.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
dir=${1:-${BATON_CACHE:-$root/build/cache}/qemu-backports}

fail() {
  echo "QEMU from backports: $*" >&2
  exit 1
}

mkdir -p "$(dirname "$dir")"
exec 9>"$(dirname "$dir")/qemu-backports.lock"
flock 9
if [ -x "$dir/bin/qemu-system-x86_64" ]; then
  echo "$dir"
  exit 0
fi

# shellcheck source=/dev/null
codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
# shellcheck disable=SC2016 # apt expands these
uri=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
  awk -v c="$codename" '$2 == c && $3 == "main" {print $1; exit}')
[ -n "$uri" ] || fail "apt knows no source of $codename main"

work=$(mktemp -d "$dir.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{apt/lists/partial,apt/archives/partial,apt/parts,tree/root,tree/bin}
options=
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ ! -e "$keyring" ] || options="[signed-by=$keyring] "
echo "deb ${options}${uri} $codename main" >"$work/apt/sources.list"
echo "deb ${options}${uri} $codename-backports main" >>"$work/apt/sources.list"
apt=(apt-get -qq
  -o "Dir::Etc::sourcelist=$work/apt/sources.list" -o "Dir::Etc::sourceparts=$work/apt/parts"
  -o "Dir::Etc::preferencesparts=$work/apt/parts" -o "Dir::State::Lists=$work/apt/lists"
  -o "Dir::Cache::archives=$work/apt/archives" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache="
  -o "APT::Sandbox::User=root" -o "Debug::NoLocking=1")
"${apt[@]}" update >&2 || fail "apt-get update failed"
# Together with whatever library this machine does not have yet.
"${apt[@]}" install --yes --download-only --no-install-recommends -t "$codename-backports" \
  qemu-system-x86 qemu-system-common qemu-system-data seabios >&2 || fail "download failed"
for package in "$work"/apt/archives/*.deb; do dpkg -x "$package" "$work/tree/root"; done
rm -rf "$work/apt"
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
mv "$work/tree" "$dir"
echo "$dir"
