"""Tokens of a conversation by the tokenizer's chat template, and which of them the assistant wrote."""

import re
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lskip.data.text_tokens import cut_text, encode_plain
from lskip.models.encoding import TEMPLATE_SECONDS
from lskip.utils.untrusted import time_limit

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\b")
# Two contents that differ in every character: two renderings differ exactly where the content stands.
PROBES = ("qjxzqjxzqj", "WVKYWVKYWV")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # fields for an assistant's reasoning
STAND_IN = 0x100000  # first of the private characters that replace special tokens spelled in a message


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError when `tokenizer` cannot render messages."""
    if not tokenizer.chat_template:
        example = "--data.tokenizer smollm2"
        raise ValueError(f"tokenizer: has no chat template, which 'messages' need; name an instruct model's: {example}")
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise ValueError(f"tokenizer: has several chat templates ({names}), and none of them is named 'default'")
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: 'messages' need a fast tokenizer, not {type(tokenizer).__name__}")


def conversation_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict],
    tools: list[dict] | None = None,
    place: str = "a conversation",
    special: re.Pattern | None = None,
    limit: int | None = None,
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and which are scored: each assistant turn with its end marker.

    A template with generation markers tells what the assistant wrote. For any other the turns are found by rendering
    the conversation up to each of them. A special token spelled in a message is plain text.

    Args:
        place: of the conversation in its source, for error messages.
        special: matches the tokenizer's special tokens.
        limit: tokens beyond this many may be left out.
    """
    if not any(message["role"] == "assistant" for message in messages):
        return [], []
    spelled: list[str] = []
    plain = (with_stand_ins(each, special, spelled) for each in (messages, tools))
    chat = Chat(tokenizer, *plain, place, special)
    text, spans = chat.marked() if GENERATION_MARKER.search(chat.template) else chat.found()
    return encode_spans(tokenizer, text, spans, spelled, limit)


@dataclass
class Chat:
    """A conversation, and the template that renders it.

    Raises:
        ValueError: the template refuses the conversation, has no tools, or hides where the assistant's turns are.
    """

    tokenizer: PreTrainedTokenizerBase
    messages: list[dict]
    tools: list[dict] | None
    place: str
    special: re.Pattern | None

    def __post_init__(self):
        self.template = self.tokenizer.get_chat_template(tools=self.tools)
        if self.tools and "tools" not in self.template:
            raise ValueError(f"source: {self.place}: has 'tools', which the tokenizer's chat template does not write")

    def marked(self) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the spans between the template's generation markers."""
        return self._rendered(self.messages, marks=True)

    def found(self) -> tuple[str, list[tuple[int, int]]]:
        """Return the text, and the span of each assistant turn without its header."""
        text = self._text(self.messages)
        turns = [turn for turn, message in enumerate(self.messages) if message["role"] == "assistant"]
        return text, [self._span(turn, text) for turn in turns]

    def _span(self, turn: int, text: str) -> tuple[int, int]:
        through = self._text(self.messages[: turn + 1])
        if not text.startswith(through):
            return self._span_of_rewritten(turn, text, through)
        content = self.messages[turn]["content"].strip()
        # Before the first turn nothing is rendered: templates may insert a system prompt of their own.
        before = self._text(self.messages[:turn], prompt=True) if turn else None
        if before is not None and not through.startswith(before):
            before = None
        if before is None or not self._begins(turn, through[len(before) :]):
            around = self._around(turn, self.messages[: turn + 1])
            if around is not None and stands_between(*around, through, content):
                before = around[0]
            elif before is None or (around is None and content and not self.messages[turn].get("tool_calls")):
                raise self._hidden(f"its chat template changes what is said (message {turn})")
        return len(before), len(before) + marker_end(through[len(before) :], content)

    def _begins(self, turn: int, written: str) -> bool:
        """Return whether `written`, after a generation prompt, begins with the message's content or reasoning."""
        message = self.messages[turn]
        thoughts = [message[name].strip() for name in THOUGHTS if isinstance(message.get(name), str)]
        words = message["content"].strip()
        return bool(words and written.lstrip().startswith(words)) or any(
            thought and thought in written for thought in thoughts
        )

    def _span_of_rewritten(self, turn: int, text: str, through: str) -> tuple[int, int]:
        """Return the span of a turn that is rendered differently before later turns, if content and end marker stay.

        Qwen 3 begins only the last turn with an empty thought, and drops the thoughts of earlier ones; Phi-3 ends the
        last one with one more token.
        """
        rewritten = self._hidden(f"its chat template rewrites earlier turns (message {turn})")
        content = self.messages[turn]["content"].strip()
        around, alone = (self._around(turn, messages) for messages in (self.messages, self.messages[: turn + 1]))
        if around is None or alone is None or not stands_between(*around, text, content):
            raise rewritten
        start = end = len(around[0])
        behind = through[len(alone[0]) :]  # without content, tool calls may be rendered differently
        if content:
            end, behind = len(text) - len(around[1]), alone[1]
        length = common_marks(text[end:], behind, self.special)
        marker, rest = text[end : end + length], behind[length:]
        marker = marker.rstrip() or marker  # in a template of lines the marker is a line break
        if not marker or (self.special.sub("", rest) if self.special else rest).strip():
            raise rewritten
        return start, end + len(marker)

    def _around(self, turn: int, messages: list[dict]) -> tuple[str, str] | None:
        """Return the text before and after the content of a turn; None: the content is not rendered."""
        first, second = (
            self._text([*messages[:turn], {**messages[turn], "content": words}, *messages[turn + 1 :]])
            for words in PROBES
        )
        start = common(first, second)
        if first == second:
            return None
        return first[:start], first[len(first) - common(first[start:][::-1], second[start:][::-1]) :]

    def _text(self, messages: list[dict], prompt: bool = False) -> str:
        return self._rendered(messages, prompt)[0]

    def _rendered(self, messages: list[dict], prompt: bool = False, marks: bool = False) -> tuple[str, list]:
        try:
            with time_limit(TEMPLATE_SECONDS, f"it does not end within {TEMPLATE_SECONDS} s"):
                texts, spans = render_jinja_template(
                    [messages],
                    tools=self.tools,
                    chat_template=self.template,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=prompt,
                    **self.tokenizer.special_tokens_map,
                )
        except Exception as error:  # a template can raise anything
            reason = str(error) or type(error).__name__
            raise ValueError(f"source: {self.place}: the chat template refuses a conversation: {reason}") from error
        return texts[0], spans[0] if marks else []

    def _hidden(self, reason: str) -> ValueError:
        return ValueError(
            f"tokenizer: {reason}, so that the assistant's words cannot be told from the rest ({self.place}); "
            "give it {% generation %} markers"
        )


