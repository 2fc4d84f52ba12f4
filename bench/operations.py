"""Do counted operations tell how long an update takes? The tiny models on a CPU, in one run.

    python bench/operations.py

Each model's update is counted by `memory.predict`, checkpointed as on a GPU but in float32, and timed by
`memory.measure`, the fastest of five, models in turn. One pace for all would mean that a count tells all.
"""

import dataclasses
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import memory  # noqa: E402 (needs the line above)

import vader  # noqa: E402

MODELS = ("tiny", "tiny-i2v", "tiny-wan")


def main():
    counts, seconds = {}, {model: [] for model in MODELS}
    cfg = vader.Config(reward="aesthetic", dtype="fp32", watch="none", reward_weights=vader.TOY)
    cfgs = {model: dataclasses.replace(cfg, model=model) for model in MODELS}
    for model, one in cfgs.items():
        memory.predict(one, counts.setdefault(model, memory.Work()))
    for _ in range(5):
        for model, one in cfgs.items():
            found = memory.measure(one, device="cpu", updates=2)
            seconds[model].append(found["seconds per update"])
    for model in MODELS:
        gigas = 1e3 * sum(counts[model].operations.values())
        best, worst = min(seconds[model]), max(seconds[model])
        pace = f"{gigas / best:.1f} GFLOP/s, {gigas / worst:.1f} in the slowest"
        print(f"{model}: {gigas:.1f} GFLOP an update, {best:.2f} s: {pace}")


if __name__ == "__main__":
    main()
