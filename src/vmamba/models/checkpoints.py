"""Finding and reading files of weights, without running any code that is in them.

Read are: our runs' checkpoints, the VMamba authors' `.pth` files, `.safetensors`, and what timm, mmpretrain,
mmdetection and mmsegmentation save.
"""

import collections
import difflib
import errno
import hashlib
import json
import pickle
import re
import urllib.parse
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from os import PathLike, fsdecode, fspath
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vmamba.errors import CheckpointError, MissingCheckpointError
from vmamba.files import sha256

CONTENTS = "vmamba"
"""Key under which a run's checkpoint keeps what makes it self-sufficient: recipe, classes, digest."""

CONFIG = "config.json"
"""The file beside `best.safetensors` that says which model the weights are for, in timm's hub form."""

Place = str | PathLike[str]
Weights = Literal["auto", "raw", "ema"]
"""Weights as trained, their moving average, or "auto": the average where a run has one, otherwise raw."""

_IN_A_RUN = (
    "checkpoints/best.ckpt",
    "best.ckpt",
    "best.safetensors",
    "model.safetensors",
    "checkpoints/last.ckpt",
    "last.ckpt",
)
"""Where a folder has its weights, the best choice first."""


def resolve_checkpoint(place: Place) -> Path:
    """The file of weights that a path or an address means.

    Args:
        place: A file; a run's folder, its `checkpoints` or a file of the run such as its `recipe.yaml` (the
            best checkpoint then); a folder with `best.safetensors` or `model.safetensors`; or an http(s)
            address, which is downloaded once into PyTorch's cache. `~` is the home folder.

    Raises:
        MissingCheckpointError: There is no such file, or the folder holds no weights.
        CheckpointError: The address cannot be downloaded.
    """
    if address := _address(place):
        return _download(address)
    path = expand(place)
    if path.is_dir():
        return _in_folder(path)
    if path.suffix in (".yaml", ".yml", ".json", ".csv") and path.is_file():
        return _beside(path)
    if not path.exists():
        raise MissingCheckpointError(f"{path}: no such checkpoint{_hint(path)}")
    return path


def run_folder(place: Place) -> Path:
    """The folder of the run that a path is in: the run itself, its `checkpoints`, or a file in either.

    Raises:
        MissingCheckpointError: There is nothing at that path.
    """
    path = expand(place)
    if not path.exists():
        raise MissingCheckpointError(f"{path}: no such run{_hint(path)}")
    folder = path if path.is_dir() else path.parent
    return folder.resolve().parent if folder.resolve().name == "checkpoints" else folder


def expand(place: Place) -> Path:
    """A path with `~` replaced by the home folder."""
    path = Path(fsdecode(fspath(place)))
    try:
        return path.expanduser()
    except RuntimeError:  # no such user
        return path


def _beside(path: Path) -> Path:
    """The best weights in the folder of a file of text, such as a run's recipe.yaml."""
    if (weights := _best_in(path.parent)) is None:
        raise MissingCheckpointError(
            f"{path}: no checkpoint, and not the {path.name} of a run: there are no weights beside it; "
            "expected a run, a file of weights (.ckpt, .pth, .safetensors), or a folder with best.safetensors"
        )
    return weights


def _best_in(folder: Path) -> Path | None:
    return next((folder / name for name in _IN_A_RUN if (folder / name).is_file()), None)


def _in_folder(folder: Path) -> Path:
    if (best := _best_in(folder)) is not None:
        return best
    weights = [path for suffix in ("safetensors", "pth", "ckpt") for path in folder.glob(f"*.{suffix}")]
    if len(weights) == 1:
        return weights[0]
    if weights:
        names = ", ".join(sorted(path.name for path in weights))
        raise MissingCheckpointError(f"{folder}: holds several files of weights, name one: {names}")
    raise MissingCheckpointError(
        f"{folder}: no checkpoint in this folder; expected a run with checkpoints/best.ckpt, or a folder "
        f"with best.safetensors{runs_hint(folder)}"
    )


