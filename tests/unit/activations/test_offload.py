"""Offload on or off: the same bits, less memory, nothing left behind."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import pytest
import torch
from tests.unit.activations.tiny import (
    CAPACITY,
    CPU,
    TIERS,
    equal,
    gradients,
    offloading,
    recompute,
    tiny_llama,
    tokens,
)
from torch import Tensor, nn

from farspan.activations.offload import ActivationOffload
from farspan.activations.offload_policy import Action, Rule, SavePolicy
from farspan.activations.offload_pool import BufferPool
from farspan.activations.offload_store import Entry, SavedStore
from farspan.errors import ConfigError, StaleBufferError, TierFullError, TrainingError
from farspan.memory.emulated import EmulatedTier, Shape
from farspan.memory.host import DramTier
from farspan.memory.striped import StripedTiers
from farspan.memory.tier import Region
from farspan.memory.transfer import Finished, Transfer


def train(model: nn.Module, steps: int, offload: ActivationOffload | None) -> tuple[list[dict[str, Tensor]], Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, foreach=False)
    found = []
    for step in range(steps):
        found.append(gradients(model, step, offload))
        optimizer.step()
    return found, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def without() -> tuple[list[dict[str, Tensor]], Tensor]:
    return train(tiny_llama(), 200, None)


@pytest.mark.parametrize(("name", "recomputed"), [*((name, False) for name in TIERS), ("dram", True)])
def test_gradients_of_200_steps_are_the_same_bits_with_and_without(
    name: str, recomputed: bool, tmp_path: Path, without: tuple[list[dict[str, Tensor]], Tensor]
) -> None:
    model = tiny_llama()
    if recomputed:
        recompute(model)
    with offloading(TIERS[name](tmp_path), model) as offload:
        found, weights = train(model, 200, offload)
        assert offload.report.stored_bytes > 0
    assert all(equal(a, b) for a, b in zip(found, without[0], strict=True))
    assert torch.equal(weights, without[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_type_comes_back_as_it_went(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype=dtype)
    want = gradients(model)
    with offloading(DramTier(CAPACITY), model, debug=True) as offload:
        assert equal(gradients(model, 0, offload), want)


def test_two_backwards_of_one_step_are_kept_apart() -> None:
    model = tiny_llama()

    def accumulated(offload: ActivationOffload | None) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        ids = [tokens(1), tokens(2, 40)]
        if offload is None:
            for x in ids:
                model(input_ids=x, labels=x).loss.backward()
        else:
            with offload.step():
                losses = [model(input_ids=x, labels=x).loss for x in ids]
                for loss in losses:
                    loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    want = accumulated(None)
    with offloading(DramTier(CAPACITY), model, debug=True) as offload:
        assert equal(accumulated(offload), want)


def test_a_recomputed_model_sends_its_layer_inputs_and_nothing_else() -> None:
    model = tiny_llama(layers=4)
    recompute(model)
    with offloading(DramTier(CAPACITY), model, keep_last=1) as offload:
        gradients(model, 0, offload)
        # The inputs of all layers but the last, 24 tokens of 32 fp32 each.
        assert offload.report.stored_bytes == 3 * 24 * 32 * 4


class Watching(DramTier):
    """Remembers what is fetched while what is computed."""

    def __init__(self) -> None:
        super().__init__(CAPACITY)
        self.log: list[tuple[str, int]] = []

    def store(self, region: Region, source: Tensor, deadline_s: float = 60.0) -> Transfer:
        self.log.append(("store", id(region)))
        return super().store(region, source, deadline_s)

    def fetch(self, region: Region, target: Tensor, deadline_s: float = 60.0) -> Transfer:
        self.log.append(("fetch", id(region)))
        return super().fetch(region, target, deadline_s)


def test_layers_come_back_in_reverse_and_one_layer_ahead() -> None:
    model = tiny_llama(layers=5)
    recompute(model)
    tier = Watching()
    seen: list[int] = []

    def note(layer: nn.Module, *_: object) -> None:
        seen.append(sum(kind == "fetch" for kind, _ in tier.log))

    with offloading(tier, model) as offload, offload.step():
        ids = tokens(0)
        loss = model(input_ids=ids, labels=ids).loss
        stored = [region for kind, region in tier.log if kind == "store"]
        offload.store.settle(100)
        handles = [layer.self_attn.register_forward_pre_hook(note) for layer in model.model.layers]
        loss.backward()
        fetched = [region for kind, region in tier.log if kind == "fetch"]
        for handle in handles:
            handle.remove()
    assert fetched == stored[::-1]
    # When layer 4 (kept) is computed again, the inputs of 3 and 2 have been asked for; at 3 that of 1 is not yet.
    assert seen == [2, 2, 3, 4, 4]


def test_weights_and_views_of_weights_never_move() -> None:
    linear = nn.Linear(64, 64)
    model = nn.Sequential(linear, nn.Linear(64, 64))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tier = DramTier(CAPACITY)
    offload = ActivationOffload(tier, model, [model[0], model[1]], CPU, min_bytes=1, keep_last=0)
    moved: list[int] = []
    save = offload.store.save
    offload.store.save = lambda t, g: moved.append(t.untyped_storage().data_ptr()) or save(t, g)  # type: ignore[method-assign]
    with offload.step():
        model(torch.randn(8, 64, requires_grad=True)).sum().backward()
    assert len(moved) == 2
    assert not weights & set(moved)
    offload.close()
    tier.close()


class Views(nn.Module):
    """Saves three views of one tensor, a transposed one of it, and a corner of a large one."""

    def forward(self, x_TE: Tensor) -> Tensor:
        qkv_TE = x_TE * 2
        q, k, v = qkv_TE.chunk(3, dim=-1)
        corner = (x_TE * 3)[:4, :16]
        return (q * k * v).sum() + (qkv_TE.t() * qkv_TE.t()).sum() + (corner * corner).sum()


def test_a_storage_that_is_saved_many_times_moves_once() -> None:
    model = Views()
    x = torch.randn(32, 48, requires_grad=True, generator=torch.Generator().manual_seed(0))
    model(x).backward()
    want = x.grad
    assert want is not None
    tier = DramTier(CAPACITY)
    offload = ActivationOffload(tier, model, [model], CPU, min_bytes=1, keep_last=0, debug=True)
    x.grad = None
    with offload.step():
        loss = model(x)
        offload.store.settle(100)
        loss.backward()
    assert x.grad is not None
    assert torch.equal(x.grad, want)
    # qkv once, q * k once, and the corner in place of the large tensor it is part of.
    assert offload.report.stored_bytes == 4 * (32 * 48 + 32 * 16 + (3 * 48 + 16))
    offload.close()
    tier.close()


def test_memory_of_moved_tensors_is_free_during_forward() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)])
    alive: list[weakref.ref[Tensor]] = []
    tier = DramTier(CAPACITY)
    offload = ActivationOffload(tier, model, list(model), CPU, min_bytes=1, keep_last=0)

    def note(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        alive.append(weakref.ref(out.untyped_storage()))

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Tanh)]
    with offload.step():
        out = model(torch.randn(8, 64, requires_grad=True))
        assert [ref() is None for ref in alive[:4]] == [True] * 4
        out.sum().backward()
    for handle in handles:
        handle.remove()
    offload.close()
    tier.close()


def test_every_buffer_is_back_after_an_exception_in_forward_or_backward() -> None:
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # type: ignore[no-untyped-def]
            raise RuntimeError("broken backward")

    class Failing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **batch: Tensor) -> Tensor:
            self.inner(**batch)
            raise ZeroDivisionError

    model = tiny_llama()
    want = gradients(model)
    with offloading(DramTier(CAPACITY), model, debug=True) as offload:
        with pytest.raises(ZeroDivisionError):
            gradients(Failing(model), 0, offload)
        assert offload.store.pool.num_taken == 0
        handle = model.model.layers[0].register_forward_hook(lambda _, args, out: Breaks.apply(out))
        with pytest.raises(RuntimeError, match="broken backward"):
            gradients(model, 0, offload)
        handle.remove()
        assert offload.store.pool.num_taken == 0
        assert equal(gradients(model, 0, offload), want)


def test_a_backward_after_its_step_is_refused() -> None:
    model = tiny_llama()
    with offloading(DramTier(CAPACITY), model) as offload:
        with offload.step():
            loss = model(input_ids=tokens(0), labels=tokens(0)).loss
        with pytest.raises(TrainingError, match="after its step was closed"):
            loss.backward()


def test_a_full_tier_is_refused_in_one_sentence_and_gives_everything_back() -> None:
    model = tiny_llama()
    tier = DramTier(16 << 10)
    with offloading(tier, model) as offload:
        with pytest.raises(TierFullError, match="activations asked for"):
            gradients(model, 0, offload)
        assert offload.store.pool.num_taken == 0


def test_a_tensor_changed_in_place_after_it_was_saved_is_found() -> None:
    class Changes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            out = h * h
            with torch.no_grad():
                h.add_(1)
            return out

    model = Changes()
    tier = DramTier(CAPACITY)
    offload = ActivationOffload(tier, model, [model], CPU, min_bytes=1, keep_last=0)
    with pytest.raises(TrainingError, match="changed in place"), offload.step():
        model(torch.randn(64, requires_grad=True)).sum().backward()
    offload.close()
    tier.close()


def test_buffers_are_used_again_from_step_to_step() -> None:
    model = tiny_llama()
    tier = DramTier(CAPACITY)
    with offloading(tier, model) as offload:
        gradients(model, 0, offload)
        used = tier.stats().used_bytes
        for step in range(3):
            gradients(model, step, offload)
        assert tier.stats().used_bytes == used > 0
        assert set(tier.stats().owners) == {"activations"}


def test_modules_the_policy_keeps_stay() -> None:
    model = tiny_llama()
    want = gradients(model)
    policy = SavePolicy([Rule(Action.KEEP, module="model.layers.*.mlp"), Rule(Action.OFFLOAD, module="model.layers.0")],
                        default=Action.KEEP)  # fmt: skip
    with offloading(DramTier(CAPACITY), model) as offload:
        gradients(model, 0, offload)
        everything = offload.report.stored_bytes
    with offloading(DramTier(CAPACITY), model, policy=policy) as offload:
        assert equal(gradients(model, 0, offload), want)
        assert 0 < offload.report.stored_bytes < everything / 2


def test_recomputing_in_a_layer_that_is_not_recomputed_is_refused() -> None:
    model = tiny_llama()
    for rule in (Rule(Action.RECOMPUTE), Rule(Action.KEEP, op="aten.mm.default")):
        with pytest.raises(ConfigError, match=r"train\.recompute=true"):
            ActivationOffload(DramTier(CAPACITY), model, list(model.model.layers), CPU, policy=SavePolicy([rule]))


class Gated(DramTier):
    """Readers wait for a gate."""

    def __init__(self) -> None:
        super().__init__(CAPACITY)
        self.gate = threading.Event()

    def _read(self, region: Region, raw: Tensor) -> None:
        assert self.gate.wait(60)
        super()._read(region, raw)


class Impatient(SavedStore):
    """Seeded race: a buffer goes back to the pool, and to its next user, before its reader is done."""

    def _bring_back(self, entry: Entry) -> Tensor:
        tier = self.pool.tier
        assert isinstance(tier, Gated)
        if entry.region is not None:
            self._begin_fetch(entry)
        assert entry.back is not None
        if (region := entry.region) is not None:
            entry.region = None
            try:
                self.pool.give(region)
                # Its next user.
                tier.memory_of(region).zero_()
            finally:
                tier.gate.set()
            entry.moving.wait()
        return entry.back


class Forgetful(DramTier):
    """Seeded race: nobody waits for a reader, and it reads only when its buffer is used again."""

    def __init__(self) -> None:
        super().__init__(CAPACITY)
        self.late: dict[int, Tensor] = {}

    def fetch(self, region: Region, target: Tensor, deadline_s: float = 60.0) -> Transfer:
        region.last.finish()
        self.late[id(region)] = target.zero_()
        region.last = Finished()
        return region.last

    def poison(self, region: Region) -> None:
        super().poison(region)
        if id(region) in self.late:
            target = self.late.pop(id(region))
            target.copy_(self.memory_of(region)[: target.numel()])


def test_a_buffer_returned_before_its_reader_is_done_trains_wrong_silently_and_is_caught_in_debug_mode() -> None:
    model = tiny_llama()
    want = gradients(model)
    for debug in (False, True):
        tier = Gated()
        with offloading(tier, model, debug=debug) as offload:
            offload.store = Impatient(tier, "activations", debug=debug)
            if debug:
                with pytest.raises(StaleBufferError, match="returned while a copy of it was under way"):
                    gradients(model, 0, offload)
            else:
                assert not equal(gradients(model, 0, offload), want)


def test_a_forgotten_wait_trains_wrong_silently_and_is_caught_by_the_poison() -> None:
    model = tiny_llama()
    want = gradients(model)
    for debug in (False, True):
        with offloading(Forgetful(), model, debug=debug) as offload:
            if debug:
                with pytest.raises(StaleBufferError, match=r"other bytes than forward saved \(100% of them poison\)"):
                    gradients(model, 0, offload)
            else:
                assert not equal(gradients(model, 0, offload), want)
            assert offload.store.pool.num_taken == 0


def test_a_writer_that_outlives_its_buffer_is_seen_when_the_buffer_is_taken_again() -> None:
    tier = DramTier(CAPACITY)
    pool = BufferPool(tier, "test", poison=True)
    region = pool.take(1000)
    pool.give(region)
    tier.memory_of(region)[500] = 1
    with pytest.raises(StaleBufferError, match="a copy outlived its buffer"):
        pool.take(1000)
    pool.close()
    tier.close()


def test_several_tiers_share_the_load_and_give_the_same_bits() -> None:
    model = tiny_llama(layers=4)
    want = gradients(model)
    tiers = [EmulatedTier(f"cxl{i}", "cxl", CAPACITY, Shape(5e9, 5e9, 1e-6)) for i in range(2)]
    layers = list(model.model.layers)
    offload = ActivationOffload(StripedTiers(tiers), model, layers, CPU, min_bytes=512, debug=True)
    assert equal(gradients(model, 0, offload), want)
    one, two = (tier.stats().stored_bytes for tier in tiers)
    assert 0.8 < one / two < 1.25
    offload.close()
    for tier in tiers:
        tier.close()
