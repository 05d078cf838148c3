"""The README.md of an exported model: what it is, how to decode with it, how good its layers are."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig

from lskip.models.pretrained import is_run
from lskip.utils.user_paths import user_path

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
NUM_SPECULATIONS = 4  # where nothing is recommended
TAGS = ["lskip", "layerskip", "early-exit", "self-speculative-decoding"]


def model_card(
    source: str,
    name: str,
    config: PreTrainedConfig,
    exit_layer: int | None = None,
    num_speculations: int | None = None,
    draft: int | None = None,
    gguf: bool = False,
) -> str:
    """The card's text, Markdown behind a head in YAML. The table of layers is there where a run has measured it.

    Args:
        source: what `lskip export --model` said.
        name: of the exported folder; `config` is its model's.
        exit_layer, num_speculations, draft, gguf: as in `lskip.export.to_hf.export`.
    """
    run = run_folder(source)
    trained_from = None if run is None else _trained_from(run)
    base = _hub_name(source if run is None else trained_from)
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=TAGS, base_model=base)
    parts = [
        f"# {name}",
        _about(config, base, trained_from),
        _with_lskip(name, exit_layer, num_speculations),
        _with_transformers(name, exit_layer, draft),
        _with_llama_cpp(name, draft) if gguf else None,
        None if run is None else _layers(run),
    ]
    text = "\n\n".join(part for part in parts if part is not None)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def run_folder(source: str) -> Path | None:
    """The run of `lskip fit` that `source`, a run or a checkpoint, belongs to; None: it is something else."""
    path = user_path(source, "model")
    if is_run(path):
        return path
    return path.parent.parent if path.suffix == ".ckpt" and path.parent.name == "checkpoints" else None


def _trained_from(run: Path) -> str | dict | None:
    """What `lskip fit --model` said; None: the run does not tell."""
    try:
        return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")).get("model")
    except (OSError, yaml.YAMLError, AttributeError):
        return None


def _hub_name(source: str | dict | None) -> str | None:
    if source == "smollm2":
        return SMOLLM2
    is_name = isinstance(source, str) and source.count("/") == 1 and not source.endswith((".gguf", ".ckpt"))
    # A folder like runs/mine is written in the same way.
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


def _with_lskip(name: str, exit_layer: int | None, num_speculations: int | None) -> str:
    exit_flags, advice = "", ""
    if exit_layer is not None:
        exit_flags = f" --exit_layer {exit_layer} --num_speculations {num_speculations or NUM_SPECULATIONS}"
    if exit_layer is not None and num_speculations is not None:
        advice = f"\n\nRecommended: exit_layer {exit_layer}, num_speculations {num_speculations}."
    return f'## lskip\n\n    lskip generate --model {name} --prompt "…"{exit_flags}{advice}'


def _with_transformers(name: str, exit_layer: int | None, draft: int | None) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        f'inputs = AutoTokenizer.from_pretrained("{name}")("…", return_tensors="pt")',
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
            "Perplexity on the run's held-out text, and how often the layer's likeliest token is the last layer's, at "
            "the run's last validation.",
            "",
            "| layer | perplexity | agreement |",
            "|---|---|---|",
            *lines,
        ]
    )


def layer_table(run: Path) -> list[tuple[int, float, float]]:
    """(layer, perplexity, agreement) of each layer at the last validation of a run; [] if it has logged none."""
    if not any(run.glob("events.out.tfevents.*")):
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that a resumed run logs some steps again is no news
    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "images": 1}).Reload()
    tags = set(events.Tags()["scalars"])
    rows = []
    for tag in sorted(tag for tag in tags if tag.startswith("val/ppl/layer_")):
        layer = int(tag.removeprefix("val/ppl/layer_"))
        agreement = f"val/agreement/layer_{layer:02d}"
        if agreement in tags:
            rows.append((layer, events.Scalars(tag)[-1].value, events.Scalars(agreement)[-1].value))
    return sorted(rows)
