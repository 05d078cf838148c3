"""Configs of models: every field has an effect, or is refused by name before anything is built."""

import json
from dataclasses import fields

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from lskip.cli import main
from lskip.models.families import FAMILIES
from lskip.models.pretrained import load_config, load_model
from lskip.models.reading.config import make_config as config_of
from lskip.models.reading.config import parameter_count, with_layers
from tests.conftest import make_config, make_model
from tests.export.test_to_hf import save

K7 = "K7 fields that do nothing"
B17 = "B17 B29 nonsense in a model's config"
B16 = "B15 B16 sizes without bounds"

# What stands for each of Llama's fields, and differs from what `tiny` has and from every default.
CHANGED = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "hidden_act": "relu", "max_position_embeddings": 96, "initializer_range": 0.5,
    "rms_norm_eps": 0.5, "use_cache": False, "pad_token_id": 5, "bos_token_id": 7, "eos_token_id": 9,
    "pretraining_tp": 2, "tie_word_embeddings": None, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    "attention_bias": None, "attention_dropout": 0.5, "mlp_bias": True, "head_dim": 16,
    "rope_theta": 77.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}  # fmt: skip
# In every family of transformers, and read by `generate`, not by the model; or by Llama's pretraining alone.
WITHOUT_TRACE = {"use_cache", "pretraining_tp"}


def tiny(family: str) -> dict:
    config = {"model_type": family, "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": None}
    sizes = {} if family in ("gpt2", "opt") else {"intermediate_size": 40}
    if family not in ("gpt2", "opt", "gpt_neox"):
        sizes["num_key_value_heads"] = 4
    return config | sizes | {"bos_token_id": 1, "eos_token_id": 2}


