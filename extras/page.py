"""The run's page, index.html: page.html as it is, and beside it data.js with what the run holds."""

import json
from pathlib import Path

import vader
from rewards import read_json

PAGE = vader.HERE / "page.html"


def write(cfg, judges=(), warnings=()):
    """Write both files into --out. judges: their names in evaluations; warnings: what these say, in words."""
    out = Path(cfg.out)
    data = {
        "config": vars(cfg),
        "rows": vader.read_metrics(out),
        "toy": "rewards" in vader.find_model(cfg.model)[2],
        "judges": judges,
        "warnings": warnings,
        "strength": read_strength(out),
    }
    vader.write_atomic(out / "data.js", f"window.run = {json.dumps(data)};\n")
    if PAGE.exists():
        vader.write_atomic(out / "index.html", PAGE.read_bytes())


def read_strength(out: Path) -> dict | None:
    """strength.json, by extras/strength.py, or None."""
    file = out / "strength.json"
    if not file.exists():
        return None
    return read_json(file)


def tell(cfg):
    """Print where the page is."""
    if PAGE.exists():
        print(f"open {cfg.out}/index.html")
    else:
        print("no page.html beside vader.py, so no page")
