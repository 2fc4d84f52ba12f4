"""What the tiny models and their rewards are worth: measured by `python tiny/make.py --score`.

Scores of the weights in the repository: 256 videos of held-out captions sampled by stock diffusers (10
steps, guidance 4) have the right colour in 85.9 %, object in 67.2 %, motion in 95.3 %, place in 100 %. The
detectors that say so are right on 100 / 98.0 / 100 / 100 % of 256 drawn clips, and on 100 / 93.8 / 100 / 100
% of 64 of those after the autoencoder (mean absolute error 0.015 of [-1, 1]).

Four steps without guidance with tiny/few, 256 videos of held-out captions, beside ten steps with guidance 4,
same noise: colour is right in 84.8 % (85.2), object 61.3 (65.2), motion 96.9 (97.3), place 100 (100), hps
+0.002 (standard error 0.003), clip -0.011 (0.003); at rank 32, before its cut: 84.8, 61.7, 97.3, 100, +0.003
and -0.010. Four steps without it: 80.1, 49.2, 91.0, 100 %, hps -0.083 (0.011), clip -0.106 (0.011).

Image to video (10 steps, no guidance), 128 videos from drawn pictures of views.py, held-out captions: colour
right in 70.3 %, object in 21.9 %, motion in 52.3 %, place in 96.9 %; the drawn clips, whose camera moves too
and whose places have more texture than the detectors know, 84.4, 39.8, 73.4 and 95.3 %, after the autoencoder
78.9, 34.4, 68.8, 96.9. The camera's four rates have a mean size of 0.86, 0.88, 0.46, 0.62 percent a step,
those of drawn clips 0.71, 0.38, 1.07, 0.75. Mean absolute difference of [0, 1] of the first frame from its
picture 0.031, of the autoencoder's frames 0.029: it was trained on smoother places, and objects lose shape
and some of their colour on the way.

Wan (10 steps, guidance 3), 128 videos of held-out captions: colour is right in 99.2 %, object in only 29.7 %
(55 % was the aim; chance is 17 %), motion and place in 100 %: objects are right in colour and path and vague
in shape. The shape is lost in the transformer: 128 drawn clips after its autoencoder score 100 / 79.7 / 100 /
100 % (error 0.024 of [-1, 1], 0.089 on objects).

Rewards, on drawn clips of held-out captions: aesthetic has rank correlation 0.933 with its target; clip
finds the right caption of 64 for 87.1 % of 311 clips; hps orders 96.3 % and pickscore 97.7 % of 512 pairs
right; remove finds 93.2 % of 512 objects at IoU 0.5; action names 99.6 % of 512 motions; vjepa finds a time-
shuffled clip worse in 91.4 and 89.5 % of 256 pairs (two draws of the order), of dull ones in 94.8 % of 192,
after the autoencoders of t2v and of i2v in 86.5 % each. Dull clips score -0.449, after
these autoencoders -0.459 and -0.456, a still picture -0.525. ask, on 256 such clips, yes and no as often:
right about colour in 100 %, object 98.8, motion 89.8, place 100, the whole caption 97.7 %, a blue sky 100;
after the autoencoder 100, 99.6, 90.6, 100, 96.5, 100 %.
"""

import functools
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKLWan, TextToVideoSDPipeline
from tqdm import trange
from train_ask import QUESTIONS, ask_about, sky_blueness
from train_detector import load_detector, right_answers
from train_preferences import make_pairs, tastes
from train_remove import overlap
from train_vjepa import autoencoded, load_autoencoders
from train_wan import WAN_FRAMES
from training import frames_of, make_pool
from transformers import YolosForObjectDetection
from views import draw_views
from world import FRAMES, MOTIONS, OBJECTS, SIZE, UNSEEN, caption, draw, pick, save_picture

import vader
from extras import watch
from extras.camera import camera_rates
from rewards import IMAGENET_MEAN, IMAGENET_STD, make_ask, make_terms, preprocess, weighted_rewards


