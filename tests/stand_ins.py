"""Backends that stand in for a GPU's: they have to prove themselves on the CPU.

Each is the compiled CPU kernel, which is faster than `chunked`; but for the number of states that it saves,
and for what its name says. The proof's process imports them too.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from vmamba.ops import cpu, proof, register_backend
from vmamba.ops.backend import Backend, Gradients, saved_every_stride
from vmamba.ops.operands import Operands

CASES = proof.CASES[:1]
TIMED = (proof.Case(1, 14, 14, 32, 1, 6),)

calls: list[str] = []
"""Which backend's forward ran, and which one's backward."""


def forward(call: Operands) -> Any:
    y, last_state, states = cpu.BACKEND.forward(call)
    return y, last_state, states.repeat(1, 1, 2, 1, 1)


def backward(grad_y: Any, grad_last_state: Any, call: Operands, states: Any) -> Gradients:
    n = saved_every_stride(call)
    assert states.shape[2] == 2 * n, f"states of another backend: {tuple(states.shape)}"
    return cpu.BACKEND.backward(grad_y, grad_last_state, call, states[:, :, :n].contiguous())


def right_forward(call: Operands) -> Any:
    calls.append("right forward")
    return forward(call)


def right_backward(*arguments: Any) -> Gradients:
    calls.append("right backward")
    return backward(*arguments)


def wrong_backward(*arguments: Any) -> Gradients:
    """The gradient of C is a thousandth too large."""
    gradients = list(backward(*arguments))
    gradients[4] = gradients[4] * 1.001  # type: ignore[operator]
    return tuple(gradients)  # type: ignore[return-value]


def fickle_forward(call: Operands) -> Any:
    y, last_state, states = forward(call)
    calls.append("fickle")
    return y * (1 + 1e-7 * (len(calls) % 2)), last_state, states


def raising_forward(call: Operands) -> Any:
    raise NotImplementedError("the compiler gave up\nafter a long story")


def slow_forward(call: Operands) -> Any:
    time.sleep(0.05)
    return forward(call)


def hanging_forward(call: Operands) -> Any:
    time.sleep(1000)


def dying_forward(call: Operands) -> Any:
    print("a driver says why", file=sys.stderr, flush=True)
    os.abort()


def _stand_in(name: str, forward: Any = forward, backward: Any = backward) -> Backend:
    return Backend(
        name, "", forward, backward, proven_on=("cpu",), n_saved=lambda call: 2 * saved_every_stride(call)
    )


RIGHT = _stand_in("right", right_forward, right_backward)
BACKENDS = {
    backend.name: backend
    for backend in (
        RIGHT,
        _stand_in("wrong", forward, wrong_backward),
        _stand_in("fickle", fickle_forward),
        _stand_in("raising", raising_forward),
        _stand_in("slow", slow_forward),
        _stand_in("hanging", hanging_forward),
        _stand_in("dying", dying_forward),
    )
}

if "pytest" not in sys.modules:  # the proof's process, or one that a test starts
    proof.CASES, proof.TIMED = CASES, TIMED
    for backend in BACKENDS.values():
        register_backend(backend)
    if path := os.environ.get("STAND_INS_LOG"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{sys.argv[0]}\n")
