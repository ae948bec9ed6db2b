"""Savers that are killed with SIGKILL at random moments, two at a time in one directory: `python killed_savers.py DIR`.

Prints, for each round, which checkpoint the directory holds. Fails where that is none, or a mixture. There are rounds
until some saves were done and some were not.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from whole import load_mark, marked

ROUNDS, MOST_ROUNDS, SAVED, SEED = 12, 100, 4, 7


def main(directory):
    dice = random.Random(SEED)
    marked(0).save_pretrained(directory)
    durations = []
    for _ in range(3):
        start = time.monotonic()
        marked(0).save_pretrained(directory)
        durations.append(time.monotonic() - start)
    duration = sorted(durations)[1]  # of one undisturbed save here
    last, held = 0, []
    for number in range(1, MOST_ROUNDS + 1):
        if number > ROUNDS and len(set(held)) >= SAVED:  # kills that all come too soon would show nothing
            break
        savers = {2 * number: None, 2 * number + 1: "3KB"}
        models = {mark: marked(mark) for mark in savers}
        children = [_fork(models[mark], directory, shard) for mark, shard in savers.items()]
        for child in children:
            time.sleep(dice.uniform(0, 3 * duration))
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        found = load_mark(directory)
        assert found in (last, *savers), f"round {number}: the directory holds {found}, before it held {last}"
        last = found
        held.append(found)
    marked(1).save_pretrained(directory)
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"], os.listdir(directory)
    assert len(set(held)) >= SAVED, f"no save was ever done: {held}"
    print(*held)


def _fork(model, directory, shard):
    child = os.fork()
    if child == 0:
        try:
            while True:
                model.save_pretrained(directory, max_shard_size=shard)
        finally:
            os._exit(1)
    return child


if __name__ == "__main__":
    main(Path(sys.argv[1]))
