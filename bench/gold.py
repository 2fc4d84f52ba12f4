"""What keeps the videos good while the reward rises? Each way of training, beside judges that no reward uses.

    python bench/gold.py                              # 2 rewards x 11 ways x 3 seeds, about 2 hours of a core
    python bench/gold.py --rewards hps --seeds 0      # only these (--ways likewise); finished runs are kept

Trains `tiny-few` for 60 updates, and scores it after 20, 40 and 60, and the last LoRA at lower strengths,
on the prompts of tiny/unseen.txt, with noise of the run's own seed, by the judges of bench/judges.py. Writes
bench/gold.csv, the mean of each over the videos and its paired change from the base model, and
bench/gold.png, gold against proxy.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path

import judges
import tables
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)
from extras.lora_scale import at_strength  # noqa: E402

RUNS = HERE.parent / "runs" / "gold"
MARKS = (20, 40, 60)  # updates after which it is evaluated
STRENGTHS = (0.25, 0.5, 0.75)  # of the last LoRA; of other ways than "nothing" a half alone


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
            (batch.loss_scale * weight * (f - base).square().mean()).backward()

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


# ---- Runs --------------------------------------------------------------------------------------------------
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
    unseen = judges.unseen_prompts()
    run = vader.load_run(cfg, prompts + unseen)
    terms, detector = judges.load()
    optimizer = vader.make_optimizer(run)
    vader.walk_back = way.estimator
    seconds, rows = 0.0, []

    def evaluate(update, strength, values=None):
        if values is None:
            with at_strength(run.model, strength):
                values = judges.judge(run, unseen, terms, detector)
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
    made = []
    for row in rows:
        place = {key: row[key] for key in ("update", "strength", "seconds")}
        made.append(head | place | tables.figures_of(rows[0]["values"], row["values"]))
    return made


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
        found.append(line | tables.gains_in_words(group))
    return found


def panels(rows: list[dict]) -> dict:
    """For tables.figure: of each reward, each way's updates as a line, its weaker LoRAs as points."""
    found = {}
    for line in summary(rows):
        full, weaker = found.setdefault(line["reward"], {}).setdefault(line["way"], ([(0, 0)], []))
        x, y = (float(line[name].split()[0]) for name in (line["reward"], "as told"))
        (full if line["strength"] == 1 else weaker).append((x, y))
    return found


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
        rows = tables.merge(HERE / "gold.csv", found, ("reward", "way", "seed"))
    tables.figure(panels(rows), HERE / "gold.png", "20, 40, 60 updates; hollow: weaker LoRA")
    for line in summary(rows):
        print(line)


if __name__ == "__main__":
    main()
