"""Lay weights out as the kernel reads them: input-major within panels of outputs (see extension/weights.hpp)."""

from dataclasses import dataclass

import numpy as np

from actsparse.openvino.weights import UnsupportedWeightsError, Weights

ROW_BYTES = 1024
# Outputs that a row of a full panel holds, and the multiple that outputs are padded to.
PANEL_OUTPUTS = {"u8": 1024, "u4": 2048, "f16": 512, "bf16": 512}
OUTPUT_MULTIPLE = {"u8": 64, "u4": 128, "f16": 64, "bf16": 64}

# Byte 16 l + 4 v + d of a line holds output 16 v + 4 l + d.
LINE_ORDER = np.array([16 * v + 4 * lane + d for lane in range(4) for v in range(4) for d in range(4)])


@dataclass(frozen=True)
class PackedSite:
    """The weights of all layers of a site, as the extension's operations take them.

    :param type: u8, u4, f16 or bf16.
    :param scale_type: f32 or f16.
    :param in_features: Of all layers.
    :param group_size: Input channels that share a scale (u4), else 0.
    :param out_features: Of each layer.
    :param data: uint8 [bytes]: thresholds, weights, and for u8 and u4 weights scales and zero points.
    """

    type: str
    scale_type: str
    in_features: int
    group_size: int
    out_features: tuple[int, ...]
    data: np.ndarray

    def attributes(self) -> dict[str, object]:
        """Return what the operations need to be told of the bytes."""
        return {
            "weight_type": self.type,
            "scale_type": self.scale_type,
            "in_features": self.in_features,
            "group_size": self.group_size,
            "out_features": list(self.out_features),
        }


def pack_site(layers: list[Weights], threshold: np.ndarray) -> PackedSite:
    """Pack the layers of one site together.

    :param layers: Weights of the same type, group size and input channels.
    :param threshold: float32 [in_features]: |x| <= threshold becomes 0.
    :raises UnsupportedWeightsError: If they differ, or if groups are not whole passes of the kernel.
    """
    first = layers[0]
    if len({(layer.type, layer.group_size, layer.values.shape[1]) for layer in layers}) > 1:
        message = "its layers are compressed in different ways"
        raise UnsupportedWeightsError(message)
    values = np.concatenate([layer.values for layer in layers])
    padding = -len(values) % OUTPUT_MULTIPLE[first.type]
    values = np.pad(values, [(0, padding), (0, 0)])
    width = PANEL_OUTPUTS[first.type]
    rows = [_pack_rows(values[begin : begin + width], first.type) for begin in range(0, len(values), width)]
    parts = [np.ascontiguousarray(threshold, np.float32), np.concatenate([row.reshape(-1) for row in rows])]
    scale_type = "f32"
    scales = [layer.scale for layer in layers if layer.scale is not None]
    zeros = [layer.zero for layer in layers if layer.zero is not None]
    if scales:
        scale = np.pad(np.concatenate(scales), [(0, padding), (0, 0)])
        zero = np.pad(np.concatenate(zeros), [(0, padding), (0, 0)])
        if first.type == "u8":
            parts += [scale[:, 0].astype(np.float32), zero[:, 0].astype(np.float32)]
        else:
            scale_type = "f16" if scale.dtype == np.float16 else "f32"
            parts += [scale.T.astype(np.float16 if scale_type == "f16" else np.float32), zero.T.astype(np.uint8)]
    return PackedSite(
        type=first.type,
        scale_type=scale_type,
        in_features=first.values.shape[1],
        group_size=first.group_size if first.type == "u4" else 0,
        out_features=tuple(len(layer.values) for layer in layers),
        data=np.concatenate([_padded_bytes(part) for part in parts]),
    )


def _padded_bytes(part: np.ndarray) -> np.ndarray:
    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    return np.pad(data, (0, -len(data) % 64))


def _pack_rows(values: np.ndarray, type_name: str) -> np.ndarray:
    """Return one panel as bytes [in_features, bytes].

    :param values: [outputs of the panel, in_features].
    """
    rows = np.ascontiguousarray(values.T)
    if type_name in {"f16", "bf16"}:
        return rows.view(np.uint8)
    lines = rows.reshape(len(rows), -1, 64)[:, :, LINE_ORDER]
    if type_name == "u4":
        lines = lines[:, 0::2] | lines[:, 1::2] << 4
    return np.ascontiguousarray(lines).reshape(len(rows), -1)
