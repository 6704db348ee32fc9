"""What a request took is told to a collector: as spans below the client's own, without a word of what was asked."""

from __future__ import annotations

import gzip
import http.server
import socket
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tests.unit.serve.in_process import Served
from tests.unit.serve.tiny_folder import TEXT

from farspan.config.schema import ServeConfig, TracesConfig, TransferConfig
from farspan.config.serve_rules import check_serve
from farspan.errors import ConfigError
from farspan.serve.spans import Spans, phases
from farspan.serve.trace import RequestTrace

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = TEXT[300:700]
ASKED = {"model": "tiny", "prompt": SECRET, "max_tokens": 5, "temperature": 0, "ignore_eos": True}


def asked(served: Served, path: str = "/v1/completions", **more: object) -> list[ReadableSpan]:
    """The spans of one request with the client's own trace."""
    exporter = InMemorySpanExporter()
    before, served.api._spans = served.api._spans, Spans(exporter)
    try:
        served.post(path, {**ASKED, **more}, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    finally:
        served.api._spans.close()
        served.api._spans = before
    return list(exporter.get_finished_spans())


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_and_its_phases_lie_below_the_clients_span_in_their_order(served, stream):
    *phases, root = asked(served, stream=stream)
    assert (root.name, root.kind) == ("POST /v1/completions", SpanKind.SERVER)
    assert root.parent is not None
    assert f"{root.parent.span_id:016x}" == PARENT
    assert {f"{span.context.trace_id:032x}" for span in (root, *phases)} == {TRACE}
    assert [span.name for span in phases] == ["queue", "prefill", "transfer", "decode"]
    assert {span.parent.span_id for span in phases} == {root.context.span_id}
    queue, prefill, transfer, decode = phases
    assert root.start_time <= queue.start_time <= queue.end_time <= prefill.start_time < prefill.end_time
    assert prefill.end_time == decode.start_time < decode.end_time <= root.end_time
    assert prefill.end_time <= transfer.end_time <= decode.end_time
    assert root.attributes["gen_ai.usage.output_tokens"] == decode.attributes["farspan.tokens"] == 5
    assert root.attributes["gen_ai.usage.input_tokens"] > 100
    assert root.attributes["gen_ai.request.model"] == "tiny"
    assert transfer.attributes["farspan.kv_bytes"] > 0


def test_what_was_waited_for_free_pages_is_a_phase_before_the_transfer():
    trace = RequestTrace("r", 9, asked_s=0.5, page_wait_s=0.25, transfer_s=0.125, pulled_s=2.0)
    trace.arrivals.add(1, 1.0)
    assert phases(trace)[2:4] == [("room", 1.625, 1.875), ("transfer", 1.875, 2.0)]


def test_every_choice_has_phases_of_its_own(served):
    *phases, root = asked(served, n=3)
    assert sorted({span.attributes["farspan.choice"] for span in phases}) == [0, 1, 2]
    assert [span.name for span in phases].count("decode") == 3
    assert root.attributes["gen_ai.response.finish_reasons"] == ("length",) * 3


def test_no_text_no_key_and_no_made_up_name_is_told(served):
    spans = asked(served, user="alice", cache_salt="sesame", stop=["zebra"])
    spans += asked(served, guided_regex="(bad secret", prompt="another secret")
    told = " ".join(span.to_json() for span in spans)
    for word in (SECRET[:20], "alice", "sesame", "zebra", "sk-one", "secret", served.api._keys[0].digest):
        assert word not in told
    served.post("/v1/completions", {**ASKED, "model": "made up"})
    assert "made up" not in told


def test_a_request_that_fails_says_so_by_its_kind(served):
    *_, root = asked(served, prompt=[10**9])
    assert (root.status.status_code, root.status.description) == (StatusCode.ERROR, "RequestError")


def test_without_a_parent_a_request_is_a_trace_of_its_own_and_a_broken_parent_is_none(served):
    for header in ({}, {"traceparent": "00-zz-11-01"}, {"traceparent": f"00-{'0' * 32}-{PARENT}-01"}):
        exporter = InMemorySpanExporter()
        before, served.api._spans = served.api._spans, Spans(exporter)
        served.post("/v1/completions", ASKED, headers=header)
        served.api._spans.close()
        served.api._spans = before
        assert exporter.get_finished_spans()[-1].parent is None


def test_a_client_that_does_not_sample_is_not_sampled(served):
    exporter = InMemorySpanExporter()
    before, served.api._spans = served.api._spans, Spans(exporter)
    served.post("/v1/completions", ASKED, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    served.api._spans.close()
    served.api._spans = before
    assert exporter.get_finished_spans() == ()


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """(address, what was sent to it)."""
    taken: list[tuple[str, bytes]] = []

    class Take(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return None

    with http.server.HTTPServer(("127.0.0.1", 0), Take) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", taken
        server.shutdown()
        thread.join()


def test_a_collector_gets_them_in_its_own_format(tiny_folder, collector):
    address, taken = collector
    served = Served(
        tiny_folder, telemetry=TracesConfig(otlp_endpoint=address), transfer=TransferConfig(colocate_below_tokens=9999)
    )
    try:
        assert served.post("/v1/completions", ASKED).status_code == 200
        served.api.close()
    finally:
        served.stop()
    ((path, content),) = taken
    assert path == "/v1/traces"
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    (resource,) = ExportTraceServiceRequest.FromString(content).resource_spans
    assert ("service.name", "farspan") in [(a.key, a.value.string_value) for a in resource.resource.attributes]
    names = [span.name for span in resource.scope_spans[0].spans]
    assert names == ["queue", "prefill", "decode", "POST /v1/completions"]


def test_neither_an_answer_nor_the_end_waits_long_for_a_collector_that_is_not_there(tiny_folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    served = Served(tiny_folder, telemetry=TracesConfig(otlp_endpoint=nobody))
    try:
        assert served.post("/v1/completions", ASKED).status_code == 200
        closing = threading.Thread(target=served.api.close)
        closing.start()
        closing.join(timeout=20)
        assert not closing.is_alive()
    finally:
        served.stop()


@pytest.mark.parametrize("address", ["collector:4318", "ftp://x", "http://", "http://user:secret@x", "http://x?a=1"])
def test_an_address_that_is_no_collector_is_refused(address):
    with pytest.raises(ConfigError, match=r"telemetry\.otlp_endpoint"):
        check_serve(ServeConfig(model="m", telemetry=TracesConfig(otlp_endpoint=address)))
