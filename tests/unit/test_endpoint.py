from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data.examples import TaskExample
from train.config import EndpointConfig, TeacherConfig
from train.teacher.endpoint import EndpointWriter, before_stop
from train.teacher.pauses import Backoff, wait_seconds
from train.teacher.writing import Request, Sampling, Written

QUICK = Backoff(first_seconds=0.002, longest_seconds=0.02)
SECRET = "sk-a-secret-of-many-letters"

Reply = tuple[int, dict[str, str], Any]
"""Status, headers and body; a body that is not text is sent as JSON."""
Script = Callable[[int, dict[str, Any]], Reply | None]
"""What to answer to the n-th request (from 0) with this body; None hangs until the stub ends."""


class Stub:
    """A server on loopback that answers by a script and remembers what came."""

    def __init__(self, script: Script, port: int = 0) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.arrived: list[float] = []
        self.connections: list[socket.socket] = []
        self.ended = threading.Event()
        lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # head and body in one packet: a second one would wait for the first to be acknowledged

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    turn = len(stub.bodies)
                    stub.bodies.append(body)
                    stub.paths.append(self.path)
                    stub.keys.append(self.headers["Authorization"])
                    stub.arrived.append(time.monotonic())
                reply = script(turn, body)
                if reply is None:
                    stub.ended.wait(20)
                    self.close_connection = True
                    return
                status, headers, content = reply
                raw = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(raw)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def process_request(self, request: Any, client_address: Any) -> None:
                stub.connections.append(request)
                super().process_request(request, client_address)

            def handle_error(self, *_: Any) -> None:  # a client that gave up on a reply
                pass

        self.server = Quiet(("127.0.0.1", port), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.port: int = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def stop(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
        for connection in self.connections:  # as when the process is killed: also those kept alive
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(script: Script, port: int = 0) -> Iterator[Stub]:
    stub = Stub(script, port)
    try:
        yield stub
    finally:
        stub.stop()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def said(text: str | None, **more: Any) -> Reply:
    """A whole answer of either API."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "text": text, "finish_reason": "stop", **more}
    return 200, {}, {"choices": [choice], "usage": {"completion_tokens": 3}}


def echo(_: int, body: dict[str, Any]) -> Reply:
    return said(f"You said {body['prompt']}")


def make_request(example: TaskExample, hint: str | None, key: int) -> Request:
    return Request(key, text=f"{example.input} {hint}", messages=({"role": "user", "content": example.input},))


def writer(url: str, *, stop: tuple[str, ...] = (), sampling: Sampling | None = None, **config: Any) -> EndpointWriter:
    known = {"api": "completions", "concurrency": 4, "timeout_seconds": 5.0, "retries": 6, **config}
    section = EndpointConfig(url=url, **known)
    return EndpointWriter(section, "some-model", make_request, sampling=sampling or Sampling(), max_new_tokens=16, stop=stop, backoff=QUICK)


def work(*sizes: int) -> list[tuple[int, list[Request]]]:
    """Chunks of the sizes given; every prompt is its place among all."""
    keys = iter(range(sum(sizes)))
    return [(number, [Request(key, text=str(key)) for key in islice(keys, size)]) for number, size in enumerate(sizes)]


def texts(found: Iterator[tuple[int, list[Written]]]) -> dict[int, list[str]]:
    return {number: [written.text for written in answers] for number, answers in found}


def failure(stub: Stub, **config: Any) -> str:
    with pytest.raises(RuntimeError) as raised:
        list(writer(stub.url, **config).write(work(1)))
    return str(raised.value)


# ----- the protocol -----


def test_a_chat_request_is_openais(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f"{SECRET}\n")
    with serving(lambda *_: said(" Two threes are 6. Answer: 6 ")) as stub:
        teacher = writer(stub.url + "/", api="chat", key_variable="MY_KEY", stop=("\nQuestion:",), sampling=Sampling(0.7, 0.9))
        request = teacher.request(TaskExample("e", "2 * 3?", "6"), None, -5)
        assert list(teacher.write([(7, [request])])) == [(7, [Written("Two threes are 6. Answer: 6", 3)])]
    assert stub.paths == ["/v1/chat/completions"]
    assert stub.keys == [f"Bearer {SECRET}"]
    assert stub.bodies == [
        {
            "model": "some-model",
            "messages": [{"role": "user", "content": "2 * 3?"}],
            "max_tokens": 16,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 2**31 - 5,
            "n": 1,
            "stop": ["\nQuestion:"],
        }
    ]


def test_a_plain_request_is_openais() -> None:
    with serving(echo) as stub:
        teacher = writer(stub.url)
        request = teacher.request(TaskExample("e", "2 * 3?", "6"), "6", 2**40 + 9)
        assert texts(teacher.write([(0, [request])])) == {0: ["You said 2 * 3? 6"]}
    assert stub.paths == ["/v1/completions"]
    assert stub.keys == [None]
    assert stub.bodies == [
        {"model": "some-model", "prompt": "2 * 3? 6", "max_tokens": 16, "temperature": 0.0, "top_p": 1.0, "seed": 9, "n": 1}
    ]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (said(None), Written("", 3)),
        (said(""), Written("", 3)),
        (said("It goes on and", finish_reason="length"), Written("It goes on and", 3)),
        ((200, {}, {"choices": [{"text": "six", "message": {"content": "six"}}]}), Written("six", 0)),
        ((200, {}, {"choices": [{"text": "six", "message": {"content": "six"}}], "usage": None}), Written("six", 0)),
    ],
)
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_what_an_answer_may_lack(api: str, reply: Reply, expected: Written) -> None:
    with serving(lambda *_: reply) as stub:
        request = Request(1, text="a", messages=({"role": "user", "content": "a"},))
        assert list(writer(stub.url, api=api).write([(0, [request])])) == [(0, [expected])]
        assert len(stub.bodies) == 1


def test_stop_strings_that_a_server_ignores_are_applied_here() -> None:
    stop = ("\nQuestion:", "1", "2", "3", "###")
    with serving(lambda *_: said("One. ### Two\nQuestion: more")) as stub:
        assert texts(writer(stub.url, stop=stop).write(work(1))) == {0: ["One."]}
    assert stub.bodies[0]["stop"] == ["\nQuestion:", "1", "2", "3"]  # OpenAI takes four


@pytest.mark.parametrize(("stop", "expected"), [((), "a b c"), (("c", "b"), "a "), (("x",), "a b c"), (("a",), "")])
def test_the_first_stop_string_counts(stop: tuple[str, ...], expected: str) -> None:
    assert before_stop("a b c", stop) == expected


# ----- chunks -----


def test_answers_stand_in_the_order_of_their_requests_and_whole_chunks_come_as_they_are_ready() -> None:
    slow = threading.Event()

    def script(_: int, body: dict[str, Any]) -> Reply:
        if body["prompt"] == "0":
            slow.wait(10)
        return echo(0, body)

    with serving(script) as stub:
        found = writer(stub.url).write(work(2, 3, 0, 1))
        order = [next(found)[0] for _ in range(3)]
        slow.set()
        last = next(found)
        assert next(found, None) is None
    assert sorted(order) == [1, 2, 3]
    assert (last[0], [w.text for w in last[1]]) == (0, ["You said 0", "You said 1"])


def test_work_is_taken_only_when_there_is_room() -> None:
    taken: list[int] = []

    def claimed() -> Iterator[tuple[int, list[Request]]]:
        for number, requests in work(*[3] * 20):
            taken.append(number)
            yield number, requests

    with serving(echo) as stub:
        found = writer(stub.url, concurrency=4).write(claimed())
        assert taken == []
        for handed_out in range(1, 21):
            next(found)
            # Under way are at most 3 of room and a chunk of 3 more, which may lie in 6 chunks that are each whole but for one answer.
            assert len(taken) <= handed_out + 6
        assert next(found, None) is None
    assert taken == list(range(20))
    assert sorted(int(body["prompt"]) for body in stub.bodies) == list(range(60))


def test_no_work_needs_no_server() -> None:
    assert list(writer("http://127.0.0.1:9/v1").write([])) == []
    assert list(writer("http://127.0.0.1:9/v1").write(work(0, 0))) == [(0, []), (1, [])]


def test_requests_under_way_end_with_the_one_who_asks() -> None:
    # Told by the prompt, as two requests may arrive in either order.
    with serving(lambda turn, body: echo(turn, body) if body["prompt"] == "0" else None) as stub:
        found = writer(stub.url, concurrency=2, timeout_seconds=60).write(work(1, 4))
        next(found)
        found.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "endpoint"]


# ----- what fails for a while -----


def test_a_server_that_limits_fails_and_hangs_is_survived() -> None:
    bad: list[Reply | None] = [
        (429, {"Retry-After": "0.05"}, {"error": {"message": "slow down"}}),
        (500, {}, "Internal Server Error"),
        None,
        (200, {}, "{ this is not JSON"),
        (200, {}, {"error": {"message": "no capacity"}}),
        (503, {"Retry-After": "0"}, ""),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": [{"text": 7}]}),
        (408, {}, ""),
        (409, {}, ""),
        (425, {}, ""),
    ]
    with serving(lambda turn, body: bad[turn] if turn < len(bad) else echo(turn, body)) as stub:
        teacher = writer(stub.url, concurrency=1, timeout_seconds=1.0, retries=len(bad))
        assert texts(teacher.write(work(2, 1))) == {0: ["You said 0", "You said 1"], 1: ["You said 2"]}
    assert teacher.failures == {"429": 1, "500": 1, "timeout": 1, "garbage": 4, "503": 1, "408": 1, "409": 1, "425": 1}
    assert len(stub.bodies) == 3 + len(bad)


def test_a_limit_met_by_one_request_holds_back_all() -> None:
    with serving(lambda turn, body: (429, {"retry-after-ms": "300"}, {}) if turn == 0 else echo(turn, body)) as stub:
        found = texts(writer(stub.url, concurrency=4).write(work(12)))
    assert found == {0: [f"You said {n}" for n in range(12)]}
    # Those sent before the refusal came back may arrive after it; from then on there is silence for as long as was asked.
    assert max(later - earlier for earlier, later in zip(stub.arrived, stub.arrived[1:], strict=False)) >= 0.15


def test_while_a_limiting_server_answers_others_its_refusals_use_up_no_tries() -> None:
    # The n-th of the others is answered when the first request has come n times, and that is refused once the n-th other is answered.
    arrivals, answers = 0, 0
    changed = threading.Condition()

    def script(_: int, body: dict[str, Any]) -> Reply:
        nonlocal arrivals, answers
        number = int(body["prompt"])
        with changed:
            if number:
                changed.wait_for(lambda: arrivals >= number, timeout=10)
                answers += 1
                changed.notify_all()
                return echo(0, body)
            arrivals += 1
            turn = arrivals
            changed.notify_all()
            changed.wait_for(lambda: answers >= min(turn, 7), timeout=10)
        time.sleep(0.05)  # until the other answer has been read
        return (429, {}, {}) if turn <= 7 else echo(0, body)

    with serving(script) as stub:
        teacher = writer(stub.url, concurrency=2, retries=1)
        assert texts(teacher.write(work(8))) == {0: [f"You said {n}" for n in range(8)]}
    assert teacher.failures == {"429": 7}


def test_an_answer_that_trickles_in_is_cut_off() -> None:
    def trickle(turn: int, body: dict[str, Any]) -> Reply | None:
        return (200, {"Content-Length": "1000"}, "{") if turn < 2 else echo(turn, body)

    with serving(trickle) as stub:
        teacher = writer(stub.url, concurrency=1, timeout_seconds=0.5)
        assert texts(teacher.write(work(1))) == {0: ["You said 0"]}
    assert teacher.failures == {"timeout": 2}


def test_a_server_that_starts_again_in_time_is_not_noticed() -> None:
    with serving(echo) as first:
        teacher = writer(first.url, retries=60, concurrency=3)
        found = teacher.write(work(*[2] * 10))
        answers = dict(islice(found, 3))
    second_stub: list[Stub] = []
    timer = threading.Timer(0.2, lambda: second_stub.append(Stub(echo, first.port)))
    timer.start()
    try:
        for number, written in found:
            assert number not in answers
            answers[number] = written
    finally:
        timer.join()
        second_stub[0].stop()
    assert {number: [w.text for w in written] for number, written in answers.items()} == {
        n: [f"You said {2 * n}", f"You said {2 * n + 1}"] for n in range(10)
    }
    assert teacher.failures["connection"] > 0


# ----- what does not pass -----


def test_when_the_tries_are_used_up_the_message_says_what_is_kept() -> None:
    with serving(
        lambda turn, body: echo(turn, body) if body["prompt"] in "012" else (500, {}, {"error": {"message": "out of memory"}})
    ) as stub:
        found = writer(stub.url, concurrency=1, retries=2).write(work(2, 1, 1))
        assert [next(found)[0], next(found)[0]] == [0, 1]
        with pytest.raises(RuntimeError) as raised:
            next(found)
    assert str(raised.value) == (
        f"teacher.endpoint.url ({stub.url}) gave no answer in 3 tries, the last time because it answered 500 ('out of memory'). "
        "The 3 answers handed out before are kept; the same command goes on from there"
    )
    assert len(stub.bodies) == 3 + 3


def test_where_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(RuntimeError, match=r"gave no answer in 2 tries, the last time because the connection failed \(ConnectError: "):
            list(writer(url, retries=1).write(work(1)))


def test_a_server_that_only_hangs() -> None:
    with serving(lambda *_: None) as stub:
        told = failure(stub, timeout_seconds=0.1, retries=1)
    assert "in 2 tries, the last time because it did not answer within timeout_seconds (0.1). The 0 answers" in told


def test_a_server_that_only_babbles() -> None:
    with serving(lambda *_: (200, {}, "<html>")) as stub:
        told = failure(stub, retries=0)
    assert (
        "in 1 tries, the last time because what it answered is no completion (Expecting value: line 1 column 1 (char 0)): '<html>'" in told
    )


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected"),
    [
        (400, {}, {"error": {"message": "context is 2048 tokens"}}, "with status 400: 'context is 2048 tokens'."),
        (422, {}, {"detail": [{"loc": "top_p"}]}, """with status 422: '{"detail": [{"loc": "top_p"}]}'."""),
        (401, {}, {"error": "bad key"}, "with status 401: 'bad key'; it was sent no key, as OPENAI_API_KEY is not set: export it, or name"),
        (403, {}, "", "with status 403: 'Forbidden'; it was sent no key"),
        (404, {}, {"error": {"message": "no such model"}}, "'no such model'; check the address and teacher.model ('some-model')."),
        (301, {"Location": "/v2"}, "", "with status 301: 'Moved Permanently'; give the address that it moved to."),
        (429, {}, {"error": {"message": "Pay first", "code": "insufficient_quota"}}, "with status 429: 'Pay first'."),
        (429, {"Retry-After": "7200"}, "", "asks to wait 7,200 s (status 429: 'Too Many Requests'): start the same command again then"),
    ],
)
def test_a_refusal_for_good_stops_at_once(status: int, headers: dict[str, str], body: Any, expected: str) -> None:
    with serving(lambda *_: (status, headers, body)) as stub:
        told = failure(stub, concurrency=1)
    assert expected in told
    assert told.endswith("The 0 answers handed out before are kept; the same command goes on from there")
    assert len(stub.bodies) == 1


# ----- the key -----


def test_the_key_is_never_shown(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    replies = [(500, {}, f"Bearer {SECRET}"), (200, {}, SECRET), (401, {}, {"error": {"message": f"Incorrect API key provided: {SECRET}"}})]
    with serving(lambda turn, _: replies[turn]) as stub:
        teacher = writer(stub.url, key_variable="MY_KEY", concurrency=1)
        with pytest.raises(RuntimeError) as raised:
            list(teacher.write(work(1)))
    assert "'Incorrect API key provided: [key]'; it was sent the key in MY_KEY." in str(raised.value)
    assert SECRET not in f"{raised.value!r} {raised.value.__cause__!r} {teacher!r} {vars(teacher)}"
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    assert "it answered 500 ('Bearer [key]'); trying again in 0 s" in err
    assert stub.keys == [f"Bearer {SECRET}"] * 3


@pytest.mark.parametrize("value", ["two words", "caf\u00e9", "line\nbreak"])
def test_a_key_that_cannot_be_sent_is_told_without_it(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(ValueError) as raised:
        writer("http://127.0.0.1:9/v1")
    assert str(raised.value) == (
        "the variable OPENAI_API_KEY (teacher.endpoint.key_variable) holds no key: there are blanks inside, or characters beyond ASCII"
    )


# ----- pauses -----


@given(st.floats(0.001, 10), st.floats(0.001, 100), st.integers(1, 2000))
def test_pauses_grow_to_the_longest(first: float, longest: float, tries: int) -> None:
    assert 0 <= Backoff(first, longest).pause(tries) <= min(longest, first * 2 ** min(tries - 1, 60))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, 37),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 -0000"}, 37),
        ({"retry-after": "Sun, 06 Nov 1994 08:48:00 GMT"}, 0),
        ({"retry-after": "soon"}, 0),
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({"x-ratelimit-reset-requests": "1m6.5s", "x-ratelimit-remaining-requests": "0"}, 66.5),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-remaining-requests": "3"}, 0),
        (
            {
                f"x-ratelimit-{k}-{of}": v
                for of, t in (("requests", "20ms"), ("tokens", "1h"))
                for k, v in (("reset", t), ("remaining", "0"))
            },
            3600,
        ),
    ],
)
def test_what_a_server_asks_to_wait(headers: dict[str, str], expected: float) -> None:
    assert wait_seconds(headers, now=784111740.0) == pytest.approx(expected)  # 1994-11-06 08:49:00


# ----- the configuration -----

SERVER: dict[str, Any] = {"url": "http://localhost:8000/v1"}
ENDPOINT: dict[str, Any] = {"source": "endpoint", "model": "big", "endpoint": SERVER}
VLLM: dict[str, Any] = {"source": "vllm", "model": "OWNER/big"}
SCRATCH = {"from_scratch": "llama"}


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as raised:
        TeacherConfig.model_validate(values)
    return raised.value.errors()[0]["msg"].removeprefix("Value error, ")


@pytest.mark.parametrize(
    "values",
    [
        ENDPOINT,
        VLLM,
        {
            **ENDPOINT,
            "rationales": {"samples": 5, "top_p": 0.9, "examples": "x.yaml", "shots": 2, "rationalize": True, "max_new_tokens": 9},
        },
        {**VLLM, "rationales": {"samples": 5, "top_p": 0.9, "chat": "never", "max_input_tokens": 64}, "soft_labels": {"format": "answers"}},
        {**ENDPOINT, "rationales": {"samples": 5}, "soft_labels": {"format": "answers"}},
        {**ENDPOINT, "endpoint": {**SERVER, "tokenizer": "OWNER/big"}, "soft_labels": {"k": 20}},
        {"source": "deepspeed", "model": "OWNER/big", "soft_labels": {"format": "choices"}},
    ],
)
def test_what_a_teacher_elsewhere_may_be_asked(values: dict[str, Any]) -> None:
    assert TeacherConfig.model_validate(values).source == values["source"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        *[
            ({**base, key: value}, f"{key} has no effect with source: {base['source']}; remove it")
            for base in (ENDPOINT, VLLM)
            for key, value in (("sharding", "zero3"), ("batch_size", 4), ("tune", {}), ("label", "{a}"), ("rationale", "{b}"))
        ],
        ({**VLLM, "endpoint": SERVER}, "endpoint has no effect with source: vllm; remove it"),
        (
            {"source": "deepspeed", "model": "OWNER/big", "endpoint": SERVER},
            "endpoint has no effect with source: deepspeed; remove it",
        ),
        ({**ENDPOINT, "rationales": {"chat": "never"}}, "rationales.chat has no effect with source: endpoint; remove it"),
        (
            {**ENDPOINT, "rationales": {"max_input_tokens": 99}},
            "rationales.max_input_tokens has no effect with source: endpoint; remove it",
        ),
        *[
            (
                {"source": "recorded", "label": "{a}", "rationale": "{b}", "rationales": {key: value}},
                f"rationales.{key} has no effect with source: recorded; remove it",
            )
            for key, value in (("temperature", 0.5), ("rationalize", True), ("chat", "never"), ("examples", "x.yaml"))
        ],
        (
            {"source": "recorded", "label": "{a}", "rationale": "{b}", "rationales": {"samples": 3}},
            "rationales.samples has no effect with source: recorded; remove it",
        ),
        (
            {"source": "deepspeed", "model": SCRATCH, "tune": {}, "rationales": {"chat": "never"}},
            "rationales.chat has no effect on a tuned teacher, which learnt the form of its answer: remove one of them",
        ),
        (
            {"source": "endpoint", "endpoint": SERVER},
            "source is endpoint but model is missing: give the name that the server knows it by",
        ),
        ({"source": "vllm"}, "source is vllm but model is missing: give a hub id or a folder"),
        (
            {"source": "endpoint", "model": "big"},
            "source is endpoint but endpoint is missing: add endpoint: {url: http://localhost:8000/v1}",
        ),
        (
            {**ENDPOINT, "model": SCRATCH},
            "model is from scratch, which only source: deepspeed can make and tune; with source: endpoint name a model",
        ),
        (
            {**ENDPOINT, "model": {"cut_from": "teacher", "layers": 2}},
            "model is {cut_from: teacher}, but a teacher cannot be cut from itself: name a model",
        ),
        (
            {**VLLM, "model": "x.gguf"},
            "model is 'x.gguf', a .gguf file, but vllm reads hub ids and folders: name one, or set source to deepspeed",
        ),
        (
            {**ENDPOINT, "soft_labels": {"format": "answers"}},
            "soft_labels.format is answers, how often each answer was drawn, but rationales.samples is 1: draw several",
        ),
        (
            {**ENDPOINT, "soft_labels": {"format": "sampled"}},
            "soft_labels.format is sampled, which needs the model itself: with source: endpoint use answers or top_k, "
            "or set source to deepspeed",
        ),
        (
            {**VLLM, "soft_labels": {"format": "top_k"}},
            "soft_labels.format is top_k, which needs the model itself: with source: vllm use answers, or set source to deepspeed",
        ),
        (
            {**ENDPOINT, "soft_labels": {}},
            "soft_labels.k is 32, but a server gives 20 log-probabilities a token at most: lower k",
        ),
        (
            {**ENDPOINT, "soft_labels": {"k": 20}},
            "soft_labels.format is top_k but endpoint.tokenizer is missing: name the tokenizer of the server's model",
        ),
        (
            {**ENDPOINT, "endpoint": {**SERVER, "tokenizer": "OWNER/big"}},
            "endpoint.tokenizer has no effect unless soft_labels.format is top_k: remove it",
        ),
        *[
            ({**ENDPOINT, "endpoint": {"url": url}}, f"is {url!r}: write it as http://localhost:8000/v1 or https://api.openai.com/v1")
            for url in ("localhost:8000/v1", "ftp://host/v1", "http:///v1", "")
        ],
        (
            {**ENDPOINT, "endpoint": {"url": "http://host:port/v1"}},
            "is no address: write it as http://localhost:8000/v1 or https://api.openai.com/v1",
        ),
        *[
            (
                {**ENDPOINT, "endpoint": {"url": url}},
                "holds a user, a password, a query or a fragment: give the bare address, and the key in the variable named by key_variable",
            )
            for url in (f"https://me:{SECRET}@host/v1", f"https://host/v1?key={SECRET}")
        ],
        (
            {**ENDPOINT, "endpoint": {"url": "http://host/v1/chat/completions/"}},
            "is 'http://host/v1/chat/completions/': end it before /chat/completions or /completions, which `api` chooses",
        ),
        (
            {**ENDPOINT, "endpoint": {**SERVER, "key_variable": SECRET}},
            "is not the name of an environment variable: export the key under a name, and write that name here",
        ),
    ],
)
def test_a_teacher_that_contradicts_itself_is_told(values: dict[str, Any], expected: str) -> None:
    assert refusal(values) == expected
