"""Bad YAML for every command: files for `--config`, and config.yaml in a run folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from benchmarks.bad_input.checks import trained
from benchmarks.bad_input.fixtures import fit_arguments
from benchmarks.bad_input.options import BASES, MAKES, own_task
from benchmarks.bad_input.verdict import Case, Right, done, either, refused

COMMANDS = (*BASES, "fit", "validate", "test")
WITH = {  # an option of each command, and a valid value
    "generate": ("max_new_tokens", 4),
    "predict": ("batch_size", 2),
    "export": ("exit_layer", 2),
    "sweep": ("rounds", 1),
    "tune": ("rounds", 1),
    "evaluate": ("batch_size", 2),
    "compare": ("figure", "{here}/out.png"),
    "data": ("show", 2),
    "inspect": ("num_blocks", 2),
    "adapt": ("max_steps", 3),
    "fit": ("position_share", 1.0),
    "validate": ("seed_everything", 3),
    "test": ("seed_everything", 3),
}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


def cases(random: Random) -> Iterator[Case]:
    for command in COMMANDS:
        yield from broken(random, command)
    yield from spellings()
    yield from configs_elsewhere(random)
    yield from runs(random)


def base(command: str) -> tuple[str, ...]:
    if command in BASES:
        return BASES[command][0]
    return tuple(fit_arguments("{place}", "{here}/out", "{place}/llama" if command == "fit" else "{place}/run"))


def of_text(
    command: str, what: str, right: Right, text: str | bytes, name: str = "c.yaml", kind: str = "config"
) -> Case:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return of_file(command, what, right, lambda here: (here / name).write_bytes(data), name, kind)


def of_file(
    command: str, what: str, right: Right, make: Callable[[Path], object], name: str = "c.yaml", kind: str = "config"
) -> Case:
    def prepare(here: Path) -> None:
        make(here)
        shutil.copytree(here.parent / "llama", here / "model")
        own_task(here / "tasks")

    arguments = (f"--config={{here}}/{name}", *base(command))
    if command == "compare":
        arguments = (arguments[1], arguments[0])  # its figure comes from the config
    return Case(command, kind, what, arguments, right, prepare, makes=MAKES)


def broken(random: Random, command: str) -> Iterator[Case]:
    """Yield a good file for a command, and a random few of the bad ones."""
    option, value = WITH[command]
    good = f"{option}: {json.dumps(value)}\n"
    whole = BASES[command][1] if command in BASES else done()
    yield of_text(command, "good", whole, f"# mine\n{good}".replace("{here}", "."))
    yield of_text(command, "good, with a byte order mark", whole, "\ufeff" + good.replace("{here}", "."))
    bad = {
        "an unknown key": (f"{good}modle_: 3\n", "modle_"),
        "a list for a number": (f"{option}: [1, [2]]\n", option),
        "an object for a number": (f"{option}: {{a: 1}}\n", option),
        "a tag": (f"{option}: !!python/object/apply:os.system ['touch MARK']\n", "config|YAML"),
        "a tag of its own": (f"{option}: !mine 3\n", "config|YAML"),
        "NUL": (f'{good}"a\\0b": 1\n', "there is no|a\\x00b"),
        "a list": ("- 1\n- 2\n", "config"),
        "a text": ("just a text\n", "config"),
        "a number": ("17\n", "config"),
        "nothing": ("", "config"),
        "null": ("null\n", "config"),
        "a tab": (f"{option}:\n\t- 3\n", "config"),
        "aliases that stand for 10**9 values": (BOMB, "config"),
        "itself": ("a: &a [*a]\n", "config"),
        "an alias of nothing": (f"{option}: *x\n", "config"),
        "two documents": (f"{good}---\n{good}", "config"),
        "nested 5000 deep": (f"{option}: " + "[" * 5000 + "]" * 5000, "config"),
        "a date that is none": (f"{option}: 2024-13-45\n", f"config|{option}"),
        "5000 digits": (f"{option}: {'9' * 5000}\n", f"config|{option}"),
        "another version": (f"%YAML 9.9\n---\n{good}", "config|YAML"),
        "an escape": (f'{option}: "\\e[2J\\e]0;x\\a"\n', option),
        "a surrogate": (f'{option}: "\\ud800"\n', f"config|{option}"),
        "a key that is a list": (f"{good}? [a, b]\n: 1\n", "config|there is no"),
        "a key that is a number": (f"{good}5: 1\n", "config|there is no"),
        "the config itself": (f"{good}config: {{here}}/c.yaml\n", "config"),
    }
    if command == "compare":
        bad.pop("an escape"), bad.pop("a surrogate")
    for what in random.sample(list(bad), 6):
        text, word = bad[what]
        yield of_text(command, what, refused(word), text)
    bytes_ = {
        "utf-16": good.encode("utf-16"),
        "latin-1": f"{good}# é".encode("latin-1"),
        "noise": random.randbytes(500),
    }
    for what, data in random.sample(list(bytes_.items()), 1):
        yield of_text(command, what, refused("config"), data)


LEGAL = done(trained(2))
# what a config says -> what must come of it
SPELLINGS = {
    "position_share: 1e-1": LEGAL,
    "position_share: .5": LEGAL,
    "trainer: {max_steps: 0x2}": LEGAL,
    "trainer: {max_steps: 2.0}": either(LEGAL, refused("max_steps")),
    "trainer: {max_steps: '2'}": either(LEGAL, refused("max_steps")),
    "trainer: {max_steps: 1:30}": either(refused("max_steps"), done(trained(90))),
    "trainer: {max_steps: yes}": refused("max_steps"),
    "exit_heads: no": LEGAL,
    "exit_heads: 'no'": either(LEGAL, refused("exit_heads")),
    "exit_heads: off": LEGAL,
    "exit_heads: 1": either(LEGAL, refused("exit_heads")),
    "trainer: null": either(LEGAL, refused("trainer")),
    "trainer: []": refused("trainer"),
    "trainer: {callbacks: [null]}": refused("callbacks"),
    "trainer: {callbacks: {}}": either(LEGAL, refused("callbacks")),
    "trainer: {logger: [null]}": refused("logger"),
    "data: null": refused("data"),
    "data: []": refused("data"),
    "data: {init_args: {batch_size: 4}}": LEGAL,
    "data: {class_path: lskip.data.TextData}": LEGAL,
    "data: {class_path: TextData, init_args: null}": either(LEGAL, refused("data")),
    "data: {class_path: TextData, init_args: [1]}": refused("init_args|data"),
    "data: {class_path: TextData, init_arg: {batch_size: 2}}": refused("init_arg|data"),
    "data: {source: 'a\\0b'}": refused("source"),
    'data: {source: "a\\0b"}': refused("source"),
    'run_folder: "a\\0b"': refused("run_folder"),
    'model: "a\\0b"': refused("model"),
    "model: null": refused("model"),
    "model: []": refused("model"),
    "model: 5": refused("model"),
    "model: {}": refused("model"),
    "model: {model_type: null}": refused("model_type"),
    "model: {model_type: [llama]}": refused("model_type"),
    "model: {model_type: llama, 5: 6}": refused("model"),
    "optimizer: {class_path: torch.optim.AdamW}": LEGAL,
    "optimizer: null": refused("optimizer"),
    "optimizer: {}": either(LEGAL, refused("optimizer")),
    "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: null}}": refused("lr"),
    "optimizer: {class_path: torch.optim.AdamW, init_args: {params: []}}": refused("params"),
    "optimizer: {class_path: torch.optim.LBFGS}": refused("optimizer"),
    "lr_scheduler: {class_path: torch.optim.lr_scheduler.ReduceLROnPlateau}": refused("lr_scheduler"),
    "lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR}": refused("step_size"),
    "layer_dropout: {class_path: lskip.callbacks.EarlyExitLoss}": refused("layer_dropout"),
    "layer_dropout: true": refused("layer_dropout"),
    "early_exit_loss: []": refused("early_exit_loss"),
    "checkpoint: null": either(LEGAL, refused("checkpoint")),
    "checkpoint: {every_n_train_steps: 1, folder: x}": refused("folder"),
    "seed_everything: null": either(LEGAL, refused("seed_everything")),
    "ckpt_path: ''": refused("ckpt_path"),
    "ckpt_path: []": refused("ckpt_path"),
    "fit: {position_share: 1.0}": refused("fit"),
    "print_config: true": refused("print_config"),
    "optimizer.help: os.system": refused("optimizer"),
}


def spellings() -> Iterator[Case]:
    """Yield a case for each of SPELLINGS."""
    for text, right in SPELLINGS.items():
        without = tuple(each for each in base("fit") if not any(each.startswith(start) for start in given(text)))
        case = of_text("fit", text, right, text.replace("\\\\", "\\"), kind="spelling")
        yield Case(*(case.command, case.kind, case.what), (*without, "--config={here}/c.yaml"), right, case.prepare)


def given(text: str) -> list[str]:
    """Return the flags that would override the options in a config's text."""
    if text.startswith("trainer: {max_steps"):
        return ["--trainer.max_steps"]
    if text.startswith("data: {source"):
        return ["--data.source"]
    return [f"--{name}=" for name in ("model", "run_folder") if text.startswith(f"{name}:")]


