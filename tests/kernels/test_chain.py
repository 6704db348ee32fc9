"""A chain of steps in one call equals its steps one by one, whoever is beside a row."""

import shutil
import threading
from dataclasses import replace

import pytest
import torch
from tests.support.chains import GIVEN, WANTED, WIDTH, block, draw, rows, wide
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from farspan.kernels.chain import native
from farspan.kernels.chain.contract import Activation, Add, Gate, Multiply, Normalize, Rotate
from farspan.kernels.chain.reference import bind_chain_reference
from farspan.kernels.rms_norm.contract import Kind


@pytest.fixture(params=["as it is", "no tiles"])
def load_native(request):
    """The kernel as this processor runs it, and where it multiplies by matrix tiles also without."""
    if request.param == "no tiles" and not (shutil.which("g++") and native.load_native().tiled):
        pytest.skip("this processor has no matrix tiles")
    made = native.load_native
    return made if request.param == "as it is" else lambda: replace(made(), tiled=False)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 9, 40, 130, 1100])
@pytest.mark.parametrize(
    ("kind", "activation"), [(Kind.SCALED, Activation.SILU), (Kind.ONE_MORE, Activation.GELU_TANH)]
)
def test_a_whole_block_in_one_call_is_as_exact_as_its_steps_in_torch(
    kind, activation, count, num_threads, threads, load_native
) -> None:
    threads(num_threads)
    steps, given = block(kind, activation), rows(count)
    got, want = (bind(steps, GIVEN, WANTED)(*given) for bind in (load_native(), bind_chain_reference))
    exact = bind_chain_reference(wide(steps), GIVEN, WANTED)(*(x.double() for x in given))
    for ours, torchs, truth in zip(got, want, exact, strict=True):
        assert ours.shape == torchs.shape
        assert ours.dtype == torch.bfloat16
        assert float((ours.double() - truth).norm()) <= 1.2 * float((torchs.double() - truth).norm())


STEPS = {
    "multiplied": Multiply("x", "y", draw(40, 48), draw(40)),
    "normalized": Normalize("x", "y", draw(16), 1e-6, Kind.SCALED),
    "one more": Normalize("x", "y", draw(48), 1e-6, Kind.ONE_MORE),
    "silu": Gate("x", "z", "y", Activation.SILU),
    "gelu": Gate("x", "z", "y", Activation.GELU_TANH),
    "added": Add("x", "z", "y"),
}


@needs_compiler
@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
def test_each_step_equals_the_reference_to_a_rounding(step, load_native) -> None:
    given = (draw(11, 48) * torch.logspace(-3, 1.5, 11)[:, None].bfloat16(), draw(11, 48, seed=1))
    got, want = (bind([step], {"x": 48, "z": 48}, ["y"])(*given)[0] for bind in (load_native(), bind_chain_reference))
    torch.testing.assert_close(got.float(), want.float(), rtol=2**-6, atol=1e-5)
    # Two roundings from the truth. In torch small sums of large parts are not: the gelu of a very negative number.
    truth = bind_chain_reference(wide([step]), {"x": 48, "z": 48}, ["y"])(*(x.double() for x in given))[0]
    if not isinstance(step, Multiply):
        assert bool(((got.double() - truth).abs() <= 2**-7 * truth.abs() + 1e-13).all())


@needs_compiler
@pytest.mark.parametrize("bind", ["native", "reference"])
def test_rotation_gives_the_bits_that_transformers_gives(bind, load_native) -> None:
    q_THD, angles = draw(5, 3, 16), draw(5, 8).float().repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    want, _ = apply_rotary_pos_emb(q_THD, q_THD, cos, sin)
    made = load_native() if bind == "native" else bind_chain_reference
    chain = made([Rotate("q", "cos", "sin", "y", 16)], {"q": 48, "cos": 16, "sin": 16}, ["y"])
    assert torch.equal(chain(q_THD.flatten(1), cos, sin)[0].view(5, 3, 16), want)


@needs_compiler
def test_a_row_gives_the_same_bits_alone_and_among_others(threads, load_native) -> None:
    chain, given = load_native()(block(Kind.SCALED, Activation.SILU), GIVEN, WANTED), rows(1100)
    whole = chain(*given)
    threads(1)
    sizes = [(0, 1), (1, 1), (2, 7), (9, 61), (70, 130), (200, 900)]
    parts = [chain(*(x[i : i + size] for x in given)) for i, size in sizes]
    for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart))


@needs_compiler
def test_rows_that_lie_apart_and_numbers_that_are_none_stay_by_themselves(load_native) -> None:
    chain, given = load_native()(block(Kind.SCALED, Activation.SILU), GIVEN, WANTED), rows(4)
    spread = torch.full((8, 64), float("nan")).bfloat16()
    spread[::2, :WIDTH] = given[0]
    for got, want in zip(chain(spread[::2, :WIDTH], *given[1:]), chain(*given), strict=True):
        assert torch.equal(got, want)
    given[0][1, 7] = float("nan")
    for got in chain(*given):
        assert got[1].isnan().any()
        assert got[[0, 2, 3]].isfinite().all()


@needs_compiler
def test_calls_from_several_threads_at_once_give_what_each_gives_alone(threads, load_native) -> None:
    threads(3)
    chain = load_native()(block(Kind.SCALED, Activation.SILU), GIVEN, WANTED)
    given = [tuple(x + 0.5 * i for x in rows(3 + i)) for i in range(4)]
    want, wrong = [chain(*each) for each in given], []

    def ask(i):
        # What torch computes with is a setting of each thread.
        torch.set_num_threads(3)
        for _ in range(200):
            if not all(torch.equal(a, b) for a, b in zip(chain(*given[i]), want[i], strict=True)):
                wrong.append(i)

    asking = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in asking)
    assert wrong == []
