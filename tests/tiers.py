"""The tiers: which cases `make test` leaves to `make test-all` and CI, and which those leave to `make exhaustive`.

Four rules mark a case `full`, and so leave it out of the quick tier:

- Tests of the documentation, of the developers' tools, of an environment of its own, of training by several processes,
  of processes that outlive others and in a browser (`LEFT_OUT`) are left out.
- Of a test that runs over the combinations of several parameters, as many cases stay as are needed for each
  value of each parameter to occur.
- Of the tests in `CASES` the named cases stay instead.
- `COVERED` names what takes long, each beside a quick test that runs the same code.

For `CASES` and `COVERED`, what a case adds to the coverage decides: nothing, or a few branches.

Of the tests in `SAMPLED`, where a case takes up to a minute, CI runs the named ones, and of those in `EXHAUSTIVE`
none; the rest are marked `slow`.
"""
# ruff: noqa: E501  (names of tests)

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
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
    "tests/export/test_serving.py",
    "tests/ops/test_choice.py::test_two_processes_of_a_run_prove_once",
    "tests/report/test_report_browser.py",
    "tests/test_imports.py::test_all_below_train_needs_torch_and_timm_alone",
    "tests/data/test_loading.py::test_workers_do_not_keep_a_process_from_ending",
    "tests/train/test_resume.py::test_one_run_at_a_time",
    "tests/cli/test_bench.py::test_memory",
)

LONGEST = "tests/train/test_distributed.py"
"""The file that takes longest. Its tests train by several processes, and wait for each other."""

CASES = {
    "tests/analysis/test_attention_figure.py::test_the_pictures": ("True",),
    "tests/analysis/test_complexity.py::test_fvcore_gives_the_same": ("vmamba_pico",),
    "tests/analysis/test_complexity.py::test_gmacs_of_tiny_at_larger_sizes": ("1024",),
    "tests/analysis/test_complexity.py::test_other_models_have_their_known_figures": ("resnet50-4.11",),
    "tests/analysis/test_complexity.py::test_pytorchs_counter_gives_the_same": (
        "vmamba_pico",
        "convnext_atto",
    ),
    "tests/analysis/test_counted_heads.py::test_a_row_of_the_tables": (
        "mask_rcnn-vmamba_tiny-50.212-270.19-0.005",
        "upernet-vmamba_tiny-62.359-947.78-0.005",
    ),
    "tests/analysis/test_counted_heads.py::test_the_command": ("mask_rcnn",),
    "tests/heads/test_features.py::test_gradient_checkpointing_changes_no_gradient": (
        "resnet50",
        "vmamba_tiny",
    ),
    "tests/data/test_huggingface.py::test_a_recipe_trains_on_it": ("0",),
    "tests/data/test_section.py::test_a_run_on_other_channels": ("4",),
    "tests/heads/test_features.py::test_maps_of_any_model_at_any_size": ("resnet50", "vmamba_tiny"),
    "tests/heads/test_upernet.py::test_a_file_of_mmseg": ("module.",),
    "tests/models/test_hivit.py::test_the_published_counts": ("hivit_tiny-19181668-4.6",),
    "tests/models/test_official.py::test_parity": (
        "v2_micro-reference",
        "v2_micro-triton",
        "vanilla_micro-chunked",
        "vanilla_micro-cpu",
    ),
    "tests/models/test_routes_of_models.py::test_scripted_and_compiled": ("split",),
    "tests/models/test_s4nd.py::test_the_counts": ("s4nd_convnext_tiny-30.007-4.971",),
    "tests/models/test_s4nd.py::test_the_quoted_multiply_adds": ("s4nd_convnext_tiny-5.162-0.003",),
    "tests/models/test_model_transforms.py::test_forward_mode": ("cascade", "default"),
    "tests/models/test_variants.py::test_scripted_as_eager": ("dtype0-{'routes': 'cascade'}", "dtype1-{}"),
    "tests/ops/test_backends.py::test_chunked_keeps_within_its_memory": ("1-48", "16-48"),
    "tests/ops/test_backends.py::test_float32_is_as_accurate_as_the_reference": ("cpu", "triton"),
    "tests/ops/test_cpu.py::test_any_state_size": ("1", "17"),
    "tests/report/test_report.py::test_evaluations_in_the_run_and_beside_it_are_of_it": (
        "{run}",
        "mine/checkpoints/best.ckpt",
    ),
    "tests/ops/test_operator.py::test_a_split_sequence_with_carried_state_is_the_whole": (
        "chunked",
        "cpu",
        "triton",
    ),
    "tests/test_inference.py::test_a_runs_answers_are_evaluations": ("auto",),
    "tests/test_dense_inference.py::test_detectors_of_mmdet": ("2-names1",),
    "tests/test_dense_inference.py::test_other_precisions": ("dtype1",),
    "tests/test_dense_inference.py::test_segmenters_of_mmseg": ("False-2-names1",),
    "tests/test_private.py::test_workers_that_hang_are_ended_at_once": ("True",),
    "tests/studies/test_study_tables.py::test_counts_are_the_papers": ("V8: no gate-224", "VMamba-T-224"),
    "tests/train/test_dense_tasks.py::test_evaluated_and_reported": ("segmentation",),
    "tests/train/test_evaluation.py::test_scores_are_those_computed_by_hand": ("ema",),
    "tests/train/test_imagenet.py::test_a_miniature": ("tar",),
    "tests/train/test_transfer.py::test_which_weights_of_a_run": ("ema",),
}
"""A test → those of its cases that the quick tier runs."""

