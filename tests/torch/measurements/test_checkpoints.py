"""Large batches: activations are computed twice instead of kept, and the measurements are the same."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from actsparse import sparsify_activations
from actsparse.torch.insertion import named_sparsifiers
from actsparse.torch.measurements import checkpoints


def thresholds(model: Any, batches: list[Any], algorithm: str) -> dict[str, torch.Tensor]:
    sparsify_activations(model, batches, 0.5, algorithm=algorithm)
    return {name: mask.threshold for name, mask in named_sparsifiers(model)}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "phi3"])
@pytest.mark.parametrize("algorithm", ["auto", "fisher", "corrected-gxo+global"])
def test_thresholds_are_the_same(
    algorithm: str, architecture: str, make_model: Any, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = thresholds(make_model(architecture), batches, algorithm)
    runs: list[bool] = []
    run = checkpoints._run_with_checkpoint

    def count(*args: Any, **kwargs: Any) -> Any:
        runs.append(torch.is_grad_enabled())
        return run(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "LARGE_BATCH", 0)
    monkeypatch.setattr(checkpoints, "_run_with_checkpoint", count)
    model = make_model(architecture)
    found = thresholds(model, batches, algorithm)
    assert any(runs)
    assert found.keys() == expected.keys()
    for name, threshold in found.items():
        torch.testing.assert_close(threshold, expected[name], rtol=1e-5, atol=1e-7)
    # The blocks are left as they were.
    assert not any(isinstance(vars(module).get("forward"), partial) for module in model.modules())


def test_one_blocks_activations_are_kept_at_a_time(make_model: Any, make_batches: Any) -> None:
    model = make_model()
    blocks = list(model.model.layers)
    (batch,) = make_batches(1, batch_size=1, length=32)
    kept = {False: 0, True: 0}

    def run(*, has_checkpoints: bool) -> None:
        saved: list[int] = []
        context = checkpoints.checkpoint_blocks(blocks if has_checkpoints else [])
        with context, torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            model(**batch, use_cache=False)
        kept[has_checkpoints] = sum(saved)

    run(has_checkpoints=False)
    run(has_checkpoints=True)
    assert kept[True] < 0.5 * kept[False]


def test_what_another_library_put_there_stays() -> None:
    block = nn.Linear(2, 2)
    forward = block.forward = lambda input: input  # noqa: A006
    with checkpoints.checkpoint_blocks([block]):
        assert block.forward is not forward
    assert block.forward is forward
