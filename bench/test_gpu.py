"""The path of a CUDA GPU, walked without one: no tensor on another device, none of another dtype.

Under FakeTensorMode tensors with device="cuda" exist on any machine: they have shapes, dtypes and devices, no
content, and a mix of devices raises. Autograd's engine needs a real device, so `backward` replaces it.
"""

import contextlib
import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import diffusers
import fake
import memory
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils.checkpoint import GraphExecGroup

import rewards
import vader
from conftest import PROMPTS, gradients, load
from extras import offload
from vader import TOY

HERE = Path(__file__).resolve().parent

PHOTO = str(HERE.parent / "tiny" / "photo-cat.jpg")
ARGS = {"remove": "book", "camera": "zoom in"}  # of rewards that must be told of what
PUBLISHED = [name for names in vader.FAMILIES.values() for name in names if (memory.CONFIGS / name).is_dir()]
# these are larger, or smaller, ones of the same code
SAME = ("zeroscope", "cogvideox", "wan-14b")
FAMILIES = [(name, "bf16") for name in PUBLISHED if name not in SAME]
FAMILIES += [("modelscope", "fp16")]
# not those that are formulas, but for one, nor the network of clip twice
FORMULAS = ("smooth", "dynamic", "compressible")
REWARDS = [name for name in rewards.REWARDS if name not in (*FORMULAS, "pickscore")]
# kernels of a GPU that take no mix of dtypes; fake ones do, and those of a CPU in part
ONE_DTYPE = {"addmm", "baddbmm", "bmm", "convolution", "mm", "native_group_norm", "native_layer_norm"}


