"""What a user may give as an adapter, and the one sentence that refuses everything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.double import DoublePrecision
from tests.support.s3 import S3Bucket
from tests.support.zoo import zoo_model
from tests.unit.engine.adapted import ask, assert_greedy, base_of, logits_of, lora, opened, rows, save
from tests.unit.engine.oracle import chunked_logits
from tests.unit.engine.tiny import engine_config
from transformers import LlamaForCausalLM

from farspan.config.load import load_config
from farspan.config.schema import BatchConfig
from farspan.engine.adapter_folder import read_adapter
from farspan.engine.engine import Engine
from farspan.errors import CheckpointError, ConfigError, EngineError, NotFoundError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good one, to be spoiled."""
    return Path(save(tmp_path / "good", zoo_model("llama"), lora(r=2, target_modules=["q_proj", "up_proj"])))


@pytest.fixture
def engine() -> Engine:
    return Engine(zoo_model("llama"), engine_config())


def change(folder: Path, **settings: object) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def refusal(engine: Engine, folder: Path) -> str:
    """The sentence that says why not; the engine is as it was."""
    with pytest.raises(CheckpointError) as caught:
        engine.add_adapter("a", str(folder))
    assert engine.adapters.names == []
    assert engine.pool.num_held == 0
    assert not any(module._forward_hooks for module in engine.adapters._model.modules())
    assert str(caught.value).startswith(str(folder))
    return caught.value.reason


def test_a_folder_that_is_not_there_is_not_found(engine, tmp_path):
    with pytest.raises(NotFoundError, match="no such folder"):
        engine.add_adapter("a", str(tmp_path / "none"))


