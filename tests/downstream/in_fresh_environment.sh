#!/usr/bin/env bash
# This project's suite in an environment that has only what it asks for: as root, as an ordinary user, in several processes, in
# forked ones, and with pytest-asyncio. Run it as root, with a wheel of linkrx, and a Python that everybody may run:
#     in_fresh_environment.sh linkrx.whl /usr/bin/python3
set -euo pipefail
wheel=$(readlink -f "$1")
project=$(dirname "$(readlink -f "$0")")
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
chmod 755 "$fresh"
"$2" -m venv "$fresh/env"
"$fresh/env/bin/pip" install -q "$wheel[pytest]" pytest-asyncio pytest-forked pytest-xdist
"$fresh/env/bin/pip" list 2>/dev/null
cp -r "$project" "$fresh/project"
cd "$fresh/project"

suite() { "$@" "$fresh/env/bin/python" -B -m pytest -p no:cacheprovider --linkrx-require -o asyncio_default_fixture_loop_scope=function "${options[@]}"; }

# /dev/net/tun is open to all in a mount namespace of this command alone.
anyone() {
    unshare --mount bash -euc '
        mount -t tmpfs -o mode=755 none /dev/net
        mknod -m 666 /dev/net/tun c 10 200
        exec setpriv --reuid=65534 --regid=65534 --clear-groups --inh-caps=-all --bounding-set=-all "$@"
    ' _ env EXPECTED_UID=65534 "$@"
}

both() {
    options=("$@")
    printf '\n-- as root: pytest %s\n' "$*"
    suite env EXPECTED_UID=0
    printf '\n-- as an ordinary user: pytest %s\n' "$*"
    suite anyone
}

both
both -n 2
"$fresh/env/bin/pip" install -q 'pytest<9' # pytest-forked 1.7.5 can do nothing with pytest 9, and leaves files open
both --forked -W default
