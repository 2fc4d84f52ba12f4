"""Seconds of one update (K = 1) against the stock pipeline making and decoding the same batch, in one run.

    python bench/speed.py                              # tiny model, 25 steps, 5 pairs
    python bench/speed.py --steps 10 4 --guidance 4 1  # ten guided steps, and four without, by turns
    python bench/speed.py --model modelscope --batch_size 1

Both use the same model, noise, prompts, number of steps and guidance, and decode the same frames. Beyond that
an update has the reward, one recomputed step with gradient, and AdamW. Prints seconds of each pair, and the
ratio's median, lowest and highest.
"""

import argparse
import functools
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


def make_pair(model: str, reward: str, steps: int, guidance: float | None, batch_size: int):
    """A function of a number: (seconds of that update, seconds of the stock pipeline making its batch)."""
    how = dict(num_inference_steps=steps, guidance_scale=guidance, batch_size=batch_size, grad_accum=1)
    cfg = vader.resolve(vader.Config(model=model, reward=reward, watch="none", **how))
    prompts = vader.read_prompts(str(HERE.parent / "prompts.txt"))
    run = vader.load_run(cfg, prompts)
    optimizer = vader.make_optimizer(run)
    pipe = TextToVideoSDPipeline.from_pretrained(run.model.source, dtype=run.model.dtype).to(cfg.device)
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

    def pair(step):
        ours = timed(lambda: vader.update(run, prompts, step, optimizer), cfg.device)
        return ours, timed(lambda: stock(step), cfg.device)

    return pair


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--reward", default="aesthetic")
    parser.add_argument("--steps", type=int, default=[25], nargs="+", help="denoising steps")
    parser.add_argument("--guidance", type=float, nargs="+", help="as many; default the model's")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    ways = list(zip(args.steps, args.guidance or [None] * len(args.steps), strict=True))
    make = functools.partial(make_pair, args.model, args.reward, batch_size=args.batch_size)
    pairs, found = {way: make(*way) for way in ways}, {way: [] for way in ways}
    for step in range(args.pairs + 1):
        for way, pair in pairs.items():
            ours, theirs = pair(step)
            if step:  # the first is to warm up
                print(
                    f"{way}: update {ours:.2f} s, stock {theirs:.2f} s, ratio {ours / theirs:.3f}", flush=True
                )
                found[way].append((ours, theirs))
    for way, times in found.items():
        ratios, middle = sorted(ours / theirs for ours, theirs in times), len(times) // 2
        seconds = sorted(ours for ours, _ in times)[middle]
        spread = f"median {ratios[middle]:.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}"
        print(f"{way[0]} steps, guidance {way[1]}: update {seconds:.2f} s; ratio: {spread}")


if __name__ == "__main__":
    main()
