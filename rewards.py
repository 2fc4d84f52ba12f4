"""Every reward, one shape: `make(device, dtype, weights) -> reward`, `reward(frames, prompts) -> (B,)`.

    frames:  (B, N, 3, H, W) float32 in [0, 1]       prompts: list of B strings
    returns: (B,) float32, higher is better, one number per video, differentiable with respect to frames

`reward.frames` says what it wants to see: 1 for an image reward (a mean over any frames), n for a clip of n
evenly spaced frames, "all" for every frame. `weights` is None for the published weights, or the folder that
holds the same files, DIR/name of `--reward_weights DIR`. A `make` with a parameter `arg` gets what follows
the colon in `--reward name:arg`; when that has no default, it must be given.
Optional: `reward.report`, {name: (B,)} figures of the last call to log beside the reward;
`reward.check(prompts)`, called once before training, which raises BadInput when it can't work with them;
`reward.networks`, a list of modules, for `--offload` to move to host memory while no video is scored.

Your own reward: write `make_mine` by imitating `make_colorful`, and add one line to REWARDS at the end.
"""

import contextlib
import difflib
import functools
import inspect
import json
import os
import pickle
import re
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub import errors as hub
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    VideoMAEForVideoClassification,
    VJEPA2Model,
    YolosForObjectDetection,
)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- 1. Shared pieces --------------------------------------------------------------------------------------
class BadInput(ValueError):
    """A setting or file that can't be used; its message is one line that says what to do."""


def need(ok, message: str):
    """Raise BadInput(message) unless ok."""
    if not ok:
        raise BadInput(message)


def hub_problem(error: Exception, source: str) -> str:
    """What to do about an exception of huggingface_hub; its more particular classes come first."""
    status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else 0
    refused = {401: "run `hf auth login`", 429: "too many requests: wait, or run `hf auth login`"}
    http = sys.modules[hub.HTTPError.__module__]  # httpx, or what has replaced it
    offline = "check the network, or take --model tiny, needing none"
    rows = [
        (hub.GatedRepoError, f"accept its terms on huggingface.co/{source}, then run `hf auth login`"),
        (hub.RepositoryNotFoundError, "no such folder, nor on the hub: check it, or run `hf auth login`"),
        (hub.HFValidationError, "no such folder, and no hub id either: check the spelling"),
        (hub.LocalTokenNotFoundError, "run `hf auth login`"),
        (hub.OfflineModeIsEnabled, f"it is not in the cache, and HF_HUB_OFFLINE is set: {offline}"),
        (hub.HfHubHTTPError, refused.get(status, f"the hub answers {status}: try again later")),
        (http.TimeoutException, f"the hub does not answer: {offline}"),
        ((http.HTTPError, ConnectionError, hub.LocalEntryNotFoundError), f"no way to the hub: {offline}"),
        (OSError, f"{error}: make room, or set HF_HOME to a place on another disk"),
    ]
    return next(text for kinds, text in rows if isinstance(error, kinds))


@functools.cache
def list_hub(source: str) -> list[str]:
    """The files of a hub repository. One request without retries: what is wrong shows within seconds."""
    return [file.rfilename for file in HfApi().model_info(source, timeout=8).siblings]


def fetch(source: str, name: str, flag: str) -> Path:
    """One file of a folder; or of a hub repository, from the cache, else downloaded. Raises BadInput."""
    where, cached = Path(source), None
    need(not where.is_file(), f"{flag}: {source} is a file: give the folder that has its config beside it")
    if where.is_dir():
        cached = str(where / name) if (where / name).is_file() else None
        need(cached, f"{flag}: there is no {name} in the folder {source}")
    try:
        cached = cached or try_to_load_from_cache(source, name)
        if not isinstance(cached, str):
            need(name in list_hub(source), f"{flag}: there is no {name} in {source} on the hub")
            cached = hf_hub_download(source, name)
        return Path(cached)
    except (hub.HTTPError, OSError, hub.HFValidationError) as error:
        raise BadInput(f"{flag}: can't get {source!r}: {hub_problem(error, source)}") from None


DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
DAMAGED += (RuntimeError, EOFError, SyntaxError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile)
DAMAGED += (SafetensorError, Image.DecompressionBombError, hub.StrictDataclassError)


