"""Checks and corrections around transformers' reading of a GGUF file.

transformers ignores metadata and tensors that it does not know, so that the model may differ from the one that
llama.cpp runs without a word. Here small differences are corrected, and all others are refused by name.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import decoders, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lskip.models.families import head_dim_of
from lskip.models.reading.config import without_memory
from lskip.models.reading.config_values import MAX_LAYERS
from lskip.models.reading.gguf_rope import FREQUENCIES, SCALED, scaling_of
from lskip.models.reading.weights_report import first_of

MARK = "\u2581"  # a space in sentencepiece's tokens
logger = logging.getLogger(__name__)

# Read by llama.cpp and by transformers, of a family that lskip supports.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt2")
# Pre-tokenizers before byte-level BPE, by llama.cpp's names (llm_tokenizer_bpe in llama-vocab.cpp).
# DIGITS splits numbers into digits, then does as GPT-2.
DIGITS = {"smollm", "refact", "starcoder", "command-r", "codeshell", "exaone", "minerva-7b"}
_GPT2 = {"gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "mpt", "olmo", "jais", "trillion"}
_LLAMA3 = {"llama3", "llama-v3", "llama-bpe", "falcon3"}  # a word in the vocabulary is not split; texts begin with BOS
_REGEXES = {"dbrx", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "gpt-4o", "llama4"}  # known to transformers
# Tokenizer metadata that transformers or lskip reads, or that changes no tokens.
_TOKENIZER_FACTS = {
    *("ggml.model", "ggml.pre", "ggml.tokens", "ggml.scores", "ggml.token_type", "ggml.merges", "chat_template"),
    *("ggml.bos_token_id", "ggml.eos_token_id", "ggml.unknown_token_id", "ggml.padding_token_id"),
    *("ggml.add_bos_token", "ggml.add_eos_token", "ggml.add_space_prefix", "ggml.eot_token_id", "ggml.eom_token_id"),
    *("ggml.cls_token_id", "ggml.mask_token_id", "ggml.seperator_token_id", "ggml.token_type_count"),
    *("ggml.fim_pre_token_id", "ggml.fim_suf_token_id", "ggml.fim_mid_token_id", "ggml.fim_pad_token_id"),
    *("ggml.fim_rep_token_id", "ggml.fim_sep_token_id", "ggml.prefix_token_id", "ggml.suffix_token_id"),
    *("ggml.middle_token_id", "huggingface.json"),
}
_ONLY = {"ggml.add_sep_token": False}  # facts of the tokenizer that are not read, with the value that changes no tokens


@dataclass(frozen=True)
class Facts:
    """Metadata and tensor sizes of a GGUF file.

    Attributes:
        place: the file, for messages.
        values: metadata key -> value; for a list of more than 1,000 entries, its length.
        tensors: name -> number of elements.
        frequencies: the numbers of tensor gguf_rope.FREQUENCIES; None: there is none.
    """

    place: str
    values: Mapping[str, Any]
    tensors: Mapping[str, int]
    frequencies: np.ndarray | None = None

    @property
    def architecture(self) -> str:
        return self.values["general.architecture"]

    def refuse(self, key: str, reason: str) -> ValueError:
        """Return the error that names a metadata key, its value and the reason to refuse it."""
        return ValueError(f"model: {self.place!r} says {key} = {self.values.get(key)!r:.60}, {reason}")


@contextmanager
def parsed_once() -> Iterator[None]:
    """Parse a GGUF file once inside this context.

    transformers parses it anew for the config, the weights and the tokenizer, and derives the names of all tensors anew
    for every module: seconds each time. Its progress bar is hidden too, and the file is sliced as a plain array: a
    vocabulary is a million slices, each of which takes a memmap three times as long.

    Raises:
        ValueError: package gguf or accelerate is missing.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"model: to read GGUF, run: pip install {' '.join(missing)}")
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    class PlainReader(gguf.GGUFReader):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    bar = reading.tqdm
    try:
        gguf.GGUFReader = functools.cache(PlainReader)
        gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
        reading.tqdm = lambda tensors, **_: tensors
        yield
    finally:
        reading.tqdm = bar
        for name, original in slow.items():
            setattr(gguf, name, original)