_RUNS_SHOWN = 3


def runs_hint(folder: Path) -> str:
    """The first runs in a folder that is no run itself, for a message; empty if there are none."""
    runs = sorted(str(path.parent.parent) for path in folder.glob("*/checkpoints/last.ckpt"))
    more = f" and {len(runs) - _RUNS_SHOWN} more" if len(runs) > _RUNS_SHOWN else ""
    return f"; name one of the runs in it: {', '.join(runs[:_RUNS_SHOWN])}{more}" if runs else ""


def _hint(path: Path) -> str:
    """The names nearest to a path that does not exist."""
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder}" if str(folder) not in ("", ".") else ""
    close = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=3)
    return f"; did you mean {' or '.join(str(folder / name) for name in close)}?" if close else ""


def _address(place: Place) -> str | None:
    """The http(s) address in a string, even if passing it through `Path` removed a slash; None for a path."""
    match = re.match(r"^(https?):/+(?=[^/])", text := fsdecode(fspath(place)))
    return f"{match[1]}://{text[match.end() :]}" if match else None


def _download(address: str) -> Path:
    """Fetch a file once; a digest of the address in the cached name keeps equal names of two hosts apart."""
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(address).path)).name or "checkpoint"
    folder = Path(torch.hub.get_dir()) / "checkpoints" / "vmamba"
    path = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name}"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), progress=False)  # through a temporary file
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{address}: cannot be downloaded ({error})") from error
    return path


def checksum_path(path: Place) -> Path:
    """The file beside a checkpoint that holds its SHA-256."""
    return Path(f"{fspath(path)}.sha256")


def state_digest(values: Any) -> str:
    """A SHA-256 over nested dicts, sequences, tensors and plain values: names, types, shapes and bytes.

    The order of a dict's keys does not matter. It is stored inside a checkpoint, so that damage is noticed
    without the `.sha256` file beside it.
    """
    digest = hashlib.sha256()
    _digest_into(digest, values)
    return digest.hexdigest()


