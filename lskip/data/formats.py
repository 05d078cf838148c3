"""Supported sets of columns, and their conversion to texts, pairs or conversations."""

import json
from collections.abc import Iterable

from lskip.data.corpora import PLACE

COLUMNS = {"chat": ("messages",), "pairs": ("prompt", "completion"), "text": ("text",)}
# Of ShareGPT and of Alpaca, used where none of the above are present.
OTHERS = {"chat": ("conversations",), "pairs": ("instruction", "output")}
# "from" of ShareGPT -> "role"
ROLES = {
    **{name: "user" for name in ("human", "user")},
    **{name: "assistant" for name in ("gpt", "assistant", "chatgpt", "bing", "bard")},
    **{name: "tool" for name in ("tool", "observation", "function_response")},
    "system": "system",
}
UNSCORED = {"weight": 0, "loss": False, "train": False}  # fields that exclude a turn from training (OpenAI, Axolotl)
# As in Stanford Alpaca's train.py (https://github.com/tatsu-lab/stanford_alpaca); the output follows at once.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:"
)


def record_kind(columns: Iterable[str], text_column: str | None, source: str) -> str:
    """Return "chat", "pairs" or "text" by the columns of the source; with a `text_column`, "text".

    Raises:
        ValueError: none of the supported sets of columns is present.
    """
    columns = [name for name in columns if name != PLACE]
    if text_column is None:
        check_answers(columns, source)
    if text_column is not None and text_column in columns:
        return "text"
    if text_column is None:
        for kind, needed in [*COLUMNS.items(), *OTHERS.items()]:
            if set(needed) <= set(columns):
                return kind
    wanted = f"the text_column '{text_column}'" if text_column else "text, or prompt and completion, or messages"
    likely = "content" if "content" in columns else columns[0] if len(columns) == 1 else None
    advice = f"; its text may be --data.text_column {likely}" if likely and not text_column else ""
    raise ValueError(f"source: '{source}' has the columns {columns}; needed: {wanted}{advice}")


def check_answers(columns: list[str], source: str) -> None:
    """Raise ValueError for answers that `lskip predict` wrote without completions: what is scored there is not said."""
    asked = "prompt" in columns or {"messages", "finish_reason"} <= set(columns)
    if asked and "text" in columns and "completion" not in columns:
        raise ValueError(
            f"source: '{source}' has prompts and text, but no completion; let predict write it (--completions true), or"
            " train on the text alone by --data.text_column text"
        )


def content_of(row: dict, kind: str, text_column: str | None, place: str) -> list:
    """Return the values of `COLUMNS[kind]` for a row; the last is None where the row has none.

    `messages` become JSON text, since the fields of messages differ between rows; a completion beside them is the
    assistant's next turn.
    """
    if kind == "text":
        return [row.get(text_column or "text")]
    if kind == "pairs":
        return list(pair_of(row, place))
    messages = row.get("messages")
    if messages is None and row.get("conversations") is not None:
        messages = messages_of(row["conversations"], place)
    if messages in (None, []):
        return [messages]
    if "completion" in row:
        if row["completion"] is None:
            return [None]
        messages = with_completion(messages, row["completion"])
    return [conversation_json(with_system(messages, row.get("system")), row.get("tools"), place)]


def with_completion(messages, completion):
    """Return messages followed by the assistant's completion."""
    return [*messages, {"role": "assistant", "content": completion}] if isinstance(messages, list) else messages


def with_system(messages, system):
    """Return messages preceded by a system prompt from its own column (LLaMA-Factory's ShareGPT)."""
    known = isinstance(messages, list) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
    if not isinstance(messages, list) or known or not isinstance(system, str) or not system.strip():
        return messages
    return [{"role": "system", "content": system}, *messages]


def pair_of(row: dict, place: str) -> tuple:
    if row.get("completion") is not None or "instruction" not in row:
        return row.get("prompt"), row.get("completion")
    for name in ("instruction", "input"):
        if not isinstance(row.get(name) or "", str):
            raise ValueError(f"source: {place}: '{name}' must be text, not {type(row[name]).__name__}")
    template = ALPACA_WITH_INPUT if row.get("input") else ALPACA
    return template.format(instruction=row["instruction"] or "", input=row.get("input")), row.get("output")


def messages_of(turns, place: str) -> list:
    """Return the messages of a ShareGPT conversation, a list of {from, value} (or of {role, content})."""
    if not isinstance(turns, list):
        return turns
    return [message_of(turn, place) if isinstance(turn, dict) and "from" in turn else turn for turn in turns]


def message_of(turn: dict, place: str) -> dict:
    if turn["from"] not in ROLES:
        raise ValueError(f"source: {place}: {turn['from']!r} in 'conversations' is not one of {', '.join(ROLES)}")
    others = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {**others, "role": ROLES[turn["from"]], "content": turn.get("value")}


def conversation_json(messages: list, tools, place: str) -> str:
    """Return the JSON of a conversation, with its tools if there are any.

    A message's keys are sorted, and null values left out. Tool calls and tools keep the order of their keys, in which
    templates render them.
    """
    if not isinstance(messages, list) or not all(is_message(message) for message in messages):
        raise ValueError(f"source: {place}: 'messages' must be a list of {{role, content}} with text in both")
    for name, none in UNSCORED.items():
        if any(message.get(name) is not None and message[name] == none for message in messages):
            raise ValueError(
                f"source: {place}: '{name}' {none!r} of a message is not read; all assistant turns are scored"
            )
    messages = [{**message, "content": message.get("content") or ""} for message in messages]
    present = [{key: value for key, value in sorted(message.items()) if value is not None} for message in messages]
    tools = tools_of(tools, place)
    return json.dumps({"messages": present, "tools": tools} if tools else present, ensure_ascii=False)


def tools_of(tools, place: str) -> list[dict] | None:
    """Return the tools of a row: a list of JSON schemas, or the JSON text of one."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"source: {place}: 'tools' is neither a list nor the JSON text of one") from error
    if not tools or tools == "":
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"source: {place}: 'tools' must be a list of objects, or the JSON text of one")
    return tools


def is_message(message) -> bool:
    """Return whether role and content are texts; with tool calls (OpenAI) the content may be missing."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str) or (
        message.get("content") is None and bool(message.get("tool_calls"))
    )
