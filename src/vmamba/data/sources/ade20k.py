"""ADE20K as the scene parsing benchmark has it: 150 classes."""

from pathlib import Path
from typing import Literal

from vmamba.data.decoding import RGB, Decoding
from vmamba.data.section import SegmentationSection, Split
from vmamba.data.segmented import IGNORED
from vmamba.data.sources.masks import MaskFolder, MaskValues

ADE20K_CLASSES = tuple(
    """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth,
door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug,
field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column,
signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path,
stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee
table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair,
boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth,
television receiver, airplane, dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle,
buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool,
barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, microwave,
pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase, traffic light, tray,
ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator, glass, clock, flag
""".replace("\n", " ")
    .strip()
    .split(", ")
)
"""The values 1 to 150 in masks, named as the authors' checkpoints name them; 0 is everything else."""


class Ade20kSection(SegmentationSection):
    """The folder ADEChallengeData2016, with `images/<split>/*.jpg` and `annotations/<split>/*.png`."""

    source: Literal["ade20k"] = "ade20k"
    train_split: str = "training"
    val_split: str = "validation"

    def open(self, split: Split, decoding: Decoding = RGB) -> MaskFolder:
        root, name = Path(self._root()), self._split_name(split)
        values = MaskValues(dict(enumerate(ADE20K_CLASSES, start=1)), [0, IGNORED])
        return MaskFolder(root / "images" / name, root / "annotations" / name, values, decoding)