def _digest_into(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"dict {len(value)}:".encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, repr(key))):
            digest.update(f"{key!r}=".encode("utf-8", "surrogatepass"))
            _digest_into(digest, value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        digest.update(f"sequence {len(value)}:".encode())
        for item in value:
            _digest_into(digest, item)
    elif isinstance(value, bool | int | float | str | bytes | None):
        digest.update(f"{value!r};".encode("utf-8", "surrogatepass"))
    else:  # only the type: the repr may change by a save and a load
        digest.update(f"{type(value).__name__};".encode())


def seal(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A run's checkpoint with its digest inside, which `read_checkpoint` compares."""
    contents = {key: value for key, value in checkpoint.get(CONTENTS, {}).items() if key != "digest"}
    unsealed = {**checkpoint, CONTENTS: contents}
    return {**unsealed, CONTENTS: {**contents, "digest": state_digest(unsealed)}}


class _Inert:
    """Placeholder for a class or function that other libraries' checkpoints refer to; it does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


_DICTS = (
    "yacs.config.CfgNode",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "addict.addict.Dict",
)
"""Dict types whose pickles set items one by one, which the safe reader allows for OrderedDict alone."""

_IGNORED = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",  # how a HistoryBuffer refers to its methods
    "argparse.Namespace",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    *(
        f"numpy.{name}"
        for core in ("core", "_core")
        for name in (f"{core}.multiarray._reconstruct", f"{core}.multiarray.scalar")
    ),
    "numpy.ndarray",
    "numpy.dtype",
)
"""Classes of training records that are stored beside the weights; this library ignores them."""


def safe_globals() -> AbstractContextManager[None]:
    """Let `weights_only=True` read records of other libraries beside the weights, without these libraries."""
    stand_ins: list[Any] = [(collections.OrderedDict, name) for name in _DICTS]
    stand_ins += [(_Inert, name) for name in _IGNORED]
    return torch.serialization.safe_globals(stand_ins)


def read_checkpoint(place: Place, *, check: bool = True) -> dict[str, Any]:
    """Read a file of weights onto the CPU without running any code in it.

    Args:
        place: As `resolve_checkpoint` takes it.
        check: Compare the file with the `.sha256` beside it or, without that, with the digest inside.

    Raises:
        MissingCheckpointError: There is no such file.
        CheckpointError: It is damaged, cannot be read, or holds more than weights and plain values.
    """
    path = resolve_checkpoint(place)
    sums = checksum_path(path)
    try:
        beside = check and sums.is_file()
        if beside and sha256(path) not in sums.read_text(errors="replace").split():
            raise CheckpointError(
                f"{path}: damaged, its content does not match {sums.name}; use another copy"
            )
        checkpoint = _read(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: expected a dict of weights, got {type(checkpoint).__name__}")
    if check and not beside and not _digest_holds(checkpoint):
        raise CheckpointError(
            f"{path}: damaged, its content does not match the digest inside; use another copy"
        )
    return checkpoint


def _digest_holds(checkpoint: Mapping[str, Any]) -> bool:
    contents = checkpoint.get(CONTENTS)
    if not isinstance(contents, dict) or "digest" not in contents:
        return True
    return bool(seal(checkpoint)[CONTENTS]["digest"] == contents["digest"])


def _read(path: Path) -> Any:
    with path.open("rb") as file:  # outside the try below: an OSError of the file propagates unchanged
        start = file.read(9)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    try:
        with safe_globals(), warnings.catch_warnings():  # old files are read correctly
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise any exception
        raise CheckpointError(f"{path}: {_unreadable(start, error)}") from error


_STARTS = (b"PK", b"\x80")
"""First bytes of what `torch.save` writes: a zip archive, or a pickle."""


def _unreadable(start: bytes, error: Exception) -> str:
    """Why a file could not be read, from its first bytes and what PyTorch raised."""
    if not start:
        return "damaged, the file is empty; get it again"
    if not start.startswith(_STARTS):
        return "no checkpoint, by its first bytes; expected a file that torch.save wrote, or .safetensors"
    if isinstance(error, pickle.UnpicklingError):
        # Not PyTorch's whole message: it goes on to explain how to run the code in the file anyway.
        match = re.search(
            r"(Unsupported|Trying to load unsupported|Can only|Trying to call) [^\n]*", str(error)
        )
        reason = match[0] if match else str(error).splitlines()[0]
        return f"refused, since reading it would run code or it is no PyTorch checkpoint ({reason})"
    # A damaged file can send PyTorch's reader to a place before its beginning, which is EINVAL.
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
        return f"cannot be read ({error})"
    return "damaged, or no PyTorch checkpoint; get it again"


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors; a digest in the file's metadata is compared."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            metadata = file.metadata() or {}
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: no safetensors file, or a damaged one ({error})") from error
    if metadata.get(CONTENTS, digest := state_digest(weights)) != digest:
        raise CheckpointError(
            f"{path}: damaged, its content does not match the digest inside; use another copy"
        )
    return weights


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds.

    Attributes:
        path: The file.
        weights: State dicts by kind: "raw", as trained, and "ema", their moving average.
        auto: The kind that "auto" means for this file.
        recipe: Of the run that made it, as plain values; None for others.
        classes: Names of the classes, where the file or its `config.json` has them.
        config: What its `config.json`, or a run's checkpoint, says of the model in timm's hub form.
    """

    path: str
    weights: Mapping[str, Mapping[str, Any]]
    auto: str
    recipe: Mapping[str, Any] | None = None
    classes: Sequence[str] | None = None
    config: Mapping[str, Any] | None = None

    @property
    def category_ids(self) -> list[int] | None:
        """The classes' numbers in annotation files, where a run of detection has stored them."""
        ids: list[int] | None = ((self.config or {}).get(CONTENTS) or {}).get("category_ids")
        return ids

    def kind(self, weights: str = "auto") -> str:
        """Resolve "auto".

        Raises:
            CheckpointError: The file has no such weights.
        """
        kind = self.auto if weights == "auto" else weights
        if kind not in self.weights:
            has = ", ".join(map(repr, self.weights)) or "none"
            raise CheckpointError(f"{self.path}: has no {kind!r} weights; it has {has}")
        return kind

    def state_dict(self, weights: str = "auto") -> Mapping[str, Any]:
        """The weights of a kind."""
        return self.weights[self.kind(weights)]


def open_checkpoint(source: Place | Mapping[str, Any]) -> Checkpoint:
    """Read a file of weights and find out what it holds.

    Args:
        source: As `resolve_checkpoint` takes it, or what `torch.load` gave.

    Raises:
        MissingCheckpointError: There is no such file.
        CheckpointError: It is damaged, would run code, or holds no weights.
    """
    if isinstance(source, Mapping):
        return _inspect("state dict", source, None)
    path = resolve_checkpoint(source)
    config = read_config(path.parent / CONFIG) if path.suffix == ".safetensors" else None
    return _inspect(str(path), read_checkpoint(path), config)


def _inspect(path: str, values: Mapping[str, Any], config: Mapping[str, Any] | None) -> Checkpoint:
    if CONTENTS in values:
        return _of_a_run(path, values)
    kinds: dict[str, Mapping[str, Any]] = {}
    for kind, keys in _OF_OTHERS.items():
        if weights := next((values[key] for key in keys if isinstance(values.get(key), Mapping)), None):
            kinds[kind] = weights
    ours = (config or {}).get(CONTENTS) or {}
    if not kinds:
        kinds = {"ema" if ours.get("weights") == "ema" else "raw": values}
    recipe = ours.get("recipe")
    classes = config.get("label_names") if config else None
    if isinstance(classes, list) and config and isinstance(config.get("label_descriptions"), dict):
        classes = [config["label_descriptions"].get(name, name) for name in classes]
    return Checkpoint(path, kinds, next(iter(kinds)), recipe, classes, config)


def _of_a_run(path: str, values: Mapping[str, Any]) -> Checkpoint:
    recipe, classes = contents(values, path)
    kinds = {kind: _below(values["state_dict"], prefix) for kind, prefix in _OF_A_RUN.items()}
    kinds = {kind: weights for kind, weights in kinds.items() if weights}
    auto = "ema" if "ema" in kinds else "raw"
    return Checkpoint(path, kinds, auto, recipe, classes, values[CONTENTS].get("config"))


_OF_A_RUN = {"raw": "model.", "ema": "ema.module."}
"""Prefixes in the state dict of a run's checkpoint."""

_OF_OTHERS = {
    "raw": ("model", "state_dict"),
    "ema": ("model_ema", "state_dict_ema", "ema_state_dict", "ema"),
}
"""Keys under which the authors, timm and mmengine keep weights as trained, and their average."""


def _below(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): weight for name, weight in state_dict.items() if name.startswith(prefix)
    }


def contents(checkpoint: Mapping[str, Any], path: Place) -> tuple[dict[str, Any], list[str]]:
    """The recipe, as plain values, and the classes that a run's checkpoint holds.

    Raises:
        CheckpointError: It is not one of a run.
    """
    match checkpoint.get("state_dict"), checkpoint.get(CONTENTS):
        case dict(), {"recipe": dict(recipe), "classes": list(classes)}:
            return recipe, classes
    raise CheckpointError(f"{path}: not the checkpoint of a run, it has no recipe in it")


def read_config(path: Path) -> dict[str, Any] | None:
    """A `config.json` in timm's hub form; None if there is none.

    Raises:
        CheckpointError: It is damaged, or not of that form.
    """
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise CheckpointError(f"{path}: not a model's configuration, it names no architecture")
    return config
