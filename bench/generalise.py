"""Does what was learned carry over to prompts that were never trained on, and where is it too much?

    python bench/generalise.py                    # three rewards x two seeds, about 2 hours of a core
    python bench/generalise.py --rewards hps      # only this one (--seeds likewise)
    python bench/generalise.py --prompts          # only prompts.csv, about 6 hours of a core

Trains the tiny model on each reward on prompts.txt without the words of HELD_OUT, and makes videos of three
sets of prompts, same noise: those trained on; combinations of the same words that were not, each word as
often; those trained on with the colour or the object, in turn, replaced by a held-out word.
bench/generalise.csv: mean reward of base and tuned, and the gain with its paired standard error.
bench/scales.csv: the unseen combinations with the LoRA at a scale from 0 to 1: the reward trained on, the
others, how much moves (`dynamic`), and how different the samples of one prompt are (`diversity`).
bench/prompts.csv (--prompts): what a LoRA gains on prompts with a held-out word when it was trained on few
prompts without one, on every such prompt, on half of those with one, or on all of these: the control, since
what can be gained differs from prompt to prompt.
"""

import argparse
import contextlib
import itertools
import re
import sys
from pathlib import Path

import methods
import numpy as np
import tables
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)
from extras import watch  # noqa: E402
from rewards import IMAGENET_MEAN, IMAGENET_STD, evenly_spaced, make_terms, preprocess, weighted_rewards  # noqa: E402

RUNS = HERE.parent / "runs" / "generalise"
HELD_OUT = ("purple", "kite")
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
COMMON = dict(model="tiny", num_inference_steps=methods.STEPS)
# what hps and action ask for is decided in the early steps, so they train too
EARLY = dict(backprop_steps=3, grad_steps="spread", coupling=0.0, batch_size=4, lr=2e-3, steps=80)
SETTINGS = {
    "aesthetic": dict(backprop_steps=1, batch_size=2, lr=1e-3, steps=60),
    "hps": EARLY,
    "action": EARLY,
}
JUDGES = "aesthetic + hps + action + dynamic"
PARTS = (
    "with a held-out word",
    "with a held-out word, not in half",
    "without held-out words",
)  # of prompts.csv
BASE = {}  # scores of the base model's videos, {prompt set: {judge: (videos,)}}


def words_of(prompt: str) -> tuple[str, ...]:
    """Colour, object, motion, place."""
    return re.fullmatch(r"a (\w+) (\w+) (rising|falling|drifting \w+) (.+)", prompt).groups()


def shipped_prompts() -> list[str]:
    return [prompt.text for prompt in vader.read_prompts(str(HERE.parent / "prompts.txt"))]


def trained_prompts() -> list[str]:
    """The prompts of prompts.txt without a held-out word."""
    return [prompt for prompt in shipped_prompts() if not any(word in prompt for word in HELD_OUT)]


def all_prompts(held_out: bool) -> list[str]:
    """Every combination of the words of prompts.txt with a held-out word, or without, in random order."""
    columns = zip(*map(words_of, shipped_prompts()), strict=True)
    every = ["a " + " ".join(words) for words in itertools.product(*map(sorted, map(set, columns)))]
    chosen = [prompt for prompt in every if any(word in prompt for word in HELD_OUT) == held_out]
    return np.random.default_rng(0).permutation(chosen).tolist()


def prompt_sets(videos: int) -> dict[str, list[str]]:
    """{"trained on", "unseen combinations", "unseen words"}: that many prompts each."""
    known, draw = trained_prompts(), np.random.default_rng(0)
    trained = [known[n % len(known)] for n in range(videos)]
    parts = [words_of(prompt) for prompt in trained]
    combined = []
    while len(combined) < videos:
        prompt = "a " + " ".join(draw.choice(column) for column in zip(*parts, strict=True))
        if prompt not in known + combined:
            combined.append(prompt)
    strange = [
        f"a {colour} {HELD_OUT[1]} {how} {where}" if n % 2 else f"a {HELD_OUT[0]} {thing} {how} {where}"
        for n, (colour, thing, how, where) in enumerate(parts)
    ]
    return {"trained on": trained, "unseen combinations": combined, "unseen words": strange}


def train(reward: str, seed: int, name: str, prompts: list[str]) -> Path:
    """Train on these prompts, unless that is done; the LoRA's folder."""
    out, file = RUNS / f"{reward}-{seed}-{name}", RUNS / f"{name}.txt"
    vader.write_atomic(file, "\n".join(prompts))
    settings = COMMON | SETTINGS[reward] | dict(reward=reward, seed=seed, out=str(out))
    rows = vader.read_metrics(out)
    if not rows or rows[-1]["step"] < settings["steps"]:
        settings |= dict(resume=(out / "config.json").exists(), eval_every=settings["steps"], eval_videos=4)
        vader.train(vader.Config(**settings, prompts=str(file), eval_prompts=str(file), watch="none"))
    return out / "lora"


def load(lora: Path, prompts: list[str], judges=JUDGES):
    """A vader.Run with a trained LoRA and these judges."""
    cfg = vader.Config(lora=str(lora), reward=judges, mode="eval", batch_size=4, **COMMON)
    cfg = vader.resolve(cfg)
    return vader.load_run(cfg, [vader.Prompt(text) for text in prompts])


