#!/usr/bin/env bash
# Builds the wheel, repairs it for the manylinux tag of the PyTorch in .venv, and runs it:
#   bash tools/check_wheel.sh [--full] [OUT]
# The wheel is py3-none, as the kernel is loaded with ctypes: one serves every Python. It is installed in every Python
# from 3.10 to 3.13 on PATH or in pyenv. With the packages of .venv it classifies in .venv's Python; in the others the
# kernel is loaded and asked for its instruction set. With --full each of them gets its own PyTorch (3 minutes and 6 GB
# each) and classifies too.
set -euo pipefail
cd "$(dirname "$0")/.."
export VMAMBA_REQUIRE_KERNEL=1
full=no
if [ "${1:-}" = --full ]; then full=yes && shift; fi
python=$PWD/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=${1:-$work/repaired}

cat >"$work/tag.py" <<'PY'
"""Print PyTorch's manylinux tag; wheels from elsewhere than PyPI say linux_…, and get the tag of PyPI's."""
import importlib.metadata
import platform
import re

wheel = importlib.metadata.distribution("torch").read_text("WHEEL")
tags = re.findall(r"^Tag: \S+-(manylinux\S+)$", wheel, re.MULTILINE)
print(tags[0] if tags else f"manylinux_2_28_{platform.machine()}")
PY

cat >"$work/kernel.py" <<'PY'
"""Load the installed kernel without PyTorch and ask which instruction set it chose."""
import ctypes
import importlib.metadata
import sys

file = next(f for f in importlib.metadata.files("vmamba") if f.name == "libvmamba_cpu.so")
library = ctypes.CDLL(str(file.locate()))
library.vmamba_instruction_set.restype = ctypes.c_char_p
print(f"Python {sys.version.split()[0]}: kernel loads, {library.vmamba_instruction_set().decode()}")
PY

platform=$("$python" "$work/tag.py")
"$python" -m pip wheel -q --no-deps -w "$work/built" .
# libgomp stays outside: PyTorch brings its own, and the kernel shares its threads.
PATH="$PWD/.venv/bin:$PATH" "$python" -m auditwheel repair --plat "$platform" --exclude libgomp.so.1 \
  -w "$out" "$work"/built/vmamba-*.whl
wheel=$(ls "$out"/vmamba-*-py3-none-*manylinux*.whl)
echo "fit for $platform: $(basename "$wheel")"

# Without --full the packages of .venv are added by path, which leaves out its editable install of vmamba.
packages() {
  "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("site-packages")), sep="\n")'
}
own_version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

for version in 3.10 3.11 3.12 3.13; do
  interpreter=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python 2>/dev/null | tail -n 1 || true)
  interpreter=${interpreter:-$(command -v "python$version" || true)}
  if [ "$version" = "$own_version" ]; then interpreter=$python; fi
  if [ -z "$interpreter" ]; then
    echo "Python $version: not on this machine, not run"
    continue
  fi
  "$interpreter" -m venv --without-pip "$work/venv"
  dependencies=$([ $full = yes ] || echo --no-deps)
  # shellcheck disable=SC2086  # empty with --full
  "$python" -m pip --python "$work/venv/bin/python" install -q $dependencies "$wheel"
  if [ $full = no ] && [ "$version" = "$own_version" ]; then
    packages >"$(ls -d "$work"/venv/lib/python*/site-packages)/packages.pth"
  fi
  (cd "$work" && venv/bin/python kernel.py)
  if [ $full = yes ] || [ "$version" = "$own_version" ]; then
    "$work/venv/bin/python" tools/check_installed.py
  fi
  rm -rf "$work/venv"
done