@torch.no_grad()
def measure(out: Path, samples: int, seed: int):
    """Print what the weights in `out` score, sampled by stock diffusers on held-out captions."""
    generator = torch.Generator().manual_seed(seed + 30)
    detector = load_detector(out)
    combinations = [UNSEEN[i % len(UNSEEN)] for i in range(samples)]
    video, _, _ = draw(combinations, generator)
    print("detectors on drawn held-out clips:", right_answers(detector, video, combinations))

    pipe = TextToVideoSDPipeline.from_pretrained(out / "t2v", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pictures = video[:64].flatten(0, 1) * 2 - 1
    decoded = pipe.vae(pictures).sample
    print(f"autoencoder: mean absolute error {(decoded - pictures).abs().mean():.4f} of [-1, 1]")
    decoded = (decoded / 2 + 0.5).clamp(0, 1).view_as(video[:64])
    right = right_answers(detector, decoded, combinations[:64])
    print("detectors on those clips through the autoencoder:", right)
    _, _, preset = vader.find_model("tiny")
    names = ("num_inference_steps", "guidance_scale", "num_frames", "height", "width")
    run = {name: preset[name] for name in names}
    parts, start = [], time.time()
    for first in trange(0, samples, 8, desc="samples"):
        captions = [caption(c) for c in combinations[first : first + 8]]
        latents = pipe(captions, generator=generator, output_type="latent", **run).frames
        parts.append((pipe.decode_latents(latents) / 2 + 0.5).clamp(0, 1).transpose(1, 2))
    made = torch.cat(parts)
    print(f"samples of held-out captions, {run}:", right_answers(detector, made, combinations))
    print(f"{(time.time() - start) / samples:.2f} s a sample in batches of 8")

    chosen, moments = pick(UNSEEN, 256, generator), torch.zeros(256, 1).long()
    video, target, _ = draw(chosen, generator, full=True, moments=moments)
    ((_, score),) = make_terms("aesthetic", "cpu", torch.float32, str(out / "rewards")).values()
    ranks = torch.stack([score(video, None).argsort().argsort(), target.argsort().argsort()]).float()
    right = torch.corrcoef(ranks)[0, 1]
    print(f"aesthetic: rank correlation with the target {right:.3f} on 256 drawn pictures")


@torch.no_grad()
def measure_rewards(out: Path, seed: int):
    """Print what the reward models in `out` score on drawn clips of held-out captions."""
    pool = make_pool(UNSEEN, 512, seed + 50)
    video, labels, _, boxes = pool
    generator = torch.Generator().manual_seed(seed + 50)
    load = functools.partial(make_terms, device="cpu", dtype=torch.float32, weights=str(out / "rewards"))
    clips, captions = video.float() / 255, [caption(c) for c in labels.tolist()]

    words = [caption(UNSEEN[i]) for i in torch.randperm(len(UNSEEN), generator=generator)[:64].tolist()]
    rows = [i for i, text in enumerate(captions) if text in words]
    ((_, score),) = load("clip").values()
    table = torch.stack([score(clips[rows], [text] * len(rows)) for text in words])
    right = [words[best] == captions[row] for best, row in zip(table.argmax(0).tolist(), rows, strict=True)]
    print(f"clip: right caption of 64 for {sum(right) / len(right):.1%} of {len(right)} clips")
    for name in ("hps", "pickscore"):
        ((_, score),) = load(name).values()
        chosen, a, b, preferred = make_pairs(pool, tastes(pool)[name], 512, generator)
        texts = [captions[row] for row in chosen.tolist()]
        right = (score(a[:, None], texts) > score(b[:, None], texts)) == preferred
        print(f"{name}: right order for {right.float().mean():.1%} of {len(right)} pairs")

    yolos = YolosForObjectDetection.from_pretrained(out / "rewards" / "remove", dtype=torch.float32).eval()
    pictures, moments = frames_of(video, torch.arange(512), generator)
    output = yolos(pixel_values=preprocess(pictures[None], SIZE, IMAGENET_MEAN, IMAGENET_STD))
    p, best = output.logits.softmax(-1)[..., :-1].flatten(1).max(1)
    box = output.pred_boxes[torch.arange(512), best // len(OBJECTS)]
    fits = overlap(box, boxes[torch.arange(512), moments]) > 0.5
    found = fits & (best % len(OBJECTS) == labels[:, 1]) & (p > 0.2)
    print(
        f"remove: object found at IoU 0.5 in {found.float().mean():.1%} of 512 frames"
        f" ({fits.float().mean():.1%} of the boxes right)"
    )

    ((_, score),) = load("action").values()
    table = torch.stack([score(clips, [f"a thing {motion}"] * 512) for motion in MOTIONS])
    right = table.argmax(0) == labels[:, 2]
    print(f"action: right motion in {right.float().mean():.1%} of 512 clips")
    ((_, score),) = load("vjepa").values()
    shuffled = torch.stack([clip[torch.randperm(FRAMES, generator=generator)] for clip in clips[:256]])
    worse = score(shuffled, None) < score(clips[:256], None)
    print(f"vjepa: a shuffled clip scores worse in {worse.float().mean():.1%} of 256 pairs")
    measure_marks(out, score, seed)
    measure_ask(out, pool, seed)
    ((_, score),) = load("smooth").values()
    worse = score(shuffled, None) < score(clips[:256], None)
    print(f"smooth: a shuffled clip scores worse in {worse.float().mean():.1%} of 256 pairs")


@torch.no_grad()
def measure_ask(out: Path, pool, seed: int):
    """Print how often `ask` is right about drawn clips, as they are and through the autoencoder, by kind."""
    generator, (video, labels, _, _) = torch.Generator().manual_seed(seed + 53), pool
    drawn = video[:256].float() / 255
    image, _ = load_autoencoders(out)
    score = make_ask("cpu", torch.float32, weights=str(out / "rewards" / "ask"), arg="{prompt}")
    for name, clips in (("drawn", drawn), ("after t2v's autoencoder", autoencoded(image, drawn))):
        blue, right = sky_blueness(clips), {}
        for kind in QUESTIONS:
            for n, clip in enumerate(clips):
                wrong = bool(n % 2)
                question, _ = ask_about(kind, labels[n].tolist(), wrong, generator)
                if kind == "sky":
                    if (blue[n] - 0.3).abs() < 0.1:  # neither
                        continue
                    wrong = bool(blue[n] < 0.3)
                (found,) = score(clip[None], [question]).tolist()
                right.setdefault(kind, []).append((found > 0) != wrong)
        said = ", ".join(f"{kind} {sum(values) / len(values):.1%}" for kind, values in right.items())
        print(f"ask, 256 clips {name}, yes and no as often: {said}")


@torch.no_grad()
def measure_marks(out: Path, score, seed: int):
    """Print what the autoencoders do to vjepa's score of dull clips, and to telling shuffled ones apart."""
    generator = torch.Generator().manual_seed(seed + 92)
    drawn, _, _ = draw(pick(UNSEEN, 192, generator), generator)
    t2v, i2v = load_autoencoders(out)
    for name, clips in (
        ("drawn", drawn),
        ("still", drawn[:, :1].expand(-1, FRAMES, -1, -1, -1)),
        ("after t2v's autoencoder", torch.cat([autoencoded(t2v, part) for part in drawn.split(16)])),
        ("after i2v's autoencoder", torch.cat([autoencoded(i2v, part) for part in drawn.split(16)])),
    ):
        order = torch.Generator().manual_seed(seed + 93)
        shuffled = torch.stack([clip[torch.randperm(FRAMES, generator=order)] for clip in clips])
        values = score(clips, None)
        worse = (values > score(shuffled, None)).float().mean()
        print(f"vjepa, 192 dull clips, {name}: {values.mean():.3f}, shuffled worse {worse:.1%}")


@torch.no_grad()
def measure_i2v(out: Path, samples: int, seed: int):
    """Print what tiny-i2v in `out` scores on drawn first frames of held-out captions."""
    generator = torch.Generator().manual_seed(seed + 91)
    detector = load_detector(out)
    combinations = pick(UNSEEN, samples, generator)
    video, path, _ = draw_views(combinations, generator)
    with tempfile.TemporaryDirectory() as folder:
        prompts = [vader.Prompt(caption(c), f"{folder}/{n}.png") for n, c in enumerate(combinations)]
        for picture, prompt in zip(video[:, 0], prompts, strict=True):
            save_picture(picture, Path(prompt.image))
        made = sampled("tiny-i2v", out / "i2v", prompts)
    _, vae = load_autoencoders(out)
    decoded = torch.cat([autoencoded(vae, part) for part in video.split(16)])
    clips = {"drawn": video, "after the autoencoder": decoded, "made": made}
    for name, some in clips.items():
        print(f"tiny-i2v, {samples} videos, {name}:", right_answers(detector, some, combinations))
        rates, _ = camera_rates(some)
        speed, shake = rates.mean(1).abs().mean(0), rates.diff(dim=1).abs().mean((0, 1))
        print("  camera, percent a step, mean size:", speed.tolist(), "of its change:", shake.tolist())
    true = path.diff(dim=1)
    for name in ("drawn", "after the autoencoder"):
        error = (camera_rates(clips[name])[0] - true).abs().mean((0, 1))
        print(f"  error of these rates, {name}:", error.tolist())
    for name, one, other in (
        ("after the autoencoder", decoded, video),
        ("first frame and image", made[:, 0], video[:, 0]),
        ("video and the drawn one", made, video),
        ("still image and the drawn video", video[:, :1], video),
    ):
        print(f"mean absolute difference of [0, 1], {name}: {(one - other).abs().mean():.4f}")


@torch.no_grad()
def measure_wan(out: Path, samples: int, seed: int):
    """Print what tiny-wan in `out` scores on held-out captions; the detector sees the first 8 of 9 frames."""
    generator = torch.Generator().manual_seed(seed + 94)
    detector = load_detector(out)
    combinations = pick(UNSEEN, samples, generator)
    video, _, inside = draw(combinations, generator, frames=WAN_FRAMES)
    vae = AutoencoderKLWan.from_pretrained(out / "wan" / "vae", dtype=torch.float32)
    decoded = [vae(part.transpose(1, 2) * 2 - 1).sample.transpose(1, 2) / 2 + 0.5 for part in video.split(8)]
    decoded = torch.cat(decoded).clamp(0, 1)
    error = (decoded - video).abs() * 2
    on = (error * inside).sum() / (3 * inside.sum())
    print(f"Wan's autoencoder: mean absolute error {error.mean():.4f} of [-1, 1], on objects {on:.4f}")
    made = sampled("tiny-wan", out / "wan", [vader.Prompt(caption(c)) for c in combinations])
    for name, clips in (("drawn", video), ("after the autoencoder", decoded), ("sampled", made)):
        right = right_answers(detector, clips[:, :FRAMES], combinations)
        print(f"tiny-wan, {samples} videos, {name}:", right)


@torch.no_grad()
def measure_few(out: Path, samples: int, seed: int):
    """Print what four steps with the LoRA in `out`/few are worth beside ten guided ones, paired by noise."""
    combinations, found, detector = [UNSEEN[i % len(UNSEEN)] for i in range(samples)], {}, load_detector(out)
    prompts = [vader.Prompt(caption(c)) for c in combinations]
    few = dict(num_inference_steps=4, guidance_scale=1.0)
    ways = {"ten guided": {}, "four": few, "four, few": few | dict(base_lora=str(out / "few"))}
    for name, how in ways.items():
        cfg = vader.Config(model="tiny", reward="hps + clip", seed=seed, batch_size=8, mode="eval", **how)
        run = load_run(vader.resolve(cfg), out / "t2v", prompts)
        values, videos, start = {}, [], time.time()
        for first in trange(0, samples, 8, desc=name):
            batch = prompts[first : first + 8]
            videos.append(vader.make_videos(run, batch, first))
            texts = [prompt.text for prompt in batch]
            for term, value in weighted_rewards(run.terms, videos[-1], texts).items():
                values.setdefault(term, []).extend(value.tolist())
        print(f"{name} steps: {(time.time() - start) / samples:.2f} s a video", end=", ")
        print(right_answers(detector, torch.cat(videos), combinations))
        found[name] = values
        for term in ("hps", "clip"):
            print(f"  {term}: {watch.summary(found['ten guided'][term], values[term])}")


def load_run(cfg, folder: Path, prompts):
    """A vader.Run of the model in a folder, with all other settings those of cfg.model."""
    family, _, preset = vader.find_model(cfg.model)
    with mock.patch.object(vader, "find_model", lambda name: (family, str(folder), preset)):
        return vader.load_run(cfg, prompts)


def sampled(model: str, folder: Path, prompts):
    """A video per prompt by vader.py's own sampling, as the preset says: (n, F, 3, 64, 64)."""
    run = load_run(vader.resolve(vader.Config(model=model, mode="sample")), folder, prompts)
    parts = [vader.make_videos(run, prompts[i : i + 8], i) for i in trange(0, len(prompts), 8, desc=model)]
    return torch.cat(parts)
