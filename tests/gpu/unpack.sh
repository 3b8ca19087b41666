# Sourced by scripts that try a bundle (deploy/bundle.sh). unpack BUNDLE DIR: its programs go to DIR/kvd; Python finds libkvd
# by `library_path`.
unpack() {
    tar xzf "$1" -C "$2"
    # Python and PyTorch bring a C++ runtime of their own, newer than the bundle's or the same.
    cp -rP "$2/kvd/lib" "$2/lib"
    rm -f "$2"/lib/{libstdc++,libgcc_s}.so*
    library_path=$2/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}