@contextlib.contextmanager
def reading(problem: str):
    """Inside, what libraries raise on damaged files is one line, `problem` first. Raises BadInput."""
    try:
        yield
    except BadInput:
        raise
    except DAMAGED as error:
        raise BadInput(f"{problem} ({type(error).__name__}: {' '.join(str(error).split())[:120]})") from None


def read_json(path: Path) -> dict:
    with reading(f"{path} is damaged, get it again"):
        return dict(json.loads(path.read_text(encoding="utf-8")).items())


# Files of weights: (fp16 or not, of how many, kind). What a tokenizer can't do without.
WEIGHTS = r"(?:diffusion_pytorch_model|pytorch_model|model)(\.fp16)?(?:-\d+-of-(\d+))?(\.safetensors|\.bin)"
VOCABULARIES = [{"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"}, {"tokenizer.model"}]
VOCABULARIES += [{"preprocessor_config.json"}]  # that of a processor


def pick_files(names, network: bool, half: bool) -> list[str]:
    """Which of a folder's files to take: safetensors before .bin, fp16 if `half`. Incomplete: none."""
    if not network:
        return next((sorted(files) for files in VOCABULARIES if files <= {*names}), [])
    groups = {}
    for found in filter(None, (re.fullmatch(WEIGHTS, name) for name in names)):
        fp16, parts, kind = found.groups()
        groups.setdefault((kind, bool(fp16) == half, int(parts or 1)), []).append(found[0])
    return groups.get(max((key for key, files in groups.items() if len(files) == key[2]), default=None), [])


def load(kind, source: str, flag: str, subfolder="", dtype=None, more="$"):
    """`kind.from_pretrained`, whole: nothing missing, nothing that nobody takes, every number finite.

    kind: class of a network or tokenizer in transformers or diffusers; source: a folder or hub id; more:
    pattern of the keys that the published file is known to hold beyond these. Raises BadInput.
    """
    network, half = hasattr(kind, "state_dict"), dtype in (torch.float16, torch.bfloat16)
    prefix = f"{subfolder}/" if subfolder else ""
    config = "preprocessor" if "Processor" in kind.__name__ else "tokenizer"
    folder = fetch(source, prefix + ("config.json" if network else f"{config}_config.json"), flag).parent
    files = pick_files(os.listdir(folder), network, half)
    if not files and not Path(source).is_dir():
        names = [name.removeprefix(prefix) for name in list_hub(source) if name.startswith(prefix)]
        files = pick_files(names, network, half)
        for name in [*filter(re.compile(r"[^/]*\.(json|txt|model)").fullmatch, names), *files]:
            fetch(source, prefix + name, flag)
    what = "weights" if network else "its vocabulary"
    need(files, f"{flag}: {folder} lacks {what}, or a part of that: get it again")
    with reading(f"{flag}: the {kind.__name__} in {folder} is damaged, get it again"):
        if not network:
            need("tokenizer.json" not in files or read_json(folder / "tokenizer.json")["model"]["vocab"], "")
            return kind.from_pretrained(str(folder), local_files_only=True)
        variant = "fp16" if ".fp16" in files[0] else None
        made, info = kind.from_pretrained(str(folder), dtype=dtype, variant=variant, output_loading_info=True)
    odd = [key for key in info["unexpected_keys"] if not re.match(f"{more}|.*position_ids$", key)]
    odd += [*info["missing_keys"], *info["mismatched_keys"]]
    state = {key: w for key, w in made.state_dict().items() if w.is_floating_point() and not w.is_meta}
    odd += [key for key, w in state.items() if not w.isfinite().all()]
    said = f"{flag}: {len(odd)} weights of the {kind.__name__} in {folder} are missing, odd or not finite"
    need(not odd, f"{said}, as {min(map(str, odd), default='')}: get it again")
    return made


def load_state(network, path: Path, inside: str | None = None):
    """Load a file of torch.save into a network, all of it. inside: the key it is under. Raises BadInput."""
    with reading(f"{path} is damaged, get it again"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state[inside] if inside else state)
        need(all(w.isfinite().all() for w in network.state_dict().values()), f"{path}: not all is finite")


def evenly_spaced(n: int, size: int) -> list[int]:
    """n indices of `size` things, the first and the last among them; some twice where n is larger."""
    return np.linspace(0, size - 1, n).round().astype(int).tolist()


