"""Seconds of one update (K = 1) against the stock pipeline making and decoding the same batch, in one run.

    python bench/speed.py                  # tiny model, 25 steps, 5 pairs
    python bench/speed.py --model modelscope --batch_size 1

Both use the same model, noise, prompts, number of steps and guidance, and decode the same frames. Beyond that
an update has the reward, one recomputed step with gradient, and AdamW. Prints seconds of each pair, and the
ratio's median, lowest and highest.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, TextToVideoSDPipeline

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)


def timed(function, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(model: str, reward: str, steps: int, batch_size: int, pairs: int) -> list[tuple]:
    """[(seconds of an update, seconds of the stock pipeline)] for each pair, after one pair to warm up."""
    cfg = vader.Config(
        model=model, reward=reward, num_inference_steps=steps, batch_size=batch_size, grad_accum=1
    )
    cfg, source, family = vader.resolve(cfg)
    prompts = vader.read_prompts(str(HERE.parent / "prompts.txt"))
    run = vader.load_run(cfg, source, family, prompts)
    optimizer = vader.make_optimizer(run)
    scaler = torch.amp.GradScaler(cfg.device, enabled=cfg.dtype == "fp16")
    pipe = TextToVideoSDPipeline.from_pretrained(source, dtype=run.model.dtype).to(cfg.device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=cfg.timestep_spacing)
    pipe.set_progress_bar_config(disable=True)
    shape = run.model.latent_shape(cfg)

    def stock(step):
        generator = vader.generator_for(cfg.seed, step, step)
        noise = torch.randn(batch_size, *shape, generator=generator).to(cfg.device, run.model.dtype)
        frames = vader.pick_latent_frames(run, generator)
        size = dict(num_frames=cfg.num_frames, height=cfg.height, width=cfg.width, latents=noise)
        guidance = dict(num_inference_steps=steps, guidance_scale=cfg.guidance_scale)
        batch = [prompt.text for prompt in vader.batch_prompts(prompts, cfg, step)]
        with torch.no_grad():
            latents = pipe(batch, **size, **guidance, output_type="latent").frames
            pipe.decode_latents(latents[:, :, frames])

    found = []
    for step in range(pairs + 1):
        ours = timed(lambda: vader.update(run, prompts, step, optimizer, scaler), cfg.device)  # noqa: B023
        theirs = timed(lambda: stock(step), cfg.device)  # noqa: B023
        if step:
            print(f"update {ours:.2f} s, stock {theirs:.2f} s, ratio {ours / theirs:.3f}", flush=True)
            found.append((ours, theirs))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--reward", default="aesthetic")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    found = compare(args.model, args.reward, args.steps, args.batch_size, args.pairs)
    ratios = sorted(ours / theirs for ours, theirs in found)
    print(f"ratio: median {ratios[len(ratios) // 2]:.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
