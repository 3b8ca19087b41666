#!/bin/sh
# After an install by hand, what a package's scripts would do: the unit wants its user and folder now, not at the next
# boot. usage: after-install.sh PREFIX
set -e
[ "$(id -u)" = 0 ] || exit 0
if command -v systemd-sysusers >/dev/null; then
    systemd-sysusers "$1/lib/sysusers.d/kvd.conf"
fi
if [ -d /run/systemd/system ]; then
    systemd-tmpfiles --create "$1/lib/tmpfiles.d/kvd.conf"
    systemctl daemon-reload
fi
