"""How many threads a run on a CPU uses where neither the recipe nor the environment says it."""

import os
from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vmamba.nn.modes import evaluating
from vmamba.train.session import Session

SMALL_WORK = 2**24
"""Multiply-adds of a pass for each layer with parameters, below which one thread is used.

Below it threads spend much of their time on waiting for each other, and other busy processes slow them
down by a factor. It lies midway between vmamba_pico (3.6 M) and ResNet-18 (53 M) at 28² pixels and batch 64,
which `benchmarks/loaded_machine.py` times; where between them two threads begin to pay was not measured."""


def work_of_a_layer(model: nn.Module, sample_shape: tuple[int, ...], samples: int) -> float:
    """Multiply-adds of one forward pass, divided by the number of layers that have parameters.

    Args:
        model: Its modes stay as they are.
        sample_shape: (c, h, w).
        samples: Of a pass.
    """
    parameter = next(model.parameters())
    counter = FlopCounterMode(display=False)
    with evaluating(model), torch.no_grad(), counter:
        model(parameter.new_zeros((1, *sample_shape)))
    layers = sum(1 for layer in model.modules() if next(layer.parameters(recurse=False), None) is not None)
    return counter.get_total_flops() / 2 * samples / layers


def with_threads(session: Session, samples: int) -> Session:
    """Set the number of threads, and write it into the recipe, so that a resumed run uses as many.

    It is 1 for a model with little work in a layer, else PyTorch's default, and the recipe stays as it is;
    also where `train.threads` or OMP_NUM_THREADS decides. The choice depends on the recipe and not on a
    measurement, because with another number of threads the last bits of PyTorch's sums may be others.

    Args:
        session: Before training, with its model on the CPU.
        samples: Of a pass through the model in one process.
    """
    shape = session.task.sample_shape
    if session.recipe.train.threads is not None or "OMP_NUM_THREADS" in os.environ or shape is None:
        return session
    if work_of_a_layer(session.model, shape, samples) >= SMALL_WORK:
        return session
    torch.set_num_threads(1)
    train = session.recipe.train.model_copy(update={"threads": 1})
    return replace(session, recipe=session.recipe.model_copy(update={"train": train}))
