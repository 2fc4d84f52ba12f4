"""What to differentiate: the same seconds of updates for each way of getting a gradient out of a sampler.

    python bench/estimators.py                               # 2 rewards x 7 ways x 3 seeds, about 2 hours
    python bench/estimators.py --rewards aesthetic --seeds 0 # only this; finished runs are kept

Writes bench/estimators.csv: updates made in the time, the gain in held-out reward with its paired standard
error, and what became of motion (`dynamic`) and of the diversity of one prompt's samples (`diversity` of
bench/generalise.py), as a share of the base model's; the change of what the judges of bench/judges.py see of
unseen prompts. Tiny model, 5 steps, learning rate and batch the same.
"""

import argparse
import contextlib
import dataclasses
import itertools
import sys
from pathlib import Path

import diffusers
import generalise
import methods
import tables
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)
from extras import watch  # noqa: E402

SECONDS = 90
DRAWS = 4
BASE = {}  # what `looks` found without a LoRA


def renoise(run, latents, generator):
    """The clean latents noised to where the last step starts: sqrt(A) x0 + sqrt(1 - A) noise, for DDIM."""
    config = vader.read_config(run.model.source, "scheduler/scheduler_config.json")
    alphas = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.double()
    alpha, clean = alphas[run.schedule.t[-1]].item(), latents[-1]
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    return alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise


def redraw(run, batch, latents, g=None, walk_back=vader.walk_back, found=None):
    """DRaFT-LV (Clark et al. 2023, sec. 4.2): DRAWS times, noise the clean video anew and redo the last step.

    Takes what `vader.walk_back` does, and can stand in its place. Each draw has the reward's
    gradient of its own clean video, so g goes unused. found: a list for the draws' rewards, (B,) each.
    """
    tables = {name: getattr(run.schedule, name)[-1:] for name in "tabcs"}
    last = dataclasses.replace(run, schedule=vader.Schedule(**tables))
    for _ in range(DRAWS):
        x = renoise(run, latents, batch.generator)
        again = batch._replace(noise=x, trained=[0], loss_scale=batch.loss_scale / DRAWS)
        redone = vader.rollout(last, again)
        values, g = vader.score(last, again, redone[-1])
        walk_back(last, again, redone, g)
        if found is not None:
            found.append(values["reward"])


def redraw_update(run, prompts, step, optimizer) -> dict:
    """As `vader.update` with `redraw` for `walk_back`, without the score that it would not use."""
    chosen = vader.batch_prompts(prompts, run.cfg, step)
    generator = vader.generator_for(run.cfg.seed, step, "redraw")
    noise = torch.randn(len(chosen), *run.model.latent_shape(run.cfg), generator=generator)
    picks = vader.pick_latent_frames(run, generator)
    batch = vader.make_batch(run, chosen, noise.to(run.model.device), generator, picks)
    latents = vader.rollout(run, batch)
    optimizer.zero_grad()
    found = []
    redraw(run, batch, latents, found=found)
    torch.nn.utils.clip_grad_norm_(list(vader.lora_parameters(run.model).values()), run.cfg.max_grad_norm)
    optimizer.step()
    return {"reward": torch.cat(found).mean().item(), "queries": DRAWS * len(chosen)}


COMMON = dict(lr=1e-3, batch_size=2)
LAST = dict(backprop_steps=3, grad_steps="last")
SPREAD = dict(backprop_steps=3, grad_steps="spread", coupling=0.0)
WAYS = {
    "last step (VADER)": (methods.vader_update, {}),
    "last step, without unconditional branch": (methods.vader_update, {"detach_uncond": True}),
    "last step, leading spacing": (methods.vader_update, {"timestep_spacing": "leading"}),
    "last 3, exact (DRaFT-K)": (methods.vader_update, LAST),
    "last 3, coupling 0.3 (LeapAlign)": (methods.vader_update, LAST | {"coupling": 0.3}),
    "3 spread, detached (DRTune)": (methods.vader_update, SPREAD),
    "last step, redrawn 4 times (DRaFT-LV)": (redraw_update, {}),
}


def looks(settings: dict, lora: dict | None, samples: int) -> tuple[float, float]:
    """Motion of the held-out prompts' videos, and the diversity of the first one's samples; None: base."""
    key = settings.get("timestep_spacing", "trailing"), samples
    if lora is None and key in BASE:
        return BASE[key]
    run, _, _, held_out, judge = methods.open_run(settings, "dynamic", 0)
    texts = [prompt.text for prompt in held_out]
    with generalise.with_lora(run.model, lora) if lora else contextlib.nullcontext():
        motion = generalise.judge(judge, texts)["dynamic"].mean()
        found = motion, generalise.diversity(judge, texts[0], samples)
    if lora is None:
        BASE[key] = found
    return found


def measure(way: str, reward: str, seed: int, seconds=SECONDS, samples=64, gold=True) -> dict:
    """One row: a run of that many seconds, and what its LoRA does. gold: is it judged on unseen prompts?"""
    update, settings = WAYS[way]
    settings = COMMON | settings
    method = methods.Method(way, update, settings, 10**9)
    name = "estimator-" + "-".join(word for word in (*way.replace(",", "").split(), reward, str(seed)))
    rows = methods.train(name, method, reward, seed, seconds_limit=seconds, gold=gold)
    base_motion, base_spread = looks(settings, None, samples)
    state = torch.load(methods.RUNS / name / "state.pt", weights_only=True)
    motion, spread = looks(settings, state["lora"], samples)
    gain, error = watch.paired_gain(rows[0]["values"], rows[-1]["values"])
    row = {"way": way, "reward": reward, "seed": seed, "updates": rows[-1]["step"]}
    row |= {"gain": f"{gain:.3f}", "error": f"{error:.3f}", "motion": f"{motion / base_motion:.2f}"}
    row["diversity"] = f"{spread / base_spread:.2f}"
    if gold:
        row |= tables.gains_in_words([tables.figures_of(rows[0]["judged"], rows[-1]["judged"])])
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rewards", nargs="+", default=["aesthetic", "hps"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed, reward, way in itertools.product(args.seeds, args.rewards, WAYS):
        found.append(measure(way, reward, seed))
        print(found[-1], flush=True)
        tables.merge(HERE / "estimators.csv", found, ("reward", "way", "seed"))


if __name__ == "__main__":
    main()
