"""Bad and good values of `lskip serve` and `lskip chat`: a server answers a client and is ended, a talk has two lines.

A server that starts would run for ever: a client in a thread waits for the line that says where it is, asks it once and
sends SIGTERM.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

from benchmarks.bad_input.fixtures import NEW_TOKENS
from benchmarks.bad_input.options import DECODING, LOADING, odd_files
from benchmarks.bad_input.terminals import ascii_terminal, full_terminal, standard
from benchmarks.bad_input.users import ANSWER, SAID, answered, client, loading, talked, typed
from benchmarks.bad_input.values import Domain, a_class, choice, text, texts, whole
from benchmarks.bad_input.verdict import Case, Right, done, either, refused

INTERRUPTED, ENDED = 130, 143  # exit codes after Ctrl-C and SIGTERM amid something
HOSTS = ("no.such.invalid", "127.0.0.1:80", "[::1]", "http://localhost", "192.0.2.1", "999.1.1.1", "🙂", "", "x" * 5000)
NAMES = ("http://my.host", "my.host:80", "my host", "my.host/", "", " ")
SERVING = {
    "host": Domain(tuple(("choice", each) for each in HOSTS), good=("localhost", "::1", "0.0.0.0")),
    "port": whole(0, 65535, good=(0,)),
    "name": text(good=("my model", "null", "🙂", "\x1b[2J", "x" * 3000)),
    "allowed_hosts": Domain(
        (*texts().bad, *(("choice", json.dumps([name])) for name in NAMES)),
        good=("[my.host]", "My.Host", "['*']", "[]", "null", "['::1']"),
    ),
    "api_key": Domain(
        tuple(("choice", key) for key in ("", " ", "🙂é", "a\nb", "\x1b[2J", "é", " key")), good=("k e y", "null", "5")
    ),
    "max_batch_size": whole(1, good=(1, 64), also=(("huge", str(10**7)), ("huge", str(10**30)))),
    "max_context": whole(2, 128, null=True, good=(32, 128, "null")),
    "max_waiting": whole(0, good=(0, 10**6)),
    "endpoint": Domain(
        tuple(
            ("choice", each) for each in ("a", "=", "a=", "=b", "a={place}/llama:", "a={place}/llama:no", "[]", "[5]")
        ),
        good=("a={place}/llama", "[a={place}/llama,b={place}/llama:exit_layer=2]"),
    ),
    "draft": choice("layers", null=True, good=("layers", "ngram")),
    "exit_layer": whole(1, 3, null=True, good=(1, 3)),
    "num_speculations": whole(1, null=True, good=(1, 3)),
    "draft_policy": a_class(good=("CostAwareDraft", "FixedDraft")),
    "stop_seconds": whole(0, good=(0, 10**5), also=(("huge", str(10**30)),)),
}
OPTIONS: dict[str, dict[str, Domain]] = {
    "serve": {**SERVING, **LOADING},
    "chat": {
        "system": text(good=("null",)),
        **DECODING,
        "num_speculations": whole(1, null=True, good=(1, 3)),
        "exit_layer": whole(1, 3, null=True, good=(1, 3)),
        "regex": replace(DECODING["regex"], good=("null",)),  # another text than transformers'
        "chat": choice("true", null=True, good=("true", "null")),  # a talk is always one
        **LOADING,
    },
}
DRAFTS = ("--device=cpu", "--draft=ngram", "--num_speculations=2", "--costs_file={here}/costs.json")
LAYERS = ("--draft=layers", "--exit_layer=2")
BASES = {
    "serve": ("--model={place}/llama", "--port=0", *DRAFTS),
    "chat": ("--model={place}/chat", f"--max_new_tokens={NEW_TOKENS}", *DRAFTS),
}
ALONE = ("--draft=null", "--num_speculations=null")
EXTRA = {  # without which an option says nothing, or does not go with the others
    "endpoint": ("--model=smollm2",),
    "draft": ("--exit_layer=2",),
    "exit_layer": LAYERS,
    "exit_criterion": ALONE,
    "draft_policy": LAYERS,
    "draft_tokens": LAYERS,
}
LATE = {*LOADING, "max_batch_size"}  # that the model's files, or memory, may have to tell


def cases(random: Random) -> Iterator[Case]:
    """Yield random bad values and good ones of every option, and what no table says."""
    for command, options in OPTIONS.items():
        for option, domain in options.items():
            more, early = EXTRA.get(option, ()), option not in LATE
            for kind, value in random.sample(domain.bad, min(3, len(domain.bad))):
                given = (*more, f"--{option}={value}")
                yield asked(command, kind, f"{option}={value[:60]!r}", *given, right=refused(option), early=early)
            for value in random.sample(domain.good, min(2, len(domain.good))):
                yield asked(command, "legal", f"{option}={value[:60]!r}", *more, f"--{option}={value}")
    yield from combinations()
    yield from models()
    yield from places()
    yield from signals()
    yield from talks()


def asked(
    command: str,
    kind: str,
    what: str,
    *arguments: str,
    right: Right | None = None,
    early: bool = False,
    prepare: Callable[[Path], object] = lambda here: None,
    around: Callable[[Path], AbstractContextManager] | None = None,
) -> Case:
    """Return the case of a command that somebody uses: a client of the server, two lines of a talk.

    Args:
        right: None: the server gave transformers' text and ended, the talk was transformers' texts.
        early: it must be refused before the model is loaded.
        around: of the command, in place of a talk's two lines or a server's client.
    """
    line = (*BASES[command], *arguments)
    key = [each.partition("=")[2] for each in line if each.startswith("--api_key=")]
    uses = {"serve": lambda here: client(here, key[-1] if key else None), "chat": lambda here: typed(f"{SAID}\n")}

    @contextmanager
    def used(here: Path) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context((around or uses[command])(here))
            if early:
                stack.enter_context(loading(lambda: AssertionError("the model is loaded before this is refused")))
            yield

    def everything(here: Path) -> None:
        odd_files(here)
        prepare(here)

    right = right or {"serve": done(answered), "chat": done(talked)}[command]
    return Case(command, kind, what, line, right, everything, used, (ANSWER, "costs.json", "model"))


# What no table says.


def combinations() -> Iterator[Case]:
    """Yield options that are good by themselves, but not together."""
    auto = ("--draft=auto", "--num_speculations=null")
    both = {
        "nothing to draft with ngram": (("--draft=ngram", "--num_speculations=null"), "num_speculations"),
        "zero to draft with ngram": (("--num_speculations=0",), "num_speculations"),
        "zero to draft with auto": (("--draft=auto", "--num_speculations=0"), "num_speculations"),
        "layers without an exit": (("--draft=layers",), "exit_layer"),
        "layers to the last one": (("--draft=layers", "--exit_layer=4"), "exit_layer"),
        "a policy of nothing": ((*ALONE, "--draft_policy=FixedDraft"), "num_speculations"),
        "auto with a policy that does not choose": ((*auto, "--draft_policy=FixedDraft"), "draft"),
    }
    for command in OPTIONS:
        for what, (given, named) in both.items():
            yield asked(command, "combination", what, *given, right=refused(named), early=True)
        for draft, named in {"weights": "draft_weights", "adapter": "exit_adapter"}.items():
            yield asked(
                command, "combination", f"{draft} that are not loaded", f"--draft={draft}", right=refused(named)
            )
        yield asked(command, "legal", "auto", *auto)
        yield asked(command, "legal", "no drafts", *ALONE)
    yield asked("serve", "combination", "an exit without drafts", *ALONE, "--exit_layer=2", right=refused("exit_layer"))
    criterion = ("--exit_criterion=Entropy", "--exit_criterion.threshold=1")
    yield asked(
        "chat", "combination", "drafts and a criterion", *criterion, right=refused("exit_criterion"), early=True
    )
    longest = ("--model={place}/none", "--max_context=5")
    yield asked("serve", "missing", "the model of another option", *longest, right=refused("model"))


def models() -> Iterator[Case]:
    """Yield models without what a server or a talk needs, and of other kinds of files."""

    def without_tokenizer(here: Path) -> None:
        for path in (here / "model").glob("*token*"):
            path.unlink()

    for command, lacks in {"serve": "tokenizer", "chat": "tokenizer|chat template"}.items():
        model = ("--model={here}/model",)
        yield asked(
            command,
            "model",
            "no tokenizer",
            *model,
            right=refused("model", lacks),
            prepare=without_tokenizer,
        )
        empty = lambda here: shutil.rmtree(here / "model") or (here / "model").mkdir()  # noqa: E731
        yield asked(command, "model", "an empty folder", *model, right=refused("model"), prepare=empty)
    for name in ("llama", "run", "gpt2", "model.gguf"):
        no_template = refused("model", "chat template")
        yield asked("chat", "model", f"{name}: no chat template", f"--model={{place}}/{name}", right=no_template)
    spoken = done(lambda seen: None if "choices" in (seen.here / ANSWER).read_text() else "no answer")
    for name in ("run", "gpt2", "exported", "model.gguf", "chat"):
        yield asked("serve", "legal", name, f"--model={{place}}/{name}", right=spoken)


def places() -> Iterator[Case]:
    """Yield ports that cannot be listened at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    taken = lambda here: socket.create_server(("127.0.0.1", port))  # noqa: E731
    named = refused("port", str(port))
    yield asked("serve", "place", "a port in use", f"--port={port}", right=named, early=True, around=taken)
    everywhere = ("--host=0.0.0.0", f"--port={port}")
    yield asked("serve", "place", "a port in use, everywhere", *everywhere, right=named, early=True, around=taken)
    free_to_all = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 80
    if os.geteuid() != 0 and not free_to_all:
        yield asked("serve", "place", "a port of root", "--port=80", right=refused("port"), early=True)


