"""What config.json tells of a run."""

import hashlib
import json
from pathlib import Path

import diffusers
import peft
import torch
import transformers

import vader
from extras.find_lora import split_loras


def run_settings(cfg, prompts: list) -> dict:
    """What config.json tells of a run, and --resume compares, but for what is FREE.

    prompts: all that it may draw or evaluate.
    """
    texts = []
    for text, image in prompts:
        texts.append([text, Path(image or "").name])
    versions = {}
    for library in (torch, diffusers, peft, transformers):
        versions[library.__name__] = library.__version__
    settings = vars(cfg) | {
        "processes": vader.ranks()[1],
        "prompts_used": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "versions": versions,
    }
    for flag in ("lora", "base_lora", "reward_weights"):
        found = list(map(digest, split_loras(getattr(cfg, flag) or "")))
        if len(found) == 1:
            (found,) = found
        settings[f"content of --{flag}"] = found
    return settings


def write_settings(cfg, prompts: list):
    """Write config.json of the run, if this is its first process."""
    if vader.ranks()[0]:
        return
    settings = run_settings(cfg, prompts)
    vader.write_atomic(Path(cfg.out) / "config.json", json.dumps(settings, indent=1))


def digest(source: str) -> str | None:
    """A hash of a file or a folder, of a run's folder that of its LoRA; None if it is not on the disk."""
    if not source or not Path(source).exists():
        return None
    path = Path(source)
    if (path / "lora" / "adapter_config.json").is_file():
        path = path / "lora"
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    total = hashlib.sha256()
    for file in files:
        total.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                total.update(block)
    return total.hexdigest()
