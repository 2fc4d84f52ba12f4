"""What keeps the videos good while the reward rises? Each way of training, beside judges that no reward uses.

    python bench/gold.py                              # 2 rewards x 13 ways x 3 seeds, about 3 hours of a core
    python bench/gold.py --rewards hps --seeds 0      # only these (--ways likewise); finished runs are kept

Trains `tiny-few` for 80 updates, and scores it after 20, 40 and 80, and the last LoRA at three strengths,
on the prompts of tiny/unseen.txt, with noise of the run's own seed. Proxy: the reward that is trained on.
Judges: the other rewards of JUDGES. Gold: what the detectors of tiny/ see, colour, object, motion and place
as told, which nothing is ever trained on. Writes bench/gold.csv, the mean of each over the videos and its
paired change from the base model; bench/gold.png, gold against proxy (Gao et al. 2023, arXiv 2210.10760).
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path

import efficiency
import matplotlib.pyplot as plt
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tiny")]
from train_detector import load_detector  # noqa: E402 (needs the line above)
from world import COMBINATIONS, caption  # noqa: E402

import rewards  # noqa: E402
import vader  # noqa: E402
from extras import watch  # noqa: E402
from extras.lora_scale import at_strength  # noqa: E402

RUNS = HERE.parent / "runs" / "gold"
JUDGES = "aesthetic + clip + hps"
WORDS = ("colour", "object", "motion", "place")
MARKS = (20, 40, 60)  # updates after which it is evaluated
STRENGTHS = (0.25, 0.5, 0.75)  # of the last LoRA; of other ways than "nothing" a half alone
KNOWN = {caption(words): words for words in COMBINATIONS}


# ---- Ways of training --------------------------------------------------------------------------------------
def random_steps(run, batch, latents, g, exact=vader.walk_back):
    """AlignProp: how many of the last steps get a gradient is drawn for each batch."""
    T = len(run.schedule.t)
    drawn = int(torch.randint(1, T + 1, (), generator=batch.generator))
    exact(run, batch._replace(trained=list(range(T - drawn, T))), latents, g)


def stay_near(weight: float):
    """An estimator that adds to the loss the squared distance of f from the base's, at the trained step.

    It is the KL of DPOK (Fan et al. 2023) but for a factor by step: weight x the mean over f's elements.
    """

    def estimator(run, batch, latents, g, exact=vader.walk_back):
        exact(run, batch, latents, g)
        for i in batch.trained:
            x = run.schedule.c[i] * latents[i].detach()
            with torch.no_grad(), run.model.denoiser.disable_adapter():
                base = run.model.denoise(x, run.schedule.t[i], batch.cond)
            f = run.model.denoise(x, run.schedule.t[i], batch.cond)
            (batch.scale * weight * (f - base).square().mean()).backward()

    return estimator


@dataclasses.dataclass
class Way:
    """settings: of vader.Config; add: what is added to the reward; estimator: in place of `walk_back`."""

    settings: dict
    add: str = ""
    estimator: object = vader.walk_back


SPREAD = dict(backprop_steps=3, grad_steps="spread", coupling=0.0)
WAYS = {
    "nothing": Way({}),
    "+ clip": Way({}, " + clip"),
    "+ 3 clip": Way({}, " + 3*clip"),
    "lr 3e-4": Way(dict(lr=3e-4)),
    "lr 3e-3": Way(dict(lr=3e-3)),
    "rank 2": Way(dict(lora_rank=2)),
    "rank 32": Way(dict(lora_rank=32)),
    "spread": Way(SPREAD),
    "random K": Way({}, estimator=random_steps),
    "distance 10": Way({}, estimator=stay_near(10.0)),
    "distance 100": Way({}, estimator=stay_near(100.0)),
}


# ---- Judging -----------------------------------------------------------------------------------------------
@torch.no_grad()
def judge(run, prompts, terms, detector, number=0) -> dict[str, list[float]]:
    """Each judge's value of each prompt's video; of the detector: 1 where it sees what is told.

    number: of the first video, which its noise depends on.
    """
    values = {}
    for first in range(0, len(prompts), 8):
        chosen = prompts[first : first + 8]
        texts = [prompt.text for prompt in chosen]
        videos = vader.make_videos(run, chosen, number + first)
        figures = rewards.weighted_rewards(terms, videos, texts, videos.shape[1])
        del figures["reward"]
        told = torch.tensor([KNOWN[text] for text in texts])
        for k, logits in enumerate(detector(videos)):
            figures[WORDS[k]] = (logits.argmax(1) == told[:, k]).float()
        for name, value in figures.items():
            values.setdefault(name, []).extend(value.tolist())
    return values


def file_of(reward: str, name: str, seed: int) -> Path:
    return RUNS / f"{reward}-{name}-{seed}.json".replace(" ", "_")


def measure(reward: str, name: str, seed: int) -> list[dict]:
    """Train one run and judge it -> rows {"update", "strength", "seconds", values by judge}."""
    file = file_of(reward, name, seed)
    if file.exists():
        return json.loads(file.read_text())
    way = WAYS[name]
    files = dict(prompts=str(HERE.parent / "prompts.txt"), out=str(file.with_suffix("")))
    settings = dict(model="tiny-few", seed=seed, steps=MARKS[-1], watch="none") | files | way.settings
    cfg = vader.resolve(vader.Config(reward + way.add, **settings))
    prompts, _ = vader.split_prompts(cfg)
    unseen = vader.read_prompts(str(HERE.parent / "tiny" / "unseen.txt"))
    run = vader.load_run(cfg, prompts + unseen)
    terms = rewards.make_terms(JUDGES, "cpu", torch.float32, vader.TOY)
    detector = load_detector(HERE.parent / "tiny")
    optimizer = vader.make_optimizer(run)
    vader.walk_back = way.estimator
    seconds, rows = 0.0, []

    def evaluate(update, strength, values=None):
        if values is None:
            with at_strength(run.model, strength):
                values = judge(run, unseen, terms, detector)
        rows.append({"update": update, "strength": strength, "seconds": round(seconds, 1), "values": values})

    base = RUNS / f"base-{seed}.json"
    if base.exists():
        evaluate(0, 0.0, json.loads(base.read_text()))
    else:
        evaluate(0, 0.0)
        vader.write_atomic(base, json.dumps(rows[0]["values"]))
    for step in range(cfg.steps):
        start = time.process_time()
        vader.update(run, prompts, step, optimizer)
        seconds += time.process_time() - start
        if step + 1 in MARKS:
            evaluate(step + 1, 1.0)
    for strength in STRENGTHS if name == "nothing" else (0.5,):
        evaluate(cfg.steps, strength)
    vader.save_lora(run.model, Path(cfg.out) / "lora", cfg)
    vader.write_atomic(file, json.dumps(rows))
    return rows


# ---- Tables ------------------------------------------------------------------------------------------------
def table_rows(name: tuple, rows: list[dict]) -> list[dict]:
    """Rows of gold.csv of a run, means over its videos and their paired gains. name: reward, way, seed."""
    head = dict(zip(("reward", "way", "seed"), name, strict=True))
    base, made = rows[0]["values"], []
    for row in rows:
        found = head | {key: row[key] for key in ("update", "strength", "seconds")}
        values = row["values"] | {"as told": as_told(row["values"])}
        before = base | {"as told": as_told(base)}
        for judge_name, scores in values.items():
            gain, error = watch.paired_gain(before[judge_name], scores)
            found[judge_name] = f"{np.mean(scores):.3f}"
            found[f"{judge_name} gain"] = f"{gain:.4f}"
            found[f"{judge_name} error"] = f"{error:.4f}"
        made.append(found)
    return made


def as_told(values: dict) -> list[float]:
    """The share of the four words that the detectors see in each video."""
    return np.mean([values[word] for word in WORDS], axis=0).tolist()


def pooled(rows: list[dict], name: str) -> tuple[float, float]:
    """A judge's mean gain over the seeds at one point, and its standard error, by the videos of all."""
    gains = [float(row[f"{name} gain"]) for row in rows]
    errors = [float(row[f"{name} error"]) for row in rows]
    return np.mean(gains), np.sqrt(np.sum(np.square(errors))) / len(errors)


