"""Train the tiny model on every reward, then score five of the LoRAs with all of them: two tables.

    python bench/every_reward.py          # all rewards, about an hour on 2 cores; finished runs are kept
    python bench/every_reward.py smooth hps     # only these

Runs are those of the command line, in runs/rewards/. Writes bench/rewards.csv (reward on held-out prompts
before and after, paired standard error, seconds) and bench/cross.csv (mean change of every reward on
tiny/unseen.txt, in standard deviations of the base model's videos, for each LoRA).
"""

import csv
import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs" / "rewards"
STAR = f"--prompts {RUNS}/star.txt --eval_prompts {RUNS}/unseen-star.txt"
STILL = f"--prompts {RUNS}/still.txt --eval_prompts {RUNS}/unseen-still.txt"
# the early steps decide what is there and how it moves, so they train too
EARLY = "--backprop_steps 3 --grad_steps spread --coupling 0 --batch_size 4"
MOVE = f"--num_inference_steps 5 {EARLY} --lr 2e-3"
REWARDS = {
    "aesthetic": "",
    "clip": MOVE,
    "hps": MOVE,
    "pickscore": MOVE,
    "remove:star": f"{STAR} --steps 40 --decode_frames 4",
    "action": f"{MOVE} --steps 80 --eval_every 80",
    "action:rising": f"{STILL} {MOVE} --steps 80 --eval_every 80",
    "vjepa": "--num_inference_steps 5 --batch_size 8 --lr 2e-3 --steps 45 --eval_every 45 --eval_videos 64",
    "smooth": "",
    "dynamic": "",
    "colorful": "",
    "compressible": "",
}
SUM = [name for name in REWARDS if name not in ("remove:star", "action:rising")]
CROSS = ["aesthetic", "hps", "smooth", "colorful", "compressible"]


def folder(spec: str) -> Path:
    return RUNS / spec.replace(":", "-")


def run(words: str):
    """A command of the README's kind, with vader.py; returns its seconds."""
    start = time.time()
    subprocess.run([sys.executable, str(HERE.parent / "vader.py"), *shlex.split(words)], check=True)
    return time.time() - start


def train(spec: str) -> dict:
    """One row of rewards.csv. A run that is there already is read, not made again."""
    flags, out = REWARDS[spec], folder(spec)
    command = f"--model tiny --reward {spec} --out {out} --eval_videos 32 {flags}"
    done = out / "seconds.txt"
    if not done.exists():
        seconds = run(command)
        done.write_text(f"{seconds:.0f}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = [row["eval"]["reward"] for row in rows if "eval" in row]
    gain = np.subtract(results[-1], results[0])
    numbers = np.mean(results[0]), np.mean(results[-1]), gain.mean(), gain.std(ddof=1) / len(gain) ** 0.5
    row = dict(zip(("base", "tuned", "gain", "error"), (f"{n:.3f}" for n in numbers), strict=True))
    row["videos"] = len(gain)
    return {"reward": spec} | row | {"seconds": done.read_text(), "flags": flags.replace(f"{RUNS}/", "")}


def cross(spec: str) -> dict:
    """One row of cross.csv: what training on `spec` did to each reward, on prompts never trained on."""
    out = RUNS / ("cross-" + folder(spec).name)
    if not (out / "metrics.jsonl").exists():
        flags = f"--lora {folder(spec)}/lora --out {out} --prompts {HERE.parent}/tiny/unseen.txt"
        run(f"--mode eval --reward '{' + '.join(SUM)}' {flags}")
    rows = [json.loads(line)["eval"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {"trained on": spec}
    for name in SUM:
        base, tuned = (np.array(row[name]) for row in rows)
        found[name] = f"{(tuned - base).mean() / base.std(ddof=1):+.2f}"
    return found


def write(path: Path, rows: list[dict]):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    print(f"wrote {path}")


def main():
    RUNS.mkdir(parents=True, exist_ok=True)
    for prefix, source in (("", "prompts.txt"), ("unseen-", "tiny/unseen.txt")):
        lines = (HERE.parent / source).read_text().splitlines()
        still = [re.sub(" (rising|falling|drifting left|drifting right)", "", line) for line in lines]
        (RUNS / f"{prefix}star.txt").write_text("\n".join(line for line in lines if "star" in line))
        (RUNS / f"{prefix}still.txt").write_text("\n".join(still))
    chosen = sys.argv[1:]
    rows = [train(spec) for spec in chosen or REWARDS]
    if not chosen:
        write(HERE / "rewards.csv", rows)
        write(HERE / "cross.csv", [cross(spec) for spec in CROSS])


if __name__ == "__main__":
    main()
