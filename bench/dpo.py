"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908), online: preferences between a model's own videos.

Each update makes `batch_size` pairs of videos, both of a pair from the same prompt, lets the reward say which
is better, and takes an AdamW step that makes the denoiser fit the better video's noise more, and the worse
one's less, than the reference does. The reference is the model with its LoRA off.

`update` has the place and arguments of vader.update; bench/efficiency.py runs it. For models whose scheduler
is DDIM's (noise or v prediction).
"""

import sys
from pathlib import Path

import diffusers
import torch
from ddpo import rewards_of

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vader  # noqa: E402 (needs the line above)

BETA = 5000.0  # strength of the pull to the reference, as in the paper's SDXL runs


@torch.no_grad()
def collect(run, prompts: list[vader.Prompt], key: int):
    """Two videos of each of B prompts, scored: clean latents of the better and the worse, rewards (2 B,).

    Returns better, worse: (B, C, F, H, W); cond of the B prompts; rewards.
    """
    cfg, model = run.cfg, run.model
    both, generator = [*prompts, *prompts], vader.generator_for(cfg.seed, "dpo", key)
    noise = torch.randn(len(both), *model.latent_shape(cfg), generator=generator).to(model.device)
    batch = vader.make_batch(run, both, noise, generator)
    clean = vader.rollout(run, batch)[-1]
    rewards = rewards_of(run, both, clean)
    one, other = clean.chunk(2)
    first = (rewards[: len(prompts)] >= rewards[len(prompts) :])[:, None, None, None, None]
    better, worse = torch.where(first, one, other), torch.where(first, other, one)
    cond = {name: value[: len(prompts)] for name, value in batch.cond.items()}
    return better, worse, cond, rewards


def denoising_error(model, scheduler, clean, noise, t: int, cond):
    """Mean squared error of the denoiser's output on clean latents noised to time t: (B,)."""
    times = torch.full((len(clean),), t, device=clean.device)
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(clean, noise, times)
    f = model.denoise(scheduler.add_noise(clean, noise, times), times[0], cond)
    return (f - target).square().mean((1, 2, 3, 4))


def dpo_loss(model, scheduler, better, worse, noise, t: int, cond, beta=BETA):
    """Diffusion-DPO's loss (eq. 14) at one time t with the same noise for both videos: ()."""

    def errors():
        return [denoising_error(model, scheduler, clean, noise, t, cond) for clean in (better, worse)]

    with torch.no_grad(), model.denoiser.disable_adapter():
        reference_better, reference_worse = errors()
    own_better, own_worse = errors()
    margin = (own_better - reference_better) - (own_worse - reference_worse)
    return -torch.nn.functional.logsigmoid(-beta / 2 * margin).mean()


def update(run, prompts: list[vader.Prompt], step: int, optimizer, draws=8, beta=BETA) -> dict:
    """grad_accum batches of pairs, `draws` times and noises for each, then an AdamW step.

    Returns {"reward", "queries", "loss"}; queries: videos scored.
    """
    cfg, model = run.cfg, run.model
    config = vader.read_config(model.source, "scheduler/scheduler_config.json")
    scheduler = diffusers.DDIMScheduler.from_config(config)
    optimizer.zero_grad()
    found, total = [], 0.0
    for m in range(cfg.grad_accum):
        key = step * cfg.grad_accum + m
        better, worse, cond, rewards = collect(run, vader.batch_prompts(prompts, cfg, key), key)
        found.append(rewards)
        generator = vader.generator_for(cfg.seed, "dpo times", key)
        for _ in range(draws):
            t = int(torch.randint(scheduler.config.num_train_timesteps, (), generator=generator))
            noise = torch.randn(better.shape, generator=generator).to(model.device)
            loss = dpo_loss(model, scheduler, better, worse, noise, t, cond, beta) / (draws * cfg.grad_accum)
            loss.backward()
            total += loss.item()
    torch.nn.utils.clip_grad_norm_(list(vader.lora_parameters(model).values()), cfg.max_grad_norm)
    optimizer.step()
    rewards = torch.cat(found)
    return {"reward": rewards.mean().item(), "queries": len(rewards), "loss": total}
