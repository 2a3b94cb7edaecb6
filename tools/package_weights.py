"""Put a run's best weights into the package, as those of `vmamba_pico_wide`, and their score into the docs.

    python tools/package_weights.py RUN [data.root=DIR]

RUN is a training of recipes/cifar10_nano.yaml. Its weights are rounded to float16, judged as such on the
run's test images, and written with what is known of them as metadata. The tables of models follow.
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parent))
import model_table

from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import CheckpointError, UserError
from vmamba.files import replacing
from vmamba.models.checkpoints import CONTENTS, run_folder, state_digest
from vmamba.models.factory import create_on_meta
from vmamba.train.evaluation import evaluate
from vmamba.train.session import Session, open_session

MODEL = "vmamba_pico_wide"
LARGEST = 4_000_000
"""Most bytes of the file."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of the training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over its recipe")
    args = parser.parse_args(arguments)
    try:
        print(package(args.run, args.overrides, Path(timm.get_pretrained_cfg(MODEL).file)))
    except UserError as error:
        raise SystemExit(str(error)) from error
    model_table.main()


def package(run: str, overrides: Sequence[str], path: Path) -> str:
    """Write the file; returns a line that says what is in it.

    Args:
        run: The folder of the training.
        overrides: `section.key=value` each, laid over its recipe.
        path: Of the file.

    Raises:
        CheckpointError: The run is of another model, or its weights do not fit into float16 or the package.
    """
    session = open_session(run, overrides)
    _check(session)
    weights = {name: value.half().contiguous() for name, value in session.model.state_dict().items()}
    if broken := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{run}: not finite as float16: {', '.join(broken)}")
    with tempfile.TemporaryDirectory() as folder, replacing(path) as temporary:
        # A recipe in a folder of its own: beside a run's checkpoints it would stand for these.
        recipe = shutil.copy(run_folder(run) / "recipe.yaml", folder)
        rounded = Path(folder) / "rounded.safetensors"
        save_file(weights, rounded)
        evaluation = evaluate(recipe, [*overrides, f"model.weights={rounded}"])
        facts = _facts(run_folder(run), evaluation.scores["top1"], evaluation.samples)
        save_file(weights, temporary, {**facts, CONTENTS: state_digest(weights)})
        if (size := temporary.stat().st_size) > LARGEST:
            raise CheckpointError(f"{run}: {size:,} bytes, and the package takes at most {LARGEST:,}")
    return f"{path}: {size:,} bytes, top-1 {evaluation.scores['top1']:.2%} of {evaluation.samples:,} images"


def _check(session: Session) -> None:
    """Refuse a run whose model, classes or preprocessing are not those that the package says they are."""
    expected: Any = create_on_meta(MODEL)
    pairs = {
        "settings": (getattr(session.model, "config", None), expected.config),
        "classes": (list(session.task.classes), list(expected.pretrained_cfg["label_names"])),
        "preprocessing": (session.task.preprocessing, Preprocessing.of_model(expected)),
    }
    for what, (actual, wanted) in pairs.items():
        if actual != wanted:
            raise CheckpointError(
                f"{session.source}: {MODEL} has other {what}; expected {wanted}, got {actual}"
            )


def _facts(run: Path, top1: float, samples: int) -> dict[str, str]:
    """The file's metadata: what the weights are, how well they do, and how they came about."""
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    cfg = timm.get_pretrained_cfg(MODEL)
    return {
        "format": "pt",
        "model": f"{MODEL}.{cfg.tag}",
        "dataset": "CIFAR-10",
        "classes": ", ".join(cfg.label_names),
        "top1": f"{top1:.4f}",
        "judged on": f"{samples:,} test images, the weights rounded to float16",
        "command": _portable(environment["command"]),
        "date": environment["date"][:10],
        "torch": environment["torch"].partition("+")[0],
        "processor": environment["processor"],
    }


def _portable(command: Sequence[str]) -> str:
    """A training's command line without the paths of its machine."""
    words = ["vmamba"]
    for before, word in pairwise(command):
        if word == "--out" or before == "--out":
            continue
        if word.startswith("data.root="):
            word = "data.root=DIR"
        words.append(f"recipes/{Path(word).name}" if word.endswith(".yaml") else word)
    return shlex.join(words)


if __name__ == "__main__":
    main()
