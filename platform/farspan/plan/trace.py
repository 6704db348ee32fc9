"""Trace a transformers model without weights or a device: what it keeps and computes, by sequence length.

Shapes: T tokens, H query heads, G key/value heads, D head dim of q and k, C of v, E model width.

Two layers of each kind run forward and backward on fake tensors at a few lengths, in up to four ways (with and without
recomputing layers, with and without MLP and norms in tiles); polynomials through the lengths stand for all others.
Attention is an operation that keeps what every strategy keeps (q, k, v, out, log-sum-exp) and whose operations are
counted by formula, because they depend on windows and documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from farspan.errors import ModelError
from farspan.models.attention import packed_hidden
from farspan.models.parts import named_token_norms, trunk_and_head
from farspan.plan.fake import MIXER, Kind, Shell, fake_tensors, make_shell, mlp_of
from farspan.plan.meter import Meter, SavedBytes
from farspan.plan.profile import (
    ALIVE,
    KEPT,
    MOVED,
    LayerBytes,
    LayerKind,
    LossCost,
    ModelProfile,
    Outside,
    Pass,
    Poly,
    Quadratic,
    Work,
)
from farspan.plan.stubs import MixerStub, OneDocument, Tiled, WatchedAttention, replaced
from farspan.plan.watch import Run, Seen, Windows

# No power of two, so that no tensor of tokens has the shape of a weight; so long that no constant hides a slope.
LENGTHS = (20_160, 36_544, 69_312)
# Recurrent layers are computed in chunks of 64, one after another: multiples of it, and few.
RECURRENT_LENGTHS = (128, 192, 320)
# A square term is named when it is more than this share of the linear ones at 128K tokens.
_QUADRATIC_SHARE, _FLAG_TOKENS = 0.01, 131_072


def trace_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, attention: str = "farspan"
) -> ModelProfile:
    """The profile of a decoder. `attention` names another of transformers' implementations, to compare with.

    Raises:
        ModelError: the model does something a trace cannot follow.
    """
    with _followed(config):
        return _Trace(make_shell(config, dtype, attention), dtype, attention).profile()


def trace_layers(config: PretrainedConfig, dtype: torch.dtype, *, tiled: bool) -> tuple[LayerBytes, ...]:
    """Every layer, alike ones beside each other; one short trace, where `trace_model` makes a dozen.

    Raises:
        ModelError: the model does something a trace cannot follow.
    """
    with _followed(config):
        return _Trace(make_shell(config, dtype), dtype, "farspan").layers(tiled)


@contextmanager
def _followed(config: PretrainedConfig) -> Iterator[None]:
    try:
        with fake_tensors():
            yield
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, IndexError) as problem:
        name = config.get_text_config(decoder=True).model_type
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(f"{name}: cannot be traced without weights ({type(problem).__name__}: {reason})") from problem


class _Trace:
    """All runs of one model; a way to run it is (MLPs in tiles, mixers left out)."""

    def __init__(self, shell: Shell, dtype: torch.dtype, attention: str) -> None:
        self.shell, self.dtype, self.attention = shell, dtype, attention
        recurrent = any(kind.rule.recurrent for kind in shell.kinds)
        self.lengths = RECURRENT_LENGTHS if recurrent else LENGTHS
        self.text = shell.model.config.get_text_config(decoder=True)
        self.watch = WatchedAttention()

    def profile(self) -> ModelProfile:
        plain, again = self._both([])
        mlps = self._mlps()
        tiles = self._tiles(mlps)
        tiled = self._both(tiles) if mlps else None
        mixers = [(x, MIXER, MixerStub()) for x in self.shell.layers if hasattr(x, MIXER)]
        rest = self._both(mixers) if mixers else None
        kinds = []
        for kind in self.shell.kinds:
            mlp_peak = self._mlp_peak(self.shell.layers[kind.shown])
            kinds.append(
                LayerKind(
                    name=_name(kind, self.shell.kinds),
                    count=kind.count,
                    width=self.text.hidden_size,
                    num_parameters=kind.num_parameters,
                    boundary=_fit(self.lengths, [run.layers[kind.shown].boundary for run in again]),
                    whole=self._pass(kind, plain, again),
                    tiled=self._pass(kind, *tiled) if tiled is not None and mlp_peak is not None else None,
                    rest=self._pass(kind, *rest) if rest is not None and kind.rule.recurrent else None,
                    mlp_peak=mlp_peak or Poly(),
                    attention=self.watch.shapes.get(kind.shown),
                    products=_fit(self.lengths, [run.layers[kind.shown].forward_products for run in plain]),
                    attention_out=Poly(c1=float(self._attention_out(kind))),
                )
            )
        return ModelProfile(
            name=self.text.model_type,
            kinds=tuple(kinds),
            num_parameters=self.shell.num_parameters,
            root_parameters=self.shell.root_parameters,
            lora_width=self.shell.lora_width,
            width=self.text.hidden_size,
            vocab_size=self.text.vocab_size,
            itemsize=self.dtype.itemsize,
            outside_layers=self._ends(plain),
            outside_tiled=self._ends(tiled[0] if tiled is not None else plain),
            outside=Work(
                _fit(self.lengths, [run.outside_flops for run in plain]),
                _fit(self.lengths, [run.outside_moved for run in plain]),
            ),
            loss=self._loss(),
            quadratics=(*_quadratics(self.lengths, plain), *_quadratic_traffic(kinds)),
            max_positions=getattr(self.text, "max_position_embeddings", None),
        )

    def layers(self, tiled: bool) -> tuple[LayerBytes, ...]:
        """Every layer of the real model, by one run at one length: what it keeps grows with its tokens."""
        tokens, found = self.lengths[-1 if self.lengths is RECURRENT_LENGTHS else 0], list[LayerBytes]()
        with replaced(self._tiles(self._mlps()) if tiled else []):
            run = self._run(tokens, recompute=False)
        for kind in self.shell.kinds:
            seen, out = run.layers[kind.shown], self._attention_out(kind)
            found += kind.count * [LayerBytes(seen.saved / tokens, seen.forward_products / tokens, out)]
        return tuple(found)

    def _attention_out(self, kind: Kind) -> int:
        shape = self.watch.shapes.get(kind.shown)
        return 0 if shape is None else shape.out_bytes(self.dtype.itemsize)

    def _mlps(self) -> list[tuple[nn.Module, str]]:
        return [(x, mlp[0]) for x in self.shell.layers if (mlp := mlp_of(x)) is not None]

    def _tiles(self, mlps: list[tuple[nn.Module, str]]) -> list[tuple[nn.Module, str, nn.Module]]:
        return [(*part, Tiled()) for part in (*mlps, *named_token_norms(self.shell.model))]

    def _both(self, parts: Iterable[tuple[nn.Module, str, nn.Module]]) -> tuple[list[Run], list[Run]]:
        """Runs at all lengths with modules replaced by `parts`: keeping everything, and recomputing layers."""
        with replaced(parts):
            plain, again = ([self._run(tokens, recompute) for tokens in self.lengths] for recompute in (False, True))
        return plain, again

    def _run(self, tokens: int, recompute: bool) -> Run:
        """Forward and backward of the trunk over one document of `tokens`."""
        model = self.shell.model
        _set_recompute(model, recompute)
        meter, run = Meter(model.parameters()), Run([Seen() for _ in self.shell.layers])
        tokens_T, positions_T = (torch.zeros(tokens, dtype=torch.long) for _ in range(2))
        saved = SavedBytes([*model.parameters(), *model.buffers(), tokens_T, positions_T])
        windows = Windows(meter, saved, run, self.shell.layers, self.watch, recompute)
        with windows.hooked(model), meter:
            with saved.counting(meter):
                hidden_TE = self._hidden(tokens_T, positions_T)
            run.kept, run.largest = dict(saved.by_maker), dict(meter.largest)
            run.outside_saved = saved.total - sum(layer.saved for layer in run.layers)
            windows.forward_done()
            hidden_TE.backward(torch.empty_like(hidden_TE))
            windows.backward_done()
        run.outside_flops = meter.flops - sum(x.forward_flops + x.backward_flops for x in run.layers)
        run.outside_moved = meter.moved - sum(x.forward_moved + x.backward_moved for x in run.layers)
        model.zero_grad(set_to_none=True)
        return run

    def _hidden(self, tokens_T: Tensor, positions_T: Tensor) -> Tensor:
        if self.attention == "farspan":
            # A stub in a mixer's place has no documents to run over.
            return packed_hidden(self.shell.model, tokens_T, positions_T, self.watch, OneDocument(tokens_T.numel()))
        trunk, _ = trunk_and_head(self.shell.model)
        output = trunk(input_ids=tokens_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0), use_cache=False)
        return cast(Tensor, output.last_hidden_state[0])

    def _mlp_peak(self, layer: nn.Module) -> Poly | None:
        found = mlp_of(layer)
        if found is None:
            return None
        peaks = []
        for tokens in self.lengths:
            x_1TE = torch.empty(1, tokens, self.text.hidden_size, dtype=self.dtype, requires_grad=True)
            grad_1TE = torch.empty_like(x_1TE)
            with Meter(self.shell.model.parameters()) as meter:
                found[1](x_1TE).backward(grad_1TE)
            peaks.append(meter.peak)
            self.shell.model.zero_grad(set_to_none=True)
        return _fit(self.lengths, peaks)

    def _loss(self) -> LossCost:
        _, head = trunk_and_head(self.shell.model)
        rows = []
        for tokens in self.lengths:
            hidden_TE = torch.empty(tokens, self.text.hidden_size, dtype=self.dtype, requires_grad=True)
            labels_T = torch.zeros(tokens, dtype=torch.long)
            saved = SavedBytes([*self.shell.model.parameters(), labels_T])
            with Meter(self.shell.model.parameters()) as meter:
                with saved.counting(meter):
                    wide = head(hidden_TE).to(torch.promote_types(self.dtype, torch.float32))
                    nll = nn.functional.cross_entropy(wide, labels_T, reduction="sum")
                    del wide
                forward = (meter.flops, meter.moved)
                nll.backward()
            rows.append((saved.total, meter.peak, *forward, meter.flops - forward[0], meter.moved - forward[1]))
            self.shell.model.zero_grad(set_to_none=True)
        kept, peak, *works = (_fit(self.lengths, column) for column in zip(*rows, strict=True))
        return LossCost(kept, peak, Work(works[0], works[1]), Work(works[2], works[3]))

    def _ends(self, runs: list[Run]) -> Outside:
        names = ("outside_saved", "tail_saved", "tail_peak")
        return Outside(*(_fit(self.lengths, [getattr(run, name) for run in runs]) for name in names))

    def _pass(self, kind: Kind, plain: list[Run], again: list[Run]) -> Pass:
        seen, recomputed = [run.layers[kind.shown] for run in plain], [run.layers[kind.shown] for run in again]

        def fit(layers: list[Seen], name: str) -> Poly:
            return _fit(self.lengths, [getattr(layer, name) for layer in layers])

        # The gradient that comes in has the shape of the layer's input.
        incoming = fit(recomputed, "boundary")
        return Pass(
            saved=fit(seen, "saved"),
            forward_peak=fit(seen, "forward_peak"),
            backward_peak=fit(seen, "backward_peak") + incoming,
            recompute_peak=fit(recomputed, "backward_peak") + incoming,
            forward=Work(fit(seen, "forward_flops"), fit(seen, "forward_moved")),
            backward=Work(fit(seen, "backward_flops"), fit(seen, "backward_moved")),
        )


def _set_recompute(model: nn.Module, recompute: bool) -> None:
    names = ("activation_checkpointing", "gradient_checkpointing")
    # transformers renamed it in 5.x; the old name goes in v6.
    name = next(name for name in names if hasattr(model, f"{name}_enable"))
    if recompute:
        getattr(model, f"{name}_enable")({"use_reentrant": False, "preserve_rng_state": False})
    else:
        getattr(model, f"{name}_disable")()
    model.train()


def _quadratics(lengths: Sequence[int], runs: list[Run]) -> tuple[Quadratic, ...]:
    found = []
    for how, tables in ((KEPT, [run.kept for run in runs]), (ALIVE, [run.largest for run in runs])):
        polys = {name: _fit(lengths, [table.get(name, 0) for table in tables]) for name in tables[-1] if name}
        # A layer keeps many bytes of a token: a square that stays below one in a hundred of them changes no plan.
        all_linear = max((poly.c1 for poly in polys.values()), default=0.0)
        for name, poly in polys.items():
            # A kink between two lengths also bends a parabola, but never upwards from nothing.
            if min(poly.c0, poly.c1) >= 0 and poly.c2 * _FLAG_TOKENS > _QUADRATIC_SHARE * max(poly.c1, all_linear):
                found.append(Quadratic(name, poly.c2, how))
    named = {quadratic.where for quadratic in found if quadratic.how == KEPT}
    return tuple(x for x in found if x.how == KEPT or x.where not in named)


def _quadratic_traffic(kinds: Sequence[LayerKind]) -> Iterator[Quadratic]:
    """Kinds of layers that read and write more than their share: slow, even where nothing of it stays."""
    for kind in kinds:
        for name, work in (("forward", kind.whole.forward), ("backward", kind.whole.backward)):
            if work.moved.c2 * _FLAG_TOKENS > _QUADRATIC_SHARE * work.moved.c1:
                yield Quadratic(f"{kind.name} layers, {name}", work.moved.c2, MOVED)


def _fit(lengths: Sequence[int], values: Sequence[int]) -> Poly:
    """The parabola through three values, in exact fractions: a square that is not there is exactly 0."""
    (a, b, c), (u, v, w) = lengths, (Fraction(value) for value in values)
    slope = (v - u) / (b - a)
    c2 = ((w - v) / (c - b) - slope) / (c - a)
    c1 = slope - c2 * (a + b)
    return Poly(float(u - a * (c1 + a * c2)), float(c1), float(c2))


def _name(kind: Kind, kinds: Sequence[Kind]) -> str:
    alike = [other for other in kinds if other.rule == kind.rule]
    name = "recurrent" if kind.rule.recurrent else str(kind.rule)
    return name if len(alike) == 1 else f"{name} ({kind.num_parameters / 1e6:.0f} M parameters)"
