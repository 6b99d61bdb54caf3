# Shell functions that ./dev and the scripts share. Sourced, with the repository's root as working directory.
# shellcheck shell=bash

# Words for people on stderr, so that stdout stays what a command is asked for.
say() { echo "== $*" >&2; }

# packages SECTION...: package names of these sections of deps/packages.txt (all without arguments).
packages() {
  awk -v wanted=" $* " '
    /^## / { section = $2; next }
    /^#/ || NF == 0 { next }
    wanted == "  " || index(wanted, " " section " ") { print $1 }' deps/packages.txt
}

missing_packages() {
  local package
  for package in $(packages "$@"); do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || echo "$package"
  done
}

# install_packages SECTION...: installs what is missing and nothing else.
install_packages() {
  local missing
  missing=$(missing_packages "$@")
  [ -n "$missing" ] || return 0
  # shellcheck disable=SC2086 # a list of words
  say installing Debian packages: $missing
  if [ "$(id -u)" != 0 ]; then
    say "which needs root"
    return 1
  fi
  apt-get -qq -o DPkg::Lock::Timeout=300 update
  # shellcheck disable=SC2086
  DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 \
    install --yes --no-install-recommends $missing >/dev/null
}

# install_packages_idle SECTION...: the same, and no service among them is started.
install_packages_idle() (
  local policy=/usr/sbin/policy-rc.d
  # Debian asks this program before it starts a service of a package.
  if [ ! -e "$policy" ] && [ "$(id -u)" = 0 ] && [ -n "$(missing_packages "$@")" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM HUP
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  install_packages "$@"
)

# build PRESET [TARGET...]: configures when needed, then builds.
build() {
  local preset=$1
  shift
  if [ ! -f "build/$preset/build.ninja" ]; then
    say "configuring $preset"
    mkdir -p build
    cmake --preset "$preset" >"build/configure-$preset.log" || {
      cat "build/configure-$preset.log" >&2
      return 1
    }
  fi
  say "building $preset"
  # Without terminal control sequences ninja says one line a step; only trouble is interesting.
  cmake --build "build/$preset" -- ${1:+"$@"} >"build/build-$preset.log" 2>&1 || {
    grep -v '^\[' "build/build-$preset.log" | tail -n 100 >&2
    return 1
  }
}
