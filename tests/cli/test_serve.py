"""`lskip serve` as a process: what it says, how a signal ends it, what it refuses before a model is loaded."""

import copy
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from lskip.cli import main
from lskip.inference import load_generator
from tests.serving.conftest import TEMPLATE


@pytest.fixture
def saved(tiny_model, tiny_tokenizer, tmp_path):
    """Return the folder of a tiny model with a chat template."""
    tiny_model("llama", max_position_embeddings=4096).save_pretrained(tmp_path / "tiny")
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def ask(url: str, **fields) -> dict:
    body = json.dumps({"prompt": "def add", "max_tokens": 4, **fields}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/completions", body), timeout=60) as answer:
        return json.load(answer)


@contextmanager
def started(*options: str):
    """Yield the process of a server, its first line, and its address."""
    command = [sys.executable, "-m", "lskip", "serve", "--port=0", "--max_batch_size=2", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        yield process, said, re.search(r"http://\S+/v1", said)[0]
    finally:
        process.kill()
        process.communicate()


def wait_until_running(url: str, texts: int) -> None:
    end = time.monotonic() + 60
    while (
        f'running{{model="tiny"}} {texts}.0'
        not in urllib.request.urlopen(url.replace("/v1", "/metrics")).read().decode()
    ):
        assert time.monotonic() < end


def test_a_signal_lets_answers_end(saved):
    """After SIGTERM an answer under way comes whole, and the process ends as one that did what it was asked to."""
    with started(f"--model={saved}") as (process, said, url):
        assert "serving tiny" in said and "2 texts at a time, of up to 4096 tokens" in said
        assert ask(url)["usage"]["completion_tokens"] == 4
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(ask, url, prompt="return a", max_tokens=1500)
            wait_until_running(url, 1)
            process.terminate()
            assert answer.result()["usage"]["completion_tokens"] == 1500
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("stop_seconds", "signals"), [(0, [signal.SIGTERM]), (50, [signal.SIGINT, signal.SIGINT])], ids=["late", "twice"]
)
def test_answers_that_take_longer_are_told_that_the_server_ends(saved, stop_seconds, signals):
    # Answers of half a minute, which have no end token: on a busy machine the signal comes late.
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2**16}))
    options = (f"--model={saved}", f"--stop_seconds={stop_seconds}", "--draft=null", "--max_context=60000")
    with started(*options) as (process, _, url), ThreadPoolExecutor() as pool:
        whole = pool.submit(ask, url, prompt="return a", max_tokens=50_000)
        body = json.dumps({"prompt": "return a", "max_tokens": 50_000, "stream": True}).encode()
        streamed = pool.submit(lambda: urllib.request.urlopen(f"{url}/completions", body, timeout=60).read().decode())
        wait_until_running(url, 2)
        for each in signals:
            process.send_signal(each)
            time.sleep(0.5)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            whole.result()
        last = streamed.result().split("data: ")[-1]
        assert json.loads(last)["error"]["message"] == "the server ends"
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_a_client_that_reads_nothing_does_not_hold_the_end(saved):
    body = b'{"prompt": "return a", "max_tokens": 4000, "stream": true}'
    with started(f"--model={saved}", "--stop_seconds=0", "--draft=null") as (process, _, url):
        host, port = re.search(r"//(.*):(\d+)", url).groups()
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            wait_until_running(url, 1)
            process.terminate()
            assert process.wait(30) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "70000"], "port: 70000 is not from 0 to 65535"),
        (["--max_batch_size", "0"], "max_batch_size: 0"),
        (["--max_context", "5000"], "max_context: 5000 is more than the model's context of 4096"),
        (["--exit_layer", "2"], "exit_layer: is of drafts here"),
        (["--exit_layer", "9", "--draft", "layers", "--num_speculations", "3"], "exit_layer: 9"),
        (["--draft", "telepathy"], "draft: 'telepathy'"),
        (["--draft", "ngram", "--num_speculations", "0"], "num_speculations: 0"),
        (["--host", "x" * 300], "host: 'xxx"),
        (["--allowed_hosts", "[http://my.host]"], "allowed_hosts: 'http://my.host'"),
        (["--api_key", "é"], "api_key: has characters"),
        (["--host", "no.such.host.example"], "host: 'no.such.host.example' is no address"),
        (["--api_key", ""], "api_key: is empty"),
    ],
)
def test_bad_options_are_one_sentence(saved, options, said, capsys):
    assert main(["serve", "--model", str(saved), "--port", "0", *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_port_in_use_is_told_before_the_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", "no/such/model", "--port", port]) == 2
    assert f"port: cannot listen at port {port} of 127.0.0.1" in capsys.readouterr().err


def test_packages_that_are_missing_are_named(monkeypatch, capsys):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert main(["serve", "--model", "no/such/model"]) == 2
    assert "pip install uvicorn" in capsys.readouterr().err


def test_endpoints_are_models_of_their_own(saved):
    """One with a tuned task drafts as that says, another leaves the model early, and both are of one loaded model."""
    found = {"exit_layer": 1, "num_speculations": 3, "draft": "layers", "draft_weights": None, "exit_adapter": None}
    (saved / "tuned.json").write_text(json.dumps({"Code": {**found, "device": "cpu"}}))
    names = [f"plain={saved}", f"code={saved}:Code", f"quick={saved}:exit_layer=1"]
    with started("--endpoint", *names, "--draft=null", "--device=cpu") as (process, first, url):
        said = [first, *(process.stdout.readline() for _ in names[1:])]
        assert [re.match(r"serving (\w+) at", line)[1] for line in said] == ["plain", "code", "quick"], said
        plain, code, quick = (ask(url, model=name, max_tokens=20) for name in ("plain", "code", "quick"))
    drafted = [sum(answer["usage"]["completion_tokens_details"].values()) for answer in (plain, code, quick)]
    assert drafted[0] == drafted[2] == 0 < drafted[1]
    generator = load_generator(str(saved), device="cpu")
    for answer, settings in ((plain, {}), (code, {}), (quick, {"exit_layer": 1})):
        wanted = generator.generate("def add", chat=False, max_new_tokens=20, **settings)
        assert answer["choices"][0]["text"] == wanted.text


@pytest.mark.parametrize(
    ("endpoints", "said"),
    [
        (["smollm2"], "endpoint: 'smollm2' is not NAME=MODEL, NAME=MODEL:TASK or NAME=MODEL:exit_layer=8"),
        (["=smollm2"], "endpoint: '=smollm2' is not NAME=MODEL"),
        (["a="], "endpoint: 'a=' is not NAME=MODEL"),
        (["a={saved}:"], ":' is not NAME=MODEL"),
        (["a={saved}", "a={saved}"], "endpoint: 'a' is given twice"),
        (["a={saved}:Nothing"], ":Nothing': task: 'Nothing' is not tuned for"),
        (["a={saved}:exit_layer=x"], "exit_layer: 'x' is not a whole number"),
        (["a={saved}:exit_layer=0"], "exit_layer: 0"),
        (["a={saved}:exit_layer=99"], "exit_layer: 99"),
        (["a=no/such/model"], "no/such/model"),
        (["a={saved}", "--name=b"], "name: does not go with endpoint"),
        (["a={saved}", "--model={saved}"], "is not served beside endpoint"),
    ],
)
def test_endpoints_that_cannot_be_are_one_sentence(saved, endpoints, said, capsys):
    assert main(["serve", "--port=0", "--endpoint", *(each.format(saved=saved) for each in endpoints)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
