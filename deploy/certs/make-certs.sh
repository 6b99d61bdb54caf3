#!/bin/sh
# Makes a certificate authority for one Baton installation, and certificates for its programs and people. See README.md
# in this directory. Needs openssl 1.1.1 or newer.
set -eu

usage() {
  cat <<'USAGE'
usage: make-certs.sh [-f] [-d DAYS] DIR ca
       make-certs.sh [-f] [-d DAYS] DIR batond NAME-OR-ADDRESS…
       make-certs.sh [-f] [-d DAYS] DIR host HOST [NAME-OR-ADDRESS…]
       make-certs.sh [-f] [-d DAYS] DIR admin|operator|viewer NAME

  ca        the authority: DIR/ca.pem (give it to everybody), DIR/ca.key (keep it off line)
  batond    DIR/batond.pem and .key, valid for the names and addresses that clients and agents dial
  host      DIR/host-HOST.pem and .key, for the agent of hosts/HOST: its session and its peer port
  admin …   DIR/ROLE-NAME.pem and .key, for batonctl

  -f        overwrite files that exist
  -d DAYS   validity; default 3650 for the authority, 365 for the others
USAGE
}

fail() {
  echo "make-certs.sh: $*" >&2
  exit 1
}

force=no
days=
while getopts fd:h option; do
  case $option in
    f) force=yes ;;
    d) days=$OPTARG ;;
    h)
      usage
      exit 0
      ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
done
shift $((OPTIND - 1))
[ $# -ge 2 ] || {
  usage >&2
  exit 2
}
dir=$1
kind=$2
shift 2

case $days in
  '') ;;
  *[!0-9]*) fail "-d $days: not a number of days" ;;
esac
command -v openssl >/dev/null || fail "openssl is not installed"
# Private keys are for their owner alone from the first byte on.
umask 077
mkdir -p "$dir"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# Names go into file names, certificates and an openssl configuration: nothing but what names are made of.
check_name() {
  case $1 in
    '' | -* | *[!A-Za-z0-9.@_-]*) fail "'$1' is not a name: letters, digits, '.', '@', '_' and '-' only" ;;
  esac
}

check_free() {
  [ "$force" = yes ] && return
  for file in "$1.pem" "$1.key"; do
    [ ! -e "$file" ] || fail "$file exists; -f overwrites it"
  done
}

new_key() {
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1" 2>"$work/log" || fail "$(cat "$work/log")"
}

make_ca() {
  base=$dir/ca
  check_free "$base"
  new_key "$work/key"
  cat >"$work/config" <<CONFIG
[req]
distinguished_name = name
prompt = no
x509_extensions = extensions
[name]
CN = Baton authority
[extensions]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
CONFIG
  openssl req -new -x509 -sha256 -days "${days:-3650}" -key "$work/key" -config "$work/config" -out "$work/pem" \
    2>"$work/log" || fail "$(cat "$work/log")"
  install_pair "$base"
}

# sign BASE COMMON-NAME SUBJECT-ALT-NAMES: a certificate that serves as client and as server, because agents are both.
sign() {
  [ -r "$dir/ca.key" ] || fail "$dir/ca.key is missing: make the authority first (make-certs.sh $dir ca)"
  check_free "$1"
  new_key "$work/key"
  cat >"$work/config" <<CONFIG
[req]
distinguished_name = name
prompt = no
[name]
CN = $2
[extensions]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $3
CONFIG
  {
    openssl req -new -sha256 -key "$work/key" -config "$work/config" -out "$work/request" &&
      openssl x509 -req -sha256 -days "${days:-365}" -in "$work/request" -CA "$dir/ca.pem" -CAkey "$dir/ca.key" \
        -set_serial "0x$(openssl rand -hex 16)" -extfile "$work/config" -extensions extensions -out "$work/pem" &&
      openssl verify -CAfile "$dir/ca.pem" "$work/pem"
  } >"$work/log" 2>&1 || fail "$(cat "$work/log")"
  install_pair "$1"
}

install_pair() {
  mv "$work/key" "$1.key"
  mv "$work/pem" "$1.pem"
  chmod 644 "$1.pem"
  echo "$1.pem $1.key"
}

# "DNS:name" or "IP:address" for each argument, joined by commas.
alternative_names() {
  names=
  for name in "$@"; do
    case $name in
      *:*) # IPv6
        case $name in *[!0-9A-Fa-f:.]*) fail "'$name' is not an address" ;; esac
        entry=IP:$name
        ;;
      *[!0-9.]*)
        check_name "$name"
        entry=DNS:$name
        ;;
      *) entry=IP:$name ;;
    esac
    names=${names:+$names, }$entry
  done
  echo "$names"
}

case $kind in
  ca)
    [ $# -eq 0 ] || fail "ca takes no names"
    make_ca
    ;;
  batond)
    [ $# -ge 1 ] || fail "batond needs the names and addresses under which it is dialled"
    names=$(alternative_names "$@")
    sign "$dir/batond" batond "$names"
    ;;
  host)
    [ $# -ge 1 ] || fail "host needs the host's name"
    check_name "$1"
    host=$1
    shift
    names=$(alternative_names "$host" "$@")
    sign "$dir/host-$host" "agent:$host" "URI:baton://agent/$host, $names"
    ;;
  admin | operator | viewer)
    [ $# -eq 1 ] || fail "$kind needs one name"
    check_name "$1"
    sign "$dir/$kind-$1" "$kind:$1" "URI:baton://$kind/$1"
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
