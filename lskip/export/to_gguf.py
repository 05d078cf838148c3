"""Writing of Llama, Qwen2 and Qwen3 models as GGUF files for llama.cpp."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lskip.models.families import head_dim_of
from lskip.models.reading.gguf_rope import FREQUENCIES, LLAMA3, SCALED, llama3_frequencies

FAMILIES = ("llama", "qwen2", "qwen3")
# Pre-tokenizers of byte-level BPE: llama.cpp's name -> the steps in tokenizer.json.
_GPT2_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(number: str) -> list[dict]:
    pattern = {"Regex": _SPLIT.replace("NUMBER", number)}
    return [
        {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]


PRE_TOKENIZERS = {
    "gpt-2": [_GPT2_WORDS],  # also of tokenizers trained by lskip
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2_WORDS],
    "qwen2": _split(r"\p{N}"),
    "llama-bpe": _split(r"\p{N}{1,3}"),
}
# Types of rotary embeddings, with what a file says of each besides its base.
SAID = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", *LLAMA3},
}
WHOLE_WORDS = ("llama-bpe",)  # a word in the vocabulary is not split
NORMALIZED = ("qwen2",)  # to NFC, which llama.cpp leaves out: as in the files of Qwen's authors


def write_gguf(
    model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerBase | Path | None = None, name: str = ""
) -> None:
    """Write `model` to `path`, matrices in the model's dtype, norms in float32 as llama.cpp requires.

    Args:
        model: the model to write.
        path: of the file.
        tokenizer: to write into the file, or the path of a GGUF file whose tokenizer is copied; None: none is
            written, prompts and answers are then token ids.
        name: name of the model in the file.

    Raises:
        ValueError: obstacle(model.config, tokenizer) is not None.
    """
    if (reason := obstacle(model.config, tokenizer)) is not None:
        raise ValueError(f"model: cannot be written as GGUF ({reason})")
    import gguf

    writer = gguf.GGUFWriter(str(path), model.config.model_type)
    if name:
        writer.add_name(name)
    _add_sizes(writer, model.config)
    _add_rope(writer, model.config)
    _add_tokenizer(writer, tokenizer, model.config)
    file_types = gguf.LlamaFileType
    writer.add_file_type(
        {
            torch.float32: file_types.ALL_F32,
            torch.float16: file_types.MOSTLY_F16,
            torch.bfloat16: file_types.MOSTLY_BF16,
        }[model.dtype]
    )
    _add_weights(writer, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def obstacle(config, tokenizer: PreTrainedTokenizerBase | Path | None = None) -> str | None:
    """Return why a model of `config` with `tokenizer` cannot be written; None if it can."""
    if importlib.util.find_spec("gguf") is None:
        return "it needs: pip install gguf"
    if config.model_type not in FAMILIES:
        return f"its family is {config.model_type}, only {', '.join(FAMILIES)} are covered"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "its linears have a bias"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    if getattr(config, "sliding_window", None) is not None:
        return f"its attention sees {config.sliding_window} tokens"
    width = head_dim_of(config)
    if config.model_type == "qwen2" and width * config.num_attention_heads != config.hidden_size:
        return f"its heads are {width} wide, which llama.cpp does not read of a qwen2"
    if (reason := _rope_obstacle(config, width)) is not None:
        return reason
    return _tokenizer_obstacle(tokenizer, config) if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def _rope_obstacle(config: PreTrainedConfig, head_dim: int) -> str | None:
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind not in SAID:
        return f"its rotary embedding is of type {kind}"
    if kind == "llama3" and config.model_type != "llama":
        return f"its rotary embedding is scaled as Llama 3's, which llama.cpp does not read of a {config.model_type}"
    if kind == "llama3" and llama3_frequencies(rope["rope_theta"], head_dim, rope["factor"]).max() < rope["factor"]:
        return "its rotary embedding has no wave that is stretched by its factor, by which a file says it"
    if kind == "llama3" and any(rope[name] != value for name, value in LLAMA3.items()):
        return "its rotary embedding is scaled by other numbers than Llama 3's"
    if more := sorted(
        name for name in rope.keys() - SAID[kind] - {"rope_type", "rope_theta"} if rope[name] is not None
    ):
        return f"its rotary embedding has {more[0]}, which a file cannot say"
    return None


def _tokenizer_obstacle(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> str | None:
    rules = _rules(tokenizer)
    if rules is None or rules["model"]["type"] != "BPE" or rules["model"].get("byte_fallback"):
        return "its tokenizer is no byte-level BPE"
    name = _pre_tokenizer(rules)
    normalized = rules["normalizer"] not in (None, {"type": "NFC"} if name in NORMALIZED else None)
    if name is None or normalized or bool(rules["model"].get("ignore_merges")) != (name in WHOLE_WORDS):
        return f"its tokenizer cuts text in another way than {' and '.join(PRE_TOKENIZERS)}"
    if tokenizer.eos_token_id is None:
        return "its tokenizer has no end-of-text token"
    if len(tokenizer) > config.vocab_size:
        return f"its tokenizer has {len(tokenizer)} entries, the model {config.vocab_size}"
    return None


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict | None:
    """Return the content of tokenizer.json; None for a slow tokenizer."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else None


