"""What looks like a secret, in a file or manifest that must hold none."""

from __future__ import annotations

import re
from typing import Any

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SECRETS = re.compile(
    r"\bAKIA[0-9A-Z]{16}\b|-----BEGIN|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|(?<![\w./-])[0-9a-f]{40,}(?![\w./-])|(?<![\w./+-])[A-Za-z0-9+]{40,}={0,2}(?![\w./+-])"
    # Secret keys of AWS: letters of both cases, digits, and slashes, which paths of words do not have together.
    r"|(?<![\w./+=-])(?=[^\s]*[A-Z])(?=[^\s]*[a-z])(?=[^\s]*[0-9])[A-Za-z0-9/+]{40,}={0,2}(?![\w./+=-])"
    r"|RAY_AUTH_TOKEN="
)


def holds_secret(value: Any) -> bool:
    """Whether a key or value anywhere in it looks like a key, a token or a private key. Image digests do not."""
    if isinstance(value, dict):
        return any(holds_secret(part) for pair in value.items() for part in pair)
    if isinstance(value, list | tuple):
        return any(holds_secret(part) for part in value)
    return isinstance(value, str) and _SECRETS.search(_DIGEST.sub("", value)) is not None