def summary(rows: list[dict]) -> list[dict]:
    """A row for each reward, way, update and strength: gains over the seeds, with standard errors."""
    points = {}
    for row in rows:
        if float(row["strength"]) > 0:
            key = row["reward"], row["way"], int(row["update"]), float(row["strength"])
            points.setdefault(key, []).append(row)
    found = []
    for (reward, way, update, strength), group in points.items():
        line = {"reward": reward, "way": way, "update": update, "strength": strength, "seeds": len(group)}
        for name in (*JUDGES.split(" + "), "as told"):
            gain, error = pooled(group, name)
            line[name] = f"{gain:+.3f} ({error:.3f})"
        found.append(line)
    return found


def figure(rows: list[dict], file: Path):
    """Gold against proxy, a panel for each reward: a line for each way, through its updates; half: hollow."""
    lines = summary(rows)
    names = list(dict.fromkeys(line["reward"] for line in lines))
    plot, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 5), squeeze=False, layout="constrained")
    for ax, reward in zip(axes[0], names, strict=True):
        for number, way in enumerate(WAYS):
            points = [line for line in lines if (line["reward"], line["way"]) == (reward, way)]
            if not points:
                continue
            colour = f"C{number % 10}" if number < 10 else "black"
            place = {}
            for line in points:
                x, y = (float(line[name].split()[0]) for name in (reward, "as told"))
                place[line["update"], line["strength"]] = x, y
            full = [(0, 0)] + [place[update, 1.0] for update in MARKS]
            ax.plot(*zip(*full, strict=True), marker="o", color=colour, label=way)
            weaker = [place[key] for key in place if key[1] < 1]
            ax.plot(*zip(*weaker, strict=True), "o", color=colour, mfc="white")
        ax.axhline(0, color="grey", lw=0.5)
        ax.set_xlabel(f"gain of {reward}, which is trained on")
        ax.set_ylabel("gain of the share of words that are seen as told")
    axes[0][0].legend(title="20, 40, 60 updates; hollow: weaker LoRA", fontsize=8)
    plot.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rewards", nargs="+", default=["aesthetic", "hps"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="of runs that are finished, without training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed, reward, way in itertools.product(args.seeds, args.rewards, args.ways):
        name = reward, way, seed
        if args.table and not file_of(*name).exists():
            continue
        found += table_rows(name, measure(*name))
        print(*name, found[-1], flush=True)
        rows = efficiency.merge(HERE / "gold.csv", found, ("reward", "way", "seed"))
    figure(rows, HERE / "gold.png")
    for line in summary(rows):
        print(line)


if __name__ == "__main__":
    main()
