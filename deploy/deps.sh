# Installs what kvd wants on Debian and Ubuntu, and nothing that is there already. Sourced by quickstart.sh and
# tests/run.sh, tests/bench/run.sh and deb.sh: kvd_deps build | kvd_deps test | kvd_deps bench | kvd_deps package |
# kvd_deps image | kvd_deps container.

kvd_deps() {
    local packages="gcc meson ninja-build pkg-config libuv1-dev libgrpc-dev libprotobuf-c-dev protobuf-c-compiler
        protobuf-compiler libcurl4-openssl-dev libsystemd-dev libssl-dev libinih-dev libjansson-dev libzip-dev
        libmicrohttpd-dev libxxhash-dev libhiredis-dev uthash-dev libopenblas-dev liblapacke-dev scdoc"
    if [ "$1" = test ]; then
        packages="$packages check g++ doxygen prometheus nginx-light python3 python3-pip python3-grpcio python3-protobuf python3-numpy
            python3-pytest python3-pytest-xdist python3-pyflakes clang-format openssl redis-server"
    fi
    if [ "$1" = bench ]; then
        packages="$packages check python3 python3-numpy"
    fi
    if [ "$1" = package ]; then
        packages="$packages debhelper dh-python doxygen dpkg-dev fakeroot python3 systemd"
    fi
    if [ "$1" = image ]; then
        packages="mmdebstrap umoci"
    fi
    if [ "$1" = container ]; then # roots of other systems, booted or unpacked
        packages="mmdebstrap systemd-container procps util-linux dpkg"
    fi
    local missing="" p have
    # It fails where one of them is not known.
    # shellcheck disable=SC2086
    have=$({ dpkg-query -W -f='${Package} ${db:Status-Status}\n' $packages 2>/dev/null || true; } | sed -n 's/ installed$//p')
    for p in $packages; do
        grep -qxF "$p" <<<"$have" || missing="$missing $p"
    done
    if [ -z "$missing" ]; then
        echo "== dependencies: all there"
        return 0
    fi
    echo "== dependencies: installing$missing"
    local sudo=""
    [ "$(id -u)" = 0 ] || sudo=sudo
    # Servers that come with packages must not start here: the tests start their own.
    local policy=/usr/sbin/policy-rc.d made=""
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | $sudo tee "$policy" >/dev/null && $sudo chmod +x "$policy" && made=1
    fi
    local rc=0
    $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing \
        >/dev/null || rc=$?
    [ -z "$made" ] || $sudo rm -f "$policy"
    return $rc
}
