#!/bin/bash
# ./dev lint: looks at the sources without running them. With the name of a part, only that part; --fix formats.
#
#   format      clang-format on every C++ file
#   shell       every shell script, by shellcheck
#   packages    the list of packages is one that Debian can install, and it is complete
#   prometheus  rules and their tests
#   tidy        clang-tidy on every C++ file, or on those of the directories that follow (what has not changed since it last
#               passed is not looked at again); using-declarations that nothing uses are looked for in every file
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# shellcheck source=scripts/lib.sh
. scripts/lib.sh
mkdir -p build logs

cxx_files() { git ls-files --cached --others --exclude-standard '*.cc' '*.h'; }

shell_files() {
  git ls-files --cached --others --exclude-standard | while read -r file; do
    case $file in
      *.sh) echo "$file" ;;
      *) if [ -f "$file" ] && head -c 64 "$file" | head -n 1 | grep -aqE '^#!.*\b(ba)?sh\b'; then echo "$file"; fi ;;
    esac
  done
}

format() { cxx_files | xargs clang-format --dry-run --Werror; }

fix() { cxx_files | xargs clang-format -i; }

shell() { shell_files | xargs shellcheck --external-sources; }

# Everything that Debian installs for the list on a machine with nothing on it, and what is on every machine.
installed_for_the_list() {
  # shellcheck disable=SC2046 # a list of words
  apt-get install --dry-run --no-install-recommends -o Dir::State::status=/dev/null $(packages) | awk '/^Inst / { print $2 }'
  dpkg-query -W -f '${Priority} ${Package}\n' | awk '$1 == "required" { print $2 }'
}

# Commands that scripts and tests of this repository start must come with the list.
package_list() {
  local names missing=0 path package
  names=$(installed_for_the_list) || return 1
  for command in cmake ninja ccache g++ ld.lld protoc grpc_cpp_plugin clang++-14 spin clang-format clang-tidy shellcheck \
    promtool git qemu-system-x86_64 qemu-storage-daemon qemu-img linux.uml busybox cpio gzip strip ldd modprobe ip openssl \
    unshare nsenter mount flock setsid timeout ps curl python3; do
    path=$(command -v "$command") || { echo "$command is not installed"; missing=1; continue; }
    # The file may be known to dpkg under /bin or under /usr/bin, and may be a link of update-alternatives.
    package=$( (dpkg-query -S "$path" || dpkg-query -S "$(readlink -f "$path")" || dpkg-query -S "${path#/usr}") 2>/dev/null |
      head -n 1 | cut -d: -f1)
    if [ -n "$package" ] && ! grep -qx "$package" <<<"$names"; then
      echo "$command comes from package $package, which deps/packages.txt neither lists nor implies"
      missing=1
    fi
  done
  return "$missing"
}

prometheus() {
  local status=0 file
  for file in $(git ls-files --cached --others --exclude-standard 'deploy/prometheus/*.rules.yml' 'deploy/prometheus/*.rules.yaml' 'deploy/prometheus/*rules*.yml' | sort -u); do
    case $file in
      *test*) promtool test rules "$file" || status=1 ;;
      *) promtool check rules "$file" || status=1 ;;
    esac
  done
  return "$status"
}

tidy() {
  # A tree of its own: clang++, so that the flags are its own; no precompiled headers, which are GCC's; unity files, of
  # which scripts/tidy.py says why. Configured each time, as the unity files are written then.
  cmake --preset debug -B build/lint -DCMAKE_CXX_COMPILER=clang++-14 -DCMAKE_C_COMPILER=clang-14 \
    -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON -DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=12 \
    >build/configure-lint.log || return 1
  cmake --build build/lint --target baton_generated >build/build-lint.log || {
    tail -n 40 build/build-lint.log
    return 1
  }
  python3 scripts/tidy.py "$@"
}

case ${1-all} in
  format) format ;;
  shell) shell ;;
  packages) package_list ;;
  prometheus) prometheus ;;
  tidy) tidy "${@:2}" ;;
  --fix) fix ;;
  all)
    status=0
    for part in format shell package_list prometheus tidy; do
      say "$part"
      "$part" || status=1
    done
    exit "$status"
    ;;
  *)
    echo "usage: ./dev lint [format|shell|packages|prometheus|tidy [DIRECTORY...]|--fix]" >&2
    exit 2
    ;;
esac
