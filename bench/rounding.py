"""What shortcuts cost: bf16 in Wan's VAE, SVD's VAE with gradient piece by piece, an int8 base, a quick LoRA.

    python bench/rounding.py            # seeds 0, 1, 2; about two minutes; int8 needs torchao
    python bench/rounding.py rollouts   # some ten minutes

Wan: full width, random weights, 9 frames of 96 x 160, against float32. SVD: on tiny-i2v, the gradient of
`vjepa` at the clean latents with --decode_chunk 1, 2, 4 against that of all 8 frames decoded together.
Int8: the LoRA's gradient of `aesthetic` on tiny, in bf16, with `--quantize int8` against without; and of a
block of Wan's transformer, full width, random weights, a random sum of its output.
Rollouts: four videos of tiny in bf16, with its LoRA after 1, 10 and 100 updates in float32 on `aesthetic`, by
the ways of keeping it, beside a rollout in float32: of frames, and of what the LoRA changes in them.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)
from extras import quick  # noqa: E402
from extras.base_lora import quantize  # noqa: E402


def wan(seed: int, size=(3, 12, 20)) -> tuple[float, float]:
    """Mean difference of frames in [0, 1], and the cosine of the gradients of one random sum of them."""
    torch.manual_seed(seed)
    family, _, _ = vader.find_model("wan")
    config, frames, slopes = family.vae_class.load_config(HERE / "configs" / "wan" / "vae"), [], []
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
    cfg = vader.Config(model="tiny-i2v", reward="vjepa", seed=seed, watch="none")
    cfg = vader.resolve(cfg)
    prompts = vader.read_prompts(str(HERE.parent / "tiny" / "images.jsonl"))[2 * seed : 2 * seed + 2]
    run, slopes = vader.load_run(cfg, prompts), {}
    noise = torch.randn(2, *run.model.latent_shape(cfg), generator=vader.generator_for(seed))
    batch = vader.make_batch(run, prompts, noise, None, picks=list(range(8)))
    latents = vader.rollout(run, batch)[-1]
    for chunk in (8, 4, 2, 1):
        run.cfg = dataclasses.replace(cfg, decode_chunk=chunk)
        slopes[chunk] = vader.score(run, batch, latents)[1].flatten()
    return {c: torch.nn.functional.cosine_similarity(g, slopes[8], dim=0).item() for c, g in slopes.items()}


def compare(found) -> tuple[float, float]:
    """Of two lists of tensors the relative difference, and the cosine."""
    one, other = (torch.cat([tensor.float().flatten() for tensor in tensors]) for tensors in found)
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0).item()
    return ((one - other).norm() / one.norm()).item(), cosine


def int8_tiny(seed: int) -> tuple[float, float]:
    """Relative difference and cosine of an update's gradient, two videos."""
    found = []
    for kind in ("none", "int8"):
        cfg = vader.Config(model="tiny", dtype="bf16", seed=seed, watch="none", quantize=kind)
        cfg = vader.resolve(cfg)
        prompts = vader.read_prompts(str(HERE.parent / "prompts.txt"))
        run = vader.load_run(cfg, prompts)
        vader.micro_batch(run, prompts[:2], 0, 0)
        found.append([p.grad for p in vader.lora_parameters(run.model).values()])
    return compare(found)


def int8_block(seed: int) -> list[tuple[float, float]]:
    """Relative difference and cosine of a Wan block's output, and of its gradient at its input."""
    torch.manual_seed(seed)
    family, _, _ = vader.find_model("wan")
    config = family.denoiser_class.load_config(HERE / "configs" / "wan" / "transformer")
    network = family.denoiser_class.from_config(config | {"num_layers": 1}).to(torch.bfloat16)
    latents, outputs, slopes = torch.randn(1, config["in_channels"], 3, 12, 20).bfloat16(), [], []
    given = torch.tensor([500]), torch.randn(1, 32, config["text_dim"]).bfloat16()
    direction = torch.randn(latents.shape)
    for kind in ("none", "int8"):
        if kind == "int8":
            quantize(network, kind, torch.bfloat16)
        x = latents.clone().requires_grad_()
        outputs.append([network(x, *given, return_dict=False)[0]])
        slopes.append(torch.autograd.grad((outputs[-1][0] * direction).sum(), x))
    return [compare(outputs), compare(slopes)]


def load_tiny(seed: int, way: str):
    """A run of tiny and its prompts; way: float32, or in bf16 the LoRA in float32, in bf16, or merged."""
    cfg = vader.Config(model="tiny", dtype="fp32" if way == "float32" else "bf16", seed=seed, watch="none")
    prompts = vader.read_prompts(str(HERE.parent / "prompts.txt"))
    unchanged = mock.patch.object(quick, "install")
    with contextlib.nullcontext() if way == "bf16 LoRA" else unchanged:
        return vader.load_run(vader.resolve(cfg), prompts), prompts


def trained_loras(seed: int, updates=(1, 10, 100)) -> dict[int, dict]:
    """{updates: {name: parameter}} of one training in float32; 0: untrained, so without effect."""
    run, prompts = load_tiny(seed, "float32")
    optimizer, kept = vader.make_optimizer(run), {}
    for step in range(max(updates) + 1):
        if step in (0, *updates):
            parameters = vader.lora_parameters(run.model)
            kept[step] = {name: p.detach().clone() for name, p in parameters.items()}
        vader.update(run, prompts, step, optimizer)
    return kept


def videos_with(seed: int, way: str, lora: dict):
    """Four videos, (4, 8, 3, 64, 64)."""
    run, prompts = load_tiny(seed, way)
    for name, p in vader.lora_parameters(run.model).items():
        p.data.copy_(lora[name])
    if way == "merged":
        run.model.denoiser.merge_adapter()
    return vader.make_videos(run, prompts[:4])


def rollouts(seed: int):
    """Print for each way and LoRA how far frames are from float32's, and the cosine of the LoRA's effects."""
    loras = trained_loras(seed)
    true = {n: videos_with(seed, "float32", lora) for n, lora in loras.items()}
    for way in ("float32 LoRA", "bf16 LoRA", "merged"):
        plain = videos_with(seed, way, loras[0])
        for n in list(loras)[1:]:
            made = videos_with(seed, way, loras[n])
            levels = 255 * (made - true[n]).abs().mean().item()
            _, cosine = compare([[true[n] - true[0]], [made - plain]])
            print(
                f"{way}, seed {seed}, {n} updates: {levels:.3f} of 255 levels, cosine of effects {cosine:.4f}"
            )


def main():
    if sys.argv[1:] == ["rollouts"]:
        for seed in range(3):
            rollouts(seed)
        return
    for seed in range(3):
        difference, cosine = wan(seed)
        print(f"wan, seed {seed}: {255 * difference:.2f} of 255 levels, cosine of gradients {cosine:.5f}")
    for seed in range(3):
        print(f"svd, seed {seed}:", {chunk: round(cosine, 3) for chunk, cosine in svd(seed).items()})
    for seed in range(3):
        print(f"int8, tiny, seed {seed}: gradient's relative difference and cosine", int8_tiny(seed))
        print(f"int8, a block of Wan, seed {seed}: the output's, the gradient's", int8_block(seed))


if __name__ == "__main__":
    main()
