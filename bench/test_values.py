"""Values of the rewards on two photographs: against the libraries' own calls, or the formula in numpy."""

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from camera import photo, texture, view
from PIL import Image
from safetensors.torch import load_file, save_file

import rewards
import vader
from vader import TOY

PROMPTS = ["a red star rising over the sea", "a green cube falling over a meadow"]
FRAMES = 9  # odd for vjepa, more than the 8 of action and ask, not a multiple of every chunk
QUESTION = "Is {prompt} to be seen?"


@pytest.fixture(scope="module")
def video():
    """Two videos (2, 9, 3, 96, 128) in steps of 1/255: photographs that move and get darker."""
    clips = []
    for name in ("cat", "rocket"):
        picture = photo(name)[:, 30:126, 60:188]
        frames = [picture.roll(5 * n, dims=2) * (1 - 0.05 * n) for n in range(FRAMES)]
        clips.append(torch.stack(frames))
    return (torch.stack(clips) * 255).round() / 255


def pixels(video, size, mean=rewards.CLIP_MEAN, std=rewards.CLIP_STD, **how):
    """Frames (B, N, 3, H, W) as a network takes them, (B * N, 3, h, w)."""
    return rewards.preprocess(video, size, mean, std, **how)


def photographic(video, size, **how):
    """The same for the networks that were trained on ImageNet's mean and deviation."""
    return pixels(video, size, rewards.IMAGENET_MEAN, rewards.IMAGENET_STD, mode="bilinear", **how)


def by_video(values):
    """Means over frames of one value for each, (2 * 9,) -> (2,)."""
    return values.view(2, FRAMES).mean(1)


# ---- What each reward must be ------------------------------------------------------------------------------
def aesthetic(video):
    clip = transformers.CLIPVisionModelWithProjection.from_pretrained(f"{TOY}/aesthetic", dtype=torch.float32)
    embedding = clip(pixel_values=pixels(video, 64)).image_embeds
    value = embedding / embedding.norm(dim=1, keepdim=True)
    head = torch.load(f"{TOY}/aesthetic/aesthetic-model.pth", weights_only=True)
    for n in (0, 2, 4, 6, 7):
        value = F.linear(value, head[f"layers.{n}.weight"].float(), head[f"layers.{n}.bias"].float())
    return {"": by_video(value[:, 0])}


