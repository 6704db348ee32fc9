"""One way to run a training step, in plain values, and the rules that make it legal whatever memory there is."""

from __future__ import annotations

from dataclasses import dataclass

from farspan.plan.profile import ModelProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the planner decides. Names and values are those of the run config (`settings`)."""

    dp: int = 1
    sp: int = 1
    strategy: str = "ulysses"
    ulysses: int = 1
    engine: str = "fsdp2"
    zero: int = 3
    tiled_mlp: bool = False
    loss_tile_tokens: int = 1024
    recompute: bool = False
    offload_activations: str = "none"
    """cpu: what is kept for backward lies in host memory; in chunk-wise training that is the KV arena."""
    swap_share: float = 0.0
    """Of a recomputed layer, the share of tokens whose products wait in memory instead. Asked for, never chosen."""
    chunk: str = "none"
    chunk_tokens: int = 0
    optimizer: str = "adamw"
    offload_optimizer: str = "none"
    lora_rank: int = 0

    @property
    def num_ranks(self) -> int:
        """Processes, one device each."""
        return self.dp * self.sp

    @property
    def shards_weights(self) -> bool:
        """Whether a rank holds a part of the weights and gathers each layer where it is used."""
        return self.engine == "fsdp2" or self.zero == 3

    def settings(self) -> dict[str, str | int | bool]:
        """The choice as keys of a run config."""
        keys: dict[str, str | int | bool] = {
            "parallel.workers": self.num_ranks,
            "parallel.sp": self.sp,
            "parallel.strategy": self.strategy,
            "weights.engine": self.engine,
            "weights.offload_optimizer": self.offload_optimizer,
            "train.recompute": self.recompute,
            "train.loss_tile_tokens": self.loss_tile_tokens,
            "memory.tiled_mlp": self.tiled_mlp,
            "memory.offload_activations": self.offload_activations,
            "memory.chunk": self.chunk,
            "optim.kind": self.optimizer,
        }
        if self.strategy == "hybrid":
            keys["parallel.ulysses"] = self.ulysses
        if self.engine == "deepspeed":
            keys["weights.zero"] = self.zero
        if self.chunk != "none":
            keys["memory.chunk_tokens"] = self.chunk_tokens
        return keys

    def sharing_text(self) -> str:
        """How a sequence is shared, in a few words."""
        if self.sp == 1:
            return "sp 1"
        how = f"hybrid {self.ulysses}x{self.sp // self.ulysses}" if self.strategy == "hybrid" else self.strategy
        return f"sp {self.sp} {how}"

    def memory_text(self) -> str:
        """What is done to save memory, in a few words."""
        words = [
            ("recompute", self.recompute),
            ("offload", self.offload_activations != "none"),
            (f"swap {self.swap_share:.0%}", self.swap_share > 0),
            ("tiled MLP", self.tiled_mlp),
            (f"{self.chunk} {_short(self.chunk_tokens)}", self.chunk != "none"),
            ("8-bit AdamW", self.optimizer == "adamw8bit"),
            ("host AdamW", self.offload_optimizer != "none"),
        ]
        return ", ".join(word for word, on in words if on) or "-"

    def weights_text(self) -> str:
        """Who shards the weights."""
        return "fsdp2" if self.engine == "fsdp2" else f"ZeRO-{self.zero}"


def broken_rule(choice: Choice, profile: ModelProfile, tokens: int) -> str | None:
    """The rule `choice` breaks for a sequence of `tokens`, or none."""
    if tokens % choice.sp:
        return f"{tokens} tokens do not divide over sp {choice.sp}"
    stripes = 2 * choice.sp // (choice.ulysses if choice.strategy == "hybrid" else 1)
    if choice.sp > 1 and choice.strategy != "ulysses" and tokens % (stripes * choice.ulysses):
        return f"{tokens} tokens do not divide into the zigzag's {stripes * choice.ulysses} stripes"
    if choice.chunk == "none":
        return None
    if profile.recurrent:
        return "chunk-wise training keeps keys and values, and recurrent layers have none"
    if choice.sp > 1 and choice.strategy != "ulysses":
        return f"chunk-wise training shares a chunk by heads (ulysses), not by {choice.strategy}"
    if choice.chunk_tokens % choice.sp:
        return f"chunks of {choice.chunk_tokens} tokens do not divide over sp {choice.sp}"
    return None


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
