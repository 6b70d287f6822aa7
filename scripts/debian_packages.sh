#!/bin/sh
# See that Debian packages are there: scripts/debian_packages.sh knot bind9
# Installs what is missing when it may (root, or sudo without a password); else says the one command to run.
set -eu

policy="${POLICY_RC:-/usr/sbin/policy-rc.d}"
missing=""
for package in "$@"; do
    if ! dpkg-query --show --showformat='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed; then
        missing="$missing $package"
    fi
done
[ -n "$missing" ] || exit 0

command="apt-get install -y --no-install-recommends$missing"
if ! command -v apt-get >/dev/null 2>&1; then
    echo "These programs are missing:$missing. Install them as this system does; on Debian: $command" >&2
    exit 1
fi
if [ "$(id -u)" = 0 ]; then
    as_root=""
elif sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "These packages are missing:$missing. Run: sudo $command" >&2
    exit 1
fi

# The packages' own services must not start: only scratch ones are wanted. Where policy-rc.d exists, it is obeyed.
made_policy=""
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
    $as_root chmod 755 "$policy"
    made_policy=yes
fi
trap '[ -z "$made_policy" ] || $as_root rm -f "$policy"' EXIT

install() {
    # shellcheck disable=SC2086 # a list of words is meant
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends $missing >"$log" 2>&1
}
log=$(mktemp)
if ! install; then
    $as_root apt-get update -qq >>"$log" 2>&1 || true
    if ! install; then
        cat "$log" >&2
        echo "These packages could not be installed:$missing. Run: $command" >&2
        rm -f "$log"
        exit 1
    fi
fi
rm -f "$log"
