"""Compile the Triton kernels ahead of time, without a GPU: `python tools/compile_triton.py --help`.

What is compiled is what a model launches: the backend's own forward and backward run on tensors without
data (`meta`), and each launch is compiled for a target instead. A kernel that does not compile, spills
registers or needs more shared memory than the target has fails the command.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmamba.analysis.scans import Scan, record_scans
from vmamba.models import model_names
from vmamba.ops.operands import Operands
from vmamba.ops.triton import backend
from vmamba.ops.triton.plans import Plan
from vmamba.processes import end_with_parent


@dataclass(frozen=True)
class Target:
    """A GPU architecture, from its vendor's programming guide.

    Attributes:
        backend: Triton's name of the vendor.
        arch: Triton's name of the architecture.
        warp: Threads in a warp.
        shared: Bytes of shared memory a block may have.
        registers: Of 32 bits, of a multiprocessor.
        warps: Most warps resident on a multiprocessor.
    """

    backend: str
    arch: int | str
    warp: int
    shared: int
    registers: int = 65536
    warps: int = 64


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx90a": Target("hip", "gfx90a", 64, 64 * 1024, 4 * 512 * 64, 32),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 4 * 512 * 64, 32),
}


TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Usage:
    """The resources that a compiled kernel uses.

    Attributes:
        registers: Of a thread, of 32 bits; on AMD vector registers.
        spilled: On NVIDIA bytes of a thread's stack, on AMD vector registers.
        scalars_spilled: Scalar registers (AMD), which go to lanes of vector registers first.
        shared: Bytes of a block.
    """

    registers: int
    spilled: int
    scalars_spilled: int
    shared: int

    def occupancy(self, target: Target, warps: int) -> float:
        """Resident warps over the most there can be."""
        each = -(-self.registers // 8) * 8 * target.warp * warps
        blocks = min(target.registers // each, target.warps // warps)
        if self.shared:
            blocks = min(blocks, (target.shared + 1024) // (self.shared + 1024))
        return blocks * warps / target.warps


class _Driver:
    """Stands in for the GPU's driver and reports a target to Triton; each target has separate caches."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_device(self) -> Target:
        return self.target

    def get_current_stream(self, device: Target) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.target.backend, self.target.arch, self.target.warp)


Launch = tuple[str, dict[str, Any], Callable[[], Any]]


