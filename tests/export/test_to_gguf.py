"""A GGUF file holds the same model: tensor by tensor, through transformers, and through llama.cpp where it is.

llama.cpp is looked for in this interpreter and in the one that LSKIP_LLAMA_CPP_PYTHON names.
"""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from lskip.data.tokenizer import train_bpe
from lskip.export.to_gguf import obstacle, rotary_pairs, write_gguf
from lskip.models.pretrained import load_model, load_tokenizer
from tests.conftest import make_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

IDS = torch.tensor([[5, 9, 77, 123, 44, 2, 9, 5, 31]])
TEXTS = [
    "def add(a, b):\n    return a + b\n\n\n# it's 2024,  33 x 4 = 132\n",
    "\t tabs\tand   spaces  7\n \n\n  end  ",
    "Größe: naïve café — 東京 🙂 we'll I'M you've\r\n",
    "<|endoftext|>def f(x): <|endoftext|> 12",
]
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def byte_level(pre_tokenizer=None, **special):
    """A tokenizer as lskip trains it, with words cut by `pre_tokenizer` where it is given."""
    bpe = train_bpe(["def add(a, b):\n    return a + b\n  \n for i in 1 22:\n\tit's 3 44 \n  7"] * 3, 330)
    if pre_tokenizer is not None:
        bpe.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", **special)


def smollm_words():
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def saved_model(folder, dtype, **overrides):
    """Through a folder, so that no buffer is rounded to `dtype`."""
    make_model(**overrides).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def test_rotary_pairs_by_hand():
    weight = np.arange(16).reshape(8, 2)  # two heads of 4 rows: first half 0 1, second half 2 3
    assert rotary_pairs(weight, 2)[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]
    assert (rotary_pairs(weight, 2)[:, 1] - rotary_pairs(weight, 2)[:, 0]).tolist() == [1] * 8


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_the_models(tmp_path, dtype, tied):
    # heads x head_dim is not the hidden size
    model = saved_model(tmp_path / "plain", dtype, head_dim=16, tie_word_embeddings=tied, num_hidden_layers=2)
    write_gguf(model, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    state = model.state_dict()
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    inside = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    assert len(tensors) == (2 if tied else 3) + 2 * len(inside)
    for name, tensor in tensors.items():
        *block, last = name.removesuffix(".weight").split(".")
        theirs = f"model.layers.{block[1]}.{inside[last]}" if block else outside[last]
        weight = state[f"{theirs}.weight"]
        kind = TYPES[dtype] if weight.ndim == 2 else "F32"
        assert tensor.tensor_type.name == kind, name
        bits = torch.from_numpy(np.ascontiguousarray(tensor.data).reshape(-1).view(np.uint8).copy())
        written = bits.view(dtype if weight.ndim == 2 else torch.float32).reshape(weight.shape)
        if last in ("attn_q", "attn_k"):
            heads = 4 if last == "attn_q" else 2
            # row 2 i of a head in the file is its row i in transformers, row 2 i + 1 its row i + 8
            rows = [head * 16 + (i // 2 if i % 2 == 0 else i // 2 + 8) for head in range(heads) for i in range(16)]
            weight = weight[rows]
        assert torch.equal(written, weight.to(written.dtype)), name


@pytest.mark.parametrize("dtype", list(TYPES))
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_same_model(tmp_path, dtype, tied):
    # a rotary base that is not the default
    model = saved_model(tmp_path / "plain", dtype, head_dim=16, tie_word_embeddings=tied, rope_theta=5e3)
    write_gguf(model, tmp_path / "model.gguf")
    # In float32, where transformers computes with the file's weights whatever their type.
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits.float(), model.float()(IDS).logits)


def test_a_file_is_parsed_once_whatever_is_read_of_it(tmp_path, monkeypatch):
    model = saved_model(tmp_path / "plain", torch.float32)
    write_gguf(model, path := tmp_path / "model.gguf", byte_level())
    parsed, build = [], gguf.GGUFReader._build_fields
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", lambda *args: parsed.append(1) or build(*args))
    reader = gguf.GGUFReader
    again, _ = load_model(str(path))
    assert len(parsed) == 1
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="could not be read"):
        load_model(str(path))
    assert gguf.GGUFReader is reader  # others' calls are not remembered


SCALINGS = {
    "default": {"rope_type": "default", "rope_theta": 5e3},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 5e5,
    },
}  # fmt: skip


