"""Scoring of conversations: the assistant's turns and their end markers, by any chat template."""

import json

import pytest
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lskip.data.encoders import ChatEncoder
from tests.data.test_datamodule import data_maker, made

KIND = "K13 which tokens of a chat are scored"
MARKS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|end|>"]

PROMPT = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant"
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + PROMPT
    + "<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}<s>[INST] {{ (system if loop.first else '') + m.content.strip() }}"
    " [/INST]"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "<s>{% for m in messages %}<|im_start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    + PROMPT
    + "<|im_start|>assistant<|end|>\n\n{% endif %}"
)
GEMMA = (
    "<s>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<|end|>\n{% endfor %}" + PROMPT + "<|im_start|>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}" + PROMPT + "<|assistant|>\n{% endif %}"
)
# The last turn begins with an empty thought, the prompt does not.
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT + "<|im_start|>assistant\n{% endif %}"
)
THINKS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
VICUNA = (
    "A chat. {% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
    "</s>{% endif %}{% endfor %}" + PROMPT + "ASSISTANT: {% endif %}"
)
# The thought is empty in the last turn alone, and what is said before a later question is without its own.
QWEN_3_LATER = (
    "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% set words = m.content %}"
    "{% set thought = m.reasoning_content or '' %}{% if '</think>' in words %}"
    "{% set thought = words.split('</think>')[0].split('<think>')[1].strip('\n') %}"
    "{% set words = words.split('</think>')[1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.asked and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ words }}"
    "{% for call in m.tool_calls or [] %}{{ '\n' if words else '' }}<call>{{ call | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}" + PROMPT + "<|im_start|>assistant\n{% endif %}"
)
# A token more ends the conversation.
PHI_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    + PROMPT
    + "<|im_start|>assistant\n{% else %}</s>{% endif %}"
)
# name -> (template, what ends a turn)
TEMPLATES = {
    "Qwen 3, later turns": (QWEN_3_LATER, "<|im_end|>"),
    "Phi-3": (PHI_3, "<|end|>"),
    "ChatML": (CHATML, "<|im_end|>"),
    "Llama 2": (LLAMA_2, " </s>"),
    "Llama 3": (LLAMA_3, "<|eot|>"),
    "Gemma": (GEMMA, "<|end|>"),
    "Mistral": (MISTRAL, "</s>"),
    "Zephyr": (ZEPHYR, "</s>"),
    "Qwen 3": (QWEN_3, "<|im_end|>"),
    "F50 prompt that begins to think": (THINKS, "<|im_end|>"),
    "Vicuna": (VICUNA, "</s>"),
}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


CONVERSATIONS = {
    "one turn": [user("hi"), assistant("Hello there")],
    "two turns": [user("hi"), assistant("yo"), user("and?"), assistant("no\nmore")],
    "F48 assistant first": [assistant("Welcome!")],
    "assistant first, then more": [assistant("Welcome!"), user("hi"), assistant("yo")],
    "system prompt": [{"role": "system", "content": "Be brief"}, user("hi"), assistant("yo")],
    "two assistant turns": [user("hi"), assistant("one"), assistant("two")],
    "the words of the header": [user("assistant"), assistant("assistant")],
    "the words of the marker": [user("im_end"), assistant("im_end|>")],
    "as the user said": [user("yes"), assistant("yes"), user("yes"), assistant("yes")],
    "blanks around": [user(" hi "), assistant("yo")],
    "nothing said": [user("hi"), assistant("")],
    "emoji and accents": [user("\u00e9"), assistant("\U0001f30d\U0001f30d \u4f60\u597d")],
    "ends with the user": [user("hi"), assistant("yo"), user("bye")],
}


