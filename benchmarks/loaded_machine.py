"""Training steps beside 0, 1 and 2 other busy processes: images a second, 28² pixels, batch 64.

    python benchmarks/loaded_machine.py --rounds 5 --out benchmarks/results/loaded-machine.json

Each model has a process for each number of threads, and "recipe" is what a run without `train.threads` uses.
They take turns; printed is the median over rounds.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {"vmamba_pico": {"stem_stride": 4}, "resnet18": {}}
BATCH, SIZE = 64, 28
THREADS = ("2 threads", "1 thread", "recipe")


def serve(connection: Any, name: str, threads: str) -> None:
    """Train for as many seconds as are asked for, again and again, and answer with images a second."""
    import timm
    import torch

    import vmamba  # noqa: F401  (registers its models)
    from vmamba.train.threads import SMALL_WORK, work_of_a_layer

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **SETTINGS[name])
    work = work_of_a_layer(model, (3, SIZE, SIZE), BATCH)
    number = (1 if work < SMALL_WORK else 2) if threads == "recipe" else int(threads.split()[0])
    torch.set_num_threads(number)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(10, (BATCH,))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    for _ in range(3):
        step()
    connection.send((number, work))
    while (seconds := connection.recv()) is not None:
        steps, start = 0, time.perf_counter()
        while steps < 2 or time.perf_counter() - start < seconds:
            step()
            steps += 1
        connection.send(BATCH * steps / (time.perf_counter() - start))


def measure(rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Start the processes, and let them take turns."""
    context = multiprocessing.get_context("spawn")
    rows, connections = [], []
    for name in SETTINGS:
        for threads in THREADS:
            here, there = context.Pipe()
            context.Process(target=serve, args=(there, name, threads), daemon=True).start()
            number, work = here.recv()
            rates: dict[int, list[float]] = {0: [], 1: [], 2: []}
            rows.append({"model": name, "setting": threads, "threads": number, "work": work, "rates": rates})
            connections.append(here)
    for _ in range(rounds):
        for busy in (0, 1, 2):
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            time.sleep(0.3)
            try:
                for connection, row in zip(connections, rows, strict=True):
                    connection.send(seconds)
                    row["rates"][busy].append(connection.recv())
            finally:
                for other in others:
                    other.kill()
                    other.wait()
    for connection in connections:
        connection.send(None)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: expected at least 1")
    if "OMP_NUM_THREADS" in os.environ:
        parser.error("OMP_NUM_THREADS is set: the number of threads is what is measured")
    load = os.getloadavg()[0]
    rows = measure(args.rounds, args.seconds)
    print("images/s beside busy processes:       0        1        2")
    for row in rows:
        medians = [statistics.median(rates) for rates in row["rates"].values()]
        label = f"{row['model']}, {row['setting']} ({row['threads']})"
        print(f"{label:<30}", *(f"{rate:8.0f}" for rate in medians), f"  {row['work'] / 1e6:.1f} M a layer")
    if args.out is not None:
        from vmamba.environment import environment

        results = {"environment": environment(), "load before": load, "results": rows}
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
