# Sourced by quickstart.sh, vm.sh and the tests: what a bare Debian machine needs before it can run us.

say() { printf '\n== %s\n' "$*"; }

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# install_packages NAME...: Debian packages, those that are missing.
install_packages() {
    local name missing=()
    for name in "$@"; do
        dpkg-query -W -f '${Status}' "$name" 2>/dev/null | grep -q 'ok installed' ||
            missing+=("$name")
    done
    [ ${#missing[@]} = 0 ] && return
    say "Installing Debian packages: ${missing[*]}"
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qy --no-install-recommends "${missing[@]}"
}

# install_quorumfs [PIP OPTION...] TARGET: into .venv of the checkout, which comes first in PATH.
install_quorumfs() {
    # pyfuse3 is built against the libfuse that is here.
    install_packages fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-dev python3-venv
    say "Installing quorumfs into $checkout/.venv"
    [ -x "$checkout/.venv/bin/pip" ] || python3 -m venv "$checkout/.venv"
    PATH="$checkout/.venv/bin:$PATH"
    pip install --quiet --disable-pip-version-check "$@"
}

# fetch_guest_kernel: the kernel of a small virtual machine, and its modules, into .guest of the
# checkout. Unpacked, not installed: installing would make this machine boot it.
fetch_guest_kernel() {
    ls "$checkout"/.guest/boot/vmlinuz-* >/dev/null 2>&1 && return
    install_packages kmod
    say "Fetching the kernel of the virtual machine into $checkout/.guest"
    apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || as_root apt-get update -q
    local kernel
    kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: *//p' | head -n 1)
    rm -rf "$checkout/.guest" && mkdir "$checkout/.guest"
    (cd "$checkout/.guest" && apt-get download -q -o "APT::Sandbox::User=$(id -un)" "$kernel" &&
        dpkg -x ./*.deb . && rm ./*.deb)
    /sbin/depmod -b "$checkout/.guest" "${kernel#linux-image-}"
}

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
