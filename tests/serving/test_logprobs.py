"""Log probabilities in both of OpenAI's forms, whole and streamed, against those of `generate`."""

import openai
import pytest

MESSAGES = [{"role": "user", "content": "def add(a, b):"}]
SAMPLED = {"temperature": 1.3, "seed": 7, "top_p": 0.9}


@pytest.mark.parametrize("sampled", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_chat_tells_those_of_its_tokens(serve, tiny_generator, sampled):
    wanted = tiny_generator.generate(MESSAGES, max_new_tokens=30, logprobs=True, **sampled)
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "logprobs": True, **sampled}
    with serve() as server:
        whole = server.client.chat.completions.create(**asked).choices[0]
        chunks = [chunk.choices[0] for chunk in server.client.chat.completions.create(**asked, stream=True)]
        silent = server.client.chat.completions.create(**{**asked, "logprobs": False}).choices[0]
    streamed = [each for choice in chunks if choice.logprobs is not None for each in choice.logprobs.content]
    assert silent.logprobs is None and silent.message.content == whole.message.content == wanted.text
    for told in (whole.logprobs.content, streamed):
        assert [each.logprob for each in told] == pytest.approx(wanted.logprobs, abs=1e-4)
        assert wanted.text.startswith("".join(each.token for each in told))
        assert all(bytes(each.bytes).decode() == each.token and each.top_logprobs == [] for each in told)


def test_a_completion_tells_where_its_tokens_begin(serve, tiny_generator):
    wanted = tiny_generator.generate("def add", chat=False, max_new_tokens=30, logprobs=True)
    asked = {"model": "tiny", "prompt": ["for i in", "def add"], "max_tokens": 30, "logprobs": 0}
    with serve(slots=2) as server:
        whole = server.client.completions.create(**asked).choices[1]
        chunks = [chunk.choices[0] for chunk in server.client.completions.create(**asked, stream=True)]
    assert whole.logprobs.token_logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    for token, offset in zip(whole.logprobs.tokens, whole.logprobs.text_offset, strict=True):
        assert wanted.text[offset:].startswith(token)
    streamed = [choice.logprobs for choice in chunks if choice.index == 1]
    assert [at for each in streamed for at in each.text_offset] == whole.logprobs.text_offset
    assert [token for each in streamed for token in each.tokens] == whole.logprobs.tokens


def test_a_token_that_ends_the_text_is_none_of_it(serve, tiny_generator):
    """The text ends where it is made to: by a schema, behind which only an end token may come."""
    with serve() as server:
        answer = server.client.completions.create(
            model="tiny", prompt="def", max_tokens=30, logprobs=0, extra_body={"regex": "abc"}
        )
    told = answer.choices[0].logprobs
    assert answer.choices[0].finish_reason == "stop" and "".join(told.tokens) == "abc"
    assert len(told.token_logprobs) == answer.usage.completion_tokens - 1


@pytest.mark.parametrize("number", [True, 1, 5, -1])
def test_alternatives_are_not_told(serve, number):
    with serve() as server, pytest.raises(openai.BadRequestError, match=r"logprobs: .*; this server gives 0"):
        server.client.completions.create(model="tiny", prompt="def", logprobs=number)
