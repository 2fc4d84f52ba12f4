"""Does a model that is trained with `camera` move its camera? The tracker says, not the reward.

    python bench/camera_trained.py                         # four moves, seeds 0, 1, 2
    python bench/camera_trained.py --moves "pan left" --seeds 0 --reward "camera:{move}"    # printed only

Runs `--model tiny-i2v --reward camera:<move>` in runs/camera_trained/, where best/ is what the judge `clip`
has let pass on 64 drawn starts. Then makes 64 videos of the base model and of best/: starts that are drawn
anew, of words never trained on together, noise of their own. Writes bench/camera_trained.csv: which LoRA is
best/; what bench/tracker.py and the reward see of the told move (for `still` the mean size of the four rates,
for `smooth` that of their change in time, and in a row of its own the drift, that of their means: a camera
that stands still is smooth, too), what `clip`, `hps` and `aesthetic` see; each before, after, and the paired
t. Needs opencv-python-headless.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import tables
import torch
import tracker

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tiny")]
from views import draw_views, pick_views, view_caption  # noqa: E402 (needs the line above)
from world import UNSEEN, save_picture  # noqa: E402

import rewards  # noqa: E402
import vader  # noqa: E402
from extras import page, watch  # noqa: E402
from extras.camera import camera_rates  # noqa: E402

RUNS = HERE.parent / "runs" / "camera_trained"
SPREAD = "--grad_steps spread --backprop_steps 2"
# of each move the reward and settings: a zoom, which moves each place another way, takes most
MOVES = {
    "smooth": ("camera:{move} + 2*hps", "--steps 50 --eval_every 50 --lr 1e-3"),
    "still": ("camera:{move} + 2*hps", "--steps 50 --eval_every 50 --lr 5e-4"),
    "pan left": ("camera:{move} + 2*hps", "--steps 100 --eval_every 50 --lr 1e-3"),
    "zoom in": ("4*camera:{move} + 3*hps", f"--steps 75 --eval_every 75 --lr 1e-3 --batch_size 8 {SPREAD}"),
}
OPPOSITES = {"pan left": "pan right"}  # of the moves that are the tracker's, the other way round
CHOSEN = f"--decode_chunk 8 --eval_videos 64 --eval_prompts {RUNS}/chosen/starts.jsonl"
JUDGES = ("clip", "hps", "aesthetic")
VIDEOS, NUMBER = 64, 100_000  # the number of the first video is that of none in a run


def train(reward: str, seed: int, settings: str) -> Path:
    """A run of the command line; one that is there already is not made again."""
    number = zlib.crc32(settings.replace(str(RUNS), "").encode())
    out = RUNS / "-".join([*re.findall(r"[\w.]+", f"{reward} {seed}"), str(number)])
    if not (out / "lora").exists():
        draw_starts("chosen", 2000)
        command = f"--model tiny-i2v --prompts tiny/images.jsonl --seed {seed} {settings}"
        words = [*shlex.split(command), "--reward", reward, "--out", str(out)]
        subprocess.run([sys.executable, "vader.py", *words], check=True, cwd=HERE.parent)
    return out


def draw_starts(name: str, seed: int) -> list[vader.Prompt]:
    """64 drawn pictures in a folder, a fifth of them photographs with an object in front, and its .jsonl."""
    folder = RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    combinations = pick_views(UNSEEN, VIDEOS, generator)
    videos, _, _ = draw_views(combinations, generator)
    prompts, rows = [], []
    for n, video in enumerate(videos):
        file = folder / f"{n:02d}.png"
        save_picture(video[0], file)
        prompts.append(vader.Prompt(view_caption(combinations[n]), str(file)))
        rows.append(json.dumps({"prompt": prompts[-1].text, "image": file.name}))
    (folder / "starts.jsonl").write_text("\n".join(rows) + "\n")
    return prompts


@torch.no_grad()
def videos_of(lora: Path | None, seed: int):
    """64 videos, (64, 8, 3, 64, 64), and their prompts; None: of the base model."""
    cfg = vader.Config(
        mode="sample", model="tiny-i2v", lora=lora and str(lora), seed=seed, out=str(RUNS / "judged")
    )
    prompts = draw_starts("judged", 1000)
    run = vader.load_run(vader.resolve(cfg), prompts)
    parts = []
    for first in range(0, VIDEOS, 8):
        parts.append(vader.make_videos(run, prompts[first : first + 8], NUMBER + first))
    return torch.cat(parts), [prompt.text for prompt in prompts]


def told(rates, move: str) -> float:
    """`tracker.amount`, of a move to the other side as well."""
    if move in OPPOSITES:
        return -tracker.amount(rates, OPPOSITES[move])
    return tracker.amount(rates, move)


@torch.no_grad()
def judged(videos, texts: list[str], move: str) -> dict[str, list[float]]:
    """What the tracker, the reward's measure and the judges see of each video."""
    rates, _ = camera_rates(videos)
    values = {
        "tracker": [told(tracker.track(video), move) for video in videos],
        "ours": [told(found.numpy(), move) for found in rates],
    }
    terms = rewards.make_terms(" + ".join(JUDGES), "cpu", torch.float32, vader.TOY)
    figures = rewards.weighted_rewards(terms, videos, texts, videos.shape[1])
    return values | {name: figures[name].tolist() for name in JUDGES}


