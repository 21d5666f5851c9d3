"""The state of an interrupted recovery: one safetensors file, replaced as a whole."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from actsparse.errors import SourceError, shorten_message
from actsparse.storage.files import kind_of, write_bytes

FORMAT = "actsparse.recovery"


@dataclass
class Checkpoint:
    """
    Where a recovery stands.

    :param looks: What was seen of the held-out data, as JSON holds it.
    :param tensors: By kind and parameter, such as ``trained/model.layers.0.mlp.up_proj.weight``.
    """

    step: int = 0
    looks: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def of_kind(self, kind: str) -> dict[str, torch.Tensor]:
        """Select tensors."""
        return {name.removeprefix(f"{kind}/"): t for name, t in self.tensors.items() if name.startswith(f"{kind}/")}


def write_checkpoint(path: Path, checkpoint: Checkpoint, run: str) -> None:
    """
    Write a checkpoint.

    :raises OutputError: If it cannot be written; an earlier one is then still there.
    """
    state = json.dumps({"step": checkpoint.step, "looks": checkpoint.looks})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    write_bytes(path, save(tensors, {"format": FORMAT, "run": run, "state": state}))


def read_checkpoint(path: Path, run: str) -> Checkpoint:
    """
    Read a checkpoint.

    :param path: The file; where there is none, the run starts at step 0.
    :raises SourceError: If the file is not one, or belongs to another run.
    """
    if kind_of(path) is None:
        return Checkpoint()
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(metadata["state"])
        found = Checkpoint(int(state["step"]), list(state["looks"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        msg = f"{path} is no checkpoint of a recovery: {shorten_message(error)}"
        raise SourceError(msg) from None
    if metadata.get("format") != FORMAT or metadata.get("run") != run:
        msg = f"{path} belongs to a recovery of another model, other data or other settings; remove it to start anew"
        raise SourceError(msg)
    return found
