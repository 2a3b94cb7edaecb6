from pathlib import Path

import pytest

from vmamba.errors import RecipeError
from vmamba.train.recipe import check, override_values
from vmamba.train.session import load_recipe
from vmamba.train.tasks.classification import ClassificationRecipe, ClassificationTask

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


TEXTS = ["/x/a #1", "&x", "2024", "007", "yes", "1e3", "[old]", "x: y", "*star", "@x", "%x", "'quoted'", " a"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["data.root", "data.train_split", "model.weights", "model.name"])
def test_an_override_of_text_is_taken_as_it_stands(key: str, text: str, tmp_path: Path) -> None:
    if (key, text) == ("data.train_split", "[old]"):
        pytest.skip("a list of splits")
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path, [f"{key}={text}"])
    section, name = key.split(".")
    assert getattr(getattr(recipe, section), name) == text


def test_null_is_none_where_the_recipe_allows_none(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + "  clip_grad: 1.0\n")
    recipe = load_recipe(path, ["model.weights=null", "optim.clip_grad=null", "data.root=null"])
    assert recipe.model.weights is recipe.optim.clip_grad is None
    assert load_recipe(path, ["model.name=null"]).model.name == "null"


def test_what_is_no_text_is_yaml_still(tmp_path: Path) -> None:
    changes = [
        "data.classes=12",
        "data.train_split=[a, b]",
        "data.source=webdataset",
        "model.args={drop_rate: 0.1}",
    ]
    recipe = load_recipe(write(tmp_path, GOOD), [*changes, "train.loggers=[wandb]"])
    assert isinstance(recipe, ClassificationRecipe)
    assert (recipe.data.classes, recipe.data.train_split) == (12, ["a", "b"])
    assert (recipe.model.args, recipe.train.loggers) == ({"drop_rate": 0.1}, ["wandb"])


@pytest.mark.parametrize("override", ["model.weights=", "optim.lr=", "data.root= "])
def test_an_empty_value_is_an_error(override: str, tmp_path: Path) -> None:
    name = override.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"the value is empty .*; write {name}=null for none"):
        load_recipe(write(tmp_path, GOOD), [override])


@pytest.mark.parametrize(
    "text",
    [
        "task: classification\nmodel: &m\n  args: *m\n",
        f"task: classification\nmodel: {5000 * '['}{5000 * ']'}\n",
    ],
    ids=["contains itself", "nested"],
)
def test_a_recipe_without_end(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="contains itself, or is nested too deep"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.betas=[0.9, 1.0]", r"optim\.betas: expected two numbers from 0 to below 1, got \[0.9, 1.0\]"),
        ("optim.betas=[-0.1, 0.9]", r"optim\.betas: expected two numbers from 0 to below 1"),
        ("optim.lr=1e38", r"optim\.lr: Input should be less than or equal to 1000000"),
        ("train.threads=100000", r"train\.threads: Input should be less than or equal to 1024"),
    ],
)
def test_values_that_would_end_in_a_crash(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, GOOD), [override])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("args.num_classes=7", "num_classes: not here; the data say how many classes there are"),
        ("args.in_chans=1", "in_chans: not here; set data.channels"),
        ("args.features_only=true", "features_only: not here"),
        ("args.checkpoint_path=x", "checkpoint_path: not here; set model.weights"),
        ("args.device=cuda", "device: not here; set train.accelerator"),
        ("args={global_pool: ''}", "vmamba_pico does not work with 32×32 images"),
        ("args.drop_path_rate=2.0", "drop_path_rate: expected a number from 0 to below 1, got 2.0"),
        ("args.drop_path_rate=-1", "drop_path_rate: expected a number from 0 to below 1, got -1"),
        ("args.mlp_ratio=-1", "mlp_ratio: expected a number of at least 0, got -1"),
        ("args.gate=maybe", "gate: vmamba_pico expects bool, got 'maybe'"),
        ("name=vmamba_pico.foo", "unknown model 'vmamba_pico.foo'"),
    ],
)
def test_models_that_cannot_work_are_refused(change: str, message: str, tmp_path: Path) -> None:
    from vmamba.train.session import training_session

    with pytest.raises(RecipeError, match=message):
        training_session(load_recipe(write(tmp_path, GOOD), [f"model.{change}"]))


def test_what_a_recipe_leaves_to_the_model(tmp_path: Path) -> None:
    """Size, crop, interpolation and constants of its own configuration, and what the recipe says wins."""
    from vmamba.train.session import training_session

    model = "model: {name: resnetv2_50x1_bit.goog_in21k}"
    text = f"task: classification\n{model}\ndata: {{source: mnist, crop_pct: 0.7}}\n"
    recipe = ClassificationTask.resolve(load_recipe(write(tmp_path, text)))  # type: ignore[arg-type]
    assert recipe.data.mean == recipe.data.std == (0.5, 0.5, 0.5)
    assert (recipe.data.image_size, recipe.data.interpolation, recipe.data.crop_pct) == (224, "bilinear", 0.7)
    assert ClassificationTask.resolve(recipe) == recipe
    changes = ["data.channels=1", "data.image_size=48"]
    session = training_session(load_recipe(write(tmp_path, GOOD), changes))
    cfg = session.model.pretrained_cfg
    assert cfg["mean"] == pytest.approx([sum((0.485, 0.456, 0.406)) / 3])
    assert (cfg["input_size"], cfg["num_classes"], cfg["crop_pct"]) == ((1, 48, 48), 10, 1.0)
    assert cfg["label_names"] == [str(digit) for digit in range(10)]