def row_of(move: str, base, tuned, texts) -> dict:
    row = {}
    before = judged(base, texts, move)
    after = judged(tuned, texts, move)
    row["seen"] = int(np.isfinite(np.add(before["tracker"], after["tracker"])).sum())
    for name, values in after.items():
        pairs = np.array([before[name], values])
        pairs = pairs[:, np.isfinite(pairs).all(0)]  # the tracker sees nothing in some
        gain, error = watch.paired_gain(*pairs.tolist())
        t = gain / error if error else 0.0
        row[name] = f"{pairs[0].mean():+.3f} -> {pairs[1].mean():+.3f} (t {t:+.1f})"
    return row


def strip(base, tuned, count=6):
    """Rows of videos, four frames of the base beside the same four of the tuned: (H, W, 3) uint8."""
    rows = []
    for pair in zip(base[:count], tuned[:count], strict=True):
        frames = [frame for video in pair for frame in video[[0, 2, 5, 7]]]
        rows.append(torch.cat(frames, dim=-1))
    picture = torch.cat(rows, dim=-2).permute(1, 2, 0)
    return (picture * 255).round().byte().numpy().repeat(2, 0).repeat(2, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moves", nargs="+", default=[*MOVES], choices=MOVES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--reward", help="in place of that of MOVES")
    parser.add_argument("--settings", help="in place of those of MOVES and CHOSEN")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        base, texts = videos_of(None, seed)
        for move in args.moves:
            reward, settings = MOVES[move]
            reward = args.reward or reward
            settings = args.settings or f"{settings} {CHOSEN}"
            out = train(reward.format(move=move), seed, settings)
            lora, chosen = out / "lora", "none, so lora/"
            found = page.read_strength(out)  # nothing without a judge
            if found and found["best"]:
                lora = out / "best"
                chosen = "step {step} at {strength:g}".format(**found["best"])
            tuned, _ = videos_of(lora, seed)
            measures = {move: move}
            if move == "smooth":
                measures["smooth: drift"] = "drift"
            for name, measure in measures.items():
                row = {"move": name, "seed": seed, "best": chosen}
                row |= row_of(measure, base, tuned, texts)
                print(json.dumps(row), flush=True)
                if not args.reward and not args.settings:
                    tables.merge(HERE / "camera_trained.csv", [row], ("move", "seed"))
            iio.imwrite(out.with_name(f"{out.name}.png"), strip(base, tuned))


if __name__ == "__main__":
    main()
