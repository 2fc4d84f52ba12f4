"""--clips: videos of several clips, each made from the last frame of the clip before it."""

from dataclasses import replace

import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint

import vader
from rewards import require


def chain(family, cfg):
    """A family's class whose videos are cfg.clips clips side by side along the frames, cfg.num_frames in all.

    What a clip starts from is detached: the reward's gradient in a clip trains that clip's steps. Raises
    BadInput unless the family makes videos from images (has `start`), and clips of that length.
    """
    frames, left = divmod(cfg.num_frames, cfg.clips)
    said, group = f"--num_frames {cfg.num_frames}", family.frame_multiple
    require(hasattr(family, "start"), "--clips: this model starts from no image: svd, ltx, wan2.2-5b do")
    require(not left, f"{said}: must be a multiple of --clips {cfg.clips}")
    fits = (frames - 1) % group == 0
    require(fits, f"{said}: a clip has {frames}, must be 1 more than a multiple of {group}")

    class Chain(family):
        frame_multiple = 1  # checked above
        length = 1 + (frames - 1) // family.frames_per_latent  # latent frames of a clip

        def latent_shape(self, cfg):
            channels, _, *size = super().latent_shape(cfg)
            return channels, self.length * (cfg.clips or 1), *size

        def schedule(self, cfg):
            return super().schedule(replace(cfg, clips=None))

        def frames_in(self, n):
            return super().frames_in(n % self.length)

        def guidance(self, scale, frames):
            w = super().guidance(scale, self.length)
            return w.repeat(frames // self.length, 1, 1) if isinstance(w, torch.Tensor) else w

        @torch.no_grad()
        def rollout(self, run, batch):
            """As vader.rollout, clip by clip; what each is told is left under "clips" in cond and uncond."""
            parts, one = [], replace(run, cfg=replace(run.cfg, clips=None))
            cond = {name: value for name, value in batch.cond.items() if name != "clips"}
            batch.cond["clips"], batch.uncond["clips"] = [], []
            for noise in batch.noise.split(self.length, dim=2):
                if parts:
                    vader.offload_idle(run, denoiser=not run.cfg.offload, scoring=True)
                    last = super().decode(parts[-1][-1], range(self.length))[:, -1]
                    pictures = (last * 255).round().byte().permute(0, 2, 3, 1).cpu()  # as a file would be
                    told = [self.start(Image.fromarray(picture.numpy()), run.cfg) for picture in pictures]
                    cond = cond | {name: torch.stack([row[name] for row in told]) for name in told[0]}
                    vader.offload_idle(run, denoiser=True, scoring=not run.cfg.offload)
                empty = run.conds[vader.Prompt(run.cfg.negative_prompt)]
                uncond = cond | {name: batch.uncond[name] for name in empty}
                parts.append(vader.rollout(one, batch._replace(noise=noise, cond=cond, uncond=uncond)))
                batch.cond["clips"].append(cond)
                batch.uncond["clips"].append(uncond)
            return [torch.cat(clips, dim=2) for clips in zip(*parts, strict=True)]

        def denoise(self, x, t, cond):
            """One clip or all, whose graphs are made in the backward pass, one at a time."""
            one, how = super().denoise, dict(use_reentrant=False, preserve_rng_state=False)
            clips = zip(x.split(self.length, dim=2), cond.get("clips", [cond]), strict=True)
            return torch.cat([checkpoint(one, part, t, told, **how) for part, told in clips], dim=2)

        def decode(self, latents, picks):
            clips, parts = latents.split(self.length, dim=2), []
            for k, clip in enumerate(clips):
                inside = [n - k * self.length for n in picks if n // self.length == k]
                parts += [super().decode(clip, inside)] if inside else []
            return torch.cat(parts, dim=1)

    return Chain
