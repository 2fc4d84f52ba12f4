"""Peak memory of one update by phase: predicted from config files alone, or measured on a GPU.

    python bench/memory.py --model svd --reward hps --vram 16    # exit code 1 when it does not fit
    python bench/memory.py                                       # memory.csv: the rows that are not there yet
    python bench/memory.py --measure                             # on a CUDA GPU, its memory capped at 16 GB

Takes the flags of vader.py; no weights, no GPU, and no network for what is in configs/. A whole update runs
on networks without content: counted is what the allocator is asked for, not its rounding, nor CUDA's own.
memory.csv: gigabytes by phase, at the models' own sizes. --measure makes the same updates with weights as
PyTorch initialises them; never run on a GPU yet.
"""

import argparse
import contextlib
import csv
import dataclasses
import gc
import itertools
import sys
import weakref
from pathlib import Path
from unittest import mock

import diffusers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import rewards  # noqa: E402 (needs the line above)
import vader  # noqa: E402

CONFIGS, TABLE = HERE.parent / "configs", HERE / "memory.csv"
MODELS = ("modelscope", "zeroscope", "animatediff", "svd", "cogvideox", "ltx", "wan")
ROWS = [("hps", False), ("hps", True), ("aesthetic", False), ("vjepa", False), ("ask", False)]
MORE = ["clip", "pickscore", "remove:book", "action:archery", "camera:smooth"]


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages alive that were made inside, and their peak.

    Under FakeTensorMode only draws, whole numbers, and what is computed from these alone have content, since
    masks and indices decide what comes next.
    """

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def free(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        whole = isinstance(kwargs.get("dtype"), torch.dtype) and not kwargs["dtype"].is_floating_point
        content = whole or "generator" in kwargs or func.__name__.startswith(("arange", "randperm"))
        away = torch.device(kwargs.get("device") or "cpu").type != "cpu"  # may be a GPU that is not there
        if away or any(isinstance(tensor, FakeTensor) for tensor in given) or not (given or content):
            result = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result


def exchange(module: torch.nn.Module, *args, **kwargs) -> torch.nn.Module:
    """`Module.to` for weights without content, which can't be exchanged in place."""
    given = [*args, *kwargs.values()]
    dtype = next((value for value in given if isinstance(value, torch.dtype)), None)
    device = next((value for value in given if isinstance(value, (str, torch.device))), None)
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, old in ((name, old) for name, old in table.items() if old is not None):
                wanted = dtype if dtype and old.is_floating_point() else old.dtype
                if (torch.device(device or old.device).type, wanted) != (old.device.type, old.dtype):
                    new, kept = (
                        old.detach().to(device or old.device, wanted),
                        isinstance(old, torch.nn.Parameter),
                    )
                    table[name] = torch.nn.Parameter(new, old.requires_grad) if kept else new
    return module


