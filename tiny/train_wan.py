"""Flow matching, as Wan: the causal autoencoder, the UMT5 text encoder, the transformer."""

import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn
from tqdm import trange
from training import average_of, fit, picture_loss
from transformers import AutoTokenizer, T5Tokenizer, UMT5Config, UMT5EncoderModel
from world import COMBINATIONS, FRAMES, SEEN, caption, draw, pick

WAN_FRAMES = 9  # 1 + 2 x 4: three latent frames
WAN_TOKENS = 512  # the pipeline pads captions to this


def make_wan_vae(mean=(0.0,) * 16, std=(1.0,) * 16) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=12,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=list(mean),
        latents_std=list(std),
    )


@torch.no_grad()
def start_wan_vae(vae):
    """Begin with kernels that hand the picture on, and that look at one frame only.

    Convolutions outside the residual blocks get an orthogonal map of the channels at their middle, plus
    noise, and no bias. With PyTorch's start biases drown the picture after a few layers, and its norms blow
    them up: the objects' colours did not come in 1,700 updates.
    """
    for name, layer in vae.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.Conv3d):
            continue
        nn.init.zeros_(layer.bias)
        weight, channels = layer.weight, layer.in_channels
        if name.endswith("time_conv"):
            weight *= 0.3
            if layer.out_channels == channels:  # two frames to one: about their mean
                weight[:, :, 1:, 0, 0] += 0.5 * torch.eye(channels)[..., None]
            else:  # one frame to two: about the same twice
                weight[:, :, 2, 0, 0] += torch.eye(channels).repeat(2, 1)
            continue
        if weight.ndim == 5:
            nn.init.zeros_(weight)
            weight = weight[:, :, -1]  # the present
        fresh = torch.randn_like(weight) / (channels * weight[0, 0].numel()) ** 0.5
        if name.endswith(("conv1", "to_qkv")):
            weight.copy_(fresh)
        elif name.endswith(("conv2", "proj")):
            weight.copy_(0.5 * fresh)
        else:
            straight = nn.init.orthogonal_(torch.empty(layer.out_channels, channels))[..., None, None]
            if layer.stride[-1] == 2:
                fresh[:, :, :2, :2] = 0.5 * fresh[:, :, :2, :2] + straight / 4
            elif weight.shape[-1] == 3:
                fresh *= 0.5
                fresh[:, :, 1:2, 1:2] += straight
            else:
                fresh = straight
            weight.copy_(fresh)


@torch.compile(dynamic=False)
def norm_silu(x, gamma):
    """WanRMS_norm and SiLU of (n, C, H, W) in one pass; they take longer than the convolutions otherwise."""
    x = x.float()
    norm = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)
    return F.silu(x * norm * gamma[:, 0]).bfloat16()


def flat(clips):
    """(n, C, T, H, W) -> (n T, C, H, W)."""
    return clips.transpose(1, 2).flatten(0, 1)


