"""More kinds of inputs for bench/inputs.py: the environment of a run, ffmpeg, trackers."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cases import TEXT, TINY, Case


# ---- The environment ---------------------------------------------------------------------------------------
def ranks():
    """Variables of torchrun's, and what is right: a process that is one of none must be alone or say so."""
    two = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
    }
    for alone in ({"RANK": "1"}, {"WORLD_SIZE": "4"}, {"LOCAL_RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}):
        yield alone, "either"
    for alone in (
        {"RANK": "1", "WORLD_SIZE": "2"},
        {"MASTER_PORT": "x"},
        {"MASTER_ADDR": "127.0.0.1"},
        {"RANK": "x"},
    ):
        yield alone, "either"
    yield two | {"WORLD_SIZE": "1"}, "passes"
    yield two | {"MASTER_ADDR": ""}, "either"
    for address in ("no such host", "256.256.256.256", "nosuch.invalid"):
        yield two | {"MASTER_ADDR": address}, "refused"
    for name, values in {
        "MASTER_PORT": ("x", "-1", "99999", "", None),
        "WORLD_SIZE": ("x", "0", "-1", "", None, "1.5"),
        "RANK": ("x", "-1", "5", "", None),
    }.items():
        for value in values:
            yield two | {name: value}, "refused" if value else "either"


def put_none(name):
    """A change: this library can't be imported."""

    def change():
        sys.modules[name] = None

    return change


def put_first(package):
    """A change: this folder is what its name imports."""

    def change():
        sys.modules.pop(package.name, None)
        sys.path.insert(0, str(package.parent))

    return change


def without_locks(number):
    """A change: the file system has no locks."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    def change():
        fcntl.flock = flock

    return change


def closed(number):
    return lambda: os.close(number)


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)


def full_disk():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def environment(work):
    """Variables, the home folder, locks, and what a process has as its input and output."""
    environ = {"LC_ALL": None, "LANG": None}
    for variables, right in ranks():
        what = " ".join(f"{name}={value}" for name, value in variables.items())
        how = dict(right=right, environ=variables, seconds=10)
        names = "" if right == "passes" else "RANK|WORLD_SIZE|MASTER|torchrun"
        yield Case(what, [], names, early=right == "refused", **how)

    home = work / "home"
    home.mkdir()
    (home / "prompts.txt").write_text(TEXT)
    for name, source in dict(
        lora=work / "run" / "lora", few=TINY / "few", rewards=TINY / "rewards", t2v=TINY / "t2v"
    ).items():
        (home / name).symlink_to(source)
    ask = ["--reward", "ask", "--vlm=~/rewards/ask", "--num_frames", 8]
    for words in (
        ["--prompts=~/prompts.txt"],
        ["--eval_prompts=~/prompts.txt"],
        ["--model=~/t2v"],
        ["--lora=~/lora"],
        ["--base_lora=~/few"],
        ["--reward", "clip", "--reward_weights=~/rewards"],
        ask,
    ):
        yield Case(" ".join(map(str, words)), words, right="passes", environ={"HOME": home})
    yield Case("--out=~/x", ["--out=~/x"], right="passes", environ={"HOME": home}, made=home / "x" / "lora")
    shutil.rmtree("~", ignore_errors=True)  # where --out=~/x is taken as it stands
    for flag in ("out", "prompts", "eval_prompts", "model", "lora", "base_lora", "reward_weights", "vlm"):
        words = [f"--{flag}=~nosuchuser/x", *(["--reward", "ask"] if flag == "vlm" else [])]
        yield Case(words[0], words, f"--{flag}|~nosuchuser", early=True)
        shutil.rmtree("~nosuchuser", ignore_errors=True)
    yield Case("no HOME", [], right="passes", environ={"HOME": None})
    yield Case("no HOME, ~", ["--prompts=~/nosuch/x"], "nosuch", early=True, environ={"HOME": None})

    odd = work / "café \u65e5\u672c"
    (odd / "rewards").mkdir(parents=True)
    (odd / "rewards" / "clip").symlink_to(TINY / "rewards" / "clip")
    (odd / "prompts.txt").write_text("a café \u2603\na blue moon\n", encoding="utf-8")
    words = ["--prompts", odd / "prompts.txt", "--out", odd / "out"]
    words += ["--reward", "clip", "--reward_weights", odd / "rewards"]
    for variables in (
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ):
        what = " ".join(f"{name}={value}" for name, value in variables.items())
        how = dict(fresh=True, environ=environ | variables, seconds=60)
        yield Case(f"names beyond ASCII, {what}", words, right="passes", made=odd / "out" / "lora", **how)
        shutil.rmtree(odd / "out", ignore_errors=True)
    how = dict(fresh=True, environ=environ | {"PYTHONIOENCODING": "ascii"}, seconds=60)
    yield Case("no file beyond ASCII", ["--prompts", odd / "nosuch.txt"], "nosuch.txt", **how)
    for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        for mode in ("train", "sample"):
            change = without_locks(number)
            names = "" if number == errno.ENOSYS else "lock"  # then another kind of lock is taken
            yield Case(f"no locks, {mode}, {number}", ["--mode", mode], names, "passes", change=change)
    yield Case("no TMPDIR", [], right="passes", environ={"TMPDIR": "/nosuch"})
    yield Case("TMPDIR is a file", [], right="passes", environ={"TMPDIR": work / "good.txt"})
    yield Case("stdin closed", [], right="passes", fresh=True, change=closed(0), seconds=60)
    yield Case(
        "stdout closed", [], right="either", names="stdout|output", fresh=True, change=closed(1), seconds=60
    )
    for what, change in (("a closed pipe", closed_pipe), ("a full disk", full_disk)):
        yield Case(
            f"stdout is {what}",
            [],
            "pipe|space|output|printed",
            "either",
            fresh=True,
            change=change,
            seconds=60,
        )
    yield Case(
        "--reward -1*dynamic", ["--reward", "-1*dynamic", "--num_frames", 4], "=", "either", early=True
    )
    words = ["--negative_prompt", "-blurry", "--guidance_scale", 2]
    yield Case("--negative_prompt -blurry", words, "=", "either", early=True)
    yield Case("--reward=-1*dynamic", ["--reward=-1*dynamic", "--num_frames", 4], right="passes")


# ---- ffmpeg ------------------------------------------------------------------------------------------------
ENCODES = 'case "$*" in *libx264*) '
SCRIPTS = {
    "without libx264": ENCODES + "echo \"Unknown encoder 'libx264'\" >&2; exit 1;; esac",
    "fails at once": ENCODES + "exit 1;; esac",
    "fails at the end": ENCODES
    + 'cat >/dev/null; head -c 100 /dev/zero >"$last"; echo "No space" >&2; exit 1;; esac',
    "writes nothing": ENCODES + "cat >/dev/null; exit 0;; esac",
    "cuts, and says nothing": ENCODES + 'cat >/dev/null; head -c 100 /dev/zero >"$last"; exit 0;; esac',
    "is killed": ENCODES + "head -c 99 >/dev/null; kill -9 $$;; esac",
}
for calls in (2, 3, 4):
    SCRIPTS[f"fails at call {calls}"] = (
        ENCODES + f'echo x >>"$0.calls"; [ $(wc -l <"$0.calls") -ge {calls} ] && '
        '{ cat >/dev/null; head -c 100 /dev/zero >"$last"; echo "No space left" >&2; exit 1; };; esac'
    )


def ffmpeg(work):
    """An ffmpeg that is not there, can't encode, or fails; and --fps."""
    code = "import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())"
    real = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    folder = work / "ffmpeg"
    folder.mkdir()
    (folder / "is no program").write_text("hello")
    (folder / "is no program but may run").write_bytes(b"\x7fELF" + bytes(99))
    (folder / "is no program but may run").chmod(0o755)
    names = ["/nosuch/ffmpeg", "/bin/true", "/bin/false", folder, *folder.iterdir()]
    seen_early = (
        "without libx264",
        "fails at once",
        "fails at the end",
        "writes nothing",
        "cuts, and says nothing",
    )
    for name, script in SCRIPTS.items():
        (folder / name).write_text(f'#!/bin/bash\nlast="${{@: -1}}"\n{script}\nexec {real} "$@"\n')
        (folder / name).chmod(0o755)
        names.append(folder / name)
    for path in names:
        early = path not in [folder / name for name in SCRIPTS if name not in seen_early]
        for mode in ("train", "sample"):
            # the first call may be a trial: three videos and more are made
            words = ["--mode", mode, "--prompts", work / "three.txt", "--eval_videos", 3, "--steps", 2]
            (work / "three.txt").write_text(TEXT + "a star\na kite\n")
            (folder / f"{Path(path).name}.calls").unlink(missing_ok=True)
            case = Case(
                f"{Path(path).name}, {mode}", words, "ffmpeg" if early else r"\.mp4|ffmpeg", early=early
            )
            yield case._replace(environ={"IMAGEIO_FFMPEG_EXE": path}, right="refused" if early else "stops")
    yield Case(
        "no ffmpeg, no videos", ["--eval_videos", 0], "ffmpeg", "either", environ={"IMAGEIO_FFMPEG_EXE": "/x"}
    )
    for rate in ("0", "-1", "nan", "inf", "x", "", "1e9", "1000000"):
        yield Case(f"--fps {rate}", [f"--fps={rate}"], "--fps", early=True)
    for rate in ("1", "8", "23.976", "60"):
        yield Case(f"--fps {rate}", ["--fps", rate], right="passes")
    yield Case("--fps 1000", ["--fps", "1000"], "--fps", "either", early=True)


# ---- Trackers ----------------------------------------------------------------------------------------------
def trackers(work):
    """Trackers that are not installed, can't be imported, or to which nobody has logged in."""
    home = work / "tracked"
    home.mkdir()
    alone = dict.fromkeys(("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "TRACKIO_SPACE_ID"))
    alone |= {"HOME": home, "WANDB_DIR": home, "TRACKIO_DIR": home / "trackio"}
    for name in ("tensorboard", "wandb", "trackio"):
        words = ["--tracker", name]
        yield Case(f"{name} is not installed", words, name, early=True, change=put_none(name), environ=alone)
        broken = work / f"broken-{name}" / name
        broken.mkdir(parents=True)
        (broken / "__init__.py").write_text("import nosuch_library_of_it\n")
        how = dict(early=True, environ=alone, change=put_first(broken))
        yield Case(f"{name} is installed in part", words, name, **how)
        for mode in ("sample", "eval"):
            case = Case(f"{name}, --mode {mode}", [*words, "--mode", mode], name, "either", environ=alone)
            yield case._replace(environ=alone | {"WANDB_MODE": "offline"})
    nobody = lambda: os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # noqa: E731
    words = ["--tracker", "wandb"]
    yield Case("wandb without a login", words, "wandb", early=True, environ=alone, change=nobody)
    yield Case(
        "wandb without a login, stdin closed", words, "wandb", early=True, environ=alone, change=closed(0)
    )
    for key in ("x", "not a key"):
        how = dict(early=True, environ=alone | {"WANDB_API_KEY": key}, change=nobody)
        yield Case(f"wandb with the key {key}", words, "wandb", **how)
    yield Case("wandb of a mode", words, "wandb", early=True, environ=alone | {"WANDB_MODE": "nosuch"})
    for mode in ("offline", "disabled"):
        yield Case(f"wandb {mode}", words, right="passes", environ=alone | {"WANDB_MODE": mode})
    yield Case(
        "wandb offline, no folder",
        words,
        "wandb",
        "either",
        environ=alone | {"WANDB_MODE": "offline", "WANDB_DIR": "/dev/null"},
    )
    yield Case("tensorboard", ["--tracker", "tensorboard"], right="passes")
    yield Case("trackio", ["--tracker", "trackio"], right="passes", environ=alone)
    yield Case(
        "trackio, no folder",
        ["--tracker", "trackio"],
        "trackio",
        "either",
        environ=alone | {"TRACKIO_DIR": "/dev/null/x"},
    )


ALL = (environment, ffmpeg, trackers)
