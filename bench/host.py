"""Host memory that loading a 14-billion-parameter Wan takes in nf4, measured on ones of 1 and 2 billion.

    python bench/host.py        # 8 processes, two minutes; fills 7 GB of a temporary folder, then removes it

Builds Wan 2.1's transformer at full width with 2 and 5 of its 40 blocks, in float32 as published, in files of
at most 400 MB, and a LoRA of rank 64 of all linear layers of its blocks. Each way of loading has a process of
its own. "held" is what the network takes, "peak" the most that was there at once, above what Python and the
libraries take, without the pages of files, which the system takes back. There is no GPU, so what is quantised
stays in host memory. Needs bitsandbytes, which runs nf4 on a CPU; diffusers' check for a GPU is passed over.
"""

import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import diffusers
import peft
import torch
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import vader  # noqa: E402 (needs the line above)
from extras.base_lora import prepare  # noqa: E402

SHARD = "400MB"
LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
WAYS = ("bf16", "nf4", "nf4, base LoRA", "bf16, base LoRA")


def build(folder: Path, blocks: int):
    """The transformer, and a LoRA for it."""
    config = json.loads((HERE / "configs" / "wan-14b" / "transformer" / "config.json").read_text())
    network = diffusers.WanTransformer3DModel.from_config(config | dict(num_layers=blocks))
    network.save_pretrained(folder / "model" / "transformer", max_shard_size=SHARD)
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=64, lora_alpha=64, target_modules=LINEAR))
    adapted.save_pretrained(folder / "lora", save_embedding_layers=False)
    return sum(p.numel() for name, p in adapted.named_parameters() if "lora_" not in name)


def resident() -> float:
    """Gigabytes of this process, without pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e9
    raise OSError("no RssAnon in /proc/self/status")


def measure(way: str, folder: str) -> dict[str, float]:
    """Load in that way -> gigabytes."""
    BnB4BitDiffusersQuantizer.validate_environment = lambda *_, **__: None
    quantize, _, fuses = way.partition(", ")
    cfg = vader.Config(
        quantize="nf4" if quantize == "nf4" else "none",
        base_lora=f"{folder}/lora" if fuses else None,
    )
    family, _, _ = vader.find_model("wan-14b")
    model = family(f"{folder}/model", "cpu", torch.bfloat16)
    if cfg.quantize == "nf4":
        import bitsandbytes  # noqa: F401 (counted with the libraries)
    before, seen, done = resident(), [], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(resident())
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    if cfg.base_lora or cfg.quantize != "none":
        prepare(model, cfg)
    model.denoiser = model.denoiser or model.load_denoiser(model.folder)
    done.set()
    thread.join()
    gc.collect()
    return {"held": resident() - before, "peak": max(seen) - before}


def main():
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
        return
    for blocks in (2, 5):
        with tempfile.TemporaryDirectory() as folder:
            count = build(Path(folder), blocks)
            print(f"{blocks} blocks, {count / 1e9:.2f} billion parameters, {count * 2 / 1e9:.2f} GB in bf16")
            for way in WAYS:
                command = [sys.executable, __file__, way, folder]
                made = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(made.stdout.splitlines()[-1])
                print(f"{way}: held {found['held']:.2f} GB, peak {found['peak']:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
