"""Seconds of an update and of its two sampling steps on a GPU, in several ways.

    python bench/rollouts.py modelscope wan                  # how the LoRA and the base are kept
    python bench/rollouts.py modelscope --ways half compiled # whether torch.compile pays
    python bench/rollouts.py modelscope --batch_size 1 2 4   # that many videos at once, memory not capped

As `bench/memory.py --measure`: full size, random weights, memory capped at 16 GB but for the last. In the
rollout the adapters are in half precision, as extras/quick.py has it; or float32, with TF32 and without; or
merged into the bf16 base (which rounds them: not in vader.py); or so, and the blocks compiled. `int8` has the
base in int8 (needs torchao).
"""

import argparse
import contextlib
import functools
import sys
import time
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]
import memory  # noqa: E402 (needs the line above)

import vader  # noqa: E402
from extras import quick  # noqa: E402

WAYS = ("half", "float32, TF32", "float32, no TF32", "merged", "int8", "half")  # the first again: the spread


def merged(rollout, run, batch):
    """`vader.rollout` with the LoRA in the base's weights."""
    run.model.denoiser.merge_adapter()
    found = rollout(run, batch)
    run.model.denoiser.unmerge_adapter()
    return found


def compiled(rollout, run, batch):
    """`merged`, through compiled blocks; the walk back goes through the blocks as they are."""
    torch._dynamo.config.recompile_limit = 64  # blocks of a class share code, and may not share a graph
    blocks = [m for m in run.model.denoiser.modules() if type(m).__name__ in run.model.checkpointed]
    with contextlib.ExitStack() as stack:
        for block in blocks:
            if not hasattr(block, "quick"):
                block.quick = torch.compile(functools.partial(type(block).forward, block))
            stack.enter_context(mock.patch.object(block, "forward", block.quick))
        return merged(rollout, run, batch)


def measure(model: str, way: str, batch_size: int) -> dict:
    """What `memory.measure` finds, in one of WAYS, or `compiled`."""
    how = dict(reward="aesthetic", watch="none", batch_size=batch_size, grad_accum=4 // batch_size)
    cfg = vader.Config(model=model, quantize="int8" if way == "int8" else "none", **how)
    other = {"merged": merged, "compiled": compiled}
    with contextlib.ExitStack() as stack:
        if way.startswith("float32") or way in other:
            stack.enter_context(mock.patch.object(quick, "install"))
        if way == "float32, no TF32":
            torch.set_float32_matmul_precision("highest")
            stack.enter_context(mock.patch.object(torch, "set_float32_matmul_precision"))
        if way in other:
            rollout = functools.partial(other[way], vader.rollout)
            stack.enter_context(mock.patch.object(vader, "rollout", rollout))
        return memory.measure(cfg)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=[*WAYS, "compiled"])
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    if args.batch_size == [1]:
        memory.cap()
    print(torch.cuda.get_device_name())
    for model in args.models:
        for way in args.ways:
            for batch_size in args.batch_size:
                start = time.time()
                found = measure(model, way, batch_size)
                seconds = {name: round(value, 3) for name, value in found.pop("seconds").items()}
                rest = {name: round(value, 2) for name, value in found.items()}
                spent = f"{time.time() - start:.0f} s in all"
                print(f"{model}, {way}, {batch_size} at once: {seconds} {rest} {spent}", flush=True)


if __name__ == "__main__":
    main()