@contextlib.contextmanager
def with_lora(model, weights: dict):
    """Inside, the LoRA has these weights, {name: tensor}; those that are not named stay."""
    own = {name: p.detach().clone() for name, p in vader.lora_parameters(model).items()}
    model.denoiser.load_state_dict(weights, strict=False)
    try:
        yield
    finally:
        model.denoiser.load_state_dict(own, strict=False)


def scaled(run, scale: float):
    """Inside, the LoRA counts `scale` times."""
    weights = vader.lora_parameters(run.model)
    return with_lora(run.model, {n: p.detach() * scale for n, p in weights.items() if "lora_B" in n})


@torch.no_grad()
def videos_of(run, prompts: list[str]):
    """A video per prompt, (B, F, 3, H, W); the same noise at every call."""
    size, prompts = run.cfg.batch_size, [vader.Prompt(text) for text in prompts]
    parts = [vader.make_videos(run, prompts[n : n + size], n) for n in range(0, len(prompts), size)]
    return torch.cat(parts)


def diversity(run, prompt: str, samples=64) -> float:
    """Mean distance between samples of one prompt in the features (mean of tokens) of action's VideoMAE."""
    (network,) = make_terms("action", "cpu", torch.float32, vader.TOY)["action"][1].networks
    video = videos_of(run, [prompt] * samples)
    clip = video[:, evenly_spaced(network.config.num_frames, video.shape[1])]
    with torch.no_grad():
        pixels = preprocess(clip, network.config.image_size, IMAGENET_MEAN, IMAGENET_STD)
        pixels = pixels.unflatten(0, clip.shape[:2])
        features = network.videomae(pixel_values=pixels).last_hidden_state.mean(1)
    return torch.pdist(features).mean().item()


def judge(run, prompts: list[str]) -> dict[str, np.ndarray]:
    """{judge: score of each prompt's video}."""
    found = weighted_rewards(run.terms, videos_of(run, prompts), prompts, run.cfg.decode_chunk)
    return {name: found[name].numpy() for name in run.terms}


def study(reward: str, seed: int, videos: int) -> list[dict]:
    """Rows of generalise.csv for one run."""
    sets, rows = prompt_sets(videos), []
    run = load(train(reward, seed, "few", trained_prompts()), sum(sets.values(), []))
    for name, prompts in sets.items():
        if name not in BASE:
            with scaled(run, 0.0):
                BASE[name] = judge(run, prompts)
        base, tuned = BASE[name][reward], judge(run, prompts)[reward]
        gain, error = watch.paired_gain(base, tuned)
        numbers = dict(base=base.mean(), tuned=tuned.mean(), gain=gain, error=error)
        row = {"reward": reward, "prompts": name, "seed": seed}
        rows.append(row | {key: f"{value:.3f}" for key, value in numbers.items()})
        print(rows[-1], flush=True)
    return rows


def strengths(reward: str, videos: int, samples: int) -> list[dict]:
    """Rows of scales.csv for one reward, of its run with seed 0."""
    prompts, rows = prompt_sets(videos)["unseen combinations"], []
    run = load(train(reward, 0, "few", trained_prompts()), prompts)
    for scale in SCALES:
        with scaled(run, scale):
            means = {name: f"{values.mean():.3f}" for name, values in judge(run, prompts).items()}
            means["diversity"] = f"{diversity(run, prompts[0], samples):.3f}"
        rows.append({"trained on": reward, "scale": scale} | means)
        print(rows[-1], flush=True)
    return rows


def how_many_prompts(reward: str, seed: int, videos: int, videos_held_out: int) -> list[dict]:
    """Rows of prompts.csv for four runs with the same settings and seed, on the same videos."""
    known, strange = all_prompts(held_out=False), all_prompts(held_out=True)
    half = len(strange) // 2
    taught = {"few": trained_prompts(), "many": known, "half": strange[:half], "held-out": strange}
    strange, known = strange[:videos_held_out], known[:videos]
    slices = slice(len(strange)), slice(half, len(strange)), slice(len(strange), None)

    def scores(run):  # set by set, as the noise starts anew with each
        return np.concatenate([judge(run, shown)[reward] for shown in (strange, known)])

    base, rows = None, []
    for name, prompts in taught.items():
        run = load(train(reward, seed, name, prompts), strange + known, judges=reward)
        if base is None:
            with scaled(run, 0.0):
                base = scores(run)
        tuned = scores(run)
        for shown, part in zip(PARTS, slices, strict=True):
            gain, error = watch.paired_gain(base[part], tuned[part])
            row = {"reward": reward, "prompts": shown, "trained on": f"{len(prompts)}, {name}", "seed": seed}
            numbers = dict(base=base[part].mean(), gain=gain, error=error)
            rows.append(row | {key: f"{value:.3f}" for key, value in numbers.items()})
            print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rewards", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--prompts", action="store_true", help="only bench/prompts.csv")
    args = parser.parse_args()
    rows, scales = [], []
    if args.prompts:
        for seed, reward in itertools.product(args.seeds, args.rewards):
            rows += how_many_prompts(reward, seed, videos=96, videos_held_out=176)
            tables.merge(HERE / "prompts.csv", rows, ("reward", "prompts", "trained on", "seed"))
        return
    for seed, reward in itertools.product(args.seeds, args.rewards):
        rows += study(reward, seed, videos=102)
        tables.merge(HERE / "generalise.csv", rows, ("reward", "prompts", "seed"))
    for reward in args.rewards:
        scales += strengths(reward, videos=32, samples=64)
        tables.merge(HERE / "scales.csv", scales, ("trained on", "scale"))


if __name__ == "__main__":
    main()