SAMPLED = {
    "tests/analysis/test_counted_heads.py::test_a_row_of_the_tables": (
        "mask_rcnn-swin_tiny_patch4_window7_224-47.8-266.6-0.005",
        "mask_rcnn-vit_adapter_small-48-403-0.02",
        "mask_rcnn-vmamba_tiny-50.212-270.19-0.005",
        "upernet-deit_small_mln-58-1217-0.02",
        "upernet-vmamba_tiny-62.359-947.78-0.005",
    ),
    "tests/explorer/test_browser.py::test_axe_finds_nothing": ("1300-dark", "400-light"),
    "tests/report/test_report_browser.py::test_it_asks_for_nothing_and_axe_finds_nothing": (
        "1300-dark",
        "400-light",
    ),
    "tests/models/test_variants.py::test_compiled_traced_and_under_autocast_as_eager": (
        "{'routes': 'cascade'}",
    ),
    "tests/models/test_variants.py::test_exported_with_dynamic_batch_height_and_width": (
        "{'stem': 'patch', 'downsample': 'merge', 'mlp_ratio': 0.0, 'gate': True, 'd_state': 2}",
    ),
    "tests/ops/test_transforms.py::test_compiles_without_a_break": ("jvp",),
    "tests/studies/test_study_tables.py::test_counts_are_the_papers": (
        "V0: scan in plain operations-224",
        "V8: no gate-224",
        "state size 1-224",
        "VMamba-T-224",
        "HiViT-S-224",
        "S4ND-ViT-B-224",
        "EfficientNet-B4-380",
        "cascade-224",
    ),
    "tests/test_processes.py::test_workers_end_with_the_process_that_started_them": ("at work-fork",),
    "tests/train/test_distributed.py::test_two_processes_equal_one_and_go_on_with_their_run": ("two shards",),
    "tests/train/test_distributed.py::test_the_second_process_gets_a_signal": ("killed",),
    "tests/train/test_distributed.py::test_two_processes_of_a_dense_task_equal_one": ("segmentation",),
    "tests/train/test_distributed.py::test_who_shares_a_step_changes_nothing": ("four passes",),
    "tests/train/test_faults.py::test_a_signal_of_the_scheduler": (
        "whole steps-SIGUSR1",
        "steps of two passes-SIGTERM",
    ),
    "tests/train/test_task_contract.py::test_a_killed_run_ends_with_the_same_bits": ("in step 6",),
}
"""A test → those of its cases that CI runs."""

