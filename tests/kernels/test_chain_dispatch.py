"""Who computes chains, and normalizations as chains of one step."""

from types import SimpleNamespace

import pytest
import torch
from tests.support.chains import draw

from farspan.kernels.chain import dispatch
from farspan.kernels.chain.reference import bind_chain_reference
from farspan.kernels.rms_norm import dispatch as norm_dispatch
from farspan.kernels.rms_norm.chained import bind_by
from farspan.kernels.rms_norm.contract import Kind
from farspan.kernels.rms_norm.reference import bind_rms_norm_reference


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    dispatch.choose_chain.cache_clear()
    norm_dispatch.choose_rms_norm.cache_clear()


def test_a_gpu_gets_the_triton_kernels_and_a_processor_without_bf16_the_compiled_one(monkeypatch) -> None:
    dispatch.choose_chain.cache_clear()
    made = {"cuda": lambda *_: "on a GPU", "cpu": SimpleNamespace(tiled=False)}
    monkeypatch.setattr(dispatch, "load_triton", lambda: made["cuda"])
    monkeypatch.setattr(dispatch, "load_native", lambda: made["cpu"])
    monkeypatch.setattr(dispatch, "has_bf16_arithmetic", lambda: False)
    assert [dispatch.choose_chain(device, torch.bfloat16) for device in made] == list(made.values())
    assert dispatch.choose_chain("mps", torch.bfloat16) is None
    assert dispatch.choose_chain("cuda", torch.float32) is None


@pytest.mark.parametrize("tiled", [False, True])
def test_a_processor_with_bf16_arithmetic_keeps_torch_where_it_has_no_tiles(tiled, monkeypatch) -> None:
    dispatch.choose_chain.cache_clear()
    compiled = SimpleNamespace(tiled=tiled)
    monkeypatch.setattr(dispatch, "load_native", lambda: compiled)
    monkeypatch.setattr(dispatch, "has_bf16_arithmetic", lambda: True)
    assert dispatch.choose_chain("cpu", torch.bfloat16) is (compiled if tiled else None)


def test_a_machine_without_a_compiler_keeps_torch(monkeypatch) -> None:
    def no_compiler():
        raise ImportError("no C++ compiler is installed")

    dispatch.choose_chain.cache_clear()
    monkeypatch.setattr(dispatch, "has_bf16_arithmetic", lambda: False)
    monkeypatch.setattr(dispatch, "load_native", no_compiler)
    assert dispatch.choose_chain("cpu", torch.bfloat16) is None


@pytest.mark.parametrize(("hip", "capability"), [("6.4", (9, 4)), (None, (7, 5))])
def test_a_gpu_that_the_kernels_were_not_written_for_keeps_torch(hip, capability, monkeypatch) -> None:
    dispatch.choose_chain.cache_clear()
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert dispatch.choose_chain("cuda", torch.bfloat16) is None


def test_on_a_gpu_a_normalization_is_a_chain_of_one_step(monkeypatch) -> None:
    norm_dispatch.choose_rms_norm.cache_clear()
    monkeypatch.setattr(norm_dispatch, "choose_chain", lambda device, dtype: bind_chain_reference)
    assert norm_dispatch.choose_rms_norm("cuda", torch.bfloat16) is not None
    monkeypatch.setattr(norm_dispatch, "choose_chain", lambda device, dtype: None)
    norm_dispatch.choose_rms_norm.cache_clear()
    assert norm_dispatch.choose_rms_norm("cuda", torch.bfloat16) is None


@pytest.mark.parametrize("kind", list(Kind))
def test_a_normalization_as_a_chain_gives_the_bits_of_the_reference(kind) -> None:
    w_K, x_KT = draw(24), draw(24, 7)
    for x_TK in (x_KT.T, x_KT.T.contiguous(), x_KT.T[:0]):
        got, want = (bind(w_K, 1e-6, kind)(x_TK) for bind in (bind_by(bind_chain_reference), bind_rms_norm_reference))
        assert torch.equal(got, want)
