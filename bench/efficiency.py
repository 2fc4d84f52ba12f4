"""Reward on held-out prompts against reward queries and seconds: VADER, our best setting, DDPO, DPO.

    python bench/efficiency.py                        # every run, about 3 1/2 hours of a core
    python bench/efficiency.py --rewards hps          # only these rewards' runs (--methods, --seeds likewise)
    python bench/efficiency.py --sweep                # learning rate x batch: sweep.csv, 35 minutes of a core

On the tiny text-to-video model, 5 sampling steps for all but `ten`, its own guided steps, and `few`, four
from tiny/few, which are compared with each other. A query is one video scored. Seconds are the processor's in
the updates (evaluations left out), on the one thread that a run uses: start several commands to use more
cores, and compare only what one machine made. Each run keeps its rows and a checkpoint in runs/efficiency/
and goes on from there; the CSV keeps the rows of runs that are gone.
VADER's image rewards see one frame of each video; DDPO and DPO, which pay no gradient, see all, which makes
their reward less noisy. Evaluation is the same for all: DDIM without noise, all frames of 32 videos of
held-out prompts, the same noise.
"""

import argparse
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import sys
import time
from pathlib import Path

import ddpo
import dpo
import imageio.v3 as iio
import matplotlib
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)
from extras import watch  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (needs the line above)

RUNS = HERE.parent / "runs" / "efficiency"
REWARDS, SEEDS, VIDEOS = ("aesthetic", "hps", "action"), (0, 1, 2), 32
STEPS, MARKS = 5, (0.25, 0.5, 1)  # of sampling; shares of the queries after which to evaluate
# the evaluations in frames.png
SHOWN = "aesthetic-5-trailing", "vader-aesthetic-1/0020", "vader-aesthetic-1/0080", "ddpo-aesthetic-1/0200"
# settings of vader.Config; learning rate and batch are the best of sweep.csv, those of BEST are VADER's
SWEPT, DPO = dict(lr=3e-3, batch_size=2), dict(lr=3e-3, batch_size=4)
DDPO = DPO | dict(eta=1.0, grad_accum=2)
BEST = SWEPT | dict(backprop_steps=3, grad_steps="last", detach_uncond=True)
TEN = SWEPT | dict(num_inference_steps=10)
LOW = dict(lr=1e-3)  # the default of tiny
FEW = SWEPT | dict(num_inference_steps=4, guidance_scale=1.0, base_lora=str(HERE.parent / "tiny" / "few"))


def vader_update(run, prompts, step, optimizer) -> dict:
    """`vader.update` with the arguments and the row of the baselines' `update`."""
    row = vader.update(run, prompts, step, optimizer)
    return {"reward": row["reward"], "queries": run.cfg.batch_size * run.cfg.grad_accum}


@dataclasses.dataclass
class Method:
    """update(run, prompts, step, optimizer) -> {"reward", "queries"}; settings: of vader.Config.

    queries: how many one run may use; rates x batches: learning rates and settings that `--sweep` tries.
    goal: the method whose end is to be reached.
    """

    label: str
    update: object
    settings: dict
    queries: int
    rates: tuple = ()
    batches: tuple = ()
    goal: str = "vader"


RATES, TWO_OR_FOUR = (1e-3, 3e-3), ({"batch_size": 2}, {"batch_size": 4})
FOUR_OR_EIGHT = {"batch_size": 4}, {"batch_size": 8}
METHODS = {
    "vader": Method("VADER, K = 1", vader_update, SWEPT, 80, RATES, TWO_OR_FOUR),
    "best": Method("ours", vader_update, BEST, 80, RATES, TWO_OR_FOUR),
    "ddpo": Method("DDPO", functools.partial(ddpo.update, epochs=2), DDPO, 200, RATES, FOUR_OR_EIGHT),
    "dpo": Method("DPO", functools.partial(dpo.update, draws=4), DPO, 200, RATES, FOUR_OR_EIGHT),
    "ten": Method("ten guided steps, 3e-3", vader_update, TEN, 80, RATES, TWO_OR_FOUR, "ten"),
    "few": Method("tiny/few, 3e-3", vader_update, FEW, 120, RATES, TWO_OR_FOUR, "ten"),
    "ten-low": Method("ten guided steps, 1e-3", vader_update, TEN | LOW, 80, goal="ten-low"),
    "few-low": Method("tiny/few, 1e-3", vader_update, FEW | LOW, 120, goal="ten-low"),
}


def open_run(settings: dict, reward: str, seed: int):
    """A vader.Run with these settings, its optimiser, prompts to train on, held-out ones, and the judge."""
    common = dict(model="tiny", prompts=str(HERE.parent / "prompts.txt"), num_inference_steps=STEPS)
    cfg = vader.Config(reward=reward, seed=seed, watch="none", **common | settings)
    cfg = vader.resolve(cfg)
    prompts, held_out = vader.split_prompts(cfg)
    run = vader.load_run(cfg, prompts + held_out)
    optimizer = vader.make_optimizer(run)
    # everybody is judged by the same deterministic sampler and the same noise
    quiet = dataclasses.replace(cfg, eta=0.0, seed=0, batch_size=4, out=str(RUNS))
    judge = dataclasses.replace(run, cfg=quiet, schedule=run.model.schedule(quiet))
    return run, optimizer, prompts, [held_out[n % len(held_out)] for n in range(VIDEOS)], judge