@pytest.fixture(scope="module")
def byte_level():
    """Return a tokenizer with a token for each byte, and the marks of every template above."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={character: place for place, character in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    return bpe


def tokenizer_of(byte_level, template) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def scored(tokenizer, messages: list[dict], tools=None, size: int = 600) -> str:
    """Return the scored tokens of a conversation as text."""
    stored = {"messages": messages, "tools": tools} if tools else messages
    row = made(ChatEncoder(tokenizer), {"messages": [json.dumps(stored)]}, size)
    return tokenizer.decode([int(label) for label in row["labels"][0] if label != -100]) if row["labels"] else ""


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_assistants_words_and_what_ends_them(byte_level, name, case):
    template, end = TEMPLATES[name]
    messages = CONVERSATIONS[case]
    tokenizer = tokenizer_of(byte_level, template)
    if name == "Gemma" and case == "system prompt":
        with pytest.raises(ValueError, match=r"a conversation: the chat template refuses .*System role not supported"):
            scored(tokenizer, messages)
        return
    words = [message["content"] for message in messages if message["role"] == "assistant"]
    found = scored(tokenizer, messages)
    found = found.removesuffix("\n</s>")  # of Phi-3
    # Llama 2 and Mistral write a space between prompt and answer, which the model has to write too.
    assert found.replace(" ", "") == "".join(word + end for word in words).replace(" ", "")
    assert all(word in found for word in words)


@pytest.mark.kind(KIND, "F48")
def test_the_greeting_of_smollm2s_own_template():
    from lskip.models.pretrained import load_tokenizer

    assert scored(load_tokenizer("smollm2"), [assistant("Welcome!")]) == "Welcome!<|im_end|>"


@pytest.mark.kind(KIND)
def test_the_first_word_behind_a_space_of_the_prompt(tiny_tokenizer):
    """A token that begins with the prompt's last space holds the assistant's first letters: it is scored."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    tokenizer.chat_template = VICUNA.replace("</s>", "<|endoftext|>")
    assert " r" in [tokenizer.decode(place) for place in range(len(tokenizer))]  # of " return"
    assert scored(tokenizer, [user("hi"), assistant("return")]).strip() == "return<|endoftext|>"


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    ("message", "expected"),
    [
        pytest.param(assistant("<think>\nwell\n</think>\n\nyo"), "<think>\nwell\n</think>\n\nyo", id="in the words"),
        pytest.param(assistant("yo", reasoning_content="well"), "yo", id="in a field that is not written"),
    ],
)
def test_thoughts(byte_level, message, expected):
    assert scored(tokenizer_of(byte_level, CHATML), [user("hi"), message]) == expected + "<|im_end|>"


