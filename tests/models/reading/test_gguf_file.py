"""Metadata and tensors of GGUF files: the model has them, or the file is refused by the name of one that it lacks.

The ways to cut text into words are those of llama.cpp's llama-vocab.cpp, written again here as regular expressions.
"""

import logging
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from lskip.export.to_gguf import write_gguf
from lskip.models.pretrained import load_config, load_model, load_tokenizer
from tests.conftest import make_config, make_model
from tests.export.test_to_gguf import TEXTS, byte_level, smollm_words

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

K2 = "K2 what a GGUF file says and the reader drops"
IDS = torch.tensor([[5, 9, 77, 123, 44, 2, 9, 5, 31]])


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return a function (tensors, **keys; None: left out) -> path of a GGUF file."""

    def write(tensors=None, tokenizer=True, model=None, **keys):
        add_key, add_tensor = gguf.GGUFWriter.add_key_value, gguf.GGUFWriter.add_tensor
        left_out = {key for key, value in keys.items() if value is None}
        left_out |= {key for key, value in (tensors or {}).items() if value is None}

        def keep_key(self, key, *rest, **more):
            if key not in keys:
                add_key(self, key, *rest, **more)

        def keep_tensor(self, name, *rest, **more):
            if name not in (tensors or {}):
                add_tensor(self, name, *rest, **more)

        def close_with_more(self):
            for key, value in keys.items():
                if key not in left_out:
                    add_key(self, key, value, gguf.GGUFValueType.get_type(value))
            for name, value in (tensors or {}).items():
                if name not in left_out:
                    add_tensor(self, name, value)
            header(self)

        header = gguf.GGUFWriter.write_header_to_file
        monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", keep_key)
        monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", keep_tensor)
        monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", close_with_more)
        source = byte_level(bos_token="<|begin|>") if tokenizer is True else tokenizer
        write_gguf(model or make_model(vocab_size=340), tmp_path / "a.gguf", source or None)
        monkeypatch.undo()
        return str(tmp_path / "a.gguf")

    return write


ONES = np.ones
YARN = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
# tensors, keys -> words of the sentence
REFUSED = {
    "F4 rope_freqs": ({"rope_freqs.weight": 2 * ONES(4, np.float32)}, {}, "holds tensor 'rope_freqs.weight'"),
    "no rope_freqs": ({"rope_freqs.weight": ONES(0, np.float32)}, {}, "holds tensor 'rope_freqs.weight'"),
    "F8 deepseek-coder": ({}, {"tokenizer.ggml.pre": "deepseek-coder"}, "tokenizer.ggml.pre = 'deepseek-coder'"),
    "bias": ({"blk.0.attn_q.bias": ONES(32, np.float32)}, {}, "holds tensor 'blk.0.attn_q.bias'"),
    "norm of the queries": ({"blk.1.attn_q_norm.weight": ONES(8, np.float32)}, {}, "'blk.1.attn_q_norm.weight'"),
    "layer too many": ({"blk.4.attn_norm.weight": ONES(32, np.float32)}, {}, "holds tensor 'blk.4.attn_norm.weight'"),
    "norm that lacks": ({"blk.2.ffn_norm.weight": None}, {}, "lacks tensor 'blk.2.ffn_norm.weight'"),
    "embedding that lacks": ({"token_embd.weight": None}, {}, "lacks tensor 'token_embd.weight'"),
    "shape": ({"output_norm.weight": ONES(16, np.float32)}, {}, "output_norm.weight in"),
    "block_count of more": ({}, {"llama.block_count": 5}, "lacks tensor 'blk.4."),
    "block_count of fewer": ({}, {"llama.block_count": 3}, "holds tensor 'blk.3."),
    "block_count of a billion": ({}, {"llama.block_count": 10**9}, "llama.block_count = 1000000000"),
    "linear scaling by nothing": ({}, {"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type = 'linear'"),
    "yarn of no length": ({}, YARN, "rope.scaling"),
    "yarn of a word": (
        {}, {**YARN, "llama.rope.scaling.original_context_length": "32"}, "llama.rope.scaling.type = 'yarn'"
    ),
    "longrope": ({}, {"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type = 'longrope'"),
    "a separator": ({}, {"tokenizer.ggml.add_sep_token": True}, "tokenizer.ggml.add_sep_token = True"),
    "factor alone": ({}, {"llama.rope.scaling.factor": 8.0}, "llama.rope.scaling.factor = 8.0"),
    "old key of a factor": ({}, {"llama.rope.scale_linear": 4.0}, "llama.rope.scale_linear = 4.0"),
    "experts": ({}, {"llama.expert_count": 8}, "llama.expert_count = 8"),
    "window": ({}, {"llama.attention.sliding_window": 16}, "llama.attention.sliding_window = 16"),
    "attention scale": ({}, {"llama.attention.scale": 0.5}, "llama.attention.scale = 0.5"),
    "logit scale": ({}, {"llama.logit_scale": 0.5}, "llama.logit_scale = 0.5"),
    "soft cap": ({}, {"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping = 30.0"),
    "partial rotary": ({}, {"llama.rope.dimension_count": 4}, "llama.rope.dimension_count = 4"),
    "unknown fact": ({}, {"llama.attention.of_tomorrow": 1}, "llama.attention.of_tomorrow = 1"),
    "unknown words": ({}, {"tokenizer.ggml.pre": "of-tomorrow"}, "tokenizer.ggml.pre = 'of-tomorrow'"),
    "llama.cpp's default": ({}, {"tokenizer.ggml.pre": "default"}, "tokenizer.ggml.pre = 'default'"),
    "unknown tokenizer": ({}, {"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model = 'rwkv'"),
    "tokenizer's fact": ({}, {"tokenizer.ggml.of_tomorrow": True}, "tokenizer.ggml.of_tomorrow = True"),
    "architecture": ({}, {"general.architecture": "mamba"}, "of architecture 'mamba'; allowed: llama"),
    "adapter": ({}, {"general.type": "adapter"}, "general.type = 'adapter'"),
    "part": ({}, {"split.count": 3}, "split.count = 3"),
    "heads": ({}, {"llama.attention.head_count": 0}, "llama.attention.head_count = 0"),
}  # fmt: skip


@pytest.mark.kind(K2)
@pytest.mark.parametrize(("tensors", "keys", "words"), REFUSED.values(), ids=list(REFUSED))
def test_what_would_be_dropped_is_refused_by_its_name(written, tensors, keys, words):
    path = written(tensors, **keys)
    with pytest.raises(ValueError, match=r"^model: ") as caught:
        load_model(path)
    assert words in str(caught.value) and path in str(caught.value)
    assert "\n" not in str(caught.value)


# Facts that say what is so anyway, as converters write them.
NEUTRAL = {
    "no scaling": {"llama.rope.scaling.type": "none"},
    "no separator": {"tokenizer.ggml.add_sep_token": False},
    "no experts": {"llama.expert_count": 0, "llama.expert_used_count": 0},
    "causal": {"llama.attention.causal": True},
    "descriptions": {"general.license": "mit", "general.quantized_by": "x", "quantize.imatrix.file": "y"},
    "ids for filling in": {"tokenizer.ggml.fim_pre_token_id": 5},
    "no vocab_size": {"llama.vocab_size": None},
}


@pytest.mark.kind(K2)
@pytest.mark.parametrize("keys", NEUTRAL.values(), ids=list(NEUTRAL))
def test_what_changes_nothing_loads(written, keys):
    model, _ = load_model(written(**keys))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, make_model(vocab_size=340)(IDS).logits)


WORD = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA_CPP = {
    "gpt-2": [WORD],
    "mpt": [WORD],
    "F7 refact": [r"\p{N}", WORD],
    "F8 command-r": [r"\p{N}", WORD],
    "F8 starcoder": [r"\p{N}", WORD],
    "codeshell": [r"\p{N}", WORD],
    "smollm": [r"\p{N}", WORD],
    "llama-bpe": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


@pytest.mark.kind(K2)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", list(LLAMA_CPP))
def test_text_is_cut_as_llama_cpp_cuts_it(written, name, family):
    """By what the file says of it, whatever the family: transformers has a tokenizer class for Qwen2's models alone."""
    steps = [pre_tokenizers.Split(Regex(each), "isolated") for each in LLAMA_CPP[name]]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    kind = name.rpartition(" ")[2]
    model = make_model(family, vocab_size=340, head_dim=8)
    loaded = load_tokenizer(written(model=model, **{"tokenizer.ggml.pre": kind}))
    expected = byte_level(bos_token="<|begin|>")
    expected.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    expected.backend_tokenizer.model.ignore_merges = kind == "llama-bpe"
    for text in [*TEXTS, "x  3", "  12345 ab", "½ ٣٤ Ⅷ"]:
        assert loaded(text, add_special_tokens=False)["input_ids"] == expected(text)["input_ids"], text


