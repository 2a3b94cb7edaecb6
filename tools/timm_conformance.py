"""Run timm's own model tests on our models, and fail unless each really ran and passed.

    python tools/timm_conformance.py [--models NAME …] [--cache FOLDER]

Fetches the source distribution of the installed timm from PyPI (once, into the cache), adds our modules to
the filter of its intermediate-feature tests, and selects every test of ours by its exact id.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from fnmatch import fnmatch
from pathlib import Path

import timm

from vmamba.models import model_names

MODELS = ["vmamba_pico", "vmamba_pico_wide", "vmamba_nano", "vmamba_tiny", "vanilla_vmamba_tiny"]
MODELS += ["hivit_tiny", "vim_tiny", "s4nd_convnext_tiny", "s4nd_vit_base"]
SEQUENCE_MODELS = ("vim_*", "s4nd_vit_*")
"""Those that give sequences and not maps. timm tests the configurations of such models by themselves, and has
no `test_model_forward_features` for them."""
IDS = [  # {} is replaced by a model's name
    "test_model_forward[1-{}]",
    "test_model_backward[2-{}]",
    "test_model_forward_torchscript[1-{}]",
    "test_model_forward_features[1-{}]",
    "test_model_forward_intermediates_features[1-{}]",
    "test_model_forward_intermediates[1-{}]",
    "test_prune_intermediate_layers_contract[{}]",
    "test_model_forward_fx[1-{}]",
    "test_model_backward_fx[2-{}]",
    "test_model_forward_fx_torchscript[1-{}]",
]


def fetch(cache: Path) -> Path:
    """timm's tests/test_models.py of the installed version, with our modules in its filter."""
    folder = cache / f"timm-{timm.__version__}"
    source = folder / "tests" / "test_models.py"
    if not source.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--no-binary", "timm", "-d", str(cache), f"timm=={timm.__version__}"]
        subprocess.run(command, check=True)
        with tarfile.open(cache / f"timm-{timm.__version__}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
    text = source.read_text(encoding="utf-8")
    # timm filters by the last name of the module that registers a model, and sequence models by their names.
    modules = {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in model_names()}
    added = {"FEAT_INTER_FILTERS = [\n": sorted(modules), "NON_STD_FILTERS = [\n": SEQUENCE_MODELS}
    for marker, names in added.items():
        if text.count(marker) != 1:
            raise SystemExit(f"{source}: {marker!r} is not in it once; this script must learn the new form")
        text = text.replace(marker, marker + "".join(f"    {name!r},\n" for name in names))
    target = source.with_name("test_models_vmamba.py")
    target.write_text(text, encoding="utf-8")
    return target


def tagged_names(model: str) -> list[str]:
    """A model's name with the tag of each of its default cfgs."""
    return timm.list_models(model, include_tags=True) or [model]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--cache", type=Path, default=Path(".cache/timm"))
    args = parser.parse_args()

    tests = fetch(args.cache.resolve())
    # Under GITHUB_ACTIONS timm skips the tests of FX and TorchScript.
    environment = {name: value for name, value in os.environ.items() if name != "GITHUB_ACTIONS"}
    environment |= {"TORCH_BACKEND": "vmamba", "TIMEOUT": "600"}
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-c", os.devnull, tests.name],
        cwd=tests.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    available = {line.partition("::")[2] for line in collected.stdout.splitlines() if "::" in line}
    wanted = []
    for model in args.models:
        sequence = any(fnmatch(model, names) for names in SEQUENCE_MODELS)
        ids = [test for test in IDS if not (sequence and test.startswith("test_model_forward_features["))]
        wanted += [test.format(model) for test in ids]
        # The ids of this test have the tags of the weights.
        test = "test_model_default_cfgs_non_std" if sequence else "test_model_default_cfgs"
        wanted += [f"{test}[1-{tagged}]" for tagged in tagged_names(model)]
    absent = [test for test in wanted if test not in available]
    if absent:
        print(collected.stdout[-2000:], collected.stderr[-2000:])
        raise SystemExit("timm does not offer these tests:\n  " + "\n  ".join(absent))

    report = tests.with_name("vmamba.xml")
    report.unlink(missing_ok=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-c",
            os.devnull,
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            "--durations=8",
            f"--junitxml={report}",
            *(f"{tests.name}::{test}" for test in wanted),
        ],
        cwd=tests.parent,
        env=environment,
        check=False,
    )
    if not report.exists():
        raise SystemExit("pytest wrote no report")
    passed = {case.get("name") for case in ET.parse(report).iter("testcase") if len(list(case)) == 0}
    failed = [test for test in wanted if test not in passed]
    if failed:
        raise SystemExit("not passed (failed, skipped or never run):\n  " + "\n  ".join(failed))
    print(f"timm {timm.__version__}: {len(wanted)} tests passed, none skipped: {', '.join(args.models)}")


if __name__ == "__main__":
    main()
