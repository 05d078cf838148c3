"""`lskip chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from queue import Queue

from lskip.cli.generate import check_adapter_is_used, check_exit_layer, write_text
from lskip.inference import GenerationSettings, TextGenerator
from lskip.inference.generation import TextStream
from lskip.inference.options import DecodingOptions, LoadingOptions
from lskip.inference.settings import AUTO
from lskip.serving.engine import Engine, News
from lskip.serving.lanes import Lane, prepare_request
from lskip.serving.options import MOST_CONTEXT
from lskip.utils.untrusted import printable
from lskip.utils.user_errors import one_line

HELP = """/draft off, /draft on    whether anything drafts; the text stays the same
/exit_layer 8, /exit_layer off    no draft from a deeper exit
/system TEXT    another system message, and a new conversation
/new    a new conversation
/quit    or Ctrl-D; Ctrl-C stops an answer"""


def chat(decoding: DecodingOptions, loading: LoadingOptions, system: str | None = None) -> None:
    """Talk with a model: lines of standard input are messages, its answers come as they are made.

    What was said before is not run again. Lines that begin with / are commands; /help lists them.

    Args:
        decoding: how answers are continued. Where nothing here says what drafts, it is as by draft auto.
        loading: which model.
        system: a system message; null: none, or the one of the model's chat template.
    """
    if system == "":
        raise ValueError("system: is empty; leave it out, or give a message")
    decoding = with_drafts(decoding)
    loading = loading.for_draft(decoding.draft)
    settings = decoding.settings()
    check_exit_layer(decoding, loading)
    generator = loading.load()
    check_adapter_is_used(decoding, loading, generator)
    if generator.tokenizer is None or generator.tokenizer.chat_template is None:
        raise ValueError(f"model: {loading.model!r} has no chat template; use lskip generate")
    with suppress(ImportError):  # not everywhere: lines can be edited, and called again
        import readline  # noqa: F401
    talk = Conversation(generator, generator.settings(**settings), system)
    try:
        for line in lines():
            if line.startswith("/"):
                if line.strip() == "/quit":
                    break
                print(printable(talk.command(line)), file=sys.stderr)
            elif line.strip():
                talk.answer(line)
    finally:
        talk.engine.close()


def with_drafts(decoding: DecodingOptions) -> DecodingOptions:
    """Return the options with draft auto, where they say nothing of drafts or exits."""
    said = (decoding.draft, decoding.draft_policy, decoding.exit_layer, decoding.exit_criterion)
    silent = decoding.num_speculations is None and all(each is None for each in said)
    return replace(decoding, draft=AUTO) if silent else decoding


def lines() -> Iterator[str]:
    """Yield lines of standard input until its end; Ctrl-C gives up a line.

    Raises:
        ValueError: it holds no text, or cannot be read.
    """
    while sys.stdin is not None:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except (UnicodeDecodeError, OSError) as error:
            raise ValueError(f"standard input: cannot be read as UTF-8 text ({one_line(error)})") from error
        except KeyboardInterrupt:
            print(file=sys.stderr)


class Conversation:
    """Messages so far, and the engine that answers them.

    Attributes:
        most_drafted, deepest_draft: of its requests; None: no bound.
    """

    def __init__(self, generator: TextGenerator, settings: GenerationSettings, system: str | None):
        self.generator, self.settings = generator, settings
        self.most_drafted: int | None = None
        self.deepest_draft: int | None = None
        self.lane = Lane(generator, settings, 1, min(generator.context_length, MOST_CONTEXT))
        # One may wait: an answer that was stopped leaves its slot before the next round.
        self.engine = Engine([self.lane], 1)
        self.engine.start()
        self.begin(system)

    def begin(self, system: str | None) -> None:
        """Forget what was said."""
        self.system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def command(self, line: str) -> str:
        """Do what a line that begins with / says, and return what to tell of it."""
        name, _, value = line[1:].strip().partition(" ")
        value = value.strip()
        if name == "new":
            self.begin(self.system)
            return "a new conversation"
        if name == "system":
            self.begin(value or None)
            return "a new conversation with this system message" if value else "a new conversation"
        if name == "draft" and value in ("on", "off"):
            self.most_drafted = None if value == "on" else 0
            return f"drafts are {value}"
        if name == "exit_layer" and value == "off":
            self.deepest_draft = None
            return "exit_layer: off"
        if name == "exit_layer":
            layers = {str(layer): layer for layer in range(1, self.generator.num_layers + 1)}
            self.deepest_draft = layers.get(value, self.deepest_draft)
            return f"exit_layer: {value}" if value in layers else f"exit_layer: is off, or from 1 to {len(layers)}"
        return HELP if name == "help" else f"{line.strip()}: is no command; these are:\n{HELP}"

    def answer(self, text: str) -> None:
        """Write the answer to a message as it comes, and what it took on standard error; Ctrl-C stops it."""
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            request = prepare_request(self.lane, messages, self.settings)
        except ValueError as error:  # too long by now: the conversation goes on
            print(error, file=sys.stderr)
            return
        request.most_drafted, request.deepest_draft = self.most_drafted, self.deepest_draft
        news: Queue[News] = Queue()
        (ticket,) = self.engine.submit(self.lane, [request], lambda _, each: news.put(each))
        said = ""
        try:
            for piece in TextStream(self.generator.tokenizer, _rounds(news), request.generation):
                said += piece
                write_text(piece)
        except KeyboardInterrupt:
            self.engine.cancel(ticket)
        print()
        self.messages = [*messages, {"role": "assistant", "content": said}]
        done = request.generation
        rate = "" if done.acceptance_rate is None else f", acceptance_rate {done.acceptance_rate:.2f}"
        print(f"[{len(done.token_ids)} tokens, {done.tokens_per_second:.1f} tokens/s{rate}]", file=sys.stderr)


def _rounds(news: Queue[News]) -> Iterator[list[int]]:
    """Yield the tokens of each round of an answer, to its end; ValueError where it fails."""
    ended = False
    while not ended:
        each = news.get()
        if each.error is not None:
            raise ValueError(str(each.error)) from each.error
        yield each.tokens
        ended = each.finish_reason is not None
