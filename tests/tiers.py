"""The quick tier: which cases `make test` leaves to `make test-all` and CI.

Three rules mark a case `full`, and so leave it out of the quick tier:

- Tests of the documentation and of the developers' tools (`BESIDE_THE_LIBRARY`) are left out.
- Of a test that runs over the combinations of several parameters, as many cases stay as are needed for each
  value of each parameter to occur.
- `COVERED` names what takes long, each beside a quick test that runs the same code.
"""
# ruff: noqa: E501  (names of tests)

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import pytest

BESIDE_THE_LIBRARY = ("tests/docs/", "tests/tools/")

COVERED = {
    "tests/cli/test_bench.py::test_models": "tests/bench/test_bench_models.py::test_models",
    "tests/cli/test_train_eval_predict.py::test_each_verbs_module_knows_the_tasks[evaluation]": (
        "tests/cli/test_train_eval_predict.py::test_each_verbs_module_knows_the_tasks[run]"
    ),
    "tests/cli/test_train_eval_predict.py::test_each_verbs_module_knows_the_tasks[runs]": (
        "tests/cli/test_train_eval_predict.py::test_each_verbs_module_knows_the_tasks[run]"
    ),
    "tests/models/test_variants.py::test_compiled_traced_and_under_autocast_as_eager[{'d_state': 4, 'gate': True}]": (
        "tests/models/test_variants.py::test_compiled_traced_and_under_autocast_as_eager[{'routes': 'cascade'}]"
    ),
    "tests/models/test_variants.py::test_exported_with_dynamic_batch_height_and_width[{'stem': 'patch', 'downsample': 'merge', 'mlp_ratio': 0.0, 'gate': True, 'd_state': 2}]": (
        "tests/models/test_variants.py::test_exported_with_dynamic_batch_height_and_width[{}]"
    ),
    "tests/train/test_distributed.py::test_a_run_goes_on_with_another_number_of_processes": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights"
    ),
    "tests/train/test_distributed.py::test_two_processes_go_on_with_a_run": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights"
    ),
    "tests/train/test_distributed.py::test_the_second_process_gets_a_signal": (
        "tests/train/test_faults.py::test_a_signal_of_the_scheduler"
    ),
    "tests/train/test_distributed.py::test_who_shares_a_step_changes_nothing[two shards]": (
        "tests/train/test_distributed.py::test_who_shares_a_step_changes_nothing[two processes]"
    ),
    "tests/train/test_distributed.py::test_who_shares_a_step_changes_nothing[two processes of two passes]": (
        "tests/train/test_distributed.py::test_who_shares_a_step_changes_nothing[two processes]"
    ),
    "tests/train/test_faults.py::test_killed_runs_end_with_the_same_weights": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights"
    ),
    "tests/train/test_transfer.py::test_a_resumed_linear_probe_ends_with_the_same_weights[4]": (
        "tests/train/test_transfer.py::test_a_resumed_linear_probe_ends_with_the_same_weights[2]"
    ),
    "tests/train/test_task_contract.py::test_a_killed_run_ends_with_the_same_bits[in step 4]": (
        "tests/train/test_task_contract.py::test_a_killed_run_ends_with_the_same_bits[in step 6]"
    ),
    "tests/train/test_task_contract.py::test_a_killed_run_ends_with_the_same_bits[in step 10]": (
        "tests/train/test_task_contract.py::test_a_killed_run_ends_with_the_same_bits[in step 6]"
    ),
    "tests/train/test_distributed.py::test_who_shares_a_step_changes_nothing[four passes]": (
        "tests/train/test_distributed.py::test_who_shares_a_step_changes_nothing[two processes]"
    ),
}
"""A test, or one case of it → the test of the quick tier that runs the same code."""

Value = tuple[str, int]
"""A parameter's name and the identity of its value: values need be neither hashable nor comparable."""


def values_of(item: pytest.Item) -> frozenset[Value]:
    """The values of a case's parameters; empty for a test without any."""
    callspec: Any = getattr(item, "callspec", None)
    return (
        frozenset((name, id(value)) for name, value in callspec.params.items()) if callspec else frozenset()
    )


def covering(cases: Iterable[frozenset[Value]]) -> set[int]:
    """Indices of cases in which every value occurs: greedily the case that adds most, of equals the first."""
    remaining = dict(enumerate(cases))
    uncovered = frozenset[Value]().union(*remaining.values())
    chosen = set()
    while uncovered:
        best = max(remaining, key=lambda index: len(remaining[index] & uncovered))
        uncovered -= remaining.pop(best)
        chosen.add(best)
    return chosen


def function_of(node: str) -> str:
    """A case's name without its parameters."""
    return node.split("[", 1)[0]


def unknown(nodes: Iterable[str], covered: dict[str, str]) -> list[str]:
    """Names in the table that are no test; only files of which every test was collected are looked at."""
    cases = set(nodes)
    functions = {function_of(node) for node in cases}
    files = {node.split("::", 1)[0] for node in cases}
    names = sorted({*covered, *covered.values()})
    return [n for n in names if n.split("::", 1)[0] in files and n not in cases and n not in functions]


def mark(items: Sequence[pytest.Item]) -> None:
    """Mark the cases that the quick tier leaves out."""
    for _, group in groupby(items, key=lambda item: function_of(item.nodeid)):
        cases = list(group)
        chosen = covering(values_of(case) for case in cases)
        for index, case in enumerate(cases):
            is_extra = bool(values_of(case)) and index not in chosen
            if (
                is_extra
                or case.nodeid.startswith(BESIDE_THE_LIBRARY)
                or case.nodeid in COVERED
                or function_of(case.nodeid) in COVERED
            ):
                case.add_marker("full")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark, before `-m` chooses.

    Raises:
        UsageError: The table names a test that does not exist (any more).
    """
    mark(items)
    if not any("::" in argument for argument in config.args):
        missing = unknown((item.nodeid for item in items), COVERED)
        if missing:
            raise pytest.UsageError(f"tests/tiers.py: COVERED names no test: {', '.join(missing)}")
