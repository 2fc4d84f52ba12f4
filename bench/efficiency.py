"""Reward on held-out prompts against reward queries and seconds: VADER, our best setting, DDPO, DPO.

    python bench/efficiency.py                        # every run, about 4 hours of a core
    python bench/efficiency.py --rewards hps          # only these rewards' runs (--methods, --seeds likewise)
    python bench/efficiency.py --sweep                # learning rate x batch: sweep.csv, 35 minutes of a core

On the tiny text-to-video model, 5 sampling steps for all but `ten`, its own guided steps, and `few`, four
from tiny/few, which are compared with each other. A query is one video scored. Seconds are the processor's in
the updates (evaluations left out), on the one thread that a run uses: start several commands to use more
cores, and compare only what one machine made. The runs and their evaluation are those of bench/methods.py;
the CSV keeps the rows of runs that are gone.
VADER's image rewards see one frame of each video; DDPO and DPO, which pay no gradient, see all, which makes
their reward less noisy. efficiency_gold.csv: what the judges see; reached_gold.csv: where each is best.
"""

import argparse
import dataclasses
import itertools
import math
import sys
from pathlib import Path

import imageio.v3 as iio
import judges
import matplotlib
import methods
import numpy as np
import tables
import torch
from methods import METHODS, train

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from extras import watch  # noqa: E402 (needs the line above)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (needs the line above)

REWARDS, SEEDS = ("aesthetic", "hps", "action"), (0, 1, 2)
# the evaluations in frames.png
SHOWN = "aesthetic-5-trailing-32", "vader-aesthetic-1/0020", "vader-aesthetic-1/0080", "ddpo-aesthetic-1/0200"


def table_rows(name: tuple, rows: list[dict]) -> list[dict]:
    """Rows of efficiency.csv of one run; name: (method, reward, seed)."""
    head = dict(zip(("method", "reward", "seed"), name, strict=True))
    found = []
    for row in rows:
        gain, error = watch.paired_gain(rows[0]["values"], row["values"])
        figures = {"mean": f"{row['mean']:.4f}", "gain": f"{gain:.4f}", "error": f"{error:.4f}"}
        found.append(head | {"queries": row["queries"], "seconds": row["seconds"]} | figures)
    return found


def gold_rows(name: tuple, rows: list[dict]) -> list[dict]:
    """Rows of efficiency_gold.csv of one run that was judged; name: (method, reward, seed)."""
    head = dict(zip(("method", "reward", "seed"), name, strict=True))
    found = []
    for row in rows:
        if row["judged"]:
            place = {key: row[key] for key in ("queries", "seconds")}
            found.append(head | place | tables.figures_of(rows[0]["judged"], row["judged"]))
    return found


def curves(rows: list[dict], key: str, reward: str, axis: str):
    """A method's held-out rewards: x (evaluations,), y (seeds, evaluations); None if it has no runs."""
    runs = {}
    for row in rows:
        if (row["method"], row["reward"]) == (key, reward):
            runs.setdefault(row["seed"], []).append((float(row[axis]), float(row["mean"])))
    if not runs:
        return None
    length = min(len(points) for points in runs.values())
    points = np.array([run[:length] for run in runs.values()])
    return points[..., 0].mean(0), points[..., 1]


def summary(rows: list[dict]) -> list[dict]:
    """A row per reward and method: the gain, and what it took to reach DDPO's best and VADER's end.

    These are the first evaluations whose mean over seeds is as high; "-" where none is.
    """
    found = []
    for reward, key in itertools.product(REWARDS, METHODS):
        method = METHODS[key]
        lines = {name: curves(rows, name, reward, "queries") for name in (key, "ddpo", method.goal)}
        if any(line is None for line in lines.values()):
            continue
        (queries, y), (seconds, _) = lines[key], curves(rows, key, reward, "seconds")
        gains = y[:, -1] - y[:, 0]
        spread = f"{gains.mean():+.3f} ({gains.min():+.3f} to {gains.max():+.3f})"
        row = {"reward": reward, "method": method.label, "seeds": len(y), "gain": spread}
        row |= {"videos": f"{queries[-1]:.0f}", "seconds": f"{seconds[-1]:.0f}"}
        after = {name: y.mean(0)[1:] for name, (_, y) in lines.items()}  # without the base model
        best = after["ddpo"].max() if method.goal == "vader" else math.inf  # of other steps
        goals = {"DDPO's best": best, "VADER's end": after[method.goal][-1]}
        for name, goal in goals.items():
            there = 1 + np.flatnonzero(after[key] >= goal)
            row[name] = f"{queries[there[0]]:.0f} in {seconds[there[0]]:.0f} s" if len(there) else "-"
        found.append(row)
    return found


def gold_lines(rows: list[dict]) -> dict:
    """{(reward, method): its evaluations over the seeds} of efficiency_gold.csv, in order.

    An evaluation: {"queries", "seconds", "seeds", "words": gains in words, and (gain, error) of each judge}.
    """
    points = {}
    for row in rows:
        key = row["reward"], row["method"], int(row["queries"])
        points.setdefault(key, []).append(row)
    found = {}
    for (reward, method, queries), group in sorted(points.items()):
        seconds = np.mean([float(row["seconds"]) for row in group])
        line = {"queries": queries, "seconds": seconds, "seeds": len(group)}
        for name in (reward, "as told"):
            line[name] = tables.pooled(group, name)
        line["words"] = tables.gains_in_words(group)
        found.setdefault((reward, method), []).append(line)
    return found


