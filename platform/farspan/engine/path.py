"""How a model is run: packed with pages and states, or every sequence alone. Tried out at load, before any request.

packed            one forward for all sequences
packed stepwise   the same; recurrent layers are continued one token at a time
alone             one forward for each sequence, with transformers' own cache
refused           no path gives what transformers gives: ModelError with all reasons
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from farspan.config.schema import EngineConfig
from farspan.config.serve_rules import check_ranks
from farspan.engine.alone import AloneRunner, Manner, measure_cache
from farspan.engine.attention import ATTENTION_NAME, register_attention
from farspan.engine.capture import Capture, CudaCapture
from farspan.engine.continuity import ContinuityTrial
from farspan.engine.cut import Share
from farspan.engine.lowrank import LowRank
from farspan.engine.probe import (
    CHECK_TOKENS,
    attention_of,
    check_prompts,
    exact_experts,
    fingerprint_model,
    forward,
    plain_logits,
    refuse_config,
    rope_types,
    set_attention,
)
from farspan.engine.recorded import record
from farspan.engine.recurrent import PackedCache, restore_forward, swap_forward
from farspan.engine.runner import Piece, Runner
from farspan.engine.survey import Survey, WatchedAttention, survey
from farspan.errors import ConfigError, EngineError, ModelError
from farspan.kv.layout import KvLayout
from farspan.kv.pages import PagePool
from farspan.kv.states import StateLayout, StatePool

logger = logging.getLogger(__name__)

# Largest error of the logits, as a part of their norm, between a path and transformers' own forward.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-1}
# Recurrences compute in single precision whatever the type, and cut differently they differ by that.
_RECURRENT_TOLERANCE = 2e-3
_CHECK_BOUNDS = (0, 9, 10, 11, 23)
# A model whose sequences need no pages at all still takes one for each.
_ONE_PAGE = 2**40
# Enough to try any model out; real memory only where it is written.
_TRIAL_BYTES = 256 * 1024 * 1024
# Rows of a step of a CPU from which on its calls cost little beside what they compute.
_MOST_RECORDED = 16
_ROPES_BY_LENGTH = "longrope"
_MANNERS = (Manner(), Manner(masked=True), Manner(stepwise=True), Manner(stepwise=True, masked=True))


class Runs(Protocol):
    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [R, V]: the `num_logits` last tokens of each piece, in the given order."""
        ...


@dataclass(frozen=True, slots=True)
class Path:
    """A model that is ready to run."""

    name: str
    runner: Runs
    pool: PagePool
    states: StatePool | None
    lowrank: LowRank
    """What adapters add in its forwards."""
    passed_over: tuple[str, ...]
    """Why no faster path was taken."""

    @property
    def pages_are_all(self) -> bool:
        """Whether pages are all that another engine needs to go on, those included that hold a packed state."""
        return self.states is None or self.pool.layout.num_state_pages > 0


_Attempt: TypeAlias = Callable[[PreTrainedModel, EngineConfig, tuple[str, ...], Share | None], Path]


def open_path(model: PreTrainedModel, config: EngineConfig, share: Share | None = None) -> Path:
    """The fastest path on which this model gives what transformers gives. Takes the model over.

    With a share of it, on all ranks at the same time. Raises ModelError when there is none, EngineError when kv_bytes
    is too small to try, ConfigError when engine.tensor_parallel is not the number of ranks.
    """
    refuse_config(model.config)
    _refuse_ranks(config, share)
    own = attention_of(model)
    if own == ATTENTION_NAME:
        # An engine had this model before.
        own = "sdpa" if model._supports_sdpa else "eager"
        set_attention(model, own)
    exact_experts(model)
    reasons: list[str] = []
    attempts: tuple[_Attempt, ...] = (_open_packed, _open_alone) if share is None else (_open_packed,)
    for attempt in attempts:
        try:
            path = attempt(model, config, tuple(reasons), share)
        except EngineError:
            raise
        except ModelError as problem:
            reasons.append(str(problem))
        # Whatever the code of a model raises when it meets what it does not expect.
        except Exception as problem:
            reasons.append(f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}")
        else:
            logger.info("%s runs %s%s", model.config.model_type, path.name, "".join(f" ({r})" for r in reasons))
            return path
        for module in model.modules():
            restore_forward(module)
        set_attention(model, own)
    raise ModelError(f"{model.config.model_type} is not served: {'; '.join(reasons)}")