@pytest.mark.kind(K2)
@pytest.mark.parametrize(
    ("keys", "begins", "ends"),
    [
        ({"tokenizer.ggml.add_bos_token": True}, True, False),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, True, True),
        ({"tokenizer.ggml.add_bos_token": None}, False, False),
        # llama.cpp begins the texts of these with a token unless the file says that they do not
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": None}, True, False),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False, False),
    ],
)
def test_where_a_text_begins_and_ends(written, keys, begins, ends):
    tokenizer = load_tokenizer(written(**keys))
    ids = tokenizer("def f")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id) == (begins, ends)


BYTES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES = [*"▁abcde12", "▁a", "ab", "▁ab", "bc", "abc", "de", "▁d", "cd", "▁▁", "ea", "12"]
SCORES = dict(zip(PIECES, np.random.default_rng(0).permutation(len(PIECES)) - len(PIECES), strict=True))


def by_scores(text: str, prefix: bool) -> list[str]:
    """llama.cpp's llm_tokenizer_spm: neighbours are joined, the best score first; what is no piece becomes bytes."""
    parts = list(("▁" if prefix and text else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(SCORES.get(a + b, -999), -at) for at, (a, b) in enumerate(pairwise(parts))]
        score, at = max(pairs, default=(-999, 0))
        if score == -999:
            break
        parts[-at : 2 - at] = ["".join(parts[-at : 2 - at])]
    return [piece for part in parts for piece in ([part] if part in SCORES else byte_names(part))]


def byte_names(part: str) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in part.encode()]