def exact(x):
    """float32, or float64 if it is that already: half precision is for the inside of networks only."""
    return x if x.dtype == torch.float64 else x.float()


def preprocess(frames, size, mean, std, short_side=False, crop=None, mode="bicubic"):
    """Frames as a network wants them: resized with antialiasing, cropped, normalised; differentiable.

    frames: (..., 3, H, W) in [0, 1] -> (n, 3, h, w). size: (h, w) to squash to, or an int for a square; with
    short_side it is the shorter side's, and the shape is kept. crop: side of a square cut from the middle.
    """
    pictures = exact(frames).flatten(0, -4)
    height, width = pictures.shape[-2:]
    if short_side:
        ratio = max(height, width) / min(height, width)
        size = (size, int(size * ratio)) if height <= width else (int(size * ratio), size)
    size = (size, size) if isinstance(size, int) else size
    if (height, width) != size:
        pictures = F.interpolate(pictures, size, mode=mode, antialias=True).clamp(0, 1)
    if crop:
        top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
        pictures = pictures[..., top : top + crop, left : left + crop]
    mean, std = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (mean, std))
    return (pictures - mean) / std


def checkpoint_blocks(network: nn.Module, classes: tuple[str, ...]):
    """Recompute the activations of every block of these classes in the backward pass (Chen et al. 2016).

    diffusers has no such switch for UNet3DConditionModel; for others, its switch leaves out the attention;
    transformers' works in training mode only.
    """

    def recomputed(forward, *args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # as separate tensors, or an outer checkpoint could not free them (CogVideoX's caches: 6 GB)
        leaves, shape = tree_flatten((args, kwargs))

        def run(*leaves):
            args, kwargs = tree_unflatten(leaves, shape)
            return forward(*args, **kwargs)

        return checkpoint(run, *leaves, use_reentrant=False, preserve_rng_state=False)

    for module in network.modules():
        if type(module).__name__ in classes:
            module.forward = functools.partial(recomputed, module.forward)


def frozen(network, device, dtype, blocks=()):
    """Eval mode; no weight gradients, they go through a reward, never into it; checkpointed on a GPU."""
    if str(device).startswith("cuda"):
        checkpoint_blocks(network, blocks)
    return network.to(device, dtype).eval().requires_grad_(False)


def plain(text: str) -> str:
    """Lower case, without articles: people write "playing the piano" where the label is "playing piano"."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower()).split())


def pick_label(names, wanted: str, what: str) -> int:
    """Index of a label by its name, in whatever case. names: {index: name}. Raises BadInput."""
    numbers = {plain(name): int(number) for number, name in names.items()}
    if plain(wanted) not in numbers:
        near = ", ".join(difflib.get_close_matches(plain(wanted), numbers, n=4, cutoff=0))
        raise BadInput(f"no {what} {wanted!r} among the model's {len(numbers)}; the nearest are: {near}")
    return numbers[plain(wanted)]


# ---- 2. Image rewards --------------------------------------------------------------------------------------
class AestheticHead(nn.Module):
    """LAION's aesthetic predictor: linear layers, dropouts between, no activations (layers.0/2/4/6/7)."""

    def __init__(self, width):
        super().__init__()
        first = [nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)]
        last = [nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)]
        self.layers = nn.Sequential(*first, *last)

    def forward(self, embedding):
        return self.layers(embedding)


def make_aesthetic(device, dtype, weights=None):
    """LAION aesthetic score, about 1 to 10: a linear head on the normalised CLIP ViT-L/14 image embedding.

    Source: github.com/christophschuhmann/improved-aesthetic-predictor, `sac+logos+ava1-l14-linearMSE`.
    """
    path = fetch(weights or "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth", "aesthetic")
    model = weights or "openai/clip-vit-large-patch14"
    more = r"text_|logit_scale"  # of a whole CLIP
    clip = load(CLIPVisionModelWithProjection, model, "aesthetic", dtype=dtype, more=more)
    head = AestheticHead(clip.config.projection_dim)
    load_state(head, path)
    clip = frozen(clip, device, dtype, ("CLIPEncoderLayer",))
    head = frozen(head, device, torch.promote_types(dtype, torch.float32))

    def reward(frames, prompts):
        pixels = preprocess(frames, clip.config.image_size, CLIP_MEAN, CLIP_STD)  # (B * N, 3, S, S)
        embedding = exact(clip(pixel_values=pixels.to(dtype)).image_embeds)  # (B * N, D)
        return head(F.normalize(embedding, dim=-1)).view(frames.shape[:2]).mean(1)

    reward.frames, reward.networks = 1, [clip, head]
    return reward


