"""INT4 weights learnt from data: what NNCF is asked for, and what is refused."""

from typing import Any

import nncf
import openvino as ov
import pytest

from actsparse.errors import ActsparseError, DatasetError
from actsparse.openvino import compression
from actsparse.openvino.compression import compress_int4_aware
from actsparse.openvino.layers import named_calls
from actsparse.openvino.runner import Runner
from actsparse.openvino.weights import read_weights


@pytest.mark.parametrize("methods", [{}, {"awq": False, "gptq": True}], ids=["AWQ and SE", "GPTQ with SE"])
def test_the_layers_of_blocks_become_int4_and_the_rest_int8(
    methods: Any, openvino_llama: ov.Model, batches: list[Any]
) -> None:
    model = compress_int4_aware(openvino_llama, batches, group_size=16, **methods)
    for name, (call, *_) in named_calls(model).items():
        weights = read_weights(call)
        assert weights.type == ("u8" if name == "lm_head" else "u4")
        # 32 channels in two groups of 16, 48 in three.
        assert name == "lm_head" or weights.group_size == 16
    assert Runner(model).run(batches[0])["logits"].shape == (2, 16, 64)


def test_scales_learnt_from_data_keep_more_of_what_the_model_computes(
    make_openvino_model: Any, make_batches: Any
) -> None:
    batches = make_batches(16)
    expected = Runner(make_openvino_model()).run(batches[0])["logits"].copy()

    def error(model: ov.Model) -> float:
        return float(((Runner(model).run(batches[0])["logits"] - expected) ** 2).sum())

    plain = nncf.compress_weights(
        make_openvino_model(), mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=16, ratio=1.0
    )
    aware = compress_int4_aware(make_openvino_model(), batches, group_size=16, awq=False)
    assert error(aware) < error(plain)


def test_nncf_gets_every_input_and_all_of_the_data(
    openvino_llama: ov.Model, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def take(model: ov.Model, **options: Any) -> ov.Model:
        asked.update(options)
        return model

    monkeypatch.setattr(nncf, "compress_weights", take)
    compress_int4_aware(openvino_llama, iter(batches), is_symmetric=True, gptq=True)
    inputs = {port.get_any_name() for port in openvino_llama.inputs}
    given = list(asked.pop("dataset").get_inference_data())
    assert len(given) == len(batches) == asked["subset_size"]
    assert all(batch.keys() == inputs for batch in given)
    assert (asked["mode"], asked["group_size"]) == (nncf.CompressWeightsMode.INT4_SYM, 64)
    assert asked["awq"]
    assert asked["scale_estimation"]
    assert asked["gptq"]


def test_what_cannot_be_done_is_one_line(
    openvino_llama: ov.Model, batches: list[Any], picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = picture(openvino_llama)
    with pytest.raises(ActsparseError, match="are all off: nothing is left to learn from data"):
        compress_int4_aware(openvino_llama, batches, awq=False, scale_estimation=False)
    with pytest.raises(DatasetError, match="^the dataset to compress weights with is empty$"):
        compress_int4_aware(openvino_llama, [])
    with pytest.raises(DatasetError, match="cannot take batch 1 of the dataset"):
        compress_int4_aware(openvino_llama, [batches[0], {"words": batches[0]["input_ids"]}])
    assert picture(openvino_llama) == before

    def refuse(model: Any, **options: Any) -> None:
        del model, options
        msg = "not\nthis"
        raise nncf.ValidationError(msg)

    monkeypatch.setattr(compression.nncf, "compress_weights", refuse)
    with pytest.raises(ActsparseError, match="^nncf cannot compress the weights to INT4 with data: not this$"):
        compress_int4_aware(openvino_llama, batches)
