"""Where the time of a decode step goes is told in a plain table."""

from __future__ import annotations

from farspan.engine.bench_gpu import GpuBench
from farspan.engine.bench_profile import profile_decode

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
    "max_position_embeddings": 512,
}


def test_a_step_of_each_number_of_rows_is_taken_apart_by_name() -> None:
    bench = GpuBench(shape=SHAPE, dtype="float32", device="cpu", rows=(1, 3), context_tokens=20, kv_bytes=1 << 22)
    found = list(profile_decode(bench, steps=2))
    assert [each.rows for each in found] == [1, 3]
    for each in found:
        assert each.wall_ms > 0
        assert 0 < each.busy_ms <= each.profiled_ms
        assert {"aten::mm", "aten::linear"} & {kernel.name for kernel in each.kernels}
        assert [kernel.busy_ms for kernel in each.kernels] == sorted((k.busy_ms for k in each.kernels), reverse=True)
        assert f"{each.rows} rows" in next(each.table())
