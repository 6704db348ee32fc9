"""A process of `farspan bench engine`: one engine over one checkpoint, asked through pipes.

    python bench_contenders.py CONTENDER FOLDER THREADS KV_BYTES ANSWERS

Questions are lines of JSON on stdin, {"prompts": [[token, ...], ...], "new_tokens": n}; answers are lines of JSON on
the file descriptor ANSWERS, {"seconds": s, "tokens": [[token, ...], ...]}: libraries print on stdout as they like.
The first line says {"ready": true}. Answers are greedy and exactly `new_tokens` long.

Runs by its path in an environment that need not hold farspan (vLLM's has its own torch): it imports nothing of farspan
but where farspan is asked for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Answer = Callable[[list[list[int]], int], list[list[int]]]

FARSPAN, GENERATE, BATCHED, VLLM = "farspan", "transformers generate", "transformers batching", "vllm"
_PAGE_TOKENS = 16


def open_farspan(folder: str, threads: int, kv_bytes: int) -> Answer:
    from pathlib import Path

    import torch

    from farspan.config.schema import EngineConfig
    from farspan.engine.engine import Engine
    from farspan.models.checkpoint import load_causal_lm

    torch.set_num_threads(threads)
    dtype = _dtype(folder)
    model = load_causal_lm(Path(folder), getattr(torch, dtype)).to(_device())
    return by_engine(Engine(model, EngineConfig(dtype=dtype, kv_bytes=kv_bytes, page_tokens=_PAGE_TOKENS)))


def by_engine(engine: Any) -> Answer:
    """farspan's own."""
    from farspan.engine.request import SamplingParams

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        return [list(completion.tokens) for completion in engine.generate(prompts, params)]

    return answer


def open_generate(folder: str, threads: int, kv_bytes: int) -> Answer:
    return by_generate(_plain(folder, threads))


def by_generate(model: Any) -> Answer:
    import torch

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        # All prompts of a question are equally long: nothing is padded.
        tokens_BT = torch.tensor(prompts, device=model.device)
        with torch.inference_mode():
            found = model.generate(
                tokens_BT,
                attention_mask=torch.ones_like(tokens_BT),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return found[:, tokens_BT.shape[1] :].tolist()

    return answer


def open_batched(folder: str, threads: int, kv_bytes: int) -> Answer:
    return by_batching(_plain(folder, threads), kv_bytes, _PAGE_TOKENS)


def by_batching(model: Any, kv_bytes: int, page_tokens: int) -> Answer:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model.set_attn_implementation("paged|sdpa")
    text = model.config
    page_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
    pages = kv_bytes // (page_bytes * page_tokens)
    batching = ContinuousBatchingConfig(block_size=page_tokens, num_blocks=pages, max_batch_tokens=2048)

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        wanted = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        # Its pages and threads stay from question to question, as ours do; answers come in the order of the prompts.
        found = model.generate_batch(
            prompts, generation_config=wanted, continuous_batching_config=batching, persistent_manager=True
        )
        return [list(output.generated_tokens) for output in found.values()]

    return answer


def open_vllm(folder: str, threads: int, kv_bytes: int) -> Answer:
    # Threads and room for KV are in its environment: that is where its CPU build looks.
    from vllm import LLM, SamplingParams

    engine = LLM(model=folder, skip_tokenizer_init=True, dtype=_dtype(folder), max_num_batched_tokens=8192)

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = engine.generate(asked, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in found]

    return answer


OPEN: dict[str, Callable[[str, int, int], Answer]] = {
    FARSPAN: open_farspan,
    GENERATE: open_generate,
    BATCHED: open_batched,
    VLLM: open_vllm,
}


def _plain(folder: str, threads: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, _dtype(folder)))
    return model.to(_device()).eval()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(folder: str) -> str:
    with open(os.path.join(folder, "config.json")) as file:
        config = json.load(file)
    return str(config.get("dtype") or config["torch_dtype"])


def main() -> None:
    name, folder, threads, kv_bytes, descriptor = sys.argv[1:]
    with os.fdopen(int(descriptor), "w") as answers:
        answer = OPEN[name](folder, int(threads), int(kv_bytes))
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            question = json.loads(line)
            started = time.perf_counter()
            tokens = answer(question["prompts"], question["new_tokens"])
            found = {"seconds": time.perf_counter() - started, "tokens": tokens}
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    # vLLM starts processes of its own, which import this file again.
    main()