def image_text_reward(network, embed_image, embed_text):
    """Cosine of each frame's embedding and its own prompt's, averaged over frames; texts are embedded once.

    embed_image: (B, N, 3, H, W) -> (B * N, D); embed_text: a prompt -> (1, D).
    """
    known = {}

    def reward(frames, prompts):
        with torch.no_grad():
            known.update({p: F.normalize(exact(embed_text(p)), dim=-1) for p in {*prompts} - known.keys()})
        texts = torch.stack([known[p] for p in prompts])  # (B, 1, D)
        images = F.normalize(exact(embed_image(frames)), dim=-1).unflatten(0, frames.shape[:2])  # (B, N, D)
        return (images * texts).sum(-1).mean(1)

    reward.frames, reward.networks = 1, [network]
    return reward


def load_clip(model, text_model, flag, device, dtype, cropped=False):
    """A transformers CLIP: the model, frames (B, N, 3, H, W) -> (B * N, D), and a prompt -> (1, D)."""
    tokenizer = load(CLIPTokenizer, text_model, flag)
    clip = frozen(load(CLIPModel, model, flag, dtype=dtype), device, dtype, ("CLIPEncoderLayer",))
    size, length = clip.config.vision_config.image_size, clip.config.text_config.max_position_embeddings
    how = dict(short_side=True, crop=size) if cropped else {}
    fill = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}

    def embed_image(frames):
        pixels = preprocess(frames, size, CLIP_MEAN, CLIP_STD, **how).to(dtype)
        return clip.visual_projection(clip.vision_model(pixel_values=pixels).pooler_output)

    def embed_text(prompt):
        return clip.text_projection(clip.text_model(**tokenizer(prompt, **fill).to(device)).pooler_output)

    return clip, embed_image, embed_text


def make_clip(device, dtype, weights=None, arg=None):
    """Cosine of frame and prompt by CLIP (Radford et al. 2021), -1 to 1. arg: a hub id, else ViT-L/14."""
    model = arg or weights or "openai/clip-vit-large-patch14"
    return image_text_reward(*load_clip(model, model, "clip", device, dtype))


def make_pickscore(device, dtype, weights=None):
    """PickScore (Kirstain et al. 2023): exp(logit scale) x cosine / 100, about 0.2."""
    model = weights or "yuvalkirstain/PickScore_v1"
    text_model = weights or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    clip, *embed = load_clip(model, text_model, "pickscore", device, dtype, cropped=True)
    cosine, scale = image_text_reward(clip, *embed), exact(clip.logit_scale).exp() / 100

    def reward(frames, prompts):
        return scale * cosine(frames, prompts)

    reward.frames, reward.networks = 1, [clip]
    return reward


def make_hps(device, dtype, weights=None, arg=None):
    """HPSv2 (Wu et al. 2023): cosine of frame and prompt, about 0.2 to 0.35. arg: 2.1 (default) or 2.0.

    Source: github.com/tgxs002/HPSv2. A folder may bring an open_clip_config.json, else it is a ViT-H-14.
    """
    files = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}
    need((arg or "2.1") in files, f"no HPS version {arg!r}: there are hps:2.1 (as plain hps) and hps:2.0")
    folder = weights or "xswu/HPSv2"
    path, own = fetch(folder, files[arg or "2.1"], "hps"), Path(folder) / "open_clip_config.json"
    name, config = "ViT-H-14", open_clip.get_model_config("ViT-H-14")
    if own.exists():
        name, config = f"local-dir:{folder}", read_json(own).get("model_cfg")
        load(CLIPTokenizer, folder, "hps")
    with reading(f"{own} is damaged"):
        clip, tokenizer = open_clip.CLIP(**config), open_clip.get_tokenizer(name)
    load_state(clip, path, inside="state_dict")
    clip = frozen(clip, device, dtype, ("ResidualAttentionBlock",))

    def embed_image(frames):
        size = clip.visual.image_size
        size = size if isinstance(size, int) else size[0]
        return clip.encode_image(preprocess(frames, size, CLIP_MEAN, CLIP_STD).to(dtype))

    def embed_text(prompt):
        return clip.encode_text(tokenizer([prompt]).to(device))

    return image_text_reward(clip, embed_image, embed_text)


