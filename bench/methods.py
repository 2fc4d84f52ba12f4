"""Methods that are compared on the tiny text-to-video model, and a run of one of them.

Evaluation is the same for all: DDIM without noise, all frames of 32 videos of held-out prompts, the same
noise; and, where gold is asked for, bench/judges.py on 32 prompts of words never trained on together. Each
run keeps its rows and a checkpoint in runs/efficiency/ and goes on from there.
"""

import dataclasses
import functools
import io
import json
import math
import sys
import time
from pathlib import Path

import ddpo
import dpo
import judges
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)

RUNS = HERE.parent / "runs" / "efficiency"
VIDEOS = 32  # of held-out prompts, in an evaluation
STEPS, MARKS = 5, (0.25, 0.5, 1)  # of sampling; shares of the queries after which to evaluate
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


def open_run(settings: dict, reward: str, seed: int, more=()):
    """A vader.Run with these settings, its optimiser, prompts to train on, held-out ones, and the judge.

    more: prompts that are encoded, too.
    """
    common = dict(model="tiny", prompts=str(HERE.parent / "prompts.txt"), num_inference_steps=STEPS)
    cfg = vader.Config(reward=reward, seed=seed, watch="none", **common | settings)
    cfg = vader.resolve(cfg)
    prompts, held_out = vader.split_prompts(cfg)
    run = vader.load_run(cfg, prompts + held_out + list(more))
    optimizer = vader.make_optimizer(run)
    # everybody is judged by the same deterministic sampler and the same noise
    quiet = dataclasses.replace(cfg, eta=0.0, seed=0, batch_size=4, out=str(RUNS))
    judge = dataclasses.replace(run, cfg=quiet, schedule=run.model.schedule(quiet))
    return run, optimizer, prompts, [held_out[n % len(held_out)] for n in range(VIDEOS)], judge


def evaluation(judge, held_out: list[vader.Prompt], folder: str, unseen: list[vader.Prompt]) -> dict:
    """{"values": the held-out videos' rewards, "judged": what bench/judges.py sees of unseen prompts}."""
    values = vader.evaluate(judge, held_out, folder)["reward"]
    return {"values": values, "judged": judges.judge(judge, unseen, *judges.load())}


def base_evaluation(judge, held_out: list[vader.Prompt], unseen: list[vader.Prompt]) -> dict:
    """Before any update: a new LoRA changes nothing, so it is the same for all runs."""
    cfg = judge.cfg
    file = RUNS / f"{cfg.reward}-{cfg.num_inference_steps}-{cfg.timestep_spacing}-{len(unseen)}.json"
    if not file.exists():
        vader.write_atomic(file, json.dumps(evaluation(judge, held_out, file.stem, unseen)))
    return json.loads(file.read_text())


def train(name: str, method: Method, reward: str, seed: int, marks=MARKS, seconds_limit=math.inf, gold=False):
    """One run up to its queries or seconds; goes on from its last evaluation.

    marks: shares of the queries after which to evaluate; so it does before the first update and at the end.
    gold: is it judged on unseen prompts, too? Returns a row per evaluation:
    {"queries", "seconds", "step", "mean", "values": of every video, "judged": of every video of those}.
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
    unseen = judges.unseen_prompts() if gold else []
    run, optimizer, prompts, held_out, judge = open_run(method.settings, reward, seed, unseen)
    weights = vader.lora_parameters(run.model)
    if rows:
        state = torch.load(state_file, weights_only=True)
        run.model.denoiser.load_state_dict(state["lora"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    while True:
        passed = [queries >= mark * method.queries for mark in marks]
        if not rows or sum(passed) >= len(rows) or over():
            if rows:
                found = evaluation(judge, held_out, f"{name}/{queries:04d}", unseen)
            else:
                found = base_evaluation(judge, held_out, unseen)
            row = {"queries": queries, "seconds": round(seconds, 1), "step": step}
            rows.append(row | {"mean": float(np.mean(found["values"]))} | found)
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