def _pre_tokenizer(rules: dict) -> str | None:
    """Return llama.cpp's name of the pre-tokenizer; None if it is not supported."""
    cut = rules["pre_tokenizer"] or {}
    steps = cut.get("pretokenizers", [cut])
    # trim_offsets changes offsets only, not tokens.
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    return next((name for name, known in PRE_TOKENIZERS.items() if known == steps), None)


def _add_sizes(writer, config: PreTrainedConfig) -> None:
    """Write the hyperparameters."""
    head_dim = head_dim_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_rope(writer, config: PreTrainedConfig) -> None:
    """Write how the rotary embedding is scaled."""
    import gguf

    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind in SCALED:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "llama3":
        frequencies = llama3_frequencies(rope["rope_theta"], head_dim_of(config), rope["factor"])
        writer.add_tensor(FREQUENCIES, frequencies)


def _add_tokenizer(writer, tokenizer: PreTrainedTokenizerBase | Path | None, config: PreTrainedConfig) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    elif isinstance(tokenizer, Path):
        _copy_tokenizer(writer, tokenizer)
    else:
        _add_byte_level_bpe(writer, tokenizer, config)


def _copy_tokenizer(writer, path: Path) -> None:
    from gguf import GGUFReader, GGUFValueType

    for key, field in GGUFReader(path).fields.items():
        if key.startswith("tokenizer."):
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub_type)


def _add_byte_level_bpe(writer, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    rules = _rules(tokenizer)
    tokens, kinds = _entries(tokenizer, config.vocab_size)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for any byte-level BPE
    writer.add_tokenizer_pre(_pre_tokenizer(rules))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in rules["model"]["merges"]])
    # Without one llama.cpp would use GPT-2's beginning-of-text token.
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
    ids = {"bos": bos, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    for kind, token in ids.items():
        if token is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    text = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(text[0] == bos)
    writer.add_add_eos_token(text[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _entries(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> tuple[list[str], list[int]]:
    """Return texts and types of the model's tokens; ids beyond the tokenizer are unused."""
    from gguf import TokenType

    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    for token, index in tokenizer.get_vocab().items():
        tokens[index], kinds[index] = token, TokenType.NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        kinds[index] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return tokens, kinds


def _add_weights(writer, model: PreTrainedModel) -> None:
    import gguf

    kinds = gguf.GGMLQuantizationType
    matrices = {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}[model.dtype]
    family = gguf.MODEL_ARCH[model.config.model_type.upper()]
    names = gguf.get_tensor_name_map(family, model.config.num_hidden_layers)
    for name, weight in model.named_parameters():  # a tied head is left out, in GGUF too
        kind = matrices if weight.ndim == 2 else kinds.F32
        array = gguf.quants.quantize(_array(name, weight, model.config), kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), array, raw_dtype=kind)


def _array(name: str, weight: Tensor, config: PreTrainedConfig) -> np.ndarray:
    """Return a weight in float32, a Llama's rows of q and k in the order of llama.cpp's rotary embedding."""
    array = weight.detach().float().cpu().numpy()
    if config.model_type != "llama":  # llama.cpp rotates these by halves, as transformers does
        return array
    if "q_proj" in name:
        return rotary_pairs(array, config.num_attention_heads)
    return rotary_pairs(array, config.num_key_value_heads) if "k_proj" in name else array


def rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return [heads head_dim, in] with the rows of each head reordered from two halves to interleaved pairs.

    RoPE rotates rows i and i + head_dim / 2 of a head in transformers, rows 2 i and 2 i + 1 in llama.cpp.
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
