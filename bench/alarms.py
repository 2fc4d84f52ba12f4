"""How many videos, and how many standard errors, tell a judge that has fallen from one that has not?

    python bench/alarms.py          # a minute; writes bench/alarms.csv

Simulates the choice of extras/strength.py between two earlier evaluations, three strengths of the last LoRA,
and the last LoRA itself, which has the highest reward. A look's place is how far it is from the base model:
a judge's change differs from video to video in proportion to it, and is alike from look to look (ALIKE).
Unharmed: no judge changes in the mean. Harmed: one judge changes by harm x (place - 2 place^2), so it gains
at first, is where it was at one half, and has fallen by harm at the end (as `clip` did under `aesthetic`).
harm is in standard deviations of a judge's change from video to video, at full strength.

false alarm: of unharmed runs, another than the last LoRA is chosen; kept: the mean place that is chosen
there. missed: of harmed runs, the last LoRA is chosen all the same.
"""

import csv
import itertools
import math
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
RUNS = 4000
PLACES = np.array([0.0, 0.25, 0.4, 0.5, 0.7, 0.75, 1.0])  # the base model, and the looks, by their reward
ALIKE = 0.7  # correlation of a video's change between two looks
VIDEOS, JUDGES, ERRORS, HARMS = (16, 32, 64), (1, 2, 3), (0.0, 0.5, 1.0, 1.5, 2.0), (0.25, 0.5, 1.0)


def choose(draw, videos: int, judges: int, errors: float, harm: float):
    """The look that is chosen in each run: the last at which no judge is `errors` below the base. (RUNS,)"""
    common = draw.standard_normal((RUNS, judges, 1, videos), dtype=np.float32)
    own = draw.standard_normal((RUNS, judges, len(PLACES), videos), dtype=np.float32)
    noise = math.sqrt(ALIKE) * common + math.sqrt(1 - ALIKE) * own
    changes = PLACES[:, None] * noise
    changes[:, 0] += harm * (PLACES - 2 * PLACES**2)[:, None]
    mean = changes.mean(-1)
    error = changes.std(-1, ddof=1) / math.sqrt(videos)
    allowed = (mean >= -errors * error).all(axis=1)  # (RUNS, looks); the base always is
    looks = np.arange(len(PLACES))
    return np.where(allowed, looks, 0).max(axis=1)


def main():
    draw = np.random.default_rng(0)
    last = len(PLACES) - 1
    rows = []
    for videos, judges, errors in itertools.product(VIDEOS, JUDGES, ERRORS):
        unharmed = choose(draw, videos, judges, errors, 0.0)
        row = {"videos": videos, "judges": judges, "standard errors": errors}
        row["false alarms"] = f"{(unharmed < last).mean():.3f}"
        row["kept"] = f"{PLACES[unharmed].mean():.3f}"
        for harm in HARMS:
            missed = (choose(draw, videos, judges, errors, harm) == last).mean()
            row[f"missed, harm {harm:g}"] = f"{missed:.3f}"
        rows.append(row)
        print(row, flush=True)
    with open(HERE / "alarms.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
