#!/usr/bin/env bash
# The Debian packages as an operator meets them: installed on a booted Debian with systemd (systemd-nspawn, no network),
# two instances enabled, a worker in C from the -dev package and one in Python, reload, upgrade, remove, purge.
# Wants root, and Debian's archive to make the system's root from. Some 2 minutes; not part of tests/run.sh.
# usage: tests/packages.sh [DIRECTORY-OF-DEBS]   (default: makes them by deploy/deb.sh)
# Ends with one line: N passed, N failed, N skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
source deploy/deps.sh
work=$(mktemp -d /tmp/kvd-packages.XXXXXX)
root=$work/root leader= nspawn= passed=0 failed=0

if [ "$(id -u)" != 0 ]; then
    echo "SKIP packages: a booted container wants root"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
kvd_deps container || { echo "0 passed, 1 failed, 0 skipped"; exit 1; }

cleanup() {
    [ -z "$leader" ] || kill -RTMIN+4 "$leader" 2>/dev/null # asks its systemd to power off
    for _ in $(seq 50); do
        { [ -n "$nspawn" ] && kill -0 "$nspawn" 2>/dev/null; } || break
        sleep 0.2
    done
    [ -z "$nspawn" ] || kill "$nspawn" 2>/dev/null
    wait 2>/dev/null
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

guest() { # guest COMMAND...: in the booted system, as root
    setsid -w nsenter -t "$leader" -m -u -i -n -p -C -- env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive HOME=/root "$@"
}
check() { # check NAME COMMAND...: one test that passes if the command, in the guest, does
    local name=$1
    shift
    if guest bash -ec "$*" >"$work/out" 2>&1; then
        passed=$((passed + 1))
        echo "ok      $name"
    else
        failed=$((failed + 1))
        echo "FAILED  $name"
        sed 's/^/        /' "$work/out" | tail -n 25
    fi
}

debs=${1:-}
if [ -z "$debs" ]; then
    debs=$work/debs
    deploy/deb.sh "$debs" || { echo "0 passed, 1 failed, 0 skipped"; exit 1; }
fi
# The same sources under a higher version, for the upgrade.
mkdir -p "$work/new" "$work/pkg"
cp "$debs"/*.deb "$work/pkg/"
rm -f "$work"/pkg/*-dbgsym_*.deb
old=$(dpkg-deb -f "$(ls "$work"/pkg/kvd_*.deb)" Version) new=$(dpkg-deb -f "$(ls "$work"/pkg/kvd_*.deb)" Version)+upgrade1
for deb in "$work"/pkg/*.deb; do
    rm -rf "$work/unpacked"
    dpkg-deb -R "$deb" "$work/unpacked"
    sed -i "s/^Version: .*/Version: $new/; s/(= $old)/(= $new)/g; s/(>= $old)/(>= $new)/g" "$work/unpacked/DEBIAN/control"
    dpkg-deb --root-owner-group -b "$work/unpacked" "$work/new/$(basename "${deb/_${old}_/_${new}_}")" >/dev/null
done

echo "== a Debian root"
# The packages that ours depend on are downloaded into its cache: the booted system has no network.
if ! mmdebstrap --variant=minbase --include=systemd,systemd-sysv,dbus,procps,gcc,libc6-dev,pkg-config,man-db \
    --customize-hook="mkdir -p \"\$1/pkg\" && cp $work/pkg/*.deb \"\$1/pkg/\"" \
    --customize-hook='chroot "$1" sh -c "apt-get install -y --no-install-recommends --download-only /pkg/*.deb"' \
    --skip=cleanup/apt --aptopt='APT::Keep-Downloaded-Packages "true"' bookworm "$root" >"$work/log" 2>&1; then
    tail -n 20 "$work/log"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi
mkdir -p "$root/new" "$root/srv"
cp "$work"/new/*.deb "$root/new/"
cat >"$root/srv/worker.py" <<'PY'
"""A worker in Python: what it attends to is what NumPy says."""
import sys

import numpy as np

import kvd

rng = np.random.default_rng()
with kvd.Client(address=sys.argv[1], layers=[0], q_heads=2, kv_heads=1, head_dim=64, codec="bf16") as client:
    k, v = client.tensor(1, 100, 1, 64), client.tensor(1, 100, 1, 64)
    q, o = client.tensor(1, 1, 2, 64, dtype="f32"), client.tensor(1, 1, 2, 64, dtype="f32")
    k.array[:] = kvd.to_bf16(rng.standard_normal(k.shape, dtype=np.float32))
    v.array[:] = kvd.to_bf16(rng.standard_normal(v.shape, dtype=np.float32))
    q.array[:] = rng.standard_normal(q.shape, dtype=np.float32)
    s = client.create()
    s.append(k, v)
    s.attend(q, o)
    keys, values = kvd.from_bf16(k.array)[0, :, 0].astype(float), kvd.from_bf16(v.array)[0, :, 0].astype(float)
    p = np.exp(q.array[0, 0] @ keys.T / 8)
    expected = p @ values / p.sum(1, keepdims=True)
    error = np.linalg.norm(o.array[0, 0] - expected) / np.linalg.norm(expected)
    print("error", error)
    assert error < 1e-3
PY

cat >"$root/srv/load.py" <<'PY'
"""Workers that go on while a command restarts kvd: none sees an error, and nothing is lost. usage: load.py ADDRESS COMMAND..."""
import subprocess
import sys
import threading
import time

import numpy as np

import kvd

RESTARTS = 3


class Worker(threading.Thread):
    def __init__(self, seed):
        super().__init__(daemon=True)
        self.rng, self.done, self.stop, self.failure, self.longest = np.random.default_rng(seed), 0, False, None, 0
        self.k, self.v = [], []

    def run(self):
        try:
            with kvd.Client(address=sys.argv[1], layers=[0, 1], q_heads=2, kv_heads=1, head_dim=64, codec="bf16", timeout=60) as client:
                self.work(client)
        except BaseException as e:
            self.failure = e

    def work(self, client):
        s, out = client.create(), client.tensor(2, 4096, 1, 64, dtype="bf16")
        new = [client.tensor(2, 16, 1, 64) for _ in "kv"]
        while not self.stop or not s.length:
            n = int(self.rng.integers(1, 17))
            for t, kept in zip(new, (self.k, self.v)):
                t.array[:, :n] = kvd.to_bf16(self.rng.standard_normal((2, n, 1, 64), dtype=np.float32))
                kept.append(t.array[:, :n].copy())
            began = time.monotonic()
            s.append(*(t[:, :n] for t in new))
            self.longest = max(self.longest, time.monotonic() - began)
            self.done += 1
            if s.length > 4000:
                break
        for kept, where in ((self.k, "k"), (self.v, "v")):
            all_of_it = np.concatenate(kept, axis=1)
            s.read(0, s.length, **{where: out[:, :s.length]})
            assert np.array_equal(out.array[:, :s.length], all_of_it), f"{where} is not what was put in"


workers = [Worker(seed) for seed in range(3)]
for w in workers:
    w.start()
for _ in range(RESTARTS):
    before = [w.done for w in workers]
    while any(w.done < b + 20 and w.is_alive() for w, b in zip(workers, before)):
        time.sleep(0.01)
    subprocess.run(sys.argv[2:], check=True)
before = [w.done for w in workers]
while any(w.done < b + 20 and w.is_alive() for w, b in zip(workers, before)):
    time.sleep(0.01)
for w in workers:
    w.stop = True
for w in workers:
    w.join(60)
    assert not w.is_alive() and not w.failure, w.failure
print(f"{RESTARTS} restarts, {sum(w.done for w in workers)} appends; the longest took {max(w.longest for w in workers):.2f} s")
PY

echo "== boot"
SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn -q -D "$root" --boot --register=no --keep-unit --private-network \
    --console=pipe </dev/null >"$work/boot" 2>&1 &
nspawn=$!
for _ in $(seq 150); do
    leader=$(pgrep -P "$nspawn" | head -n 1)
    if [ -n "$leader" ] && guest systemctl is-system-running 2>/dev/null | grep -qE 'running|degraded'; then break; fi
    sleep 0.2
done
[ -n "$leader" ] || { cat "$work/boot"; echo "0 passed, 1 failed, 0 skipped"; exit 1; }

check "the packages install without a network" 'apt-get install -y --no-install-recommends /pkg/*.deb'
check "kvd-keeper is there" 'test -x /usr/sbin/kvd-keeper'
check "nothing runs that was not asked for" '! systemctl list-units --all "kvd@*" --no-legend | grep -q kvd@'
check "enable --now kvd@0 kvd@1" 'systemctl enable --now kvd@0 kvd@1
    systemctl is-active kvd@0 kvd@1'
check "each instance has its socket" 'test -S /run/kvd/0/kvd.sock; test -S /run/kvd/1/kvd.sock'
check "kvctl asks which of several" '! kvctl status 2>/tmp/e; grep -q /run/kvd/0/kvd.sock /tmp/e; grep -q /run/kvd/1/kvd.sock /tmp/e'
check "kvctl status of each" 'kvctl --instance 0 status; kvctl --instance 1 status; kvctl --all status'
check "each instance serves its metrics" 'for p in 9464 9465; do exec 3<>/dev/tcp/127.0.0.1/$p; printf "GET /metrics HTTP/1.0\r\n\r\n" >&3; grep -q kvd_pool_bytes <&3; exec 3>&-; done'
check "the man pages are there" 'for p in kvd.8 kvd.conf.5 kvctl.1 kvd.h.3; do ls /usr/share/man/man*/$p.gz; done
    man -w kvd-worker kvd_step; zgrep -q "Attends over what is stored" /usr/share/man/man3/kvd.h.3.gz; test -s /usr/share/doc/libkvd-dev/html/kvd_8h.html'
check "a worker in C from libkvd-dev" 'cd /srv
    cp /usr/share/doc/libkvd-dev/examples/worker.c /usr/share/doc/libkvd-dev/examples/random.h .
    gcc -O2 worker.c -o worker $(pkg-config --cflags --libs kvd) -lm
    ./worker unix:/run/kvd/0/kvd.sock'
check "pkg-config names no place of the build" '! pkg-config --cflags --libs --static kvd | grep -E "/tmp|build"'
check "a worker in Python from python3-kvd" 'python3 /srv/worker.py unix:/run/kvd/1/kvd.sock'
check "kvd-worker tells what it wants" 'kvd-worker --help | grep -q -- --temperature
    cd /srv; ! kvd-worker model.gguf Hello 2>/tmp/e; grep -q "no such file" /tmp/e; touch model.gguf
    ! kvd-worker model.gguf Hello 2>/tmp/e; grep -q "pip install gguf" /tmp/e'
check "a user of the group may, another may not" 'useradd -G kvd member; useradd stranger
    setpriv --reuid member --regid member --init-groups python3 /srv/worker.py unix:/run/kvd/0/kvd.sock
    ! setpriv --reuid stranger --regid stranger --init-groups python3 /srv/worker.py unix:/run/kvd/0/kvd.sock'
check "an instance has its own file over the common one" 'printf "[kvd]\nlog-level = debug\n" >/etc/kvd/kvd-1.conf
    systemctl reload kvd@1; kvctl --instance 1 ping 1; journalctl -q -u kvd@1 -p 7..7 | grep -q .'
check "a broken file: reload fails and the instance goes on" 'printf "[kvd]\nlog-levle = debug\n" >/etc/kvd/kvd-1.conf
    ! systemctl reload kvd@1; systemctl is-active kvd@1; kvctl --instance 1 ping 1; rm /etc/kvd/kvd-1.conf; systemctl reload kvd@1'
check "a permanent error does not restart in a loop" 'printf "[kvd]\npool-size = much\n" >/etc/kvd/kvd-2.conf
    ! systemctl start kvd@2; sleep 3; [ "$(systemctl show -P NRestarts kvd@2)" = 0 ]; journalctl -u kvd@2 | grep -q "kvd-2.conf:2"
    rm /etc/kvd/kvd-2.conf; systemctl reset-failed kvd@2'
check "restarts under load lose nothing" 'python3 /srv/load.py unix:/run/kvd/0/kvd.sock systemctl restart kvd@0; systemctl reset-failed kvd@0'
check "who is killed comes back" 'pid=$(systemctl show -P MainPID kvd@0); [ "$pid" -gt 1 ]; kill -9 "$pid"
    for _ in $(seq 100); do sleep 0.2; ! kvctl --instance 0 ping 1 || break; done
    systemctl is-active kvd@0; [ "$(systemctl show -P MainPID kvd@0)" != "$pid" ]; kvctl --instance 0 ping 1'
check "hardening" 'systemd-analyze security kvd@0 --threshold=40'
check "upgrade, with both instances running" 'before=$(systemctl show -P MainPID kvd@0); dpkg -i /new/*.deb
    systemctl is-active kvd@0 kvd@1; [ "$before" != "$(systemctl show -P MainPID kvd@0)" ]; python3 /srv/worker.py unix:/run/kvd/0/kvd.sock'
check "remove stops them and keeps the configuration" 'apt-get remove -y kvd kvd-calib libkvd0 libkvd-dev python3-kvd
    ! pgrep -x "kvd|kvd-keeper"; test -e /etc/kvd/kvd.conf; ! test -e /usr/sbin/kvd; ! test -e /usr/sbin/kvd-keeper'
check "purge leaves nothing" 'dpkg --purge kvd kvd-calib libkvd0 libkvd-dev python3-kvd
    systemctl daemon-reload
    left=$(find / -xdev \( -path /proc -o -path /sys -o -path /pkg -o -path /new -o -path /srv -o -path /var/log -o -path /var/cache/apt -o -path /var/lib/apt -o -path /tmp -o -path /var/tmp \) -prune -o -iname "*kvd*" -print)
    echo "$left"; [ -z "$left" ]; ! getent passwd kvd; ! getent group kvd; ! systemctl list-unit-files | grep -q kvd'

echo
echo "$passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
