"""Answers of a running endpoint held against transformers' own greedy `generate`, through the openai client."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
from openai import OpenAI
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from farspan.data.reader import open_corpus
from farspan.errors import ClusterError
from farspan.models.checkpoint import load_causal_lm, load_tokenizer
from farspan.telemetry.events import RequestServed

_MAX_TOKENS = 32
_PROMPT_TOKENS = (8, 40, 200, 1000, 2500)
_TIMEOUT_S = 300.0


def prove_answers(url: str, key_file: Path, model: Path, corpus: Path, console: Console) -> list[RequestServed]:
    """Stream one completion per prompt length and compare each with `generate`.

    Raises:
        ClusterError: an answer differs.
    """
    key = key_file.read_text(encoding="utf-8").split()[0]
    client = OpenAI(base_url=url, api_key=key, timeout=_TIMEOUT_S, max_retries=0)
    name = client.models.list().data[0].id
    disable_progress_bar()
    tokenizer, network = load_tokenizer(model), load_causal_lm(model, torch.float32)
    answers = []
    for number, prompt in enumerate(_prompts(corpus, tokenizer)):
        text, body = _stream(client, url, key, name, prompt, console if number == 0 else None)
        expected = _generate(network, tokenizer, prompt)
        if text != expected:
            raise ClusterError(f"the served text differs from generate: {text!r} instead of {expected!r}")
        console.print(
            f"prompt {body.prompt_tokens:>5} tokens: equal to generate; first token {body.ttft_s * 1e3:6.0f} ms, "
            f"{body.kv_bytes / 1024:,.0f} KiB of KV by {body.transport} in {body.transfer_s * 1e3:.1f} ms",
            markup=False,
        )
        answers.append(body)
    console.print(f"{len(answers)} of {len(answers)} answers equal transformers' greedy generate", style="green")
    return answers


def _prompts(corpus: Path, tokenizer: Any) -> list[str]:
    """Beginnings of the longest document of the corpus, cut to different lengths."""
    opened = open_corpus(str(corpus), corpus)
    longest = max(range(len(opened.document_lengths)), key=lambda d: opened.document_lengths[d])
    room = opened.document_lengths[longest] - 1
    return [tokenizer.decode(opened.tokens(longest, 0, min(n, room)).tolist()) for n in _PROMPT_TOKENS]


def _stream(
    client: OpenAI, url: str, key: str, model: str, prompt: str, echo: Console | None
) -> tuple[str, RequestServed]:
    sent, stamps, parts, request_id = time.perf_counter(), [], [], ""
    for chunk in client.completions.create(
        model=model, prompt=prompt, max_tokens=_MAX_TOKENS, temperature=0.0, stream=True
    ):
        request_id = chunk.id
        if not chunk.choices or not chunk.choices[0].text:
            continue
        stamps.append(time.perf_counter())
        parts.append(chunk.choices[0].text)
        if echo is not None:
            echo.print(chunk.choices[0].text, end="", markup=False, style="dim")
    if echo is not None:
        echo.print()
    trace = _trace(url, key, request_id)
    body = RequestServed(
        request_id=request_id,
        prompt_tokens=trace["prompt_tokens"],
        output_tokens=trace["output_tokens"],
        ttft_s=stamps[0] - sent,
        inter_token_s=tuple(b - a for a, b in pairwise(stamps)),
        kv_bytes=trace["kv_bytes"],
        transfer_s=trace["transfer_s"],
        transport=trace["transport"],
        recovered=trace["recovered"],
    )
    return "".join(parts), body


def _trace(url: str, key: str, request_id: str) -> dict[str, Any]:
    answer = httpx.get(
        f"{url}/requests/{request_id}/trace", headers={"Authorization": f"Bearer {key}"}, timeout=_TIMEOUT_S
    )
    answer.raise_for_status()
    return dict(answer.json())


def _generate(network: Any, tokenizer: Any, prompt: str) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_MAX_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