def _refuse_ranks(config: EngineConfig, share: Share | None) -> None:
    check_ranks(config)
    size = 1 if share is None else share.gang.size
    if config.tensor_parallel != size:
        raise ConfigError(
            "engine.tensor_parallel",
            f"must be the number of ranks that compute together here, {size}",
            config.tensor_parallel,
            f"use engine.tensor_parallel={size}",
        )


def capture_decode(path: Path, most_rows: int, most_tokens: int, capture: Capture | None = None) -> bool:
    """Whether decode steps of up to `most_rows` sequences are launched as wholes; the log says why not.

    `capture`: how; none: by CUDA graphs from now on, or on a CPU as a list of compiled calls, which is tried when it is
    worth it.
    """
    device = path.pool.device
    later = capture is None and device.type == "cpu"
    if most_rows < 1 or (capture is None and device.type not in ("cuda", "cpu")):
        return False
    if later:
        capture, most_rows = record, min(most_rows, _MOST_RECORDED)
    try:
        if not isinstance(path.runner, Runner):
            raise ModelError(f"it runs {path.name}")
        path.runner.capture(most_rows, most_tokens, capture or CudaCapture(device), later=later)
    # Whatever a forward or the device raises that cannot be captured: launched one by one, it was right in the trial.
    except Exception as problem:
        reason = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
        logger.log(logging.INFO if later else logging.WARNING, "decode is launched kernel by kernel: %s", reason)
        return False
    return True


def needed_kv_bytes(model: PreTrainedModel, config: EngineConfig, num_tokens: int, num_sequences: int) -> int:
    """Bytes for `num_sequences` of `num_tokens` tokens, and for the trial at load. Takes the model over."""
    path = open_path(model, dataclasses.replace(config, kv_bytes=_TRIAL_BYTES))
    layout = path.pool.layout
    most = layout.most_pages(num_tokens, config.max_batch_tokens)
    pages = layout.cost_bytes * num_sequences * max(most, layout.num_pages(64))
    slots = 0 if path.states is None else path.states.layout.cost_bytes * config.max_sequences
    # States get at most half where there are pages.
    return max(1, slots + max(slots, pages) if pages else slots)


def page_layout(model: PreTrainedModel, config: EngineConfig) -> KvLayout:
    """The pages of a model that runs packed and keeps no state, before there are any. Leaves it as it was.

    Raises ModelError for one that does not.
    """
    refuse_config(model.config)
    own = attention_of(model)
    exact_experts(model)
    try:
        found = _look_over(model, config)
    except ModelError:
        raise
    # Whatever the code of a model raises when it meets what it does not expect.
    except Exception as problem:
        raise ModelError(f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}") from None
    finally:
        set_attention(model, own)
    if found.mixers:
        raise ModelError(f"{model.config.model_type} keeps a recurrent state")
    return _layout("", model, config, found)


def trial_pages(layout: KvLayout) -> int:
    """Pages that a path is tried out with."""
    return sum(map(layout.num_pages, CHECK_TOKENS))


def tolerance(dtype: torch.dtype, recurrent: bool) -> float:
    """Largest error of the logits, as a part of their norm, between two ways to compute them."""
    return max(_TOLERANCE.get(dtype, 1e-1), _RECURRENT_TOLERANCE if recurrent else 0.0)


