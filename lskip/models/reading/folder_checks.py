"""Checks of a model's folder for what transformers ignores."""

from pathlib import Path

from transformers import PreTrainedConfig

from lskip.models.reading.config import check_weights_hold
from lskip.models.reading.generation_values import generation_config_of
from lskip.models.reading.weights_report import check_types, types_in, weights_files
from lskip.utils.foreign import foreign
from lskip.utils.untrusted import parse_json, read_text

GENERATION_FILE = "generation_config.json"


def check_folder(folder: Path, config: PreTrainedConfig) -> None:
    """Raise ValueError for what transformers ignores, such as weights that cannot fit the config."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"model: '{folder}' holds an adapter of peft, which is not read; merge it into the model")
    files = [path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind)]
    if files:
        check_weights_hold(config, sum(path.stat().st_size for path in files), str(folder))
    for file in weights_files(folder):
        with foreign(f"model: {str(folder)!r}"):
            types = types_in(file)
        check_types(types, str(file))
    if (folder / GENERATION_FILE).is_file():
        where = f"model: '{folder / GENERATION_FILE}'"
        generation_config_of(parse_json(read_text(folder / GENERATION_FILE, "model"), where), where)
