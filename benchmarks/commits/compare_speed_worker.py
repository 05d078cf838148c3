"""Load and decode by orders on standard input, a JSON object a line, with the lskip that PYTHONPATH names.

{"load": arguments of load_generator} is answered by its seconds, {"prompts": [...], "batch": n, "settings": {...}} by
seconds, texts and accepted drafts. Nothing but lskip's public face is used, so that it runs on any commit.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from lskip.inference import load_generator


def main(threads: int | None) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what else is printed does not come between
    if threads is not None:
        torch.set_num_threads(threads)
    generator = None
    for line in sys.stdin:
        order = json.loads(line)
        if "load" in order:
            generator = None  # the one before is freed first
            begin = time.perf_counter()
            generator = load_generator(**order["load"])
            answer = {"seconds": time.perf_counter() - begin, "threads": torch.get_num_threads()}
        else:
            answer = decode(generator, **order)
        print(json.dumps(answer), file=answers, flush=True)


def decode(generator, prompts: list[str], batch: int, settings: dict) -> dict:
    """Return the seconds from the prompts to the last token, and the texts."""
    begin = time.perf_counter()
    if batch == 1:
        texts = [generator.generate(prompt, **settings) for prompt in prompts]
    else:
        found = dict(generator.generate_batch(prompts, batch_size=batch, **settings))
        texts = [found[index] for index in sorted(found)]
    seconds = time.perf_counter() - begin
    accepted = sum(text.accepted for text in texts)
    return {"seconds": seconds, "texts": [text.token_ids for text in texts], "accepted": accepted}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
