"""Strict JSON schemas out of Kubernetes CRDs: an unknown field is an error, where the API server would drop it.

farspan ships none: `kubectl get crd rayclusters.ray.io rayjobs.ray.io rayservices.ray.io -o json` gives those of your
cluster, and KubeRay's release holds them as YAML.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from farspan.errors import CorruptDataError, NotFoundError

Schemas = dict[str, dict[str, Any]]
_QUANTITY = {"anyOf": [{"type": "integer"}, {"type": "string"}]}


def read_schemas(path: Path) -> Schemas:
    """`KIND.VERSION` to schema, from a file of CRDs (YAML or JSON, also a List), a folder of them, or ready schemas.

    Raises NotFoundError or CorruptDataError.
    """
    if path.is_dir():
        found: Schemas = {}
        for file in sorted([*path.glob("*.yaml"), *path.glob("*.json")]):
            found |= read_schemas(file)
        return found
    if not path.is_file():
        raise NotFoundError(str(path), "no such file of CRDs; make it by kubectl get crd NAME -o json")
    raw = path.read_bytes()
    try:
        text = gzip.decompress(raw) if path.suffix == ".gz" else raw
        documents = [d for d in yaml.safe_load_all(text) if d] if path.suffix != ".gz" else [json.loads(text)]
    except (OSError, ValueError, yaml.YAMLError) as problem:
        reason = " ".join(str(problem).split())
        raise CorruptDataError(str(path), f"is not YAML or JSON of CRDs: {reason[:200]}") from None
    return {key: schema for document in documents for key, schema in _schemas_of(document).items()}


def schema_problems(manifest: dict[str, Any], schemas: Schemas) -> list[str]:
    """What the schema of its kind says about a manifest; a kind without one has no problems here."""
    version = str(manifest.get("apiVersion", "")).rpartition("/")[2]
    schema = schemas.get(f"{manifest.get('kind')}.{version}")
    if schema is None:
        return []
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, problem.absolute_path)) or 'manifest'}: {problem.message[:300]}" for problem in found]


def _schemas_of(document: Any) -> Schemas:
    if not isinstance(document, dict):
        return {}
    if document.get("kind") == "List":
        return {key: schema for item in document.get("items", []) for key, schema in _schemas_of(item).items()}
    if document.get("kind") == "CustomResourceDefinition":
        kind = document["spec"]["names"]["kind"]
        return {
            f"{kind}.{version['name']}": _strict(version["schema"]["openAPIV3Schema"]) | _top(kind)
            for version in document["spec"]["versions"]
        }
    # Ready ones: KIND.VERSION to schema.
    return {key: value for key, value in document.items() if "." in key and isinstance(value, dict)}


def _top(kind: str) -> dict[str, Any]:
    return {"required": ["apiVersion", "kind", "metadata", "spec"], "title": kind}


def _strict(schema: Any) -> Any:
    """OpenAPI as the API server reads it, with `additionalProperties: false` where fields are listed."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return _QUANTITY | {key: schema[key] for key in ("pattern",) if key in schema}
    keywords = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if "properties" in keywords:
        # A field may be called as a keyword is: names are not looked into, their schemas are.
        keywords["properties"] = {name: _strict(part) for name, part in keywords["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            keywords.setdefault("additionalProperties", False)
    # What stands in anyOf and its like lists a part of the fields: to be strict there would refuse the others.
    for key in ("items", "additionalProperties"):
        if isinstance(keywords.get(key), dict):
            keywords[key] = _strict(keywords[key])
    # Only a note in OpenAPI; JSON schema has formats of other names.
    keywords.pop("format", None)
    return keywords
