"""Lay weights out as the kernels read them: see extension/weights.hpp, and extension/rows.hpp for single rows."""

from dataclasses import dataclass, replace

import numpy as np

from actsparse.openvino.weights import UnsupportedWeightsError, Weights

# The orders that weights are laid out in: rows of input channels, and as OpenVINO has them, in a constant of their own.
# An extension refuses what it does not know.
LAYOUT = 1
PLAIN_LAYOUT = 2
# What a single row is read by, and padded to.
ROW_LINE = 64
# Outputs that a row of a full panel holds, and the multiple that outputs are padded to.
PANEL_OUTPUTS = {"u8": 1024, "u4": 2048, "f16": 512, "bf16": 512}
OUTPUT_MULTIPLE = {"u8": 64, "u4": 128, "f16": 64, "bf16": 64}

# Byte 16 l + 4 v + d of a line holds output 16 v + 4 l + d.
LINE_ORDER = np.array([16 * v + 4 * lane + d for lane in range(4) for v in range(4) for d in range(4)])


@dataclass(frozen=True)
class PackedSite:
    """
    The weights of all layers of a site, as the extension's operations take them.

    :param type: u8, u4, f16 or bf16.
    :param scale_type: f32 or f16.
    :param group_size: Input channels that share a scale (u4), else 0.
    :param data: uint8 [bytes]: thresholds, weights, for u8 and u4 weights scales and zero points, and the bias.
    """

    type: str
    scale_type: str
    in_features: int
    group_size: int
    out_features: tuple[int, ...]
    data: np.ndarray
    layout: int = LAYOUT
    has_bias: bool = False

    def attributes(self) -> dict[str, object]:
        """Return what the operations need to be told of the bytes."""
        return {
            "weight_type": self.type,
            "scale_type": self.scale_type,
            "in_features": self.in_features,
            "group_size": self.group_size,
            "out_features": list(self.out_features),
            "layout": self.layout,
            "has_bias": self.has_bias,
        }

    def with_bias(self, bias: np.ndarray) -> "PackedSite":
        """Add a bias.

        :param bias: float32 [out_features of all layers]: what is added to the outputs of masked runs.
        """
        padded = np.pad(bias.astype(np.float32), (0, -len(bias) % OUTPUT_MULTIPLE[self.type]))
        return replace(self, data=np.concatenate([self.data, _padded_bytes(padded)]), has_bias=True)


def pack_site(layers: list[Weights], threshold: np.ndarray) -> PackedSite:
    """Pack the layers of one site together.

    :param layers: Weights of the same type, group size and input channels.
    :param threshold: float32 [in_features]: |x| <= threshold becomes 0.
    :raises UnsupportedWeightsError: If they differ in these.
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


def pack_plain(layer: Weights, threshold: np.ndarray) -> PackedSite:
    """Pack all of a layer but its weights, which stay where they are.

    :param layer: Its weights, u8.
    :param threshold: float32 [in_features]: |x| <= threshold becomes 0.
    """
    padding = -len(layer.values) % OUTPUT_MULTIPLE[layer.type]
    parts = [np.ascontiguousarray(threshold, np.float32)]
    parts += [np.pad(part[:, 0].astype(np.float32), (0, padding)) for part in (layer.scale, layer.zero)]  # type: ignore[index]
    out_features, in_features = layer.values.shape
    data = np.concatenate([_padded_bytes(part) for part in parts])
    return PackedSite(layer.type, "f32", in_features, 0, (out_features,), data, PLAIN_LAYOUT)


def pack_rows(layer: Weights, threshold: np.ndarray) -> PackedSite:
    """Pack a layer row by row.

    :param layer: Its weights.
    :param threshold: float32 [out_features]: where the gate is up to it, the row is not read.
    :raises UnsupportedWeightsError: If groups are not whole lines of the kernel.
    """
    if layer.type == "u4" and layer.group_size % ROW_LINE:
        message = f"its groups of {layer.group_size} are no multiple of {ROW_LINE}, which rows are read by"
        raise UnsupportedWeightsError(message)
    rows, in_features = layer.values.shape
    values = np.pad(layer.values, [(0, 0), (0, -in_features % ROW_LINE)])
    if layer.type == "u4":
        lines = values.reshape(rows, -1, 2, ROW_LINE // 2)
        values = lines[:, :, 0] | lines[:, :, 1] << 4
    parts = [np.ascontiguousarray(threshold, np.float32), values]
    scale_type = "f32"
    if layer.scale is not None and layer.zero is not None:
        is_half = layer.type == "u4" and layer.scale.dtype == np.float16
        scale_type = "f16" if is_half else "f32"
        parts += [layer.scale.astype(np.float16 if is_half else np.float32)]
        parts += [layer.zero.astype(np.float32 if layer.type == "u8" else np.uint8)]
    return PackedSite(
        type=layer.type,
        scale_type=scale_type,
        in_features=in_features,
        group_size=layer.group_size if layer.type == "u4" else 0,
        out_features=(rows,),
        data=np.concatenate([_padded_bytes(part) for part in parts]),
    )


def _padded_bytes(part: np.ndarray) -> np.ndarray:
    data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    return np.pad(data, (0, -len(data) % 64))


def _pack_rows(values: np.ndarray, type_name: str) -> np.ndarray:
    """Return one panel as bytes [in_features, bytes]."""
    rows = np.ascontiguousarray(values.T)
    if type_name in {"f16", "bf16"}:
        return rows.view(np.uint8)
    lines = rows.reshape(len(rows), -1, 64)[:, :, LINE_ORDER]
    if type_name == "u4":
        lines = lines[:, 0::2] | lines[:, 1::2] << 4
    return np.ascontiguousarray(lines).reshape(len(rows), -1)