def refuse_packing(model: PreTrainedModel, config: EngineConfig) -> None:
    """Raises ModelError for what a short trial cannot show: whatever changes with the length of a sequence."""
    text = model.config.get_text_config(decoder=True)
    # Its frequencies depend on the longest sequence of a batch: one request would change another.
    if _ROPES_BY_LENGTH in rope_types(text):
        raise ModelError(f"{text.model_type}: rope_type {_ROPES_BY_LENGTH} looks at the longest sequence of a batch")
    longest = _longest(model, config)
    if getattr(text, "attn_temperature_tuning", None) and getattr(text, "floor_scale", 1) <= longest:
        raise ModelError(f"{text.model_type}: attn_temperature_tuning counts the tokens of a call")


def _longest(model: PreTrainedModel, config: EngineConfig) -> int:
    """Most tokens of a sequence."""
    text = model.config.get_text_config(decoder=True)
    return config.max_context_tokens or getattr(text, "max_position_embeddings", None) or 2**31


def _open_packed(model: PreTrainedModel, config: EngineConfig, reasons: tuple[str, ...], share: Share | None) -> Path:
    own = attention_of(model)
    found = _look_over(model, config)
    if share is not None and found.mixers:
        raise ModelError("recurrent layers are not cut over ranks; use engine.tensor_parallel=1")
    for mixer in found.mixers:
        swap_forward(mixer)
    fingerprint = fingerprint_model(model) if share is None else share.fingerprint
    layout = _layout(fingerprint, model, config, found, 1 if share is None else share.gang.size)
    stepwise = bool(_begins_anew(model, found))
    pool, states = _pools(layout, found.states if found.mixers else None, config, model.device)
    lowrank = LowRank()
    runner = Runner(model, pool, found, states, stepwise=stepwise, lowrank=lowrank)
    if share is not None:
        share.gang.agree(hashlib.sha256(f"{layout.fingerprint()} {pool.num_pages}".encode()).digest())
    # Where transformers' fused attention has no soft cap or sinks, it leaves them out without a word.
    plain = "eager" if found.capped else own
    _check(model, plain, runner, pool, states, "packed and paged", share)
    return Path("packed stepwise" if stepwise else "packed", runner, pool, states, lowrank, reasons)


def _look_over(model: PreTrainedModel, config: EngineConfig) -> Survey:
    """What a model does whose attention is over pages from now on. Raises ModelError where it cannot be packed."""
    refuse_packing(model, config)
    register_attention()
    set_attention(model, ATTENTION_NAME)
    if attention_of(model) != ATTENTION_NAME:
        raise ModelError(f"{model.config.model_type} does not compute attention through transformers' registry")
    return survey(model, forward)


def _layout(
    fingerprint: str, model: PreTrainedModel, config: EngineConfig, found: Survey, num_ranks: int = 1
) -> KvLayout:
    return KvLayout(
        fingerprint,
        tuple(found.layers),
        str(model.dtype).removeprefix("torch."),
        config.page_tokens if found.layers else _ONE_PAGE,
        state=found.states.fingerprint() if found.mixers else "",
        state_bytes=found.states.slot_bytes,
        grouped=found.page_groups(_longest(model, config)),
        num_ranks=num_ranks,
    )


def _open_alone(model: PreTrainedModel, config: EngineConfig, reasons: tuple[str, ...], _: Share | None) -> Path:
    token_bytes, state_bytes = measure_cache(model)
    dtype = str(model.dtype).removeprefix("torch.")
    page_tokens = config.page_tokens if token_bytes else _ONE_PAGE
    layout = KvLayout(fingerprint_model(model), (), dtype, page_tokens, token_bytes)
    refusals: list[str] = []
    for manner in _MANNERS:
        pool, states = _pools(layout, StateLayout(counted_bytes=state_bytes), config, model.device)
        assert states is not None
        lowrank = LowRank()
        runner = AloneRunner(model, states, manner, lowrank)
        try:
            _check(model, attention_of(model), runner, pool, states, str(manner), None)
        except EngineError:
            raise
        except ModelError as problem:
            refusals.append(str(problem))
        except Exception as problem:
            refusals.append(f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}")
        else:
            return Path(str(manner), runner, pool, states, lowrank, reasons)
    raise ModelError("; ".join(dict.fromkeys(refusals)))


