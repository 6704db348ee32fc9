"""A tiny random model in float64 together with a byte-level tokenizer, for tests about text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.unit.serve.tiny_folder import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def worded_model(folder: Path) -> tuple[PreTrainedModel, Any]:
    write_tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
