"""A LoRA with which the tiny text-to-video model needs four steps and no guidance: tiny/few.

Guidance (Meng et al. 2023, arXiv 2210.03142) and steps (Luhman & Luhman 2021, arXiv 2101.02388; Salimans & Ho
2022, arXiv 2202.00512) are distilled at once: the base model makes videos in eight guided steps, and each of
the student's four, from where the student itself has come to, has to land on that video's way. As LoRAs for
few steps do (LCM-LoRA, Luo et al. 2023, arXiv 2311.05556), it covers every linear layer and convolution.
"""

import functools
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from tqdm import trange
from training import fit
from world import SEEN, caption, pick

import vader

STEPS, FINER, GUIDANCE = 4, 2, 4.0  # of the student; steps of the teacher in each; of the teacher
LAYERS = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
half = functools.partial(torch.autocast, "cpu", torch.bfloat16)


@torch.no_grad()
def teach(model, cfg, states, chosen, generator):
    """The ways of guided videos at the student's times, from noise on: (N, STEPS + 1, 4, 8, 8, 8).

    states: (captions + 1, 32, 96), the last of ""; chosen: (N,) rows of it.
    """
    fine, parts = model.schedule(vader.replace(cfg, num_inference_steps=STEPS * FINER)), []
    for first in trange(0, len(chosen), 16, desc="teacher"):
        rows = chosen[first : first + 16]
        x = torch.randn(len(rows), *model.latent_shape(cfg), generator=generator)
        way, text = [x], torch.cat([states[-1:].expand(len(rows), -1, -1), states[rows]])
        for j, t in enumerate(fine.t):
            with half():
                without, told = model.denoise(torch.cat([x, x]), t, {"encoder_hidden_states": text}).chunk(2)
            x = fine.a[j] * x + fine.b[j] * (without + GUIDANCE * (told - without))
            way += [x] if j % FINER == FINER - 1 else []
        parts.append(torch.stack(way, 1))
    return torch.cat(parts)


@torch.no_grad()
def cut_rank(model, rank: int):
    """Replace the LoRA by the nearest one of a lower rank: of each product's singular values, the largest."""
    config = model.denoiser.peft_config["default"]
    for layer in model.denoiser.modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            u, s, v = torch.linalg.svd(b.weight.flatten(1) @ a.weight.flatten(1), full_matrices=False)
            u, v = (
                F.pad(u * s.sqrt(), (0, rank))[:, :rank],
                F.pad(s.sqrt()[:, None] * v, (0, 0, 0, rank))[:rank],
            )
            a.weight = torch.nn.Parameter(v.reshape(rank, *a.weight.shape[1:]).contiguous())
            b.weight = torch.nn.Parameter(u.reshape(len(u), rank, *b.weight.shape[2:]).contiguous())
    config.r = config.lora_alpha = rank


def train_few(out: Path, videos: int, updates: int, batch: int, ranks: tuple[int, int], seed: int):
    """Distil into a LoRA and write it to `out`/few.

    videos: of the teacher; batch: of these an update; ranks: in training, and then.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed + 40)
    cfg = vader.resolve(vader.Config(model="tiny", device="cpu", watch="none", num_inference_steps=STEPS))
    model = vader.TextToVideoUNet(str(out / "t2v"), "cpu", torch.float32)
    prompts = [vader.Prompt(caption(c)) for c in SEEN] + [vader.Prompt("")]
    states = torch.stack([row["encoder_hidden_states"] for row in model.encode(prompts, cfg).values()])
    model.load()
    model.denoiser.set_attn_processor(AttnProcessor())  # plain: quicker on so few tokens
    chosen = torch.tensor([SEEN.index(c) for c in pick(SEEN, videos, generator)])
    ways = teach(model, cfg, states, chosen, generator)

    names = [n for n, part in model.denoiser.named_modules() if isinstance(part, LAYERS)]
    config = peft.LoraConfig(r=ranks[0], lora_alpha=ranks[0], target_modules=names)
    model.denoiser, schedule = peft.get_peft_model(model.denoiser, config), model.schedule(cfg)

    def loss_of(update):
        rows = torch.randint(videos, (batch,), generator=generator)
        x, cond, losses = ways[rows, 0], {"encoder_hidden_states": states[chosen[rows]]}, []
        for i, t in enumerate(schedule.t):
            with half():
                f = model.denoise(x, t, cond)
            landed = schedule.a[i] * x + schedule.b[i] * f
            losses.append(F.mse_loss(landed, ways[rows, i + 1]))
            x = landed.detach()
        return sum(losses), {f"step {i}": loss for i, loss in enumerate(losses)}

    fit(vader.lora_parameters(model).values(), updates, 1e-3, "few", loss_of, decay=0.0, beta=0.99)
    cut_rank(model, ranks[1])
    model.denoiser.half()
    vader.save_lora(model, out / "few")
