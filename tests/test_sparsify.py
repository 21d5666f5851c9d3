"""The call: what it masks, and what it leaves alone when it cannot."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import nncf
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from actsparse import (
    ActsparseError,
    ScopeError,
    TargetScope,
    load_thresholds,
    measure_sparsity,
    save_thresholds,
    sparsify_activations,
)
from actsparse.errors import DatasetError
from actsparse.torch.insertion import named_sparsifiers

GATE_AND_UP = TargetScope(roles=("ffn.gate", "ffn.up"))
DOWN = TargetScope(roles=("ffn.down",))
HEADS = {"lm_head", "embed_out", "cls.predictions.transform.dense", "cls.predictions.decoder"}


def run(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def targets_of(model: nn.Module) -> dict[str, float]:
    return {name: sparsifier.target_sparsity for name, sparsifier in named_sparsifiers(model)}


def thresholds_of(model: nn.Module) -> dict[str, float]:
    return {name: sparsifier.threshold.item() for name, sparsifier in named_sparsifiers(model)}


# ---- What is masked


def test_the_model_is_changed_in_place_and_returned(llama: Any, batches: list[Any]) -> None:
    assert sparsify_activations(llama, batches, {DOWN: 0.5}) is llama
    assert targets_of(llama) == {f"model.layers.{i}.mlp.down_proj": 0.5 for i in (0, 1)}


@pytest.mark.parametrize("is_compressed", [False, True], ids=["dense", "INT8"])
def test_one_number_is_for_every_linear_layer_of_the_blocks(
    architecture: str, is_compressed: bool, make_model: Any, batches: list[Any], compress: Any
) -> None:
    model = make_model(architecture)
    expected = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)} - HEADS
    sparsify_activations(compress(model) if is_compressed else model, batches, 0.25)
    assert targets_of(model) == dict.fromkeys(expected, 0.25)


def test_the_ignored_scope_is_left_out(llama: Any, batches: list[Any]) -> None:
    sparsify_activations(llama, batches, 0.5, nncf.IgnoredScope(patterns=[".*self_attn.*"]))
    assert {name.split(".")[3] for name in targets_of(llama)} == {"mlp"}


def test_each_mask_knows_its_site_roles_and_algorithm(llama: Any, batches: list[Any]) -> None:
    sparsify_activations(llama, batches, {GATE_AND_UP: 0.5}, algorithm="nncf", tokens="decode")
    up = llama.model.layers[1].mlp.up_proj.activation_sparsifier
    assert (up.site, up.roles) == ("model.layers.1.mlp.gate_proj", ("ffn.up",))
    assert (up.algorithm, up.tokens) == ("nncf", "decode")


@pytest.mark.parametrize("is_head_masked", [False, True])
def test_logits_that_nothing_reads_are_not_computed(make_model: Any, batches: list[Any], is_head_masked: bool) -> None:
    model, reference = make_model("llama"), make_model("llama")
    tokens: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, _args, logits: tokens.append(logits.shape[1]))
    targets = {TargetScope(roles=("ffn.down",)): 0.5}
    if is_head_masked:
        targets[TargetScope(names=["lm_head"])] = 0.3
    sparsify_activations(model, batches, targets)
    length = batches[0]["input_ids"].shape[1]
    assert tokens[1:] == [length if is_head_masked else 1] * len(batches)  # the first call is the trace
    # A tuple cannot carry the request, so here all logits are computed: the thresholds are the same.
    as_tuples = [(batch["input_ids"],) for batch in batches]
    sparsify_activations(reference, as_tuples, targets)
    assert thresholds_of(model) == thresholds_of(reference)


def test_layers_of_one_site_share_their_threshold(llama: Any, batches: list[Any]) -> None:
    sparsify_activations(llama, batches, 0.5)
    thresholds = thresholds_of(llama)
    for block in llama.model.layers:
        assert block.mlp.gate_proj.activation_sparsifier.threshold == block.mlp.up_proj.activation_sparsifier.threshold
    assert len(set(thresholds.values())) == 8


def test_a_model_that_nncf_has_wrapped_is_unwrapped(llama: Any, batches: list[Any]) -> None:
    wrapped = nncf.torch.wrap_model(llama, example_input=batches[0], trace_parameters=True)
    assert sparsify_activations(wrapped, batches, {DOWN: 0.5}) is llama  # pyright: ignore[reportArgumentType]
    assert len(targets_of(llama)) == 2


def test_any_iterable_and_any_kind_of_input_will_do(make_model: Any, batches: list[Any]) -> None:
    tokens = [batch["input_ids"] for batch in batches]
    datasets: list[Any] = [
        batches,
        tuple(batches),
        (batch for batch in batches),
        tokens,
        [(batch,) for batch in tokens],
        nncf.Dataset(batches),
        nncf.Dataset(tokens, lambda x: {"input_ids": x}),
    ]
    results = [thresholds_of(sparsify_activations(make_model(), dataset, 0.5)) for dataset in datasets]
    assert all(result == results[0] for result in results)


class Toy(nn.Module):
    """Layers outside any block, one called twice, one that gets its input in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.flat = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flat(torch.relu(self.twice(self.twice(x))).reshape(-1, 4))


