"""Flags that ask for more than vader.py holds, checked before anything loads."""

import importlib.util
import re
from pathlib import Path

from extras.base_lora import read_base
from extras.hub import check_hub
from extras.lora_files import check_lora, check_targets
from rewards import require

LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}


def check_flags(cfg, family, source: str, device: str, given: dict) -> dict:
    """Rank, alpha and targets that --lora has, as settings. given: the user's.

    Raises BadInput unless --lora and --base_lora fit the denoiser, --lora_targets are linear layers of it,
    what --quantize and --tracker need is installed, and the hub would take a --push_to_hub.
    """
    found = {}
    if cfg.base_lora:
        read_base(cfg.base_lora, family, family.build_on_meta(source))
    if cfg.lora:
        found = check_lora(cfg.lora, family.build_on_meta(source), given)
        card, base = Path(cfg.lora) / "README.md", cfg.base_lora
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        (then,) = re.findall("after the LoRA (.*) was fused", text)[:1] or ["none"]
        now = "none" if not base else Path(base).name if Path(base).exists() else base
        if "VADER" in text and then != now:
            print(f"{cfg.lora} was trained with --base_lora {then}, not {now}: see its run's config.json")
    elif cfg.lora_targets:
        check_targets(cfg.lora_targets, family.build_on_meta(source))
    for flag in ("quantize", "tracker"):
        kind = getattr(cfg, flag)
        library = LIBRARIES.get(kind, kind)
        ready = kind == "none" or importlib.util.find_spec(library)
        require(ready, f"--{flag} {kind} is not installed: pip install {library}")
    if cfg.push_to_hub:
        check_hub(cfg)
    require(cfg.quantize != "nf4" or device.startswith("cuda"), "--quantize nf4 is for CUDA GPUs: take int8")
    return found