# ---- A GPU that is not there -------------------------------------------------------------------------------
class Strict(fake.LiveStorages):
    """Content where memory.py needs it; and raises for a mix of dtypes where a GPU would."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for most often; this is quicker
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1  # what `item` reads from the GPU
        name = func.overloadpacket.__name__
        dtypes = {arg.dtype for arg in args if isinstance(arg, torch.Tensor)} if name in ONE_DTYPE else ()
        if len(dtypes) > 1:
            raise TypeError(f"{name} takes one dtype, not {dtypes}")
        return super().__torch_dispatch__(func, types, args, kwargs)


@torch.no_grad()
def backward(self, gradient=None):
    """`Tensor.backward`, node by node; gradients are checked, summed and cast as the engine does."""
    gradient = torch.ones_like(self) if gradient is None else gradient
    assert (gradient.dtype, gradient.device) == (self.dtype, self.device)
    waiting = {self.grad_fn: [gradient]}
    with GraphExecGroup():  # or checkpoints would recompute for each tensor
        while waiting:
            node = max(waiting, key=lambda node: node._sequence_nr())  # the last one of the forward pass
            found = node(*waiting.pop(node))
            grads = (found,) if isinstance(found, torch.Tensor) else found
            for (after, place), grad in zip(node.next_functions, grads, strict=True):
                if after is None or grad is None:
                    continue
                wanted = after._input_metadata[place]
                assert grad.device == wanted.device, f"{node} gives a gradient on {grad.device}"
                grad = grad.sum_to_size(wanted.shape).to(wanted.dtype)
                places = waiting.setdefault(after, [None] * len(after._input_metadata))
                places[place] = grad if places[place] is None else places[place] + grad


def zeros(name: str, real):
    """`Tensor.tolist` or `Tensor.numpy`, with zeros where there is no content."""

    def read(self):
        assert name == "tolist" or self.device.type == "cpu"
        with unset_fake_temporarily():
            return real(torch.zeros(self.shape, dtype=self.dtype) if isinstance(self, FakeTensor) else self)

    return read


def stays_in_float32(network, name: str) -> bool:
    """Do diffusers, or rewards.py, keep this parameter in float32, whatever dtype is asked for?"""
    kept = {*(getattr(network, "_keep_in_fp32_modules", None) or ())}
    return isinstance(network, torch.nn.ModuleDict) or not kept.isdisjoint(name.split("."))


@contextlib.contextmanager
def fake_gpu():
    """Inside there is a GPU, and networks are made without weights."""
    torch._C._ensureCUDADeviceGuardSet()
    with contextlib.ExitStack() as stack:
        for context in (FakeTensorMode(allow_non_fake_inputs=True), Strict(), fake.without_weights()):
            stack.enter_context(context)
        load = diffusers.ModelMixin.__dict__["from_pretrained"].__func__

        def as_published(cls, *args, **kwargs):
            network = load(cls, *args, **kwargs)
            for name, p in network.named_parameters():
                if stays_in_float32(network, name):
                    path, _, last = name.rpartition(".")
                    network.get_submodule(path)._parameters[last] = torch.nn.Parameter(p.detach().float())
            return network

        for target, name, value in (
            (diffusers.ModelMixin, "from_pretrained", classmethod(as_published)),
            (torch.nn.Module, "to", fake.exchange),
            (torch.Tensor, "backward", backward),
            *((torch.Tensor, name, zeros(name, getattr(torch.Tensor, name))) for name in ("tolist", "numpy")),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        yield


@pytest.fixture(autouse=True)
def shallow_configs(tmp_path, monkeypatch):
    """The published networks with fewer of the layers that are alike: each is walked all the same."""

    def fewer(config):
        for name, value in config.items():
            if name.endswith(("layers_per_block", "res_blocks")):
                config[name] = [1] * len(value) if isinstance(value, list) else 1
            elif name.endswith("layers"):
                config[name] = min(value, 2)
        return config

    folder = Path(shutil.copytree(memory.CONFIGS, tmp_path / "configs"))
    for file in folder.rglob("*config.json"):
        file.write_text(json.dumps(json.loads(file.read_text(), object_hook=fewer)))
    monkeypatch.setattr(memory, "CONFIGS", folder)


# ---- Walks -------------------------------------------------------------------------------------------------
def check_weights(run, denoising: bool, scoring: bool):
    """Weights are on the GPU, or in host memory where they are told to wait; all have the wanted dtype."""
    networks = [run.model.vae, *(n for _, r in run.terms.values() for n in getattr(r, "networks", ()))]
    for network, busy in [(run.model.denoiser, denoising), *((n, scoring) for n in networks)]:
        device = "cuda" if busy or not run.cfg.offload else "cpu"
        assert {p.device.type for p in (*network.parameters(), *network.buffers())} == {device}
        for name, p in network.named_parameters():
            exact = p.requires_grad or stays_in_float32(network, name)
            assert p.dtype == (torch.float32 if exact else vader.DTYPES[run.cfg.dtype]), name


def check_values(values):
    for name, value in values.items():
        assert (value.shape, value.dtype, value.device.type) == ((2,), torch.float32, "cuda"), name


def walk(folder, model="modelscope", dtype="bf16", image=None, own=None, **settings):
    """A micro-batch and an evaluation of two short videos, with a preset, but one step (LTX: two)."""
    family, *_ = vader.find_model(model)
    few = dict(batch_size=2, num_inference_steps=1, num_frames=family.frame_multiple + 1)
    if model in ("ltx", "wan2.2-a14b"):
        few["num_inference_steps"] = 2  # the fewest that its schedule has, or one for each network
    files = dict(reward_weights=str(memory.CONFIGS / "rewards"), out=str(folder / "run"), watch="none")
    cfg, prompts = memory.resolve(vader.Config(model=model, **few | files | settings))
    cfg.device, cfg.dtype = "cuda", dtype  # not before: without a GPU neither passes
    cfg.quantize = "none"  # bitsandbytes takes no fake weights
    prompts = [prompt._replace(image=image or prompt.image) for prompt in prompts]
    schedule, seen = vader.make_model(cfg).schedule(cfg), []  # made here, to have content

    def recorded(terms, videos, *rest, score=rewards.weighted_rewards):
        values = score(terms, videos, *rest)
        seen.append((videos, values.copy()))
        assert judges_are_on("cuda" if terms is run.judges else "cpu")
        return values

    def judges_are_on(device):
        weights = rewards.networks_of(run.judges).parameters()
        return all(p.device.type == device for p in weights)

    with fake_gpu(), mock.patch.object(family, "schedule", lambda *_: schedule):
        run = vader.load_run(cfg, prompts, own)
        assert judges_are_on("cpu") and (len(rewards.networks_of(run.judges)) > 0) == (cfg.watch != "none")
        check_values(vader.micro_batch(run, prompts, 0, 0))
        assert judges_are_on("cpu")
        check_weights(run, denoising=True, scoring=False)
        for name, p in vader.lora_parameters(run.model).items():
            assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.is_cuda, name

        with mock.patch.object(rewards, "weighted_rewards", recorded):
            result = vader.evaluate(run, prompts, "videos")
        assert len(seen) == (1 if cfg.watch == "none" else 2) and judges_are_on("cpu")
        videos, values = seen[-1]
        assert videos.shape == (2, cfg.num_frames, 3, cfg.height, cfg.width)
        assert videos.dtype == torch.float32 and videos.is_cuda
        check_values(values)
        check_weights(run, denoising=False, scoring=True)
        written = list((folder / "run" / "videos").glob("*.mp4"))
        assert len(result["reward"]) == len(written) == 2


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("model, dtype", FAMILIES)
def test_every_family(model, dtype, tmp_path):
    if dtype == "fp16":  # the network was walked in bf16
        one_level()
    walk(tmp_path, model, dtype)


@pytest.mark.parametrize("name", [REWARDS[0], *(slow(name) for name in REWARDS[1:])])
def test_every_reward(name, tmp_path):
    """Behind a U-Net of one level, as it is the reward that is walked here."""
    one_level()
    reward = f"{name}:{ARGS[name]}" if name in ARGS else name
    walk(tmp_path, reward=reward, num_frames=3, detach_uncond=True)


def test_judges_are_on_the_gpu_only_while_they_score(tmp_path):
    one_level()
    walk(tmp_path, reward="colorful", watch="clip", num_frames=3, detach_uncond=True)


def one_level():
    """ModelScope's U-Net gets one level of four."""
    file = memory.CONFIGS / "modelscope" / "unet" / "config.json"
    level = dict(down_block_types=["CrossAttnDownBlock3D"], up_block_types=["CrossAttnUpBlock3D"])
    level |= dict(block_out_channels=[320])
    file.write_text(json.dumps(json.loads(file.read_text()) | level))