def base_values(judge, held_out: list[vader.Prompt], reward: str) -> list[float]:
    """The rewards before any update: a new LoRA changes nothing, so they are the same for all runs."""
    file = RUNS / f"{reward}-{judge.cfg.num_inference_steps}-{judge.cfg.timestep_spacing}.json"
    if not file.exists():
        vader.write_atomic(file, json.dumps(vader.evaluate(judge, held_out, file.stem)["reward"]))
    return json.loads(file.read_text())


def train(name: str, method: Method, reward: str, seed: int, marks=MARKS, seconds_limit=math.inf):
    """One run up to its queries or seconds; goes on from its last evaluation.

    marks: shares of the queries after which to evaluate; so it does before the first update and at the end.
    Returns a row per evaluation: {"queries", "seconds", "step", "mean", "values": of every video}.
    """
    out = RUNS / name
    rows, queries, seconds, step = [], 0, 0.0, 0
    file, state_file = out / "rows.json", out / "state.pt"
    if file.exists():
        rows = json.loads(file.read_text())
        queries, seconds, step = (rows[-1][key] for key in ("queries", "seconds", "step"))

    def over():
        return queries >= method.queries or seconds >= seconds_limit

    if over():
        return rows
    run, optimizer, prompts, held_out, judge = open_run(method.settings, reward, seed)
    weights = vader.lora_parameters(run.model)
    if rows:
        state = torch.load(state_file, weights_only=True)
        run.model.denoiser.load_state_dict(state["lora"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    while True:
        passed = [queries >= mark * method.queries for mark in marks]
        if not rows or sum(passed) >= len(rows) or over():
            if rows:
                values = vader.evaluate(judge, held_out, f"{name}/{queries:04d}")["reward"]
            else:
                values = base_values(judge, held_out, reward)
            row = {"queries": queries, "seconds": round(seconds, 1), "step": step}
            rows.append(row | {"mean": float(np.mean(values)), "values": values})
            state = {"lora": {n: p.detach() for n, p in weights.items()}, "optimizer": optimizer.state_dict()}
            torch.save(state, content := io.BytesIO())
            vader.write_atomic(state_file, content.getvalue())
            vader.write_atomic(file, json.dumps(rows))
            print(f"{name}: {queries} queries, {seconds:.0f} s, {rows[-1]['mean']:.3f}", flush=True)
        if over():
            return rows
        start = time.process_time()
        row = method.update(run, prompts, step, optimizer)
        queries, step = queries + row["queries"], step + 1
        seconds += time.process_time() - start


def table_rows(name: tuple, rows: list[dict]) -> list[dict]:
    """Rows of efficiency.csv of one run; name: (method, reward, seed)."""
    head = dict(zip(("method", "reward", "seed"), name, strict=True))
    found = []
    for row in rows:
        gain, error = watch.paired_gain(rows[0]["values"], row["values"])
        figures = {"mean": f"{row['mean']:.4f}", "gain": f"{gain:.4f}", "error": f"{error:.4f}"}
        found.append(head | {"queries": row["queries"], "seconds": row["seconds"]} | figures)
    return found


def merge(file: Path, found: list[dict], keys: tuple) -> list[dict]:
    """Write a CSV of these rows and of the runs (told by `keys`) that it held and are not among them."""
    stored = []
    if file.exists():
        with open(file, newline="") as old:
            stored = list(csv.DictReader(old))
    made = {tuple(str(row[key]) for key in keys) for row in found}
    rows = [row for row in stored if tuple(row[key] for key in keys) not in made] + found
    rows.sort(key=lambda row: [str(row[key]) for key in keys] + [int(row.get("queries", 0))])
    with open(file, "w", newline="") as new:
        table = csv.DictWriter(new, rows[0])
        table.writeheader()
        table.writerows(rows)
    return rows


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
        films = [iio.imread(RUNS / name / f"{n:03d}.mp4", plugin="FFMPEG") for n in range(8)]
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
    for row in merge(HERE / "sweep.csv", found, ("method", "lr", "videos at once")):
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
    found = []
    for seed, reward, method in itertools.product(args.seeds, args.rewards, args.methods):
        name = method, reward, seed
        found += table_rows(name, train("-".join(map(str, name)), METHODS[method], reward, seed))
        rows = merge(HERE / "efficiency.csv", found, ("method", "reward", "seed"))
    figure(rows, HERE / "efficiency.png")
    merge(HERE / "reached.csv", summary(rows), ("reward", "method"))
    if all((RUNS / name).is_dir() for name in SHOWN):
        stills(SHOWN, HERE / "frames.png")


if __name__ == "__main__":
    main()
