"""Which tier each kind of bytes is given: from sizes and touches of a config alone."""

from __future__ import annotations

import json

import pytest
from tests.support.runs import tiny_run

from farspan.config.schema import RunConfig
from farspan.errors import ConfigError, CorruptDataError, PlanError
from farspan.memory.speeds import Speed, read_speeds
from farspan.models.checkpoint import make_config
from farspan.plan.facts import model_facts
from farspan.plan.profile import LayerBytes
from farspan.plan.tiers import (
    ACTIVATIONS,
    ARENA,
    ARENA_GRADIENTS,
    HOST,
    OPTIMIZER,
    Given,
    assign,
    kinds_of,
    places_of,
    refuse_unplaced,
    unmeasured,
)

KIB, MIB = 1 << 10, 1 << 20
SETTINGS = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
# 64 tokens: 64 KiB a layer.
LAYERS = (LayerBytes(saved=1024.0, products=512.0, attention=256.0),) * 8
CXL = {"cxl:node=1:1MiB": Speed(30e9, 3e-7), "cxl:node=2:1MiB": Speed(10e9, 3e-7)}
BOTH = "memory.tiers=['cxl:node=1:1MiB','cxl:node=2:1MiB','dram:2MiB']"
AUTO = "memory.offload_activations=auto"


def decided(
    *options: str, speeds: dict[str, Speed] | None = None, optimizer_bytes: int = MIB, on_gpu: bool = True
) -> tuple[RunConfig, dict[str, Given]]:
    config = tiny_run("c", "o", *options)
    facts = model_facts(make_config("llama", {**SETTINGS, "vocab_size": 99}))
    kinds = kinds_of(config, config.parallel, facts, LAYERS, 8, optimizer_bytes, on_gpu=on_gpu)
    places = places_of(config.memory.tiers, kinds, CXL if speeds is None else speeds, 64 * MIB)
    return config, {one.kind.name: one for one in assign(kinds, list(places.values()))}


def test_what_the_processor_steps_stays_in_dram_and_what_passes_through_is_striped_by_speed() -> None:
    _, found = decided(AUTO, "weights.offload_optimizer=cpu", BOTH)
    assert found[OPTIMIZER].shares == (("dram:2MiB", MIB),)
    assert "computed on 2 times a step" in found[OPTIMIZER].reason
    assert "lowest latency" in found[OPTIMIZER].reason
    shares = dict(found[ACTIVATIONS].shares)
    assert shares == {"cxl:node=1:1MiB": 384 * KIB, "cxl:node=2:1MiB": 128 * KIB}, "three to one"
    assert "by their speed, which keeps local DRAM for what is computed on" in found[ACTIVATIONS].reason
    assert "\n" not in found[ACTIVATIONS].text()


@pytest.mark.parametrize(("named", "where"), [("cpu", "dram:2MiB"), ("cxl", "cxl:node=2:1MiB")])
def test_a_kind_of_tier_that_the_user_names_is_the_only_one_used(named: str, where: str) -> None:
    tiers = "memory.tiers=['cxl:node=2:1MiB','dram:2MiB']"
    _, found = decided(f"memory.offload_activations={named}", tiers)
    assert found[ACTIVATIONS].shares == ((where, 512 * KIB),)


def test_a_tier_too_small_gives_the_rest_to_the_next_and_says_so() -> None:
    _, found = decided(AUTO, "memory.tiers=['cxl:emulated:200KiB']")
    shares = dict(found[ACTIVATIONS].shares)
    assert shares == {"cxl:emulated:200KiB (emulated)": 192 * KIB, HOST: 320 * KIB}, "three layers of eight"
    assert "because cxl cannot hold it" in found[ACTIVATIONS].reason


def test_an_optimizer_that_dram_cannot_hold_lies_in_cxl_memory_or_is_refused_with_the_way_out() -> None:
    config, found = decided("weights.offload_optimizer=cpu", BOTH, optimizer_bytes=3 * MIB)
    with pytest.raises(PlanError, match=r"needs 3145728 bytes .*; give more DRAM, or use 8-bit states"):
        refuse_unplaced(config, list(found.values()))
    small = "memory.tiers=['dram:512KiB','cxl:node=1:1MiB']"
    config, found = decided("weights.offload_optimizer=cpu", small)
    refuse_unplaced(config, list(found.values()))
    assert found[OPTIMIZER].shares == (("cxl:node=1:1MiB", MIB),)
    assert "local DRAM is full" in found[OPTIMIZER].reason


