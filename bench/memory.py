"""Predict the peak memory of one update for every family at its native size and three rewards.

    python bench/memory.py             # all rows, half an hour on one core; rows that are there are kept
    python bench/memory.py wan svd     # these models' rows anew

Writes bench/memory.csv: gigabytes by phase (`vader.predict`), for hps also with --offload. No GPU has
measured them yet.
"""

import csv
import itertools
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)

MODELS = ("modelscope", "zeroscope", "animatediff", "svd", "cogvideox", "ltx", "wan")
UNMEASURED = "not measured yet"


def config(model: str, reward: str, offload: bool) -> vader.Config:
    frames = 16 if reward == "vjepa" and model != "svd" else None
    return vader.Config(model=model, reward=reward, offload=offload, decode_frames=frames)


def predict(model: str, reward: str, offload: bool) -> dict:
    """One row: the phases' peaks in GB."""
    found = vader.predict(config(model, reward, offload))
    row = {"model": model, "reward": reward, "offload": "yes" if offload else "no"}
    row |= {name: f"{size:.2f}" for name, size in found.items()}
    row["peak"] = f"{max(found.values()):.2f}"
    return row | {"measured peak": UNMEASURED, "seconds per update": UNMEASURED}


def main():
    file, chosen = HERE / "memory.csv", sys.argv[1:]
    with open(file, newline="") if file.exists() else open("/dev/null") as stored:
        rows = {(row["model"], row["reward"], row["offload"]): row for row in csv.DictReader(stored)}
    settings = [("hps", False), ("hps", True), ("aesthetic", False), ("vjepa", False)]
    for (reward, offload), model in itertools.product(settings, chosen or MODELS):
        key = model, reward, "yes" if offload else "no"
        if key in rows and not chosen:
            continue
        rows[key] = predict(model, reward, offload)
        print(rows[key], flush=True)
        with open(file, "w", newline="") as target:
            table = csv.DictWriter(target, rows[key])
            table.writeheader()
            table.writerows(rows.values())


if __name__ == "__main__":
    main()
