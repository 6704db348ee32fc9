"""What a layout switch refuses."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from farspan.parallel.layout import ContiguousLayout
from farspan.parallel.switch import LayoutSwitch


@dataclass
class ThreeRanks:
    """All a refusal asks of an exchange."""

    num_ranks: int = 3


def test_channels_that_do_not_divide_are_refused_with_the_nearest_legal_number() -> None:
    switch = LayoutSwitch(ThreeRanks(), ContiguousLayout(96, 3))
    with pytest.raises(ValueError, match="got 8 channels on 3 ranks; pad to 9"):
        switch.to_channels(torch.zeros(32, 8))
