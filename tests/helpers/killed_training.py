"""`t2 train --checkpoints`, killed while it writes: python killed_training.py FOLDER SEED. Prints what happened.

A process that has imported everything forks a process for each run. A run counts what it does in the folder of its
checkpoints (files opened, renamed and removed, folders made), and kills itself at a number that was drawn.
"""

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import torch
import transformers

import t2kernels.train  # noqa: F401
from t2kernels.cli import app

STEPS = 28
WATCHED = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove")


def train(out: Path, checkpoints: Path, last: int, log: Path) -> str:
    """Run the command in a process of its own. last: the number of the event at which it dies, 0: none."""
    process = os.fork()
    if not process:
        seen = 0

        def watch(event: str, args: tuple) -> None:
            nonlocal seen
            if event in WATCHED and str(checkpoints) in str(args[0]):
                seen += 1
                if seen == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            os.dup2(os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY), 1)
            os.dup2(1, 2)
            sys.addaudithook(watch)
            options = {"--steps": STEPS, "--batch": 2, "-n": 2, "--seed": 3, "--rank": "1/8", "--max-new-tokens": 8}
            words = ["train", "--task", "math", "--out", out, "--checkpoints", checkpoints]
            app([str(w) for w in (*words, *(w for pair in options.items() for w in pair))], standalone_mode=False)
            (out.parent / "events").write_text(str(seen))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(1)
    status = os.waitpid(process, 0)[1]
    return {0: "finished", signal.SIGKILL: "killed"}.get(status, f"failed: {status}")


def main(folder: Path, seed: int) -> None:
    """One run that nothing ends, then runs in another folder: killed, killed, killed, and the last left alone."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    draw, log = random.Random(seed), folder / "log"
    states = [train(folder / "whole", folder / "straight", 0, log)]
    events = int((folder / "events").read_text())
    points = [draw.randint(1, events // 2), draw.randint(1, events // 2), draw.randint(events // 2, events), 0]
    states += [train(folder / "resumed", folder / "cut", point, log) for point in points]
    print(json.dumps({"states": states, "points": points, "events": events}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
