"""Attribution: formulas by hand and by autograd, masks of every generated token, and figures that are measured once."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from typer.testing import CliRunner

from actsparse.cli import app
from actsparse.commands.studies.attribution import METRICS, AttributionJob, parse_ratios, run_attribution, study
from actsparse.commands.studies.attribution.bound import drop_units
from actsparse.commands.studies.attribution.decoding import Decoding
from actsparse.commands.studies.attribution.masks import oracle_masks, static_masks
from actsparse.commands.studies.attribution.recording import Recording, record
from actsparse.commands.studies.attribution.replay import replay
from actsparse.commands.studies.units import HEADS, NEURONS, UnitLayer, find_units
from actsparse.errors import ActsparseError, ScopeError
from actsparse.texts.questions import load_questions

pytestmark = pytest.mark.slow

PROMPTS = [[1, 2, 3, 4], [5, 6], [9, 8, 7]]
EXAMPLE = {"input_ids": torch.ones(1, 4, dtype=torch.long)}

# One token; two heads of two entries; and two neurons.
O = torch.tensor([[[3.0, 4.0], [0.0, -2.0]]])  # noqa: E741
G = torch.tensor([[[1.0, -1.0], [2.0, 2.0]]])
BY_HAND = {
    "magnitude": [5.0, 2.0],
    "gradient": [0.0, -2.0],
    "gxo": [0.5, 2.0],
    "snip": [0.5, 2.0],
    "ig": [0.5, 2.0],
    # The means of g are 0 and 2.
    "corrected-gxo": [0.5 + 0.5 * 5 * 2, 2.0 + 0.5 * 2 * 2],
}


def ignore(_steps: int) -> None:
    pass


def begin(model: Any, prompts: list[list[int]] = PROMPTS) -> tuple[dict[str, UnitLayer], Decoding]:
    layers = find_units(model, EXAMPLE)
    return layers, Decoding.begin(model, list(layers), prompts)


def record_texts(model: Any, most: int = 5, **options: Any) -> tuple[dict[str, UnitLayer], Decoding, Recording]:
    layers, decoding = begin(model)
    return layers, decoding, record(decoding, ends=(), most=most, advance=ignore, **options)


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_of_heads_are_those_computed_by_hand(metric: str) -> None:
    assert METRICS[metric](O, G).tolist() == [BY_HAND[metric]]


def test_metrics_of_neurons_are_those_of_heads_of_one_entry() -> None:
    o, g = torch.tensor([[3.0], [-4.0]]), torch.tensor([[0.6], [0.8]])
    found = {name: [round(x, 6) for x in metric(o, g).tolist()] for name, metric in METRICS.items()}
    assert found == {
        "magnitude": [3.0, 4.0],
        "gradient": [-0.6, -0.8],
        "gxo": [-1.8, 3.2],
        "snip": [1.8, 3.2],
        "ig": [-1.8, 3.2],
        # The norm of g is 1.
        "corrected-gxo": [-0.3, 5.2],
    }


def test_units_are_found_by_role_on_any_architecture(
    make_model: Callable[..., PreTrainedModel], architecture: str
) -> None:
    model = make_model(architecture)
    layers = find_units(model, EXAMPLE)
    heads = [layer for layer in layers.values() if layer.kind == HEADS]
    neurons = [layer for layer in layers.values() if layer.kind == NEURONS]
    assert [(layer.count, layer.width) for layer in heads] == [(4, 8)] * 2
    assert [(layer.count, layer.width) for layer in neurons] == [(48, 1)] * 2
    # By hand: q, k, v and o, grouped queries or not; two or three matrices of 32 x 48.
    shared = {"gpt2": 4, "gpt_neox": 4, "opt": 4, "bert": 4}.get(architecture, 3)
    assert heads[0].parameters == shared * 32 * 32
    plain = architecture in ("gpt2", "gpt_neox", "opt", "bert")
    assert neurons[0].parameters == (2 if plain else 3) * 32 * 48


def test_experts_are_refused(make_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ActsparseError, match="has experts"):
        find_units(make_model("mixtral"), EXAMPLE)


def test_a_model_without_attention_has_no_heads() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    model.config = type("Config", (), {"num_attention_heads": 2})()  # type: ignore[assignment]
    with pytest.raises(ScopeError, match="no heads were found"):
        find_units(model, (torch.ones(1, 4),))  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "phi3", "mistral", "gpt2", "gpt_neox", "opt"])
def test_what_is_recorded_is_what_the_model_generates(
    make_model: Callable[..., PreTrainedModel], architecture: str
) -> None:
    model = make_model(architecture)
    model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    _, _, recording = record_texts(model)
    for number, prompt in enumerate(PROMPTS):
        # The model's own generation, one prompt at a time and without padding.
        ids = torch.tensor([prompt])
        generated: Any = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert recording.labels[:, number].tolist() == generated[0, len(prompt) :].tolist()


def read_last(model: Any, ids: torch.Tensor, label: torch.Tensor, layer: str, share: float = 1.0) -> Any:
    """Run a whole text; o of a layer at the last token, scaled, and the gradient of the loss of what follows."""
    seen: list[torch.Tensor] = []

    def scale(_module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        seen.append(args[0].detach()[:, -1:].requires_grad_())
        return (torch.cat([args[0][:, :-1], share * seen[0]], dim=1),)

    handle = model.get_submodule(layer).register_forward_pre_hook(scale)
    loss = F.cross_entropy(model(ids).logits[0, -1], label)
    handle.remove()
    (gradient,) = torch.autograd.grad(loss, seen)
    return seen[0].detach()[0, 0], gradient[0, 0] / share


@pytest.mark.parametrize("metric", METRICS)
def test_scores_are_those_of_autograd_on_the_whole_text(llama: PreTrainedModel, metric: str) -> None:
    steps = 4
    layers, _, recording = record_texts(llama, ig_steps=steps)
    assert {layer.kind for layer in layers.values()} == {HEADS, NEURONS}
    for name, layer in layers.items():
        for text, prompt in enumerate(PROMPTS):
            for token in (0, 3):
                ids = torch.tensor([prompt + recording.labels[:token, text].tolist()])
                label = recording.labels[token, text]
                # In one pass over the whole text, without cache or padding, the last position's gradient is its own.
                shares = [(k + 1) / steps for k in range(steps)] if metric == "ig" else [1.0]
                found = [read_last(llama, ids, label, name, share) for share in shares]
                o, g = layer.split(found[0][0]), layer.split(torch.stack([g for _, g in found]).mean(0))
                expected = METRICS[metric](o, g)
                torch.testing.assert_close(recording.score(metric, layer)[token, text], expected, rtol=5e-3, atol=1e-5)


def test_integrated_gradients_are_complete(llama: PreTrainedModel) -> None:
    layers, decoding, recording = record_texts(llama, most=2, ig_steps=500)
    for name, layer in layers.items():
        # Without the layer's whole output: by completeness, the loss grows by what all units are worth together.
        def silence(other: str, x: torch.Tensor, name: str = name) -> torch.Tensor:
            return torch.zeros_like(x) if other == name else x

        with torch.no_grad():
            logits, _ = decoding.repeat(1).step(silence)
        without = F.cross_entropy(logits, recording.labels[0], reduction="none")
        dense = -recording.log_probabilities[0].gather(1, recording.labels[0][:, None])[:, 0]
        worth = recording.score("ig", layer)[0].sum(-1) * layer.width
        torch.testing.assert_close(worth, without - dense, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_switched_off_changes_nothing(llama: PreTrainedModel, metric: str) -> None:
    layers, decoding, recording = record_texts(llama, ig_steps=2)
    found = replay(decoding, recording, layers, oracle_masks(recording, layers, metric, "both", 0.0), ignore)
    assert found.tokens.tolist() == recording.labels.tolist()
    assert found.divergence.abs().max() < 1e-5
    assert found.sparsity == 0


def test_the_least_units_are_switched_off_from_the_first_token_on(llama: PreTrainedModel) -> None:
    layers, decoding, recording = record_texts(llama)
    seen: dict[tuple[int, str], torch.Tensor] = {}
    masks = oracle_masks(recording, layers, "magnitude", "both", 0.5)

    def watch(step: int, name: str, x: torch.Tensor) -> torch.Tensor | None:
        keep = masks(step, name, x)
        assert keep is not None
        seen[step, name] = keep
        return keep

    found = replay(decoding, recording, layers, watch, ignore)
    assert {step for step, _ in seen} == set(range(5))
    for (step, name), keep in seen.items():
        layer = layers[name]
        kept = layer.split(keep[:, 0])
        assert kept.shape[:2] == (2 * len(PROMPTS), layer.count)
        # Whole units, half of them, alike in the free and in the fed copy, and none weaker than one that is off.
        assert (kept.all(-1) == kept.any(-1)).all()
        assert (kept[..., 0].sum(-1) == layer.count // 2).all()
        assert torch.equal(kept[0::2], kept[1::2])
        strength = layer.split(recording.outputs[name][step]).norm(dim=-1)
        on = kept[0::2, :, 0]
        least, most = strength.masked_fill(~on, torch.inf).amin(-1), strength.masked_fill(on, -1).amax(-1)
        assert (least >= most).all()
    assert found.sparsity == pytest.approx(0.5)
    assert found.divergence.min() > 0.01


def test_sparsity_counts_the_weights_of_what_is_masked(llama: PreTrainedModel) -> None:
    layers, decoding, recording = record_texts(llama)
    parameters = {kind: sum(x.parameters for x in layers.values() if x.kind == kind) for kind in (HEADS, NEURONS)}
    for where in (HEADS, NEURONS):
        found = replay(decoding, recording, layers, oracle_masks(recording, layers, "gxo", where, 0.5), ignore)
        assert found.sparsity == pytest.approx(0.5 * parameters[where] / sum(parameters.values()))


def test_texts_do_not_see_each_other(llama: PreTrainedModel) -> None:
    layers, decoding, recording = record_texts(llama)
    together = replay(decoding, recording, layers, oracle_masks(recording, layers, "gxo", "both", 0.5), ignore)
    for number, prompt in enumerate(PROMPTS):
        layers, decoding = begin(llama, [prompt])
        alone = record(decoding, ends=(), most=5, advance=ignore)
        masks = oracle_masks(alone, layers, "gxo", "both", 0.5)
        found = replay(decoding, alone, layers, masks, ignore)
        assert found.tokens[:, 0].tolist() == together.tokens[:, number].tolist()
        assert found.divergence[0] == pytest.approx(float(together.divergence[number]), rel=1e-3)


def test_static_masks_are_those_of_the_sparsified_model(llama: PreTrainedModel) -> None:
    layers, decoding, recording = record_texts(llama)
    name = next(name for name, layer in layers.items() if layer.kind == NEURONS)
    threshold = recording.outputs[name].abs().median()
    found = replay(decoding, recording, layers, static_masks({name: threshold}), ignore)
    share = layers[name].parameters / sum(layer.parameters for layer in layers.values())
    assert 0.3 * share < found.sparsity < 0.7 * share


def test_the_end_of_a_text_ends_what_is_counted(llama: PreTrainedModel) -> None:
    _, decoding = begin(llama)
    whole = record(decoding, ends=(), most=5, advance=ignore)
    end = int(whole.labels[1, 0])
    cut = record(decoding, ends=(end,), most=5, advance=ignore)
    labels = whole.labels.T.tolist()
    expected = [text.index(end) + 1 if end in text else 5 for text in labels]
    assert cut.is_label.sum(0).tolist() == [min(n, len(cut.labels)) for n in expected]


def test_the_bound_is_compared_with_what_really_happens(llama: PreTrainedModel) -> None:
    layers = find_units(llama, EXAMPLE)
    found = drop_units(llama, layers, PROMPTS, tokens=2, sample=6)
    assert set(found) == {HEADS, NEURONS}
    for kind, sampled in ((HEADS, 4), (NEURONS, 6)):
        drops = found[kind]
        assert len(drops.true) == 2 * 2 * sampled * len(PROMPTS)
        assert (drops.bound >= abs(drops.first_order) - 1e-6).all()
        summary = drops.to_dict()
        assert 0 <= summary["between_0_and_bound"] <= summary["within_bound"] <= 1
        # To first order GxO is the change itself.
        assert drops.ranks["gxo"] > 0.3


@pytest.mark.parametrize(
    ("text", "ratios"),
    [
        ("0:0.9:0.3", (0.0, 0.3, 0.6, 0.9)),
        ("0.5,0.8", (0.5, 0.8)),
        ("0.5:0.5:1", (0.5,)),
        ("0:0.2:0.1", (0.0, 0.1, 0.2)),
    ],
)
def test_ratios_are_read(text: str, ratios: tuple[float, ...]) -> None:
    assert parse_ratios(text) == ratios


@pytest.mark.parametrize("text", ["a", "0:1", "0:0.9:0", "0:0.9:-0.1", "1:0:0.1", "0:nan:0.1", "0:9e99:1e-99", "0:::"])
def test_what_are_no_ratios_is_refused(text: str) -> None:
    with pytest.raises(ActsparseError, match="--ratios takes"):
        parse_ratios(text)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.csv"
    rows = ["Type,Question", "x,the of and?", "y,to in a is", '"z","that for, it"']
    path.write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    return path


@pytest.fixture
def job(files: Path, questions: Path, tmp_path: Path) -> AttributionJob:
    return AttributionJob(
        model=str(files / "model"),
        out=tmp_path / "out",
        questions=str(questions),
        metrics=("magnitude", "gxo"),
        ratios=(0.0, 0.5),
        modes=("oracle", "static"),
        max_tokens=4,
        batch=2,
        calibration=str(files / "calibration.txt"),
        num_batches=2,
    )


def test_a_study_writes_curves_and_asks_nothing_twice(job: AttributionJob, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    curves = run_attribution(job, said.append)
    assert [(p.mode, p.metric, p.ratio) for p in curves.points] == [
        (mode, metric, ratio) for mode in job.modes for metric in job.metrics for ratio in job.ratios
    ]
    for point in curves.points:
        if point.ratio == 0:
            assert (point.exact_match, point.agreement) == (1, 1)
        else:
            assert point.kl_divergence > 0
            assert point.kl_low <= point.kl_divergence <= point.kl_high
    names = {"attribution.json", "attribution.csv", "attribution.png", "attribution.pdf", "points", "thresholds"}
    assert {path.name for path in job.out.iterdir()} == names
    assert len(list((job.out / "thresholds").iterdir())) == 2
    with (job.out / "attribution.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    report = json.loads((job.out / "attribution.json").read_bytes())
    assert len(report["points"]) == 8
    monkeypatch.setattr(study, "load_model", lambda *_args, **_kwargs: pytest.fail("the model was loaded"))
    assert run_attribution(job, said.append).points == curves.points
    assert any("measured before" in line for line in said)


def test_a_retrained_model_is_asked_again(job: AttributionJob, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(job.model, tmp_path / "model"))
    job = AttributionJob(**{**job.__dict__, "model": str(folder), "metrics": ("gxo",)})
    said: list[str] = []
    run_attribution(job, said.append)
    os.utime(folder / "model.safetensors", ns=(0, 1))
    said.clear()
    run_attribution(job, said.append)
    assert not any("measured before" in line for line in said)
    # Thresholds are found on the model that they mask.
    assert "calibrating gxo at 0.5" in said
    run_attribution(job, said.append)
    assert any("measured before" in line for line in said)


def test_an_interrupted_study_goes_on(job: AttributionJob, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_attribution(job, lambda _line: None)
    paths = sorted((job.out / "points").iterdir())
    paths[0].unlink()
    paths[1].write_text('{"rows": [{"rat')
    written: list[Path] = []
    real = study.write_json
    monkeypatch.setattr(study, "write_json", lambda path, rows: (written.append(path), real(path, rows)))
    again = run_attribution(job, lambda _line: None)
    assert sorted(written) == paths[:2]
    assert again.points == whole.points


def test_more_ratios_are_added_to_those_that_are_there(job: AttributionJob) -> None:
    first = run_attribution(job, lambda _line: None)
    more = run_attribution(AttributionJob(**{**job.__dict__, "ratios": (0.8,)}), lambda _line: None)
    assert {point.ratio for point in more.points} == {0.8}
    said: list[str] = []
    assert run_attribution(job, said.append).points == first.points
    assert any("measured before" in line for line in said)


def test_a_metric_without_a_static_form_is_left_out_there(job: AttributionJob) -> None:
    lines = AttributionJob(**{**job.__dict__, "metrics": ("gxo", "ig")}).lines
    assert [(line.mode, line.metric) for line in lines] == [("oracle", "gxo"), ("oracle", "ig"), ("static", "gxo")]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metrics": ("magnitude", "gxoo")}, "--metrics takes .* nearest: gxo"),
        ({"modes": ("dynamic",)}, "--mode takes oracle, static"),
        ({"where": "layers"}, "--where takes heads, neurons, both"),
        ({"metrics": ("ig",), "modes": ("static",)}, "ig has no static form"),
        ({"ratios": (1.0,)}, "--ratios takes shares"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"prompt": "Q:"}, "--prompt must say where"),
        ({"metrics": ()}, "--metrics takes"),
    ],
)
def test_a_wrong_option_is_refused(job: AttributionJob, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ActsparseError, match=message):
        AttributionJob(**{**job.__dict__, **changed})


def test_questions_come_from_csv_and_json_lines(questions: Path, tmp_path: Path) -> None:
    assert load_questions(questions) == ("the of and?", "to in a is", "that for, it")
    lines = tmp_path / "q.jsonl"
    lines.write_text('{"id": 1, "question": "why?"}\n\n{"question": "how?"}\n')
    assert load_questions(lines, number=1) == ("why?",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", "a,b\n1,2\n", "row 1 of q.csv has no field 'question'"),
        ("q.csv", "question\n", "has 0 questions"),
        ("q.csv", 'question\n"open', "not a readable CSV"),
        ("q.jsonl", '{"question": 3}\n', "row 1 of q.jsonl has no field 'question' with text"),
        ("q.jsonl", "nonsense\n", "line 1 of q.jsonl is not JSON"),
        ("q.jsonl", "[1]\n", "not a JSON object"),
        ("q.txt", "why?", "is no source of questions"),
        ("missing.csv", None, "there is no file"),
    ],
)
def test_questions_that_cannot_be_read_are_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ActsparseError, match=message):
        load_questions(tmp_path / name)


def test_the_command_prints_tables_and_refuses_in_one_line(job: AttributionJob) -> None:
    arguments = ["attribution", job.model, "--out", str(job.out), "--questions", job.questions, "--num", "2"]
    result = CliRunner().invoke(
        app, [*arguments, "--metrics", "gxo", "--ratios", "0,0.5", "--max-tokens", "3", "--where", "neurons"]
    )
    assert result.exit_code == 0, result.output
    assert "BLEU against the dense model's own texts" in result.output
    assert "oracle" in result.output


@pytest.mark.real_model
def test_the_default_model_keeps_its_answer_without_the_units_that_matter_least(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("Question\nWhat happens to you if you eat watermelon seeds?\n")
    job = AttributionJob(
        model="default",
        out=tmp_path / "out",
        questions=str(tmp_path / "q.csv"),
        metrics=("gradient", "corrected-gxo"),
        ratios=(0.0, 0.3),
        max_tokens=8,
    )
    found = {(p.metric, p.ratio): p for p in run_attribution(job, lambda _line: None).points}
    assert found["corrected-gxo", 0.0].bleu == pytest.approx(100)
    assert found["corrected-gxo", 0.3].kl_divergence < found["gradient", 0.3].kl_divergence
    assert json.loads((tmp_path / "out" / "attribution.json").read_bytes())["settings"]["questions"] == "1 of q.csv"
