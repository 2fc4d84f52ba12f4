"""What bench/inputs.py tries: an input, how it is given to `vader.main`, and files with one thing damaged."""

import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

import rewards
import vader

ROOT = Path(__file__).resolve().parent.parent
TINY, MEMORY = ROOT / "tiny", 16 << 30  # bytes that an input may take
SMALL = "--num_inference_steps 1 --num_frames 2 --height 32 --width 32 --steps 1 --eval_videos 1"
SMALL += " --batch_size 1 --grad_accum 1 --model tiny --reward colorful --prompts"
RIGHT = ("refused", "passes")
WRONG = "accepted failed traceback lines slow unnamed late changed unmade".split()
TEXT, NOISE = "a red cube\na blue moon\n", "\0é\x07noise" * 99
OTHERS = (
    r"W\d{4} |Unable to import `torchao`|.*%\|"  # lines of libraries that are imported, and progress bars
)


class Case(NamedTuple):
    """An input, and what is right for it."""

    what: str
    words: list  # of the command line, after SMALL
    names: str | None = ""  # a pattern of what must be said when it is refused; None: it may pass
    right: str = (
        "refused"  # or stops: in the middle; or passes: names is a pattern of what is printed; or either
    )
    early: bool = False  # refused before a network of the model loads
    seconds: int = 20  # of a core that it may take; by the clock three times as many, or a minute
    environ: dict = {}  # variables, None for one that is not set
    change: Callable = lambda: None  # called in the process first
    fresh: bool = False  # in a Python of its own, not in a fork of this one
    made: Path | None = None  # what a pass must leave, whole; None: a LoRA or videos in --out
    like: Path | None = None  # a run; who passes with other rewards than it had has read what is damaged


def note_loading(file: Path):
    """From now on write this file whenever a network of --model is about to load."""
    load = rewards.load

    def noted(kind, source, flag, *args, **kwargs):
        if flag == "--model" and hasattr(kind, "state_dict"):
            file.touch()
        return load(kind, source, flag, *args, **kwargs)

    rewards.load = noted


def run(work: Path, case: Case):
    """The forked process of a case: it does not return."""
    words = [str(word) for word in [*SMALL.split(), work / "good.txt", "--out", work / "out", *case.words]]
    for name, value in case.environ.items():
        os.environ.pop(name, None)
        os.environ |= {name: str(value)} if value is not None else {}
    tempfile.tempdir = None  # TMPDIR is asked again
    for number in (1, 2):
        os.dup2(os.open(work / f"said{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.alarm(max(60, 3 * case.seconds))
    try:
        case.change()
        if case.fresh:
            os.execv(sys.executable, [sys.executable, str(ROOT / "vader.py"), *words])
        code = vader.main(words)
        sys.stdout.flush()
    except BaseException:
        code = traceback.print_exc() or 99
    os._exit(code)


def is_whole(path: Path) -> bool:
    """Is a file there? An mp4 has its table of contents at its end."""
    return path.exists() and (path.suffix != ".mp4" or b"moov" in path.read_bytes())


def scores(folder: Path) -> list:
    """The rewards in the metrics of a run."""
    rows = vader.read_metrics(folder)
    return [row["eval"]["reward"] if "eval" in row else row["reward"] for row in rows]


def judge(work: Path, case: Case):
    """Give an input to `vader.main` in a process -> one of RIGHT or WRONG, exit code, lines on stderr."""
    files = {path: path.read_bytes() for path in (work / "copy").rglob("*") if path.is_file()}
    out = work / "out"
    (work / "loaded").unlink(missing_ok=True)
    sys.stdout.flush()
    if not (child := os.fork()):
        run(work, case)
    _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    printed, text = ((work / f"said{number}").read_text(errors="replace") for number in (1, 2))
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip() and not re.match(OTHERS, line)]
    begin = {1: "vader.py: stopped: ", 2: "vader.py: error: "}.get(code, "?")
    slow = code == -signal.SIGALRM or used.ru_utime + used.ru_stime > case.seconds
    wrong = {"slow": slow, "traceback": "Traceback" in text or code not in (0, 1, 2)}
    if code == 0:
        made = [case.made] if case.made else [*out.rglob("*.safetensors"), *out.rglob("*.mp4")]
        wrong["accepted"] = case.right in ("refused", "stops") or (
            case.like and scores(out) != scores(case.like)
        )
        wrong["unmade"] = not made or not all(map(is_whole, made))
        wrong["unnamed"] = case.right == "passes" and not re.search(case.names, printed + text)
    else:
        same = all(path.is_file() and path.read_bytes() == data for path, data in files.items())
        wrong["failed"] = case.right == "passes"
        wrong["lines"] = len(lines) != 1 or not lines[0].startswith(begin)
        wrong["unnamed"] = not re.search(case.names, text)
        wrong["late"] = case.early and (work / "loaded").exists()
        wrong["changed"] = not same or (case.right != "stops" and any(out.glob("[!.]*")))
    shutil.rmtree(out, ignore_errors=True)
    found = next((name for name, is_so in wrong.items() if is_so), RIGHT[code == 0])
    return found, code, lines


def finished(work: Path, folder: Path, *words) -> Path:
    """A run in a folder, for cases to go on with, or to be like."""
    found, *told = judge(work, Case("", ["--out", folder, *words], right="passes", made=folder))
    assert found == "passes", (found, *told)
    return folder


# ---- Damage: (name, inside, change). inside: of the dictionary that a file holds, not of its bytes ---------
def edit(key, value):
    return lambda row: {k: v for k, v in (row | {key: value}).items() if str(v) != "GONE"}


BYTES = [("removed", False, lambda data: None), ("cut", False, lambda data: data[: len(data) // 2])]
for text in ("[]", "null", "{}", "", NOISE):
    BYTES += [(text[-5:] or "empty", False, lambda data, text=text: text.encode())]
TENSORS = [("one gone", True, lambda state: dict(sorted(state.items())[1:]))]
TENSORS += [("half gone", True, lambda state: dict(sorted(state.items())[::2]))]
TENSORS += [("prefix", True, lambda state: {f"model.{name}": w for name, w in state.items()})]
TENSORS += [("other shape", True, lambda state: state | {max(state): torch.zeros(7)})]
TENSORS += [("one more", True, lambda state: state | {"nobody": torch.zeros(1)})]
for x in (torch.nan, torch.inf):
    TENSORS += [(str(x), True, lambda state, x=x: state | {max(state): state[max(state)].float() * x})]


def damage(path, inside, change):
    plain = path.suffix == ".safetensors"
    if not inside:
        data = change(path.read_bytes())
    elif path.suffix == ".json":
        data = json.dumps(change(json.loads(path.read_text()))).encode()
    else:
        whole = load_file(path) if plain else torch.load(path, weights_only=True)
        part = inside if inside in whole else "state_dict" if "state_dict" in whole else None
        data = whole | {part: change(whole[part])} if part else change(whole)
    path.unlink()  # it may be a link
    if isinstance(data, dict):
        save_file(data, path, {"format": "pt"}) if plain else torch.save(data, path)
    elif data is not None:
        path.write_bytes(data)


def copies(source, folder, todo, copy=os.symlink):
    """A copy of source for each (file, *damage), one after the other; gives what was done."""
    for file, name, *how in todo:
        shutil.copytree(source, folder, copy_function=copy)
        damage(folder / file, *how)
        yield f"{source.name}/{file}: {name}"
        shutil.rmtree(folder)