def test_a_named_tier_that_looks_too_small_is_tried_all_the_same() -> None:
    config, found = decided("memory.offload_activations=cxl", "memory.tiers=['cxl:node=1:100KiB']")
    refuse_unplaced(config, list(found.values()))
    assert found[ACTIVATIONS].refused is not None
    config, found = decided(AUTO, "memory.tiers=['cxl:node=1:100KiB','dram:100KiB']")
    with pytest.raises(PlanError, match=r"add a disk to memory\.tiers"):
        refuse_unplaced(config, list(found.values()))


def test_gradients_of_an_arena_are_added_up_in_dram_and_keys_are_read_from_cxl_where_a_gpu_reads_them() -> None:
    chunked = [AUTO, "memory.chunk=seco", "memory.chunk_tokens=16", BOTH]
    _, found = decided(*chunked)
    # Keys and values of 64 tokens, 2 heads of 8, in fp64, of 8 layers.
    assert sum(dict(found[ARENA].shares).values()) == 2 * 2 * 8 * 8 * 64 * 8
    assert {name for name, _ in found[ARENA].shares} == {"cxl:node=1:1MiB", "cxl:node=2:1MiB"}
    assert found[ARENA_GRADIENTS].shares[0][0] == "dram:2MiB"
    assert found[ARENA].kind.touches_per_step == 1 + 3 * 1.5, "four chunks: half of the arena lies before each"
    _, found = decided(*chunked, on_gpu=False)
    assert {name for name, _ in found[ARENA].shares} == {"dram:2MiB"}


def test_what_a_layer_keeps_follows_from_what_is_computed_again_and_what_is_swapped() -> None:
    sizes = {}
    for again in ("train.recompute=false", "train.recompute=true"):
        sizes[again] = decided(AUTO, again)[1][ACTIVATIONS].kind.parts[0]
    assert sizes == {"train.recompute=false": 64 * 1024, "train.recompute=true": 64 * 32 * 8}
    for share, products in (("0.5", 256), ("auto", 512)):
        _, found = decided(AUTO, "train.recompute=true", f"memory.swap_share={share}")
        assert found[ACTIVATIONS].kind.parts[0] == 64 * (32 * 8 + 256 + products)


def test_a_kind_of_tier_that_nobody_described_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must describe a tier of kind cxl for memory\.offload_activations=cxl"):
        decided("memory.offload_activations=cxl")


def test_only_speeds_that_decide_anything_are_asked_for() -> None:
    tiers = ["cxl:node=1:1MiB", "cxl:node=2:1MiB", "nvme:/x:1MiB"]
    config, found = decided(AUTO, f"memory.tiers={tiers}".replace(" ", ""))
    kinds = [one.kind for one in found.values()]
    places = places_of(config.memory.tiers, kinds, {}, MIB)
    assert unmeasured(config.memory.tiers, places, {}) == [0, 1]
    assert unmeasured(config.memory.tiers, places, {"cxl1": Speed(1.0, 1.0)}) == [1], "as the bench calls it"


def test_rows_of_the_bench_are_read_in_both_its_forms_and_nothing_else_is() -> None:
    row = {"read_bytes_per_s": 2.0, "write_bytes_per_s": 1.0, "read_latency_s": 0.1, "write_latency_s": 0.2}
    rows = [{"tier": "dram", **row}, {"tier": "cxl1", "not_measured": "gone"}]
    want = {"dram": Speed(1.0, 0.2)}
    for content in ({"machine": {}, "rows": rows}, {"memory": rows}):
        assert read_speeds("file", json.dumps(content).encode()) == want
    for broken in (b"", b"[]", b"{}", b'{"rows": [{"tier": "dram"}]}'):
        with pytest.raises(CorruptDataError, match="farspan bench memory --json"):
            read_speeds("file", broken)
