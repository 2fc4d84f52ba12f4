"""--mode sample and --mode eval: videos of a trained LoRA, or of the base model."""

from pathlib import Path

import numpy as np
from filelock import FileLock

import vader
from extras import checks


def apply_lora(cfg):
    """Sample: a video per prompt, in the folder tuned, or base without --lora. Eval: both, and scores.

    Raises BadInput; and FloatingPointError when a score is not finite.
    """
    if vader.ranks()[0]:  # the first of several processes does it all
        return
    checks.check_input(cfg)
    cfg = vader.resolve(cfg)
    prompts = vader.read_prompts(cfg.prompts)
    with FileLock(Path(cfg.out) / ".lock", timeout=0):
        run = vader.load_run(cfg, prompts)
        evaluations = []
        if cfg.lora and cfg.mode == "eval":
            with run.model.denoiser.disable_adapter():
                evaluations.append(vader.evaluate(run, prompts, "base"))
        folder = "tuned" if cfg.lora else "base"
        evaluations.append(vader.evaluate(run, prompts, folder))
        for step, evaluation in enumerate(evaluations):
            vader.append_metrics(cfg, {"step": step, "eval": evaluation})
        vader.write_page(cfg, vader.read_metrics(Path(cfg.out)))
        print_scores(cfg, evaluations[0], evaluations[-1])
        print(f"done: {len(prompts)} videos in {cfg.out}/{folder}")


def print_scores(cfg, first: dict, last: dict):
    """Print each reward's mean over the videos. Raises FloatingPointError when it is not finite."""
    for name in first:
        if name in ("folder", "prompts"):
            continue
        if cfg.lora:
            print(f"{name}: {vader.summary(first[name], last[name])}")
        else:
            mean = np.mean(first[name])
            print(f"{name}: {mean:.3f}, {len(first[name])} videos of the base model")
        is_finite = np.isfinite([first[name], last[name]]).all()
        if not is_finite:
            raise FloatingPointError(f"{name} is not finite: mend the reward, or take another LoRA")
