"""DDPO (Black et al. 2023, arXiv 2305.13301): policy gradients, with the sampler's steps as actions.

A stochastic DDIM step is a Gaussian policy, x[i+1] ~ N(a[i] x[i] + b[i] f, s[i]^2). Each update makes
`batch_size` videos of each of `grad_accum` prompts, rewards whole videos, normalises the rewards within each
prompt (advantages), and takes `epochs` AdamW steps on PPO's clipped loss, where the first is on-policy.

`update` has the place and arguments of vader.update; bench/efficiency.py runs it. Written for the Config of
vader.py with eta = 1 and any model whose sampler takes that. Differs from the paper in one thing: advantages
are normalised by the update's own videos of a prompt, not by a running history of that prompt.
"""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vader  # noqa: E402 (needs the line above)

CLIP = 0.2  # PPO's range of the ratio
LIMIT = 5.0  # of an advantage, as in the authors' code


def log_prob(run, batch, i: int, x, x_next):
    """log p(x[i+1] | x[i]), summed over a video's numbers: (B, C, F, H, W) twice -> (B,) float64.

    In float64, as the sum over thousands of numbers is compared with another one to the fourth decimal.
    """
    model, schedule, w = run.model, run.schedule, run.cfg.guidance_scale
    a, b, c, s, t = (table[i] for table in (schedule.a, schedule.b, schedule.c, schedule.s, schedule.t))
    f = model.denoise(c * x, t, batch.cond)
    if w != 1:
        nothing = model.denoise(c * x, t, batch.uncond)
        f = nothing + model.guidance(w, t, x.shape[2]) * (f - nothing)
    distance = (x_next.double() - (a * x + b * f).double()) / s
    return (-(distance**2) / 2 - math.log(s) - math.log(2 * math.pi) / 2).sum((1, 2, 3, 4))


def advantages(rewards):
    """Rewards (B,) of one prompt's videos, less their mean, over their standard deviation, within +-5."""
    return ((rewards - rewards.mean()) / (rewards.std() + 1e-6)).clamp(-LIMIT, LIMIT)


def ppo_loss(new, old, advantage):
    """PPO's clipped loss (Schulman et al. 2017, eq. 7), (): log-probabilities and advantages, (B,) each."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


@torch.no_grad()
def collect(run, prompt: vader.Prompt, key: int) -> dict:
    """Videos of one prompt: {"batch": the vader.Batch, "latents": T + 1 of them, "rewards": (B,)}."""
    cfg, model = run.cfg, run.model
    prompts, generator = [prompt] * cfg.batch_size, vader.generator_for(cfg.seed, "ddpo", key)
    noise = torch.randn(cfg.batch_size, *model.latent_shape(cfg), generator=generator).to(model.device)
    batch = vader.make_batch(run, prompts, noise, generator)
    latents = vader.rollout(run, batch)
    return {"batch": batch, "latents": latents, "rewards": rewards_of(run, prompts, latents[-1])}


@torch.no_grad()
def rewards_of(run, prompts: list[vader.Prompt], latents):
    """Rewards (B,) of whole videos, of clean latents (B, C, F, H, W)."""
    frames = torch.cat([run.model.decode(latents, [n]) for n in range(latents.shape[2])], dim=1)
    texts = [prompt.text for prompt in prompts]
    return vader.rewards.weighted_rewards(run.terms, frames, texts)["reward"]


def update(run, prompts: list[vader.Prompt], step: int, optimizer, epochs=2) -> dict:
    """One round of sampling and `epochs` AdamW steps. Returns {"reward", "queries", "clipped"}.

    queries: videos scored; clipped: share of the last epoch's ratios outside PPO's range.
    Raises BadInput when the sampler draws no noise, or when there is nothing to compare.
    """
    cfg, schedule = run.cfg, run.schedule
    # the last step draws no noise when it ends at the clean video: nothing to choose
    steps = [i for i, s in enumerate(schedule.s) if s > 0]
    vader.require(steps, "DDPO needs a stochastic sampler: set eta above 0")
    vader.require(cfg.batch_size > 1, "DDPO compares videos of one prompt: set batch_size to 2 or more")
    chosen = vader.batch_prompts(prompts, dataclasses.replace(cfg, batch_size=cfg.grad_accum), step)
    rounds = [collect(run, prompt, step * cfg.grad_accum + n) for n, prompt in enumerate(chosen)]
    parameters = list(vader.lora_parameters(run.model).values())
    before = {}  # log-probabilities under the policy that made the videos: the first epoch's
    for _ in range(epochs):
        optimizer.zero_grad()
        outside = []
        for (n, one), i in itertools.product(enumerate(rounds), steps):
            new = log_prob(run, one["batch"], i, *one["latents"][i : i + 2])
            old = before.setdefault((n, i), new.detach())
            (ppo_loss(new, old, advantages(one["rewards"])) / len(rounds)).backward()
            outside.append(((new.detach() - old).exp() - 1).abs() > CLIP)
        torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
        optimizer.step()
    reward = torch.cat([one["rewards"] for one in rounds])
    clipped = torch.cat(outside).float().mean().item()
    return {"reward": reward.mean().item(), "queries": len(reward), "clipped": clipped}
