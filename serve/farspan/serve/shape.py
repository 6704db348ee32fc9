"""What a request's JSON must look like: types are not guessed, names nobody knows are passed over."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, model_validator

Item = TypeVar("Item")


class _AtFirst(FailFast):
    """pydantic's own cannot stand in a union: it has no hash."""

    def __hash__(self) -> int:
        return hash(type(self))


# Otherwise every wrong item is noted, and a body has room for millions of them.
Items = Annotated[list[Item], _AtFirst()]
"""A list that is refused at its first wrong item."""


class Shape(BaseModel):
    """Part of a request."""

    model_config = ConfigDict(extra="ignore", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        # Clients write null where they mean the default.
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 504: "timeout_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
