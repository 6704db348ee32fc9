"""Partial attention and its merge against torch's own scaled_dot_product_attention, which we did not write."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from farspan.kernels.attention.cpu import attend_cpu, attend_cpu_backward
from farspan.kernels.attention.reference import attend_reference, attend_reference_backward
from farspan.kernels.attention.tiled import attend_tiled, attend_tiled_backward
from farspan.kernels.merge.reference import merge_partials_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}
# T, query heads, kv heads, head dim of q and k, head dim of v: odd on purpose.
SHAPES = [(1, 1, 1, 8, 8), (63, 8, 2, 16, 16), (111, 4, 1, 40, 40), (40, 6, 6, 24, 16)]
BACKENDS = {
    "reference": (attend_reference, attend_reference_backward),
    "cpu": (attend_cpu, attend_cpu_backward),
    "tiled": (attend_tiled, attend_tiled_backward),
}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    tokens, q_heads, kv_heads, qk_dim, v_dim = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tokens, q_heads, qk_dim), (tokens, kv_heads, qk_dim), (tokens, kv_heads, v_dim), (tokens, q_heads, v_dim)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    batched = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*batched, is_causal=causal, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_and_its_gradients_equal_torch_sdpa(backend, shape, causal, dtype) -> None:
    q, k, v, dout = make(shape, dtype)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = oracle(*leaves, scale=0.3, causal=causal)
    want.backward(dout.double())
    forward, backward = BACKENDS[backend]
    out, lse = forward(q, k, v, scale=0.3, offset=0 if causal else None)
    grads = backward(dout, q, k, v, out, lse, scale=0.3, offset=0 if causal else None)
    for name, got, leaf in zip(
        ("out", "dq", "dk", "dv"), (out, *grads), (want, *(x.grad for x in leaves)), strict=True
    ):
        # A softmax over one key has no gradient: q and k of a single token compare against zero.
        if leaf.norm() < 1e-9:
            assert got.double().norm() < TOLERANCE[dtype], name
        else:
            assert relative_error(got, leaf) < TOLERANCE[dtype], name


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_key_ranges_with_the_merged_lse_equal_one_attention_over_both(backend) -> None:
    q, k, v, dout = make((50, 8, 2, 16, 16), torch.float64)
    forward, backward = BACKENDS[backend]
    whole, lse = forward(q, k, v, scale=0.25, offset=None)
    parts = [forward(q, k[s], v[s], scale=0.25, offset=None) for s in (slice(0, 17), slice(17, 50))]
    merged, merged_lse = merge_partials_reference(*parts[0], *parts[1])
    assert relative_error(merged, whole) < 1e-13
    assert relative_error(merged_lse, lse) < 1e-13
    want = backward(dout, q, k, v, whole, lse, scale=0.25, offset=None)
    pieces = [
        backward(dout, q, k[s], v[s], merged, merged_lse, scale=0.25, offset=None)
        for s in (slice(0, 17), slice(17, 50))
    ]
    assert relative_error(pieces[0][0] + pieces[1][0], want[0]) < 1e-12
    for index in (1, 2):
        assert relative_error(torch.cat([pieces[0][index], pieces[1][index]]), want[index]) < 1e-12


def test_a_query_that_saw_no_key_merges_to_the_other_range_and_never_to_nan() -> None:
    a, b = torch.zeros(2, 1, 4), torch.ones(2, 1, 4)
    nothing = torch.full((2, 1), float("-inf"))
    out, lse = merge_partials_reference(a, nothing, b, torch.zeros(2, 1))
    assert torch.equal(out, b)
    assert torch.equal(lse, torch.zeros(2, 1))
    out, lse = merge_partials_reference(a, nothing, b, nothing)
    assert torch.equal(out, torch.zeros_like(out))


# Queries, keys, offset, window: every kind of piece, alone and together.
BANDS = [
    (40, 40, 0, 7),
    (33, 50, 17, None),
    (33, 50, 17, 12),
    (20, 30, -9, None),
    (16, 16, 40, 30),
    (25, 25, 0, 1),
    (32, 32, 32, 32),
    (64, 20, -3, 9),
    (600, 700, 100, 64),
    (300, 20, 0, None),
]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_windows_and_soft_caps_equal_a_softmax_over_the_visible_keys(backend, band, softcap) -> None:
    num_queries, num_keys, offset, window = band
    _, k, v, _ = make((num_keys, 6, 2, 16, 16), torch.float64)
    q, _, _, dout = make((num_queries, 6, 2, 16, 16), torch.float64, seed=1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    behind = torch.arange(num_queries)[:, None] + offset - torch.arange(num_keys)
    seen = (behind >= 0) & (behind < (window or 10**9))
    wide_k, wide_v = (x.repeat_interleave(3, dim=1) for x in leaves[1:])
    scores = torch.einsum("thd,shd->hts", leaves[0], wide_k) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    # Rows without a key become zero, as the contract says.
    probs = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    want = torch.einsum("hts,shc->thc", probs, wide_v)
    want.backward(dout)
    forward, backward = BACKENDS[backend]
    rule = {"scale": 0.3, "offset": offset, "window": window, "softcap": softcap}
    out, lse = forward(q, k, v, **rule)
    grads = backward(dout, q, k, v, out, lse, **rule)
    assert bool((lse[~seen.any(1)] == float("-inf")).all())
    for name, got, leaf in zip(
        ("out", "dq", "dk", "dv"), (out, *grads), (want.detach(), *(x.grad for x in leaves)), strict=True
    ):
        expected = leaf.nan_to_num(0.0)
        assert float((got.detach() - expected).norm()) < 1e-12 * max(1.0, float(expected.norm())), name


@pytest.mark.parametrize("band", [(128, 128, 0, 32), (96, 128, 32, None), (100, 128, 60, 50)], ids=str)
def test_bf16_pieces_are_as_exact_as_one_bf16_softmax(band) -> None:
    num_queries, num_keys, offset, window = band
    _, k, v, _ = make((num_keys, 8, 2, 32, 32), torch.bfloat16)
    q, _, _, dout = make((num_queries, 8, 2, 32, 32), torch.bfloat16, seed=1)
    rule = {"scale": 0.2, "offset": offset, "window": window}
    wide = [x.double() for x in (q, k, v)]
    want, want_lse = attend_reference(*wide, **rule)
    want_grads = attend_reference_backward(dout.double(), *wide, want, want_lse, **rule)
    # The bar: torch's own bf16 kernel on the same tensors, its mask written out.
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    behind = torch.arange(num_queries)[:, None] + offset - torch.arange(num_keys)
    mask = (behind >= 0) & (behind < (window or 10**9))
    batched = [x.transpose(0, 1).unsqueeze(0) for x in leaves]
    one = torch.nn.functional.scaled_dot_product_attention(*batched, attn_mask=mask, scale=0.2, enable_gqa=True)
    one = one[0].transpose(0, 1)
    one.backward(dout)
    out, lse = attend_cpu(q, k, v, **rule)
    grads = attend_cpu_backward(dout, q, k, v, out, lse, **rule)
    assert relative_error(lse, want_lse) < 1e-5
    bars = (one, *(x.grad for x in leaves))
    for name, got, exact, bar in zip(("out", "dq", "dk", "dv"), (out, *grads), (want, *want_grads), bars, strict=True):
        assert relative_error(got, exact) < 1.5 * relative_error(bar, exact), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_with_strange_strides_give_what_their_contiguous_copies_give(backend) -> None:
    q, k, v, dout = make((30, 4, 2, 8, 8), torch.float64)
    rule = {"scale": 0.3, "offset": 0, "window": 9}
    forward, backward = BACKENDS[backend]
    want = forward(q, k, v, **rule)
    want_grads = backward(dout, q, k, v, *want, **rule)
    # Heads stored column by column; the fused kernel would read them row by row without a word.
    strange = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout)]
    got = forward(*strange[:3], **rule)
    grads = backward(strange[3], *strange[:3], *got, **rule)
    for a, b in zip((*got, *grads), (*want, *want_grads), strict=True):
        assert relative_error(a, b) < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_that_sees_nothing_is_zero_with_zero_gradients(backend) -> None:
    q, k, v, dout = make((5, 2, 1, 8, 8), torch.float32)
    forward, backward = BACKENDS[backend]
    rule = {"scale": 0.3, "offset": -5}
    out, lse = forward(q, k, v, **rule)
    assert not out.any()
    assert bool((lse == float("-inf")).all())
    assert not any(x.any() for x in backward(dout, q, k, v, out, lse, **rule))


@pytest.mark.parametrize(
    "rule",
    [{"window": None}, {"window": 100}, {"window": 100, "softcap": 5.0}, {"window": None, "softcap": 5.0}],
    ids=str,
)
def test_attention_on_cpu_never_holds_scores_of_all_queries_and_keys(rule) -> None:
    tokens = 4500
    q, k, v, dout = make((tokens, 1, 1, 8, 8), torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out, lse = attend_cpu(q, k, v, scale=0.3, offset=0, **rule)
        attend_cpu_backward(dout, q, k, v, out, lse, scale=0.3, offset=0, **rule)
    largest = max(event.cpu_memory_usage for event in profiler.events())
    # The profiler has seen the output; a mask of one byte per pair would be the largest allocation.
    assert out.nbytes <= largest <= 18 * 1024 * 1024 < tokens * tokens
