#!/bin/sh
# Makes an unpacked bundle a service: the unit with this folder's paths, the user and folder it wants, and /etc/kvd/kvd.conf if
# there is none. May be run again, after the folder was moved too. usage: install-service.sh [ROOT]   (default: /)
set -e
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=${1:-}
root=${root%/}
[ "$(id -u)" = 0 ] || { echo "install-service: units and users want root" >&2; exit 1; }
case $here in
/home/* | /root/* | /run/user/* | /tmp/* | /var/tmp/*)
    if [ -z "$root" ]; then
        echo "install-service: the service does not see $here (ProtectHome, PrivateTmp): put the folder elsewhere, such as /opt" >&2
        exit 1
    fi
    ;;
*[!A-Za-z0-9_./-]*) echo "install-service: a unit cannot name the folder $here: use letters, digits and _.-/" >&2 && exit 1 ;;
esac
where=${here#"$root"}
units=$root/etc/systemd/system
mkdir -p "$units" "$root/etc/kvd" "$root/etc/sysusers.d" "$root/etc/tmpfiles.d"
sed -e "s|@sbindir@|$where/bin|; s|@bindir@|$where/bin|; s|@configdir@|/etc/kvd|" "$here/share/kvd/kvd@.service.in" >"$units/kvd@.service"
[ -e "$root/etc/kvd/kvd.conf" ] || cp "$here/kvd.conf" "$root/etc/kvd/kvd.conf"
cp "$here/share/kvd/kvd.sysusers.conf" "$root/etc/sysusers.d/kvd.conf"
cp "$here/share/kvd/kvd.tmpfiles.conf" "$root/etc/tmpfiles.d/kvd.conf"
if [ -z "$root" ]; then
    systemd-sysusers /etc/sysusers.d/kvd.conf
    systemd-tmpfiles --create /etc/tmpfiles.d/kvd.conf
    systemctl daemon-reload
fi
echo "$units/kvd@.service runs $where/bin/kvd: systemctl enable --now kvd@0"