def traces(config: PreTrainedConfig) -> tuple:
    """Return everything in which models of two configs could differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    torch.manual_seed(1)
    with torch.no_grad():
        logits = model(torch.arange(1, 50)[None]).logits
    settings = model.generation_config
    ends = settings.bos_token_id, settings.eos_token_id, settings.pad_token_id
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    shapes = [(name, part.shape) for name, part in model.named_parameters()]
    return shapes, logits.double().sum().item(), ends, tied, config.max_position_embeddings


@pytest.mark.kind(K7)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_of_llamas_fields_has_an_effect_or_is_refused(family):
    config = tiny(family)
    plain = config_of(config)
    before = traces(plain)
    llamas = {field.name for field in fields(LlamaConfig)} - {field.name for field in fields(PreTrainedConfig)}
    assert llamas <= CHANGED.keys()
    refused = set()
    for name, value in CHANGED.items():
        if value is None:
            value = not getattr(plain, name, False)
        try:
            made = config_of({**config, name: value})
        except ValueError as error:
            assert str(error).startswith(f"model.{name}"), error
            refused.add(name)
            continue
        assert traces(made) != before or name in WITHOUT_TRACE, name
    assert not refused & tiny(family).keys()
    assert ("intermediate_size" in refused) == (family in ("gpt2", "opt"))
    assert family != "llama" or not refused


FIELDS = {
    "F22 intermediate_size": ({"model_type": "gpt2", "intermediate_size": 64}, "intermediate_size", "'n_inner'"),
    "F24 num_key_value_heads": ({"model_type": "gpt2", "num_key_value_heads": 2}, "num_key_value_heads", "no field"),
    "other family's activation": ({"model_type": "gemma2", "hidden_act": "gelu"}, "hidden_act", "'hidden_activation'"),
    "norm of GPT-2": ({"model_type": "gpt2", "rms_norm_eps": 1e-5}, "rms_norm_eps", "'layer_norm_epsilon'"),
    "width of OPT": ({"model_type": "opt", "intermediate_size": 8}, "intermediate_size", "'ffn_dim'"),
    "rotary positions of GPT-2": ({"model_type": "gpt2", "rope_theta": 5.0}, "rope_theta", "no field"),
    "both names": ({"model_type": "gpt2", "n_embd": 24, "hidden_size": 36}, "hidden_size", "'n_embd'"),
    "both rotary fields": (make_config(rope_theta=5.0, rope_parameters={"rope_theta": 7.0}), "rope_theta", "no effect"),
    "nested typo": (make_config(rope_parameters={"rope_tpye": "linear"}), "rope_parameters", "rope_tpye"),
    "nested without effect": (make_config(rope_parameters={"factor": 2.0}), "rope_parameters", "factor"),
    "flat where kinds differ": (
        {"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 5.0}}, "rope_parameters", "sliding_attention"
    ),
    "rotary base of GPT-NeoX": ({**tiny("gpt_neox"), "rope_theta": 5.0}, "rope_theta", "no effect"),
    "dtype": (make_config(dtype="bfloat16"), "dtype", "float32"),
    "name of another program": ({"model_type": "llama", "n_embd": 8}, "n_embd", "'hidden_size'"),
}  # fmt: skip


@pytest.mark.kind(K7)
@pytest.mark.parametrize(("config", "field", "word"), FIELDS.values(), ids=list(FIELDS))
def test_a_field_without_effect_is_refused(config, field, word):
    with pytest.raises(ValueError, match=rf"^model\.{field}") as caught:
        config_of(config)
    assert word in str(caught.value)


HANDED = {
    "B17": {
        "num_attention_heads": [0], "num_key_value_heads": [3], "num_hidden_layers": [-1, 0], "hidden_size": [-8],
        "intermediate_size": [-4], "hidden_act": ["nope"], "rope_parameters": [{"rope_type": "foo"}],
        "pad_token_id": [10**6],
    },
    "B40": {
        "attention_dropout": [2, -1], "rms_norm_eps": [-1, float("nan")], "rope_theta": [0],
        "eos_token_id": [10**6, -4], "hidden_size": [0], "intermediate_size": [0],
    },
    "own": {
        "hidden_size": ["big", 8.5, [8], True, 10**30], "num_attention_heads": [5, "4"], "head_dim": [7, 0, -8],
        "num_key_value_heads": [0, -2], "vocab_size": [0, -1, "x"], "max_position_embeddings": [0, 1.5],
        "attention_dropout": [1.0, float("inf"), "some"], "rms_norm_eps": [0, "tiny", float("inf")],
        "initializer_range": [float("nan"), -1], "rope_theta": ["x", -1, float("nan")],
        "bos_token_id": [300, -1, "x"], "eos_token_id": [[0, 400], "x"], "pad_token_id": [-1, 300, 1.5],
        "tie_word_embeddings": ["yes", 1], "hidden_act": [5, "gelu_nwe"], "mlp_bias": ["x"],
        "rope_parameters": [5, [1], {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0.5}, {"rope_theta": 0},
                            {"partial_rotary_factor": 2.0}, {"rope_type": "longrope", "long_factor": ["x"]}],
        "rope_scaling": [{"type": "foo"}, {"type": "linear", "factor": float("nan")}],
    },
}  # fmt: skip
VALUES = [
    pytest.param(field, value, id=f"{'' if case == 'own' else case + ' '}{field} {str(value)[:30]}")
    for case, parts in HANDED.items()
    for field, values in parts.items()
    for value in values
]


@pytest.mark.kind(B17)
@pytest.mark.parametrize(("field", "value"), VALUES)
def test_a_value_that_no_model_can_have_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"^model[.:].*{field}") as caught:
        config_of(make_config(**{field: value}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def folder_with(tmp_path, **changes):
    """Return a model's folder with a changed config.json."""
    make_model().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path / "model"


IN_FILES = {
    "B40 rms_norm_eps": {"rms_norm_eps": float("nan")},
    "B40 eos_token_id": {"eos_token_id": -4},
    "B17 num_attention_heads": {"num_attention_heads": 0},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "hidden_act": {"hidden_act": "nope"},
    "rope": {"rope_parameters": {"rope_type": "foo"}},
    "pad_token_id": {"pad_token_id": 10**6},
    "hidden_size": {"hidden_size": "big"},
    "quantization_config": {"quantization_config": {"quant_method": "bitsandbytes"}},
}


@pytest.mark.kind(B17)
@pytest.mark.parametrize(
    ("changes", "way"),
    [
        pytest.param(changes, way, id=f"{name} {way}")
        for name, changes in IN_FILES.items()
        for way in ("folder", "checkpoint")
        if (name, way) != ("quantization_config", "checkpoint")  # lskip saves none
    ],
)
def test_the_same_in_a_file_names_the_file(tmp_path, changes, way):
    (field,) = changes
    path = folder_with(tmp_path, **changes)
    if way == "checkpoint":
        path = save(tmp_path / "a.ckpt", make_model(), None)
        checkpoint = torch.load(path)
        checkpoint["lskip"]["config"].update(changes)
        torch.save(checkpoint, path)
    for load in (load_model, load_config):
        with pytest.raises(ValueError, match=rf"^model: '{path}.*config.*{field[:4]}"):
            load(str(path))


