"""What decoder layers and gated MLPs of transformers are made of, as steps of a chain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from farspan.engine.norms import Norm, known_norm
from farspan.kernels.chain.contract import Activation, Add, Gate, Multiply, Normalize, Rotate, Step
from farspan.kernels.chain.reference import activate


@dataclass(frozen=True, slots=True)
class Guard:
    """Whether a module still is what it was: the same weights in the same place, and no hook at any of its parts."""

    weights: tuple[tuple[Mapping[str, Tensor | None], str, Tensor, int], ...]
    hooks: tuple[object, ...]

    @classmethod
    def of(cls, module: nn.Module) -> Guard:
        parts = [part for part in module.modules() if part is not module]
        weights = tuple(
            (part._parameters, name, weight, weight.data_ptr())
            for part in parts
            for name, weight in part._parameters.items()
            if weight is not None
        )
        return cls(weights, tuple(hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)))

    def holds(self) -> bool:
        if any(self.hooks):
            return False
        return all(there.get(name) is weight and weight.data_ptr() == at for there, name, weight, at in self.weights)


@dataclass(frozen=True, slots=True)
class MlpParts:
    """down(activation(gate x) * up x)"""

    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: Activation

    @property
    def width(self) -> int:
        return self.gate.in_features

    def steps(self, x: str, y: str) -> list[Step]:
        return [
            _multiply(self.gate, x, "gate"),
            _multiply(self.up, x, "up"),
            Gate("gate", "up", "inner", self.activation),
            _multiply(self.down, "inner", y),
        ]


def mlp_parts(module: nn.Module) -> MlpParts | None:
    """A gated MLP by its usual names."""
    gate, up, down = (_linear(module, name) for name in ("gate_proj", "up_proj", "down_proj"))
    activation = _activation(getattr(module, "act_fn", None))
    if activation is None or gate is None or up is None or down is None:
        return None
    fits = gate.weight.shape == up.weight.shape == down.weight.shape[::-1]
    return MlpParts(gate, up, down, activation) if fits else None


def _activation(module: object) -> Activation | None:
    """Which one a module is, by what it makes of numbers."""
    if not isinstance(module, nn.Module) or list(module.parameters()):
        return None
    x = torch.linspace(-9, 9, 97, dtype=torch.float64)
    with torch.inference_mode():
        y = module(x)
        return next((a for a in Activation if torch.allclose(y, activate(x, a), rtol=1e-9, atol=1e-12)), None)


@dataclass(frozen=True, slots=True)
class Parts:
    """A decoder layer with normalizations before or after what they belong to, or both."""

    attention: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    mlp: MlpParts
    dim: int
    """Of a head."""
    norms: dict[str, Norm]
    """By what they normalize: "x" and "q", "k" before attention, "o" after it, "m" before the MLP, "d" after it."""
    turned: bool = True
    """Whether q and k turn with the position."""

    @property
    def width(self) -> int:
        return self.q.in_features

    @property
    def attended(self) -> int:
        """Width of what attention gives back."""
        return self.o.in_features

    @property
    def heads(self) -> tuple[str, str, str]:
        """The rows that attention gets."""
        return ("q turned", "k turned", "v") if self.turned else (self._named("q"), self._named("k"), "v")

    def with_turns(self, turned: bool) -> Parts:
        return replace(self, turned=turned)

    def given(self, num_angles: int) -> dict[str, int]:
        """What `before` needs."""
        return {"x": self.width, **({"cos": num_angles, "sin": num_angles} if self.turned else {})}

    def before(self) -> list[Step]:
        """From the layer's input to what attention gets."""
        x = self._named("x")
        steps = [*self._norm("x"), _multiply(self.q, x, "q"), _multiply(self.k, x, "k"), _multiply(self.v, x, "v")]
        for name in ("q", "k"):
            steps += self._norm(name)
            if self.turned:
                steps.append(Rotate(self._named(name), "cos", "sin", f"{name} turned", self.dim))
        return steps

    def after(self) -> list[Step]:
        """From what attention gives back, "a", and the layer's input to its output."""
        steps = [_multiply(self.o, "a", "o"), *self._norm("o"), Add("x", self._named("o"), "m"), *self._norm("m")]
        steps += self.mlp.steps(self._named("m"), "d")
        return [*steps, *self._norm("d"), Add("m", self._named("d"), "y")]

    def _named(self, name: str) -> str:
        """Rows after their normalization, where they have one."""
        return f"{name} normalized" if name in self.norms else name

    def _norm(self, name: str) -> Iterator[Step]:
        if name in self.norms:
            norm = self.norms[name]
            yield Normalize(name, self._named(name), norm.weight_K, norm.eps, norm.kind)


_ATTENTION, _MLP = "self_attn", "mlp"


def attention_parts(layer: nn.Module) -> Parts | None:
    """A decoder layer by the usual names of its parts; none where it has any other part."""
    attention, mlp = getattr(layer, _ATTENTION, None), getattr(layer, _MLP, None)
    inside = mlp_parts(mlp) if isinstance(mlp, nn.Module) else None
    if inside is None or not isinstance(attention, nn.Module):
        return None
    q, k, v, o = (_linear(attention, f"{name}_proj") for name in "qkvo")
    dim = getattr(attention, "head_dim", None)
    own = [*attention.parameters(recurse=False), *layer.parameters(recurse=False)]
    if own or q is None or k is None or v is None or o is None or not isinstance(dim, int):
        return None
    places = {f"{name}_norm": name for name in ("q", "k")}
    around = {"input_layernorm": "x", "post_attention_layernorm": "m"}
    if hasattr(layer, "post_feedforward_layernorm"):
        around |= {"post_attention_layernorm": "o", "pre_feedforward_layernorm": "m", "post_feedforward_layernorm": "d"}
    norms: dict[str, Norm] = {}
    for owner, names, others in (
        (attention, places, ("q_proj", "k_proj", "v_proj", "o_proj")),
        (layer, around, (_ATTENTION, _MLP)),
    ):
        for name, part in owner.named_children():
            if name in others:
                continue
            norm = known_norm(part, torch.bfloat16) if name in names else None
            if norm is not None:
                norms[names[name]] = norm
            elif list(part.parameters()):
                return None
    return Parts(attention, q, k, v, o, inside, dim, norms)


def _linear(owner: nn.Module, name: str) -> nn.Linear | None:
    module = getattr(owner, name, None)
    # Subclasses compute something else.
    if type(module) is not nn.Linear or module.weight.dtype != torch.bfloat16 or module._forward_hooks:
        return None
    return module


def _multiply(linear: nn.Linear, x: str, y: str) -> Multiply:
    return Multiply(x, y, linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
