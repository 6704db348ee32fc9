"""schemathesis reads our description and sends what it allows and what it forbids: what comes back is as described."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, CheckContext, GenerationMode, Response
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from farspan.serve.openapi import describe


def no_fault_of_ours(ctx: CheckContext, response: Response, case: Case) -> None:
    # A deadline that the request sets itself may be too soon, which is said.
    in_body = isinstance(case.body, dict) and case.body.get("deadline_s") is not None
    sets_one = "X-Farspan-Deadline-S" in case.headers or in_body
    if not (response.status_code == 504 and sets_one):
        not_a_server_error(ctx, response, case)


CHECKS = [
    no_fault_of_ours,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
DESCRIBED = schemathesis.openapi.from_dict(describe())
OPERATIONS = [found.ok() for found in DESCRIBED.get_all_operations()]
MODES = {"allowed": GenerationMode.POSITIVE, "forbidden": GenerationMode.NEGATIVE}
CASES = [
    (operation, mode)
    for operation in OPERATIONS
    for mode in MODES
    # Nothing is forbidden where nothing is asked for.
    if mode == "allowed" or operation.body or operation.headers or operation.path_parameters
]


@pytest.mark.parametrize(("operation", "mode"), CASES, ids=lambda value: getattr(value, "label", value))
@given(data=st.data())
@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_whatever_the_description_allows_or_forbids_the_answer_is_as_described(served, operation, mode, data):
    case = data.draw(operation.as_strategy(generation_mode=MODES[mode]))
    if mode == "allowed" and isinstance(case.body, dict):
        bound(case.body)
    case.operation.app = served.app
    response = case.call(app=served.app, headers={"authorization": "Bearer sk-one"})
    case.validate_response(response, checks=CHECKS)


def bound(body: dict[str, Any]) -> None:
    """A model that is here, and answers that end soon; what is left is schemathesis' choice."""
    if "model" in body:
        body["model"] = "tiny"
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is None or body[name] > 3:
            body[name] = 3
    body["n"] = 1
