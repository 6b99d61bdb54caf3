#!/bin/bash
# Checks a Promela model with spin: run.sh MODEL.pml WORKDIR
# The model itself must hold; every mutant named in it must be caught, or the check would prove nothing.
set -euo pipefail
model=$(realpath "$1")
mkdir -p "$2"
cd "$2"

# check NAME MUTANT MODE: builds and runs one variant; prints "holds" or "violated".
check() {
  local name=$1 mutant=$2 mode=$3 flags=() build=()
  mkdir -p "$name"
  (
    cd "$name"
    rm -f ./*.trail
    local define=()
    case $mode in
      safety) build=(-DSAFETY) ;;
      liveness)
        define=(-DLIVENESS)
        # Weak fairness: a process that can always go on does at some time.
        build=(-DNFAIR=4)
        flags=(-a -f)
        ;;
    esac
    spin -DMUTANT="$mutant" "${define[@]}" -a "$model" >spin.log
    "${CC:-gcc}" -O1 -w -DMEMLIM=2048 "${build[@]}" -o pan pan.c
    ./pan -m2000000 "${flags[@]}" >pan.log 2>&1 || { cat pan.log >&2; exit 2; }
    if grep -q 'max search depth too small\|out of memory\|pan: reached' pan.log; then
      echo "$name: the search was not complete:" >&2
      cat pan.log >&2
      exit 2
    fi
    if grep -q 'errors: 0' pan.log; then echo holds; else echo violated; fi
  )
}

status=0
expect() {
  local name=$1 mutant=$2 mode=$3 wanted=$4 got
  got=$(check "$name" "$mutant" "$mode")
  echo "$name: $got (wanted: $wanted; $(grep -o '[0-9.e+]* states, stored' "$name/pan.log" | head -1))"
  [ "$got" = "$wanted" ] || status=1
}

expect safety 0 safety holds
expect liveness 0 liveness holds
for mutant in 1 2 3 4 5; do
  expect "mutant$mutant" "$mutant" safety violated
done
expect mutant6 6 liveness violated
exit $status
