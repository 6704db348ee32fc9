"""The offload a run asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from farspan.activations.offload import ActivationOffload
from farspan.errors import ConfigError
from farspan.memory.striped import StripedTiers
from farspan.memory.tier import Tier

# What a user writes -> the kind of tier it means.
_KINDS = {"cpu": "dram", "cxl": "cxl", "nvme": "nvme"}


def choose_offload(
    where: str,
    tiers: Mapping[str, Sequence[Tier]],
    root: nn.Module,
    layers: Sequence[nn.Module],
    device: torch.device,
    *,
    debug: bool = False,
) -> ActivationOffload | None:
    """The offload for `memory.offload_activations`: none, cpu, cxl or nvme; `tiers` as `open_tiers` gives them.

    Several tiers of a kind share the load.

    Raises:
        ConfigError: an unknown word, or no such tier was opened.
    """
    field = "memory.offload_activations"
    if where == "none":
        return None
    if where not in _KINDS:
        raise ConfigError(field, f"must be none or one of {', '.join(_KINDS)}", where, "use cpu")
    found = tiers.get(_KINDS[where], ())
    if not found:
        example = {"cpu": "dram:64GiB", "cxl": "cxl:node=1:128GiB", "nvme": "nvme:/scratch:512GiB"}[where]
        raise ConfigError(
            field, f"needs a {_KINDS[where]} tier in memory.tiers", where, f"add {example} to memory.tiers"
        )
    return ActivationOffload(StripedTiers(found), root, layers, device, debug=debug)
