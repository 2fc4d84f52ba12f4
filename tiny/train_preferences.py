"""The rewards for pictures that fit their captions: clip, and the preference models hps and pickscore."""

import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import nn
from train_clip import image_embedding, look_alike, make_clip, text_embedding, tokenize
from training import fit, frames_of
from transformers import CLIPModel, CLIPTokenizer
from world import COMBINATIONS, SIZE, VISIBLE, caption, uniform


def train_clip_reward(out: Path, pool, updates: int, seed: int):
    """The CLIP of `--reward clip`: contrastive on captions; captions that look alike are no wrong answers.

    For a caption, a spoiled copy of its picture is wrong too: the score falls as a picture dissolves.
    """
    torch.manual_seed(seed + 40)
    generator = torch.Generator().manual_seed(seed + 40)
    video, labels, _, _ = pool
    tokenizer = CLIPTokenizer.from_pretrained(out / "t2v" / "tokenizer")
    clip = make_clip(tokenizer, hidden=64, mlp=128)
    heads = nn.ModuleList(nn.Linear(64, n) for n in (6, 6, 4))
    tokens = {tuple(c): tokenize(tokenizer, [caption(c)]) for c in COMBINATIONS}

    def loss_of(update):
        rows = torch.randint(len(video), (96,), generator=generator)
        pictures, _ = frames_of(video, rows, generator)
        image, worse = image_embedding(clip, torch.cat([pictures, spoiled(pictures, generator)])).split(96)
        text = text_embedding(clip, torch.cat([tokens[tuple(c)] for c in labels[rows].tolist()]))
        scale = clip.logit_scale.exp().clamp(max=50)
        logits = (image @ text.T * scale).masked_fill(look_alike(labels[rows]), -1e4)
        spoils = (text * worse).sum(-1, keepdim=True) * scale
        right = torch.arange(96)
        by_text = F.cross_entropy(torch.cat([logits.T, spoils], 1), right)
        contrast = (F.cross_entropy(logits, right) + by_text) / 2
        visible = labels[rows][:, VISIBLE]
        look = sum(F.cross_entropy(f(image), visible[:, i]) for i, f in enumerate(heads))
        hit = (logits.argmax(1) == right).float().mean()
        return contrast + 0.3 * look, {"contrast": contrast, "look": look, "hit": hit}

    fit([*clip.parameters(), *heads.parameters()], updates, 2e-3, "clip reward", loss_of)
    clip.half().save_pretrained(out / "rewards" / "clip")
    tokenizer.save_pretrained(out / "rewards" / "clip")


def spoiled(pictures, generator):
    """Pictures (n, 3, 64, 64) in [0, 1], each partly dissolved into another one: its caption fits less."""
    n = len(pictures)
    other = pictures[torch.randperm(n, generator=generator)]
    share = uniform((n, 1, 1, 1), 0.15, 0.6, generator)
    # over the whole picture, or within a soft spot of it
    place = uniform((n, 2, 1, 1), -0.6, 0.6, generator)
    axis = torch.linspace(-1, 1, SIZE)
    far = (axis[:, None] - place[:, 0]) ** 2 + (axis - place[:, 1]) ** 2
    spot = torch.exp(-far / 0.3)[:, None]
    whole = torch.rand((n, 1, 1, 1), generator=generator) < 0.5
    return torch.lerp(pictures, other, share * torch.where(whole, 1.0, 1.6 * spot))


