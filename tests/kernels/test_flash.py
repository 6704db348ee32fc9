"""Flash-attention libraries behind our contract: what they are asked, whether they are asked rightly, and who is asked.

Without a GPU the libraries' kernels are written out in torch behind their published signatures; on one (marker `gpu`)
the installed ones are held against fp64 and against torch's SDPA in bf16.
"""

from __future__ import annotations

import logging
import sys
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from tests.support.flash import flash_backward, flash_forward
from tests.support.relative import relative_error

from farspan.kernels.attention import dispatch, flash_cudnn, flash_three, flash_torch, flash_two
from farspan.kernels.attention.backend import Backend
from farspan.kernels.attention.flash import Sight, Spans, core_of, flash_backend, require_arguments
from farspan.kernels.attention.limits import BACKENDS, Ask, decide
from farspan.kernels.attention.packed import backward_each, forward_each
from farspan.kernels.attention.reference import attend_reference, attend_reference_backward, visible

HOPPER, AMPERE = (9, 0), (8, 0)
BF16 = Ask("cuda", torch.bfloat16, 128, 128, capability=HOPPER)
# T, S, offset, window, softcap: aligned and not, rows that see nothing at either end, windows out of reach.
BANDS = [
    (37, 37, 0, None, None),
    (37, 37, 0, 7, None),
    (20, 50, 30, 9, None),
    (20, 50, 13, None, None),
    (20, 30, -9, None, None),
    (70, 20, -3, 9, None),
    (33, 40, None, None, None),
    (16, 16, 16, 16, None),
    (30, 8, 0, None, None),
    (1, 9, 8, 4, None),
    (5, 5, -5, None, None),
    (12, 12, 0, 400, 2.0),
    (40, 40, 40, 60, 2.0),
    (70, 70, 0, 23, None),
    (63, 63, 0, 21, None),
]


@pytest.mark.parametrize(
    ("ask", "absent", "name"),
    [
        (BF16, (), "flash-attn 3"),
        (BF16, ("flash-attn 3",), "torch cudnn"),
        (BF16, ("flash-attn 3", "torch cudnn"), "flash-attn 2"),
        (BF16, ("flash-attn 3", "torch cudnn", "flash-attn 2"), "torch flash"),
        (BF16, ("flash-attn 3", "torch cudnn", "flash-attn 2", "torch flash"), "triton"),
        (BF16, ("flash-attn 3", "torch cudnn", "flash-attn 2", "torch flash", "triton"), "tiled"),
        (Ask("cuda", torch.bfloat16, 128, 128, capability=AMPERE), (), "flash-attn 2"),
        (Ask("cuda", torch.bfloat16, 128, 128, capability=(10, 0)), ("flash-attn 2",), "torch flash"),
        (Ask("cuda", torch.bfloat16, 128, 128, capability=(7, 5)), (), "triton"),
        (Ask("cuda", torch.float64, 128, 128, capability=HOPPER), (), "triton"),
        (Ask("cuda", torch.float32, 64, 64, capability=HOPPER), (), "triton"),
        (Ask("cuda", torch.bfloat16, 192, 128, capability=HOPPER), (), "triton"),
        (Ask("cuda", torch.bfloat16, 512, 512, capability=HOPPER), (), "triton"),
        (Ask("cuda", torch.bfloat16, 100, 100, capability=HOPPER), (), "triton"),
        (Ask("cuda", torch.bfloat16, 256, 256, True, HOPPER), ("flash-attn 3",), "flash-attn 2"),
        (Ask("cuda", torch.bfloat16, 256, 256, True, HOPPER), ("flash-attn 3", "flash-attn 2"), "triton"),
        (Ask("cpu", torch.float64, 24, 40, True), (), "cpu"),
        (Ask("mps", torch.float32, 64, 64), (), "tiled"),
    ],
)
def test_each_case_gets_the_best_backend_that_computes_it(ask: Ask, absent: tuple[str, ...], name: str) -> None:
    decision = decide(ask, dict.fromkeys(absent, "is not installed"))
    assert decision.name == name
    before = list(BACKENDS)[: list(BACKENDS).index(name)]
    assert [passed for passed, _ in decision.passed_over] == before
    assert all(reason for _, reason in decision.passed_over)


def test_a_missing_library_is_passed_over_and_named_once_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    ask = Ask("cuda", torch.bfloat16, 64, 64, True, (12, 7))
    with caplog.at_level(logging.INFO, dispatch.__name__):
        names = {dispatch.choose_backend(ask).name for _ in range(3)}
    assert names <= {"flash-attn 2", "triton", "tiled"}
    (line,) = caplog.messages
    assert "torch flash has no soft cap" in line
    assert "flash-attn 3 is not made for compute capability 12.7" in line


