"""What models come wrapped in, and models as they are written where they have been compiled."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def unwrap(model: Any) -> Any:
    """
    Find the model that names, masks and files are about.

    :param model: A torch model, or what `torch.compile` made of one; anything else comes back as it is.
    """
    inner = model._modules.get("_orig_mod") if isinstance(model, nn.Module) else None
    return model if inner is None else unwrap(inner)


@contextmanager
def as_written() -> Iterator[None]:
    """Run models as they are written, not what torch.compile made of them: it would not see a hook of a while."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; importing it takes two seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
