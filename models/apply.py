"""--mode sample and --mode eval: videos of a trained LoRA, or of the base model."""

from pathlib import Path

from vader import append_metrics, evaluate, load_run, open_run, read_prompts, resolve, summary, write_page


def apply_lora(cfg):
    """Sample: a video per prompt, in the folder tuned, or base without --lora. Eval: both, and scores."""
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
            print(f"{name}: {summary(first[name], last[name])}")
        print(f"done: {len(prompts)} videos in {cfg.out}/{last['folder']}")