@contextlib.contextmanager
def without_weights(memory: LiveStorages | None = None):
    """Inside, what loads weights makes networks from their config files instead, and any tokenizer will do.

    Replaced: what reads weights, and `frozen`, which checkpoints on a GPU only. memory: counts, no content.
    """
    fetch, frozen, words = rewards.fetch, rewards.frozen, {"<pad>": 0, "</s>": 1, "?": 2}
    side = {"longest_edge": 512}  # SmolVLM2's chat about videos, with the words of tiny/
    chat = transformers.SmolVLMProcessor.from_pretrained(HERE.parent / "tiny" / "rewards" / "ask")
    chat.video_processor, chat.image_seq_len = (
        transformers.SmolVLMVideoProcessor(size=side, max_image_size=side),
        64,
    )

    def network(cls, folder, subfolder=None, dtype=None, torch_dtype=None, **_):
        before, peak = torch.get_default_dtype(), memory.peak if memory else 0
        torch.set_default_dtype(dtype or torch_dtype or torch.float32)
        try:
            if issubclass(cls, diffusers.ModelMixin):
                return cls.from_config(cls.load_config(folder, subfolder=subfolder)).eval()
            config = cls.config_class.from_pretrained(folder, subfolder=subfolder or "")
            made = cls._from_config(config, dtype=torch.get_default_dtype())
            made.tie_weights()
            if memory:  # the library makes tied weights once
                gc.collect()
                memory.peak = max(peak, memory.now)
            return made.eval()
        finally:
            torch.set_default_dtype(before)

    def load(kind, source, flag, subfolder="", dtype=None, device=None, more=""):
        if kind is transformers.AutoProcessor:
            return chat
        if kind is transformers.AutoModelForImageTextToText:
            kind = transformers.SmolVLMForConditionalGeneration
        made = kind.from_pretrained(source, subfolder=subfolder, dtype=dtype)
        return made if device is None else as_on_a_gpu(made, device, dtype)

    def image_features(self, pixel_values, pixel_attention_mask=None, **_):
        """As the library's where no frame is padding, which it reads off their content."""
        self.config.image_token_id = chat.image_token_id
        found = self.vision_model(pixel_values=pixel_values.flatten(0, 1).to(self.dtype), return_dict=True)
        found.pooler_output = [self.connector(found.last_hidden_state).flatten(0, 1)]
        return found

    def tokenizer(cls, folder, subfolder="", **_):
        file = (Path(folder) / subfolder).parent / "text_encoder" / "config.json"
        config = rewards.read_json(file) if file.exists() else {"model_type": "clip"}
        longest = config.get("max_position_embeddings", 77 if "clip" in config["model_type"] else 512)
        special = dict(pad_token="<pad>", eos_token="</s>", unk_token="?", model_max_length=longest)
        special["tokenizer_object"] = Tokenizer(WordLevel(words, unk_token="?"))
        return transformers.PreTrainedTokenizerFast(**special)

    def found(source, name, flag):
        return fetch(source, name, flag) if name.endswith(".json") else Path(source) / name

    def as_on_a_gpu(network, device, dtype):
        if memory:
            with mock.patch.object(torch.nn.Module, "to", lambda part, *_: part):
                frozen(network, "cuda", dtype)
        return frozen(network, device, dtype)

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (diffusers.ModelMixin, "from_pretrained", classmethod(network)),
            (transformers.PreTrainedModel, "from_pretrained", classmethod(network)),
            (transformers.PreTrainedModel, "init_weights", lambda self: None),
            (transformers.PreTrainedTokenizerBase, "from_pretrained", classmethod(tokenizer)),
            *([(torch.nn.Module, "to", exchange)] if memory else []),
            (rewards, "load", load),
            (rewards, "load_state", lambda network, *_, **__: network),
            (rewards, "fetch", found),
            (rewards, "frozen", as_on_a_gpu),
            (transformers.SmolVLMModel, "get_image_features", image_features),
            (sys.modules[transformers.SmolVLMModel.__module__], "torch_compilable_check", lambda *_: None),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def resolve(cfg: vader.Config) -> tuple[vader.Config, str, type, list[vader.Prompt]]:
    """As `vader.resolve`, in bf16 (or --dtype), from configs/ where it has them; and a batch of prompts."""
    model = "modelscope" if cfg.model == "auto" else cfg.model
    known = dict(device="cpu", checkpointing=True, dtype="bf16" if cfg.dtype == "auto" else cfg.dtype)
    if (CONFIGS / model).is_dir():
        _, _, preset = vader.find_model(model)
        known |= {name: value for name, value in preset.items() if getattr(cfg, name, "") is None}
        model = str(CONFIGS / model)
    cfg, source, family = vader.resolve(dataclasses.replace(cfg, model=model, **known))
    image = str(HERE.parent / "tiny" / "photo-cat.jpg") if family.images == "must" else None
    return cfg, source, family, [vader.Prompt(f"archery {n}", image) for n in range(cfg.batch_size)]


def make_terms(cfg: vader.Config, device) -> dict:
    """The rewards, from configs/rewards where it has them."""
    folders = [cfg.reward_weights, str(CONFIGS / "rewards")]
    return rewards.make_terms(cfg.reward, device, vader.DTYPES[cfg.dtype], folders)


