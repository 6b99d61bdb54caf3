#!/bin/bash
# Sourced: packages of the machine's own Debian release's backports, unpacked beside the installed ones and without
# installing anything. The package source is derived from the one the machine already uses: same address, suite
# CODENAME-backports, in apt lists and caches of its own.

# begin_backports NAME WHOLE [DIR]: sets `dir`, where what is unpacked shall be (default: build/cache/NAME, or
# $BATON_CACHE/NAME), and `work`, a new directory beside it that is gone at the end. Where DIR/WHOLE is an executable,
# that has been done already: prints `dir` and exits. One process at a time gets past this.
begin_backports() {
  name=$1
  dir=${3:-${BATON_CACHE:-$(dirname "${BASH_SOURCE[0]}")/../../build/cache}/$name}
  mkdir -p "$(dirname "$dir")"
  dir=$(realpath -m "$dir")
  exec 9>"$(dirname "$dir")/$name.lock"
  flock 9
  if [ -x "$dir/$2" ]; then
    echo "$dir"
    exit 0
  fi
  work=$(mktemp -d "$dir.XXXXXX")
  trap 'rm -rf "$work"' EXIT
}

# end_backports TREE: puts it where it shall be, whole, and prints that directory.
end_backports() {
  mv "$1" "$dir"
  echo "$dir"
}

fail() {
  echo "$name: $*" >&2
  exit 1
}

# unpack_backports ROOT PACKAGE...: what these packages and those that they need beyond the installed ones hold, below
# ROOT, which must be new; what apt needs is put beside it and removed.
unpack_backports() {
  local root=$1 codename uri work options='' package
  shift
  # shellcheck source=/dev/null
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  # shellcheck disable=SC2016 # apt expands these
  uri=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' |
    awk -v c="$codename" '$2 == c && $3 == "main" {print $1; exit}')
  [ -n "$uri" ] || fail "apt knows no source of $codename main"
  work=$root.apt
  mkdir -p "$root" "$work"/{lists/partial,archives/partial,parts}
  local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  [ ! -e "$keyring" ] || options="[signed-by=$keyring] "
  echo "deb ${options}${uri} $codename main" >"$work/sources.list"
  echo "deb ${options}${uri} $codename-backports main" >>"$work/sources.list"
  local apt=(apt-get -qq
    -o "Dir::Etc::sourcelist=$work/sources.list" -o "Dir::Etc::sourceparts=$work/parts"
    -o "Dir::Etc::preferencesparts=$work/parts" -o "Dir::State::Lists=$work/lists"
    -o "Dir::Cache::archives=$work/archives" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache="
    -o "APT::Sandbox::User=root" -o "Debug::NoLocking=1")
  "${apt[@]}" update >&2 || fail "apt-get update failed"
  # Together with whatever library this machine does not have yet.
  "${apt[@]}" install --yes --download-only --no-install-recommends -t "$codename-backports" "$@" >&2 ||
    fail "download failed"
  for package in "$work"/archives/*.deb; do dpkg -x "$package" "$root"; done
  rm -rf "$work"
}
