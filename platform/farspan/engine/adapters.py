"""The adapters of one engine: by name, in host memory, as many of them on the device as its limit allows.

Requests of different adapters and of none are computed together. Where the adapters of a batch do not fit on the
device at the same time, the batch is computed in several forwards.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.config.serve_rules import check_adapter_name
from farspan.engine.adapter_folder import AdapterFile, read_adapter
from farspan.engine.adapter_trial import try_layers
from farspan.engine.lowrank import BASE
from farspan.engine.path import Path, Runs
from farspan.engine.runner import Piece
from farspan.engine.terms import Terms
from farspan.errors import CheckpointError, ConfigError, EngineError, ModelError, RequestError
from farspan.kv.prefix import OPEN_SCOPE, PrefixScope


class Adapters:
    """Who may be asked for, where their matrices are, and the batches that need them."""

    def __init__(self, model: PreTrainedModel, path: Path, config: EngineConfig) -> None:
        """With the adapters of `config`. Raises what `add` raises."""
        self._model, self._path = model, path
        self._most_bytes = config.adapter_bytes
        self._files: dict[str, AdapterFile] = {}
        self._loaded: OrderedDict[str, int] = OrderedDict()
        self._tried: set[str] = set()
        for name, folder in config.adapters.items():
            self.add(name, folder)

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    @property
    def _known(self) -> str:
        return f"known: {', '.join(self.names)}" if self._files else "this engine has none"

    @property
    def device_bytes(self) -> int:
        """Bytes of the adapters that are on the device."""
        return sum(self._loaded.values())

    def add(self, name: str, folder: str) -> None:
        """Let requests name the adapter of a folder in peft's format, local or on S3.

        Raises:
            ConfigError: the name is taken or illegal, or the adapter is larger than engine.adapter_bytes.
            StorageError: the folder cannot be read, or holds no adapter that this model can serve exactly.
            EngineError: too few pages are free now to try out layers that had no adapter before.
        """
        check_adapter_name(name)
        if name in self._files:
            raise ConfigError("engine.adapters", "must name each adapter once", name, "remove it first")
        file = read_adapter(self._model, folder)
        if file.num_bytes > self._most_bytes:
            raise ConfigError(
                "engine.adapter_bytes",
                f"must hold any adapter, {name} has {file.num_bytes} bytes",
                self._most_bytes,
                f"use at least engine.adapter_bytes={file.num_bytes}",
            )
        modules = dict(self._model.named_modules())
        layers = {layer: modules[layer] for layer in file.pairs}
        new = {layer: module for layer, module in layers.items() if layer not in self._tried}
        try:
            if new:
                try_layers(self._model, self._path, new)
        except ModelError as problem:
            raise CheckpointError(folder, f"{problem}; merge the adapter into its model and serve that") from None
        self._tried |= new.keys()
        self._path.lowrank.attach(layers)
        self._files[name] = file

    def remove(self, name: str, users: Sequence[str]) -> None:
        """Forget an adapter. `users`: ids of the requests that go on with it.

        Raises EngineError when there are any, or the adapter is not known.
        """
        if name not in self._files:
            raise EngineError(f"no adapter {name!r} is here; {self._known}")
        if users:
            raise EngineError(
                f"adapter {name!r} is used by {len(users)} requests ({', '.join(users[:3])}); wait for or cancel them"
            )
        self._unload(name)
        self._path.lowrank.detach(list(self._files.pop(name).pairs))

    def scope(self, adapter: str, scope: PrefixScope = OPEN_SCOPE) -> PrefixScope:
        """`scope` for keys and values that were computed with an adapter: by what it holds, not by its name."""
        return scope if adapter == BASE else replace(scope, adapter=self._files[adapter].digest)

    def terms(self, request_id: str, terms: Terms) -> Terms:
        """A request's terms with the scope of its adapter. Raises RequestError when the adapter is not known."""
        if terms.adapter != BASE and terms.adapter not in self._files:
            raise RequestError(request_id, f"no adapter {terms.adapter!r} is here; {self._known}")
        return replace(terms, scope=self.scope(terms.adapter, terms.scope))

    def run(self, runner: Runs, pieces: Sequence[Piece]) -> Tensor:
        """Logits [R, V] of a batch, as the model's runner gives them where the adapters fit on the device together."""
        turns = self._turns({piece.adapter for piece in pieces} - {BASE})
        if len(turns) == 1:
            self._load(turns[0])
            return runner.run(pieces)
        rows = list(accumulate((piece.num_logits for piece in pieces), initial=0))
        found: dict[int, Tensor] = {}
        for number, names in enumerate(turns):
            # Whoever uses no adapter goes with the first.
            here = [i for i, p in enumerate(pieces) if p.adapter in names or (p.adapter == BASE and number == 0)]
            self._load(names)
            logits_RV = runner.run([pieces[i] for i in here])
            parts = logits_RV.split([rows[i + 1] - rows[i] for i in here])
            found |= dict(zip(here, parts, strict=True))
        return torch.cat([found[i] for i in range(len(pieces))])

    def _turns(self, names: AbstractSet[str]) -> list[set[str]]:
        """Adapters that are on the device together, forward by forward; those that are there already come first."""
        turns: list[set[str]] = [set()]
        room = self._most_bytes
        for name in sorted(names, key=lambda name: (name not in self._loaded, name)):
            needed = self._files[name].num_bytes
            if needed > room:
                turns.append(set())
                room = self._most_bytes
            turns[-1].add(name)
            room -= needed
        return turns

    def _load(self, names: AbstractSet[str]) -> None:
        """Bring adapters to the device; those that were used longest ago leave it for them."""
        for name in names & self._loaded.keys():
            self._loaded.move_to_end(name)
        for name in sorted(names - self._loaded.keys()):
            file = self._files[name]
            while self.device_bytes + file.num_bytes > self._most_bytes:
                self._unload(next(iter(self._loaded)))
            device = self._path.pool.device
            self._path.lowrank.pairs[name] = {layer: pair.to(device) for layer, pair in file.pairs.items()}
            self._loaded[name] = file.num_bytes

    def _unload(self, name: str) -> None:
        if self._loaded.pop(name, None) is not None:
            del self._path.lowrank.pairs[name]
