"""An OpenAI client for an endpoint, which on this machine is never reached through a proxy."""

from __future__ import annotations

from urllib.parse import urlsplit

from openai import DefaultHttpxClient, OpenAI


def open_client(url: str, key: str, timeout_s: float) -> OpenAI:
    """The official client. A proxy named in the environment would be shown the key of a local endpoint."""
    local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    http = DefaultHttpxClient(trust_env=not local, timeout=timeout_s)
    return OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=0, http_client=http)