def scaled_model(family, scaling, **overrides):
    """With norms and biases that are not one and not zero, and as many positions as scaling is for."""
    longest = 256 if scaling == "yarn" else 32768
    given = {
        "head_dim": 8 if family == "qwen2" else 16,
        "max_position_embeddings": longest,
        "vocab_size": 340,
        **overrides,
    }
    model = make_model(family, rope_parameters=SCALINGS[scaling], **given)
    for part in model.parameters():
        if part.ndim == 1:
            part.data += 0.3 * torch.randn_like(part)
    return model


WRITTEN = [
    (family, scaling)
    for family in ("llama", "qwen2", "qwen3")
    for scaling in SCALINGS
    if scaling != "llama3" or family == "llama"
]


@pytest.mark.parametrize(("family", "scaling"), WRITTEN)
def test_what_is_written_is_read(tmp_path, family, scaling):
    """Far into the text too, where scaling is seen."""
    model = scaled_model(family, scaling)
    write_gguf(model, tmp_path / "model.gguf", byte_level())
    again, tokenizer = load_model(str(tmp_path / "model.gguf"))
    assert again.config.model_type == family and tokenizer("a b")["input_ids"] == byte_level()("a b")["input_ids"]
    ids = torch.randint(340, (1, 200))
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
        far = torch.arange(200)[None] * (1 if scaling == "yarn" else 100)
        found, expected = (each(ids, position_ids=far).logits for each in (again, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("words", ["qwen2", "llama-bpe"])
def test_words_of_qwen_and_llama_3_are_written_and_read(tmp_path, words):
    """As their tokenizer.json has them (the regular expressions are those of the models' own files)."""
    number = r"\p{N}" if words == "qwen2" else r"\p{N}{1,3}"
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + number + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    steps = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer = byte_level(pre_tokenizers.Sequence(steps))
    if words == "qwen2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    else:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    write_gguf(make_model(vocab_size=340), tmp_path / "model.gguf", tokenizer)
    assert contents(tmp_path / "model.gguf")["tokenizer.ggml.pre"] == words
    again = load_tokenizer(str(tmp_path / "model.gguf"))
    for text in [*TEXTS, "1234567 a", "we'LL  12"]:
        assert again(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"], text


def contents(path) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_metadata(tmp_path):
    tokenizer = byte_level(pad_token="<|pad|>", unk_token="<|endoftext|>")
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = "{{ messages }}"
    model = make_model(vocab_size=340, rope_theta=5e3, num_hidden_layers=3, max_position_embeddings=64)
    write_gguf(model, tmp_path / "model.gguf", tokenizer, "mine")
    found = contents(tmp_path / "model.gguf")
    assert found["general.architecture"] == "llama" and found["general.name"] == "mine"
    assert found["general.file_type"] == 0
    sizes = {
        "vocab_size": 340, "context_length": 64, "embedding_length": 32, "block_count": 3, "feed_forward_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8,
        "attention.value_length": 8, "rope.dimension_count": 8, "rope.freq_base": 5e3,
    }  # fmt: skip
    assert {key: found[f"llama.{key}"] for key in sizes} == sizes
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(model.config.rms_norm_eps)
    words = {key.removeprefix("tokenizer."): value for key, value in found.items() if key.startswith("tokenizer.")}
    tokens, kinds = words["ggml.tokens"], words["ggml.token_type"]
    count = len(tokenizer)
    assert tokens[:count] == tokenizer.convert_ids_to_tokens(range(count)) and len(tokens) == len(kinds) == 340
    control, user, unused, normal = 3, 4, 5, 1
    assert kinds[0] == control and kinds[tokenizer.pad_token_id] == control
    assert kinds[tokenizer.convert_tokens_to_ids("<think>")] == user and set(kinds[count:]) == {unused}
    assert set(kinds[1 : count - 2]) == {normal} and len(set(tokens)) == 340
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    assert words["ggml.merges"] == [f"{left} {right}" for left, right in rules["model"]["merges"]]
    special = [words[f"ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")]
    assert special == [0, 0, 0, tokenizer.pad_token_id]
    assert (words["ggml.model"], words["ggml.pre"]) == ("gpt2", "gpt-2")
    assert words["ggml.add_bos_token"] is False and words["ggml.add_eos_token"] is False
    assert words["chat_template"] == "{{ messages }}"


def test_a_tokenizer_that_begins_every_text_says_so(tmp_path):
    tokenizer = byte_level(bos_token="<|begin|>")
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    write_gguf(make_model(vocab_size=340), tmp_path / "model.gguf", tokenizer)
    found = contents(tmp_path / "model.gguf")
    assert found["tokenizer.ggml.bos_token_id"] == begin and found["tokenizer.ggml.add_bos_token"] is True


def test_a_tokenizer_is_copied_from_a_gguf_file(tmp_path):
    model = make_model(vocab_size=340)
    write_gguf(model, tmp_path / "first.gguf", byte_level(smollm_words(), bos_token="<|endoftext|>"))
    write_gguf(model, tmp_path / "second.gguf", tmp_path / "first.gguf")
    first, second = contents(tmp_path / "first.gguf"), contents(tmp_path / "second.gguf")
    assert first["tokenizer.ggml.pre"] == "smollm"
    assert {key for key in first if key.startswith("tokenizer.")} == {
        key for key in second if key.startswith("tokenizer.")
    }
    assert all(second[key] == value for key, value in first.items() if key != "general.name")


def test_transformers_reads_the_same_tokenizer(tmp_path):
    tokenizer = byte_level()
    write_gguf(make_model(vocab_size=340), tmp_path / "model.gguf", tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.eos_token_id == 0


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("phi3", {}, "its family is phi3, only llama, qwen2, qwen3 are covered"),
        ("llama", {"attention_bias": True}, "its linears have a bias"),
        ("qwen3", {"attention_bias": True}, "its linears have a bias"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "sees 8 tokens"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "of type dynamic"),
        ("llama", {"rope_parameters": {**SCALINGS["yarn"], "beta_fast": 16.0}}, "has beta_fast, which"),
        ("llama", {"rope_parameters": {**SCALINGS["llama3"], "low_freq_factor": 2.0}}, "other numbers than Llama 3's"),
        ("llama", {"rope_parameters": {**SCALINGS["llama3"], "rope_theta": 1e4}}, "no wave that is stretched"),
        ("qwen3", {"rope_parameters": SCALINGS["llama3"]}, "does not read of a qwen3"),
        ("qwen2", {"head_dim": 16}, "its heads are 16 wide, which llama.cpp does not read of a qwen2"),
    ],
)
def test_a_model_that_gguf_would_get_wrong_is_refused(tmp_path, family, overrides, reason):
    with pytest.raises(ValueError, match=f"^model: cannot be written as GGUF .*{reason}"):
        write_gguf(make_model(family, **overrides), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_a_tokenizer_that_gguf_would_get_wrong_is_refused():
    config = make_model(vocab_size=340).config
    spaces = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\s"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    assert "cuts text" in obstacle(config, byte_level(spaces))
    assert "cuts text" in obstacle(config, byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)))
    count = len(byte_level())
    assert f"{count} entries, the model {count - 1}" in obstacle(make_model(vocab_size=count - 1).config, byte_level())
    endless = byte_level()
    endless.eos_token = None
    assert "no end-of-text" in obstacle(config, endless)
    assert obstacle(config, byte_level()) is None


# In llama.cpp.

LLAMA_CPP = """
import json, sys, llama_cpp
answers = []
for request in json.load(sys.stdin):
    model = llama_cpp.Llama(request["path"], n_ctx=256, n_threads=1, verbose=False)
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]]
    texts = [model.detokenize(row, special=True).decode() for row in ids]
    greedy = []
    for prompt in request["prompts"]:
        model.reset()
        tokens = []
        for token in model.generate(prompt, temp=0.0):
            tokens.append(token)
            if len(tokens) == request["tokens"]:
                break
        greedy.append(tokens)
    answers.append({"ids": ids, "texts": texts, "greedy": greedy})
json.dump(answers, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="session")
def llama_cpp_python() -> str:
    """An interpreter that has llama_cpp; skips where there is none."""
    named = os.environ.get("LSKIP_LLAMA_CPP_PYTHON")
    if named is None and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed; LSKIP_LLAMA_CPP_PYTHON may name an interpreter that has it")
    return named or sys.executable


def test_llama_cpp_computes_and_tokenizes_the_same(tmp_path, llama_cpp_python):
    tokenizers = {"gpt-2": byte_level(), "smollm": byte_level(smollm_words())}
    prompts, tokens = [IDS[0].tolist(), [17, 250, 3]], 12
    requests, models = [], []
    for name, tokenizer in tokenizers.items():
        model = make_model(vocab_size=340, head_dim=16, rope_theta=5e3, tie_word_embeddings=name == "gpt-2")
        write_gguf(model, path := tmp_path / f"{name}.gguf", tokenizer)
        requests.append({"path": str(path), "texts": TEXTS, "prompts": prompts, "tokens": tokens})
        models.append(model)
    answers = ask_llama_cpp(llama_cpp_python, tmp_path, requests)
    for model, tokenizer, answer in zip(models, tokenizers.values(), answers, strict=True):
        assert answer["ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]
        assert answer["texts"] == TEXTS
        for prompt, greedy in zip(prompts, answer["greedy"], strict=True):
            ids = torch.tensor([prompt])
            expected = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            assert len(greedy) == tokens and greedy == expected[0, len(prompt) :].tolist()


def test_llama_cpp_runs_every_family_and_scaling(tmp_path, llama_cpp_python):
    """Of 200 tokens before the answer, where a scaling that is not there is seen."""
    prompt, tokens = torch.randint(340, (1, 200), generator=torch.Generator().manual_seed(0)), 12
    requests, models = [], []
    for family, scaling in WRITTEN:
        model = scaled_model(family, scaling)
        write_gguf(model, path := tmp_path / f"{family}-{scaling}.gguf", byte_level())
        requests.append({"path": str(path), "texts": [], "prompts": [prompt[0].tolist()], "tokens": tokens})
        models.append(model)
    answers = ask_llama_cpp(llama_cpp_python, tmp_path, requests)
    for model, request, answer in zip(models, requests, answers, strict=True):
        assert behind_best(model, prompt, answer["greedy"][0]) < 0.25, request["path"]
    unscaled = models[WRITTEN.index(("llama", "default"))]
    assert all(behind_best(unscaled, prompt, answer["greedy"][0]) > 1 for answer in answers[1:4])


@torch.no_grad()
def behind_best(model, prompt, tokens) -> float:
    """Return how far a chosen token's logit is under the best at most, in standard deviations: llama.cpp keeps keys
    and values in 16 bits, so that near ties are decided otherwise."""
    logits = model(torch.cat([prompt, torch.tensor([tokens])], 1)).logits[0, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return ((logits.amax(1) - chosen) / logits.std(1)).max().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_llama_cpp_runs_what_has_16_bits(tmp_path, llama_cpp_python, dtype):
    model = saved_model(tmp_path / "plain", dtype, vocab_size=340)
    write_gguf(model, tmp_path / "model.gguf", byte_level())
    prompt = IDS[0].tolist()
    request = {"path": str(tmp_path / "model.gguf"), "texts": [], "prompts": [prompt], "tokens": 5}
    (answer,) = ask_llama_cpp(llama_cpp_python, tmp_path, [request])
    # It rounds the states to 16 bits as well: the first token is as far as that can be compared.
    with torch.inference_mode():
        assert answer["greedy"][0][0] == model.float()(IDS).logits[0, -1].argmax()


def ask_llama_cpp(python, folder, requests) -> list[dict]:
    subprocess.run(
        [python, "-c", LLAMA_CPP, str(folder / "answers.json")],
        input=json.dumps(requests), text=True, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads((folder / "answers.json").read_text())