@pytest.mark.parametrize("window", [None, 1, 4, 11, 40])
def test_the_window_a_flash_kernel_is_given_hides_exactly_what_the_contract_hides(window: int | None) -> None:
    for queries in (1, 2, 5, 9):
        for keys in (1, 3, 9):
            for offset in range(-12, 24):
                want = visible(queries, keys, offset, window, torch.device("cpu"))
                got = torch.zeros_like(want)
                core = core_of(queries, keys, offset, window)
                if core is not None:
                    num_q, num_k = (s.stop - s.start for s in (core.queries, core.keys))
                    behind = torch.arange(num_q)[:, None] + num_k - num_q - torch.arange(num_k)
                    seen = (behind <= core.left) | torch.tensor(core.left < 0)
                    seen &= (behind >= -core.right) | torch.tensor(core.right < 0)
                    got[core.queries, core.keys] = seen
                    assert bool(seen.any(1).all()), "a row without a key has no log-sum-exp"
                    assert min(core.left, core.right) >= -1
                assert torch.equal(got, want), (queries, keys, offset, window)


def as_flash_two() -> ModuleType:
    """flash_attn.flash_attn_interface with the signatures of version 2.8."""
    library, module = torch.library, ModuleType("flash_attn.flash_attn_interface")

    @library.custom_op("flash_attn_test::_flash_attn_varlen_forward", mutates_args=())
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None, return_softmax: bool = False,
        block_table: torch.Tensor | None = None, leftpad_k: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None, zero_tensors: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        right = 0 if causal else window_size_right
        out, lse = flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left, right, softcap)
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())
        return out, lse, q.new_empty(0), q.new_empty(2)

    @library.custom_op("flash_attn_test::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
    def backward(
        dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        softmax_lse: torch.Tensor, dq: torch.Tensor | None, dk: torch.Tensor | None, dv: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int,
        softcap: float, alibi_slopes: torch.Tensor | None, deterministic: bool,
        rng_state: torch.Tensor | None = None, zero_tensors: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        right = 0 if causal else window_size_right
        found = flash_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left, right, softcap
        )
        for into, grad in zip((dq, dk, dv), found, strict=True):
            assert into is not None
            into.copy_(grad)
        return q.new_empty(0)

    module._wrapped_flash_attn_varlen_forward = torch.ops.flash_attn_test._flash_attn_varlen_forward  # type: ignore[attr-defined]
    module._wrapped_flash_attn_varlen_backward = torch.ops.flash_attn_test._flash_attn_varlen_backward  # type: ignore[attr-defined]
    module.keep = (forward, backward)  # type: ignore[attr-defined]
    return module


def as_flash_three() -> ModuleType:
    """flash_attn_interface with the signatures of version 3."""
    library, module = torch.library, ModuleType("flash_attn_interface")

    @library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=())
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
        softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1,
        window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        right = 0 if causal else window_size_right
        out, lse = flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left, right, softcap)
        return out, lse, q.new_empty(0), q.new_empty(0)

    @library.custom_op("flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
    def backward(
        dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        softmax_lse: torch.Tensor, cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_k: torch.Tensor | None = None,
        sequed_q: torch.Tensor | None = None, sequed_k: torch.Tensor | None = None, max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None, dq: torch.Tensor | None = None, dk: torch.Tensor | None = None,
        dv: torch.Tensor | None = None, softmax_scale: float | None = None, is_causal: bool = False,
        window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False,
        sm_margin: int = 0,
    ) -> torch.Tensor:  # fmt: skip
        right = 0 if is_causal else window_size_right
        found = flash_backward(
            dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size_left, right, softcap
        )
        for into, grad in zip((dq, dk, dv), found, strict=True):
            assert into is not None
            into.copy_(grad)
        return q.new_empty(0)

    module.keep = (forward, backward)  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="module")
def libraries() -> dict[str, ModuleType]:
    return {"flash_attn.flash_attn_interface": as_flash_two(), "flash_attn_interface": as_flash_three()}