def configs_elsewhere(random: Random) -> Iterator[Case]:
    """Yield configs that are not files, or very large."""
    made = {
        "a folder": lambda here: (here / "c.yaml").mkdir(),
        "a link to itself": lambda here: (here / "c.yaml").symlink_to("c.yaml"),
        "a link to nothing": lambda here: (here / "c.yaml").symlink_to("x"),
        "70 MiB": lambda here: os.truncate(os.open(here / "c.yaml", os.O_CREAT | os.O_WRONLY), 70 * 2**20),
        "/dev/zero": lambda here: (here / "c.yaml").symlink_to("/dev/zero"),
    }
    for what, make in made.items():
        for command in random.sample(COMMANDS, 3):
            yield of_file(command, what, refused("config"), make)


def runs(random: Random) -> Iterator[Case]:
    """Yield bad files config.yaml in a run folder, which compare and validate read."""
    texts = {
        "a tag": "model: !!python/object/apply:os.system ['touch MARK']\n",
        "a list": "- 1\n",
        "a text": "model\n",
        "broken": "model: [\n",
        "noise": random.randbytes(300).decode("latin-1"),
        "class_path 5": "optimizer: {class_path: 5}\n",
        "init_args a list": "optimizer: {class_path: a.B, init_args: [1]}\n",
        "aliases": BOMB,
        "trainer a list": "trainer: [1]\n",
        "escapes": 'data: {source: "\\e[2J\\e]0;x\\a"}\n',
        "markup": "data: {source: '[red]x[/] [link=file:///etc/passwd]y[/link] [/nope]'}\n",
        "a key of numbers": "5: {6: 7}\n",
    }
    for what, text in texts.items():
        legal = what in ("escapes", "markup", "a key of numbers")
        right = either(refused("config.yaml"), done(lambda seen: "an escape" if "\x1b" in seen.out else None))
        yield in_run("compare", what, right if legal or "5" in what or "list" in what else refused("config.yaml"), text)
    cut = random.randrange(1, 400)
    for command in ("compare", "validate"):
        yield in_run(command, f"cut at character {cut}", either(done(), refused()), None, cut)
    for what in ("a tag", "broken", "noise", "a list", "aliases"):
        yield in_run("validate", what, either(done(), refused("config.yaml")), texts[what])


def in_run(command: str, what: str, right: Right, text: str | None, cut: int | None = None) -> Case:
    def prepare(here: Path) -> None:
        shutil.copytree(here.parent / "run", here / "run")
        path = here / "run" / "config.yaml"
        path.write_text(path.read_text()[:cut] if text is None else text, encoding="utf-8")

    if command == "compare":
        arguments = ("{here}/run", "--figure={here}/out.png")
    else:
        arguments = tuple(fit_arguments("{place}", "{here}/out", "{here}/run"))
    return Case(command, "run's config", what, arguments, right, prepare, makes=("out.png", "out"))
