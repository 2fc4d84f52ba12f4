"""What a LoRA on tiny-i2v can learn of a camera, without any reward: by the model's own loss.

    python bench/camera_fit.py "zoom in"                    # rates of 0.6 to 1.8 percent a step
    python bench/camera_fit.py "pan left" --rate 1.2        # the mean; a clip's is half of it to half more
    python bench/camera_fit.py "zoom in" --targets conv1,conv2,conv_in,conv_out

Draws 256 clips whose cameras all move like that, trains the LoRA on them, 150 updates of 8 clips, and prints
what bench/tracker.py sees of 64 videos from unseen starts: pan right, pan up, zoom in, roll right, in percent
a step. Before that, of 32 of the drawn clips, and of these after the model's autoencoder: no model
is seen to move more. Two minutes of a core. Needs opencv-python-headless.
"""

import argparse
from pathlib import Path
from unittest import mock

import camera_trained
import numpy as np
import torch
import tracker
import train_i2v
import views
from diffusers import AutoencoderKLTemporalDecoder
from world import SEEN

import vader

AXES = {"pan left": (0, -1), "zoom in": (2, 1)}
UPDATES, CLIPS = 150, 8


def paths_of(move: str, rate: float):
    """In place of `views.draw_paths`: all cameras move alike, each at its own rate."""
    axis, sign = AXES[move]

    def draw_paths(n, generator, frames=views.FRAMES):
        rates = torch.zeros(n, 4)
        rates[:, axis] = sign * rate * (0.5 + torch.rand(n, generator=generator))
        return rates[:, None] * torch.arange(frames)[:, None]

    return draw_paths


def print_tracked(name: str, videos):
    """The mean rates that the tracker sees of videos (n, frames, 3, 64, 64)."""
    rates = [tracker.track(video) for video in videos]
    mean = np.nanmean(rates, axis=(0, 1)).round(3)
    print(f"{name}:", dict(zip(tracker.NAMES, mean.tolist(), strict=False)), flush=True)


@torch.no_grad()
def print_drawn():
    """Of clips whose cameras move as told, and of these after the autoencoder."""
    generator = torch.Generator().manual_seed(6)
    videos, _, _ = views.draw_views(views.pick_views(SEEN, 32, generator), generator)
    print_tracked("drawn", videos)
    folder = Path(vader.TINY["rewards"]).parent / "i2v" / "vae"
    vae = AutoencoderKLTemporalDecoder.from_pretrained(folder, dtype=torch.float32).eval()
    decoded = []
    for video in videos:
        latents = vae.encode(video * 2 - 1).latent_dist.mean
        frames = vae.decode(latents, num_frames=len(video)).sample
        decoded.append((frames / 2 + 0.5).clamp(0, 1))
    print_tracked("after the autoencoder", decoded)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("move", choices=AXES)
    parser.add_argument("--rate", type=float, default=1.2)
    parser.add_argument("--targets", default=vader.ATTENTION)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with mock.patch.object(views, "draw_paths", paths_of(args.move, args.rate)):
        print_drawn()
        latents, embeddings = train_i2v.encode_starts(Path(vader.TINY["rewards"]).parent, 256, 5)

    settings = dict(model="tiny-i2v", lora_targets=args.targets, reward="colorful", eval_videos=0)
    cfg = vader.resolve(vader.Config(**settings, watch="none", prompts="tiny/images.jsonl"))
    prompts = camera_trained.draw_starts("judged", 1000)
    run = vader.load_run(cfg, prompts)
    scale = run.model.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(vader.lora_parameters(run.model).values(), lr=args.lr)
    for _ in range(UPDATES):
        loss = train_i2v.i2v_loss(run.model.denoiser, latents, embeddings, scale, CLIPS, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    videos = []
    for first in range(0, len(prompts), 8):
        videos += vader.make_videos(run, prompts[first : first + 8], camera_trained.NUMBER + first)
    print_tracked("after training", videos)


if __name__ == "__main__":
    main()