def quicken(vae):
    """The same layers in quicker forms, to train: kernels that look at one frame only become 2-D ones."""

    def convolve(layer, x):
        return F.conv2d(x, layer.weight[:, :, -1], layer.bias, padding=layer.kernel_size[-1] // 2)

    def frame_by_frame(layer, x, cache_x=None):
        return convolve(layer, flat(x)).unflatten(0, (-1, x.shape[2])).transpose(1, 2)

    def block(self, x, feat_cache=None, feat_idx=None):
        frames = flat(x)
        kept = frames if self.in_dim == self.out_dim else convolve(self.conv_shortcut, frames)
        found = convolve(self.conv1, norm_silu(frames, self.norm1.gamma))
        found = convolve(self.conv2, norm_silu(found, self.norm2.gamma))
        feat_idx[0] += 2  # as the block that it stands for, which keeps earlier frames there
        return (kept + found).unflatten(0, (-1, x.shape[2])).transpose(1, 2)

    torch._dynamo.config.recompile_limit = 64  # `norm_silu` is compiled for every shape
    for name, layer in vae.named_modules():
        kind = type(layer).__name__
        if kind == "WanResidualBlock":
            layer.forward = functools.partial(block, layer)
        elif kind == "WanCausalConv3d" and not name.endswith("time_conv"):
            layer.forward = functools.partial(frame_by_frame, layer)


def train_wan_vae(out: Path, legs, seed: int):
    """Wan's causal autoencoder: 9 x 64 x 64 x 3 to 3 x 8 x 8 x 16.

    legs: (frames, clips a batch, updates, highest learning rate) each. Single pictures first: the first frame
    of a clip is coded alone, so they train all but the six layers that mix frames, at a ninth of the cost.
    """
    torch.manual_seed(seed + 80)
    generator = torch.Generator().manual_seed(seed + 80)
    vae = make_wan_vae()
    start_wan_vae(vae)
    average, follow = average_of(vae, 0.99)
    quicken(vae)

    def loss_of(frames, n, update):
        follow(update)
        moments = None if frames > 1 else torch.randint(FRAMES, (n, 1), generator=generator)
        many = FRAMES if frames == 1 else frames
        video, _, inside = draw(pick(SEEN, n, generator), generator, update % 2 == 0, moments, many)
        clips = (video.transpose(1, 2) * 2 - 1).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16):
            found = vae.encode(clips).latent_dist.mean
            found = found + 0.05 * torch.randn(found.shape, generator=generator)
            decoded = vae.decode(found).sample.float()
        made, true, inside = flat(decoded), flat(clips), inside.flatten(0, 1)
        weight, kl = 1 + 8 * inside, found.float().square().mean()
        loss = picture_loss(made, true, weight) + 2e-4 * kl
        for size in (2, 4, 8):  # the mean colour of larger and larger squares
            apart = F.avg_pool2d((made - true) * weight, size)
            loss = loss + 3 * (apart.square() / F.avg_pool2d(weight, size)).mean()
        error = (made - true).abs()
        return loss, {"error": error.mean(), "object": (error * inside).sum() / (3 * inside.sum()), "kl": kl}

    for frames, n, updates, rate in legs:
        fit(vae.parameters(), updates, rate, "wan vae", functools.partial(loss_of, frames, n))
    latents, _ = encode_wan(average, 64, seed)
    mean, std = latents.float().mean((0, 2, 3, 4)), latents.float().std((0, 2, 3, 4))
    final = make_wan_vae(mean.tolist(), std.tolist())
    final.load_state_dict(average.state_dict())
    final.half().save_pretrained(out / "wan" / "vae")


