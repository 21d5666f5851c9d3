"""What can be laid out together, and what cannot."""

from typing import Any

import numpy as np
import pytest

from actsparse.openvino.packing import pack_rows, pack_site
from actsparse.openvino.weights import UnsupportedWeightsError, Weights


def make_weights(kind: str, groups: int, width: int = 96) -> Weights:
    """Make a layer of 64 outputs."""
    values = np.zeros((64, width), np.uint8)
    return Weights(kind, values, np.ones((64, groups), np.float32), np.zeros((64, groups), np.uint8))


@pytest.mark.parametrize(
    "other",
    [make_weights("u8", 1), make_weights("u4", 3), make_weights("u4", 2, width=192)],
    ids=["type", "group size", "input channels"],
)
def test_layers_that_differ_cannot_be_one_site(other: Any) -> None:
    threshold = np.zeros(96, np.float32)
    layer = make_weights("u4", 2)
    assert pack_site([layer, layer], threshold).out_features == (64, 64)
    with pytest.raises(UnsupportedWeightsError, match="its layers are compressed in different ways"):
        pack_site([layer, other], threshold)


def test_rows_take_groups_of_whole_lines() -> None:
    threshold = np.zeros(64, np.float32)
    assert pack_rows(make_weights("u4", 3, width=192), threshold).group_size == 64
    with pytest.raises(UnsupportedWeightsError, match="its groups of 48 are no multiple of 64"):
        pack_rows(make_weights("u4", 2), threshold)