def read_facts(path: str) -> Facts:
    """Return the metadata of a GGUF file; raise what package gguf raises for a file that it cannot parse."""
    import gguf

    reader = gguf.GGUFReader(path)
    values = {
        key: field.contents() if len(field.data) <= 1000 else len(field.data) for key, field in reader.fields.items()
    }
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    own = (np.array(tensor.data) for tensor in reader.tensors if tensor.name == FREQUENCIES)
    return Facts(path, values, sizes, next(own, None))


def check_facts(facts: Facts) -> None:
    """Raise ValueError for a file that transformers would read as another model, as far as metadata alone show it."""
    architecture = facts.values.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"model: {facts.place!r} is of architecture {architecture!r}; allowed: {', '.join(ARCHITECTURES)}"
        )
    if facts.values.get("general.type", "model") != "model":
        raise facts.refuse("general.type", "not model")
    if facts.values.get("split.count", 1) > 1:
        raise facts.refuse("split.count", "and is one part of several: join them first (llama-gguf-split --merge)")
    # Before a config is made of these: 0 would be divided by, and a list is made of all layers.
    for name, most in (("block_count", MAX_LAYERS), ("embedding_length", 2**31), ("attention.head_count", 2**31)):
        size = facts.values.get(f"{architecture}.{name}")
        if not isinstance(size, int) or not 1 <= size <= most:
            raise facts.refuse(f"{architecture}.{name}", f"not a whole number from 1 to {most}")
    _check_tokenizer(facts)


def _check_tokenizer(facts: Facts) -> None:
    values = facts.values
    kind, pre_tokenizer = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if kind not in ("gpt2", "llama", "no_vocab", "none", None):
        raise facts.refuse("tokenizer.ggml.model", "which lskip does not read; allowed: gpt2, llama")
    if kind == "gpt2" and pre_tokenizer is None:
        logger.warning(
            "model: %r does not say how its text is cut into words: as GPT-2 does it is a guess", facts.place
        )
    elif kind == "gpt2" and pre_tokenizer not in DIGITS | _GPT2 | _LLAMA3 | _REGEXES:
        raise facts.refuse("tokenizer.ggml.pre", "a way to cut text into words that lskip does not know")
    for key in values:
        name = key.removeprefix("tokenizer.")
        if name != key and name not in _TOKENIZER_FACTS and values[key] != _ONLY.get(name):
            raise facts.refuse(key, "which lskip does not read")


def correct_config(config: PreTrainedConfig, facts: Facts) -> None:
    """Set in `config` what transformers left out of the file.

    Raises:
        ValueError: the file says something that no model of this config does.
    """
    values, architecture = facts.values, facts.architecture
    width = values.get(f"{architecture}.attention.key_length")
    if width is not None and (hasattr(config, "head_dim") or width * config.num_attention_heads != config.hidden_size):
        config.head_dim = width
    if config.model_type == "mistral":
        config.sliding_window = None  # a Llama named Mistral; llama.cpp knows no window
    if architecture == "phi3":
        config.sliding_window = values.get("phi3.attention.sliding_window")
    if hasattr(config, "query_pre_attn_scalar"):  # as llama.cpp, which tells the one exception by its layers
        is_27b = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[architecture]
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    _set_scaling(config, facts)
    stands_for = _stands_for(config)
    for key, value in values.items():
        if not key.startswith(f"{architecture}."):
            continue
        name = key.removeprefix(f"{architecture}.")
        if name not in stands_for:
            raise facts.refuse(key, "which lskip does not read")
        if (meant := stands_for[name]) is not ANY and not _same(value, meant):
            raise facts.refuse(key, f"which lskip does not read: the model would have {meant!r}")


def _set_scaling(config: PreTrainedConfig, facts: Facts) -> None:
    """Set how the rotary embedding is scaled."""
    if rope := _rope(config):
        rope |= scaling_of(facts.values, facts.architecture, facts.frequencies, rope["rope_theta"], head_dim_of(config))


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the config's own `rope_parameters`, in Gemma 3 those of full attention, which llama.cpp scales."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


