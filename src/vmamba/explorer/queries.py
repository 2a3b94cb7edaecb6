"""What the page asks: which models and images there are, predictions, rows of maps, receptive fields.

c channels, h height, w width, k routes.
"""

import io
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vmamba.analysis.attention import KINDS, ScanAttention, scan_attention, scan_names
from vmamba.analysis.backbones import backbone, shown
from vmamba.analysis.receptive_field import contribution
from vmamba.data.contact_sheet import picture
from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import ModelError, UserError
from vmamba.explorer.images import MOST_BYTES, Images
from vmamba.inference import Predictor
from vmamba.pretrained import CLASSIFICATION

_KEPT_BYTES = 2**29
"""Of projections and of receptive fields each; at least the last one is kept."""


class ExplorerError(UserError, ValueError):
    """A query asks for what does not exist."""


@dataclass(frozen=True)
class ShownModel:
    """A model that the page shows.

    Attributes:
        name: Its title.
        predictor: The model, and how images become its input.
        size: Height and width of its input; None for those of the predictor.
    """

    name: str
    predictor: Predictor
    size: tuple[int, int] | None = None

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of the model's input."""
        return (self.preprocessing.channels, *self.preprocessing.size)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """From an image to the model's input."""
        ours = self.predictor.preprocessing
        return ours if self.size is None else replace(ours, size=self.size)

    @cached_property
    def backbone(self) -> nn.Module:
        """The module with feature maps and scans."""
        return backbone(self.predictor.model, self.input_size, gradient=True)

    @cached_property
    def blocks(self) -> dict[str, tuple[int, int]]:
        """The scans that can be shown: the height and width of their feature maps, by name.

        Raises:
            ModelError: There is none.
        """
        names = scan_names(self.backbone, self.input_size)
        if not names:
            raise ModelError(
                f"{self.name}: nothing to explore, the model has no SS2D that scans whole images; a cascade "
                "scans line by line, and other families have no scans"
            )
        return names


T = TypeVar("T")


