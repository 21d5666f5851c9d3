"""Loading without the libraries' noise."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the loading libraries' log lines and progress bars, and put their settings back afterwards."""
    verbosity = transformers_logging.get_verbosity()
    has_bars, has_hub_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    gguf_bar = modeling_gguf_pytorch_utils.tqdm
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # The GGUF reader draws its bar with plain tqdm; transformers' own can be switched off.
    modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = gguf_bar
        transformers_logging.set_verbosity(verbosity)
        if has_bars:
            transformers_logging.enable_progress_bar()
            if not has_hub_bars:
                disable_progress_bars()
