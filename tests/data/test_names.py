"""The names of public datasets' classes."""

from vmamba.data.names import ADE20K_CLASSES, COCO_CATEGORY_IDS, COCO_CLASSES


def test_coco() -> None:
    by_id = dict(zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True))
    assert len(by_id) == len(set(COCO_CLASSES)) == 80
    known = {1: "person", 11: "fire hydrant", 13: "stop sign", 18: "dog", 44: "bottle", 67: "dining table"}
    known |= {72: "tv", 84: "book", 90: "toothbrush"}
    assert {number: by_id[number] for number in known} == known


def test_ade20k() -> None:
    """Places of a few in the published index files, which count from 1."""
    assert len(set(ADE20K_CLASSES)) == 150
    known = {
        1: "wall",
        8: "bed",
        13: "person",
        44: "signboard",
        45: "chest of drawers",
        90: "television receiver",
    }
    known |= {116: "bag", 137: "traffic light", 150: "flag"}
    assert {number: ADE20K_CLASSES[number - 1] for number in known} == known
