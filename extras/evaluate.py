"""--mode sample and --mode eval: videos of a trained LoRA, or of the base model."""

from pathlib import Path

import numpy as np

from vader import (
    append_metrics,
    evaluate,
    load_run,
    open_run,
    ranks,
    read_prompts,
    resolve,
    summary,
    write_page,
)


def apply_lora(cfg):
    """Sample: a video per prompt, in the folder tuned, or base without --lora. Eval: both, and scores."""
    if ranks()[0]:  # the first of several processes does it all
        return
    cfg, source, family = resolve(cfg)
    prompts, rows = read_prompts(cfg.prompts, family), []
    with open_run(cfg, []):
        run = load_run(cfg, source, family, prompts)
        if cfg.lora and cfg.mode == "eval":
            with run.model.denoiser.disable_adapter():
                rows = [{"step": 0, "eval": evaluate(run, prompts, "base")}]
        rows += [{"step": len(rows), "eval": evaluate(run, prompts, "tuned" if cfg.lora else "base")}]
        for row in rows:
            append_metrics(Path(cfg.out), row)
        write_page(cfg, rows)
        first, last = rows[0]["eval"], rows[-1]["eval"]
        for name in [*first][2:]:  # all but the folder and the prompts
            mean = f"{np.mean(first[name]):.3f}, {len(first[name])} videos of the base model"
            print(f"{name}: {summary(first[name], last[name]) if cfg.lora else mean}")
            if not np.isfinite([first[name], last[name]]).all():
                raise FloatingPointError(f"{name} is not finite: mend the reward, or take another LoRA")
        print(f"done: {len(prompts)} videos in {cfg.out}/{last['folder']}")