ANY = object()  # any value: the key changes nothing


def _stands_for(config: PreTrainedConfig) -> dict[str, Any]:
    """Return, for each metadata key of an architecture, its value in a model of this config (or ANY)."""

    def get(name: str, default: Any = None) -> Any:
        return getattr(config, name, default)

    rope = _rope(config)
    width = head_dim_of(config)
    return {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": get("intermediate_size") or get("n_inner") or 4 * config.hidden_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": get("num_key_value_heads") or config.num_attention_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": get("rms_norm_eps"),
        "attention.layer_norm_epsilon": get("layer_norm_epsilon"),
        "attention.sliding_window": get("sliding_window"),
        "attention.causal": True,
        "attention.clamp_kqv": 0.0,
        "attention.max_alibi_bias": 0.0,
        "attn_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1.0)),
        "rope.scaling.type": rope["rope_type"] if rope.get("rope_type") in SCALED else "none",
        "rope.scaling.factor": rope["factor"] if rope.get("rope_type") in SCALED else 1.0,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.original_context_length": ANY,
        "rope.scaling.finetuned": ANY,
        "expert_count": 0,
        "expert_used_count": 0,
        "tensor_data_layout": ANY,
    }


def _same(value: Any, meant: Any) -> bool:
    if isinstance(value, float) and isinstance(meant, int | float):
        return math.isclose(value, meant, rel_tol=1e-6)  # the file stores float32
    return value == meant


def check_tensors(config: PreTrainedConfig, facts: Facts) -> None:
    """Raise ValueError unless the file's tensors are the model's, by name and size; transformers does not compare."""
    import gguf

    model = without_memory(config)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == facts.architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    own = {names.get_name(name, (".weight", ".bias")): part.numel() for name, part in model.named_parameters()}
    if _rope(config).get("rope_type") == "llama3":
        own[FREQUENCIES] = facts.tensors[FREQUENCIES]
    if more := sorted(facts.tensors.keys() - own.keys()):
        raise ValueError(f"model: {facts.place!r} holds tensor {first_of(more)}, which lskip does not read")
    if fewer := sorted(own.keys() - facts.tensors.keys()):
        raise ValueError(f"model: {facts.place!r} lacks tensor {first_of(fewer)}")
    for name, size in facts.tensors.items():
        if size != own[name]:
            raise ValueError(f"model: {name} in {facts.place!r} has {size} numbers, its sizes ask for {own[name]}")


def correct_tokenizer(tokenizer: PreTrainedTokenizerBase, facts: Facts) -> None:
    """Correct `tokenizer`, where transformers ignores the file, so that it tokenizes as llama.cpp does."""
    pre_tokenizer = facts.values.get("tokenizer.ggml.pre")
    if facts.values.get("tokenizer.ggml.model") == "llama":
        _correct_spaces(tokenizer, facts.values.get("tokenizer.ggml.add_space_prefix", True))
    if facts.values.get("tokenizer.ggml.model") != "gpt2":
        return
    if pre_tokenizer in DIGITS:  # transformers pre-tokenizes as GPT-2: "x  3" would become other tokens
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)
    if pre_tokenizer in _LLAMA3 | {"tekken"}:
        tokenizer.backend_tokenizer.model.ignore_merges = True
        if tokenizer.bos_token is not None and "tokenizer.ggml.add_bos_token" not in facts.values:
            tokenizer.add_bos_token = True


def _correct_spaces(tokenizer: PreTrainedTokenizerBase, prefix: bool) -> None:
    """Mark spaces as sentencepiece does: one more before each text, even one that begins with a space; or none.

    transformers adds one where there is none yet, whatever the file says.
    """
    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Replace(" ", MARK)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), *steps] if prefix else steps)
    backend.pre_tokenizer = None
    parts = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)


def end_tokens(facts: Facts) -> list[int]:
    """Return the tokens that end a text, a turn or a message by the file's metadata."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [facts.values.get(f"tokenizer.ggml.{key}") for key in keys]
    return list(dict.fromkeys(token for token in found if token is not None))
