"""How attention of a packed batch reads and writes pages, under any transformers decoder.

One function is registered in transformers' attention registry. It finds what this forward needs to know in a keyword
that was passed to the model's forward: nothing is global, and a model that drops the keyword is not run packed.
Keys are kept as the model hands them over (after rotation, after the expansion of latent ones), one store for each
call of attention in a forward; a call that gets the very keys of an earlier one reads the earlier one's store.

Shapes: T packed tokens, H query heads, G key/value heads, D head dim of q and k, C head dim of v, S keys,
B decode rows, N query heads per key/value head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from farspan.errors import ModelError
from farspan.kernels.attention.contract import Forward
from farspan.kernels.merge.sink import merge_sinks
from farspan.kernels.paged_decode.contract import AttendPages
from farspan.kernels.paged_decode.shared import attend_shared_prefix
from farspan.kernels.paged_decode.tokens import Rows, TokensOfLayer, bind_tokens
from farspan.kernels.paged_decode.write import write_pages
from farspan.kernels.paged_prefill.contract import AttendPrompts, Prompts
from farspan.kv.pages import PagePool
from farspan.models.rules import LayerRule

ATTENTION_NAME = "farspan_paged"
KEYWORD = "farspan_attend"
_UNSUPPORTED = {
    "position_bias": "a bias by position",
    "indexer": "sparse attention by an index",
    "block_mask": "a mask of its own",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What one call of attention says beside q, k and v."""

    scale: float
    softcap: float | None = None
    sinks_H: Tensor | None = None


class Attend(Protocol):
    """What the keyword carries."""

    def __call__(
        self, module: nn.Module, window: int | None, q_THD: Tensor, k_TGD: Tensor, v_TGC: Tensor, asked: Asked
    ) -> Tensor:
        """Attention output [T, H, C] of the next call of this forward. `window`: what the call says, if it does."""
        ...


def register_attention() -> None:
    """Make `farspan_paged` known to transformers; doing it again changes nothing.

    No mask function goes with it: transformers then builds no mask at all.
    """
    AttentionInterface.register(ATTENTION_NAME, paged_attention)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: q [1, H, T, D], k [1, G, T, D], v [1, G, T, C] -> [1, T, H, C]."""
    attend: Attend | None = kwargs.get(KEYWORD)
    name = type(module).__name__
    if attend is None:
        raise ModelError(f"{name} does not pass forward keywords on to its attention")
    wanted = [meaning for keyword, meaning in _UNSUPPORTED.items() if kwargs.get(keyword) is not None]
    if attention_mask is not None:
        wanted.append("a mask of its own")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        wanted.append("attention to later tokens")
    if wanted:
        raise ModelError(f"{name} wants {' and '.join(wanted)}, which paged attention does not compute")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    q_THD, k_TGD, v_TGC = (x[0].transpose(0, 1) for x in (query, key, value))
    asked = Asked(scale, softcap, None if s_aux is None else s_aux.flatten())
    return attend(module, sliding_window, q_THD, k_TGD, v_TGC, asked).unsqueeze(0), None


@dataclass(frozen=True, slots=True)
class Call:
    """One call of attention in every forward of a model."""

    rule: LayerRule
    store: int
    """Which layer of the pages holds its keys."""
    writes: bool
    """False: an earlier call of the same forward has written them."""
    kernel: Forward
    """For tokens of a prompt."""
    pages: AttendPages
    """For single tokens of many sequences."""
    group: int = 0
    """Which group of layers that store belongs to: the page table of its keys."""
    prompts: AttendPrompts | None = None
    """For tokens of all prompts at once, from their pages; none: `kernel` computes one after the other."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start..start+length of the packed batch continue one sequence that has `past` tokens in `pages`.

    Of whatever position, and in any order, where nothing but the whole past is seen; else of the slots' own order.
    """

    start: int
    length: int
    past: int
    pages_NG: Tensor
    """A page of each group for every place; those that nobody reads any more are not there."""

    def ranges(self, rule: LayerRule) -> list[tuple[int, int, int]]:
        """(first query, end of queries, first key) in tokens of the sequence; queries see up to themselves."""
        begin, end = self.past, self.past + self.length
        if rule.chunk is None:
            return [(begin, end, first_visible(begin, rule))]
        edges = [begin, *range(begin - begin % rule.chunk + rule.chunk, end, rule.chunk), end]
        return [(a, b, a - a % rule.chunk) for a, b in pairwise(edges)]


Positions = TypeVar("Positions", int, npt.NDArray[np.int64])


def first_visible(position: Positions, rule: LayerRule) -> Positions:
    """The first token that the one at `position` sees; of one position, or of each of many."""
    first = position * 0
    if rule.window is not None:
        first = _later(first, position + 1 - rule.window)
    if rule.chunk is not None:
        first = _later(first, position - position % rule.chunk)
    return first


def _later(a: Positions, b: Positions) -> Positions:
    return a + (b - a) * (b > a)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """B packed tokens from `start` on, one per sequence, attended in one call over pages."""

    start: int
    tables_BN: Tensor
    """Pages of one group, from the first that each row sees."""
    lengths_B: Tensor
    """Tokens from the first of those pages up to the row's own."""
    prefix_N: Tensor | None = None
    """Full pages that all rows see before those: read once."""
    prefix_length_1: Tensor | None = None


