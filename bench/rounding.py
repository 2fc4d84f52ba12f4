"""What two shortcuts cost: bf16 in Wan's VAE, and SVD's VAE with gradient piece by piece.

    python bench/rounding.py        # seeds 0, 1, 2; about a minute

Wan: full width, random weights, 9 frames of 96 x 160, against float32. SVD: on tiny-i2v, the gradient of
`vjepa` at the clean latents with --decode_chunk 1, 2, 4 against that of all 8 frames decoded together.
"""

import dataclasses
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)


def wan(seed: int, size=(3, 12, 20)) -> tuple[float, float]:
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


def svd(seed: int) -> dict[int, float]:
    """{decode_chunk: cosine} for two videos of images.jsonl."""
    cfg = vader.Config(model="tiny-i2v", reward="vjepa", seed=seed)
    cfg, source, family = vader.resolve(cfg)
    prompts = vader.read_prompts(str(HERE.parent / "tiny" / "images.jsonl"), family)[2 * seed : 2 * seed + 2]
    run, slopes = vader.load_run(cfg, source, family, prompts), {}
    noise = torch.randn(2, *run.model.latent_shape(cfg), generator=vader.generator_for(seed))
    batch = vader.make_batch(run, prompts, noise, None, picks=list(range(8)))
    latents = vader.rollout(run, batch)[-1]
    for chunk in (8, 4, 2, 1):
        run.cfg = dataclasses.replace(cfg, decode_chunk=chunk)
        slopes[chunk] = vader.score(run, batch, latents)[1].flatten()
    return {c: torch.nn.functional.cosine_similarity(g, slopes[8], dim=0).item() for c, g in slopes.items()}


if __name__ == "__main__":
    for seed in range(3):
        difference, cosine = wan(seed)
        print(f"wan, seed {seed}: {255 * difference:.2f} of 255 levels, cosine of gradients {cosine:.5f}")
    for seed in range(3):
        print(f"svd, seed {seed}:", {chunk: round(cosine, 3) for chunk, cosine in svd(seed).items()})