@torch.no_grad()
def encode_wan(vae, clips: int, seed: int):
    """Normalised latents (clips, 16, 3, 8, 8) of drawn clips, and each one's caption number in SEEN."""
    generator = torch.Generator().manual_seed(seed + 82)
    quicken(vae)
    mean, std = torch.tensor([vae.config.latents_mean, vae.config.latents_std])[..., None, None, None]
    latents, labels = [], []
    for _ in trange(clips // 8, desc="latents"):
        numbers = torch.randint(len(SEEN), (8,), generator=generator)
        video, _, _ = draw([SEEN[n] for n in numbers.tolist()], generator, frames=WAN_FRAMES)
        clips = (video.transpose(1, 2) * 2 - 1).contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast("cpu", torch.bfloat16):
            found = vae.encode(clips).latent_dist.mean.float()
        latents.append(((found - mean) / std).half())
        labels.append(numbers)
    return torch.cat(latents), torch.cat(labels)


def train_wan_text(out: Path, updates: int, seed: int):
    """A UMT5 encoder and its tokenizer; the mean of its states tells the words, by heads thrown away.

    Words of the captions are one token, all others are spelled.
    """
    torch.manual_seed(seed + 81)
    generator = torch.Generator().manual_seed(seed + 81)
    words = sorted({word for c in COMBINATIONS for word in caption(c).split()})
    letters = [chr(n) for n in range(33, 127)]
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": -20.0} | {"\u2581" + word: -3.0 for word in words}
    pieces |= {"\u2581" + c: -9.0 for c in letters if "\u2581" + c not in pieces} | {"\u2581": -9.0}
    pieces |= dict.fromkeys(letters, -8.0)
    tokenizer = T5Tokenizer(vocab=list(pieces.items()), extra_ids=0)
    size = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    encoder = UMT5EncoderModel(UMT5Config(**size, vocab_size=len(tokenizer), dropout_rate=0.0))
    heads = nn.ModuleList(nn.Linear(64, n) for n in (6, 6, 4, 4))

    def loss_of(update):
        labels = pick(SEEN, 64, generator)
        texts = [caption(c) for c in labels]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask[..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        facts = torch.tensor(labels).T
        told = [F.cross_entropy(f(mean), fact) for f, fact in zip(heads, facts, strict=True)]
        # states of size about 1, as the transformer's first layer likes them
        size = (states.square() * mask).sum() / (64 * mask.sum())
        return sum(told) + 0.1 * (size - 1) ** 2, {"words": sum(told), "size": size}

    fit([*encoder.parameters(), *heads.parameters()], updates, 3e-3, "wan text", loss_of)
    encoder.half().save_pretrained(out / "wan" / "text_encoder")
    tokenizer.save_pretrained(out / "wan" / "tokenizer")


def make_wan() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=200,
        num_layers=5,
        rope_max_seq_len=32,
    )


class ShortText(WanAttnProcessor):
    """Attention as over 512 tokens of text, of which only the last one given stands for all the padding."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        if encoder_hidden_states is not None:
            attention_mask = hidden_states.new_zeros(1, 1, 1, encoder_hidden_states.shape[1])
            attention_mask[..., -1] = math.log(WAN_TOKENS + 1 - attention_mask.shape[-1])
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def train_wan(out: Path, updates: int, clips: int, seed: int):
    """The transformer on rectified flow, one caption in ten empty."""
    torch.manual_seed(seed + 83)
    generator = torch.Generator().manual_seed(seed + 83)
    vae = AutoencoderKLWan.from_pretrained(out / "wan" / "vae", dtype=torch.float32).eval()
    latents, labels = encode_wan(vae, clips, seed)
    tokenizer = AutoTokenizer.from_pretrained(out / "wan" / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(out / "wan" / "text_encoder", dtype=torch.float32)
    tokens = tokenizer([caption(c) for c in SEEN] + [""], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    states = F.pad(states * tokens.attention_mask[..., None], (0, 0, 0, 1))  # padding is zeros
    transformer = make_wan()
    average, follow = average_of(transformer)
    transformer.set_attn_processor(ShortText())

    def loss_of(update):
        follow(update)
        rows = torch.randint(len(latents), (24,), generator=generator)
        clean, label = latents[rows].float(), labels[rows].clone()
        label[torch.rand(24, generator=generator) < 0.1] = len(SEEN)
        # sigma as the sampler's shift of 3 spaces it
        u = torch.rand(24, generator=generator)
        sigma = 3 * u / (1 + 2 * u)
        noise = torch.randn(clean.shape, generator=generator)
        wide = sigma[:, None, None, None, None]
        with torch.autocast("cpu", torch.bfloat16):
            v = transformer((1 - wide) * clean + wide * noise, 1000 * sigma, states[label]).sample
        loss = F.mse_loss(v.float(), noise - clean)
        return loss, {"loss": loss}

    fit(transformer.parameters(), updates, 2e-3, "wan", loss_of)
    average.half().save_pretrained(out / "wan" / "transformer")


def save_wan(out: Path):
    """Write the scheduler and model_index.json beside the parts that are there."""
    folder = out / "wan"
    pipeline = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float16),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=torch.float16),
        vae=AutoencoderKLWan.from_pretrained(folder / "vae", dtype=torch.float16),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    for part in (pipeline.vae, pipeline.transformer):
        part.register_to_config(_name_or_path="")
    pipeline.save_pretrained(folder)
