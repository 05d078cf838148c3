"""OpenAI's own Python client against a started server: every text is what `generate` makes alone."""

import http.client
import json
import random
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import jsonschema
import openai
import pytest

from tests.serving.conftest import wait_until

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "def add(a, b):"}]
SAMPLED = {"temperature": 1.3, "seed": 7, "top_p": 0.9}


def under_way(server):
    """Return the requests that have a slot or wait for one."""
    lanes = server.engine.lanes
    return server.engine.running(*lanes) + server.engine.waiting(*lanes)


def idle(server):
    return under_way(server) == 0


def expected(generator, prompt, **settings):
    return generator.generate(prompt, **{"max_new_tokens": 40, **settings})


@pytest.mark.parametrize("sampled", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_chat_is_what_generate_says(serve, tiny_generator, sampled):
    wanted = expected(tiny_generator, MESSAGES, **sampled)
    with serve() as server:
        ask = server.client.chat.completions.create
        asked = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 40, **sampled}
        whole = ask(**asked)
        chunks = list(ask(**asked, stream=True, stream_options={"include_usage": True}))
    assert whole.choices[0].message.content == wanted.text and whole.choices[0].message.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == wanted.text
    for usage in (whole.usage, chunks[-1].usage):
        assert (usage.prompt_tokens, usage.completion_tokens) == (wanted.prompt_tokens, len(wanted.token_ids))
    reasons = [each.choices[0].finish_reason for each in chunks if each.choices]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    assert len({each.id for each in chunks}) == 1 and len(reasons) > 5  # streamed, not kept to its end


def test_what_was_drafted_is_told(serve, tiny_generator):
    prompt = "print(add(i, 1))\n" * 6
    wanted = tiny_generator.generate(prompt, chat=False, max_new_tokens=40, draft="ngram", num_speculations=3)
    assert wanted.accepted and wanted.accepted < wanted.drafted
    with serve() as server:
        details = server.client.completions.create(model="tiny", prompt=prompt, max_tokens=40).usage
        plain = server.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=40, extra_body={"draft": "none"}
        )
    told = details.completion_tokens_details
    assert told.accepted_prediction_tokens == wanted.accepted
    assert told.accepted_prediction_tokens + told.rejected_prediction_tokens == wanted.drafted
    assert plain.usage.completion_tokens_details.accepted_prediction_tokens == 0
    assert plain.choices[0].text == wanted.text


def test_several_prompts_are_several_choices(serve, tiny_generator):
    prompts = ["def add", "for i in", "return"]
    with serve(slots=2) as server:
        ask = server.client.completions.create
        whole = ask(model="tiny", prompt=prompts, max_tokens=20, **SAMPLED)
        chunks = list(ask(model="tiny", prompt=prompts, max_tokens=20, stream=True, **SAMPLED))
        ids = ask(model="tiny", prompt=[7, 42, 99], max_tokens=20)
    for place, prompt in enumerate(prompts):
        wanted = expected(tiny_generator, prompt, chat=False, max_new_tokens=20, **{**SAMPLED, "seed": 7 + place})
        assert whole.choices[place].text == wanted.text and whole.choices[place].index == place
        mine = [each.choices[0] for each in chunks if each.choices[0].index == place]
        assert "".join(each.text for each in mine) == wanted.text and mine[-1].finish_reason == "length"
    assert ids.choices[0].text == expected(tiny_generator, [7, 42, 99], max_new_tokens=20).text


@pytest.mark.parametrize("length", [1, 3, 7])
def test_the_answer_ends_before_a_stop_string(serve, tiny_generator, length):
    """The text that is given out never shows the beginning of the stop string, streamed or not."""
    text = expected(tiny_generator, "def add(a, b):", chat=False).text
    stop = text[12 : 12 + length]
    with serve() as server:
        ask = server.client.completions.create
        asked = {"model": "tiny", "prompt": "def add(a, b):", "max_tokens": 40, "stop": [stop, "never there"]}
        whole, chunks = ask(**asked).choices[0], [each.choices[0] for each in ask(**asked, stream=True)]
    assert whole.text == text[: text.index(stop)] and whole.finish_reason == "stop"
    assert "".join(each.text for each in chunks) == whole.text and chunks[-1].finish_reason == "stop"


def test_many_clients_at_once_get_their_own_texts(serve, tiny_generator):
    """Prompts of unequal length, greedy and sampled, with every bound on drafts, three at a time."""
    rng = random.Random(0)
    asked = [
        {
            "prompt": [rng.randrange(1, 300) for _ in range(rng.choice([1, 5, 40, 300]))],
            "max_tokens": rng.randrange(1, 30),
            **rng.choice([{}, {"temperature": 1.2, "seed": rng.randrange(100)}]),
            "extra_body": rng.choice([{}, {"draft": "none"}, {"num_speculations": 1}, {"exit_layer": 2}]),
        }
        for _ in range(40)
    ]
    drafting = {"draft": None, "exit_layer": 3, "num_speculations": 4}
    with serve(most_waiting=50, drafting=drafting) as server, ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda each: server.client.completions.create(model="tiny", **each), asked))
    for each, answer in zip(asked, found, strict=True):
        settings = {"temperature": each.get("temperature", 0.0), "seed": each.get("seed")}
        wanted = expected(tiny_generator, each["prompt"], max_new_tokens=each["max_tokens"], **settings)
        assert answer.choices[0].text == wanted.text
        if each["extra_body"] in ({"draft": "none"}, {"exit_layer": 2}):  # the server's exit is deeper
            assert answer.usage.completion_tokens_details.rejected_prediction_tokens == 0


