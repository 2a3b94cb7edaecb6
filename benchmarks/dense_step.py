"""A training step of Mask R-CNN and of UPerNet with VMamba-T beside Swin-T on the CPU: time and peak memory.

    python benchmarks/dense_step.py --rounds 5 --out dense-step.json

A step is forward, backward and AdamW in float32, with the paper's drop path. Each model has a process to
itself, so that its peak memory is its own: weights, gradients, moments of AdamW, what backward keeps. The two
of a task take turns, every second round in the opposite order. Printed is the median over rounds of the ratio
of their times.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

MODELS = ("vmamba_tiny", "swin_tiny_patch4_window7_224")
BATCHES = {"mask_rcnn": 1, "upernet": 2}
CLASSES, SEGMENTED_CLASSES, OBJECTS = 81, 150, 8


def detection_loss(name: str, size: tuple[int, int]) -> tuple[Any, Callable[[], Any]]:
    """Mask R-CNN, and its loss on images with objects of several sizes."""
    import torch

    from vmamba.heads import Features, mask_rcnn

    height, width = size
    backbone = Features.create(name, drop_path_rate=0.2)
    model = mask_rcnn(backbone, CLASSES, resize_in_training=False)
    images = [torch.rand(3, *size) for _ in range(BATCHES["mask_rcnn"])]
    boxes, masks = [], torch.zeros(OBJECTS, *size, dtype=torch.uint8)
    for i, mask in enumerate(masks):
        top, left = height * i // (2 * OBJECTS), width * i // (2 * OBJECTS)
        bottom, right = top + height * (i + 1) // (2 * OBJECTS), left + width * (i + 1) // (2 * OBJECTS)
        mask[top:bottom, left:right] = 1
        boxes.append([left, top, right, bottom])
    target = {"boxes": torch.tensor(boxes).float(), "labels": torch.arange(1, OBJECTS + 1), "masks": masks}
    return model, lambda: sum(model(images, [target] * len(images)).values())


def segmentation_loss(name: str, size: tuple[int, int]) -> tuple[Any, Callable[[], Any]]:
    """UPerNet, and its loss on images whose pixels all have a class."""
    import torch

    from vmamba.heads import upernet

    model = upernet(name, SEGMENTED_CLASSES, drop_path_rate=0.2)
    images = torch.randn(BATCHES["upernet"], 3, *size)
    labels = torch.randint(SEGMENTED_CLASSES, (len(images), *size))
    return model, lambda: sum(model(images, labels).values())


LOSSES = {"mask_rcnn": detection_loss, "upernet": segmentation_loss}


def serve(connection: Any, task: str, name: str, size: tuple[int, int]) -> None:
    """Take a step whenever asked, and answer with its seconds; at the end, with the peak memory in bytes."""
    import torch

    import vmamba

    torch.manual_seed(0)
    # Another model first: loading the libraries must not count.
    vmamba.VMamba(num_classes=2, depths=(1,), dims=(8,))(torch.randn(1, 3, 32, 32)).sum().backward()
    before = memory("VmRSS")
    model, loss = LOSSES[task](name, size)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)
    while connection.recv():
        start = time.perf_counter()
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        if not value.isfinite():
            raise ArithmeticError(f"{task} with {name}: the loss is {value.item()}")
        connection.send(seconds)
    connection.send(memory("VmHWM") - before)


def memory(field: str) -> int:
    """Bytes of this process, as Linux counts them: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure(task: str, size: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """The rows of a task: its models in turns, after two steps each that are not timed."""
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    for name in MODELS:
        here, there = context.Pipe()
        processes.append(context.Process(target=serve, args=(there, task, name, size), daemon=True))
        processes[-1].start()
        there.close()  # so that waiting for a process that died is an error
        connections.append(here)
    seconds: list[list[float]] = [[] for _ in MODELS]
    for number in range(-2, rounds):
        for i in range(len(MODELS))[:: -1 if number % 2 else 1]:
            connections[i].send(True)
            taken = connections[i].recv()
            if number >= 0:
                seconds[i].append(taken)
    rows = []
    for i, name in enumerate(MODELS):
        connections[i].send(False)
        row = {"task": task, "model": name, "size": size, "batch": BATCHES[task], "seconds": seconds[i]}
        rows.append({**row, "peak_bytes": connections[i].recv()})
        processes[i].join()  # the next task needs its memory
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--detection", default="800x1280", help="height x width of Mask R-CNN's images")
    parser.add_argument("--segmentation", default="512x512", help="height x width of UPerNet's images")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: expected at least 1")
    from vmamba.analysis.complexity import parse_size
    from vmamba.bench.timing import ratio
    from vmamba.environment import environment

    load, rows, ratios = os.getloadavg()[0], [], []
    for task, size in (("mask_rcnn", args.detection), ("upernet", args.segmentation)):
        first, other = measure(task, parse_size(size), args.rounds)
        speed = ratio(first["seconds"], other["seconds"])
        memories = first["peak_bytes"] / other["peak_bytes"]
        rows += [first, other]
        ratios.append({"task": task, "speed": asdict(speed), "memory": memories})
        for row in (first, other):
            print(
                f"{task} at {size}, batch {row['batch']}, {row['model']}: "
                f"{statistics.median(row['seconds']):.2f} s, {row['peak_bytes'] / 1e9:.2f} GB"
            )
        print(
            f"{first['model']} is {speed.median:.2f} × ({speed.low:.2f}–{speed.high:.2f}) as fast as "
            f"{other['model']}, with {memories:.2f} × its memory"
        )
    if args.out is not None:
        results = {"environment": environment(), "load before": load, "results": rows, "ratios": ratios}
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
