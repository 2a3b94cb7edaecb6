"""Build the CPU kernel with sanitizers and run its tests on it.

    python tools/sanitize.py address,undefined
    python tools/sanitize.py thread

Of the instruction sets only the one that this machine's installation uses is built, as no other would run.
Further options go to pytest. Needs GCC, whose runtime is loaded before Python. A report ends the run with an
error.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from vmamba.ops import cpu

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
TESTS = ("tests/ops/test_cpu.py", "tests/ops/test_backends.py")
# Tests that start other processes or measure memory, and other backends than the kernel's.
LEFT_OUT = "not leak and not freed and not torch and not chunked and not reference"
# An editable install's import hook would come before any path.
RUN = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
sys.path.insert(0, sys.argv[1])
import pytest
status = pytest.main(sys.argv[2:])
from vmamba.ops import cpu
library = cpu._load()
assert not isinstance(library, str), library
assert library._name.startswith(sys.argv[1]), library._name
sys.exit(status)
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sanitizers", help="as for -fsanitize")
    arguments, for_pytest = parser.parse_known_args()
    sanitizers = arguments.sanitizers
    unknown = set(sanitizers.split(",")) - set(RUNTIMES)
    if unknown:
        parser.error(f"expected some of {', '.join(RUNTIMES)}, got {', '.join(sorted(unknown))}")
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name={RUNTIMES[name]}"], text=True).strip()
        for name in sanitizers.split(",")
    ]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "-q",
                "--no-deps",
                "--target",
                folder,
                ROOT,
                f"--config-settings=build-dir={folder}/build",  # not the one of the usual build
                f"--config-settings=cmake.define.VMAMBA_SANITIZE={sanitizers}",
                f"--config-settings=cmake.define.VMAMBA_ONLY={cpu.instruction_set()}",
            ],
            check=True,
        )
        environment = {
            **os.environ,
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",  # Python itself leaks by design
            "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
            "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
        }
        options = ("-q", "-s", "-p", "no:cacheprovider", "-m", "not slow and not full", "-k", LEFT_OUT)
        command = [sys.executable, "-c", RUN, folder, *options, *for_pytest, *TESTS]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
