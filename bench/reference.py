"""One graph through sampler, VAE and reward, as the paper's code makes it, next to our cut one.

    python bench/reference.py                    # tiny model, K = 1, 2, 4, 8 of 10 steps, 5 pairs, 5 minutes

Both get the same modules, LoRA, noise, prompts and frames. Writes bench/reference.csv: the relative
difference of the gradients, the peak of live storages beyond the weights, and seconds, as ratios in one run.
Ours with and without checkpointing; one graph without, as in the paper's code on this model, which has none.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import numpy as np
import torch
from fake import LiveStorages

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)


def one_graph(run, batch):
    """Add the loss's LoRA gradients by plain autograd through batch.trained, the last steps.

    With run.cfg.coupling 1 also through the steps' inputs, else not; run.cfg.detach_uncond is followed.
    """
    cfg, model, schedule = run.cfg, run.model, run.schedule
    x = schedule.start * batch.noise
    both = {name: torch.cat([batch.uncond[name], batch.cond[name]]) for name in batch.cond}
    for i, t in enumerate(schedule.t):
        with torch.set_grad_enabled(i >= min(batch.trained)):
            seen = x if cfg.coupling == 1 else x.detach()
            f_uncond, f_cond = model.denoise(schedule.c[i] * torch.cat([seen, seen]), t, both).chunk(2)
            f_uncond = f_uncond.detach() if cfg.detach_uncond else f_uncond
            w = model.guidance(cfg.guidance_scale, t, x.shape[2])
            x = schedule.a[i] * x + schedule.b[i] * (f_uncond + w * (f_cond - f_uncond))
    video, texts = model.decode(x, batch.picks), [prompt.text for prompt in batch.prompts]
    (-sum(weight * reward(video, texts) for weight, reward in run.terms.values()).mean()).backward()


def cut(run, batch):
    """The same by the trainer's rollout, score and walk back."""
    latents = vader.rollout(run, batch)
    _, g = vader.score(run, batch, latents[-1])
    vader.walk_back(run, batch, latents, g)


def gradient(way, run, batch):
    """The LoRA's gradient of a way as one vector, the way's peak in MB, and its seconds."""
    parameters = list(vader.lora_parameters(run.model).values())
    for p in parameters:
        p.grad = None
    start = time.perf_counter()
    way(run, batch)
    seconds = time.perf_counter() - start
    vector = torch.cat([p.grad.flatten().double() for p in parameters])
    for p in parameters:
        p.grad = None
    with LiveStorages() as memory:
        way(run, batch)
    return vector, memory.peak / 1e6, seconds


def compare(cfg, steps: tuple[int, ...], pairs: int) -> list[dict]:
    """A row for each K: gradient difference, MB of both and of ours checkpointed, median ratio of seconds."""
    cfg = vader.resolve(cfg)
    prompts = vader.read_prompts(cfg.prompts)[: cfg.batch_size]
    run = vader.load_run(cfg, prompts)
    torch.manual_seed(1)
    for name, p in vader.lora_parameters(
        run.model
    ).items():  # away from its start, where half has no gradient
        p.data.normal_(std=0.05 if "lora_B" in name else 0.2)
    generator, T = vader.generator_for("reference"), cfg.num_inference_steps
    noise = torch.randn(len(prompts), *run.model.latent_shape(cfg), generator=generator)
    batch = vader.make_batch(run, prompts, noise, generator, picks=[0])
    batches = {K: batch._replace(trained=list(range(T - K, T))) for K in steps}
    rows = []
    for K, batch in batches.items():
        found = [[gradient(way, run, batch) for way in (one_graph, cut)] for _ in range(pairs)]
        (one, one_peak, _), (ours, our_peak, _) = found[0]
        ratios = [pair[1][2] / pair[0][2] for pair in found]
        row = {"K": K, "gradient difference": f"{(ours - one).norm() / one.norm():.1e}"}
        row |= {"one graph MB": f"{one_peak:.1f}", "cut MB": f"{our_peak:.1f}"}
        row |= {"seconds ratio": f"{np.median(ratios):.2f}", "from": f"{min(ratios):.2f}"}
        rows.append(row | {"to": f"{max(ratios):.2f}"})
        print(rows[-1], flush=True)
    run.model.recompute()
    for row in rows:
        _, peak, _ = gradient(cut, run, batches[row["K"]])
        row["cut and checkpointed MB"] = f"{peak:.1f}"
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    cfg = vader.Config(model=args.model, prompts=str(HERE.parent / "prompts.txt"), watch="none")
    rows = compare(cfg, (1, 2, 4, 8), args.pairs)
    with open(HERE / "reference.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