class BoundTokens:
    """For each call of a forward the kernel that decodes with its pages, made when it is first asked for."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[int, float, float | None], TokensOfLayer | None] = {}

    def of(self, number: int, call: Call, asked: Asked, pool: PagePool, num_heads: int) -> TokensOfLayer | None:
        key = number, asked.scale, asked.softcap
        if key not in self._kernels:
            pages, window = (pool.keys_PSGD(call.store), pool.values_PSGC(call.store)), call.rule.window
            self._kernels[key] = bind_tokens(
                call.pages, *pages, num_heads, scale=asked.scale, window=window, softcap=asked.softcap
            )
        return self._kernels[key]


class PagedBatch:
    """One forward's pages: for each rule and group of layers, parts in the order of the packed tokens.

    Counts the calls: good for one forward.
    """

    def __init__(
        self,
        pool: PagePool,
        calls: Sequence[Call],
        page_TG: Tensor,
        slot_T: Tensor,
        parts: Mapping[tuple[LayerRule, int], Sequence[DecodeRows | Segment]],
        tokens: BoundTokens | None = None,
    ) -> None:
        """`tokens`: the kernels of its calls, kept from batch to batch."""
        self._pool, self._calls = pool, calls
        self._page_TG, self._slot_T = page_TG, slot_T
        self._parts = parts
        self._tokens = tokens
        # Batches that are nothing but decode rows without a common beginning.
        self._whole = {
            key: Rows(page_TG[:, key[1]], slot_T, of[0].tables_BN, of[0].lengths_B)
            for key, of in parts.items()
            if len(of) == 1 and isinstance(of[0], DecodeRows) and of[0].prefix_N is None
        }
        self._prompts: dict[tuple[LayerRule, int, int], Prompts] = {}
        self._next = 0

    def __call__(
        self, module: nn.Module, window: int | None, q_THD: Tensor, k_TGD: Tensor, v_TGC: Tensor, asked: Asked
    ) -> Tensor:
        number, call = self._next, self._calls[self._next]
        self._next += 1
        rows = self._whole.get((call.rule, call.group))
        if rows is not None and self._tokens is not None and call.writes and asked.sinks_H is None:
            kernel = self._tokens.of(number, call, asked, self._pool, q_THD.shape[1])
            if kernel is not None:
                return kernel(q_THD, k_TGD, v_TGC, rows)
        keys_PSGD, values_PSGC = self._pool.keys_PSGD(call.store), self._pool.values_PSGC(call.store)
        if call.writes:
            write_pages(keys_PSGD, values_PSGC, k_TGD, v_TGC, self._page_TG[:, call.group], self._slot_T)
        outs: list[Tensor] = []
        for together, parts in groupby(self._parts[call.rule, call.group], lambda part: isinstance(part, Segment)):
            if together and call.prompts is not None:
                segments = [part for part in parts if isinstance(part, Segment)]
                prompts = self._prompts_of(segments, call)
                outs.append(
                    _attend_prompts(call.prompts, q_THD, keys_PSGD, values_PSGC, segments, prompts, call, asked)
                )
                continue
            for part in parts:
                if isinstance(part, DecodeRows):
                    here = slice(part.start, part.start + len(part.tables_BN))
                    outs.append(_attend_rows(q_THD[here], keys_PSGD, values_PSGC, part, call, asked))
                else:
                    here = slice(part.start, part.start + part.length)
                    new = _Keys(k_TGD[here], v_TGC[here], keys_PSGD, values_PSGC, part, call.group)
                    outs += _attend_segment(q_THD[here], new, part, call, asked)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _prompts_of(self, segments: Sequence[Segment], call: Call) -> Prompts:
        """Worked out once for all layers of a rule and group."""
        key = call.rule, call.group, segments[0].start
        if key not in self._prompts:
            sizes = self._pool.num_pages, self._pool.layout.page_tokens
            self._prompts[key] = list_prompts(segments, call.rule, call.group, *sizes)
        return self._prompts[key]


def list_prompts(segments: Sequence[Segment], rule: LayerRule, group: int, num_pages: int, page_tokens: int) -> Prompts:
    """Segments that lie one after the other, as the kernel of all prompts takes them."""
    numbers: list[tuple[int, int, int, int]] = []
    tables: list[npt.NDArray[np.int64]] = []
    for segment in segments:
        table_N = segment.pages_NG[:, group].numpy()
        for begin, end, low in segment.ranges(rule):
            numbers.append((segment.start - segments[0].start + begin - segment.past, end - begin, begin, low))
            # What nobody sees any more may be gone.
            tables.append(np.zeros(-(-end // page_tokens), np.int64))
            tables[-1][low // page_tokens :] = table_N[low // page_tokens : len(tables[-1])]
    tables_BN = np.zeros((len(tables), max(map(len, tables))), np.int64)
    for row_N, table_N in zip(tables_BN, tables, strict=True):
        row_N[: len(table_N)] = table_N
    # A page that is gone must not become another's by losing its upper bits.
    assert tables_BN.max() < num_pages, "a prompt sees a page that was given back"
    columns = (torch.tensor(column, dtype=torch.int32) for column in zip(*numbers, strict=True))
    starts_B, lengths_B, pasts_B, lows_B = columns
    return Prompts(starts_B, lengths_B, pasts_B, lows_B, torch.from_numpy(tables_BN.astype(np.int32)))


def _attend_prompts(
    attend: AttendPrompts,
    q_THD: Tensor,
    keys_PSGD: Tensor,
    values_PSGC: Tensor,
    segments: Sequence[Segment],
    prompts: Prompts,
    call: Call,
    asked: Asked,
) -> Tensor:
    here = slice(segments[0].start, segments[-1].start + segments[-1].length)
    rule: dict[str, Any] = {"scale": asked.scale, "window": call.rule.window, "softcap": asked.softcap}
    out_THC, lse_TH = attend(q_THD[here], keys_PSGD, values_PSGC, prompts, **rule)
    return out_THC if asked.sinks_H is None else merge_sinks(out_THC, lse_TH, asked.sinks_H)[0]


@dataclass(frozen=True)
class _Keys:
    """The keys and values of one segment: its own, or, once a sequence has a past, all of them from its pages."""

    k_TGD: Tensor
    v_TGC: Tensor
    keys_PSGD: Tensor
    values_PSGC: Tensor
    segment: Segment
    group: int

    def between(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        if self.segment.past == 0:
            return self.k_TGD[low:high], self.v_TGC[low:high]
        size = self.keys_PSGD.shape[1]
        pages_N = self.segment.pages_NG[low // size : -(-high // size), self.group]
        inside = slice(low - low // size * size, high - low // size * size)
        return self.keys_PSGD[pages_N].flatten(0, 1)[inside], self.values_PSGC[pages_N].flatten(0, 1)[inside]


def _attend_segment(q_THD: Tensor, keys: _Keys, segment: Segment, call: Call, asked: Asked) -> list[Tensor]:
    parts: list[Tensor] = []
    for begin, end, low in segment.ranges(call.rule):
        k_SGD, v_SGC = keys.between(low, end)
        out_THC, lse_TH = call.kernel(
            q_THD[begin - segment.past : end - segment.past],
            k_SGD,
            v_SGC,
            scale=asked.scale,
            offset=begin - low,
            window=call.rule.window,
            softcap=asked.softcap,
        )
        parts.append(out_THC if asked.sinks_H is None else merge_sinks(out_THC, lse_TH, asked.sinks_H)[0])
    return parts


def _attend_rows(
    q_BHD: Tensor, keys_PSGD: Tensor, values_PSGC: Tensor, rows: DecodeRows, call: Call, asked: Asked
) -> Tensor:
    """One query per row against its own pages, and those that all rows share."""
    inputs = (q_BHD.unsqueeze(1), keys_PSGD, values_PSGC)
    if rows.prefix_N is None or rows.prefix_length_1 is None:
        out_B1HC, lse_B1H = call.pages(
            *inputs, rows.tables_BN, rows.lengths_B, scale=asked.scale, window=call.rule.window, softcap=asked.softcap
        )
    else:
        prefix = (rows.prefix_N, rows.prefix_length_1)
        out_B1HC, lse_B1H = attend_shared_prefix(
            call.pages, *inputs, *prefix, rows.tables_BN, rows.lengths_B, scale=asked.scale, softcap=asked.softcap
        )
    out_BHC, lse_BH = out_B1HC.squeeze(1), lse_B1H.squeeze(1)
    return out_BHC if asked.sinks_H is None else merge_sinks(out_BHC, lse_BH, asked.sinks_H)[0]