# What a template writes otherwise once others follow: the thought of the last turn, and the end of the whole.
LAST_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% for call in m.tool_calls or [] %}\n<call>{{ call | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    + PROMPT
    + "<|im_start|>assistant\n{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    + PROMPT
    + "<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
BY_LINES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    + PROMPT
    + "assistant: {% else %}{{ eos_token }}{% endif %}"
)
END = "<|im_end|>"
# template, conversation, what is scored
LAST_IS_OTHER = {
    "Phi-3": (PHI_3, "two turns", "yo<|end|>no\nmore<|end|>\n</s>"),
    "Phi-3 as the user said": (PHI_3, "as the user said", "yes<|end|>yes<|end|>\n</s>"),
    "Phi-3 words of the marker": (
        PHI_3, [user("hi"), assistant("end|>"), user("x"), assistant("d")], "end|><|end|>d<|end|>\n</s>"
    ),
    "Phi-3 assistant first": (PHI_3, "assistant first, then more", "Welcome!<|end|>yo<|end|>\n</s>"),
    "Phi-3 ends with the user": (PHI_3, "ends with the user", "yo<|end|>"),
    "Phi-3 two assistant turns": (PHI_3, "two assistant turns", "one<|end|>two<|end|>\n</s>"),
    "Qwen 3": (LAST_THINKS, "two turns", f"yo{END}no\nmore{END}"),
    "Qwen 3 ends with the user": (LAST_THINKS, "ends with the user", f"yo{END}"),
    "Qwen 3 nothing said": (LAST_THINKS, [user("a"), assistant(""), user("b"), assistant("c")], f"{END}c{END}"),
    "Qwen 3 thoughts in the words": (
        LAST_THINKS, [user("a"), assistant("<think>\nb\n</think>\n\nc"), user("d"), assistant("e")], f"c{END}e{END}"
    ),
    "Qwen 3 thoughts in a field": (
        LAST_THINKS,
        [user("a"), assistant("c", reasoning_content="b"), user("d"), assistant("f", reasoning_content="e")],
        f"c{END}<think>\ne\n</think>\n\nf{END}",
    ),
    "Qwen 3 calls": (
        LAST_THINKS,
        [user("a"), assistant("", tool_calls=[{"name": "b"}]), {"role": "tool", "content": "c"}, assistant("d")],
        f'<call>{{"name": "b"}}</call>{END}d{END}',
    ),
    "a line a turn": (BY_LINES, "two turns", "yo\nno\nmore\n</s>"),
}  # fmt: skip


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(("template", "messages", "expected"), LAST_IS_OTHER.values(), ids=list(LAST_IS_OTHER))
def test_a_template_that_writes_the_last_turn_otherwise(byte_level, template, messages, expected):
    tokenizer = tokenizer_of(byte_level, template)
    messages = CONVERSATIONS[messages] if isinstance(messages, str) else messages
    assert scored(tokenizer, messages) == expected
    # What is read is the conversation as the template writes it, for all its turns.
    ids = made(ChatEncoder(tokenizer), {"messages": [json.dumps(messages)]}, 600)["input_ids"][0].tolist()
    assert tokenizer.decode(ids).startswith(tokenizer.apply_chat_template(messages, tokenize=False))


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    ("message", "alone"),
    [
        pytest.param(assistant("<think>\nwell\n</think>\n\nyo"), "<think>\nwell\n</think>\n\nyo", id="in the words"),
        pytest.param(assistant("yo", reasoning_content="well"), "<think>\nwell\n</think>\n\nyo", id="in a field"),
        pytest.param(assistant("yo"), "yo", id="none, though an empty one is written"),
    ],
)
def test_thoughts_that_an_earlier_turn_loses(byte_level, message, alone):
    tokenizer = tokenizer_of(byte_level, QWEN_3_LATER)
    assert scored(tokenizer, [user("hi"), message]) == alone + "<|im_end|>"
    assert scored(tokenizer, [user("hi"), message, user("and?"), message]) == "yo<|im_end|>" + alone + "<|im_end|>"


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}}}}]
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT + "<|im_start|>assistant\n{% endif %}"
)
CALL = [user("2+2"), assistant("", tool_calls=[{"name": "add", "arguments": {"a": 2}}])]


@pytest.mark.kind(KIND, "F51")
def test_tools_are_written_into_the_prompt(byte_level, tmp_path, tiny_tokenizer):
    tokenizer = tokenizer_of(byte_level, WITH_TOOLS)
    expected = '<call>{"name": "add", "arguments": {"a": 2}}</call><|im_end|>'
    assert scored(tokenizer, CALL) == scored(tokenizer, CALL, TOOLS) == expected
    rows = [{"messages": [user(f"{i}"), *CALL[1:]], "tools": TOOLS if i % 2 else json.dumps(TOOLS)} for i in range(60)]
    batch = data_maker(tmp_path, tokenizer)(rows, block_size=300).blocks("train")[:]
    assert all('"name": "add"' in tokenizer.decode(ids).split("<|im_end|>")[0] for ids in batch["input_ids"])


# Llama 3.1's, Mistral's: a message that calls a tool says nothing else.
CALL_ALONE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls[0].name }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT + "<|im_start|>assistant\n{% endif %}"
)
TOOL = {"role": "tool", "content": "4"}


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("words", ["", "Let me see"])
def test_a_call_instead_of_words(byte_level, words):
    messages = [user("2+2"), {**CALL[1], "content": words}, TOOL, assistant("It is 4")]
    assert scored(tokenizer_of(byte_level, CALL_ALONE), messages) == "add<|im_end|>It is 4<|im_end|>"


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(("words", "said"), [("", "{call}"), ("Let me see", "Let me see\n{call}")])
def test_a_call_in_an_earlier_turn(byte_level, words, said):
    messages = [user("2+2"), {**CALL[1], "content": words}, TOOL, assistant("It is 4")]
    call = said.format(call='<call>{"name": "add", "arguments": {"a": 2}}</call><|im_end|>')
    assert scored(tokenizer_of(byte_level, QWEN_3_LATER), messages) == call + "It is 4<|im_end|>"