@contextmanager
def _captured() -> Iterator[list[Launch]]:
    """Collect the kernels' launches instead of running them: name, options, and how to compile."""
    from triton.runtime.jit import JITFunction

    from vmamba.ops.triton import kernels

    launches: list[Launch] = []
    jitted = {
        name: kernel
        for name, kernel in vars(kernels).items()
        if name.endswith("_kernel") and isinstance(kernel, JITFunction)
    }

    def run_of(name: str, run: Callable[..., Any]) -> Callable[..., None]:
        def collect(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            launches.append((name, kwargs, lambda: run(*args, grid=grid, warmup=True, **kwargs)))

        return collect

    for name, kernel in jitted.items():
        kernel.run = run_of(name, kernel.run)
    try:
        yield launches
    finally:
        for kernel in jitted.values():
            del kernel.run


@contextmanager
def _plans(every: bool) -> Iterator[None]:
    """Make the backend launch a kernel by every plan, not only by the default one."""
    original = backend.plan_for

    def after_the_others(
        call: str, plans: Sequence[Plan], launch: Callable[[Plan], Any], device: torch.device
    ) -> Plan:
        for plan in plans[1:]:
            launch(plan)
        return plans[0]

    if every:
        backend.plan_for = after_the_others
    try:
        yield
    finally:
        backend.plan_for = original


@dataclass(frozen=True)
class ScanKind:
    """The sizes, types and options of an operator call, for tensors in the layout that models use."""

    height: int
    width: int
    channels: int
    n_state: int
    rank: int  # 0: delta is given whole
    routes: tuple[int, ...]
    dtype: torch.dtype
    row_dtype: torch.dtype  # of delta, B and C
    skip: bool
    bias: bool
    softplus: bool

    @classmethod
    def of(cls, scan: Scan) -> "ScanKind":
        """The kind of a recorded call."""
        call = scan.call
        _, height, width, channels = call.x.shape
        return cls(
            height,
            width,
            channels,
            call.n_state,
            call.rank,
            tuple(call.routes),
            call.x.dtype,
            call.delta.dtype,
            call.D is not None,
            call.delta_bias is not None,
            call.delta_softplus,
        )

    def launches(self, batch: int = 16, *, gradients: bool = True, every_plan: bool = False) -> list[Launch]:
        """The launches of forward and backward, by the default plans or by all plans that may be chosen."""

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        n_routes, image = len(self.routes), (batch, self.height, self.width)
        widths = [self.rank or self.channels, self.n_state, self.n_state]
        delta, B, C = (
            empty(*image, n_routes, sum(widths), dtype=self.row_dtype).split(widths, -1)
            if self.rank
            else [empty(*image, n_routes, n, dtype=self.row_dtype) for n in widths]
        )
        x = empty(*image, self.channels, dtype=self.dtype)
        operands = Operands(
            x,
            delta,
            empty(n_routes, self.channels, self.n_state),
            B,
            C,
            empty(n_routes, self.channels) if self.skip else None,
            empty(n_routes, self.channels) if self.bias else None,
            empty(n_routes, self.channels, self.rank) if self.rank else None,
            self.softplus,
            list(self.routes),
        )
        with _captured() as launches, _plans(every_plan):
            _, _, states = backend.forward(operands)
            if gradients:
                backend.backward(empty(*x.shape), None, operands, states)
        return launches


def scans_of(models: list[str], size: int | None) -> list[ScanKind]:
    """The different scans of models, on square images of a size (None: each model's default size)."""
    import timm
    from torch._subclasses.fake_tensor import FakeTensorMode

    scans: dict[ScanKind, None] = {}
    with FakeTensorMode():
        for name in models:
            model: Any = timm.create_model(name)
            sides = [size] * 2 if size else model.pretrained_cfg["input_size"][1:]
            for recorded in record_scans(model, torch.empty(1, 3, *sides)).values():
                scans |= dict.fromkeys(map(ScanKind.of, recorded))
    return list(scans)


def usage(kernel: Any, target: Target) -> Usage:
    """The resources that a compiled kernel uses, from the vendor's tool or the assembly."""
    if target.backend == "hip":
        assembly = kernel.asm["amdgcn"]

        def number(name: str) -> int:
            match = re.search(rf"\.{name}:\s*(\d+)", assembly)
            if match is None:
                raise RuntimeError(f"no .{name} in the assembly of {kernel.name}")
            return int(match[1])

        spilled = number("vgpr_spill_count"), number("sgpr_spill_count")
        return Usage(number("vgpr_count"), *spilled, kernel.metadata.shared)
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        output = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", output)
    if match is None:
        raise RuntimeError(f"cuobjdump says nothing of {kernel.name}: {output!r}")
    registers, stack, local = map(int, match.groups())
    return Usage(registers, stack + local, 0, kernel.metadata.shared)


_SHOWN = ("TH", "TW", "BD", "N", "ADJOINT", "WHOLE")


def scans_of_family(models: list[str], size: int | None, types: list[torch.dtype]) -> list[ScanKind]:
    """The different scans of models, with x and the rows in each of the types."""
    scans = scans_of(models, size)
    return [replace(scan, dtype=dtype, row_dtype=dtype) for scan in scans for dtype in types]


def compile_for(name: str, scans: list[ScanKind], gradients: bool, every_plan: bool) -> tuple[int, int]:
    """Compile the scans' kernels for a target and print a line for each; returns (kernels, failures)."""
    from triton.runtime import driver

    target = TARGETS[name]
    driver.set_active(_Driver(target))
    seen: set[int] = set()
    count = failed = 0
    for scan in scans:
        for kernel_name, settings, compile_ in scan.launches(gradients=gradients, every_plan=every_plan):
            start = time.perf_counter()
            shown = " ".join(f"{k}={settings[k]}" for k in _SHOWN if k in settings)
            title = f"{name} {kernel_name} {shown} {str(scan.dtype).removeprefix('torch.')}"
            try:
                kernel = compile_()
                if id(kernel) in seen:  # Triton caches compiled kernels in the process
                    continue
                seen.add(id(kernel))
                used = usage(kernel, target)
            except Exception as error:  # whatever the compiler raises, the kernel does not compile
                count, failed = count + 1, failed + 1
                print(f"{title}: FAILED: {error}", flush=True)
                continue
            faults = []
            if used.spilled:
                faults.append(f"SPILLS {used.spilled}")
            if used.scalars_spilled:
                faults.append(f"SPILLS {used.scalars_spilled} SCALARS")
            if used.shared > target.shared:
                faults.append(f"SHARED MEMORY BEYOND {target.shared}")
            count, failed = count + 1, failed + bool(faults)
            warps = settings["num_warps"]
            print(
                f"{title}: {used.registers} registers, {used.shared} bytes shared, {warps} warps, "
                f"occupancy {used.occupancy(target, warps):.0%} ({time.perf_counter() - start:.1f} s) "
                f"{', '.join(faults)}".rstrip(),
                flush=True,
            )
    return count, failed


def main(arguments: list[str] | None = None) -> int:
    """Compile, print a line each, and return 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python tools/compile_triton.py", description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET",
                        help=f"of {', '.join(TARGETS)}; default all")  # fmt: skip
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: the whole family")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="of the images; default each model's own")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["float32", "bfloat16"], metavar="TYPE",
                        help=f"of x and the rows, of {', '.join(TYPES)}; default the first two")  # fmt: skip
    parser.add_argument("--forward", action="store_true", help="the forward alone")
    parser.add_argument("--plans", action="store_true", help="every plan that tuning may choose from")
    options = parser.parse_args(arguments)
    if backend.interpreted():
        parser.error("TRITON_INTERPRET is set in the environment: Triton compiles nothing then; unset it")
    family = sorted(model_names())
    unknown = [name for name in options.models or [] if name not in family]
    if unknown:
        parser.error(f"--models: unknown {', '.join(unknown)}; expected of {', '.join(family)}")
    scans = scans_of_family(options.models or family, options.size, [TYPES[name] for name in options.types])
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), end_with_parent) as pool:
        compiling = (scans, not options.forward, options.plans)
        jobs = [pool.submit(compile_for, name, *compiling) for name in options.targets]
        counts = [job.result() for job in jobs]
    count, failed = (sum(numbers) for numbers in zip(*counts, strict=True))
    print(f"{count} kernels, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