def _begins_anew(model: PreTrainedModel, found: Survey) -> set[str]:
    """Kinds of recurrent layers that must be continued one token at a time."""
    if not found.mixers:
        return set()
    trial = ContinuityTrial(model.config)
    cache = PackedCache(model.config, trial)
    tokens_T = check_prompts(model)[0]
    forward(model, tokens_T, torch.arange(len(tokens_T)), WatchedAttention(model), None, cache)
    return trial.begins_anew


def _pools(
    layout: KvLayout, states: StateLayout | None, config: EngineConfig, device: torch.device
) -> tuple[PagePool, StatePool | None]:
    """Pages and states that fit into kv_bytes together."""
    if states is None:
        return PagePool(layout, config.kv_bytes, device), None
    # At most half of the memory where pages need the other half.
    share = config.kv_bytes // 2 if layout.cost_bytes else config.kv_bytes
    num_slots = min(config.max_sequences, share // max(1, states.cost_bytes))
    if num_slots < 2:
        least = 4 * states.cost_bytes
        raise EngineError(
            f"engine.kv_bytes: half of it must hold two states of {states.cost_bytes} bytes, got {config.kv_bytes}; "
            f"use at least engine.kv_bytes={least}"
        )
    left = config.kv_bytes - num_slots * states.cost_bytes
    most = None if layout.cost_bytes else num_slots
    return PagePool(layout, left, device, most), StatePool(states, num_slots, device)


def _check(
    model: PreTrainedModel,
    plain: str,
    runner: Runs,
    pool: PagePool,
    states: StatePool | None,
    name: str,
    share: Share | None,
) -> None:
    """Refuse a path whose logits are not transformers' own, on two prompts cut in chunks and run side by side."""
    prompts = check_prompts(model)
    got, ends = _run_in_chunks(prompts, runner, pool, states)
    if share is None:
        error = _error(got, [plain_logits(model, prompt, plain) for prompt in prompts], ends)
    else:
        # Only the leader has whole logits.
        error = share.gang.leaders(_error(got, share.expected, ends) if share.gang.leads else 0.0)
    # Written so that NaN is refused too.
    if not error <= tolerance(model.dtype, states is not None):
        raise ModelError(f"{name} logits differ from transformers' by {error:.2g} of their norm")


def _run_in_chunks(
    prompts: Sequence[Tensor], runner: Runs, pool: PagePool, states: StatePool | None
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Logits [R, V] after every chunk of every prompt, and the (prompt, token) of each row."""
    owners = [f"check {number}" for number in range(len(prompts))]
    pages = [pool.alloc(pool.layout.num_pages(len(prompt))) for prompt in prompts]
    try:
        if None in pages:
            raise EngineError(f"engine.kv_bytes: holds {pool.num_pages} pages, too few to try the model out; raise it")
        got, ends = [], []
        for low, high in itertools.pairwise(_CHECK_BOUNDS):
            todo = [i for i, prompt in enumerate(prompts) if low < len(prompt)]
            pieces = [
                Piece(prompts[i][low:high].tolist(), low, pages[i] or [], states.hold(owners[i]) if states else None)
                for i in todo
            ]
            got.append(runner.run(pieces))
            ends += [(i, min(high, len(prompts[i])) - 1) for i in todo]
    finally:
        for owner, held in zip(owners, pages, strict=True):
            pool.free(held or [])
            if states is not None:
                states.release(owner)
    return torch.cat(got), ends


def _error(got_RV: Tensor, whole: Sequence[Tensor], ends: Sequence[tuple[int, int]]) -> float:
    """Difference of logits as a part of their norm. `whole`: logits [T, V] of each prompt."""
    expected_RV = torch.stack([whole[i][end] for i, end in ends]).to(got_RV.device).double()
    return float((got_RV.double() - expected_RV).norm() / expected_RV.norm().clamp_min(1e-30))
