"""Does what was learned carry over to prompts that were never trained on, and where is it too much?

    python bench/generalise.py                    # three rewards, 25 minutes of one core
    python bench/generalise.py --rewards hps      # only this one

Trains the tiny model on each reward on prompts.txt without the words of HELD_OUT, and makes videos of three
sets of prompts: those trained on; combinations of the same words that were not; prompts with a held-out word.
bench/generalise.csv: mean reward of base and tuned, and the gain with its paired standard error.
bench/scales.csv: the unseen combinations with the LoRA at a scale from 0 to 1: the reward trained on, the
others, how much moves (`dynamic`), and how different the samples of one prompt are (`diversity`).
"""

import argparse
import csv
import sys
from pathlib import Path

import efficiency
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)
from rewards import IMAGENET_MEAN, IMAGENET_STD, make_terms, preprocess  # noqa: E402

RUNS = HERE.parent / "runs" / "generalise"
HELD_OUT = ("purple", "kite")
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
SETTINGS = dict(model="tiny") | efficiency.METHODS["best"].settings
JUDGES = "aesthetic + hps + action + dynamic"


def prompt_sets(videos: int) -> dict[str, list[str]]:
    """{"trained on", "unseen combinations", "unseen words"}: that many prompts each."""
    known, unseen = (vader.read_prompts(str(HERE.parent / f)) for f in ("prompts.txt", "tiny/unseen.txt"))
    strange = [p for p in known + unseen if any(word in p for word in HELD_OUT)]
    known, unseen = ([p for p in ps if p not in strange] for ps in (known, unseen))
    sets = {"trained on": known, "unseen combinations": unseen, "unseen words": strange}
    return {name: [found[n % len(found)] for n in range(videos)] for name, found in sets.items()}


def train(reward: str, steps: int) -> Path:
    """Train on the prompts without the held-out words, unless that is done; the LoRA's folder."""
    out = RUNS / reward.replace(":", "-")
    file = RUNS / "prompts.txt"
    known = vader.read_prompts(str(HERE.parent / "prompts.txt"))
    vader.write_text(file, "\n".join(p for p in known if not any(word in p for word in HELD_OUT)))
    common = dict(reward=reward, prompts=str(file), eval_prompts=str(file), steps=steps)
    rows = vader.read_metrics(out)
    if not rows or rows[-1]["step"] < steps:
        resume = (out / "config.json").exists()
        vader.train(
            vader.Config(**common, **SETTINGS, out=str(out), resume=resume, eval_every=steps, eval_videos=4)
        )
    return out / "lora"


def load(lora: Path, prompts: list[str]):
    """A vader.Run with a trained LoRA and all judges."""
    judged = SETTINGS | dict(batch_size=4, num_inference_steps=efficiency.STEPS)
    cfg = vader.Config(lora=str(lora), reward=JUDGES, mode="eval", **judged)
    cfg, source, family = vader.resolve(cfg)
    return vader.load_run(cfg, source, family, prompts)


def scaled(run, scale: float):
    """Inside, the LoRA counts `scale` times."""
    weights = vader.lora_parameters(run.model)
    return vader.swapped(run.model, {n: p.detach() * scale for n, p in weights.items() if "lora_B" in n})


@torch.no_grad()
def videos_of(run, prompts: list[str]):
    """A video per prompt, (B, F, 3, H, W); the same noise at every call."""
    size = run.cfg.batch_size
    parts = [vader.make_videos(run, prompts[n : n + size], n) for n in range(0, len(prompts), size)]
    return torch.cat(parts)


def diversity(run, prompt: str, samples=64) -> float:
    """Mean distance between samples of one prompt in the features (mean of tokens) of action's VideoMAE."""
    (network,) = make_terms("action", "cpu", torch.float32, run.cfg.reward_weights)["action"][1].networks
    video = videos_of(run, [prompt] * samples)
    clip = video[:, torch.linspace(0, video.shape[1] - 1, network.config.num_frames).round().long()]
    with torch.no_grad():
        pixels = preprocess(clip, network.config.image_size, IMAGENET_MEAN, IMAGENET_STD)
        pixels = pixels.unflatten(0, clip.shape[:2])
        features = network.videomae(pixel_values=pixels).last_hidden_state.mean(1)
    return torch.pdist(features).mean().item()


def judge(run, prompts: list[str]) -> dict[str, np.ndarray]:
    """{judge: score of each prompt's video}."""
    found = vader.compute_rewards(run.terms, videos_of(run, prompts), prompts, run.cfg.decode_chunk)
    return {name: found[name].numpy() for name in run.terms}


def study(reward: str, steps: int, videos: int, samples: int) -> tuple[list[dict], list[dict]]:
    """Rows of generalise.csv and of scales.csv for one reward."""
    sets, rows, scales = prompt_sets(videos), [], []
    run = load(train(reward, steps), sum(sets.values(), []))
    for name, prompts in sets.items():
        with scaled(run, 0.0):
            base = judge(run, prompts)[reward]
        tuned = judge(run, prompts)[reward]
        gain = tuned - base
        error = gain.std(ddof=1) / len(gain) ** 0.5
        numbers = dict(base=base.mean(), tuned=tuned.mean(), gain=gain.mean(), error=error)
        rows.append({"reward": reward, "prompts": name} | {k: f"{v:.3f}" for k, v in numbers.items()})
        print(rows[-1], flush=True)
    prompts = sets["unseen combinations"]
    for scale in SCALES:
        with scaled(run, scale):
            means = {name: f"{values.mean():.3f}" for name, values in judge(run, prompts).items()}
            means["diversity"] = f"{diversity(run, prompts[0], samples):.3f}"
        scales.append({"trained on": reward, "scale": scale} | means)
        print(scales[-1], flush=True)
    return rows, scales


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rewards", nargs="+", default=["aesthetic", "hps", "action"])
    args = parser.parse_args()
    rows, scales = [], []
    for reward in args.rewards:
        found = study(reward, steps=60, videos=32, samples=64)
        rows, scales = rows + found[0], scales + found[1]
    for file, found in (("generalise.csv", rows), ("scales.csv", scales)):
        with open(HERE / file, "w", newline="") as target:
            table = csv.DictWriter(target, found[0])
            table.writeheader()
            table.writerows(found)


if __name__ == "__main__":
    main()