@pytest.mark.kind(KIND)
def test_a_call_that_is_written_otherwise_in_an_earlier_turn(byte_level):
    call = "{{ m.content }}{% if m.tool_calls %}[{{ 'add' if loop.last else 'add 1' }}]{% endif %}"
    tokenizer = tokenizer_of(byte_level, CHATML.replace("{{ m.content }}", call))
    with pytest.raises(ValueError, match=r"rewrites earlier turns \(message 1\)"):
        scored(tokenizer, [user("2+2"), CALL[1], TOOL, assistant("It is 4")])


@pytest.mark.kind(KIND)
def test_words_that_a_template_does_not_write(byte_level):
    template = CHATML.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}")
    with pytest.raises(ValueError, match=r"changes what is said \(message 1\)"):
        scored(tokenizer_of(byte_level, template), [user("hi"), assistant("yo")])


@pytest.mark.kind(KIND)
@pytest.mark.parametrize("content", ["", None], ids=["no words", "null beside a call"])
def test_calls_and_tools_are_written_in_the_order_of_their_keys(byte_level, tmp_path, content):
    """As they are for an answer: `apply_chat_template` writes them as they come."""
    tokenizer = tokenizer_of(byte_level, WITH_TOOLS)
    tools = [{"type": "function", "function": {"name": "add", "description": "b", "parameters": {"y": {}, "a": {}}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"y": 2, "a": {"d": 1, "c": 2}}}}
    rows = [{"messages": [user(f"{i}"), assistant("", tool_calls=[call])], "tools": tools} for i in range(3)]
    expected = {tokenizer.apply_chat_template(row["messages"], tools, tokenize=False) for row in rows}
    stored = [{**row, "messages": [row["messages"][0], {**row["messages"][1], "content": content}]} for row in rows]
    make = data_maker(tmp_path, tokenizer)
    ids = make(stored, block_size=500, val_fraction=0, test_fraction=0).blocks("train")[:]["input_ids"]
    assert {tokenizer.decode(row).replace("</s>", "") for row in ids} == expected


@pytest.mark.kind(KIND)
def test_tools_that_the_template_does_not_write(byte_level, tmp_path):
    rows = [{"messages": CALL, "tools": TOOLS}] * 3
    with pytest.raises(ValueError, match="source: line 1: has 'tools', which the tokenizer's chat template does not"):
        data_maker(tmp_path, tokenizer_of(byte_level, CHATML))(rows, val_fraction=0, test_fraction=0).blocks("train")


@pytest.mark.kind(KIND)
def test_tools_of_a_parquet(byte_level, tmp_path):
    rows = [{"messages": [user(f"{i}"), assistant("yo")], "tools": json.dumps(TOOLS)} for i in range(60)]
    Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    make = data_maker(tmp_path, tokenizer_of(byte_level, WITH_TOOLS))
    batch = make(source=str(tmp_path / "d.parquet"), block_size=300).blocks("train")[:]
    assert all('"name": "add"' in tokenizer_of(byte_level, WITH_TOOLS).decode(ids) for ids in batch["input_ids"])


MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}",
)


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    "templates",
    [
        pytest.param({"default": CHATML, "tool_use": MARKED}, id="F17 markers in another template"),
        pytest.param({"tool_use": CHATML, "default": CHATML}, id="two templates"),
        pytest.param({"default": CHATML, "rag": "{{ 1 / 0 }}"}, id="another template that fails"),
    ],
)
def test_of_several_templates_the_one_that_is_used(byte_level, templates):
    assert scored(tokenizer_of(byte_level, templates), [user("hi"), assistant("yo")]) == "yo<|im_end|>"


@pytest.mark.kind(KIND)
def test_a_conversation_without_the_assistant_is_left_out(byte_level, tmp_path):
    rows = [{"messages": [user(f"{i}"), assistant("yo")]} for i in range(30)]
    rows += [{"messages": [{"role": "system", "content": f"{i}"}]} for i in range(30)]
    data = data_maker(tmp_path, tokenizer_of(byte_level, GEMMA))(rows, block_size=64, val_fraction=0, test_fraction=0)
    with pytest.warns(UserWarning, match="30 of 60 train examples left out"):
        assert len(data.blocks("train")) == 30


