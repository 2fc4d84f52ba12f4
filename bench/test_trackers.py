"""--tracker, with the real libraries: W&B offline, Trackio and TensorBoard as they are; none is mocked."""

import importlib
import importlib.util
import io
import json
import math
import os
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import vader
from conftest import checked
from extras import resume, tracker, tracker_login
from rewards import BadInput

NAMES = ["tensorboard", "wandb", "trackio"]


@pytest.fixture(scope="module")
def trackio(tmp_path_factory):
    """The library, which reads once, when it is imported, where it writes."""
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        library = importlib.import_module("trackio")
    assert library.TRACKIO_DIR == folder
    return library


@pytest.fixture(autouse=True)
def offline(trackio, tmp_path, monkeypatch):
    """No network, no login, no file out of tmp_path, and nothing that runs on after a test."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "TRACKIO_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    yield
    tracker.finish()
    importlib.import_module("wandb").teardown()


@pytest.fixture
def quick(settings):
    """A Config of one update of the small model, and of one video before and after it."""
    return replace(settings, steps=1, eval_videos=1, num_frames=2, num_inference_steps=1, batch_size=1)


@pytest.fixture
def stop(monkeypatch):
    """What Ctrl-C calls on the command line. It ends the process, so a run must have ended before it."""

    def stop(*_):
        raise AssertionError("the process has ended, and the run has not")

    before = signal.signal(signal.SIGINT, stop)
    monkeypatch.setattr(vader, "stop", stop)
    yield stop
    signal.signal(signal.SIGINT, before)


# ---- What a tracker has of a run ---------------------------------------------------------------------------
def run_of(cfg):
    """Of a training: id, finished, config, rows [(step, numbers)], videos [(step, name, bytes, prompt)]."""
    read = {"tensorboard": read_tensorboard, "wandb": read_wandb, "trackio": read_trackio}
    return read[cfg.tracker](cfg)


def read_tensorboard(cfg):
    library = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = library.EventAccumulator(cfg.out, size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    rows, videos = [], []
    for name in events.Tags()["scalars"]:
        rows += [(event.step, {name: event.value}) for event in events.Scalars(name)]
    for name in events.Tags()["images"]:
        videos += [(event.step, name, event.encoded_image_string, "") for event in events.Images(name)]
    (text,) = events.Tensors("config/text_summary")[-1].tensor_proto.string_val
    config = json.loads(text)
    writers = [thread for thread in threading.enumerate() if type(thread).__name__ == "_AsyncWriterThread"]
    finished = len(writers) == len(tracker.OPEN)
    return SimpleNamespace(id=cfg.out, finished=finished, config=config, rows=rows, videos=videos)


def read_trackio(cfg):
    library = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    name = f"{Path(cfg.out).name}-{stored_id(cfg)}"
    rows, videos = [], []
    for row in library.get_logs("vader", name):
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        rows.append((row["step"], numbers))
        for key, value in row.items():
            if isinstance(value, dict):
                file = importlib.import_module("trackio.utils").MEDIA_DIR / value["file_path"]
                videos.append((row["step"], key, file.read_bytes(), value["caption"]))
    current = importlib.import_module("trackio.context_vars").current_run.get()
    finished = current is None or current.name != name
    config = library.get_run_config("vader", name)
    return SimpleNamespace(id=name, finished=finished, config=config, rows=rows, videos=videos)


def read_wandb(cfg):
    """Of all the folders that a run has: another for each time that it was resumed."""
    run = SimpleNamespace(id=stored_id(cfg), finished=True, config={}, axes={}, rows=[], videos=[], exits=[])
    for folder in sorted(Path(os.environ["WANDB_DIR"]).glob(f"wandb/offline-run-*-{run.id}")):
        records = wandb_records(folder / f"run-{run.id}.wandb")
        exits = [record.exit.exit_code for record in records if record.HasField("exit")]
        for record in records:
            if record.HasField("run"):
                assert record.run.run_id == run.id and record.run.project == "vader"
                assert record.run.display_name == Path(cfg.out).name and record.run.resume
                run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            if record.HasField("metric"):
                run.axes[record.metric.glob_name] = record.metric.step_metric
            if record.HasField("history"):
                numbers, files = {}, {}
                for item in record.history.item:
                    key, *part = item.nested_key
                    value = json.loads(item.value_json)
                    if part:
                        files.setdefault(key, {})[part[0]] = value
                    else:
                        numbers[key] = value
                run.rows.append((numbers["step"], numbers))
                for key, value in files.items():
                    data = (folder / "files" / value["path"]).read_bytes()
                    run.videos.append((numbers["step"], key, data, value["caption"]))
        run.finished = run.finished and len(exits) == 1
        run.exits += exits
    assert run.axes == {"*": "step"}  # else a row of a step that it has is left out
    return run


def wandb_records(file):
    """The records of a .wandb file. Another process writes it, and is done a moment after `finish`."""
    for _ in range(100):
        records = list(read_records(file.read_bytes()))
        if any(record.HasField("exit") for record in records):
            break
        time.sleep(0.05)
    return records


def read_records(data):
    """Seven bytes, then a LevelDB log of blocks of 32 KiB."""
    kind_of_record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # no room for a header: nothing
            place += left
            continue
        _, length, part = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4) and place <= len(data):  # whole, or the last part
            yield kind_of_record.FromString(whole)
            whole = b""


def stored_id(cfg):
    return json.loads((Path(cfg.out) / "tracker.json").read_text())["id"]


def has_row(run, row):
    """How often the run has all the numbers of a row of metrics.jsonl."""
    numbers = {name: value for name, value in row.items() if isinstance(value, float)}
    if "eval" in row:
        numbers["eval/reward"] = np.mean(row["eval"]["reward"])
    assert numbers
    counts = set()
    for name, value in numbers.items():
        found = [got[name] for step, got in run.rows if step == row["step"] and name in got]
        assert not found or found[-1] == pytest.approx(value, rel=1e-5)
        counts.add(len(found))
    (count,) = counts
    return count


# ---- Runs --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_two_trainings_in_a_process_are_two_runs(name, quick, tmp_path, capfd, recwarn):
    """Even in one folder, when what was in it is gone; each is whole as soon as its training ends."""
    quick, runs = replace(quick, tracker=name, num_frames=5, eval_videos=2), []
    for seed in (1, 2):
        cfg = replace(quick, seed=seed)
        rows = vader.train(cfg)
        moved = replace(cfg, out=str(tmp_path / f"moved-{seed}" / "run"))
        shutil.move(cfg.out, moved.out)
        run = run_of(moved)
        assert run.finished and not tracker.OPEN
        assert [has_row(run, row) for row in rows] == [1, 1, 1]
        assert {step for step, _ in run.rows} == {0, 1}
        assert run.config["out"] == cfg.out and run.config["seed"] == seed and run.config["lora"] is None
        check_videos(moved, rows, run.videos)
        runs.append(run)
    first, second = runs
    assert first.id != second.id
    check_said(name, capfd, recwarn)


def check_said(name, capfd, recwarn):
    """Little is said in two trainings, and no warning."""
    lines = capfd.readouterr().err.splitlines()
    said = [line for line in lines if name in line]
    assert len(said) <= 6 and not [line for line in said if "WARNING" in line or "ERROR" in line]
    assert not [warning for warning in recwarn if name in str(warning.message)]


def check_videos(cfg, rows, videos):
    """W&B and Trackio have the mp4 files as they are, TensorBoard a GIF of the same pictures and speed."""
    expected = []
    for row in rows:
        for n, prompt in enumerate(row.get("eval", {}).get("prompts", [])):
            file = Path(cfg.out, row["eval"]["folder"], f"{n:03d}.mp4")
            expected.append((row["step"], f"eval/{n:03d}", file.read_bytes(), prompt))
    assert len(expected) == 4
    if cfg.tracker != "tensorboard":
        assert sorted(videos) == expected
        return
    for (step, key, mp4, _), video in zip(expected, sorted(videos), strict=True):
        assert video[:2] == (step, key)
        frames = iio.imread(mp4, extension=".mp4", plugin="FFMPEG").astype(float)
        gif = Image.open(io.BytesIO(video[2]))
        assert gif.size == (frames.shape[2], frames.shape[1]) and gif.n_frames == len(frames) == 5
        length = 0
        for n, frame in enumerate(frames):
            gif.seek(n)
            length += gif.info["duration"]
            shown = np.asarray(gif.convert("RGB"))
            assert np.abs(shown - frame).mean((0, 1)).max() < 10  # of 256 colours
            others = np.delete(frames, n, axis=0)
            assert np.abs(shown - others).mean((1, 2, 3)).min() > 20
        assert length == pytest.approx(5000 / 8, abs=10)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_training_goes_on_with_its_run(name, quick, stop, monkeypatch, capfd, recwarn):
    """Ctrl-C came after a row that no checkpoint has: TensorBoard hides that, the others have it twice."""
    cfg = replace(quick, tracker=name, steps=2)

    def save_one_checkpoint(run, optimizer, step, skipped):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        save(run, optimizer, step, skipped)

    save = resume.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_checkpoint", save_one_checkpoint)
        with pytest.raises(KeyboardInterrupt):
            vader.train(cfg)
    assert signal.getsignal(signal.SIGINT) is stop
    run = run_of(cfg)
    assert run.finished and not tracker.OPEN
    rows = vader.read_metrics(Path(cfg.out))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [has_row(run, row) for row in rows] == [1, 1, 1]
    if name == "wandb":
        time.sleep(1.1)  # its folders are named by the second
    rows = vader.train(replace(cfg, resume=True, steps=3))
    assert signal.getsignal(signal.SIGINT) is stop
    again = run_of(cfg)
    assert again.id == run.id and again.finished and again.config["steps"] == 3
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    repeated = 1 if name == "tensorboard" else 2
    assert [has_row(again, row) for row in rows] == [1, 1, repeated, 1, 1]
    if name == "wandb":
        assert again.exits == [1, 0]  # failed, then not
    check_said(name, capfd, recwarn)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_run_that_was_stopped_before_its_first_update_begins_anew(name, quick, monkeypatch):
    """No --resume is needed, so it is another run; TensorBoard, which has that folder, shows the new rows."""
    cfg = replace(quick, tracker=name)
    with monkeypatch.context() as patch:
        patch.setattr(vader, "update", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            vader.train(cfg)
    first = run_of(cfg)
    rows = vader.train(cfg)
    second = run_of(cfg)
    assert (first.id == second.id) == (name == "tensorboard")
    assert [has_row(second, row) for row in rows] == [1, 1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_are_not_finite_and_none(name, quick, tmp_path):
    """And rows of another run end the one before it."""
    ends = []
    for place in ("first", "second"):
        cfg = vader.resolve(replace(quick, tracker=name, out=str(tmp_path / place)))
        Path(cfg.out).mkdir()
        bad = {"reward": [None, 1.0], "colorful": [2.0, 4.0], "folder": "samples/none", "prompts": []}
        vader.append_metrics(cfg, {"step": 0, "eval": bad})
        assert [run_of(before).finished for before in ends] == [True] * len(ends)
        row = {"step": 1, "reward": math.nan, "grad_norm": math.inf, "colorful": None, "seconds": 2.0}
        vader.append_metrics(cfg, row)
        ends.append(cfg)
    tracker.finish()
    for cfg in ends:
        numbers = {}
        for _, values in run_of(cfg).rows:
            numbers |= values
        assert numbers["seconds"] == 2.0 and numbers["eval/colorful"] == 3.0 and "colorful" not in numbers
        for key, value in {"reward": math.nan, "eval/reward": math.nan, "grad_norm": math.inf}.items():
            assert float(numbers[key]) == pytest.approx(value, nan_ok=True)


def test_a_run_of_one_s_own_goes_on(quick):
    cfg = vader.resolve(replace(quick, tracker="wandb"))
    Path(cfg.out).mkdir()
    wandb = importlib.import_module("wandb")
    with wandb.init(project="mine", settings=wandb.Settings(silent=True)) as own:
        tracker_login.check_tracker(cfg)
        vader.append_metrics(cfg, {"step": 1, "reward": 2.0})
        tracker.finish()
        assert wandb.run is own and own.id != stored_id(cfg)
        own.log({"reward": 3.0})  # raises when it is finished
    ((step, numbers),) = run_of(cfg).rows
    assert (step, numbers["reward"]) == (1, 2.0)


def test_a_run_of_one_s_own_is_no_login(quick, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb = importlib.import_module("wandb")
    with wandb.init(project="mine", mode="offline", settings=wandb.Settings(silent=True)):
        with pytest.raises(BadInput, match="run `wandb login`"):
            tracker_login.check_tracker(replace(quick, tracker="wandb"))


# ---- The door ----------------------------------------------------------------------------------------------
@pytest.fixture
def no_network(monkeypatch):
    def local_alone(self, address):
        assert isinstance(address, str), f"a connection to {address} was tried"
        connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", local_alone)


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_is_not_installed_is_refused(name, quick, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=f"not installed: pip install {name}"):
        checked(replace(quick, tracker=name))


def test_a_folder_that_wandb_left_is_not_wandb(quick, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    importlib.import_module("wandb")
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "wandb")
        patch.setattr(sys, "path", [str(tmp_path)])
        with pytest.raises(BadInput, match="not installed: pip install wandb"):
            checked(replace(quick, tracker="wandb"))


def test_wandb_without_a_login_is_refused(quick, monkeypatch, no_network):
    """With one line that says what to do, though there is a terminal; it needs none offline or disabled."""
    cfg = replace(quick, tracker="wandb")
    wandb = importlib.import_module("wandb")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    monkeypatch.setattr("getpass.getpass", lambda *_: pytest.fail("it asked"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    for mode, key, said in (
        ("online", None, "run `wandb login`, or set WANDB_MODE=offline"),
        ("online", "short", "run `wandb login`.*WANDB_API_KEY invalid"),
        ("ofline", None, "or set WANDB_MODE=offline .ValidationError"),
        ("offline", None, None),
        ("disabled", None, None),
    ):
        wandb.teardown()
        monkeypatch.setenv("WANDB_MODE", mode)
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        if key:
            monkeypatch.setenv("WANDB_API_KEY", key)
        if said is None:
            checked(cfg)
            continue
        with pytest.raises(BadInput, match=said) as refused:
            checked(cfg)
        assert "\n" not in str(refused.value)


def test_a_key_that_no_server_takes_is_refused(quick, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    with pytest.raises(BadInput, match="run `wandb login`.*AuthenticationError"):
        checked(replace(quick, tracker="wandb"))


def test_trackio_on_a_space_needs_a_login(quick, monkeypatch, no_network):
    cfg = replace(quick, tracker="trackio")
    checked(cfg)
    monkeypatch.setenv("TRACKIO_SERVER_URL", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="TRACKIO_WRITE_TOKEN"):
        checked(cfg)
    monkeypatch.setenv("TRACKIO_WRITE_TOKEN", "secret")
    checked(cfg)
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    with pytest.raises(BadInput, match="me/space: run `hf auth login`, or unset TRACKIO_SPACE_ID"):
        checked(cfg)
    monkeypatch.setenv("HF_TOKEN", "hf_none")  # and no network
    with pytest.raises(BadInput, match="run `hf auth login`.*Offline"):
        checked(cfg)


@pytest.mark.parametrize("content", ["", "{}", '{"id": 3}', '{"id": "../x"}', "[]"])
def test_a_damaged_tracker_json_is_refused(content, quick):
    cfg = replace(quick, tracker="wandb", resume=True)
    Path(cfg.out).mkdir()
    (Path(cfg.out) / "tracker.json").write_text(content)
    with pytest.raises(BadInput, match="tracker.json is damaged: delete it"):
        checked(cfg)