def common(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def stands_between(head: str, tail: str, text: str, content: str) -> bool:
    """Return whether `text` is `head`, nothing but a part of `content`, and a text as long as `tail`."""
    end = len(text) - len(tail)
    return text.startswith(head) and (not content or (len(head) <= end and text[len(head) : end].strip() in content))


def common_marks(a: str, b: str, special: re.Pattern | None) -> int:
    """Return the length of the common prefix of two texts that does not end inside a special token."""
    length = common(a, b)
    for mark in chain.from_iterable(special.finditer(text) for text in (a, b) if special):
        if mark.start() < length < mark.end():
            length = mark.start()
    return length


def marker_end(turn: str, content: str) -> int:
    """Return where a turn that begins with `content` ends: after its end marker, without trailing blanks."""
    words = turn.index(content) + len(content) if content in turn else 0
    marker = turn[words:]
    return words + len(marker.rstrip()) if marker.strip() else len(turn)


def with_stand_ins(value, special: re.Pattern | None, spelled: list[str]):
    """Return `value` with a private character for each special token spelled in it; `spelled` collects them."""

    def stand_in(match: re.Match) -> str:
        if match[0] not in spelled:
            spelled.append(match[0])
        return chr(STAND_IN + spelled.index(match[0]))

    if isinstance(value, str):
        return special.sub(stand_in, value) if special else value
    if isinstance(value, list):
        return [with_stand_ins(each, special, spelled) for each in value]
    if isinstance(value, dict):
        return {name: with_stand_ins(each, special, spelled) for name, each in value.items()}
    return value


def encode_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]], spelled: list[str], limit: int | None
) -> tuple[list[int], list[bool]]:
    """Return the tokens of `text`, and which of them overlap a span."""
    ids, scored, begin = [], [], 0
    stand_in = re.compile(f"([{chr(STAND_IN)}-{chr(STAND_IN + len(spelled))}])")
    for part in stand_in.split(text):
        if stand_in.fullmatch(part) and ord(part) - STAND_IN < len(spelled):
            (more,) = encode_plain(tokenizer, [spelled[ord(part) - STAND_IN]])
            ids += more
            scored += in_spans([(begin, begin + 1)] * len(more), spans)
            begin += 1
            continue
        for piece, _ in cut_text(tokenizer, part):
            begin = text.index(piece, begin)
            encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids += encoded["input_ids"]
            scored += in_spans([(begin + a, begin + b) for a, b in encoded["offset_mapping"]], spans)
            begin += len(piece)
            if limit is not None and len(ids) >= limit:
                return ids, scored
    return ids, scored


def in_spans(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """Return which tokens overlap a span, for ordered tokens and spans."""
    found, place = [], 0
    for a, b in offsets:
        while place < len(spans) and spans[place][1] <= a:
            place += 1
        found.append(place < len(spans) and (b > spans[place][0] or (a == b == spans[place][0])))
    return found
