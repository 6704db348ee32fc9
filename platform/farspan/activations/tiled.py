"""Layers that treat every token alone, computed by tiles of tokens and computed again in backward.

Shapes: T tokens, E width in, F width out; t tokens of a tile.

Between forward and backward only the input is kept. Backward runs tile after tile on detached weights and sums their
gradients in fp32 (or wider) itself, so that whoever reduces gradients over ranks (FSDP, ZeRO) sees exactly one
gradient per weight, as after an ordinary layer.
Source: the tiled MLP of ALST (Bekman et al. 2025, https://arxiv.org/abs/2506.13996).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from transformers import PreTrainedModel

from farspan.errors import ModelError

NORM_TILES = 4
"""Tiles of a norm hold this many times the tokens of an MLP's."""

TileFunction = Callable[[Mapping[str, Tensor], Tensor, slice], Tensor]
"""(trainable weights by name, x of the tile, which rows they are) -> rows of the result."""


def by_tiles(function: TileFunction, weights: Mapping[str, Tensor], x_TE: Tensor, tile_tokens: int) -> Tensor:
    """`function` over `x_TE` [..., T, E], `tile_tokens` rows at a time: [..., T, F], or [T] where it gives [t].

    `function` must treat rows alone and depend on nothing else that needs a gradient.
    """
    assert tile_tokens >= 1, "a tile holds at least one token"
    names, tensors = tuple(weights), tuple(weights.values())
    return cast(Tensor, _ByTiles.apply(x_TE, function, names, tile_tokens, *tensors))


def call_module(module: nn.Module) -> tuple[Callable[[Mapping[str, Tensor], Tensor], Tensor], dict[str, Tensor]]:
    """(the class's own forward of `module` with given weights, the weights a gradient is wanted for, by name).

    Frozen weights, which may be quantized, are used where they are.
    """
    shell = _Shell(module)

    def call(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return cast(Tensor, functional_call(shell, dict(weights), (x,)))

    return call, {name: p for name, p in shell.named_parameters() if p.requires_grad}


def tile_mlps(model: PreTrainedModel, layers: list[nn.Module], tile_tokens: int) -> list[nn.Module]:
    """Let the MLP of each of the decoder `layers` of `model`, and only of it, run by tiles; the MLPs, in order.

    Mixtures of experts are left as they are: which tokens an expert gets is decided over all of them.
    With DeepSpeed ZeRO-3, give each module this returns to `deepspeed.utils.set_z3_leaf_module(module, True)` before
    `deepspeed.initialize`, so that its weights are gathered together.

    Raises:
        ModelError: no layer has an MLP that treats every token alone, or one drops activations at random.
    """
    mlps = [mlp for layer in layers if (mlp := _mlp_of(layer)) is not None]
    if not mlps:
        raise ModelError(
            f"{type(model).__name__} has no plain MLP in its layers (mixtures of experts cannot be tiled); "
            "switch memory.tiled_mlp off"
        )
    for mlp in mlps:
        refuse_dropout(mlp, f"a tile of {type(model).__name__}", "memory.tiled_mlp")
        # On this one module: its class, and every other model in the process, stay as they are.
        mlp.forward = partial(_forward_by_tiles, mlp, tile_tokens)
    return mlps


def tile_norms(norms: Iterable[nn.Module], tile_tokens: int) -> None:
    """Let normalizations that treat every token alone (`models.parts.token_norms`) run by tiles.

    Most of them compute in fp32 and keep several copies of all tokens in it: at long sequences the most of what a layer
    needs in backward. Their tiles are larger than those of MLPs, whose rows are so much wider: few kernels more.
    """
    for norm in norms:
        norm.forward = partial(_forward_by_tiles, norm, NORM_TILES * tile_tokens)


class _ByTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TE: Tensor, function: TileFunction, names: tuple[str, ...], tile_tokens: int, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TE, *weights)
        ctx.function, ctx.names, ctx.tile_tokens = function, names, tile_tokens
        given, out = dict(zip(names, weights, strict=True)), None
        for rows in _tiles(x_TE, tile_tokens):
            part = function(given, x_TE[..., rows, :], rows)
            if out is None:
                out = part.new_empty(*x_TE.shape[:-1], *part.shape[x_TE.ndim - 1 :])
            _rows(out, x_TE, rows).copy_(part)
        assert out is not None, "at least one tile"
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TE, *weights = ctx.saved_tensors
        wants_x, wants_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        # Detached, so that hooks on the weights themselves do not fire for a tile.
        leaves = [w.detach().requires_grad_(wanted) for w, wanted in zip(weights, wants_weights, strict=True)]
        given, wanted = dict(zip(ctx.names, leaves, strict=True)), [leaf for leaf in leaves if leaf.requires_grad]
        dx_TE = torch.zeros_like(x_TE) if wants_x else None
        sums = [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in wanted]
        for rows in _tiles(x_TE, ctx.tile_tokens):
            x_tE = x_TE[..., rows, :].detach().requires_grad_(wants_x)
            with torch.enable_grad():
                part = ctx.function(given, x_tE, rows)
            inputs = [x_tE, *wanted] if wants_x else wanted
            found = torch.autograd.grad(part, inputs, _rows(grads[0], x_TE, rows), allow_unused=True)
            if dx_TE is not None and found[0] is not None:
                dx_TE[..., rows, :] = found[0]
            for total, one in zip(sums, found[1:] if wants_x else found, strict=True):
                if one is not None:
                    total += one
        ready = iter(sums)
        dweights = (next(ready).to(leaf.dtype) if leaf.requires_grad else None for leaf in leaves)
        return dx_TE, None, None, None, *dweights


