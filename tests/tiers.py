"""The quick tier: which cases `make test` leaves to `make test-all` and CI.

Three rules mark a case `full`, and so leave it out of the quick tier:

- Tests of the documentation, of the developers' tools, of training by several processes, of processes that outlive
  others and in a browser (`LEFT_OUT`) are left out.
- Of a test that runs over the combinations of several parameters, as many cases stay as are needed for each
  value of each parameter to occur.
- `COVERED` names what takes long, each beside a quick test that runs the same code.
"""
# ruff: noqa: E501  (names of tests)

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import pytest

LEFT_OUT = (
    "tests/docs/",
    "tests/tools/",
    "tests/test_processes.py",
    "tests/cli/test_starter.py",
    "tests/train/test_distributed.py",
    "tests/train/test_launcher.py",
    "tests/explorer/test_browser.py",
    "tests/export/test_web.py",
    "tests/report/test_report_browser.py",
)

COVERED = {
    "tests/cli/test_bench.py::test_models": "tests/bench/test_bench_models.py::test_models",
    "tests/models/test_variants.py::test_compiled_traced_and_under_autocast_as_eager[{'d_state': 4, 'gate': True}]": (
        "tests/models/test_variants.py::test_compiled_traced_and_under_autocast_as_eager[{'routes': 'cascade'}]"
    ),
    "tests/train/test_faults.py::test_killed_runs_end_with_the_same_weights": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights"
    ),
    "tests/train/test_transfer.py::test_a_resumed_linear_probe_ends_with_the_same_weights[4]": (
        "tests/train/test_transfer.py::test_a_resumed_linear_probe_ends_with_the_same_weights[2]"
    ),
    "tests/train/test_task_contract.py::test_a_killed_run_ends_with_the_same_bits": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights"
    ),
    "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights[6]": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights[1]"
    ),
    "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights[8]": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights[4]"
    ),
    "tests/train/test_run.py::test_a_crash_costs_the_epoch_and_nothing_else[11]": (
        "tests/train/test_run.py::test_a_crash_costs_the_epoch_and_nothing_else[5]"
    ),
    "tests/train/test_dense_tasks.py::test_workers_change_nothing": (
        "tests/train/test_run.py::test_workers_change_nothing"
    ),
    "tests/train/test_dense_tasks.py::test_a_killed_run_ends_with_the_same_bits": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights"
    ),
    "tests/train/test_faults.py::test_a_signal_of_the_scheduler": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights"
    ),
    "tests/train/test_faults.py::test_a_full_disk_leaves_the_checkpoint_before": (
        "tests/train/test_faults.py::test_a_disk_that_is_full_from_the_start"
    ),
    "tests/train/test_faults.py::test_a_damaged_checkpoint_is_passed_over": (
        "tests/train/test_resume.py::test_a_flipped_bit_is_noticed_without_the_checksum_beside"
    ),
    "tests/train/test_resume.py::test_other_data_are_refused[renamed]": (
        "tests/train/test_resume.py::test_other_data_are_refused[reordered]"
    ),
    "tests/ops/test_transforms.py::test_compiles_without_a_break": (
        "tests/ops/test_operator.py::test_compiles_without_a_break"
    ),
    "tests/ops/test_transforms.py::test_is_as_in_plain_pytorch[linearize]": (
        "tests/ops/test_transforms.py::test_is_as_in_plain_pytorch[jvp]"
    ),
    "tests/ops/test_cpu.py::test_shares_the_threads_of_torch": (
        "tests/ops/test_cpu.py::test_a_small_call_stays_on_one_thread"
    ),
    "tests/test_imports.py::test_the_library_touches_no_device": (
        "tests/test_imports.py::test_all_below_train_needs_torch_and_timm_alone"
    ),
    "tests/cli/test_train_eval_predict.py::test_no_warnings_of_other_libraries": (
        "tests/cli/test_train_eval_predict.py::test_train_eval_predict"
    ),
    "tests/cli/test_train_eval_predict.py::test_each_verbs_module_knows_the_tasks": (
        "tests/cli/test_train_eval_predict.py::test_train_eval_predict"
    ),
    "tests/cli/test_train_eval_predict.py::test_ctrl_c_and_resume": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights"
    ),
    "tests/cli/test_predict.py::test_odd_names_narrow_terminals_and_full_disks": (
        "tests/cli/test_train_eval_predict.py::test_a_full_device[list]"
    ),
    "tests/cli/test_train_eval_predict.py::test_a_full_device[train]": (
        "tests/cli/test_train_eval_predict.py::test_a_full_device[list]"
    ),
    "tests/cli/test_explore.py::test_it_runs_until_ctrl_c": "tests/cli/test_explore.py::test_two_checkpoints",
    "tests/test_inference.py::test_untrained[of the authors]": "tests/test_inference.py::test_untrained[saved]",
    "tests/data/test_tar.py::test_other_processes_read_too[spawn]": (
        "tests/data/test_tar.py::test_other_processes_read_too[fork]"
    ),
    "tests/models/test_variants.py::test_exported_with_dynamic_batch_height_and_width": (
        "tests/ops/test_transforms.py::test_is_as_in_plain_pytorch"
    ),
    "tests/ops/test_cpu.py::test_does_not_leak": (
        "tests/ops/test_cpu.py::test_a_small_call_stays_on_one_thread"
    ),
    "tests/ops/test_cpu.py::test_freed_memory_stays_for_the_next_call": (
        "tests/ops/test_cpu.py::test_a_small_call_stays_on_one_thread"
    ),
    "tests/ops/test_backends.py::test_long_and_steep[chunked]": (
        "tests/ops/test_backends.py::test_float32_is_as_accurate_as_the_reference[chunked]"
    ),
    "tests/ops/test_routes.py::test_a_saved_model_finds_its_route_in_another_process": (
        "tests/ops/test_transforms.py::test_torchscript_fx_and_checkpointing"
    ),
    "tests/test_imports.py::test_the_library_imports_without_the_extras_packages": (
        "tests/test_imports.py::test_all_below_train_needs_torch_and_timm_alone"
    ),
    "tests/test_imports.py::test_the_library_imports_no_extras_package": (
        "tests/test_imports.py::test_all_below_train_needs_torch_and_timm_alone"
    ),
    "tests/test_inference.py::test_it_needs_nothing_of_training": (
        "tests/test_imports.py::test_all_below_train_needs_torch_and_timm_alone"
    ),
    "tests/train/test_resume.py::test_rows_of_a_run_without_checkpoint_go": (
        "tests/train/test_resume.py::test_an_extended_run_is_resumed_as_it_is"
    ),
    "tests/data/test_loading.py::test_a_worker_that_dies_with_a_lock": (
        "tests/data/test_loading.py::test_workers_do_not_keep_a_process_from_ending"
    ),
    "tests/export/test_export.py::test_preprocessing_metadata_and_float16": (
        "tests/export/test_export.py::test_any_number_and_size_of_images"
    ),
    "tests/export/test_scan.py::test_either_spelling_is_right": (
        "tests/export/test_scan.py::test_is_the_reference"
    ),
    "tests/export/test_serving.py::test_without_pytorch": (
        "tests/export/test_export.py::test_any_number_and_size_of_images"
    ),
    "tests/cli/test_export_command.py::test_a_run": (
        "tests/export/test_export.py::test_any_number_and_size_of_images"
    ),
    "tests/export/test_export.py::test_a_model_of_one_size": (
        "tests/export/test_export.py::test_any_number_and_size_of_images"
    ),
    "tests/cli/test_export_command.py::test_openvino_without_check": (
        "tests/export/test_export.py::test_any_number_and_size_of_images"
    ),
    "tests/cli/test_export_command.py::test_a_missing_runtime": (
        "tests/export/test_export.py::test_any_number_and_size_of_images"
    ),
    "tests/cli/test_export_command.py::test_a_full_disk": (
        "tests/export/test_export.py::test_any_number_and_size_of_images"
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
                or case.nodeid.startswith(LEFT_OUT)
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