@pytest.mark.kind(KIND)
@pytest.mark.parametrize(
    ("template", "words"),
    [
        pytest.param("{{ raise_exception('no') }}", "refuses a conversation: no", id="raise_exception"),
        pytest.param("{% for m in messages %", "refuses a conversation", id="syntax"),
        pytest.param("{{ messages[7].content.strip() }}", "refuses a conversation: .*no element 7", id="undefined"),
        pytest.param("{{ 1 / 0 }}", "refuses a conversation: division by zero", id="division"),
        pytest.param("{{ messages[0].content + 1 }}", "refuses a conversation: can only concatenate", id="type"),
        pytest.param("{{ messages.__class__.__mro__ }}", "refuses a conversation", id="sandbox"),
        pytest.param("{% for m in messages[-2:] %}{{ m.content }}{% endfor %}", "rewrites", id="leaves out a turn"),
        pytest.param(
            "{% for m in messages %}{{ m.content if loop.last else m.content | length }}{% endfor %}", "rewrites",
            id="rewrites",
        ),
        pytest.param({"rag": CHATML}, "none of them is named 'default'", id="no default among several"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used(byte_level, tmp_path, template, words):
    rows = [{"messages": CONVERSATIONS["two turns"]}, {"messages": CONVERSATIONS["one turn"]}]
    data = data_maker(tmp_path, tokenizer_of(byte_level, template))(rows, val_fraction=0, test_fraction=0)
    with pytest.raises(ValueError, match=words) as refused:
        data.blocks("train")
    assert "line " in str(refused.value) or "named" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.kind(KIND)
def test_a_template_that_changes_the_first_words(byte_level):
    tokenizer = tokenizer_of(byte_level, "{% for m in messages %}{{ m.content[::-1] }}</s>{% endfor %}")
    assert scored(tokenizer, [user("hi"), assistant("abc")]) == "cba</s>"  # behind the prompt: what is to be written
    with pytest.raises(ValueError, match=r"changes what is said .*cannot be told from the rest"):
        scored(tokenizer, [assistant("abc")])


@pytest.mark.kind("B38 templates and tokenizers that do not end")
@pytest.mark.parametrize(
    "template",
    [
        pytest.param("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", id="B38 loops"),
        pytest.param("{{ ('a' * 10**6) | wordwrap(1) }}", id="B38 wordwrap"),
        pytest.param("{% generation %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
                     "{% endgeneration %}", id="inside the markers"),
        pytest.param("{% set n = namespace(x='a') %}{% for a in range(99999) %}{% set n.x = n.x + 'b' * 999 %}"
                     "{% endfor %}{% for a in range(99999) %}{{ n.x | length }}{% endfor %}", id="growing text"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_end(byte_level, monkeypatch, template):
    monkeypatch.setattr("lskip.data.chat.TEMPLATE_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"refuses a conversation: it does not end within 0.2 s"):
        scored(tokenizer_of(byte_level, template), [user("hi"), assistant("yo")])


# Special tokens that a text spells

SPECIAL = "K15 special tokens around and inside text"


@pytest.mark.kind(SPECIAL)
@pytest.mark.parametrize("template", [CHATML, MARKED, ZEPHYR], ids=["ChatML", "with markers", "Zephyr"])
@pytest.mark.parametrize("said", ["<|im_end|>", "a <|im_start|>system\nb</s> c", "</s></s>"])
def test_marks_that_a_message_spells_are_text(byte_level, template, said):
    tokenizer = tokenizer_of(byte_level, template)
    end = "</s>" if template == ZEPHYR else "<|im_end|>"
    for messages in ([user(said), assistant("yo")], [user("hi"), assistant(said)]):
        ids = made(ChatEncoder(tokenizer), {"messages": [json.dumps(messages)]}, 600)["input_ids"][0].tolist()
        assert tokenizer.decode(ids).startswith(tokenizer.apply_chat_template(messages, tokenize=False))
        # The marks are those of a conversation that spells none, and then the padding.
        plain = tokenizer.apply_chat_template([user("x"), assistant("y")])["input_ids"]
        expected = [place for place in plain if place >= 256]
        marks = [place for place in ids if place >= 256]
        assert marks[: len(expected)] == expected and set(marks[len(expected) :]) <= {tokenizer.eos_token_id}
    assert scored(tokenizer, [user("hi"), assistant(said)]) == said + end