class _Newest(Generic[T]):
    """Keeps the results that were used last.

    Args:
        size: Of a result, in bytes.
    """

    def __init__(self, size: Callable[[T], int]) -> None:
        self._size = size
        self._results: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The result of a key, computed if it is not kept."""
        if key not in self._results:
            self._results[key] = compute()
        self._results.move_to_end(key)
        while len(self._results) > 1 and sum(map(self._size, self._results.values())) > _KEPT_BYTES:
            self._results.popitem(last=False)
        return self._results[key]


class Explorer:
    """Answers the page's queries. Models run in one thread of their own, whoever asks.

    Args:
        models: One, or two to compare.
        images: Paths of images.

    Raises:
        ModelError: A model has no scan to show.
        DataError: The first image cannot be read.
    """

    def __init__(self, models: Sequence[ShownModel], images: Sequence[str] = ()) -> None:
        self.models = list(models)
        self.images = Images(images)
        self._worker = ThreadPoolExecutor(1, "models")
        self._inputs: _Newest[Tensor] = _Newest(lambda image: image.nbytes)
        self._attentions: _Newest[ScanAttention] = _Newest(_bytes_of)
        self._fields: _Newest[Tensor] = _Newest(lambda values: values.nbytes)
        self._choices = [_choices_of(model) for model in self.models]
        if images:
            for number in range(len(self.models)):
                self._input(number, "0")

    def close(self) -> None:
        """End the thread of the models."""
        self._worker.shutdown()

    def state(self) -> dict[str, Any]:
        """What there is to choose from, as plain values."""
        return {
            "models": self._choices,
            "images": [{"id": key, "name": name} for key, name in self.images.names().items()],
            "kinds": [{"name": name, "meaning": meaning} for name, meaning in KINDS.items()],
            "most_bytes": MOST_BYTES,
        }

    def picture(self, model: int, image: str) -> bytes:
        """The image as a model sees it, as a PNG file.

        Raises:
            ExplorerError: There is no such model.
            DataError: There is no such image, or it cannot be read.
        """
        chosen = self._model(model)
        values = shown(self._call(lambda: self._input(model, image)), chosen.preprocessing)
        file = io.BytesIO()
        picture(values).save(file, "PNG")
        return file.getvalue()

    def prediction(self, model: int, image: str) -> dict[str, Any]:
        """What a model says of an image: its likeliest classes, or of other tasks a line of text.

        Raises:
            ExplorerError: There is no such model.
            DataError: There is no such image, it cannot be read, or the model's outputs are not finite.
            ModelError: The model does not take it.
        """
        predictor = self._model(model).predictor

        def predict() -> dict[str, Any]:
            if predictor.task != CLASSIFICATION:
                return {"text": predictor(self.images.read(image, predictor.preprocessing)).text()}
            prediction = predictor(self._input(model, image))
            return {"classes": [{"label": each.label, "score": each.score} for each in prediction.classes]}

        return self._call(predict)

    def row(
        self, model: int, image: str, block: str, position: int, kind: str, with_delta: bool
    ) -> tuple[tuple[str, ...], Tensor]:
        """What a position of a block's feature map receives from each position.

        Args:
            model: Its number.
            image: Its identity.
            block: Name of the SS2D.
            position: Row · width + column.
            kind: One of `vmamba.analysis.attention.KINDS`.
            with_delta: Multiply what comes from each position by its δ.

        Returns:
            The names of the routes, and (k, h, w), float32, NaN at positions that a route reaches later.

        Raises:
            ExplorerError: There is no such model or block.
            AttentionError: The position lies outside, or the kind is unknown.
            DataError: There is no such image, or it cannot be read.
        """
        chosen = self._model(model)
        if block not in chosen.blocks:
            raise ExplorerError(
                f"{chosen.name} has no block {block!r} to show; there are {', '.join(chosen.blocks)}"
            )

        def compute() -> tuple[tuple[str, ...], Tensor]:
            attention = self._attentions.get(
                (model, image, block),
                lambda: scan_attention(chosen.backbone, self._input(model, image), module=block),
            )
            values = attention.row(position, kind, with_delta).float()
            return attention.routes, values.masked_fill(~attention.reached(position), torch.nan)

        return self._call(compute)

    def field(self, model: int, image: str, at: tuple[float, float]) -> Tensor:
        """How strongly each pixel moves the last feature map at a place, (h, w) of the input.

        Raises:
            ExplorerError: There is no such model.
            ReceptiveFieldError: The place lies outside.
            DataError: There is no such image, or it cannot be read.
        """
        chosen = self._model(model)
        return self._call(
            lambda: self._fields.get(
                (model, image, at), lambda: contribution(chosen.backbone, self._input(model, image), at)
            )
        )

    def _model(self, number: int) -> ShownModel:
        if not 0 <= number < len(self.models):
            raise ExplorerError(f"there is no model {number}; expected 0 to {len(self.models) - 1}")
        return self.models[number]

    def _input(self, model: int, image: str) -> Tensor:
        """An image as the model takes it, (c, h, w)."""
        preprocessing = self.models[model].preprocessing
        return self._inputs.get(
            (model, image), lambda: preprocessing.transform()(self.images.read(image, preprocessing))
        )

    def _call(self, function: Callable[[], T]) -> T:
        return self._worker.submit(function).result()


def _choices_of(model: ShownModel) -> dict[str, Any]:
    """What there is to choose from in a model.

    Raises:
        ModelError: It has no scan to show.
    """
    blocks = [{"name": name, "height": h, "width": w} for name, (h, w) in model.blocks.items()]
    return {"name": model.name, "input": list(model.preprocessing.size), "blocks": blocks}


def _bytes_of(attention: ScanAttention) -> int:
    return sum(t.nbytes for t in (attention.orders, attention.delta, attention.A, attention.B, attention.C))