EXHAUSTIVE = {
    "tests/cli/test_analyze.py::test_attention": (
        "tests/cli/test_analyze.py::test_attention_of_a_module_by_its_name"
    ),
    "tests/cli/test_train_eval_predict.py::test_a_full_device[train]": (
        "tests/cli/test_train_eval_predict.py::test_a_full_device[list]"
    ),
    "tests/data/test_tar.py::test_other_processes_read_too[spawn]": (
        "tests/data/test_tar.py::test_other_processes_read_too[fork]"
    ),
    "tests/models/test_routes_of_models.py::test_exported_for_any_size": (
        "tests/models/test_variants.py::test_exported_with_dynamic_batch_height_and_width"
    ),
    "tests/ops/test_choice.py::test_two_processes_of_a_run_prove_once": (
        "tests/ops/test_proof.py::test_proven_in_another_process"
    ),
    "tests/tools/test_compare_checkouts.py::test_a_checkout_against_itself": (
        "tests/tools/test_compare_checkouts.py::test_turns_are_in_a_random_order_and_ratios_of_one_round"
    ),
    "tests/tools/test_compare_checkouts.py::test_another_checkout_by_its_folder": (
        "tests/tools/test_compare_checkouts.py::test_what_cannot_be_compared"
    ),
    "tests/tools/test_gpu_day.py::test_a_stage_that_fails_leaves_the_others": (
        "tests/tools/test_gpu_day.py::test_models_and_tests_that_it_names_exist"
    ),
    "tests/train/test_dense_tasks.py::test_a_killed_run_ends_with_the_same_bits": (
        "tests/train/test_task_contract.py::test_a_killed_run_ends_with_the_same_bits"
    ),
}
"""What takes long → the test of CI that comes nearest to it; of the developers' tools that is a smaller part."""