OTHERS = {
    "image": dict(model="ltx", image=PHOTO),
    "clips": dict(model="wan2.2-5b", image=PHOTO, clips=2, num_frames=10, height=64, width=64),
    "offload": dict(offload=True),
    "no guidance": dict(guidance_scale=1.0, eta=1.0),
    "float32": dict(dtype="fp32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_settings(name, tmp_path):
    one_level()
    walk(tmp_path, **OTHERS[name])


# ---- Faults that are found ---------------------------------------------------------------------------------
def mask_on_the_host(frames, prompts):
    return (frames * torch.ones(frames.shape[-2:])).mean((1, 2, 3, 4))


def half_precision(frames, prompts):
    return frames.bfloat16().mean((1, 2, 3, 4))


@pytest.mark.parametrize(
    "reward, said", [(mask_on_the_host, "same device"), slow(half_precision, "bfloat16")]
)
def test_a_faulty_reward_is_found(reward, said, tmp_path):
    with pytest.raises((RuntimeError, AssertionError), match=said):
        walk(tmp_path, own=reward)


def time_on_the_host(self, x, t, cond):
    times = t.expand(len(x))
    return self.denoiser(x.to(self.dtype), timestep=times, **cond, return_dict=False)[0].float()


def text_in_float32(self, x, t, cond, denoise=vader.TextToVideoUNet.denoise):
    return denoise(self, x, t, {name: value.float() for name, value in cond.items()})


@pytest.mark.parametrize("denoise, said", [(time_on_the_host, "same device"), (text_in_float32, "one dtype")])
def test_a_faulty_family_is_found(denoise, said, tmp_path, monkeypatch):
    monkeypatch.setattr(vader.TextToVideoUNet, "denoise", denoise)
    with pytest.raises((RuntimeError, TypeError), match=said):
        walk(tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloading_moves_what_is_idle_and_changes_nothing(checkpointing, settings, monkeypatch):
    """Where each network is in each phase, and the same gradient, by a device that only says its name."""
    found, phases, waiting = [], [], []

    def counted(tensor, to_host=offload.to_host):
        saved, device = to_host(tensor)
        waiting.append(device is not None and saved.data_ptr() != tensor.data_ptr())
        return saved, device

    for offloaded in (False, True):
        how = dict(reward="remove:star", reward_weights=TOY, checkpointing=checkpointing)
        run = load(replace(settings, **how))
        (network,), places = run.terms["remove:star"][1].networks, {}
        for name, part in dict(denoiser=run.model.denoiser, vae=run.model.vae, reward=network).items():
            monkeypatch.setattr(part, "to", functools.partial(places.__setitem__, name))
        run.model.device = torch.device("cpu", 0)
        monkeypatch.setattr(offload, "to_host", counted)
        if offloaded:
            offload.install(run, [network])

        def phase(name, real, places, *args):
            result = real(*args)
            phases.append((name, {part for part, place in places.items() if place != "cpu"}))
            return result

        for name in ("rollout", "score", "walk_back"):
            real = getattr(vader, name)
            monkeypatch.setattr(vader, name, functools.partial(phase, name, real, places))
        vader.micro_batch(run, PROMPTS, 0, 0)
        found.append(gradients(run))
        monkeypatch.undo()
    assert torch.equal(*found) and found[0].norm() > 0 and any(waiting)
    assert phases[:3] == [("rollout", set()), ("score", set()), ("walk_back", set())]  # nothing moves
    idle = [("rollout", {"denoiser"}), ("score", {"reward", "vae"}), ("walk_back", {"denoiser"})]
    assert phases[3:] == idle
