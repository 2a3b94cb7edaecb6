from pathlib import Path

import pytest

from vmamba.errors import RecipeError
from vmamba.train.classification import ClassificationRecipe
from vmamba.train.recipe import check, override_values
from vmamba.train.run import load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

GOOD = """\
task: classification
model:
  name: vmamba_pico
data:
  source: mnist
optim:
  lr: 1e-3
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository(path: Path) -> None:
    recipe = load_recipe(path)
    assert check(type(recipe), recipe.model_dump(mode="json"), "again") == recipe
    assert f"vmamba train {path.relative_to(ROOT).as_posix()}" in path.read_text().partition("task:")[0]


def test_defaults_are_written_out_and_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    again = load_recipe(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert "weight_decay: 0.05" in recipe.to_yaml()


def test_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD),
        [
            "optim.lr=3e-4",
            "model.args={depths: [1, 1, 1, 1]}",
            "model.args.d_state=2",
            "optim.clip_grad=null",
            "schedule.epochs=40",
        ],
    )
    assert isinstance(recipe, ClassificationRecipe)
    assert recipe.optim.lr == 3e-4
    assert recipe.model.args == {"depths": [1, 1, 1, 1], "d_state": 2}
    assert recipe.optim.clip_grad is None
    assert recipe.schedule.epochs == 40


def test_overrides_leave_the_values_as_they_are() -> None:
    values = {"optim": {"lr": 1.0}}
    override_values(values, ["optim.lr=2.0"])
    assert values == {"optim": {"lr": 1.0}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1.0}", r"optim\.lrr: no such key; did you mean 'lr'\? \(line 2\)"),
        ("optimm: {lr: 1.0}", r"optimm: no such key; did you mean 'optim'\? \(line 2\)"),
        ("optim: {zzz: 1.0}", r"optim\.zzz: no such key; expected one of name, lr, weight_decay"),
        ("optim:\n  lr: fast", r"optim\.lr: Input should be a valid number, got 'fast' \(line 3\)"),
        ("optim: {lr: '1e-3'}", r"optim\.lr: Input should be a valid number, got '1e-3'"),
        ("optim: {lr: true}", r"optim\.lr: .*got True"),
        ("optim: {lr: .nan}", r"optim\.lr: .*got nan"),
        ("optim: {lr: -1.0}", r"optim\.lr: Input should be greater than 0, got -1.0"),
        ("optim: {name: adamm}", r"optim\.name: no optimiser 'adamm' in timm; there are .*adam"),
        ("optim: [1]", r"optim: .*got \[1\]"),
        ("optim: null", r"optim: .*got None"),
        ("train: {batch_size: 2.5}", r"train\.batch_size: Input should be a valid integer, got 2.5"),
        ("train: {batch_size: 5}", r"train\.batch_size 5 is odd"),
        ("train: {precision: fp16}", r"train\.precision: .*'bf16-mixed'.* got 'fp16'"),
        ("data: {channels: 3, mean: [0.5, 0.5]}", r"data: mean has 2 values for 3 channels"),
        ("data: {std: [1.0, 1.0, 0.0]}", r"data: std .* is not above 0"),
        ("augment: {auto_augment: rand-x9}", r"augment\.auto_augment: 'rand-x9' is no policy"),
        ("augment: {auto_augment: strong}", r"augment\.auto_augment: 'strong' is no policy"),
        ("augment: {scale: [1.0, 0.5]}", r"augment: scale \[1.0, 0.5\] is not a range"),
        ("schedule: {epochs: 5, warmup_epochs: 5}", r"schedule: warmup_epochs 5(\.0)? is not below epochs 5"),
    ],
)
def test_what_does_not_check_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"task: classification\n{text}\n")
    with pytest.raises(RecipeError, match=message) as raised:
        load_recipe(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_every_problem_is_listed(tmp_path: Path) -> None:
    path = write(tmp_path, "task: classification\noptim: {lr: fast, beta: 1}\ntrain: {workers: -1}\n")
    with pytest.raises(RecipeError) as raised:
        load_recipe(path)
    assert [name for name in ("optim.lr:", "optim.beta:", "train.workers:") if name in str(raised.value)] == [
        "optim.lr:",
        "optim.beta:",
        "train.workers:",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: detect", "task: unknown task 'detect'; expected one of 'classification'"),
        ("task: [1]", r"task: unknown task \[1\]"),
        ("model: {}", "task: unknown task None"),
        ("- 1", "expected a mapping of sections, got list"),
        ("", "expected a mapping of sections, got NoneType"),
        ("task: {a: 1", "(?s)not YAML: .*line 2"),
        ("task: a\ntask: b", "(?s)the key 'task' stands twice.*line 2"),
        ("task: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, text + "\n"))


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no\.yaml: cannot read the recipe"):
        load_recipe(tmp_path / "no.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(binary)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("optim..lr=3", "expected section.key=value"),
        ("task.name=3", "'task' is a value, not a section"),
        ("optim.lr=[1", "the value is not YAML"),
        ("optim.lr=fast", r"optim\.lr: .*got 'fast'$"),
        ("optim.lrr=1.0", r"optim\.lrr: no such key; did you mean 'lr'\?$"),
    ],
)
def test_bad_overrides(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, GOOD), [override])
