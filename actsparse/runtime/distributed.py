"""Several processes on one job: each takes a share of the data, and what they find is added up."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from actsparse.errors import ActsparseError, shorten_message

T = TypeVar("T")


class ProcessError(ActsparseError):
    """The processes of a job cannot go on together: one of them has stopped, or was given other data."""


@dataclass
class _Team:
    """
    The processes that work together at present, as this one sees them; alone unless `together` says otherwise.

    :param rank: The number of this one.
    :param size: How many they are.
    :param group: What they add up in; None for the process group that `together` has made.
    """

    rank: int = 0
    size: int = 1
    group: Any = None


_team = _Team()


@contextmanager
def together() -> Iterator[None]:
    """
    Work together with the other processes that a launcher has started, or that have joined a process group.

    Inside, every process has to make the same calls with the same arguments, whole datasets included: calibration and
    evaluation share the data out, add up what each process has found, and give every process the same result. Only the
    first process writes files.

    :return: A context in which that happens.
    :raises ProcessError: If the processes cannot find each other.
    """
    is_ours = not dist.is_initialized()
    group: Any = None
    # Everything that is added up lies on the CPU, whatever the models run on: of another's group, which may be NCCL's,
    # the processes are taken, but not the backend.
    with _explain_failures():
        if is_ours:
            dist.init_process_group("gloo")
        else:
            group = dist.new_group(backend="gloo")
    _team.rank, _team.size, _team.group = dist.get_rank(), dist.get_world_size(), group
    try:
        yield
    finally:
        _team.rank, _team.size, _team.group = 0, 1, None
        dist.destroy_process_group(group)


def count_processes() -> int:
    """
    Count the processes that work together.

    :return: How many; 1 outside of `together`.
    """
    return _team.size


def rank() -> int:
    """
    Tell which of the processes this is.

    :return: Its number, from 0 on.
    """
    return _team.rank


def is_first() -> bool:
    """
    Tell whether this process is the one that writes and prints.

    :return: Whether it is.
    """
    return _team.rank == 0


def share(items: Sequence[T]) -> list[T]:
    """
    Take this process's share.

    :param items: What there is to do, the same in every process.
    :return: Every n-th item, n the number of processes.
    """
    return list(items[_team.rank :: _team.size])


def is_own(number: int) -> bool:
    """
    Tell whether an item is of this process's share.

    :param number: Its place among all.
    :return: Whether it is.
    """
    return number % _team.size == _team.rank


def add_up(*tensors: torch.Tensor) -> None:
    """
    Add the same tensors of all processes.

    :param tensors: Tensors on the CPU, each of one shape everywhere; the sums take their place.
    :raises ProcessError: If another process has stopped.
    """
    if _team.size == 1:
        return
    with _explain_failures():
        for tensor in tensors:
            if tensor.numel():
                dist.all_reduce(tensor, group=_team.group)


def add_up_array(values: np.ndarray) -> None:
    """
    Add the same array of all processes.

    :param values: An array of one shape everywhere; the sums take its place.
    :raises ProcessError: If another process has stopped.
    """
    add_up(torch.from_numpy(values))


def require_same(digest: bytes, what: str) -> None:
    """
    Check that all processes have the same.

    :param digest: A hash of what this process has, 32 bytes.
    :param what: What that is, for the message.
    :raises ProcessError: If another process has something else, or has stopped.
    """
    if _team.size == 1:
        return
    mine = torch.tensor(list(digest), dtype=torch.int64)
    first = mine.clone()
    with _explain_failures():
        dist.broadcast(first, 0, group=_team.group)
    differs = torch.tensor([int(not torch.equal(mine, first))])
    add_up(differs)
    if differs.item():
        msg = f"the processes were given different {what}: give each of them all of it, it is shared out among them"
        raise ProcessError(msg)


def wait_for_all() -> None:
    """
    Go on when all processes have come here.

    :raises ProcessError: If another process has stopped.
    """
    add_up(torch.zeros(1))


class Digest:
    """Hash model inputs, one after the other."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, value: Any) -> None:
        """
        Take in a model input.

        :param value: A tensor, an array, a number or a text, or a dict, tuple or list of them.
        """
        if isinstance(value, Mapping):
            for key in sorted(value):
                self._hash.update(repr(key).encode())
                self.add(value[key])
        elif isinstance(value, tuple | list):
            self._hash.update(str(len(value)).encode())
            for item in value:
                self.add(item)
        elif isinstance(value, torch.Tensor):
            self._hash.update(f"{value.dtype}{tuple(value.shape)}".encode())
            self._hash.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            self._hash.update(f"{value.dtype}{value.shape}".encode())
            self._hash.update(value.tobytes())
        elif isinstance(value, int | float | str | bool | None):
            # With an end, so that 1, 23 is not 12, 3.
            self._hash.update(f"{value!r},".encode())

    def finish(self) -> bytes:
        """
        Give the hash.

        :return: 32 bytes.
        """
        return self._hash.digest()


def digest_of(values: Iterable[Any]) -> bytes:
    """
    Hash model inputs.

    :param values: The inputs.
    :return: 32 bytes.
    """
    digest = Digest()
    for value in values:
        digest.add(value)
    return digest.finish()


@contextmanager
def _explain_failures() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ActsparseError):
            raise
        reason = shorten_message(error, 120)
        msg = f"another process of this job has stopped or cannot be reached ({reason}): run the job again"
        raise ProcessError(msg) from error