def gold_summary(rows: list[dict]) -> list[dict]:
    """A row per reward and method: what is as told where DDPO's best reward is reached, and at its best.

    The base, which is at no cost, is no evaluation. Gains over the seeds, with standard errors.
    """
    lines, found = gold_lines(rows), []
    for (reward, key), (_, *line) in lines.items():
        row = {"reward": reward, "method": METHODS[key].label, "seeds": line[0]["seeds"]}
        goal = max(point[reward][0] for point in lines[reward, "ddpo"][1:])
        there = [point for point in line if point[reward][0] >= goal][:1]
        best = max(line, key=lambda point: point["as told"][0])
        for name, points in (("DDPO's best", there), ("best gold", [best])):
            row |= {name: "-", f"{name}: reward": "-", f"{name}: as told": "-"}
            for point in points:
                row[name] = f"{point['queries']} in {point['seconds']:.0f} s"
                row[f"{name}: reward"] = point["words"][reward]
                row[f"{name}: as told"] = point["words"]["as told"]
        found.append(row)
    return found


def gold_panels(rows: list[dict]) -> dict:
    """For tables.figure: a line for each method, from the base through its evaluations."""
    found = {}
    for (reward, key), line in gold_lines(rows).items():
        points = [(point[reward][0], point["as told"][0]) for point in line]
        found.setdefault(reward, {})[METHODS[key].label] = points, []
    return found


def figure(rows: list[dict], file: Path):
    """Held-out reward against queries (top) and seconds (bottom), a column per reward; bands: all seeds."""
    rewards = [name for name in REWARDS if any(row["reward"] == name for row in rows)]
    shape = dict(figsize=(4 * len(rewards), 6.5), squeeze=False, layout="constrained")
    plot, axes = plt.subplots(2, len(rewards), **shape)
    for (line, axis), (column, reward) in itertools.product(
        enumerate(("queries", "seconds")), enumerate(rewards)
    ):
        ax = axes[line][column]
        for number, (key, method) in enumerate(METHODS.items()):
            drawn = curves(rows, key, reward, axis)
            if drawn is None or method.goal != "vader":
                continue
            x, y = drawn
            label = f"{method.label} ({len(y)})" if not line and not column else None
            ax.plot(x, y.mean(0), color=f"C{number}", marker=".", label=label)
            ax.fill_between(x, y.min(0), y.max(0), color=f"C{number}", alpha=0.2)
        ax.set_xlabel({"queries": "videos scored", "seconds": "seconds of updates, one thread"}[axis])
        ax.set_title(reward if not line else "")
    axes[0][0].set_ylabel("held-out reward")
    axes[1][0].set_ylabel("held-out reward")
    plot.legend(loc="outside lower center", ncols=4, title="mean and range over seeds (their number)")
    plot.savefig(file, dpi=110)


def stills(names: tuple[str, ...], file: Path):
    """A row per evaluation (folders in RUNS): the middle frames of its first eight videos, at half size."""
    rows = []
    for name in names:
        films = [iio.imread(methods.RUNS / name / f"{n:03d}.mp4", plugin="FFMPEG") for n in range(8)]
        rows.append(np.concatenate([film[len(film) // 2, ::2, ::2] for film in films], axis=1))
    iio.imwrite(file, np.concatenate(rows))


def sweep(methods: list[str]):
    """Four trials of each method on aesthetic, seed 100, in 100 seconds of updates each: bench/sweep.csv."""
    found = []
    for key in methods:
        method = METHODS[key]
        for lr, batch in itertools.product(method.rates, method.batches):
            name = f"sweep-{key}-{lr:g}-" + "-".join(str(n) for n in batch.values())
            trial = dataclasses.replace(method, settings=method.settings | batch | {"lr": lr})
            trial.queries = 10**9
            rows = train(name, trial, "aesthetic", 100, seconds_limit=100)
            last = table_rows((key, "aesthetic", 100), rows)[-1]
            found.append({"lr": f"{lr:g}", "videos at once": batch["batch_size"]} | last)
    for row in tables.merge(HERE / "sweep.csv", found, ("method", "lr", "videos at once")):
        print(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=list(REWARDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--sweep", action="store_true", help="tune instead of comparing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.sweep:
        return sweep(args.methods)
    found, judged, keys = [], [], ("method", "reward", "seed")
    for seed, reward, key in itertools.product(args.seeds, args.rewards, args.methods):
        name, method = (key, reward, seed), METHODS[key]
        gold = method.goal == "vader" and reward in judges.REWARDS
        run = train("-".join(map(str, name)), method, reward, seed, gold=gold)
        found += table_rows(name, run)
        judged += gold_rows(name, run)
        rows = tables.merge(HERE / "efficiency.csv", found, keys)
        if judged:
            tables.merge(HERE / "efficiency_gold.csv", judged, keys)
    figure(rows, HERE / "efficiency.png")
    tables.merge(HERE / "reached.csv", summary(rows), ("reward", "method"))
    judged = tables.merge(HERE / "efficiency_gold.csv", judged, keys)
    tables.merge(HERE / "reached_gold.csv", gold_summary(judged), ("reward", "method"))
    tables.figure(gold_panels(judged), HERE / "efficiency_gold.png", "base, then each evaluation")
    if all((methods.RUNS / name).is_dir() for name in SHOWN):
        stills(SHOWN, HERE / "frames.png")


if __name__ == "__main__":
    main()
