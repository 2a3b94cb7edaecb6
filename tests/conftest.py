"""Settings of every test: fixed seed, two threads or processes, uninitialised memory filled with NaN.

PyTorch is imported where it is used: the process that deals tests out to others runs none.
"""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import settings

from tiers import pytest_collection_modifyitems, pytest_ignore_collect  # noqa: F401  (hooks)

gc.disable()  # until all is imported that stays: see pytest_collection_finish
pytest_plugins = ("pytester", "browsers")
INTERPRETED = False
if "TRITON_INTERPRET" in os.environ:
    from vmamba.ops.triton import interpreted

    INTERPRETED = interpreted()

# An interpreted kernel takes seconds: fewer examples there.
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=3 if INTERPRETED else 25)
settings.register_profile("quick", settings.get_profile("fixed"), max_examples=5)
settings.load_profile("fixed")

if "PYTEST_XDIST_WORKER" in os.environ:
    from vmamba_cli._extra import signal_processing_later

    with signal_processing_later(), suppress(ModuleNotFoundError):
        import lightning  # noqa: F401  (over a second sooner than where tests import it)

if INTERPRETED:
    from interpreter import speed_up
    from vmamba.ops.triton import backend as triton

    speed_up()
    # Fewer programs of more channels; those of tests are few, and there is a test of several blocks.
    triton.SETTINGS = dict.fromkeys(triton.SETTINGS, ((2**14, 8, 8),))


def pytest_configure(config: pytest.Config) -> None:
    """Infinities and NaN are tested, and numpy warns of them where it interprets a kernel."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_collection_finish() -> None:
    """Garbage is not searched for in modules and tests, which stay: a tenth of all tests' time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _fixed() -> Iterator[None]:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # two processes share two cores
    torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory, on by default: empty() is NaN
    assert torch.utils.deterministic.fill_uninitialized_memory
    # A shell starts what runs in its background with Ctrl-C ignored, and nohup with SIGHUP.
    handlers = {signal.SIGINT: signal.default_int_handler}
    if hasattr(signal, "SIGHUP"):
        handlers[signal.SIGHUP] = signal.SIG_DFL
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
