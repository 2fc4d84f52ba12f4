"""Is best/ of the README's first command better by judges that did not choose it, and worse by none?

    python bench/headline.py                # seeds 0, 1, 2: about five minutes of two cores

Runs the command for each seed, in runs/headline/, then makes 64 videos of the base model, of best/ and of
lora/: the prompts of tiny/unseen.txt, which are neither trained on nor evaluated, and noise of their own.
Scored by `aesthetic`, which is trained on, by `clip`, which has chosen, by `hps`, and by the detectors of
tiny/ (colour, object, motion, place as told). Writes bench/headline.csv: means, and gains with paired t.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import judges
import numpy as np
import tables

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)
from extras import page, watch  # noqa: E402

RUNS = HERE.parent / "runs" / "headline"
COMMAND = "--reward aesthetic --prompts prompts.txt --seed".split()
VIDEOS, NUMBER = 64, 100_000  # the number of the first video is that of none in the run


def train(seed: int) -> tuple[Path, float]:
    """The run of the README's first command, and its seconds, 0 if it was there already."""
    out = RUNS / str(seed)
    start = time.time()
    words = [sys.executable, str(HERE.parent / "vader.py"), *COMMAND, str(seed), "--out", str(out)]
    if (out / "strength.json").exists():
        return out, 0.0
    subprocess.run(words, check=True, cwd=HERE.parent)
    return out, time.time() - start


def judge(out: Path, folder: str | None, seed: int) -> dict[str, list[float]]:
    """The judges' values of 64 videos with the LoRA in this folder of the run; None: of the base model."""
    lora = str(out / folder) if folder else None
    cfg = vader.Config(mode="sample", model="tiny-few", lora=lora, seed=seed, out=str(RUNS / "judged"))
    cfg = vader.resolve(cfg)
    unseen = judges.unseen_prompts()
    prompts = [unseen[n % len(unseen)] for n in range(VIDEOS)]
    run = vader.load_run(cfg, unseen)
    return judges.judge(run, prompts, *judges.load(), NUMBER)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        out, seconds = train(seed)
        chosen = page.read_strength(out)["best"]
        base = judge(out, None, seed)
        for folder in ("best", "lora"):
            row = {"seed": seed, "seconds": f"{seconds:.0f}", "LoRA": folder}
            row["which"] = "the last"
            if folder == "best":
                row["which"] = f"update {chosen['step']}, strength {chosen['strength']:g}"
            for name, values in judge(out, folder, seed).items():
                gain, error = watch.paired_gain(base[name], values)
                t = gain / error if error else 0.0
                row[name] = f"{np.mean(base[name]):.3f} -> {np.mean(values):.3f} (t {t:+.1f})"
            rows.append(row)
            print(row, flush=True)
    tables.merge(HERE / "headline.csv", rows, ("seed", "LoRA"))


if __name__ == "__main__":
    main()