def predict(cfg: vader.Config) -> dict[str, float]:
    """The peak of each phase of one update in GB: {phase: GB}. Raises BadInput."""
    cfg, source, family, prompts = resolve(cfg)
    cfg = dataclasses.replace(cfg, num_inference_steps=1, backprop_steps=1)
    schedule = vader.Schedule(torch.ones(1), [1.0], [1.0], [1.0], [0.0])  # one step is as large as any
    found, idle = {}, 0  # idle: bytes that wait on the host

    def phase(name, *waiting):
        """It is over; in the next one these networks wait on the host."""
        nonlocal idle
        gc.collect()
        found[name] = (memory.peak - idle) / 1e9
        idle = sum(p.nbytes for p in {p for part in waiting for p in part.parameters()})
        memory.peak = memory.now

    with FakeTensorMode(allow_non_fake_inputs=True), LiveStorages() as memory, without_weights(memory):
        model = family(source, "cpu", vader.DTYPES[cfg.dtype])
        run = vader.Run(cfg, model, schedule, make_terms(cfg, "cpu"), {})
        networks = [n for _, reward in run.terms.values() for n in getattr(reward, "networks", ())]
        phase("rewards", *networks)
        run.conds = model.encode([*prompts, vader.Prompt("")], cfg)
        phase("encoding prompts", *networks)
        model.load()
        vader.add_lora(model, cfg)
        model.recompute()
        optimizer = vader.make_optimizer(run)
        scoring = [model.vae, *networks] if cfg.offload else []
        denoiser = [model.denoiser] if cfg.offload else []
        phase("loading", *scoring)
        generator = vader.generator_for(0)
        noise = torch.randn(len(prompts), *model.latent_shape(cfg))
        picks = vader.pick_latent_frames(run, generator)
        batch = vader.make_batch(run, prompts, noise, generator, picks, trained=[0])
        found["all weights"] = (memory.now - idle) / 1e9
        latents = vader.rollout(run, batch)
        phase("rollout", *denoiser)
        n, frames = len(picks), latents[-1].shape[2]  # which need most depends on the VAE
        for chosen in {tuple(picks), tuple(range(n)), tuple(range(frames - n, frames))}:
            g = None
            _, g = vader.score(run, batch._replace(picks=list(chosen)), latents[-1])
        phase("score", *scoring)
        vader.walk_back(run, batch, latents, g)
        phase("walk back", *scoring)
        optimizer.step()
        phase("optimiser", *denoiser)
        with torch.no_grad():
            model.decode(latents[-1], range(frames))
        phase("decoding a video")
    del found["rewards"]  # part of loading
    return found


def measure(cfg: vader.Config, device="cuda", updates=3) -> dict:
    """Peak of reserved GPU memory in GB and seconds of the fastest update, with weights as initialised."""
    cfg, source, family, prompts = resolve(cfg)
    cfg = dataclasses.replace(cfg, device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with without_weights():
        terms = make_terms(cfg, device)
        with mock.patch.object(rewards, "make_terms", lambda *_: terms):
            run = vader.load_run(cfg, source, family, prompts)
        optimizer = vader.make_optimizer(run)
        rows = [vader.update(run, prompts, step, optimizer) for step in range(updates)]
    peak, seconds = torch.cuda.max_memory_reserved() / 1e9, min(row["seconds"] for row in rows)
    return {"measured peak": f"{peak:.2f}", "seconds per update": f"{seconds:.1f}"}


def write_table(measured: bool):
    """memory.csv: predict what is missing, or measure every row."""
    rows = {}
    if TABLE.exists():
        with open(TABLE, newline="") as stored:
            rows = {(row["model"], row["reward"], row["offload"]): row for row in csv.DictReader(stored)}
    for model, (reward, offload) in [
        *itertools.product(MODELS, ROWS),
        *(("modelscope", (name, False)) for name in MORE),
    ]:
        key = model, reward, "yes" if offload else "no"
        frames = 16 if reward == "vjepa" and model != "svd" else None
        cfg = vader.Config(model=model, reward=reward, offload=offload, decode_frames=frames)
        if key not in rows:
            found = predict(cfg)
            found["peak"] = max(found.values())
            rows[key] = dict(zip(("model", "reward", "offload"), key, strict=True))
            rows[key] |= {name: f"{size:.2f}" for name, size in found.items()}
            rows[key] |= dict.fromkeys(["measured peak", "seconds per update"], "not measured yet")
        if measured:
            rows[key] |= measure(cfg)
        print(rows[key], flush=True)
        with open(TABLE, "w", newline="") as target:
            table = csv.DictWriter(target, rows[key])
            table.writeheader()
            table.writerows(rows.values())


def main(argv=None) -> int:
    """Exit code 0; 1 when the prediction is more than --vram; 2 after a line of bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--vram", type=float, help="gigabytes there are")
    parser.add_argument("--measure", action="store_true")
    args, flags = parser.parse_known_args(argv)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    if args.measure:
        there = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 16e9 / there))
    if not flags:
        write_table(args.measure)
        return 0
    try:
        cfg = vader.parse_args(flags)
        found = predict(cfg)
    except vader.BadInput as error:
        print(f"memory.py: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{name:18}{size:6.2f} GB" for name, size in found.items()))
    print(f"{'peak':18}{(peak := max(found.values())):6.2f} GB predicted; CUDA itself takes about 0.5 more")
    if args.measure:
        print(measure(cfg))
    if not args.vram or peak <= args.vram:
        return 0
    first = "add --offload, then " * (not cfg.offload)
    print(f"more than {args.vram:g}: {first}lower --batch_size, --num_frames, --height, --width, --lora_rank")
    return 1


if __name__ == "__main__":
    sys.exit(main())
