"""A started server of a tiny model, and OpenAI's own client for it."""

import copy
import threading
import time
from contextlib import contextmanager

import openai
import pytest
import uvicorn

from lskip.inference import TextGenerator
from lskip.serving.app import Server
from lskip.serving.engine import Engine
from lskip.serving.lanes import Endpoint, ExitLane, Lane
from lskip.serving.server import listen

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"


@pytest.fixture
def tiny_generator(tiny_model, tiny_tokenizer):
    """Return a generator with a chat template, and random texts that hardly end before their limit."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    return TextGenerator(tiny_model("llama", max_position_embeddings=1024), tokenizer)


@pytest.fixture
def serve(tiny_generator):
    """Return a context manager that serves: it yields the Server, its engine and a client of it.

    The endpoint "tiny" drafts; "exit" leaves the model behind its first block, and is there if asked for.
    """

    @contextmanager
    def started(slots=3, context=1024, most_waiting=8, api_key=None, drafting=None, with_exit=False):
        kinds = {"tiny": {"draft": "ngram", "num_speculations": 3, **(drafting or {})}}
        kinds |= {"exit": {"exit_layer": 1}} if with_exit else {}
        endpoints = [
            Endpoint(
                name,
                Lane(tiny_generator, tiny_generator.settings(**settings), slots, context),
                ExitLane(tiny_generator, slots, context),
            )
            for name, settings in kinds.items()
        ]
        engine = Engine([lane for _, *lanes in endpoints for lane in lanes], most_waiting)
        place = listen("127.0.0.1", 0)
        server = Server(engine, endpoints, api_key=api_key)
        running = uvicorn.Server(uvicorn.Config(server.app(), lifespan="off", log_level="warning"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [place]})
        engine.start()
        thread.start()
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        try:
            with openai.OpenAI(base_url=f"{url}/v1", api_key=api_key or "none", max_retries=0) as client:
                server.url, server.client = url, client
                yield server
        finally:
            running.should_exit = True
            thread.join()
            engine.close()
            place.close()

    return started


def wait_until(condition, seconds: float = 20):
    """Wait for what other threads do; fail where it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