@pytest.mark.kind(K2)
@pytest.mark.parametrize(
    ("keys", "begins", "prefix"),
    [
        pytest.param({}, True, True, id="as llama.cpp takes it where nothing is said"),
        pytest.param({"tokenizer.ggml.add_space_prefix": True}, True, True, id="space before a text"),
        pytest.param({"tokenizer.ggml.add_space_prefix": False}, True, False, id="no space before a text"),
        pytest.param({"tokenizer.ggml.add_bos_token": False}, False, True, id="no token before a text"),
    ],
)
def test_spaces_of_sentencepiece(written, keys, begins, prefix):
    vocabulary = [*BYTES, *PIECES]
    own = {
        "model": "llama",
        "tokens": vocabulary,
        "scores": [*[0.0] * len(BYTES), *(float(SCORES[piece]) for piece in PIECES)],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(PIECES)],
        **{"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    }
    keys = {**{f"tokenizer.ggml.{name}": value for name, value in own.items()}, **keys}
    tokenizer = load_tokenizer(written(tokenizer=None, model=make_model(vocab_size=len(vocabulary)), **keys))
    for text in ["abc", "a b", " a", "  ab", "   ", "ab  cd ", "é a", "1 12", "", "a\nb", " eab de abcd", "bcd\n ab"]:
        expected = ["<s>"] * begins + by_scores(text, prefix)
        assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == expected, text
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.kind(K2)
def test_what_lies_beside_a_file_changes_nothing(written):
    path = Path(written())
    model, alone = load_model(str(path))
    others = byte_level(smollm_words(), bos_token="<|other|>")
    others.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    others.save_pretrained(path.parent)
    make_model().save_pretrained(path.parent)
    (path.parent / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": true, "eos_token_id": 5}')
    again, tokenizer = load_model(str(path))
    for each in (tokenizer, load_tokenizer(str(path))):
        assert (each.bos_token, each.eos_token, each.chat_template) == ("<|begin|>", "<|endoftext|>", None)
        assert each.name_or_path == str(path)
        for text in TEXTS:
            assert each(text)["input_ids"] == alone(text)["input_ids"]
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.kind(K2)
def test_every_end_that_the_file_names_ends_a_text(written):
    model, _ = load_model(written(**{"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9}))
    assert model.generation_config.eos_token_id == [0, 7, 9]


@pytest.mark.kind(K2)
def test_words_that_are_not_said_are_a_guess(written, caplog):
    with caplog.at_level(logging.WARNING, "lskip.models.reading.gguf_file"):
        load_tokenizer(written(**{"tokenizer.ggml.pre": None}))
    assert "is cut into words" in caplog.text


@pytest.mark.kind(K2)
def test_a_file_without_a_tokenizer(written):
    assert load_model(written(tokenizer=None))[1] is None


@pytest.mark.kind(K2)
@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, 0.99])
def test_a_cut_file(written, keep):
    path = written()
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    for load in (load_model, load_config):
        with pytest.raises(ValueError, match=r"^model: .*a\.gguf"):
            load(path)


# As llama.cpp's converter writes them: keys beside the common ones, by family.
KEYS = {
    "qwen2": {},
    "qwen3": {"attention.key_length": "head_dim"},
    "phi3": {"attention.sliding_window": "sliding_window", "rope.dimension_count": "head_dim"},
    "gemma2": {
        "attention.key_length": "head_dim",
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": {"attention.key_length": "head_dim", "attention.sliding_window": "sliding_window"},
}
COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}


def model_of(family, **overrides):
    given = {"head_dim": 8, "hidden_size": 32, "tie_word_embeddings": family.startswith("gemma")}
    given |= {"sliding_window": 6} if family in ("phi3", "gemma2", "gemma3") else {}
    given |= {"num_hidden_layers": 6} if family == "gemma3" else {}  # the sixth sees all
    given |= {"vocab_size": 32064} if family == "phi3" else {}  # its config class has token 32000
    given |= overrides
    given |= {"query_pre_attn_scalar": given["head_dim"]} if family.startswith("gemma") else {}
    config = AutoConfig.for_model(**make_config("gemma3_text" if family == "gemma3" else family, **given))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for part in model.parameters():
        if part.ndim == 1:
            part.data += 0.3 * torch.randn_like(part)
    return model


# Of types that the package gguf reads and does not write: bytes of a block of 256 numbers, those of its scales.
BLOCKS = {"Q4_K": (144, slice(0, 4)), "Q6_K": (210, slice(208, 210))}


def quantized(array, kind):
    """Return a matrix in a type, or one of its size in random bytes, with small scales."""
    if kind.name not in BLOCKS:
        return gguf.quants.quantize(array, kind)
    size, scales = BLOCKS[kind.name]
    blocks = np.random.default_rng(0).integers(0, 256, (array.size // 256, size), dtype=np.uint8)
    blocks[:, scales] = np.full((scales.stop - scales.start) // 2, 1e-4, np.float16).view(np.uint8)
    return blocks.reshape(len(array), -1)


def write_as_converted(path, family, model, kind=None, more=()):
    """Write a file tensor by tensor, as llama.cpp's converter does it; `kind`: what matrices are quantized to."""
    writer, config = gguf.GGUFWriter(str(path), family), model.config
    for key, name in (COMMON | KEYS[family]).items():
        value = getattr(config, name)
        writer.add_key_value(f"{family}.{key}", value, gguf.GGUFValueType.get_type(value))
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    for key, value in more:
        writer.add_key_value(f"{family}.{key}", value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    for name, part in model.named_parameters():
        array = part.detach().numpy()
        if family.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if kind is not None and part.ndim == 2:
            data = quantized(array, kind)
            part.data = torch.from_numpy(gguf.quants.dequantize(data, kind).copy())
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
        else:
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.kind(K2)
@pytest.mark.parametrize("family", list(KEYS))
def test_other_architectures_are_the_model_they_were_made_from(tmp_path, family):
    """Biases of Qwen2, norms and widths of Qwen3, windows of Phi-3 and Gemma, soft caps of Gemma 2, in a text longer
    than a window."""
    model = model_of(family)
    write_as_converted(tmp_path / "a.gguf", family, model)
    loaded, _ = load_model(str(tmp_path / "a.gguf"))
    ids = torch.randint(3, 300, (1, 24))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.kind(K2)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0", "Q4_K", "Q6_K"])
def test_quantized_files_are_the_numbers_that_they_hold(tmp_path, family, kind):
    """By the package gguf's own reading of each type."""
    kind = gguf.GGMLQuantizationType[kind]
    model = model_of(family, hidden_size=256, intermediate_size=256, head_dim=64)
    write_as_converted(tmp_path / "a.gguf", family, model, kind)
    loaded, _ = load_model(str(tmp_path / "a.gguf"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.kind(K2)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_scaled_rotary_embedding_is_read(tmp_path, family, kind):
    scaling = {"rope_type": kind, "factor": 4.0} | ({"original_max_position_embeddings": 32} if kind == "yarn" else {})
    rope = {**scaling, "rope_theta": 1e4}
    if family == "gemma3":  # of full attention alone, as llama.cpp has it
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    model = model_of(family, rope_parameters=rope, max_position_embeddings=128)
    more = [("rope.scaling.type", kind), ("rope.scaling.factor", 4.0)]
    more += [("rope.scaling.original_context_length", 32)] if kind == "yarn" else []
    write_as_converted(tmp_path / "a.gguf", family, model, more=more)
    loaded, _ = load_model(str(tmp_path / "a.gguf"))
    ids = torch.randint(3, 300, (1, 100))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_helpers_of_these_tests_write_what_lskip_writes(written):
    with torch.no_grad():
        loaded = load_model(written())[0]
        assert torch.equal(loaded(IDS).logits, make_model(vocab_size=340)(IDS).logits)
