"""Seconds of a whole run by one process and by two, and what they tell of more.

    python bench/ranks.py            # alone on two cores, a thread each; some minutes

The run: `tiny`, eight videos an update, sixteen an evaluation, and best/ is chosen. Each process makes its
share of all of them. Prints seconds of updates, of evaluations, and of the rest (imports, loading, files),
which no second process saves. From those of one process it counts the seconds of a run of 200 updates and
five evaluations by 1, 2, 4 and 8, as if each had a machine of its own.
"""

import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

RUNS = HERE.parent / "runs" / "ranks"
VIDEOS, EVALUATED, UPDATES = 8, 16, 4
WORDS = f"--model tiny --reward aesthetic --batch_size 1 --steps {UPDATES} --eval_every 2"
WORDS += f" --eval_videos {EVALUATED}"


def work(out: Path, processes: int):
    """One of the processes: the run, whose parts the first one writes down."""
    import vader

    spent = {"updates": [], "evaluations": []}

    def timed(name, function, *args, **kwargs):
        begin = time.time()
        found = function(*args, **kwargs)
        spent[name].append(time.time() - begin)
        return found

    vader.update = functools.partial(timed, "updates", vader.update)
    vader.evaluate = functools.partial(timed, "evaluations", vader.evaluate)
    share = ["--grad_accum", str(VIDEOS // processes), "--out", str(out)]
    code = vader.main([*WORDS.split(), *share])
    if code == 0 and vader.ranks()[0] == 0:
        (RUNS / f"{processes}.json").write_text(json.dumps(spent))
    sys.exit(code)


def measure(processes: int, turn: int) -> dict:
    """Seconds of each update and of each evaluation (or strength), and of the rest."""
    out = RUNS / f"{processes}-{os.getpid()}-{turn}"
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    words = [sys.executable, *launcher, __file__, str(out), str(processes)]
    RUNS.mkdir(parents=True, exist_ok=True)
    start = time.time()
    subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = json.loads((RUNS / f"{processes}.json").read_text())
    found["rest"] = time.time() - start - sum(found["updates"]) - sum(found["evaluations"])
    return found


def count(one: dict, processes: int, updates=200, looks=5 + 3 + 2) -> float:
    """Seconds of a longer run, from those of one process. looks: evaluations, strengths, and the report."""
    update, look = (statistics.mean(one[name]) for name in ("updates", "evaluations"))
    share_of_update = math.ceil(VIDEOS / processes) / VIDEOS
    share_of_look = math.ceil(EVALUATED / processes) / EVALUATED
    return one["rest"] + share_of_update * update * updates + share_of_look * look * looks


def main():
    for turn, processes in enumerate((1, 2, 1, 2)):
        parts = measure(processes, turn)
        if processes == 1:
            one = parts
        update, look = (statistics.mean(parts[name]) for name in ("updates", "evaluations"))
        whole = sum(parts["updates"]) + sum(parts["evaluations"]) + parts["rest"]
        said = f"an update {update:.2f} s, an evaluation {look:.2f} s, the rest {parts['rest']:.1f} s"
        print(f"{processes}: {said}; together {whole:.1f} s", flush=True)
    for processes in (1, 2, 4, 8):
        seconds = count(one, processes)
        print(f"counted, {processes}: {seconds:.0f} s, {count(one, 1) / seconds:.2f} times as fast")


if __name__ == "__main__":
    if sys.argv[1:]:
        work(Path(sys.argv[1]), int(sys.argv[2]))
    main()
