"""How does it look when a reward is driven too far, and which judge sees it? Each reward, a picture of all.

    python bench/gamed.py                     # every reward, about half an hour of a core
    python bench/gamed.py --rewards smooth    # only these; the table keeps the others, the picture does not

Trains `tiny-few` for 60 updates at three times its learning rate, seed 0, and judges 32 videos of unseen
prompts before and after (bench/judges.py). Writes bench/gamed.csv: of the reward, of `aesthetic`, `clip` and
`hps`, and of the words that are seen as told, the mean change and its t, which is that over its standard
error; bench/gamed.png: the base's row and one for each reward, two frames each of the same four prompts.
"""

import argparse
import sys
from pathlib import Path

import imageio.v3 as iio
import judges
import numpy as np
import tables
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402
from extras import watch  # noqa: E402

RUNS = HERE.parent / "runs" / "gamed"
STEPS, RATE = 60, 3e-3
SHOWN, FRAMES = (8, 4, 11, 2), (2, 5)  # a balloon, a star, a heart, a kite
REWARDS = (
    "aesthetic",
    "clip",
    "hps",
    "pickscore",
    "remove:star",
    "action",
    "vjepa",
    "smooth",
    "dynamic",
    "colorful",
    "compressible",
    "camera:still",
    "ask:Is the sky blue?",
)


def stills(run, unseen) -> np.ndarray:
    """Two frames of each shown prompt's video beside each other, (64, W, 3) uint8."""
    videos = []
    for n in SHOWN:
        videos.append(vader.make_videos(run, [unseen[n]], n)[0, list(FRAMES)])
    row = torch.cat(videos).permute(2, 0, 3, 1).flatten(1, 2)
    return (row * 255).round().byte().numpy()


def measure(spec: str) -> tuple[dict, np.ndarray, np.ndarray]:
    """A row of gamed.csv, and the stills of the base and of the tuned model."""
    settings = dict(model="tiny-few", seed=0, steps=STEPS, lr=RATE, watch="none")
    files = dict(prompts=str(HERE.parent / "prompts.txt"), out=str(RUNS))
    cfg = vader.resolve(vader.Config(spec, **settings, **files))
    prompts, _ = vader.split_prompts(cfg)
    if spec.startswith("remove"):
        prompts = [prompt for prompt in prompts if spec.partition(":")[2] in prompt.text]
    unseen = judges.unseen_prompts()
    run = vader.load_run(cfg, prompts + unseen)
    terms, detector = judges.load()
    terms = terms | run.terms
    before, base = judges.judge(run, unseen, terms, detector), stills(run, unseen)
    optimizer = vader.make_optimizer(run)
    for step in range(STEPS):
        vader.update(run, prompts, step, optimizer)
    after = judges.judge(run, unseen, terms, detector)
    row, names = {"reward": spec}, ("its own", *judges.REWARDS, "as told")
    for values in (before, after):
        values["its own"], values["as told"] = values[spec.replace('"', "")], tables.as_told(values)
    for name in names:
        gain, error = watch.paired_gain(before[name], after[name])
        row[name] = f"{gain:+.3f} (t {gain / error if error else 0.0:+.1f})"
    return row, base, stills(run, unseen)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rewards", nargs="+", default=REWARDS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, pictures = [], []
    for spec in args.rewards:
        row, base, tuned = measure(spec)
        rows.append(row)
        pictures = pictures or [base]
        pictures.append(tuned)
        print(row, flush=True)
        tables.merge(HERE / "gamed.csv", rows, ("reward",))
    picture = np.concatenate(pictures).repeat(2, axis=0).repeat(2, axis=1)
    iio.imwrite(HERE / "gamed.png", picture)


if __name__ == "__main__":
    main()
