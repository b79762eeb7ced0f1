#!/usr/bin/env bash
# `nsm parity` on arm64 under emulation: whether it is right there, not how fast.
#
#   tests/devices/arm64.sh BUNDLE [TARGET]        on Debian, as root; needs qemu-user-static
#
# Debian's arm64 Python and the arm64 wheels of numpy, the backend and this project are unpacked into build/arm64 and run by
# qemu-user; nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
bundle=$(realpath "$1") target=${2:-onnxruntime}
python=${PYTHON:-.venv/bin/python}
root=$PWD/build/arm64
# The newest ones that run under Debian 12's qemu 7.2: onnxruntime 1.32 ends there while it asks for the processor's caches.
declare -A versions=([onnxruntime]=onnxruntime==1.23.2 [openvino]=openvino==2025.2.0)
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || { echo "needs qemu: apt-get install qemu-user-static" >&2; exit 3; }

if [ ! -e "$root/usr/bin/python3.11" ]; then
    dpkg --add-architecture arm64
    apt-get update -qq
    mkdir -p "$root/debs"
    (cd "$root/debs" && apt-get download -qq {libc6,libgcc-s1,libstdc++6,libpython3.11-minimal,libpython3.11-stdlib,python3.11-minimal,zlib1g,libssl3,libffi8,libbz2-1.0,liblzma5,libexpat1,libuuid1,libsqlite3-0,libncursesw6,libtinfo6,libreadline8,libdb5.3,libnsl2,libtirpc3,libcrypt1}:arm64)
    for deb in "$root"/debs/*.deb; do dpkg-deb -x "$deb" "$root"; done
fi

packages=$root/packages-$target
if [ ! -e "$packages" ]; then
    grep -v -i -E '^(torch|onnxruntime|openvino|numpy)==' constraints.txt > "$root/constraints.txt"
    "$python" -m pip install --quiet --target "$packages" --constraint "$root/constraints.txt" --only-binary :all: --python-version 3.11 \
        --implementation cp --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
        --platform manylinux_2_31_aarch64 numpy click rich "${versions[$target]}"
    "$python" -m build --wheel --no-isolation --outdir "$root/dist" . > /dev/null
    "$python" -m pip install --quiet --target "$packages" --no-deps "$root"/dist/*.whl
fi

export QEMU_CPU=${QEMU_CPU:-neoverse-n1}  # with more, OpenVINO meets instructions that qemu 7.2 does not know
run() { PYTHONHOME=$root/usr PYTHONPATH=$packages PYTHONDONTWRITEBYTECODE=1 "$qemu" -L "$root" "$root/usr/bin/python3.11" "$@"; }
run -c 'import platform; print("running on", platform.machine(), "Python", platform.python_version())'
run -c 'from nsm.export.cli import main; main()' parity "$bundle" --target "$target" --steps 16