def signals() -> Iterator[Case]:
    """Yield signals while the model is loaded."""
    for command in OPTIONS:
        for signum, code in {signal.SIGINT: INTERRUPTED, signal.SIGTERM: ENDED}.items():
            sends = lambda here, signum=signum: loading(lambda: os.kill(os.getpid(), signum))  # noqa: E731
            yield asked(command, "signal", f"{signum.name} while loading", right=done(code=code), around=sends)


def talks() -> Iterator[Case]:
    """Yield odd standard inputs and outputs of a talk."""
    nothing = done(lambda seen: f"said {seen.out!r}" if seen.out else None)
    one = done(lambda seen: None if seen.err.count("tokens/s") == 1 else f"not one answer: {seen.err!r}")
    told = done(lambda seen: None if "Traceback" not in seen.err and seen.err.strip() else "nothing is told")
    lines = {
        "nothing": ("", nothing),
        "blank lines": ("\n \n\t\n", nothing),
        "no end of line": ("def", one),
        "quit": ("/quit\ndef\n", nothing),
        "a lone carriage return": ("def\r\n", one),
        "a NUL": ("a\0b\n", one),
        "unknown commands": ("/\n//\n/nope\n/draft\n/draft maybe\n/exit_layer\n/help\n", told),
        "an exit that is none": ("/exit_layer ²\n/exit_layer -1\n/exit_layer 1.5\n", told),
        "exit 0": ("/exit_layer 0\n", told),
        "an exit of 5000 digits": (f"/exit_layer {'9' * 5000}\n", told),
        "an exit beyond the model": ("/exit_layer 99\ndef\n", one),
        "too long": ("x" * 10**6 + "\ndef\n", one),
        "not UTF-8": (b"\xff\xfe\n", either(refused("standard input|stdin|UTF-8"), one)),
    }
    for what, (said, right) in lines.items():
        yield asked("chat", "lines", what, right=right, around=lambda here, said=said: typed(said))
    escape = done(lambda seen: "it is printed as it is" if "\x1b" in seen.err else None)
    yield asked("chat", "lines", "escapes", right=escape, around=lambda here: typed("/\x1b[2J\n"))
    closed = lambda here: standard("stdin", lambda: None)  # noqa: E731
    yield asked("chat", "terminal", "no stdin", right=either(nothing, refused("stdin|standard input")), around=closed)
    folder = lambda here: standard("stdin", lambda: open(os.devnull, "w"))  # noqa: E731, SIM115
    yield asked("chat", "terminal", "a stdin to write", right=refused("stdin|standard input"), around=folder)
    outputs = {
        "ASCII": (ascii_terminal, one),
        "no stdout": (lambda: None, one),
        "full stdout": (full_terminal, refused("No space|space left|output|stdout")),
    }
    for what, (make, right) in outputs.items():

        @contextmanager
        def around(here: Path, make=make) -> Iterator[None]:
            with typed("é🙂\n"), standard("stdout", make):
                yield

        yield asked("chat", "terminal", what, right=right, around=around)
        if what != "full stdout":
            continue
        yield asked("serve", "terminal", what, right=right, around=lambda here: standard("stdout", full_terminal))