def train_preference(out: Path, pool, name: str, updates: int, seed: int):
    """hps or pickscore: that CLIP, tuned on pairs by the Bradley-Terry loss, as the published ones are."""
    torch.manual_seed(seed + 41)
    generator = torch.Generator().manual_seed(seed + 41)
    clip = CLIPModel.from_pretrained(out / "rewards" / "clip", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(out / "rewards" / "clip")
    taste, (_, labels, _, _) = tastes(pool)[name], pool
    tokens = {tuple(c): tokenize(tokenizer, [caption(c)]) for c in COMBINATIONS}

    def loss_of(update):
        rows, a, b, preferred = make_pairs(pool, taste, 64, generator)
        text = text_embedding(clip, torch.cat([tokens[tuple(c)] for c in labels[rows].tolist()]))
        image = image_embedding(clip, torch.cat([a, b]))
        better = (image.view(2, len(rows), -1) * text).sum(-1) * 30
        gain = torch.where(preferred, better[0] - better[1], better[1] - better[0])
        return -F.logsigmoid(gain).mean(), {"right": (gain > 0).float().mean()}

    fit(clip.parameters(), updates, 1e-3, name, loss_of)
    folder = out / "rewards" / name
    if name == "hps":
        save_hps(folder, clip)
    else:
        clip.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_hps(folder: Path, clip: CLIPModel):
    """The weights as HPSv2 publishes them, and open_clip's description of the network."""
    text, vision = clip.config.text_config, clip.config.vision_config
    config = {
        "embed_dim": clip.config.projection_dim,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": SIZE,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            "mlp_ratio": text.intermediate_size / text.hidden_size,
        },
    }
    model = open_clip_from(clip, config)
    config["text_cfg"]["hf_tokenizer_name"] = "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.half() for key, value in model.state_dict().items() if key != "attn_mask"}
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}, indent=1))


def make_pairs(pool, taste, n: int, generator):
    """Two pictures for a caption, and which is preferred: fewer wrong words, else the better by `taste`.

    taste: (pictures, rows) -> (n,), higher is better, spread about 1. Returns rows of the captions (n,),
    pictures a, b: (n, 3, 64, 64), and preferred: (n,) bool, True for a. Pairs closer than 0.5 are left out.
    """
    video, labels, _, _ = pool
    first = torch.randint(len(video), (4 * n,), generator=generator)
    near = (labels[first][:, None, VISIBLE] == labels[None, :, VISIBLE]).sum(-1)  # words in common
    weight = torch.tensor([0.0, 0.02, 0.2, 1.0])[near] / torch.bincount(near.flatten(), minlength=4)[near]
    second = torch.multinomial(weight, 1, generator=generator)[:, 0]
    a, b = frames_of(video, first, generator)[0], frames_of(video, second, generator)[0]
    wrong = (labels[first][:, VISIBLE] != labels[second][:, VISIBLE]).sum(-1)
    gain = taste(a, first) - taste(b, second) + 10 * wrong
    kept = (gain.abs() > 0.5).nonzero()[:n, 0]
    swap = torch.rand(len(kept), generator=generator) < 0.5
    mixed = swap[:, None, None, None]
    a, b = torch.where(mixed, b[kept], a[kept]), torch.where(mixed, a[kept], b[kept])
    return first[kept], a, b, (gain[kept] > 0) ^ swap


def tastes(pool):
    """What the two preference models like: HPS the aesthetic target, PickScore contrast and brightness."""
    _, _, target, _ = pool

    def hps(pictures, rows):
        return (target[rows] - 5.5) / 1.5

    def pickscore(pictures, rows):
        light = pictures.mean(1).flatten(1)
        return light.std(1) / 0.06 + light.mean(1) / 0.15

    return {"hps": hps, "pickscore": pickscore}


def open_clip_from(clip: CLIPModel, config: dict):
    """The same network as an open_clip model, as HPSv2 publishes its weights."""
    state, old = {}, clip.state_dict()
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for side, prefix in (("text_model.encoder.layers", ""), ("vision_model.encoder.layers", "visual.")):
        layers = {key.removeprefix(side + ".").split(".")[0] for key in old if key.startswith(side)}
        for layer in layers:
            here, there = f"{side}.{layer}", f"{prefix}transformer.resblocks.{layer}"
            for kind in ("weight", "bias"):
                parts = [old[f"{here}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                state[f"{there}.attn.in_proj_{kind}"] = torch.cat(parts)
                for a, b in names.items():
                    state[f"{there}.{b}.{kind}"] = old[f"{here}.{a}.{kind}"]
    moved = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    }
    state |= {new: old[name] for new, name in moved.items()}
    state["text_projection"] = old["text_projection.weight"].T
    state["visual.proj"] = old["visual_projection.weight"].T
    model = open_clip.CLIP(**config)
    model.load_state_dict(state)
    return model
