"""memory.swap_share=auto: one decision from what every rank measured."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from tests.support.corpus import small_corpus
from tests.support.runs import tiny_run
from transformers import PreTrainedModel

from farspan.activations.memo import LayerCost, choose_alpha, simulate_stall
from farspan.errors import OutOfMemoryError, PlanError
from farspan.memory.host import DramTier
from farspan.memory.speeds import measure_speed
from farspan.models.checkpoint import make_config, random_causal_lm
from farspan.models.parts import decoder_layers
from farspan.train.build import build
from farspan.train.limit import data_bytes
from farspan.train.swap import SwapFacts, decide, worst_of

LAYER = LayerCost(10, 10, 100, forward_s=1.0, backward_s=2.0)
WHOLE = ". At share 0 only the inputs of layers wait there, and layers are computed again whole, attention too"

facts = st.builds(
    SwapFacts,
    layer=st.builds(
        LayerCost,
        input_bytes=st.integers(1, 10**6),
        attention_bytes=st.integers(0, 10**6),
        rest_bytes=st.integers(0, 10**7),
        forward_s=st.floats(1e-4, 10),
        backward_s=st.floats(1e-4, 20),
    ),
    bytes_per_s=st.floats(1e4, 1e9),
    host_bytes=st.integers(10**9, 10**10),
)


def test_the_share_is_the_programs_in_hundredths_and_is_told_with_its_numbers() -> None:
    share, why = decide(SwapFacts(LAYER, 57.77, 10**9), 12, "cxl0 (emulated)")
    assert share == 0.37, "37.77 of 100 bytes can be hidden"
    assert "\n" not in why
    for part in ("memory.swap_share=auto is 0.37", "1 s", "cxl0 (emulated)", "bandwidth limits it", "up for 0 s"):
        assert part in why, part


def test_where_not_even_what_always_moves_can_be_hidden_nothing_is_swapped() -> None:
    share, why = decide(SwapFacts(LAYER, 5.0, 10**9), 12, "dram")
    assert share == 0
    assert "X and O alone take longer" in why
    assert why.endswith(WHOLE)
    assert not re.search("expected to hold", why)


def test_a_share_of_less_than_a_hundredth_is_none_and_attention_is_said_to_be_computed_again() -> None:
    hides_half_a_hundredth = SwapFacts(LAYER, 20.5, 10**9)
    assert choose_alpha(LAYER, 12, 20.5, 10**9, 1).alpha == pytest.approx(0.005)
    share, why = decide(hides_half_a_hundredth, 12, "dram")
    assert share == 0
    assert why.endswith(f"bandwidth limits it{WHOLE}")
    least, why = decide(SwapFacts(LAYER, 21.1, 10**9), 12, "dram")
    assert least == 0.01
    assert "attention" not in why


def test_a_tier_too_small_for_what_always_moves_is_refused() -> None:
    with pytest.raises(PlanError, match="must fit on the host"):
        decide(SwapFacts(LAYER, 100.0, 219), 12, "dram")
    assert decide(SwapFacts(LAYER, 1000.0, 220), 12, "dram")[0] == 0


@given(st.lists(facts, min_size=1, max_size=4), st.integers(2, 40))
def test_every_rank_comes_to_the_same_share_and_none_could_hide_less(found: list[SwapFacts], num_layers: int) -> None:
    share, _ = decide(worst_of(found), num_layers, "dram")
    assert share == decide(worst_of(found[::-1]), num_layers, "dram")[0]
    assert share * 100 == pytest.approx(round(share * 100)), "it can be written into a config"
    for one in found:
        own = choose_alpha(one.layer, num_layers, one.bytes_per_s, one.host_bytes, 1)
        assert share <= own.alpha + 1e-9
        if share > 0:
            # Backward computes at least as long as forward: it does so in every model.
            layer = LayerCost(
                one.layer.input_bytes,
                one.layer.attention_bytes,
                one.layer.rest_bytes,
                one.layer.forward_s,
                max(one.layer.forward_s, one.layer.backward_s),
            )
            assert simulate_stall(layer, num_layers, share, one.bytes_per_s, 1) <= 1e-9 * num_layers * layer.backward_s


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_corpus(tmp_path_factory.mktemp("swap"))


def no_room(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nand a stack")


def build_alone(corpus: str, folder: Path, tier: str, *options: str, hook: Callable[..., None] | None = None) -> None:
    """Build a run on one rank, with an nvme tier of size `tier` in `folder`; its first layer calls `hook` before."""
    places = ["memory.offload_activations=nvme", f"memory.tiers=['nvme:{folder}:{tier}']"]
    config = tiny_run(corpus, "nowhere", "train.recompute=true", "memory.swap_share=auto", *places, *options)
    settings = {**config.model.settings, "vocab_size": 300, "max_position_embeddings": 64}
    model: PreTrainedModel = random_causal_lm(make_config("llama", settings), 0).double()
    if hook is not None:
        decoder_layers(model)[0].register_forward_pre_hook(hook)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        build(config, torch.device("cpu"), folder / "cache", model).step.close()
    finally:
        dist.destroy_process_group()


def open_files(folder: Path) -> list[str]:
    """What this process holds open in `folder`, files without a name too."""
    held = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [name for name in map(os.readlink, held) if name.startswith(f"{folder}/#")]


@pytest.mark.parametrize(
    ("tier", "fails", "reason"),
    [
        ("64MiB", True, "CUDA out of memory."),
        ("1KiB", False, "memory tier .* asked for 4096 bytes, .*"),
    ],
    ids=["in a forward", "in the tier"],
)
def test_no_memory_for_measuring_is_told_as_a_step_without_memory_and_leaves_no_tier_open(
    corpus: str, tmp_path: Path, tier: str, fails: bool, reason: str
) -> None:
    with pytest.raises(OutOfMemoryError, match=f"memory.swap_share=auto: {reason}$") as caught:
        build_alone(corpus, tmp_path, tier, hook=no_room if fails else None)
    assert (caught.value.rank, caught.value.step) == (0, 0)
    assert open_files(tmp_path) == []


def test_a_tier_too_small_for_the_run_is_closed_too(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="must fit on the host"):
        build_alone(corpus, tmp_path, "8KiB")
    assert open_files(tmp_path) == []


def test_measuring_is_held_to_the_limit_of_a_step(corpus: str, tmp_path: Path) -> None:
    before, seen = resource.getrlimit(resource.RLIMIT_DATA), []

    def look(*_: object) -> None:
        seen.append(resource.getrlimit(resource.RLIMIT_DATA)[0] - data_bytes())

    build_alone(corpus, tmp_path, "64MiB", "memory.limit_gib=1", hook=look)
    assert len(seen) == 2, "one forward to count, one to time"
    assert all(0 < left <= 1 << 30 for left in seen)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize("limit_gib", [0.0, 1.0, 1 / 64])
def test_copies_are_measured_with_an_eighth_of_the_limit_at_most(limit_gib: float) -> None:
    tier = DramTier(1 << 30)
    measure_speed(tier, torch.device("cpu"), limit_gib)
    assert tier.stats().peak_bytes == {0.0: 64 << 20, 1.0: 64 << 20, 1 / 64: 2 << 20}[limit_gib]
    tier.close()