def clip_logits(name, seen):
    """The official model's answer to all pictures and both prompts."""
    tokenizer = transformers.CLIPTokenizer.from_pretrained(f"{TOY}/{name}")
    clip = transformers.CLIPModel.from_pretrained(f"{TOY}/{name}", dtype=torch.float32)
    texts = tokenizer(PROMPTS, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
    return clip(**texts, pixel_values=seen)


def own_prompt(table):
    """A number for each of 2 * 9 frames and each prompt -> the means of each video's with its own prompt."""
    table = table.view(2, FRAMES, 2)
    return torch.stack([table[0, :, 0].mean(), table[1, :, 1].mean()])


def clip(video):
    found = clip_logits("clip", pixels(video, 64))
    return {"": own_prompt(F.cosine_similarity(found.image_embeds[:, None], found.text_embeds[None], dim=2))}


def pickscore(video):
    found = clip_logits("pickscore", pixels(video, 64, short_side=True, crop=64))
    return {"": own_prompt(found.logits_per_image / 100)}


def hps(video):
    config = rewards.read_json(Path(TOY) / "hps" / "open_clip_config.json")["model_cfg"]
    model = open_clip.CLIP(**config).eval()
    state = torch.load(f"{TOY}/hps/HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    model.load_state_dict(state)
    tokens = open_clip.get_tokenizer(f"local-dir:{TOY}/hps")(PROMPTS)
    images = model.encode_image(pixels(video, 64), normalize=True)
    return {"": own_prompt(images @ model.encode_text(tokens, normalize=True).T)}


def remove(video):
    """`remove:moon`, which the network takes parts of both photographs for."""
    yolos = transformers.YolosForObjectDetection.from_pretrained(f"{TOY}/remove", dtype=torch.float32)
    logits = yolos(pixel_values=photographic(video, (64, 80))).logits
    p = logits.exp()[..., yolos.config.label2id["moon"]] / logits.exp().sum(-1)
    seen = p / (1 + torch.exp(-(p - 0.2) / 0.05))
    return {"": -by_video(seen.sum(1)), " count": by_video((p > 0.2).sum(1).float())}


def action(video):
    """`action`, the names in the prompts: rising, falling."""
    network = transformers.VideoMAEForVideoClassification
    network = network.from_pretrained(f"{TOY}/action", dtype=torch.float32)
    clips = video[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    seen = photographic(clips, 64, short_side=True, crop=64).unflatten(0, (2, 8))
    told = F.log_softmax(network(pixel_values=seen).logits, dim=1)
    names = network.config.label2id
    value = torch.stack([told[0, names["rising"]], told[1, names["falling"]]])
    return {"": value, " probability": value.exp()}


def masks_of_the_paper(generator, side, blocks, area):
    """Rectangles of a share `area` of a frame, aspect 0.75 to 1.5 -> (side, side), true where masked."""
    masked = torch.zeros(side, side, dtype=torch.bool)
    for _ in range(blocks):
        aspect = 0.75 + 0.75 * torch.rand((), generator=generator).item()
        height = min(round(side * (area * aspect) ** 0.5), side)
        width = min(round(side * (area / aspect) ** 0.5), side)
        top = torch.randint(side - height + 1, (), generator=generator).item()
        left = torch.randint(side - width + 1, (), generator=generator).item()
        masked[top : top + height, left : left + width] = True
    return masked


def vjepa(video):
    """Eq. 1 of Bardes et al. 2024 for one clip after the other, over masks of 8 x 15 %, 2 x 70 %, twice."""
    model = transformers.VJEPA2Model.from_pretrained(f"{TOY}/vjepa", dtype=torch.float32)
    seen = photographic(video[:, :8], 64 * 256 // 224, short_side=True, crop=64).unflatten(0, (2, 8))
    values = []
    for clip in seen.split(1):
        generator, losses = torch.Generator().manual_seed(0), []
        whole = model.get_vision_features(clip)
        wanted = whole - whole.mean(2, keepdim=True)
        wanted = wanted / (wanted.square().mean(2, keepdim=True) + 1e-5).sqrt()
        for blocks, area in ((8, 0.15), (2, 0.7), (8, 0.15), (2, 0.7)):
            masked = masks_of_the_paper(generator, 8, blocks, area).flatten().repeat(4)
            context, target = (~masked).nonzero().T, masked.nonzero().T
            kept = model.encoder.embeddings(clip)[:, context[0]]
            for layer in model.encoder.layer:
                kept = layer(kept, position_mask=context)[0]
            padded = whole.detach().clone()  # what is not in the context must have no say
            padded[:, context[0]] = model.encoder.layernorm(kept)
            predicted = model.predictor(padded, [context], [target]).last_hidden_state
            losses.append((predicted - wanted[:, target[0]]).abs().mean())
        values.append(-sum(losses) / 4)
    return {"": torch.stack(values)}


def answers(tokenizer):
    """The tokens of yes and of no, in any case, with a space before them or without."""
    found = {"yes": [], "no": []}
    for word, number in tokenizer.get_vocab().items():
        word = word.strip("\u0120\u2581").lower()
        if word in found:
            found[word].append(number)
    return found.values()


def ask(video):
    processor = transformers.AutoProcessor.from_pretrained(f"{TOY}/ask")
    network = transformers.AutoModelForImageTextToText.from_pretrained(f"{TOY}/ask", dtype=torch.float32)
    (yes, no), odds, yeses = answers(processor.tokenizer), [], []
    assert yes and no
    for frames, prompt in zip(video[:, [0, 1, 2, 3, 5, 6, 7, 8]], PROMPTS, strict=True):
        content = [{"type": "video"}, {"type": "text", "text": QUESTION.replace("{prompt}", prompt)}]
        said = [{"role": "user", "content": content}]
        said = processor.apply_chat_template(said, add_generation_prompt=True)
        frames = (frames * 255).round().byte()
        given = processor(text=[said], videos=[[frames]], do_sample_frames=False, return_tensors="pt")
        p = network(**given).logits[0, -1].softmax(0)
        odds.append(torch.log(p[yes].sum() / p[no].sum()))
        yeses.append(p[yes].sum())
    return {"": torch.stack(odds), " p(yes)": torch.stack(yeses)}


def small(video):
    """The means of 16 x 16 parts of each frame, less each channel's, over the frame's contrast, in numpy."""
    parts = video.double().numpy().reshape(2, FRAMES, 3, 16, 6, 16, 8).mean((4, 6))
    parts = parts - parts.mean((3, 4), keepdims=True)
    return parts / np.sqrt((parts**2).mean((2, 3, 4), keepdims=True) + 0.005**2)


def smooth(video):
    parts = small(video)
    velocity = parts[:, 1:] - parts[:, :-1]
    jerk = parts[:, 2:] - 2 * parts[:, 1:-1] + parts[:, :-2]
    return {"": -np.mean(jerk**2, axis=(1, 2, 3, 4)) / (np.mean(velocity**2, axis=(1, 2, 3, 4)) + 1e-4)}


def dynamic(video):
    parts = small(video)
    return {"": 100 * np.mean(np.abs(parts[:, 1:] - parts[:, :-1]), axis=(1, 2, 3, 4))}


def colorful(video):
    r, g, b = video.double().numpy().transpose(2, 0, 1, 3, 4).reshape(3, 2, FRAMES, -1) * 255
    first, second = r - g, 0.5 * (r + g) - b
    spread = np.hypot(first.std(2), second.std(2))
    return {"": np.mean(spread + 0.3 * np.hypot(first.mean(2), second.mean(2)), axis=1) / 100}


def blocks_of(plane):
    """The two-dimensional DCT of blocks of 8 x 8 of a plane (H, W), orthonormal: (n, 8, 8)."""
    n = np.arange(8)
    waves = np.cos(np.pi * np.outer(n, 2 * n + 1) / 16) * np.where(n == 0, 8**-0.5, 0.5)[:, None]
    height, width = plane.shape
    parts = plane.reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3).reshape(-1, 8, 8)
    return waves @ parts @ waves.T


def compressible(video):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=50)
    table = Image.open(file).quantization[0]  # of luminance, which the reward takes for all planes
    values = []
    for frame in video.double().numpy().reshape(-1, 3, 96, 128) * 255:
        r, g, b = frame
        light = 0.299 * r + 0.587 * g + 0.114 * b
        planes = [light - 128]
        for chroma in ((b - light) / 1.772, (r - light) / 1.402):
            planes.append(chroma.reshape(48, 2, 64, 2).mean((1, 3)))
        waves = np.concatenate([blocks_of(plane) for plane in planes])
        bits = np.log2(1 + np.abs(waves / np.reshape(table, (8, 8)))).sum()
        values.append(-(0.6 + 2.2 * bits / 8000))
    return {"": by_video(torch.tensor(values))}


# spec -> what it must be, and how near: the network's precision, and 8 bits a channel for ask
EXPECTED = {
    "aesthetic": (aesthetic, 1e-4),
    "clip": (clip, 1e-4),
    "hps": (hps, 1e-4),
    "pickscore": (pickscore, 1e-4),
    "remove:moon": (remove, 1e-4),
    "action": (action, 1e-4),
    "vjepa": (vjepa, 1e-4),
    f"ask:{QUESTION}": (ask, 5e-3),
    "smooth": (smooth, 1e-4),
    "dynamic": (dynamic, 1e-4),
    "colorful": (colorful, 1e-4),
    "compressible": (compressible, 1e-4),
}


def made(spec):
    return rewards.make_terms(spec, "cpu", torch.float32, TOY, PROMPTS)


@pytest.mark.parametrize("spec", EXPECTED)
def test_values_are_those_of_the_official_calls(spec, video):
    """As a term of weight 0.5, with frames one by one, by fours (the last is alone), and all at once."""
    official, near = EXPECTED[spec]
    with torch.no_grad():
        expected = official(video)
    terms = made(f"0.5*{spec}")
    assert [weight for weight, _ in terms.values()] == [0.5]
    for chunk in (1, 4, FRAMES):
        found = rewards.weighted_rewards(terms, video, PROMPTS, chunk)
        assert found.keys() == {"reward", *(spec + figure for figure in expected)}
        assert found["reward"].tolist() == pytest.approx((found[spec] / 2).tolist(), rel=1e-6)
        for figure, values in expected.items():
            values = torch.as_tensor(values).tolist()
            assert found[spec + figure].tolist() == pytest.approx(values, rel=near, abs=near), chunk
            assert abs(values[0] - values[1]) > 1e-3


def test_every_reward_has_its_value_tested():
    assert {spec.split(":")[0] for spec in EXPECTED} | {"camera"} == set(rewards.REWARDS)


@pytest.mark.parametrize("spec", ["aesthetic", "clip", "hps", "pickscore", "remove:moon"])
def test_gradients_of_a_weighted_term_are_those_of_the_official_calls(spec, video):
    """Of scale x weight x value, summed over videos, however the frames are cut into chunks."""
    (plain,) = torch.autograd.grad(-6 * EXPECTED[spec][0](video.requires_grad_())[""].sum(), video)
    for chunk in (1, 4, FRAMES):
        frames = video.detach().clone().requires_grad_()
        rewards.weighted_rewards(made(f"- 2*{spec}"), frames, PROMPTS, chunk, scale=3.0)
        assert (frames.grad - plain).norm() < 1e-3 * plain.norm()
    video.requires_grad_(False)


def test_a_sum_is_the_weighted_sum_of_its_terms_and_of_their_gradients(video):
    """Of rewards of frames, and of all of a video, at once."""
    spec, frames = "2*colorful - 0.3*dynamic + 0.01*compressible", video.clone().requires_grad_()
    found = rewards.weighted_rewards(made(spec), frames, PROMPTS, chunk=4, scale=0.5)
    alone = {}
    for name, weight in {"colorful": 2.0, "dynamic": -0.3, "compressible": 0.01}.items():
        ((_, reward),) = made(name).values()
        again = video.clone().requires_grad_()
        value = reward(again, PROMPTS)
        (slope,) = torch.autograd.grad(value.sum(), again)
        alone[name] = (weight * value.detach(), weight * slope)
        assert found[name].tolist() == pytest.approx(value.tolist(), rel=1e-5)
    values, slopes = zip(*alone.values(), strict=True)
    assert found["reward"].tolist() == pytest.approx(sum(values).tolist(), rel=1e-5)
    assert (frames.grad - 0.5 * sum(slopes)).norm() < 1e-4 * frames.grad.norm()


# ---- camera, by motion that is known -----------------------------------------------------------------------
MOVES = ["pan right", "pan up", "zoom in", "roll right"]
OPPOSITES = ["pan left", "pan down", "zoom out", "roll left"]


@pytest.fixture(scope="module")
def filmed():
    """Two clips (2, 9, 3, 96, 128) by a camera whose moves are known, and its rates (2, 8, 4) in percent."""
    generator, clips, rates = torch.Generator().manual_seed(0), [], []
    for name, drift in {"cat": [1.5, 0.0, -0.8, 0.0], "rocket": [0.0, -1.0, 0.0, 1.2]}.items():
        moves = torch.tensor(drift) + 0.15 * torch.randn(FRAMES - 1, 4, generator=generator)
        path = torch.cat([torch.zeros(1, 4), moves.cumsum(0)])
        clips.append(view(photo(name), path - path.mean(0), (96, 128)))
        rates.append(moves)
    return torch.stack(clips), torch.stack(rates).numpy()


def camera_value(kind, rates):
    """The docstring's formula, of one clip's rates (8, 4)."""
    changes = rates[1:] - rates[:-1]
    if kind == "smooth":
        return -np.mean(np.abs(changes)) / (np.mean(np.abs(rates)) + 0.1)
    if kind == "still":
        return -np.mean(np.abs(rates))
    own = (MOVES + OPPOSITES).index(kind) % 4
    others = np.mean(np.abs(rates), axis=0).sum() - np.mean(np.abs(rates[:, own]))
    value = np.mean(rates[:, own]) * (-1 if kind in OPPOSITES else 1)
    return 2 * np.tanh(value / 2) - (others + np.mean(np.abs(changes[:, own]))) / 8


@pytest.mark.parametrize("kind", ["smooth", "still", *MOVES, *OPPOSITES])
def test_camera_has_the_value_of_the_motion_that_is_there(kind, filmed):
    video, rates = filmed
    spec = f"camera:{kind}"
    for chunk in (1, FRAMES):
        found = rewards.weighted_rewards(made(spec), video, PROMPTS, chunk)
        expected = [camera_value(kind, clip) for clip in rates]
        assert found[spec].tolist() == pytest.approx(expected, rel=0.1, abs=0.05)
        for n, move in enumerate(MOVES):
            means = rates[:, :, n].mean(1).tolist()
            assert found[f"{spec} {move}"].tolist() == pytest.approx(means, abs=0.05)
        assert (found[f"{spec} seen"] > 0.03).all() and (found[f"{spec} seen"] <= 1).all()


def test_seen_is_the_share_of_the_frame_that_has_texture():
    path, found = torch.zeros(5, 4), []
    path[:, 0] = torch.arange(5)
    clip = view(texture(1), path, (96, 128))
    for width in (128, 64):
        partly = clip.clone()
        partly[..., width:] = 0.5
        seen = rewards.weighted_rewards(made("camera:still"), partly[None], [""])["camera:still seen"]
        found.append(seen.item())
    # grey to the border is left out as a bar, with a margin beside it
    assert 0.3 * found[0] < found[1] < 0.5 * found[0]


# ---- Which weights a run takes -----------------------------------------------------------------------------
def first_update(settings, **changes):
    """The row of an update of the small model."""
    few = dict(steps=1, eval_videos=0, num_frames=2, num_inference_steps=1)
    out = f"{settings.out}-{len([*Path(settings.out).parent.iterdir()])}"
    return vader.train(replace(settings, out=out, **few | changes))[0]


def test_rewards_load_from_the_folder_that_is_given(settings, tmp_path):
    """A head whose last bias is one more gives one more."""
    shutil.copytree(f"{TOY}/aesthetic", tmp_path / "aesthetic")
    head = torch.load(file := tmp_path / "aesthetic" / "aesthetic-model.pth", weights_only=True)
    head["layers.7.bias"] += 1
    torch.save(head, file)
    one, more = (
        first_update(settings, reward="aesthetic", reward_weights=folder)["aesthetic"]
        for folder in (TOY, str(tmp_path))
    )
    assert more == pytest.approx(one + 1, abs=1e-2)


def test_the_vision_language_model_that_is_given(settings, tmp_path):
    """One whose logits are all 0: then yes and no have as many chances as they have tokens."""
    shutil.copytree(f"{TOY}/ask", tmp_path / "ask")
    weights = load_file(file := tmp_path / "ask" / "model.safetensors")
    vocabulary = len(weights["lm_head.weight"])
    weights["lm_head.weight"] *= 0
    save_file(weights, file, {"format": "pt"})
    row = first_update(settings, reward="ask", reward_weights=TOY, vlm=str(tmp_path / "ask"))
    yes, no = (len(found) for found in answers(transformers.AutoTokenizer.from_pretrained(file.parent)))
    assert row["ask"] == pytest.approx(np.log(yes / no), abs=1e-4)
    assert row["ask p(yes)"] == pytest.approx(yes / vocabulary, rel=1e-3)