COVERED = {
    "tests/models/test_routes_of_models.py::test_exported_for_any_size": (
        "tests/export/test_export.py::test_any_number_and_size_of_images"
    ),
    "tests/ops/test_choice.py::test_found_wrong[compiled_checkpoint]": (
        "tests/ops/test_choice.py::test_found_wrong[compiled]"
    ),
    "tests/ops/test_choice.py::test_no_proof_unless_eager[exported strictly]": (
        "tests/ops/test_choice.py::test_no_proof_unless_eager[exported]"
    ),
    "tests/ops/test_choice.py::test_proven[compiled_checkpoint]": (
        "tests/ops/test_choice.py::test_proven[compiled]"
    ),
    "tests/ops/test_choice.py::test_compiled_by_inductor_for_one_backend_then_another": (
        "tests/ops/test_choice.py::test_a_compiled_graph_keeps_its_backend"
    ),
    "tests/ops/test_proof.py::test_a_kernel_that_ends_its_process": (
        "tests/ops/test_proof.py::test_proven_in_another_process"
    ),
    "tests/ops/test_proof.py::test_a_thorough_proof_goes_on_after_a_failure": (
        "tests/cli/test_prove.py::test_a_report_of_what_is_wrong"
    ),
    "tests/cli/test_bench.py::test_models": "tests/bench/test_bench_models.py::test_models",
    "tests/models/test_variants.py::test_compiled_traced_and_under_autocast_as_eager": (
        "tests/ops/test_operator.py::test_compiles_without_a_break"
    ),
    "tests/train/test_transfer.py::test_a_resumed_linear_probe_ends_with_the_same_weights[4]": (
        "tests/train/test_transfer.py::test_a_resumed_linear_probe_ends_with_the_same_weights[2]"
    ),
    "tests/train/test_task_contract.py::test_a_killed_run_ends_with_the_same_bits": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights"
    ),
    "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights[6]": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights[4]"
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
    "tests/test_inference.py::test_weights_of_no_variant": (
        "tests/cli/test_analyze.py::test_weights_that_do_not_name_their_model"
    ),
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
        "tests/ops/test_backends.py::test_half_precision_in_and_out"
    ),
    "tests/ops/test_routes.py::test_a_saved_model_finds_its_route_in_another_process": (
        "tests/ops/test_transforms.py::test_torchscript_fx_and_checkpointing"
    ),
    "tests/test_imports.py::test_the_library_imports_without_the_extras_packages": (
        "tests/test_imports.py::test_arrows_point_down"
    ),
    "tests/test_imports.py::test_the_library_imports_no_extras_package_and_touches_no_device": (
        "tests/test_imports.py::test_arrows_point_down"
    ),
    "tests/test_imports.py::test_training_loads_no_signal_processing": (
        "tests/test_imports.py::test_arrows_point_down"
    ),
    "tests/test_inference.py::test_it_needs_nothing_of_training": (
        "tests/test_imports.py::test_arrows_point_down"
    ),
    "tests/train/test_resume.py::test_rows_of_a_run_without_checkpoint_go": (
        "tests/train/test_resume.py::test_an_extended_run_is_resumed_as_it_is"
    ),
    "tests/data/test_loading.py::test_a_worker_that_dies_with_a_lock": (
        "tests/data/test_loading.py::test_a_dead_worker_is_told"
    ),
    "tests/cli/test_analyze.py::test_attention": (
        "tests/cli/test_analyze.py::test_attention_of_a_module_by_its_name"
    ),
    "tests/cli/test_analyze.py::test_receptive_fields_of_models_for_one_size": (
        "tests/analysis/test_backbones.py::test_models_that_are_made_for_one_size"
    ),
    "tests/report/test_report.py::test_the_papers_numbers_are_marked": (
        "tests/report/test_report.py::test_runs_side_by_side"
    ),
    "tests/train/test_dense_tasks.py::test_a_run_keeps_the_ids_of_its_annotation_file": (
        "tests/train/test_dense_tasks.py::test_predicted_from_the_run_and_from_its_weights"
    ),
    "tests/train/test_dense_tasks.py::test_windows_that_cover_the_image_change_nothing": (
        "tests/heads/test_sliding.py::test_one_window_is_the_whole"
    ),
    "tests/train/test_evaluation.py::test_the_average_is_taken_where_there_is_one": (
        "tests/train/test_evaluation.py::test_a_recipe_names_the_weights"
    ),
    "tests/train/test_faults.py::test_a_corrupt_image_is_left_out_and_counted": (
        "tests/train/test_run.py::test_a_corrupt_image_is_named"
    ),
    "tests/train/test_resume.py::test_images_a_second_after_a_resume_within_an_epoch": (
        "tests/train/test_resume.py::test_an_extended_run_is_resumed_as_it_is"
    ),
    "tests/train/test_run.py::test_an_interrupt_of_the_last_step_lets_the_run_finish": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights[4]"
    ),
    "tests/models/test_official.py::test_a_model_moves_between_backends[vanilla_micro-triton]": (
        "tests/models/test_official.py::test_parity[v2_micro-triton]"
    ),
    "tests/models/test_official.py::test_backends_agree_in_float64[vanilla_micro-triton]": (
        "tests/ops/test_backends.py::test_float64_equals_the_reference[triton]"
    ),
    "tests/models/test_official.py::test_an_altered_file": "tests/models/test_official.py::test_a_truncated_file",
    "tests/ops/test_backends.py::test_long_and_steep[cpu]": (
        "tests/ops/test_backends.py::test_float32_is_as_accurate_as_the_reference[cpu]"
    ),
    "tests/ops/test_backends.py::test_gradcheck[2-True-reference]": (
        "tests/ops/test_backends.py::test_second_derivatives_of_the_reference"
    ),
    "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights[1]": (
        "tests/train/test_run.py::test_interrupt_and_resume_end_with_the_same_weights[4]"
    ),
    "tests/train/test_resume.py::test_a_finished_run_is_extended": (
        "tests/train/test_resume.py::test_an_extended_run_is_resumed_as_it_is"
    ),
    "tests/cli/test_bench.py::test_ops_of_one_backend": "tests/cli/test_bench.py::test_ops",
    "tests/test_packaged_weights.py::test_commands": (
        "tests/test_packaged_weights.py::test_a_predictor_knows_the_classes"
    ),
    "tests/models/test_variants.py::test_traced_and_pickled_as_eager": (
        "tests/models/test_variants.py::test_scripted_as_eager[dtype1-{}]"
    ),
    "tests/train/test_transfer.py::test_other_classes_and_another_resolution": (
        "tests/train/test_transfer.py::test_which_weights_of_a_run"
    ),
    "tests/export/test_scan.py::test_either_spelling_is_right": (
        "tests/export/test_scan.py::test_is_the_reference"
    ),
    "tests/analysis/test_receptive_field.py::test_the_picture": (
        "tests/cli/test_analyze.py::test_receptive_fields_before_and_after_training"
    ),
    "tests/analysis/test_route_drawings.py::test_the_picture": ("tests/cli/test_analyze.py::test_routes"),
    "tests/cli/test_train_eval_predict.py::test_a_whole_report": (
        "tests/cli/test_train_eval_predict.py::test_a_report_of_one_kind_of_weights"
    ),
    "tests/data/test_section.py::test_every_source_turns_images_upright": (
        "tests/data/test_decoding.py::test_images_are_turned_upright"
    ),
    "tests/heads/test_features.py::test_weights_of_timm": (
        "tests/heads/test_features.py::test_weights_of_a_classifier"
    ),
    "tests/studies/test_study_training.py::test_trainings_of_another_recipe_are_refused[rate]": (
        "tests/studies/test_study_training.py::test_trainings_of_another_recipe_are_refused[data]"
    ),
    "tests/test_dense_inference.py::test_the_backbone_is_told_by_its_weights": (
        "tests/test_dense_inference.py::test_detectors_of_mmdet"
    ),
    "tests/train/test_dense_tasks.py::test_a_frozen_backbone_never_changes": (
        "tests/train/test_transfer.py::test_a_resumed_linear_probe_ends_with_the_same_weights[2]"
    ),
    "tests/train/test_dense_tasks.py::test_a_step_that_is_left_out_leaves_no_trace_in_batchnorm": (
        "tests/train/test_faults.py::test_a_step_that_is_not_finite_is_left_out"
    ),
    "tests/train/test_dense_tasks.py::test_predicted_from_the_run_and_from_its_weights[detection]": (
        "tests/train/test_dense_tasks.py::test_predicted_from_the_run_and_from_its_weights[segmentation]"
    ),
    "tests/export/test_export.py::test_signals_are_handled_after_openvino": (
        "tests/export/test_export.py::test_any_number_and_size_of_images"
    ),
    "tests/analysis/test_counted_heads.py::test_the_norms_are_2880_parameters": (
        "tests/analysis/test_counted_heads.py::test_a_row_of_the_tables"
    ),
    "tests/ops/test_backends.py::test_gradcheck[2-True-chunked]": (
        "tests/ops/test_backends.py::test_float64_equals_the_reference"
    ),
    "tests/ops/test_proof.py::test_a_kernel_that_hangs_is_killed": (
        "tests/ops/test_proof.py::test_proven_in_another_process"
    ),
    "tests/train/test_detection_metrics.py::test_report_of_many_classes": (
        "tests/train/test_detection_metrics.py::test_report"
    ),
    "tests/cli/test_analyze.py::test_maps_without_memory": (
        "tests/cli/test_analyze.py::test_attention_of_a_module_by_its_name"
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


def is_chosen(case: pytest.Item, table: dict[str, tuple[str, ...]]) -> bool:
    """Whether a case's test is not in the table, or the case is one that stays."""
    chosen = table.get(function_of(case.nodeid))
    return chosen is None or any(case.nodeid.endswith(f"[{name}]") for name in chosen)


def unknown(nodes: Iterable[str], names: Iterable[str]) -> list[str]:
    """Names that are of no test; only files of which every test was collected are looked at."""
    cases = set(nodes)
    functions = {function_of(node) for node in cases}
    files = {node.split("::", 1)[0] for node in cases}
    return [
        n
        for n in sorted(set(names))
        if n.split("::", 1)[0] in files and n not in cases and n not in functions
    ]


def mark(items: Sequence[pytest.Item]) -> None:
    """Mark the cases that the quick tier and CI leave out."""
    for _, group in groupby(items, key=lambda item: function_of(item.nodeid)):
        cases = list(group)
        chosen = covering(values_of(case) for case in cases)
        for index, case in enumerate(cases):
            test = function_of(case.nodeid)
            stays = is_chosen(case, CASES) if test in CASES else index in chosen or not values_of(case)
            if not stays or case.nodeid.startswith(LEFT_OUT) or case.nodeid in COVERED or test in COVERED:
                case.add_marker("full")
            if not is_chosen(case, SAMPLED) or case.nodeid in EXHAUSTIVE or test in EXHAUSTIVE:
                case.add_marker("slow")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Whether a file need not be imported, since the quick tier leaves out all that is in it."""
    if "not full" not in config.option.markexpr or not collection_path.is_relative_to(config.rootpath):
        return None
    path = collection_path.relative_to(config.rootpath).as_posix()
    return True if path.startswith(LEFT_OUT) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark, before `-m` chooses, and put the longest file first, so that no process works on it alone at the end.

    Raises:
        UsageError: A table names a test that does not exist (any more).
    """
    mark(items)
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    if not any("::" in argument for argument in config.args):
        chosen = [f"{test}[{name}]" for test, names in (*CASES.items(), *SAMPLED.items()) for name in names]
        tables = [*COVERED, *COVERED.values(), *EXHAUSTIVE, *EXHAUSTIVE.values(), *chosen]
        missing = unknown((item.nodeid for item in items), tables)
        if missing:
            raise pytest.UsageError(f"tests/tiers.py: there is no test {', '.join(missing)}")
