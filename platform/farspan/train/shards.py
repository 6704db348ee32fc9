"""A checkpoint in pieces: each rank keeps the rows of every tensor it holds, and any number of ranks reads them back.

A tensor of `rows` rows over n ranks is cut as FSDP2 cuts it: rank r has rows r * ceil(rows / n) and the following ones.
So who holds what follows from (rows, n) alone, and a rank of another world reads exactly the rows it needs.
What is not cut (step counts, buffers) is the same everywhere and is kept by rank 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from farspan.errors import CorruptDataError
from farspan.optim.shards import local_of

SHARDS, _FILE = "shards.json", "shard.safetensors"
_WEIGHTS, _STATES, _BUFFERS = "weights/", "states/", "buffers/"


@dataclass(frozen=True)
class ShardIndex:
    """What the pieces of one checkpoint are."""

    num_ranks: int
    rows: dict[str, int]
    """Tensors that are cut, and their rows in all."""
    whole: list[str]
    """Tensors that are not."""
    digests: list[str]
    """Of each rank's folder, so that pieces of two checkpoints are never mixed."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def read(folder: Path) -> ShardIndex | None:
        """The index of a checkpoint; None when it is an ordinary folder."""
        if not (folder / SHARDS).is_file():
            return None
        try:
            return ShardIndex(**json.loads((folder / SHARDS).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as problem:
            raise CorruptDataError(str(folder), f"{SHARDS} is not an index of shards ({problem})") from None

    def needed(self, rank: int, num_ranks: int) -> list[int]:
        """The ranks that wrote something which `rank` of `num_ranks` reads."""
        wanted = {0}
        for rows in self.rows.values():
            start, stop = rows_of(rows, rank, num_ranks)
            wanted |= {r for r in range(self.num_ranks) if _overlap(rows_of(rows, r, self.num_ranks), (start, stop))}
        return sorted(wanted)


@dataclass(frozen=True)
class Piece:
    """What one rank writes."""

    tensors: dict[str, Tensor]
    rows: dict[str, int]
    whole: list[str]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        # The file is never empty: a rank may hold no row at all.
        save_file({"held": torch.tensor([len(self.tensors)]), **self.tensors}, folder / _FILE)


def rows_of(rows: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """First row and end of what `rank` holds."""
    each = -(-rows // num_ranks)
    return min(rows, rank * each), min(rows, (rank + 1) * each)


def copy_piece(module: nn.Module, held: Mapping[str, Tensor], rank: int, num_ranks: int) -> Piece:
    """A copy on the CPU of what this rank holds (`WeightsEngine.held`); nothing is gathered, not collective."""
    weights = dict(module.named_parameters())
    tensors: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    whole: list[str] = []
    for name, tensor in held.items():
        total = _rows_in_all(weights[_weight_of(name)], tensor, num_ranks)
        if total is None:
            whole.append(name)
        else:
            rows[name] = total
            start, stop = rows_of(total, rank, num_ranks)
            assert tensor.shape[0] == stop - start, f"{name} is cut in another way than by equal rows"
        if tensor.numel() > 0 and (total is not None or rank == 0):
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    for name, buffer in _saved_buffers(module).items():
        whole.append(_BUFFERS + name)
        if rank == 0:
            tensors[_BUFFERS + name] = buffer.detach().to("cpu", copy=True).contiguous()
    return Piece(tensors, rows, whole)


def read_piece(
    index: ShardIndex, folders: Mapping[int, Path], rank: int, num_ranks: int, module: nn.Module
) -> dict[str, Tensor]:
    """What `rank` of `num_ranks` holds, read from the pieces of any other number; buffers go into `module` at once."""
    buffers = _saved_buffers(module)
    held: dict[str, Tensor] = {}
    with _Open(folders) as files:
        for name, rows in index.rows.items():
            held[name] = files.rows(index, name, *rows_of(rows, rank, num_ranks))
        for name in index.whole:
            tensor = files.whole(name)
            if name.startswith(_BUFFERS):
                with torch.no_grad():
                    buffers[name.removeprefix(_BUFFERS)].copy_(tensor)
            else:
                held[name] = tensor
    return held


def read_whole(index: ShardIndex, folders: Mapping[int, Path]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights and buffers by the module's names, optimizer states by `<weight>/<state>`), all of them whole."""
    weights: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    with _Open(folders) as files:
        for name in [*index.rows, *index.whole]:
            tensor = files.rows(index, name, 0, index.rows[name]) if name in index.rows else files.whole(name)
            kind, _, rest = name.partition("/")
            (states if kind == "states" else weights)[rest] = tensor
    return weights, states


class _Open:
    """The pieces' files, opened when first read."""

    def __init__(self, folders: Mapping[int, Path]) -> None:
        self._folders = folders
        self._files: dict[int, safe_open] = {}

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def whole(self, name: str) -> Tensor:
        return self._of(0, lambda file: file.get_tensor(name))

    def rows(self, index: ShardIndex, name: str, start: int, stop: int) -> Tensor:
        parts = []
        for rank in range(index.num_ranks):
            first, end = rows_of(index.rows[name], rank, index.num_ranks)
            low, high = max(first, start), min(end, stop)
            if low < high:
                parts.append(self._of(rank, partial(_slice, name, low - first, high - first)))
        if parts:
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        # No row of it is this rank's: an empty tensor of the right width and type.
        return self._of(0, partial(_slice, name, 0, 0))

    def _of(self, rank: int, read: Callable[[safe_open], Tensor]) -> Tensor:
        folder = self._folders[rank]
        try:
            if rank not in self._files:
                self._files[rank] = safe_open(folder / _FILE, framework="pt")
            return read(self._files[rank])
        except (OSError, ValueError, RuntimeError, KeyError) as problem:
            raise CorruptDataError(str(folder), f"{_FILE} does not hold what its index says ({problem})") from None
        except Exception as problem:
            # safetensors has an exception of its own for a damaged file.
            raise CorruptDataError(str(folder), f"{_FILE} cannot be read ({problem})") from None


def _slice(name: str, start: int, stop: int, file: safe_open) -> Tensor:
    return cast(Tensor, file.get_slice(name)[start:stop])


def _weight_of(name: str) -> str:
    kind, _, rest = name.partition("/")
    return rest if kind == "weights" else rest.rpartition("/")[0]


def _rows_in_all(weight: Tensor, tensor: Tensor, num_ranks: int) -> int | None:
    """Rows of the whole tensor; None when it is not cut. Scales of 8-bit states have the rows of their weight.

    A single rank holds one piece of everything, so that any number of ranks can go on from it.
    """
    cut = isinstance(weight, DTensor) or num_ranks == 1
    if not cut or tensor.ndim == 0 or tensor.shape[0] != local_of(weight).shape[0]:
        return None
    return int(weight.shape[0])


def _saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    saved = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])
