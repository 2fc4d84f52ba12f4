"""Seconds of an update and of its two sampling steps on a GPU, with the LoRA and the base kept in five ways.

    python bench/rollouts.py modelscope wan

As `bench/memory.py --measure`: full size, random weights, memory capped at 16 GB. In the rollout the adapters
are in half precision, as extras/quick.py has it; or float32, with TF32 and without; or merged into the bf16
base (which rounds them: not in vader.py). The last way has the base in int8 (needs torchao).
"""

import contextlib
import dataclasses
import sys
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
import memory  # noqa: E402 (needs the line above)

import vader  # noqa: E402
from extras import quick  # noqa: E402

WAYS = ("half", "float32, TF32", "float32, no TF32", "merged", "int8", "half")  # the first again: the spread


def measure(model: str, way: str) -> dict:
    """What `memory.measure` finds, in one of WAYS."""
    cfg, rollout = vader.Config(model=model, reward="aesthetic", watch="none"), vader.rollout

    def merged(run, batch):
        run.model.denoiser.merge_adapter()
        found = rollout(run, batch)
        run.model.denoiser.unmerge_adapter()
        return found

    with contextlib.ExitStack() as stack:
        if way.startswith("float32"):
            stack.enter_context(mock.patch.object(quick, "install"))
        if way == "float32, no TF32":
            torch.set_float32_matmul_precision("highest")
            stack.enter_context(mock.patch.object(torch, "set_float32_matmul_precision"))
        if way == "merged":
            stack.enter_context(mock.patch.object(vader, "rollout", merged))
        return memory.measure(dataclasses.replace(cfg, quantize="int8" if way == "int8" else "none"))


def main(models):
    memory.cap()
    print(torch.cuda.get_device_name())
    for model in models:
        for way in WAYS:
            found = measure(model, way)
            seconds = {name: round(value, 3) for name, value in found.pop("seconds").items()}
            print(f"{model}, {way}: {seconds}", {k: round(v, 2) for k, v in found.items()}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
