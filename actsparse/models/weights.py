"""The weights of a causal language model, all of them or none."""

import logging
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from actsparse.errors import MemoryLimitError, SourceError
from actsparse.torch.offload import is_offloaded

_logger = logging.getLogger(__name__)


def load_weights(folder: Path, name: str, **options: Any) -> PreTrainedModel:
    """
    Load a model, and refuse it where its files do not hold all of its weights: the rest would be random numbers.

    :param options: What ``from_pretrained`` takes besides.
    :raises SourceError: If a weight is missing or has another shape than the configuration says.
    :raises MemoryLimitError: If none fits into the memory that is allowed.
    """
    # Other shapes are let pass only to be refused here, by name; transformers' own error names none.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    model, report = loaded
    if misfits := sorted(report["mismatched_keys"]):
        weight, found, wanted = misfits[0]
        msg = f"the files of {name} do not fit its config: {weight} is {tuple(found)} but should be {tuple(wanted)}"
        raise SourceError(msg)
    if missing := sorted(report["missing_keys"]):
        msg = f"the files of {name} lack {len(missing)} of the model's weights, {missing[0]} for one"
        raise SourceError(msg)
    if any(parameter.is_meta for parameter in model.parameters()) and not is_offloaded(model):
        # Weights are placed in the model's order, and transformers gives up where nothing fits.
        first = next(model.parameters())
        size = first.numel() * first.element_size() / 1e6
        msg = f"no weights of {name} fit into so little memory: its embeddings alone take {size:.0f} MB"
        raise MemoryLimitError(msg)
    if unexpected := sorted(report["unexpected_keys"]):
        _logger.warning("%s has %d weights that the model does not use, as %s", name, len(unexpected), unexpected[0])
    return model
