"""A torch model with the data it is measured on: what every measurement needs of it."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from nncf.torch.function_hook.wrapper import ATR_HOOK_STORAGE
from torch import nn

from actsparse.calibration import run_each
from actsparse.errors import ActsparseError
from actsparse.scopes import Site
from actsparse.torch.insertion import intercept_outputs, suspend_sparsifiers
from actsparse.torch.layers import in_features, name_blocks, out_features
from actsparse.torch.measurements.checkpoints import checkpoint_blocks, is_large
from actsparse.torch.offload import is_offloaded
from actsparse.torch.running import evaluation_mode, run_batches, run_model
from actsparse.torch.sparsifier import ActivationSparsifier
from actsparse.torch.wrappers import get_layer

# On how many tokens it is measured what would take too long on all of them.
PROBE_TOKENS = 512
# What stands for no next token, as transformers' losses have it.
NO_TOKEN = -100

Loss = Callable[[Any, Any], torch.Tensor]
Intercept = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Probe:
    """
    A model and its calibration data.

    :param model: The model, with a mask on all that is to be measured; the masks pass everything.
    :param batches: The data, all of it in every process of a job; each runs its share.
    :param loss: What gradients are of: a function of the model's output and its input; None for the model's own.
    """

    model: nn.Module
    batches: list[Any]
    sites: Mapping[str, Site]
    sparsifiers: Mapping[str, ActivationSparsifier]
    loss: Loss | None

    @property
    def first_batches(self) -> list[Any]:
        """Whole batches of together at least `PROBE_TOKENS` tokens."""
        taken, count = [], 0
        for batch in self.batches:
            if count >= PROBE_TOKENS:
                break
            taken.append(batch)
            ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
            count += ids.numel() if ids is not None else PROBE_TOKENS
        return taken

    def suspend(self) -> AbstractContextManager[None]:
        """Let the masks pass everything."""
        return suspend_sparsifiers(self.sparsifiers.values())

    def watch(self, intercept: Intercept) -> AbstractContextManager[None]:
        """
        See, and replace, what the layers get; the masks themselves pass everything.

        :param intercept: Called with the layer name and what goes through its mask.
        """
        return watch(self.sparsifiers, intercept)

    def channels(self, site: str) -> int:
        """Tell how wide a masked tensor is."""
        layer = get_layer(self.model, self.sites[site].layers[0].name)
        return out_features(layer) if self.sites[site].gate_function else in_features(layer)

    def run(self, batches: list[Any], description: str) -> None:
        """Run forwards of which nobody reads the logits."""
        run_batches(self.model, batches, total=len(batches), description=description, reads_logits=False)

    def run_backwards(self, run: Callable[[Any], object], batches: list[Any], description: str) -> None:
        """
        Run something that takes gradients of activations; of a large batch, with checkpoints.

        :param run: Runs the model on one batch, forwards and backwards. What it watches counts only where gradients are
            enabled: with checkpoints, each block runs once without them and once with them.
        """
        blocks = name_blocks(self.model, self.sparsifiers)
        modules = [self.model.get_submodule(name) for name in blocks if name]
        # A compressed model decompresses its weights around its own forward, which a second run of a block is not in.
        can_run_twice = not hasattr(self.model, ATR_HOOK_STORAGE)

        # What a backward pass keeps of a layer includes its weights, which are dropped otherwise.
        needs_checkpoints = is_offloaded(self.model)

        def run_large(batch: Any) -> None:
            if not (can_run_twice and (needs_checkpoints or is_large(batch))):
                run(batch)
                return
            with checkpoint_blocks(modules):
                run({**batch, "use_cache": False} if takes_cache else batch)

        takes_cache = "use_cache" in inspect.signature(self.model.forward).parameters
        with evaluation_mode(self.model), without_parameter_gradients(self.model):
            run_each(run_large, batches, total=len(batches), description=description)

    def log_probabilities(self, batch: Any) -> torch.Tensor:
        """
        Predict.

        :return: [sequences, tokens, vocabulary].
        :raises ActsparseError: If the model gives no logits.
        """
        return self.read_logits(run_model(self.model, batch)).float().log_softmax(-1)

    def read_logits(self, output: Any) -> torch.Tensor:
        """
        Take the predictions out of what the model gave.

        :return: [sequences, tokens, vocabulary].
        :raises ActsparseError: If there are none.
        """
        logits = getattr(output, "logits", None)
        if logits is None:
            msg = f"this algorithm needs a model with logits, which {type(self.model).__name__} has not, or loss=…"
            raise ActsparseError(msg)
        return logits

    def compute_loss(self, batch: Any) -> torch.Tensor:
        """
        Run the model and compute what gradients are of.

        :return: The loss the caller gave; else the model's own of the batch's labels, or the summed next-token cross
            entropy of a causal language model.
        :raises ActsparseError: If there is none.
        """
        output = run_model(self.model, batch)
        if self.loss is not None:
            return self.loss(output, batch)
        if getattr(output, "loss", None) is not None:
            return output.loss * batch["labels"].numel()
        labels = self.read_next_tokens(batch)
        if labels is None:
            msg = (
                f"{type(self.model).__name__} has no next-token loss to take gradients of: put labels into the "
                f"batches, pass loss=…, or choose a score that needs no gradient"
            )
            raise ActsparseError(msg)
        return F.cross_entropy(output.logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")

    def read_next_tokens(self, batch: Any) -> torch.Tensor | None:
        """
        Read what a causal language model is to predict out of its input.

        :return: For each token the next one, -100 where there is none, [sequences, tokens]; None if the model predicts
            no next tokens, or the input has none.
        """
        can_generate = getattr(self.model, "can_generate", lambda: False)
        if not (can_generate() and isinstance(batch, Mapping) and "input_ids" in batch):
            return None
        ids = batch["input_ids"].masked_fill(batch.get("attention_mask", torch.ones(())) == 0, NO_TOKEN)
        return F.pad(ids[:, 1:], (0, 1), value=NO_TOKEN)


@contextmanager
def watch(sparsifiers: Mapping[str, ActivationSparsifier], intercept: Intercept) -> Iterator[None]:
    """
    See, and replace, what masks hand on to their layers; the masks themselves pass everything.

    :param intercept: Called with the layer name and what goes through its mask.
    """
    with suspend_sparsifiers(sparsifiers.values()), intercept_outputs(sparsifiers, intercept):
        yield


@contextmanager
def without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """
    Leave gradients of weights out: those of activations need none, and they would be as large as the model.

    :return: A context in which no parameter asks for a gradient.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