@pytest.mark.kind(B17)
@pytest.mark.parametrize("text", ["{", "[1]", "5", "", "\ufeff{", '{"a":' * 3000, '{"model_type": 5}', "{}"])
def test_a_config_that_is_none(tmp_path, text):
    (folder_with(tmp_path) / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^model: "):
        load_model(str(tmp_path / "model"))


COMMANDS = {
    "sweep": ("sweep", "--task=LocalTask", "--task.path={place}/tasks.jsonl", "--output={place}/sweep"),
    "tune": ("tune", "--task=LocalTask", "--task.path={place}/tasks.jsonl"),
    "evaluate": ("evaluate", "--tasks=[x]", "--output={place}/results.json"),
    "inspect": ("inspect", "--data={place}/data.jsonl", "--output={place}/inspect"),
    "generate": ("generate", "--prompt=x"),
    "export": ("export", "--output={place}/exported"),
    "adapt": ("adapt", "--output={place}/adapt", "--prompts={place}/prompts.txt"),
}


@pytest.mark.kind(B17)
@pytest.mark.parametrize("command", COMMANDS, ids=[f"B29 {name}" for name in COMMANDS])
def test_a_family_that_is_not_covered_is_said_by_every_command(tmp_path, capsys, command):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "def f", "reference": "x"}\n')
    (tmp_path / "prompts.txt").write_text("".join(f"def f{i}\n" for i in range(200)))  # enough for adapt
    (tmp_path / "data.jsonl").write_text('{"text": "def f"}\n')
    name, *options = COMMANDS[command]
    options = [option.replace("{place}", str(tmp_path)) for option in options]
    assert main([name, f"--model={tmp_path / 'model'}", *options]) == 2
    sentence = capsys.readouterr().err.strip().rpartition("\n")[2]
    assert sentence.startswith(f"lskip {name}: error: model: the family 'clip' is not supported; allowed: llama")


LARGE = {
    "B16 layers": {"num_hidden_layers": 10**9},
    "B15 hidden_size": {"hidden_size": 10**7},
    "B15 vocab_size": {"vocab_size": 10**10},
    "intermediate_size": {"intermediate_size": 10**10},
    "all of them": {"hidden_size": 2**20, "num_hidden_layers": 4000},
}


@pytest.mark.kind(B16)
@pytest.mark.parametrize("changes", LARGE.values(), ids=list(LARGE))
@pytest.mark.parametrize("way", ["mapping", "folder", "checkpoint"])
def test_sizes_are_refused_before_memory_is_taken(tmp_path, changes, way):
    if way == "mapping":
        source = make_config(**changes)
    elif way == "folder":
        source = str(folder_with(tmp_path, **changes))
    else:
        source = save(tmp_path / "a.ckpt", make_model(), None)
        checkpoint = torch.load(source)
        checkpoint["lskip"]["config"].update(changes)
        torch.save(checkpoint, source)
    with pytest.raises(ValueError, match=r"^model.*(GiB of memory|from 1 to 4096|its weights hold at most)"):
        load_model(source if way == "mapping" else str(source))


@pytest.mark.kind(B16)
@pytest.mark.parametrize(
    "config", [{"model_type": "gpt2", "n_layer": 10**9}, {"model_type": "gpt2", "n_positions": 2**39}]
)
def test_sizes_by_other_names(config):
    with pytest.raises(ValueError, match=r"^model.*(GiB of memory|n_layer)"):
        config_of(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_without_the_model(family):
    config = AutoConfig.for_model(**tiny(family), tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(with_layers(config, slice(None)))
    assert parameter_count(config) == sum(part.numel() for part in model.parameters())


def test_a_config_of_some_layers_keeps_their_kinds():
    kinds = ["sliding_attention", "full_attention"] * 3
    config = AutoConfig.for_model("gemma2", num_hidden_layers=6, layer_types=kinds)
    assert with_layers(config, slice(3)).layer_types == kinds[:3]
    top = with_layers(config, slice(4, None))
    assert (top.num_hidden_layers, top.layer_types) == (2, kinds[4:])
    assert config.num_hidden_layers == 6 and config.layer_types == kinds


@pytest.mark.kind(B17)
def test_no_data_is_read_for_a_bad_config(tmp_path, capsys):
    """The sentence comes before the data's: their file does not even exist."""
    config = json.dumps(make_config(num_key_value_heads=3))
    flags = (f"--model={config}", f"--data.source={tmp_path}/none.jsonl", f"--run_folder={tmp_path / 'run'}")
    assert main(["fit", *flags]) == 2
    assert "error: model.num_key_value_heads: 3 does not divide" in capsys.readouterr().err
