"""The model card (README.md) of an exported model: origin, usage, and a table of its layers."""

import logging
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from lskip.models.families import FUSED_FAMILIES
from lskip.models.reading.sources import run_of

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_SPECULATIONS = 4  # the default
ROUNDED = "\n\n`--weights int8` is faster on x86 CPUs. It rounds the model to 8 bits: the text is another one then."
TAGS = ["lskip", "layerskip", "early-exit", "self-speculative-decoding"]


def model_card(
    source: str,
    name: str,
    config: PreTrainedConfig,
    exit_layer: int | None = None,
    num_speculations: int | None = None,
    draft: int | None = None,
    gguf: bool = False,
    tokenizer_reader: str = "AutoTokenizer",
) -> str:
    """Return the card: Markdown with a YAML header, and a table of layers if the run has measured them.

    Args:
        source: value of `lskip export --model`.
        name: of the exported folder.
        config: of the exported model.
        exit_layer: as in `lskip.export.to_hf.export`, like num_speculations, draft and gguf.
        tokenizer_reader: class of transformers that reads its tokenizer.
    """
    run = run_of(source)
    trained_from = None if run is None else _trained_from(run)
    base = _hub_name(source if run is None else trained_from)
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=TAGS, base_model=base)
    parts = [
        f"# {name}",
        _about(config, base, trained_from),
        _with_lskip(name, config.model_type, exit_layer, num_speculations),
        _with_transformers(name, exit_layer, draft, tokenizer_reader),
        _with_llama_cpp(name, draft) if gguf else None,
        None if run is None else _layers(run),
    ]
    text = "\n\n".join(part for part in parts if part is not None)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _trained_from(run: Path) -> str | dict | None:
    """Return the run's value of `lskip fit --model`; None: unknown."""
    try:
        return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")).get("model")
    except (OSError, yaml.YAMLError, AttributeError):
        return None


def _hub_name(source: str | dict | None) -> str | None:
    if source == "smollm2":
        return SMOLLM2
    is_name = isinstance(source, str) and source.count("/") == 1 and not source.endswith((".gguf", ".ckpt"))
    # A folder such as runs/mine has the form of a hub name too.
    return source if is_name and not Path(source).parent.is_dir() else None


def _about(config: PreTrainedConfig, base: str | None, trained_from: str | dict | None) -> str:
    history = f", from {base}" if base else ""
    if isinstance(trained_from, dict):
        history = ", trained from scratch by `lskip fit`"
    elif trained_from is not None and base:
        history = f", trained by `lskip fit` from {base}"
    return (
        f"A {config.model_type} model of {config.num_hidden_layers} layers{history}. With LayerSkip "
        "([arXiv 2404.16710](https://arxiv.org/abs/2404.16710)) the first layers draft tokens and the whole model "
        "verifies them: the text is the one that the whole model writes alone."
    )


def _with_lskip(name: str, model_type: str, exit_layer: int | None, num_speculations: int | None) -> str:
    exit_flags, advice = "", ""
    if exit_layer is not None:
        exit_flags = f" --exit_layer {exit_layer} --num_speculations {num_speculations or NUM_SPECULATIONS}"
    if exit_layer is not None and num_speculations is not None:
        advice = f"\n\nRecommended: exit_layer {exit_layer}, num_speculations {num_speculations}."
    rounded = "" if model_type not in FUSED_FAMILIES else ROUNDED
    return f'## lskip\n\n    lskip generate --model {name} --prompt "…"{exit_flags}{advice}{rounded}'


def _with_transformers(name: str, exit_layer: int | None, draft: int | None, tokenizer_reader: str) -> str:
    lines = [
        f"from transformers import AutoModelForCausalLM, {tokenizer_reader}",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'inputs = {tokenizer_reader}.from_pretrained("{name}")("…", return_tensors="pt")',
    ]
    if exit_layer is None:
        lines += ["model.generate(**inputs, max_new_tokens=100)"]
    else:
        early = f"assistant_early_exit={exit_layer}"
        lines += [f"model.generate(**inputs, max_new_tokens=100, {early})  # one prompt at a time"]
    if draft is not None:
        lines += [
            f'draft = AutoModelForCausalLM.from_pretrained("{name}", subfolder="draft")  # the first {draft} layers',
            "model.generate(**inputs, max_new_tokens=100, assistant_model=draft)",
        ]
    return "\n".join(["## transformers", "", "```python", *lines, "```"])


def _with_llama_cpp(name: str, draft: int | None) -> str:
    flags = "" if draft is None else f" -md {name}/draft/model.gguf"
    return f"## llama.cpp\n\n    llama-server -m {name}/model.gguf{flags}"


def _layers(run: Path) -> str | None:
    rows = layer_table(run)
    if not rows:
        return None
    lines = [f"| {layer} | {perplexity:.4g} | {agreement:.2f} |" for layer, perplexity, agreement in rows]
    return "\n".join(
        [
            "## Layers",
            "",
            "Perplexity on the run's held-out text, and how often the layer's most probable token is the last layer's, "
            "at the run's last validation.",
            "",
            "| layer | perplexity | agreement |",
            "|---|---|---|",
            *lines,
        ]
    )


def layer_table(run: Path) -> list[tuple[int, float, float]]:
    """Return (layer, perplexity, agreement) of each layer at a run's last validation; [] if none is logged."""
    if not any(run.glob("events.out.tfevents.*")):
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of steps that a resumed run logs again
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 1}).Reload()
    tags = set(events.Tags()["scalars"])
    rows = []
    for tag in sorted(tag for tag in tags if tag.startswith("val/ppl/layer_")):
        layer = int(tag.removeprefix("val/ppl/layer_"))
        agreement = f"val/agreement/layer_{layer:02d}"
        if agreement in tags:
            rows.append((layer, events.Scalars(tag)[-1].value, events.Scalars(agreement)[-1].value))
    return sorted(rows)
