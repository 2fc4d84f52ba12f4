"""Tables and figures of the scripts here."""

import csv
import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
from judges import REWARDS, WORDS

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (needs the line above)

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from extras import watch  # noqa: E402 (needs the line above)


def merge(file: Path, found: list[dict], keys: tuple) -> list[dict]:
    """Write a CSV of these rows and of the runs (told by `keys`) that it held and are not among them."""

    def run_of(row):
        return [str(row[key]) for key in keys]

    def place(row):
        return run_of(row), int(row.get("queries", 0))

    rows = list(found)
    made = [run_of(row) for row in found]
    if file.exists():
        with open(file, newline="") as old:
            for row in csv.DictReader(old):
                if run_of(row) not in made:
                    rows.append(row)
    rows.sort(key=place)
    content = io.StringIO(newline="")
    table = csv.DictWriter(content, (found or rows)[0])
    table.writeheader()
    table.writerows(rows)  # raises where the columns have changed, before anything is written
    file.write_text(content.getvalue(), newline="")
    return rows


# ---- Gold against proxy ------------------------------------------------------------------------------------
def as_told(values: dict) -> list[float]:
    """The share of the four words that the detectors see in each video."""
    return np.mean([values[word] for word in WORDS], axis=0).tolist()


def figures_of(base: dict, values: dict) -> dict[str, str]:
    """Of each judge, and of the words together: the mean over the videos, its paired gain, and the error."""
    found = {}
    before = base | {"as told": as_told(base)}
    for name, scores in (values | {"as told": as_told(values)}).items():
        gain, error = watch.paired_gain(before[name], scores)
        found[name] = f"{np.mean(scores):.3f}"
        found[f"{name} gain"] = f"{gain:.4f}"
        found[f"{name} error"] = f"{error:.4f}"
    return found


def pooled(rows: list[dict], name: str) -> tuple[float, float]:
    """A judge's mean gain over the seeds at one point, and its standard error, by the videos of all."""
    gains = np.array([row[f"{name} gain"] for row in rows], dtype=float)
    errors = np.array([row[f"{name} error"] for row in rows], dtype=float)
    return gains.mean(), np.linalg.norm(errors) / len(errors)


def gains_in_words(rows: list[dict]) -> dict[str, str]:
    """The rewards' gains and that of the words, over the seeds, with their errors."""
    found = {}
    for name in (*REWARDS, "as told"):
        gain, error = pooled(rows, name)
        found[name] = f"{gain:+.3f} ({error:.3f})"
    return found


def figure(panels: dict, file: Path, title: str):
    """Gold against proxy. panels: {reward: {label: (a line's points, single points)}}, gains (x, y)."""
    count = len(panels)
    shape = dict(figsize=(6 * count, 5), squeeze=False, layout="constrained")
    plot, axes = plt.subplots(1, count, **shape)
    for ax, (reward, lines) in zip(axes[0], panels.items(), strict=True):
        for number, (label, (line, single)) in enumerate(lines.items()):
            colour = f"C{number}" if number < 10 else "black"
            x, y = np.transpose(line)
            ax.plot(x, y, marker="o", color=colour, label=label)
            for point in single:
                ax.plot(*point, "o", color=colour, mfc="white")
        ax.axhline(0, color="grey", lw=0.5)
        ax.set_xlabel(f"gain of {reward}, which is trained on")
        ax.set_ylabel("gain of the share of words that are seen as told")
    axes[0][0].legend(title=title, fontsize=8)
    plot.savefig(file, dpi=110)
    plt.close(plot)
