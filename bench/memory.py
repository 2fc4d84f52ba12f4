"""Predict the peak memory of one update for every family at its native size and three rewards.

    python bench/memory.py             # all rows, half an hour on one core; rows that are there are kept
    python bench/memory.py wan svd     # these models' rows anew
    python bench/memory.py --measure   # on a CUDA GPU, its memory capped at 16 GB: fills the last columns

Writes bench/memory.csv: gigabytes by phase (`vader.predict`), for hps also with --offload. --measure makes
the same updates with weights as PyTorch initialises them, and has never been run on a GPU yet.
"""

import argparse
import csv
import dataclasses
import itertools
import sys
from pathlib import Path
from unittest import mock

import torch

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


def measure(model: str, reward: str, offload: bool, device="cuda", updates=3) -> dict:
    """The last columns of a row: peak of reserved GPU memory in GB, seconds of the fastest update.

    Networks come from configs, as in the prediction, but with content and on the device.
    """
    cfg, source, family, prompts = vader.resolve_plan(config(model, reward, offload))
    cfg = dataclasses.replace(cfg, device=device)
    move, frozen = torch.nn.Module.to, vader.rewards.frozen
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with (
        vader.without_weights(),
        mock.patch.object(torch.nn.Module, "to", move),
        mock.patch.object(vader.rewards, "frozen", frozen),
    ):
        run = vader.load_run(cfg, source, family, prompts)
        optimizer = vader.make_optimizer(cfg, list(vader.lora_parameters(run.model).values()))
        scaler = torch.amp.GradScaler(device, enabled=False)
        rows = [vader.update(run, prompts, step, 0, 1, optimizer, scaler) for step in range(updates)]
    peak = torch.cuda.max_memory_reserved() / 1e9
    seconds = min(row["seconds"] for row in rows)
    return {"measured peak": f"{peak:.2f}", "seconds per update": f"{seconds:.1f}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(MODELS))
    parser.add_argument("--measure", action="store_true", help="on a CUDA GPU")
    args = parser.parse_args()
    if args.measure:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 16e9 / total))
    file = HERE / "memory.csv"
    with open(file, newline="") if file.exists() else open("/dev/null") as stored:
        rows = {(row["model"], row["reward"], row["offload"]): row for row in csv.DictReader(stored)}
    settings = [("hps", False), ("hps", True), ("aesthetic", False), ("vjepa", False)]
    for (reward, offload), model in itertools.product(settings, args.models or MODELS):
        key = model, reward, "yes" if offload else "no"
        if args.measure:
            rows[key] |= measure(model, reward, offload)
        elif key not in rows or args.models:
            rows[key] = predict(model, reward, offload)
        print(rows[key], flush=True)
        with open(file, "w", newline="") as target:
            table = csv.DictWriter(target, rows[key])
            table.writeheader()
            table.writerows(rows.values())


if __name__ == "__main__":
    main()
