"""Texts that leave the model early, by a request's fields or by an endpoint: batches of their own, in turns."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from lskip.inference import Entropy
from tests.serving.test_clients import raw

EXITS = {
    "none": ({}, {}),
    "fixed": ({"fixed_exit": 1}, {"exit_layer": 1}),
    "criterion": (
        {"exit_criterion": {"name": "Entropy", "threshold": 0.95}},
        {"exit_criterion": Entropy(0.95)},
    ),
    "criterion within": (
        {"fixed_exit": 3, "exit_criterion": {"name": "Entropy", "threshold": 0.95}},
        {"exit_layer": 3, "exit_criterion": Entropy(0.95)},
    ),
}


def test_requests_with_other_exits_get_their_own_texts(serve, tiny_generator):
    """Red where an exit reaches a neighbour's text, or where one that waits for another exit is lost."""
    rng = random.Random(0)
    asked = [(rng.choice([*EXITS]), [rng.randrange(300) for _ in range(5)], rng.choice([{}, {"temperature": 0.9}]))
             for _ in range(24)]  # fmt: skip

    def ask(each):
        name, prompt, sampling = each
        return server.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=12, seed=3, **sampling, extra_body=EXITS[name][0]
        )

    with serve(slots=2, most_waiting=30) as server, ThreadPoolExecutor(8) as pool:
        texts = [answer.choices[0].text for answer in pool.map(ask, asked)]
    for text, (name, prompt, sampling) in zip(texts, asked, strict=True):
        alone = tiny_generator.generate(prompt, max_new_tokens=12, seed=3, **sampling, **EXITS[name][1])
        assert text == alone.text, name
    whole, fixed = (tiny_generator.generate([7, 42], max_new_tokens=12, **EXITS[name][1]) for name in ("none", "fixed"))
    assert whole.token_ids != fixed.token_ids  # else nothing was tested


def test_an_endpoint_exits_where_it_says(serve, tiny_generator):
    wanted = {
        "tiny": tiny_generator.generate("def add", chat=False, max_new_tokens=20).text,
        "exit": tiny_generator.generate("def add", chat=False, max_new_tokens=20, exit_layer=1).text,
    }
    with serve(with_exit=True) as server:
        assert [model.id for model in server.client.models.list().data] == ["tiny", "exit"]
        for name, text in wanted.items():
            answer = server.client.completions.create(model=name, prompt="def add", max_tokens=20)
            assert answer.choices[0].text == text and answer.model == name
        unnamed = raw(server, "POST", "/v1/completions", b'{"prompt": "def add", "max_tokens": 20}')[1]
        told = raw(server, "GET", "/metrics")[1]
    assert unnamed["choices"][0]["text"] == wanted["tiny"] and unnamed["model"] == "tiny"
    assert 'lskip_generated_tokens_total{model="tiny"} 40.0' in told
    assert 'lskip_generated_tokens_total{model="exit"} 20.0' in told


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"fixed_exit": 0}, "fixed_exit"),
        ({"fixed_exit": 99}, "fixed_exit"),
        ({"exit_criterion": {"name": "os.system", "threshold": 1.0}}, "exit_criterion.name"),
        ({"exit_criterion": {"name": "Entropy", "threshold": -1.0}}, "exit_criterion.threshold"),
        ({"exit_criterion": {"name": "LearnedExit", "threshold": 0.5}}, "exit_criterion"),
        ({"fixed_exit": 1, "draft": "none"}, "draft"),
        ({"fixed_exit": 1, "num_speculations": 2}, "num_speculations"),
        ({"exit_criterion": {"name": "Entropy", "threshold": 1.0}, "exit_layer": 1}, "exit_layer"),
    ],
)
def test_an_exit_that_there_is_not_is_named(serve, fields, name):
    with serve() as server:
        with pytest.raises(openai.BadRequestError) as caught:
            server.client.completions.create(model="tiny", prompt="def", max_tokens=3, extra_body=fields)
        assert caught.value.body["param"] == name and name in caught.value.body["message"]
        assert server.client.completions.create(model="tiny", prompt="def", max_tokens=3).usage.completion_tokens == 3


def test_a_client_that_leaves_an_early_exit_frees_its_slot(serve):
    """Its neighbours that wait for another exit get theirs."""
    body = {"model": "tiny", "prompt": "def", "max_tokens": 900, "stream": True, "extra_body": {"fixed_exit": 1}}
    with serve(slots=1) as server:
        stream = server.client.completions.create(**body)
        next(iter(stream))
        stream.close()
        asked = json.dumps({"prompt": "def", "max_tokens": 5, "fixed_exit": 2}).encode()
        status, answer, _ = raw(server, "POST", "/v1/completions", asked)
    assert status == 200 and answer["usage"]["completion_tokens"] == 5
