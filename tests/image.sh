#!/usr/bin/env bash
# The container image: made without a container daemon, unpacked and started by systemd-nspawn as another user with a
# read-only root, and used by a worker in a second container over the shared folder of sockets; and the Kubernetes
# manifest against the schemas of Kubernetes. Wants root, Debian's archive and PyPI. Some 2 minutes; not part of
# tests/run.sh. usage: tests/image.sh [DIRECTORY-OF-DEBS]   (default: makes them by deploy/deb.sh)
# Ends with one line: N passed, N failed, N skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
source deploy/deps.sh
work=$(mktemp -d /tmp/kvd-test-image.XXXXXX)
passed=0 failed=0 skipped=0 daemon=

if [ "$(id -u)" != 0 ]; then
    echo "SKIP image: unpacking systems and starting containers want root"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
cleanup() {
    [ -z "$daemon" ] || { pkill -P "$daemon" && wait "$daemon"; } 2>/dev/null # the shell in between would not pass it on
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM
check() { # check NAME COMMAND...
    local name=$1
    shift
    if "$@" >"$work/out" 2>&1; then
        passed=$((passed + 1))
        echo "ok      $name"
    else
        failed=$((failed + 1))
        echo "FAILED  $name"
        sed 's/^/        /' "$work/out" | tail -n 25
    fi
}
contain() { # contain ROOT ARGUMENT...: a container with the shared folder, and no network but its own loopback
    local root=$1
    shift
    SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 systemd-nspawn -q -D "$root" --register=no --keep-unit --private-network --as-pid2 \
        --timezone=off \
        --bind="$work/run:/run/kvd" --console=pipe "$@" </dev/null
}

kvd_deps container
kvd_deps image
debs=${1:-}
if [ -z "$debs" ]; then
    debs=$work/debs
    deploy/deb.sh "$debs" || { echo "0 passed, 1 failed, 0 skipped"; exit 1; }
fi
check "the image is made" deploy/image.sh --debs "$debs" "$work/kvd.oci.tar" "$work/root.tar"
check "it is an OCI archive" bash -c "tar -xOf '$work/kvd.oci.tar' ./oci-layout | grep -q imageLayoutVersion"
mkdir -p "$work/root" "$work/run" "$work/cache"
tar -C "$work/root" -xf "$work/root.tar"
check "a worker's container" mmdebstrap --variant=minbase --skip=cleanup/tmp \
    --customize-hook="mkdir \"\$1/pkg\" && cp $debs/libkvd0_*.deb $debs/python3-kvd_*.deb \"\$1/pkg/\"" \
    --customize-hook='chroot "$1" sh -c "apt-get install -y --no-install-recommends /pkg/*.deb"' bookworm "$work/worker"
cat >"$work/worker/srv/worker.py" <<'PY'
import numpy as np

import kvd

with kvd.Client(address="unix:/run/kvd/kvd.sock", layers=[0, 1], q_heads=4, kv_heads=2, head_dim=64) as client:
    shape = (2, 700, 2, 64)
    k, v = client.tensor(*shape), client.tensor(*shape)
    for t in (k, v):
        t.array[:] = kvd.to_bf16(np.random.default_rng().standard_normal(shape, dtype=np.float32))
    s = client.create()
    s.append(k, v)
    q, o = client.tensor(2, 1, 4, 64, dtype="f32"), client.tensor(2, 1, 4, 64, dtype="f32")
    q.array[:] = 1
    s.attend(q, o)
    assert np.isfinite(o.array).all() and np.abs(o.array).sum() > 0
    s.publish("from-another-container")
print("done")
PY
# As the manifest has it: kvd's user, a root that nobody can write to, the folder made for it.
uid=$(awk -F: '$1 == "kvd" {print $3}' "$work/root/etc/passwd")
chown "$uid" "$work/run" "$work/cache"
contain "$work/root" --read-only --bind="$work/cache:/var/cache/kvd" --setenv=CACHE_DIRECTORY=/var/cache/kvd \
    setpriv --reuid kvd --regid kvd --clear-groups --no-new-privs --bounding-set -all --inh-caps -all \
    /usr/sbin/kvd --config /etc/kvd/kvd.conf --listen unix:/run/kvd/kvd.sock --pool-size 64MiB >"$work/log" 2>&1 &
daemon=$!
for _ in $(seq 100); do [ -S "$work/run/kvd.sock" ] && break; sleep 0.1; done
check "the image has kvd-keeper" test -x "$work/root/usr/sbin/kvd-keeper"
check "the daemon listens in the shared folder" test -S "$work/run/kvd.sock.fd"
check "a worker in another container" contain "$work/worker" python3 /srv/worker.py
check "another worker attaches what it left" contain "$work/worker" python3 -c 'import kvd
with kvd.Client(address="unix:/run/kvd/kvd.sock", layers=[0, 1], q_heads=4, kv_heads=2, head_dim=64) as client:
    assert client.attach("from-another-container").length == 700'
[ "$failed" = 0 ] || tail -n 20 "$work/log" # the daemon's

if python3 -m pip install -q --target "$work/pip" kubernetes-validate >"$work/out" 2>&1; then
    check "the manifest is valid" env PYTHONPATH="$work/pip" python3 -m kubernetes_validate --strict deploy/kubernetes/daemonset.yaml
else
    echo "SKIP manifest: kubernetes-validate cannot be installed"
    skipped=$((skipped + 1))
fi
echo
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
