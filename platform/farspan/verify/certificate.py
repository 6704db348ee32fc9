"""What the doctor found, as JSON that travels with checkpoints: which model, which layout, every number."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from transformers import PretrainedConfig

from farspan.config.schema import ParallelConfig
from farspan.errors import ConfigError, CorruptDataError, NotFoundError
from farspan.storage.door import open_store
from farspan.verify.judge import Check

CERTIFICATE = "farspan_certificate.json"
_FORMAT = 1
# Fields that change neither what a layer computes nor what a layout must carry.
_BESIDE = frozenset(
    ("vocab_size", "max_position_embeddings", "transformers_version", "_name_or_path", "dtype", "torch_dtype",
     "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "_attn_implementation")
)  # fmt: skip


@dataclass(frozen=True)
class Certificate:
    """The result of one examination."""

    farspan: str
    torch: str
    transformers: str
    model_type: str
    model: str
    layout: dict[str, Any]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_json(self) -> str:
        body = {"format": _FORMAT, "passed": self.passed, **asdict(self)}
        body["checks"] = [{**asdict(check), "passed": check.passed} for check in self.checks]
        # A NaN or an infinity is no JSON number; it is kept as text, which no bound admits.
        return json.dumps(_plain(body), indent=1, allow_nan=False) + "\n"


def certify(config: PretrainedConfig, parallel: ParallelConfig, checks: tuple[Check, ...]) -> Certificate:
    """The certificate of these checks."""
    return Certificate(
        farspan=_version("farspan"),
        torch=_version("torch"),
        transformers=_version("transformers"),
        model_type=config.get_text_config(decoder=True).model_type,
        model=model_hash(config),
        layout=layout_of(parallel),
        checks=checks,
    )


def model_hash(config: PretrainedConfig) -> str:
    """Differs between configs whose models compute differently; vocabulary, length and type are left out."""
    return hashlib.sha256(json.dumps(_core(config.to_dict()), sort_keys=True, default=str).encode()).hexdigest()


def layout_of(parallel: ParallelConfig) -> dict[str, Any]:
    """The layout of one sequence: everything of the config but the number of sequences side by side."""
    fields = dataclasses.asdict(parallel)
    # A certificate is of a mesh: documents with ranks of their own are not examined.
    for beside in ("workers", "hdp", "rank_tokens", "hdp_cost", "spill"):
        fields.pop(beside)
    return fields


def read_certificate(uri: str) -> str:
    """The text of the certificate at `uri`, local or s3://.

    Raises:
        NotFoundError: nothing is there.
    """
    folder, _, name = uri.rpartition("/")
    store = open_store(folder or ".")
    if not store.exists(name):
        raise NotFoundError(uri, "no certificate is there; write one with farspan doctor --certificate FILE")
    return store.read_bytes(name).decode("utf-8")


def refuse_certificate(uri: str, text: str, config: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Refuse a certificate that does not vouch for this model and layout.

    Raises:
        CorruptDataError: not a certificate.
        ConfigError: of another model or layout, or one that did not pass.
    """
    try:
        body = json.loads(text)
        model, layout, checks = body["model"], body["layout"], body["checks"]
        failed = [c["name"] for c in checks if not _within(c["measured"], c["allowed"])]
    except (ValueError, KeyError, TypeError):
        raise CorruptDataError(uri, "is not a certificate of farspan doctor; write it again") from None
    if model != model_hash(config):
        way_out = "run farspan doctor on this run's config and give its certificate"
        raise ConfigError("train.certificate", "must be of this run's model", f"{uri} ({body['model_type']})", way_out)
    wanted = layout_of(parallel)
    if layout != wanted:
        field = next((n for n in wanted if layout.get(n) != wanted[n]), next(iter(set(layout) - set(wanted)), "layout"))
        raise ConfigError(
            "train.certificate",
            f"must be of this run's layout, which has parallel.{field}={wanted.get(field)}",
            layout.get(field),
            "run farspan doctor with the same parallel.* keys",
        )
    if failed or not checks:
        raise ConfigError(
            "train.certificate", "must have passed", f"{uri} (failed: {', '.join(failed) or 'nothing was checked'})",
            "choose a layout that farspan doctor finds exact",
        )  # fmt: skip


def _within(measured: object, allowed: object) -> bool:
    return isinstance(measured, int | float) and isinstance(allowed, int | float) and measured <= allowed


def _core(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _core(v) for k, v in value.items() if k not in _BESIDE}
    return [_core(v) for v in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return str(value)
    return value


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
