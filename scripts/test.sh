#!/bin/bash
# ./dev test: every check and test of the repository, stage by stage. A stage that fails does not stop the others. The
# last line counts all of it in the words of ctest. See ./dev help for the stages.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# What a run without arguments does. The other stages are asked for by name: `long`, asan_all and tsan_all for their time,
# build because the others do it.
all_stages=(lint tidy unit asan tsan integration fuzz demo e2e)
# The preset whose programs are tested, demonstrated and measured: what is shipped.
preset=release
total=0
failed=0
declare -a failures=() unsteady=()
mkdir -p build logs
# The essential lines of what failed, shown once more at the end.
digest=logs/test-failures.log
: >"$digest"

# A failure of one check counts as one test.
count() {
  local name=$1 ok=$2
  total=$((total + 1))
  if [ "$ok" != 0 ]; then
    failed=$((failed + 1))
    failures+=("$name")
  fi
}

# check NAME COMMAND...: one check, its output shown only when it fails.
check() {
  local name=$1 start=$SECONDS log status=0
  shift
  log=logs/test-${name//[^a-z0-9]/-}.log
  "$@" >"$log" 2>&1 || status=$?
  count "$name" "$status"
  if [ "$status" = 0 ]; then
    say "$name: passed ($((SECONDS - start)) s)"
  else
    tail -n 80 "$log" >&2
    { echo "--- $name ($log):" && tail -n 15 "$log" | cut -c 1-300; } >>"$digest"
    say "$name: FAILED ($((SECONDS - start)) s), all of it in $log"
  fi
  return "$status"
}

# essence LOG TEST: of the output of a test in a log of ctest's what says why it failed: failed assertions of googletest,
# traces of unittest, reports of sanitizers; the end, if there are none. At most 25 lines.
essence() {
  awk -v test="$2" '
    function keep(line) { kept[++n] = "  " substr(line, 1, 300) }
    /^ *[0-9]+\/[0-9]+ Test +#[0-9]+: / { on = $4 == test && /\*\*\*/; left = trace = 0; next }
    /^ +Start +[0-9]+: / || /^[0-9]+% tests passed/ { on = 0 }
    !on { next }
    { tail[++lines] = $0 }
    /^\[ RUN / { run = $0 }
    /^20[0-9-]+T[0-9:]+/ { left = 0 }
    /: Failure$/ && run { keep(run); run = "" }
    /: Failure$/ || /ERROR: [A-Z][A-Za-z]+Sanitizer/ || /Assertion .* failed/ { left = 8 }
    /^(FAIL|ERROR): / { trace = 1 }
    trace && /^$/ { trace = 0 }
    trace || left-- > 0 { keep($0) }
    END {
      if (!n) for (i = lines > 15 ? lines - 14 : 1; i <= lines; ++i) keep(tail[i])
      for (i = 1; i <= n; ++i) {
        if (n <= 25 || i <= 12 || i > n - 12) print kept[i]
        else if (i == 13) print "  [...]"
      }
    }' "$1"
}

# run_ctest LOG PRESET [CTEST ARGUMENT...]: runs it and sets `bad` and `all`. No tests at all is a failure.
run_ctest() {
  local log=$1 preset=$2 summary
  shift 2
  ctest --test-dir "build/$preset" --no-tests=error --output-on-failure "$@" 2>&1 | tee "$log"
  summary=$(grep -E '^[0-9]+% tests passed, [0-9]+ tests failed out of [0-9]+' "$log" | tail -n 1)
  [ -n "$summary" ] || return
  bad=$(sed -E 's/.*passed, ([0-9]+) tests failed.*/\1/' <<<"$summary")
  all=$(sed -E 's/.*out of ([0-9]+).*/\1/' <<<"$summary")
  # A test that did not run is not a test that passed, at a second attempt neither.
  if grep -qE '\*\*\*(Skipped|Not Run)' "$log" || grep -aF '[  SKIPPED ]' "build/$preset/Testing/Temporary/LastTest.log" >&2; then
    count "nothing skipped in $preset $*" 1
  fi
}

# failed_of LOG: the names of the tests that failed, and how.
failed_of() { sed -n '/^The following tests FAILED:/,/^Errors while/p' "$1" | sed -nE 's/^\s*[0-9]+ - (.*)/\1/p'; }

# What sanitizers reported in a first attempt goes to logs/ and is shown at the end; the second has its own reports.
put_reports_away() {
  local file
  for file in "build/$1/reports"/*; do
    [ -f "$file" ] || continue
    mv "$file" "logs/report-$1-${file##*/}"
    file=logs/report-$1-${file##*/}
    { echo "--- $1: $file" && head -n 40 "$file" | cut -c 1-300; } >>"$digest"
  done
}

# tests PRESET [CTEST ARGUMENT...]: runs ctest and adds its counts. Up to three tests that fail have a second attempt: what
# a loaded machine did to a test must not cost a whole run, but it is told of at the end, with what failed, because it is a
# defect of the test or of the program all the same.
tests() {
  local preset=$1 start=$SECONDS log bad all name verdict=failed
  shift
  log=logs/test-$preset-$(echo "$*" | tr -c 'a-z0-9\n' -).log
  if ! run_ctest "$log" "$preset" "$@"; then
    count "ctest $preset $*" 1
    return
  fi
  total=$((total + all))
  if [ "$bad" != 0 ]; then
    local -a names
    mapfile -t names < <(failed_of "$log")
    if [ "$bad" -le 3 ]; then
      say "second attempt: ${names[*]}"
      put_reports_away "$preset"
      if run_ctest "${log%.log}-again.log" "$preset" --rerun-failed && [ "$bad" = 0 ]; then verdict=unsteady; fi
    fi
    for name in "${names[@]}"; do
      if [ "$verdict" = failed ]; then failures+=("$preset: $name"); else unsteady+=("$preset: $name"); fi
      { echo "--- $preset: $name" && essence "$log" "${name%% (*}"; } >>"$digest"
    done
    [ "$verdict" = unsteady ] || failed=$((failed + ${#names[@]}))
  fi
  say "ctest $preset $*: $((SECONDS - start)) s"
}

stage_lint() {
  local part
  for part in format shell packages prometheus; do check "lint $part" scripts/lint.sh "$part"; done
}

# Of what is shipped; the tests' files cost as much again, and ./dev lint looks at them.
stage_tidy() { check "lint tidy" scripts/lint.sh tidy agent client common server; }

stage_build() { check "build $preset" build "$preset"; }

stage_unit() { check "build $preset" build "$preset" && tests "$preset" -L 'unit|model' -j2; }

stage_integration() { check "build $preset" build "$preset" && tests "$preset" -L integration -j2; }

# No file in DIR; those that are there are shown.
no_reports() {
  local file status=0
  for file in "$1"/*; do
    [ -f "$file" ] || continue
    echo "--- $file"
    cat "$file"
    status=1
  done
  return "$status"
}

# sanitized PRESET TARGET LABELS: the tests in a build with sanitizers. Programs that tests start report into files, and may do
# so without making the test fail.
sanitized() {
  check "build $1" build "$1" "$2" || return
  rm -f "build/$1/reports"/*
  tests "$1" -L "$3" -LE "no-$1" -j2
  check "no report of $1" no_reports "build/$1/reports"
}

# What CI runs: CONTRIBUTING.md.
stage_asan() { sanitized asan sanitized_ci '^(unit|asan)$'; }

stage_tsan() { sanitized tsan sanitized_ci '^(unit|tsan)$'; }

# All of them, with real peers too: several times as long, to run.
stage_asan_all() { sanitized asan sanitized 'unit|integration'; }

stage_tsan_all() { sanitized tsan sanitized 'unit|integration'; }

stage_fuzz() { check "build fuzz" build fuzz fuzzers && tests fuzz -L fuzz -j2; }

stage_e2e() {
  check "packages of the switch" install_packages_idle switch
  check "build $preset" build "$preset" && tests "$preset" -L e2e
}

stage_long() {
  check "packages of the switch" install_packages_idle switch
  check "build $preset" build "$preset" && tests "$preset" -L long
}

stage_demo() {
  check "demo" ./dev demo --plain
  check "demo of the lab guest" ./dev demo --lab --plain
  check "demo of libvirt" ./dev demo --libvirt --plain
}

stage_quick() {
  check "lint format" scripts/lint.sh format
  check "build debug" build debug && tests debug -L unit -j2
}

finish() {
  local percent=0
  [ "$total" = 0 ] || percent=$(((total - failed) * 100 / total))
  # ctest rounds, and never to 100 while something failed.
  if [ -s "$digest" ]; then
    echo
    cat "$digest"
  fi
  if [ ${#unsteady[@]} != 0 ]; then
    echo
    echo "The following tests failed once and passed at a second attempt:"
    printf '  %s\n' "${unsteady[@]}"
  fi
  if [ "$failed" != 0 ]; then
    echo
    echo "The following tests FAILED:"
    printf '  %s\n' "${failures[@]}"
  fi
  echo
  echo "$percent% tests passed, $failed tests failed out of $total"
  [ "$failed" = 0 ] && [ "$total" != 0 ]
}

stages=("$@")
case ${1-} in
  --quick) stages=(quick) ;;
  '') stages=("${all_stages[@]}") ;;
esac
for stage in "${stages[@]}"; do
  if ! declare -F "stage_$stage" >/dev/null; then
    echo "./dev test: no stage '$stage'; there are: ${all_stages[*]}" >&2
    exit 2
  fi
done
install_packages build tests checks peers || exit 1
for stage in "${stages[@]}"; do
  say "stage $stage"
  start=$SECONDS
  "stage_$stage"
  say "stage $stage took $((SECONDS - start)) s"
done
finish