def test_a_missing_or_torn_file_is_named(engine, folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    assert refusal(engine, folder).startswith(f"{WEIGHTS} is torn")
    (folder / WEIGHTS).unlink()
    assert refusal(engine, folder) == f"has no {WEIGHTS}; copy the folder again"
    (folder / CONFIG).write_text("{")
    assert refusal(engine, folder).startswith(f"has no readable {CONFIG}")
    (folder / CONFIG).unlink()
    assert refusal(engine, folder).startswith(f"has no readable {CONFIG}")


def test_a_pickled_adapter_is_never_opened(engine, folder):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    reason = "has only pickled weights (adapter_model.bin), which are never opened; save the adapter as safetensors"
    assert refusal(engine, folder) == reason


def test_an_adapter_of_a_model_of_another_size_is_refused_by_the_first_shape_that_differs(engine, tmp_path):
    other = Path(save(tmp_path / "other", zoo_model("llama", hidden_size=64), lora(target_modules=["q_proj"])))
    reason = refusal(engine, other)
    assert "lora_A of model.layers.0.self_attn.q_proj has shape (8, 64)" in reason
    assert "must be (8, 32)" in reason


def test_an_adapter_of_a_model_with_more_layers_is_refused_by_the_first_that_is_not_there(engine, tmp_path):
    other = Path(save(tmp_path / "other", zoo_model("llama", num_hidden_layers=3), lora(target_modules=["q_proj"])))
    reason = refusal(engine, other)
    assert "model.layers.2.self_attn.q_proj.lora_A.weight (2 such), which stands beside no linear layer" in reason


def test_an_adapter_whose_layers_this_architecture_does_not_have_is_refused(engine, tmp_path):
    other = Path(save(tmp_path / "other", zoo_model("gpt_neox"), lora(target_modules=["query_key_value"])))
    reason = refusal(engine, other)
    assert reason.startswith("does not fit llama: Target modules")
    assert "query_key_value" in reason


def test_a_target_that_the_weights_have_and_the_model_lacks_is_refused(engine, folder):
    tensors = load_file(folder / WEIGHTS)
    extra = {f"base_model.model.model.layers.0.mlp.gone.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file({**tensors, **extra}, folder / WEIGHTS)
    change(folder, target_modules=["q_proj", "up_proj", "gone"])
    assert "mlp.gone.lora_A.weight (2 such), which stands beside no linear layer" in refusal(engine, folder)


def test_a_matrix_that_is_missing_is_not_taken_for_zero(engine, folder):
    tensors = load_file(folder / WEIGHTS)
    lost = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    del tensors[lost]
    save_file(tensors, folder / WEIGHTS)
    assert f"lacks, such as {lost}" in refusal(engine, folder)


def test_numbers_that_are_not_finite_are_refused(engine, folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    assert "lora_B of model.layers.1.mlp.up_proj has numbers that are not finite" in refusal(engine, folder)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices=[1, 2]"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens=[5]"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters="),
        ({"layer_replication": [[0, 2]]}, "layer_replication="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"a_setting_of_the_future": 1}, "a_setting_of_the_future=1"),
        ({"peft_type": "LOHA"}, "peft_type LOHA is not served"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts lm_head, which is the head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts model.embed_tokens, which is"),
        ({"r": "many"}, "does not fit llama"),
    ],
)
def test_what_would_change_more_than_linear_layers_is_refused_by_name(engine, folder, settings, reason):
    change(folder, **settings)
    assert reason in refusal(engine, folder)


def test_what_peft_itself_saves_with_dora_and_with_a_trained_head_is_refused(engine, tmp_path):
    for name, settings in (("dora", {"use_dora": True}), ("head", {"modules_to_save": ["lm_head"]})):
        made = Path(save(tmp_path / name, zoo_model("llama"), lora(target_modules=["q_proj"], **settings)))
        assert next(iter(settings)) in refusal(engine, made)


def test_layers_that_never_run_or_order_their_rows_themselves_are_found_out_by_trying(folder, tmp_path):
    """As an expert does, which gets the tokens a router gave it."""
    model = zoo_model("llama")
    engine = Engine(model, engine_config())
    mlp = model.model.layers[1].mlp
    own = type(mlp).forward

    def turned(hidden_1TE):
        return own(mlp, hidden_1TE.flip(1)).flip(1)

    def halved(hidden_1TE):
        half = hidden_1TE.shape[1] // 2
        return torch.cat([own(mlp, hidden_1TE[:, :half]), own(mlp, hidden_1TE[:, half:])], dim=1)

    for forward, reason in (
        (turned, "with two adapters in one batch logits differ by"),
        (halved, "model.layers.1.mlp.up_proj computes"),
        (torch.zeros_like, "model.layers.1.mlp.up_proj is not called for every prompt"),
    ):
        mlp.forward = forward
        assert reason in refusal(engine, folder)
        del mlp.forward
    # It is these layers that are refused, not the adapter.
    engine.add_adapter("a", str(folder))


class SharingLlama(LlamaForCausalLM):
    """One layer in two places."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].mlp.up_proj = self.model.layers[0].mlp.up_proj


def test_a_layer_that_a_model_has_in_two_places_is_refused_because_peft_adapts_it_in_one(folder):
    engine = Engine(SharingLlama(zoo_model("llama").config).double().eval(), engine_config())
    assert "adapts model.layers.0.mlp.up_proj, which this model also has in another place" in refusal(engine, folder)


def test_routers_and_experts_that_peft_takes_for_linear_layers_are_refused(tmp_path):
    made = Path(save(tmp_path / "a", zoo_model("mixtral"), lora(r=2, target_modules="all-linear")))
    engine = Engine(zoo_model("mixtral"), engine_config())
    assert "target_parameters=" in refusal(engine, made)


def test_an_adapter_larger_than_the_memory_for_adapters_is_refused_with_the_number_that_is_enough(folder):
    engine = Engine(zoo_model("llama"), engine_config(adapter_bytes=1000))
    with pytest.raises(ConfigError, match=r"engine\.adapter_bytes: .* got 1000; use at least") as caught:
        engine.add_adapter("a", str(folder))
    enough = int(caught.value.way_out.rpartition("=")[2])
    Engine(zoo_model("llama"), engine_config(adapter_bytes=enough, adapters={"a": str(folder)}))
    with pytest.raises(ConfigError):
        Engine(zoo_model("llama"), engine_config(adapter_bytes=enough - 1, adapters={"a": str(folder)}))


@pytest.mark.parametrize("name", ["", "two words", "../up", "x" * 129, "trial 0"])
def test_a_name_that_a_request_could_not_say_is_refused(engine, folder, name):
    with pytest.raises(ConfigError, match=r"engine\.adapters: names must begin"):
        engine.add_adapter(name, str(folder))


def test_a_name_is_given_once(engine, folder):
    engine.add_adapter("a", str(folder))
    with pytest.raises(ConfigError, match="remove it first"):
        engine.add_adapter("a", str(folder))


def test_without_free_pages_new_layers_cannot_be_tried_out_and_later_they_can(engine, folder):
    pages = engine.pool.alloc(engine.pool.num_free - 3)
    with pytest.raises(EngineError, match="add it when fewer requests run"):
        engine.add_adapter("a", str(folder))
    assert engine.pool.num_free == 3
    engine.pool.free(pages)
    engine.add_adapter("a", str(folder))
    engine.check_integrity()


def test_the_digest_depends_on_every_number_and_on_nothing_else(folder, tmp_path):
    model = zoo_model("llama")
    seen = {read_adapter(model, str(folder)).digest}
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        changed = tensor.clone()
        changed[-1, -1] += 0.5
        save_file({**tensors, name: changed}, folder / WEIGHTS)
        seen.add(read_adapter(model, str(folder)).digest)
    save_file(tensors, folder / WEIGHTS)
    change(folder, lora_alpha=3)
    seen.add(read_adapter(model, str(folder)).digest)
    change(folder, use_rslora=True)
    seen.add(read_adapter(model, str(folder)).digest)
    assert len(seen) == len(tensors) + 3
    change(folder, lora_alpha=8, use_rslora=False, base_model_name_or_path="elsewhere", lora_dropout=0.3)
    shutil.copytree(folder, tmp_path / "copy")
    assert read_adapter(model, str(tmp_path / "copy")).digest in seen


def test_an_adapter_comes_from_s3(s3: S3Bucket, folder, tmp_path):
    for file in folder.iterdir():
        s3.put(f"adapters/mine/{file.name}", file.read_bytes())
    (prompt,) = rows(9, seed=2)
    with DoublePrecision():
        engine = Engine(base_of("llama"), engine_config(adapters={"mine": f"{s3.uri}/adapters/mine"}))
        assert_greedy(opened("llama", str(folder)), prompt, ask(engine, {"r": ("mine", prompt)})["r"])
    with pytest.raises(NotFoundError):
        engine.add_adapter("other", f"{s3.uri}/adapters/other")


def test_an_adapter_that_farspan_trained_is_one_of_them(engine, folder):
    (folder / "adapter_base.json").write_text('{"xxh3_128": "0"}')
    (folder / "README.md").write_text("read by nobody")
    engine.add_adapter("a", str(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_half_and_single_precision_an_adapter_is_as_near_to_peft_as_the_model_is(tmp_path, dtype):
    kind = getattr(torch, dtype)
    made = save(tmp_path / "a", zoo_model("llama"), lora(r=4, target_modules="all-linear"))
    engine = Engine(zoo_model("llama", dtype=kind), engine_config(dtype=dtype, adapters={"a": made}))
    prompts = rows(30, 12)
    with DoublePrecision():
        exact = [logits_of(opened("llama", folder), row) for folder, row in zip((made, None), prompts, strict=True)]
    oracle = peft.PeftModel.from_pretrained(zoo_model("llama", dtype=kind), made).eval()
    rough = float((logits_of(oracle, prompts[0]).double() - exact[0]).norm() / exact[0].norm())
    found = chunked_logits(engine, prompts, 7, ["a", ""])
    got, wanted = (
        torch.stack([x for row, _, x in found if row == 0]).double(),
        torch.stack([exact[0][position] for row, position, _ in found if row == 0]),
    )
    assert float((got - wanted).norm() / wanted.norm()) <= 2 * rough


def test_adapters_are_written_in_a_config_like_everything_else():
    config = load_config(BatchConfig, None, ["engine.adapters.law=/a/law", "engine.adapters.code=s3://b/code"])
    assert config.engine.adapters == {"law": "/a/law", "code": "s3://b/code"}
    with pytest.raises(ConfigError, match=r"engine\.adapterz"):
        load_config(BatchConfig, None, ["engine.adapterz.law=/a"])