@pytest.fixture
def installed(libraries: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch):
    """The written-out libraries as if they were installed, and torch's own kernel on CPU."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    for name, module in libraries.items():
        monkeypatch.setitem(sys.modules, name, module)

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left,
                window_size_right):  # fmt: skip
        out, lse = flash_forward(q, k, v, cu_q, cu_k, scale, window_size_left, window_size_right, None)
        return out, lse, q.new_empty(2), q.new_empty(0), q.new_empty(0)

    def backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, state, unused, *, scale,
                 window_size_left, window_size_right):  # fmt: skip
        assert causal == (window_size_left < 0 and window_size_right == 0)
        return flash_backward(dout, q, k, v, out, lse, cu_q, cu_k, scale, window_size_left, window_size_right, None)

    # Arguments that have their defaults are not handed on.
    def cudnn_forward(q, k, v, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
        assert (bias, with_lse, dropout, debug) == (None, True, 0.0, False)
        (q, k, v), ends = (x[0].transpose(0, 1) for x in (q, k, v)), ((0, q.shape[2]), (0, k.shape[2]))
        # From the top left corner: with as many keys as queries that is the bottom right one, too.
        assert not causal or ends[0] == ends[1]
        out, lse = flash_forward(q, k, v, *ends, scale, -1, 0 if causal else -1, None)
        none = q.new_empty(0)
        return out.transpose(0, 1)[None], lse[None, :, :, None], none, none, 0, 0, none, none, none

    def cudnn_backward(dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *,
                       scale):  # fmt: skip
        assert (max_q, max_k, dropout) == (q.shape[2], k.shape[2], 0.0)
        ends, right = ((0, max_q), (0, max_k)), 0 if causal else -1
        each = [
            flash_backward(*(x.transpose(0, 1) for x in parts), row[..., 0], *ends, scale, -1, right, None)
            for *parts, row in zip(dout, q, k, v, out, lse, strict=True)
        ]
        return tuple(torch.stack([grad.transpose(0, 1) for grad in grads]) for grads in zip(*each, strict=True))

    written = torch.library.Library("aten", "IMPL")
    written.impl("_flash_attention_forward", forward, "CPU")
    written.impl("_flash_attention_backward", backward, "CPU")
    written.impl("_scaled_dot_product_cudnn_attention", cudnn_forward, "CPU")
    written.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    yield
    written._destroy()


ROOMS = {"torch flash": flash_torch, "flash-attn 2": flash_two, "flash-attn 3": flash_three}
ROOMS["torch cudnn"] = flash_cudnn
# The documents of these tests are shorter than those cuDNN is given: here it gets what has 20 queries.
SETTINGS = {"torch cudnn": {"least_tokens": 20}}


def make(queries: int, keys: int, device: str = "cpu", dtype=torch.float32, heads=(4, 2), dim: int = 16) -> list:
    generator = torch.Generator().manual_seed(0)
    sizes = [(queries, heads[0], dim), (keys, heads[1], dim), (keys, heads[1], dim), (queries, heads[0], dim)]
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def both_ways(forward, backward, q, k, v, dout, **rule) -> tuple[torch.Tensor, ...]:
    out, lse = forward(q, k, v, **rule)
    return out, lse, *backward(dout, q, k, v, out, lse, **rule)


def assert_equal(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], allowed: float) -> None:
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert a.shape == b.shape, name
        assert torch.equal(a.isneginf(), b.isneginf()), name
        a, b = (x.masked_fill(x.isneginf(), 0.0).double() for x in (a, b))
        assert float((a - b).norm()) <= allowed * max(1.0, float(b.norm())), name


@pytest.mark.parametrize(
    ("name", "band"), [(name, b) for name in ROOMS for b in BANDS if b[4] is None or BACKENDS[name].softcap], ids=str
)
@pytest.mark.usefixtures("installed")
def test_a_pair_asked_of_a_flash_library_equals_the_reference(name: str, band) -> None:
    queries, keys, offset, window, softcap = band
    backend = flash_backend(name, ROOMS[name].load_kernel(**SETTINGS.get(name, {})))
    q, k, v, dout = make(queries, keys)
    rule = {"scale": 0.3, "offset": offset, "window": window, "softcap": softcap}
    got = both_ways(backend.forward, backend.backward, q, k, v, dout, **rule)
    assert_equal(got, both_ways(attend_reference, attend_reference_backward, q, k, v, dout, **rule), 1e-5)


@pytest.mark.parametrize("window", [None, 1, 9, 20, 60])
@pytest.mark.parametrize("name", ROOMS)
@pytest.mark.usefixtures("installed")
def test_packed_documents_asked_of_a_flash_library_equal_each_document_alone(name: str, window: int | None) -> None:
    backend = flash_backend(name, ROOMS[name].load_kernel(**SETTINGS.get(name, {})))
    q, k, v, dout = make(60, 60)
    # Heads before tokens, as models hand them over; a gradient that is one number expanded.
    q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    dout = torch.ones((), dtype=dout.dtype).expand(dout.shape)
    rule = {"bounds": (0, 1, 18, 18, 58, 60), "scale": 0.3, "window": window}
    got = both_ways(backend.packed_forward, backend.packed_backward, q, k, v, dout, **rule)
    alone = forward_each(attend_reference), backward_each(attend_reference_backward)
    assert_equal(got, both_ways(*alone, q, k, v, dout, **rule), 1e-5)


@pytest.mark.parametrize("name", ROOMS)
@pytest.mark.usefixtures("installed")
def test_two_pairs_with_the_final_log_sum_exp_give_the_gradients_of_one(name: str) -> None:
    backend = flash_backend(name, ROOMS[name].load_kernel(**SETTINGS.get(name, {})))
    q, k, v, dout = make(24, 40)
    rule = {"scale": 0.3, "offset": None}
    out, lse = backend.forward(q, k, v, **rule)
    want = backend.backward(dout, q, k, v, out, lse, **rule)
    parts = [backend.backward(dout, q, k[s], v[s], out, lse, **rule) for s in (slice(0, 17), slice(17, 40))]
    assert relative_error(parts[0][0] + parts[1][0], want[0]) < 1e-5
    for index in (1, 2):
        assert relative_error(torch.cat([parts[0][index], parts[1][index]]), want[index]) < 1e-5


@pytest.mark.parametrize("name", ["torch flash", "torch cudnn"])
def test_torchs_own_operators_take_the_arguments_we_give_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound by torch itself on tensors without data: a wrong name, order or type fails here, without a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    backend = flash_backend(name, ROOMS[name].load_kernel(**dict.fromkeys(SETTINGS.get(name, {}), 13)))
    q, k, v, dout = make(12, 20, "meta", torch.bfloat16)
    got = both_ways(backend.forward, backend.backward, q, k, v, dout, scale=0.3, offset=8, window=5)
    assert [x.shape for x in got] == [q.shape, q.shape[:2], q.shape, k.shape, v.shape]
    q, k, v, dout = make(20, 20, "meta", torch.bfloat16)
    got = both_ways(backend.packed_forward, backend.packed_backward, q, k, v, dout, bounds=(0, 7, 20), scale=0.3)
    assert [x.shape for x in got] == [q.shape, q.shape[:2], q.shape, k.shape, v.shape]


CAUSAL, WINDOWED = Sight(1.0, -1, 0, None), Sight(1.0, 5, 0, None)


@pytest.mark.parametrize(
    ("queries", "keys", "sight", "runs"),
    [
        ((0, 3, 5, 25, 27), None, CAUSAL, [(0, 2, False), (2, 3, True), (3, 4, False)]),
        ((0, 20, 40), None, CAUSAL, [(0, 1, True), (1, 2, True)]),
        ((0, 20, 40), None, WINDOWED, [(0, 2, False)]),
        ((0, 20, 40), None, Sight(1.0, -1, 0, 2.0), [(0, 2, False)]),
        # Causal with more keys than queries: cuDNN counts from the other corner.
        ((0, 20), (0, 30), CAUSAL, [(0, 1, False)]),
        ((0, 20), (0, 30), Sight(1.0, -1, -1, None), [(0, 1, True)]),
        ((0, 19), None, CAUSAL, [(0, 1, False)]),
    ],
)
@pytest.mark.usefixtures("installed")
def test_long_documents_are_computed_one_by_one_and_what_lies_between_them_together(queries, keys, sight, runs) -> None:
    kernel = flash_cudnn.load_kernel(least_tokens=20)
    keys = keys or queries
    none = torch.empty(0)
    found = kernel._runs(Spans(none, none, queries[-1], keys[-1], queries, keys), sight)
    assert [(run.first, run.stop, run.kernel is kernel.long) for run in found] == runs


def test_a_library_with_another_interface_is_refused_before_it_is_called() -> None:
    op = torch.ops.aten._flash_attention_forward
    with pytest.raises(ImportError, match="has no argument windows"):
        require_arguments(op, ("max_q", "windows"), num_returns=5)
    with pytest.raises(ImportError, match="gives 5 results, not 4"):
        require_arguments(op, ("max_q",), num_returns=4)


# On a GPU: the installed kernels themselves, in bf16, beside torch's SDPA in bf16 and against fp64.
GPU_BANDS = [(256, 256, 0, None), (256, 256, 0, 65), (192, 320, 128, 100), (200, 333, 133, None), (96, 160, -20, None),
             (130, 70, None, None), (128, 128, 128, 128), (1, 300, 299, None), (400, 400, 0, 96),
             (512, 512, 0, 128)]  # fmt: skip

ON_GPU = [*(name for name in BACKENDS if name != "cpu"), "torch cudnn, short documents too"]


def sdpa_errors(q, k, v, dout, seen: torch.Tensor, exact: tuple[torch.Tensor, ...]) -> list[float]:
    """Errors of torch's SDPA in bf16 with its mask written out: out, dq, dk, dv. Rows without a key stay out."""
    rows = seen.any(1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    batched = [x.transpose(0, 1).unsqueeze(0) for x in (leaves[0][rows], *leaves[1:])]
    out = torch.nn.functional.scaled_dot_product_attention(*batched, attn_mask=seen[rows], scale=0.2, enable_gqa=True)[
        0
    ].transpose(0, 1)
    out.backward(dout[rows])
    whole = torch.zeros_like(q)
    whole[rows] = out.detach()
    return [relative_error(a, b) for a, b in zip((whole, *(x.grad for x in leaves)), exact, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("band", GPU_BANDS, ids=str)
@pytest.mark.parametrize("name", ON_GPU)
def test_bf16_on_a_gpu_is_as_exact_as_torch_sdpa(name: str, band, dim: int, heads) -> None:
    queries, keys, offset, window = band
    q, k, v, dout = make(queries, keys, "cuda", torch.bfloat16, heads, dim)
    backend = on_gpu(name, Ask.of(q, v))
    rule = {"scale": 0.2, "offset": offset, "window": window}
    wide = [x.double() for x in (q, k, v)]
    want = both_ways(attend_reference, attend_reference_backward, *wide, dout.double(), **rule)
    got = both_ways(backend.forward, backend.backward, q, k, v, dout, **rule)
    seen = torch.ones(queries, keys, dtype=torch.bool, device="cuda")
    if offset is not None:
        seen = visible(queries, keys, offset, window, q.device)
    bars = sdpa_errors(q, k, v, dout, seen, (want[0], *want[2:]))
    for label, a, b, bar in zip(("out", "dq", "dk", "dv"), (got[0], *got[2:]), (want[0], *want[2:]), bars, strict=True):
        assert relative_error(a, b) <= 2.5 * bar + 1e-6, label
    assert torch.equal(got[1].isneginf(), want[1].isneginf())
    assert torch.allclose(got[1].double(), want[1], atol=2e-3, rtol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40, 70])
@pytest.mark.parametrize("name", ON_GPU)
def test_packed_documents_on_a_gpu_are_as_exact_as_torch_sdpa(name: str, window: int | None) -> None:
    bounds = (0, 1, 130, 130, 300, 512)
    q, k, v, dout = make(512, 512, "cuda", torch.bfloat16, (8, 2), 128)
    backend = on_gpu(name, Ask.of(q, v))
    rule = {"bounds": bounds, "scale": 0.2, "window": window}
    wide = [x.double() for x in (q, k, v)]
    alone = forward_each(attend_reference), backward_each(attend_reference_backward)
    want = both_ways(*alone, *wide, dout.double(), **rule)
    got = both_ways(backend.packed_forward, backend.packed_backward, q, k, v, dout, **rule)
    seen = torch.zeros(512, 512, dtype=torch.bool, device="cuda")
    for a, b in pairwise(bounds):
        seen[a:b, a:b] = visible(b - a, b - a, 0, window, q.device)
    bars = sdpa_errors(q, k, v, dout, seen, (want[0], *want[2:]))
    for label, a, b, bar in zip(("out", "dq", "dk", "dv"), (got[0], *got[2:]), (want[0], *want[2:]), bars, strict=True):
        assert relative_error(a, b) <= 2.5 * bar + 1e-6, label


def on_gpu(name: str, ask: Ask) -> Backend:
    if name == ON_GPU[-1]:
        if reason := BACKENDS["torch cudnn"].refusal(ask):
            pytest.skip(reason)
        return flash_backend(name, flash_cudnn.load_kernel(least_tokens=64))
    if reason := BACKENDS[name].refusal(ask):
        pytest.skip(reason)
    try:
        return dispatch.load_backend(name)
    except ImportError as problem:
        pytest.skip(str(problem))
