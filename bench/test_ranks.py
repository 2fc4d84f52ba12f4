"""Tests of several processes, by torchrun on a CPU: they make what one does, each its share."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import vader
from conftest import command, python


def lora_of(folder):
    return load_file(Path(folder) / "lora" / "adapter_model.safetensors")


def test_two_ranks_equal_one_with_twice_the_accumulation(settings, tmp_path):
    """And they share the evaluations' videos, three between two, and those that best/ is chosen by."""
    two = replace(settings, eval_videos=3, watch="dynamic", out=str(tmp_path / "two"))
    python(*launcher(2), *command(two), OMP_NUM_THREADS="1")
    one = replace(two, grad_accum=2, out=str(tmp_path / "one"))
    vader.train(one)
    first, second = lora_of(two.out), lora_of(one.out)
    assert first.keys() == second.keys()
    for name, matrix in first.items():
        assert (matrix - second[name]).abs().max() <= 1e-4 * (1 + matrix.abs().max())
    assert any(matrix.abs().max() > 0 for name, matrix in first.items() if "lora_B" in name)
    files = [sorted(path.relative_to(cfg.out) for path in Path(cfg.out).rglob("*.*")) for cfg in (one, two)]
    assert files[0] == files[1] and Path("samples/step_000000/002.mp4") in files[0]
    for name in ("metrics.jsonl", "strength.json"):
        assert_alike(*(read_jsons(Path(cfg.out) / name) for cfg in (one, two)))


def launcher(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "vader.py"]


def read_jsons(file: Path) -> list:
    text = file.read_text()
    if file.suffix == ".json":
        return [json.loads(text)]
    return [row for row in map(json.loads, text.splitlines()) if "eval" in row]


def assert_alike(first, second):
    """Are these of json equal, numbers to rounding?"""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_alike(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            assert_alike(*pair)
    else:
        assert first == (pytest.approx(second, rel=1e-3, abs=1e-4) if isinstance(first, float) else second)


@pytest.mark.slow
def test_three_ranks_make_the_videos_of_one(loaded, settings, tmp_path):
    """Five prompts, one in a batch: three at once, then two."""
    (tmp_path / "five.txt").write_text("\n".join(f"a moon, number {n}" for n in range(5)))
    vader.save_lora(loaded.model, tmp_path / "lora")
    more = dict(mode="eval", lora=str(tmp_path / "lora"), lora_rank=None, prompts=str(tmp_path / "five.txt"))
    files = []
    for out in ("one", "three"):
        cfg = replace(settings, **more, batch_size=1, num_inference_steps=2, out=str(tmp_path / out))
        words = launcher(3) if out == "three" else ["vader.py"]
        python(*words, *command(cfg), OMP_NUM_THREADS="1")
        files.append(sorted(path.relative_to(cfg.out) for path in Path(cfg.out).rglob("*.*")))
    assert files[0] == files[1] and Path("tuned/004.mp4") in files[0]
    assert_alike(*(read_jsons(tmp_path / out / "metrics.jsonl") for out in ("one", "three")))
