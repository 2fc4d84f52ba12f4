"""--mode sample and eval: videos of a trained LoRA, or of the base model. And to --mode strength."""

import json
from pathlib import Path

import numpy as np

import vader
from extras import checks, holding, page, record, resume, strength, watch
from extras.lora_scale import at_strength


def apply_lora(cfg):
    """Sample: a video per prompt, in the folder tuned, or base without --lora. Eval: both, and scores.

    Raises BadInput; and FloatingPointError when a score is not finite.
    """
    if cfg.mode == "strength":
        return strength.try_strengths(cfg)
    checks.check_input(cfg)
    cfg = vader.resolve(cfg)
    prompts = vader.read_prompts(cfg.prompts)
    with holding.hold_run(cfg):
        run = vader.load_run(cfg, prompts)
        record.write_settings(cfg, prompts)
        evaluations = []
        if cfg.lora and cfg.mode == "eval":
            with run.model.denoiser.disable_adapter():
                evaluations.append(make_videos(run, prompts, "base"))
        folder = "tuned" if cfg.lora else "base"
        with at_strength(run.model, cfg.lora_scale):
            evaluations.append(make_videos(run, prompts, folder))
        if vader.ranks()[0] > 0:
            return  # the first process writes what all have made
        vader.write_atomic(Path(cfg.out) / "metrics.jsonl", "")
        for step, evaluation in enumerate(evaluations):
            vader.append_metrics(cfg, {"step": step, "eval": evaluation})
        page.write(cfg)
        print_scores(cfg, evaluations[0], evaluations[-1])
        print(f"done: {len(prompts)} videos in {cfg.out}/{folder}")


def make_videos(run, prompts: list, folder: str) -> dict:
    """As `vader.evaluate`, but what an earlier run has done is not made again."""
    cfg, out = run.cfg, Path(run.cfg.out)
    done = resume.read_done(out)
    whole = {"folder": folder}
    rank, world = vader.ranks()
    size = cfg.eval_batch_size * world  # a batch for each process
    for first in range(0, len(prompts), size):
        chosen = prompts[first : first + size]
        part = vader.gather(done_before(out, done, folder, first, len(chosen)))[0]
        if part is None:
            part = done[folder, first] = vader.evaluate(run, chosen, folder, first)
            if rank == 0:
                write_done(out, done)
        for name, values in part.items():
            if name != "folder":
                whole.setdefault(name, []).extend(values)
    return whole


def done_before(out: Path, done: dict, folder: str, first: int, count: int) -> dict | None:
    """The evaluation of this many videos from number `first`, if it and all of them are there."""
    part = done.get((folder, first))
    if part is None or len(part["prompts"]) != count:
        return None
    for number in range(first, first + count):
        if not is_whole(out / folder / f"{number:03d}.mp4"):
            return None
    return part


def is_whole(video: Path) -> bool:
    """Is a video there, to its end? There stands its table of contents."""
    return video.exists() and b"moov" in video.read_bytes()


def write_done(out: Path, done: dict):
    """Write what `resume.read_done` reads."""
    lines = []
    for (_, first), evaluation in done.items():
        lines.append(json.dumps({"first": first, "eval": evaluation}) + "\n")
    vader.write_atomic(out / resume.DONE, "".join(lines))


def print_scores(cfg, first: dict, last: dict):
    """Print each reward's mean over the videos. Raises FloatingPointError when it is not finite."""
    for name in first:
        if name in ("folder", "prompts"):
            continue
        if cfg.lora:
            print(f"{name}: {watch.summary(first[name], last[name])}")
        else:
            mean = np.mean(first[name])
            print(f"{name}: {mean:.3f}, {len(first[name])} videos of the base model")
        is_finite = np.isfinite([first[name], last[name]]).all()
        if not is_finite:
            raise FloatingPointError(f"{name} is not finite: mend the reward, or take another LoRA")