def test_a_model_that_is_no_language_model_is_masked_too() -> None:
    data = [torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    model = sparsify_activations(Toy(), data, 0.5)
    report = measure_sparsity(model, data)
    assert [layer.name for layer in report.layers] == ["twice", "flat"]
    assert report.layers[0].sparsity == pytest.approx(0.5, abs=0.03)


# ---- Calling again


def test_a_second_call_replaces_the_first(make_model: Any, batches: list[Any]) -> None:
    twice = sparsify_activations(make_model(), batches, {GATE_AND_UP: 0.9})
    sparsify_activations(twice, batches, {DOWN: 0.5})
    once = sparsify_activations(make_model(), batches, {DOWN: 0.5})
    assert targets_of(twice) == targets_of(once)
    assert thresholds_of(twice) == thresholds_of(once)
    assert torch.equal(run(twice, batches[0]), run(once, batches[0]))


def test_a_second_call_can_add_to_the_first(make_model: Any, batches: list[Any]) -> None:
    model = sparsify_activations(make_model(), batches, {GATE_AND_UP: 0.9})
    before = thresholds_of(model)
    sparsify_activations(model, batches, {DOWN: 0.5}, keep_existing=True)
    assert len(targets_of(model)) == 6
    assert {name: value for name, value in thresholds_of(model).items() if name in before} == before
    # The new masks were calibrated behind the old ones.
    alone = thresholds_of(sparsify_activations(make_model(), batches, {DOWN: 0.5}))
    assert all(thresholds_of(model)[name] < value for name, value in alone.items())


def test_adding_where_a_mask_is_replaces_that_mask(make_model: Any, batches: list[Any]) -> None:
    model = sparsify_activations(make_model(), batches, {GATE_AND_UP: 0.9, DOWN: 0.9})
    sparsify_activations(model, batches, {DOWN: 0.2}, keep_existing=True)
    assert {target for name, target in targets_of(model).items() if "down" in name} == {0.2}
    assert {target for name, target in targets_of(model).items() if "down" not in name} == {0.9}
    assert all(s.is_active for _, s in named_sparsifiers(model))


# ---- Which tokens


def test_decode_masks_only_forwards_of_a_single_token(make_model: Any, batches: list[Any]) -> None:
    dense, model = make_model(), sparsify_activations(make_model(), batches, 0.5, tokens="decode")
    tokens = batches[0]["input_ids"]
    assert torch.equal(run(model, {"input_ids": tokens}), run(dense, {"input_ids": tokens}))
    assert not torch.equal(run(model, {"input_ids": tokens[:, :1]}), run(dense, {"input_ids": tokens[:, :1]}))


def test_generation_is_dense_up_to_the_first_new_token_and_masked_after_it(make_model: Any, batches: list[Any]) -> None:
    dense, model = make_model(), sparsify_activations(make_model(), batches, 0.7, tokens="decode")
    prompt = batches[0]["input_ids"][:1]
    with torch.no_grad():
        outputs = [m(input_ids=prompt, use_cache=True) for m in (dense, model)]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
        new = outputs[0].logits[:, -1:].argmax(-1)
        after = [
            m(input_ids=new, past_key_values=o.past_key_values, use_cache=True).logits
            for m, o in zip((dense, model), outputs, strict=True)
        ]
    assert not torch.equal(after[0], after[1])


def test_the_thresholds_do_not_depend_on_which_tokens_are_masked(make_model: Any, batches: list[Any]) -> None:
    results = [thresholds_of(sparsify_activations(make_model(), batches, 0.5, tokens=t)) for t in ("all", "decode")]
    assert results[0] == results[1]


# ---- A failed call leaves the model as it was


@dataclass(frozen=True)
class FailureCase:
    """Arguments that cannot work, the error that says so, and what it says."""

    name: str
    error: type[Exception]
    message: str
    targets: Any = 0.5
    dataset: Callable[[list[Any]], Any] = lambda batches: batches
    options: tuple[tuple[str, Any], ...] = ()


def give_bad_third(batches: list[Any]) -> list[Any]:
    return [*batches[:2], {"input_ids": torch.full((1, 4), 10_000)}]


def give_bad_first(batches: list[Any]) -> list[Any]:
    return give_bad_third(batches)[::-1]


BAD_TARGETS = [-0.1, 1.1, math.nan, math.inf, "0.5", True]
FAILURES = [
    FailureCase(
        "pattern", ScopeError, r"pattern 'mlp' matches nothing.*; nearest: ", {TargetScope(patterns=["mlp"]): 0.5}
    ),
    FailureCase(
        "name",
        ScopeError,
        r"nearest: model\.layers\.0\.mlp\.up_proj",
        {TargetScope(names=["model.layers.0.mlp.up"]): 0.5},
    ),
    FailureCase("role", ScopeError, r"role 'ffn\.in' matches no layer.*ffn\.up", {TargetScope(roles=("ffn.in",)): 0.5}),
    FailureCase(
        "matched twice",
        ScopeError,
        r"layer model\.layers\.\d\.mlp\.down_proj is matched by multiple",
        {DOWN: 0.5, TargetScope(patterns=[".*mlp.*"]): 0.5},
    ),
    FailureCase("embeddings", ScopeError, "matches no Linear layer", {TargetScope(types=["embedding"]): 0.5}),
    FailureCase("no scope", ScopeError, "target_sparsity_by_scope is empty", {}),
    FailureCase("no target", ScopeError, "target_sparsity_by_scope is missing", None),
    FailureCase("text as a scope", ScopeError, "must be a TargetScope or one of NNCF's scopes", {".*mlp.*": 0.5}),
    *(FailureCase(f"target {t!r}", ScopeError, r"should be a number in range \[0, 1\]", t) for t in BAD_TARGETS),
    *(FailureCase(f"scope's {t!r}", ScopeError, r"for TargetScope\(roles.*in range", {DOWN: t}) for t in BAD_TARGETS),
    FailureCase("nothing left", ScopeError, "No layers", options=(("ignored_scope", TargetScope(types=["linear"])),)),
    FailureCase("ignored text", ScopeError, "ignored_scope must be", options=(("ignored_scope", ".*mlp.*"),)),
    FailureCase("empty dataset", DatasetError, "the calibration dataset is empty", dataset=lambda b: []),
    FailureCase("empty nncf.Dataset", DatasetError, "dataset is empty", dataset=lambda b: nncf.Dataset([])),
    FailureCase(
        "tensor as dataset", DatasetError, "iterable of model inputs, not Tensor", dataset=lambda b: torch.ones(2)
    ),
    FailureCase("text as dataset", DatasetError, "iterable of model inputs, not str", dataset=lambda b: "wikitext"),
    FailureCase("dict as dataset", DatasetError, "iterable of model inputs, not dict", dataset=lambda b: b[0]),
    FailureCase("number as dataset", DatasetError, "iterable of model inputs, not int", dataset=lambda b: 3),
    FailureCase(
        "bad first batch", DatasetError, r"cannot take batch 0 .*\(input_ids: \(1, 4\)\)", dataset=give_bad_first
    ),
    FailureCase(
        "bad third batch", DatasetError, r"cannot take batch 2 .*\(input_ids: \(1, 4\)\)", dataset=give_bad_third
    ),
    FailureCase(
        "algorithm",
        ActsparseError,
        "unknown algorithm 'magnetude'; nearest: magnitude",
        options=(("algorithm", "magnetude"),),
    ),
    FailureCase(
        "tokens", ActsparseError, "tokens must be one of all, decode, not 'prefill'", options=(("tokens", "prefill"),)
    ),
]


@pytest.mark.parametrize("is_masked", [False, True], ids=["dense", "masked before"])
@pytest.mark.parametrize("case", FAILURES, ids=lambda case: case.name)
def test_a_call_that_cannot_work_says_so_in_one_line_and_changes_nothing(
    case: FailureCase, is_masked: bool, llama: Any, batches: list[Any], snapshot: Any
) -> None:
    if is_masked:
        sparsify_activations(llama, batches, {GATE_AND_UP: 0.3})
    llama.model.layers[0].train()
    before = snapshot(llama)
    with pytest.raises(case.error, match=case.message) as caught:
        sparsify_activations(llama, case.dataset(batches), case.targets, **dict(case.options))
    assert len(str(caught.value).splitlines()) == 1
    assert type(caught.value) is case.error
    assert snapshot(llama) == before


@pytest.mark.parametrize("keep_existing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=lambda e: e.__name__)
def test_an_interruption_in_the_middle_of_the_data_changes_nothing(
    error: type[BaseException], keep_existing: bool, llama: Any, batches: list[Any], snapshot: Any
) -> None:
    def generate() -> Iterator[Any]:
        yield from batches[:2]
        raise error

    sparsify_activations(llama, batches, {GATE_AND_UP: 0.3, DOWN: 0.4}, tokens="decode")
    llama.model.layers[1].mlp.train()
    before, logits = snapshot(llama), run(llama, batches[0])
    with pytest.raises(error):
        sparsify_activations(
            llama, generate(), {DOWN: 0.5, TargetScope(roles=("attention.out",)): 0.5}, keep_existing=keep_existing
        )
    assert snapshot(llama) == before
    assert torch.equal(run(llama, batches[0]), logits)


def test_an_interruption_inside_the_model_changes_nothing(
    llama: Any, batches: list[Any], snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    forward = llama.model.layers[1].mlp.act_fn.forward

    def interrupt(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt
        return forward(x)

    before = snapshot(llama)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llama.model.layers[1].mlp.act_fn, "forward", interrupt)
        sparsify_activations(llama, batches, 0.5)
    vars(llama.model.layers[1].mlp.act_fn).pop("forward", None)
    assert snapshot(llama) == before


@pytest.mark.parametrize("algorithm", ["magnitude", "nncf"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_name_their_layer(
    value: float, algorithm: str, llama: Any, batches: list[Any], snapshot: Any
) -> None:
    with torch.no_grad():
        llama.model.layers[1].input_layernorm.weight[3] = value
    before = snapshot(llama)
    message = r"NaN or infinite entries in the input of layer model\.layers\.1\.self_attn\.q_proj"
    with pytest.raises(DatasetError, match=message):
        sparsify_activations(llama, batches, 0.5, algorithm=algorithm)
    # NaN is not equal to itself, so pictures are compared as text.
    assert repr(snapshot(llama)) == repr(before)


class NoLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embedding(x)


class UnusedLinear(NoLinear):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ScopeError, match="NoLinear has no Linear layers to sparsify"):
        sparsify_activations(NoLinear(), [torch.tensor([1])], 0.5)
    with pytest.raises(ScopeError, match="UnusedLinear calls none of its Linear layers on batch 0"):
        sparsify_activations(UnusedLinear(), [torch.tensor([1])], 0.5)


@pytest.mark.parametrize(
    "model", [None, "llama", lambda x: x, torch.ones(1)], ids=["None", "text", "function", "tensor"]
)
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(ActsparseError, match="the model must be a torch module or an OpenVINO model, not"):
        sparsify_activations(model, [torch.ones(1)], 0.5)


class Sometimes(nn.Module):
    """Call the second layer only where the input is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.always(x)
        return self.sometimes(x * 2) if x.shape[0] == 1 else x


def test_a_layer_that_only_the_first_batch_reaches_is_calibrated_on_it() -> None:
    model = sparsify_activations(Sometimes(), [torch.randn(1, 4), torch.randn(3, 4)], 0.5)
    assert all(math.isfinite(value) for value in thresholds_of(model).values())


def test_a_layer_that_no_batch_reaches_while_calibrating_is_named(snapshot: Any) -> None:
    class Once(Sometimes):
        """Reach the second layer in the first call only, which is the one that is traced."""

        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Once.calls += 1
            x = self.always(x)
            return self.sometimes(x * 2) if Once.calls == 1 else x

    model = Once()
    before = snapshot(model)
    with pytest.raises(DatasetError, match="layer sometimes received no activations from the dataset"):
        sparsify_activations(model, [torch.randn(1, 4)], 0.5)
    assert snapshot(model) == before


# ---- Together


def test_compressed_saved_and_loaded_it_is_still_the_same_model(
    make_model: Any, batches: list[Any], compress: Any, tmp_path: Any
) -> None:
    model = compress(sparsify_activations(make_model(), batches, {GATE_AND_UP: 0.3, DOWN: 0.6}, tokens="decode"))
    save_thresholds(model, tmp_path / "thresholds.safetensors")
    twin = load_thresholds(compress(make_model()), tmp_path / "thresholds.safetensors")
    for batch in (batches[0], {"input_ids": torch.tensor([[3]])}):
        assert torch.equal(run(copy.deepcopy(twin), batch), run(model, batch))
