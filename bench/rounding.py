"""What bf16 costs in Wan's VAE, in full width with random weights: the frames and their gradient.

    python bench/rounding.py        # 9 frames of 96 x 160, seeds 0, 1, 2; about 20 s

Against float32, which does not fit: `score` would need 20 GB at Wan's own size (17 with --offload).
"""

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)


def compare(seed: int, size=(3, 12, 20)) -> tuple[float, float]:
    """Mean difference of frames in [0, 1], and the cosine of the gradients of one random sum of them."""
    torch.manual_seed(seed)
    family, _, _ = vader.find_model("wan")
    config, frames, slopes = family.vae_class.load_config(HERE.parent / "configs" / "wan" / "vae"), [], []
    weights = family.vae_class.from_config(config).state_dict()
    latents = torch.randn(1, config["z_dim"], *size)
    for dtype in (torch.float32, torch.bfloat16):
        model = family("", "cpu", dtype)
        model.vae = family.vae_class.from_config(config)
        model.vae.load_state_dict(weights)
        model.vae.to(dtype).eval().requires_grad_(False)
        x = latents.clone().requires_grad_()
        frames.append(model.decode(x, range(size[0])))
        direction = torch.randn(frames[0].shape, generator=torch.Generator().manual_seed(seed))
        slopes.append(torch.autograd.grad((frames[-1] * direction).sum(), x)[0].flatten())
    difference = (frames[0] - frames[1]).abs().mean().item()
    return difference, torch.nn.functional.cosine_similarity(*slopes, dim=0).item()


if __name__ == "__main__":
    for seed in range(3):
        difference, cosine = compare(seed)
        print(
            f"seed {seed}: {255 * difference:.2f} of 255 levels, gradient's cosine {cosine:.5f}", flush=True
        )