# What goes wrong


@pytest.mark.parametrize(
    ("fields", "kind", "name"),
    [
        ({"n": 2}, openai.BadRequestError, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"logprobs": True, "top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty"),
        ({"temperature": -1.0}, openai.BadRequestError, "temperature"),
        ({"top_p": 0.0}, openai.BadRequestError, "top_p"),
        ({"max_completion_tokens": 0}, openai.BadRequestError, "max_completion_tokens"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "stop"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, openai.BadRequestError, "messages.0.role"),
        ({"response_format": {"type": "xml"}}, openai.BadRequestError, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, openai.BadRequestError, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objct"}}}},
            openai.BadRequestError,
            "response_format",
        ),
        ({"extra_body": {"regex": "a("}}, openai.BadRequestError, "regex"),
        ({"extra_body": {"exit_layer": 0}}, openai.BadRequestError, "exit_layer"),
        ({"extra_body": {"acceptance": "rejection"}}, openai.BadRequestError, "acceptance"),
        ({"model": "another"}, openai.NotFoundError, "model"),
    ],
)
def test_bad_fields_are_named(serve, fields, kind, name):
    with serve() as server, pytest.raises(kind) as caught:
        server.client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **fields})
    assert caught.value.body["param"] == name and name.partition(".")[0] in caught.value.body["message"]


def test_fields_that_change_nothing_are_taken(serve):
    neutral = {"n": 1, "presence_penalty": 0, "user": "someone", "logprobs": False, "response_format": {"type": "text"}}
    with serve() as server:
        server.client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=3, **neutral)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "size": {"type": "integer", "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_answers_follow_a_schema(serve, tiny_generator, stream):
    """While free texts are under way beside it; the text is that of `generate`."""
    wanted = expected(tiny_generator, MESSAGES, json_schema=SCHEMA, max_new_tokens=150)
    asked = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    with serve() as server, ThreadPoolExecutor(2) as pool:
        free = pool.submit(server.client.completions.create, model="tiny", prompt=[7, 42], max_tokens=60)
        chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 150, "response_format": asked, "stream": stream}
        found = server.client.chat.completions.create(**chat)
        text = "".join(each.choices[0].delta.content or "" for each in found) if stream else None
        text = text or found.choices[0].message.content
        word = server.client.completions.create(
            model="tiny", prompt="a", max_tokens=20, extra_body={"regex": "(yes|no)!"}
        )
        assert free.result().usage.completion_tokens == 60
    assert text == wanted.text
    jsonschema.validate(json.loads(text), SCHEMA)
    assert word.choices[0].text in ("yes!", "no!") and word.choices[0].finish_reason == "stop"


def test_any_object_is_asked_for(serve):
    with serve() as server:
        chat = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30}
        found = server.client.chat.completions.create(**chat, response_format={"type": "json_object"})
    assert found.choices[0].message.content.startswith("{")


