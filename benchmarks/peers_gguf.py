"""A Llama as a GGUF file, so that llama.cpp decodes the same weights.

No tokenizer goes into it: prompts and answers are token ids.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # a block's parts in transformers -> in GGUF


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Writes `model` to `path` in float32.

    Raises:
        ValueError: obstacle(model.config) is not None.
    """
    import gguf

    if (reason := obstacle(model.config)) is not None:
        raise ValueError(f"model: cannot be written as GGUF ({reason})")
    writer = gguf.GGUFWriter(str(path), "llama")
    add_sizes(writer, model.config)
    for name, weight in model.named_parameters():  # a tied head is no parameter of its own, and GGUF leaves it out too
        writer.add_tensor(gguf_name(name), gguf_weight(name, weight, model.config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def obstacle(config) -> str | None:
    """Why this file cannot write a model of `config`; None when it can."""
    if not isinstance(config, LlamaConfig):
        return f"its family is {config.model_type}, only llama is covered"
    if config.attention_bias or config.mlp_bias:
        return "its linears have a bias"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    kind = config.rope_parameters["rope_type"]
    return None if kind == "default" else f"its rotary embedding is of type {kind}"


def add_sizes(writer, config: LlamaConfig) -> None:
    """What llama.cpp must know before it reads a weight."""
    head_dim = config.head_dim
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
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
    writer.add_file_type(0)  # all float32


def gguf_name(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    outside = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outside:
        return outside[name]
    _, _, index, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{index}.{PARTS[part]}.weight"


def gguf_weight(name: str, weight: Tensor, config: LlamaConfig) -> np.ndarray:
    """float32, q and k in the order that llama.cpp's rotary embedding expects."""
    array = weight.detach().float().cpu().numpy()
    if "q_proj" in name:
        return rotary_pairs(array, config.num_attention_heads)
    return rotary_pairs(array, config.num_key_value_heads) if "k_proj" in name else array


def rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads head_dim, in] with each head's rows reordered from [first half, second half] to interleaved pairs.

    transformers turns row i with row i + head_dim / 2 of a head, llama.cpp row 2 i with row 2 i + 1.
    """
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