def make_remove(device, dtype, weights=None, *, arg):
    """Minus how much of an object YOLOS (Fang et al. 2021) sees in a frame, from 0 down. arg: a COCO name.

    Sum over queries of p sigmoid((p - 0.2) / 0.05), p being the object's softmax probability: a faint
    detection counts for little and still has a gradient. Reports the detections above 0.2 as `count`.
    """
    yolos = load(YolosForObjectDetection, weights or "hustvl/yolos-base", "remove", dtype=dtype)
    number, side = pick_label(yolos.config.id2label, arg, "object"), min(512, yolos.config.image_size[0])
    yolos = frozen(yolos, device, dtype, ("YolosLayer",))

    def reward(frames, prompts):
        height, width = frames.shape[-2:]
        short = min(side, 1333 * min(height, width) / max(height, width))  # the longer side is at most 1333
        size = [int(short * s / min(height, width)) // 16 * 16 for s in (height, width)]
        pixels = preprocess(frames, tuple(size), IMAGENET_MEAN, IMAGENET_STD, mode="bilinear")
        p = exact(yolos(pixel_values=pixels.to(dtype)).logits).softmax(-1)[..., number]  # (B * N, queries)
        seen = (p * torch.sigmoid((p - 0.2) / 0.05)).sum(-1)
        reward.report = {"count": (p > 0.2).sum(-1).view(frames.shape[:2]).float().mean(1)}
        return -seen.view(frames.shape[:2]).mean(1)

    reward.frames, reward.networks = 1, [yolos]
    return reward


def make_colorful(device, dtype, weights=None):
    """Colourfulness M3 of Hasler & Suesstrunk 2003 / 100: 0 is grey, 1 extremely colourful. No network."""

    def reward(frames, prompts):
        r, g, b = (255 * exact(frames)).flatten(3).unbind(2)  # each (B, N, H * W)
        rg, yb = r - g, (r + g) / 2 - b
        # the small number keeps the square root's slope finite on a grey frame
        spread = (rg.var(-1, correction=0) + yb.var(-1, correction=0) + 1e-6).sqrt()
        mean = (rg.mean(-1) ** 2 + yb.mean(-1) ** 2 + 1e-6).sqrt()
        return (spread + 0.3 * mean).mean(1) / 100

    reward.frames = 1
    return reward


# the luminance quantisation table of the JPEG standard (ITU-T T.81, table K.1), at quality 50
JPEG_TABLE = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99
"""


def make_compressible(device, dtype, weights=None):
    """Minus the estimated size of a frame as JPEG, in kB: bits of its quantised 8 x 8 DCT, no network.

    A coefficient c in steps of q counts log2(1 + |c / q|), rounding left out; luminance, and both chroma
    planes at half resolution. 2.2 bits each and 0.6 kB of headers fit photographs at quality 50.
    """
    n = torch.arange(8.0)
    dct = torch.cos((2 * n + 1) * n[:, None] * torch.pi / 16) / 2
    dct[0] /= 2**0.5
    table = torch.tensor([float(q) for q in JPEG_TABLE.split()]).view(8, 8)
    # RGB to luminance, blue and red difference (ITU-T T.871)
    matrix = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]

    def bits(plane):
        """plane: (n, H, W), 0 to 255 -> (n,) bits."""
        height, width = plane.shape[-2] // 8 * 8, plane.shape[-1] // 8 * 8
        blocks = plane[:, :height, :width].unflatten(1, (-1, 8)).unflatten(3, (-1, 8)).transpose(2, 3)
        rows = dct.to(plane)
        coefficients = rows @ (blocks - 128) @ rows.T / table.to(plane)  # (n, H / 8, W / 8, 8, 8)
        return torch.log2(1 + coefficients.abs()).flatten(1).sum(1)

    def reward(frames, prompts):
        pictures = 255 * exact(frames).flatten(0, 1)
        planes = torch.einsum("yc,nchw->nyhw", torch.tensor(matrix).to(pictures), pictures)
        chroma = F.avg_pool2d(planes[:, 1:] + 128, 2)
        size = bits(planes[:, 0]) + bits(chroma[:, 0]) + bits(chroma[:, 1])
        return -(0.6 + 2.2 * size / 8000).view(frames.shape[:2]).mean(1)

    reward.frames = 1
    return reward


# ---- 3. Clip rewards ---------------------------------------------------------------------------------------
def make_action(device, dtype, weights=None, arg=None):
    """Log probability of an action by VideoMAE (Tong et al. 2022), from 0 down. arg: a Kinetics-400 name.

    Without arg each prompt must hold the name of an action; the longest counts. Reports `probability`.
    """
    source = weights or "MCG-NJU/videomae-base-finetuned-kinetics"
    network = load(VideoMAEForVideoClassification, source, "action", dtype=dtype)
    config = network.config
    fixed = None if arg is None else pick_label(config.id2label, arg, "action")
    network, size = frozen(network, device, dtype, ("VideoMAELayer",)), config.image_size

    def label_of(prompt):
        names = config.id2label.values()
        held = [name for name in names if re.search(rf"\b{re.escape(plain(name))}\b", plain(prompt))]
        if not held:
            near = ", ".join(difflib.get_close_matches(prompt, names, n=3, cutoff=0))
            raise BadInput(f"prompt {prompt!r} names no action; give one, as in action:{near} (the nearest)")
        return pick_label(config.id2label, max(held, key=len), "action")

    def check(prompts):
        if fixed is None:
            for prompt in dict.fromkeys(prompts):
                print(f"action: {config.id2label[label_of(prompt)]!r} in {prompt!r}")

    def reward(frames, prompts):
        labels = [label_of(p) if fixed is None else fixed for p in prompts]
        crop = dict(short_side=True, crop=size, mode="bilinear")
        pixels = preprocess(frames, size, IMAGENET_MEAN, IMAGENET_STD, **crop).unflatten(0, frames.shape[:2])
        logits = exact(network(pixel_values=pixels.to(dtype)).logits)  # (B, labels)
        value = logits.log_softmax(-1)[torch.arange(len(prompts)), labels]
        reward.report = {"probability": value.detach().exp()}
        return value

    reward.frames, reward.networks, reward.check = config.num_frames, [network], check
    return reward


def jepa_masks(time: int, height: int, width: int, blocks: int, area: float, generator):
    """V-JEPA's mask: `blocks` rectangles, each `area` of a frame, aspect 0.75 to 1.5, through all of time.

    Returns token indices (context,), (target,) of a clip of time x height x width tokens; neither is empty.
    """
    inside = torch.zeros(height, width, dtype=torch.bool)
    for _ in range(blocks):
        aspect = 0.75 + 0.75 * torch.rand((), generator=generator).item()
        h = min(max(round((area * height * width * aspect) ** 0.5), 1), height)
        w = min(max(round((area * height * width / aspect) ** 0.5), 1), width)
        top = int(torch.randint(height - h + 1, (), generator=generator))
        left = int(torch.randint(width - w + 1, (), generator=generator))
        inside[top : top + h, left : left + w] = True
    if inside.all():
        inside[0, 0] = False
    everywhere = inside.expand(time, -1, -1).flatten()
    return (~everywhere).nonzero()[:, 0], everywhere.nonzero()[:, 0]


def jepa_context(model, pixels, context):
    """Encoder features (B, C, D) of the context tokens (C,) alone: the others are dropped before any layer.

    `VJEPA2Model.forward` drops them after the encoder, when the context has seen them.
    pixels: (B, N, 3, S, S) normalised.
    """
    hidden = model.encoder.embeddings(pixels)[:, context]
    for layer in model.encoder.layer:
        hidden = layer(hidden, context.expand(len(pixels), -1))[0]
    return model.encoder.layernorm(hidden)


def jepa_loss(model, pixels, context, target, teacher=None):
    """V-JEPA's loss (Bardes et al. 2024, eq. 1) of each clip, (B,): L1 of predicted and true features.

    The true ones are layer-normed features of the full clip, by `teacher`, without gradient, as in training;
    without a teacher by the model itself and with gradient: the loss as a function of the pixels.
    pixels: (B, N, 3, S, S) normalised; context, target: token indices.
    """
    batch, seen = len(pixels), jepa_context(model, pixels, context)
    # the predictor picks the context out of a whole clip of features
    features = seen.new_zeros(batch, len(context) + len(target), seen.shape[-1]).index_copy(1, context, seen)
    rows = ([context.expand(batch, -1)], [target.expand(batch, -1)])
    predicted = model.predictor(features, *rows).last_hidden_state
    with torch.set_grad_enabled(teacher is None and torch.is_grad_enabled()):
        true = (teacher or model).encoder(pixels).last_hidden_state[:, target]
    predicted, true = exact(predicted), exact(true)
    return (predicted - F.layer_norm(true, true.shape[-1:])).abs().mean((1, 2))


def make_vjepa(device, dtype, weights=None):
    """Minus V-JEPA 2's own masked prediction loss (Assran et al. 2025), from 0 down: how plausible a clip is.

    Averaged over two short-range masks (8 blocks of 15 %) and two long-range ones (2 of 70 %), the same ones
    at every call. Wants all frames (an odd last one is left out); --decode_frames 16 bounds what that costs.
    """
    model = load(VJEPA2Model, weights or "facebook/vjepa2-vitl-fpc64-256", "vjepa", dtype=dtype)
    model = frozen(model, device, dtype, ("VJEPA2Layer",))
    side, patch, tube = model.config.crop_size, model.config.patch_size, model.config.tubelet_size

    def reward(frames, prompts):
        long = frames.shape[1] >= tube
        need(long, f"vjepa needs at least {tube} frames: raise --decode_frames or --num_frames")
        n = frames.shape[1] // tube * tube
        crop = dict(short_side=True, crop=side, mode="bilinear")
        pixels = preprocess(frames[:, :n], side * 256 // 224, IMAGENET_MEAN, IMAGENET_STD, **crop)
        pixels = pixels.unflatten(0, (len(frames), n)).to(dtype)
        generator, losses = torch.Generator().manual_seed(0), []
        for blocks, area in [(8, 0.15), (2, 0.7)] * 2:
            masks = jepa_masks(n // tube, side // patch, side // patch, blocks, area, generator)
            losses.append(jepa_loss(model, pixels, *(mask.to(frames.device) for mask in masks)))
        return -torch.stack(losses).mean(0)

    reward.frames, reward.networks = "all", [model]
    return reward


def coarse(frames):
    """(B, N, 3, H, W) -> (B, N, 3, 16, 16) by averaging: what moves, without fine texture."""
    return F.adaptive_avg_pool2d(exact(frames).flatten(0, 1), 16).unflatten(0, frames.shape[:2])


def make_smooth(device, dtype, weights=None):
    """Minus how jerky a clip is: its mean squared second difference in time over the first's, no network.

    At 16 x 16 pixels. 0 is still or steady; independent random frames are at -3.
    """

    def reward(frames, prompts):
        need(frames.shape[1] >= 3, "smooth needs at least 3 frames: raise --decode_frames or --num_frames")
        first = coarse(frames).diff(dim=1)
        second = first.diff(dim=1)
        # the small number is a change of 1/100 of the range: less than that is still
        return -second.square().mean((1, 2, 3, 4)) / (first.square().mean((1, 2, 3, 4)) + 1e-4)

    reward.frames = "all"
    return reward


def make_dynamic(device, dtype, weights=None):
    """How much moves: mean absolute difference of neighbouring frames at 16 x 16, in percent. No network."""

    def reward(frames, prompts):
        need(frames.shape[1] >= 2, "dynamic needs at least 2 frames: raise --decode_frames or --num_frames")
        return 100 * coarse(frames).diff(dim=1).abs().mean((1, 2, 3, 4))

    reward.frames = "all"
    return reward


# ---- 4. Names and weighted sums ----------------------------------------------------------------------------
# SWAP: your reward. Name it here, and `--reward name`, `--reward "name:arg"` and sums with it work.
REWARDS = {
    "aesthetic": make_aesthetic,
    "clip": make_clip,
    "hps": make_hps,
    "pickscore": make_pickscore,
    "remove": make_remove,
    "action": make_action,
    "vjepa": make_vjepa,
    "smooth": make_smooth,
    "dynamic": make_dynamic,
    "colorful": make_colorful,
    "compressible": make_compressible,
}


def parse(spec: str) -> list[tuple[float, str, str | None]]:
    """Split "hps + 0.5*remove:book" into [(1.0, "hps", None), (0.5, "remove", "book")].

    Raises BadInput, naming the nearest reward, when a name is unknown or a term can't be read.
    """
    terms, shape = [], r"\s*(?:(-?\d+(?:\.\d*)?|-?\.\d+)\s*\*)?\s*([A-Za-z_]\w*)\s*(?::\s*(.*\S))?\s*"
    for term in spec.split("+"):
        found, said = re.fullmatch(shape, term), term.strip()
        need(found, f'can\'t read {said!r} in --reward {spec!r}: write "aesthetic + 0.5*colorful"')
        weight, name, arg = found.groups()
        if name not in REWARDS:
            near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0)[0]
            known = ", ".join(REWARDS)
            raise BadInput(f"unknown reward {name!r}: did you mean {near!r}? There are: {known}")
        twice = (name, arg) in [earlier[1:] for earlier in terms]
        need(not twice, f"{said!r} stands twice in --reward {spec!r}: give it one weight")
        need(abs(float(weight or 1)) <= 1e9, f"{said[:60]!r} in --reward: give a weight from -1e9 to 1e9")
        takes = inspect.signature(REWARDS[name]).parameters.get("arg")
        need(takes or not arg, f"{name} takes nothing after the colon: --reward {name}")
        lacks = takes and takes.default is inspect.Parameter.empty and not arg
        need(not lacks, f"{name} must be told of what, after a colon: --reward {name}:...")
        terms.append((float(weight or 1), name, arg))
    return terms


def make_terms(spec: str, device, dtype, weights=None, prompts: list[str] = ()) -> dict:
    """Load the rewards of a weighted sum: {"name" or "name:arg": (weight, reward)}.

    weights: a folder or several: a reward's are in the first with a sub-folder of its name, else published.
    Raises BadInput when one can't be loaded, or can't work with the prompts.
    """
    terms, folders = {}, [weights] if isinstance(weights, str) else weights or []
    for weight, name, arg in parse(spec):
        own = next((str(Path(f) / name) for f in folders if f and (Path(f) / name).is_dir()), None)
        reward = REWARDS[name](device, dtype, weights=own, **({"arg": arg} if arg else {}))
        if hasattr(reward, "check"):
            reward.check(prompts)
        terms[name if arg is None else f"{name}:{arg}"] = (weight, reward)
    return terms


def views(reward, video, chunk: int):
    """What a reward is given of video (B, N, 3, H, W): (frames, share of the mean) pairs.

    An image reward is a mean over frames, so it gets `chunk` at once; a clip reward gets its clip whole.
    """
    wanted = getattr(reward, "frames", 1)
    if wanted == 1:
        return [(view, view.shape[1] / video.shape[1]) for view in video.split(chunk, dim=1)]
    if wanted == "all":
        return [(video, 1.0)]
    return [(video[:, evenly_spaced(wanted, video.shape[1])], 1.0)]


def weighted_rewards(terms: dict, video, prompts: list[str], chunk=1, scale=None) -> dict:
    """Rewards of video (B, N, 3, H, W): {"reward": (B,) weighted sum, term: (B,), "term figure": (B,)}.

    terms: of `make_terms`. With a scale, `scale` times the sum over videos is differentiated, piece by piece.
    Raises BadInput when a reward has the wrong shape, or then no gradient.
    """
    found = {"reward": torch.zeros(len(prompts), device=video.device)}
    for name, (weight, reward) in terms.items():
        for view, share in views(reward, video, chunk):
            value = reward(view, prompts)
            good = isinstance(value, torch.Tensor) and value.shape == (len(prompts),)
            good = good and (value.requires_grad or scale is None)
            need(good, f"reward {name!r} must return ({len(prompts)},), one per video, with a gradient")
            if scale is not None:
                (scale * (weight * share * value).sum()).backward()
            value = value.detach()
            figures = {f"{name} {key}": v for key, v in getattr(reward, "report", {}).items()}
            for key, part in {"reward": weight * value, name: value, **figures}.items():
                found[key] = found.get(key, 0) + share * part
    return found
