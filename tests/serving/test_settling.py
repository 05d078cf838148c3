"""Layers at which tokens were settled, against transformers' hidden states."""

import json

import pytest
import torch

from lskip.models.decoder import Decoder
from lskip.serving.settling import settling_layers
from tests.serving.test_clients import MESSAGES, raw


def by_hand(model, ids: list[int], start: int) -> list[int]:
    """The first layer from which on the argmax stays, of every position from `start` on."""
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    decoder = Decoder(model)
    # transformers gives the last layer's states after the final norm.
    said = [
        decoder.head(state if last else decoder.norm(state))[0].argmax(-1).tolist()
        for state, last in zip(states[1:], [False] * (len(states) - 2) + [True], strict=True)
    ]
    found = []
    for position in range(start, len(ids)):
        layers = [each[position] for each in said]
        layer = len(layers)
        while layer > 1 and layers[layer - 2] == layers[-1]:
            layer -= 1
        found.append(layer)
    return found


@pytest.mark.parametrize("length", [5, 400])
@torch.no_grad()
def test_layers_are_those_of_transformers(tiny_generator, tiny_model, length):
    """Also of a text of several pieces."""
    answer = torch.randint(1, 290, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt = tiny_generator.prepare(MESSAGES, tiny_generator.settings(max_new_tokens=1)).prompt
    expected = by_hand(tiny_model("llama", max_position_embeddings=1024), [*prompt, *answer[:-1]], len(prompt) - 1)
    assert settling_layers(tiny_generator, MESSAGES, answer, 1024) == expected
    assert len(set(expected)) > 1


def test_an_answer_is_settled_while_others_are_under_way(serve, tiny_generator):
    with serve() as server:
        stream = server.client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=12, stream=True, extra_body={"show_rounds": True}
        )
        tokens = [token for chunk in stream for token in getattr(chunk, "lskip", {"tokens": []})["tokens"]]
        body = {"messages": MESSAGES, "tokens": [token["id"] for token in tokens]}
        status, found, _ = raw(server, "POST", "/lskip/settling", json.dumps(body).encode())
        assert (status, len(found["layers"]), found["num_layers"]) == (200, 12, 4)
        for bad, name in (
            ({**body, "tokens": []}, "tokens"),
            ({**body, "tokens": [10**6]}, "tokens"),
            ({**body, "tokens": [1] * 2000}, "tokens"),
            ({**body, "tokens": [-1]}, "tokens.0"),
            ({**body, "messages": []}, "messages"),
        ):
            status, answer, _ = raw(server, "POST", "/lskip/settling", json.dumps(bad).encode())
            assert status == 400 and answer["error"]["param"] == name
    done = tiny_generator.generate(MESSAGES, max_new_tokens=12, draft="ngram", num_speculations=3)
    assert [token["id"] for token in tokens] == done.token_ids
    assert [token["kind"] for token in tokens] == [kind for each in done.history for kind in each.kinds]