def raw(server, method: str, path: str, body: bytes = b"", **headers) -> tuple[int, dict | str, dict]:
    """Return status, body and headers of a plain HTTP request."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    is_json = answer.headers["content-type"] == "application/json"
    return answer.status, json.loads(text) if is_json else text, dict(answer.headers)


def test_bodies_that_are_no_requests(serve):
    rng = random.Random(0)
    good = json.dumps({"model": "tiny", "prompt": "def", "max_tokens": 2}).encode()
    bodies = [b"", b"null", b"[]", b"{", b"\xff\xfe", b'"a"', b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"[" * 5000]
    bodies += [bytes([*good[:at], rng.randrange(256), *good[at + 1 :]]) for at in rng.choices(range(len(good)), k=40)]
    with serve() as server:
        for body in bodies:
            status, answer, _ = raw(server, "POST", "/v1/completions", body)
            assert status in (200, 400, 404), (body, answer)
            assert status == 200 or answer["error"]["message"], body
        assert raw(server, "POST", "/v1/completions", b" " * 2**21)[0] == 413
        assert raw(server, "GET", "/v1/nothing")[1]["error"]["message"] == "Not Found"
        assert raw(server, "POST", "/v1/completions", good)[0] == 200 and idle(server)


def test_a_request_that_fails_fails_alone(serve, tiny_generator):
    with serve() as server:
        tiny_generator.runner.embedding.data[299] = float("nan")
        with ThreadPoolExecutor(4) as pool:
            ask = lambda ids: server.client.completions.create(model="tiny", prompt=ids, max_tokens=30)  # noqa: E731
            others = [pool.submit(ask, [7, 42, place]) for place in range(6)]
            with pytest.raises(openai.InternalServerError, match="not finite"):
                ask([5, 299])
            assert all(each.result().usage.completion_tokens == 30 for each in others)
        assert idle(server)


def test_clients_that_go_away_free_their_slots(serve):
    with serve(slots=2, most_waiting=100) as server:
        for streams in (True, False) * 10:
            connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
            body = {"model": "tiny", "prompt": "def", "max_tokens": 1000, "stream": streams}
            connection.request("POST", "/v1/completions", json.dumps(body))
            if streams:
                connection.getresponse().read(10)
            connection.close()
        wait_until(lambda: idle(server))
        assert server.client.completions.create(model="tiny", prompt="def", max_tokens=5).usage.completion_tokens == 5
        cancelled = re.search(
            r'requests_total{model="tiny",outcome="cancelled"} (\d+)', raw(server, "GET", "/metrics")[1]
        )
        assert int(cancelled[1]) > 0


def test_more_than_may_wait_are_told_to_come_again(serve):
    goes_on = threading.Event()
    with serve(slots=1, most_waiting=1) as server, ThreadPoolExecutor(2) as pool:
        lane = server.endpoints["tiny"].lane
        steps_of = lane.steps
        lane.steps = lambda: goes_on.wait() and steps_of()
        ask = lambda: server.client.completions.create(model="tiny", prompt="def", max_tokens=3)  # noqa: E731
        taken = [pool.submit(ask), pool.submit(ask)]
        wait_until(lambda: under_way(server) == 2)
        with pytest.raises(openai.RateLimitError) as caught:
            ask()
        goes_on.set()
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert all(each.result().usage.completion_tokens == 3 for each in taken)


def test_who_may_ask(serve):
    with serve(api_key="secret") as server:
        assert server.client.models.list().data[0].id == "tiny"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="guessed", max_retries=0).models.list()
        assert raw(server, "GET", "/v1/models")[0] == 401
        assert raw(server, "GET", "/health")[1] == {"status": "ok"}
        assert raw(server, "GET", "/health", Host="evil.example")[0] == 403
        assert raw(server, "GET", "/health", Origin="https://evil.example")[0] == 403


def test_more_prompts_than_it_ever_takes(serve):
    with serve(slots=2, most_waiting=1) as server, pytest.raises(openai.BadRequestError, match="takes 3 at a time"):
        server.client.completions.create(model="tiny", prompt=["a"] * 4, max_tokens=3)


def test_a_server_that_ends_says_so(serve):
    with serve() as server:
        assert raw(server, "GET", "/health")[0] == 200
        server.engine.close()
        assert raw(server, "GET", "/health")[0] == 503
        status, _, headers = raw(server, "POST", "/v1/completions", b'{"prompt": "def"}')
        assert status == 503 and "retry-after" in headers


def test_metrics_count_what_was_done(serve):
    with serve() as server:
        answers = [server.client.completions.create(model="tiny", prompt="def", max_tokens=n) for n in (3, 9)]
        text = raw(server, "GET", "/metrics")[1]
    values = {name: float(value) for name, value in re.findall(r"^lskip_(\w+){[^}]*} (\S+)$", text, re.MULTILINE)}
    assert values["requests_total"] == 2 and values["generated_tokens_total"] == 12
    assert values["prompt_tokens_total"] == sum(answer.usage.prompt_tokens for answer in answers)
    assert values["time_to_first_token_seconds_count"] == values["time_per_token_seconds_count"] == 2
    assert values["tokens_per_round"] == values["generated_tokens_total"] / values["rounds_total"]


def test_a_second_turn_starts_behind_the_first(serve, tiny_generator):
    """The text is that of `generate`; the tokens that were not run again are told, and counted."""
    with serve(slots=2) as server:
        ask = server.client.chat.completions.create
        first = ask(model="tiny", messages=MESSAGES, max_tokens=40)
        more = [*MESSAGES, {"role": "assistant", "content": first.choices[0].message.content}]
        more += [{"role": "user", "content": "again"}]
        second = ask(model="tiny", messages=more, max_tokens=40)
        _, told, _ = raw(server, "GET", "/metrics")
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    known = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens <= known < second.usage.prompt_tokens
    assert second.choices[0].message.content == expected(tiny_generator, more).text
    assert f'lskip_cached_prompt_tokens_total{{model="tiny"}} {float(known)}' in told


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_answer_begins_frees_its_slot(serve, stream):
    """Connections that are closed as soon as the request is sent."""
    body = json.dumps({"prompt": "a", "max_tokens": 900, "stream": stream}).encode()
    with serve(slots=1, most_waiting=100) as server:
        for _ in range(30):
            place = urlsplit(server.url)
            with socket.create_connection((place.hostname, place.port)) as connection:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
                connection.sendall(head.encode() + body)
        wait_until(lambda: idle(server))
        assert server.client.completions.create(model="tiny", prompt="a", max_tokens=5).usage.completion_tokens == 5