class _Shell(nn.Module):
    """Calls what the class of `inner` computes, past a forward and hooks that were put on this one module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, type(self.inner).forward(self.inner, x))


def _forward_by_tiles(module: nn.Module, tile_tokens: int, x_TE: Tensor) -> Tensor:
    if x_TE.shape[-2] <= tile_tokens and not torch.is_grad_enabled():
        return cast(Tensor, type(module).forward(module, x_TE))
    _refuse_scattered(module)
    call, weights = call_module(module)
    return by_tiles(lambda given, x_tE, rows: call(given, x_tE), weights, x_TE, tile_tokens)


def _tiles(x_TE: Tensor, tile_tokens: int) -> list[slice]:
    num_tokens = x_TE.shape[-2]
    return [slice(a, min(a + tile_tokens, num_tokens)) for a in range(0, max(num_tokens, 1), tile_tokens)]


def _rows(y: Tensor, x_TE: Tensor, rows: slice) -> Tensor:
    """The rows of a result of `x_TE`, whose token dim is the one of `x_TE`."""
    return y.narrow(x_TE.ndim - 2, rows.start, rows.stop - rows.start)


def _mlp_of(layer: nn.Module) -> nn.Module | None:
    """The MLP of a decoder layer, by the names transformers gives it; none if it has none, or not a plain one."""
    for name in ("mlp", "feed_forward"):
        mlp = getattr(layer, name, None)
        if isinstance(mlp, nn.Module) and _treats_tokens_alone(mlp):
            return mlp
    return None


def _treats_tokens_alone(module: nn.Module) -> bool:
    """Whether all weights are those of linear layers, one after another: routers and experts keep theirs otherwise."""
    holders = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    linear = all(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in holders)
    routed = any(name in ("experts", "gate", "router") for name, _ in module.named_children())
    # The module itself, and x: one that takes more (a residual, positions) may look beyond its rows.
    only_x = len(signature(type(module).forward).parameters) == 2
    return bool(holders) and linear and only_x and not routed


def refuse_dropout(module: nn.Module, what: str, field: str) -> None:
    """Refuse to compute twice what drops activations at random: it would drop others the second time.

    Raises:
        ModelError: `module` has a dropout that is not zero; switching `field` off is one way out.
    """
    for name, part in module.named_modules():
        if isinstance(part, nn.Dropout) and part.p > 0:
            raise ModelError(
                f"{what} is computed twice, but {name or 'it'} drops activations with p = {part.p} and would drop "
                f"others the second time; set dropout to 0 or switch {field} off"
            )


def _refuse_scattered(mlp: nn.Module) -> None:
    """ZeRO-3 gathers weights module by module, and would free those of a part in the middle of a tile."""
    if (
        any(mlp.children())
        and not getattr(mlp, "_z3_leaf", False)
        and any(hasattr(p, "ds_id") for p in mlp.parameters())
    ):
        raise ModelError(
            f"{type(mlp).__name__} runs by tiles under ZeRO-3, which needs its weights gathered together; call "
            "deepspeed.utils.set_z3_leaf_module(module, True) on what tile_mlps returns before deepspeed.initialize"
        )
