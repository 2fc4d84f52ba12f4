"""Tests of what a checkpoint must be: its configs, number by number, and its weights beside them."""

import inspect
import json
import shutil
import time

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models import BUILDERS
from transformers import CLIPTextConfig, T5Config

import vader
from conftest import HERE, checked
from extras import checkpoint, damaged
from rewards import BadInput
from vader import Config

CONFIGS = sorted((HERE / "bench" / "configs").glob("*/model_index.json"))
INFINITE, NAN = float("inf"), float("nan")


def door(folder, **settings):
    """The door, for a folder of a model that makes two small videos."""
    size = dict(num_frames=9, height=64, width=64, num_inference_steps=2)
    vader.find_model.cache_clear()
    return checked(Config(model=str(folder), reward="colorful", **size | settings))


def refused(folder, said, **settings):
    with pytest.raises(BadInput, match=said) as problem:
        door(folder, **settings)
    assert "\n" not in str(problem.value)


@pytest.fixture
def edited(checkpoints, tmp_path):
    """A copy of a model with other values in one of its json files."""

    def make(model, file, **changes):
        source = HERE / "tiny" / model if model in ("t2v", "wan", "i2v") else checkpoints(model)
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        config = json.loads((folder / file).read_text())
        assert config.keys() >= changes.keys()
        (folder / file).write_text(json.dumps(config | changes))
        return folder

    return make


# ---- What passes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.parent.name)
def test_published_configs_pass(file):
    source = str(file.parent)
    family = vader.find_model(source)[0]
    if family.__name__ == "AnimateDiff":
        assert "MotionAdapter" not in str(checkpoint.read_config(source, "unet/config.json"))
    checkpoint.check_networks(family, source)
    checkpoint.check_scheduler(source)


@pytest.mark.parametrize("kind", BUILDERS)
def test_small_checkpoints_pass(kind, checkpoints, monkeypatch):
    folder = checkpoints(kind)
    if kind == "animatediff-parts":
        monkeypatch.setattr(vader.find_model(str(folder))[0], "motion", str(folder / "adapter"))
    checkpoint.check_networks(vader.find_model(str(folder))[0], str(folder))
    checkpoint.check_scheduler(str(folder))


def test_the_classes_say_of_what_type_their_values_are():
    """Else nothing would be checked: an annotation in quotes is a text."""
    kinds = {diffusers.UNet2DConditionModel, diffusers.DDIMScheduler, diffusers.UniPCMultistepScheduler}
    for names in vader.FAMILIES.values():
        family = vader.find_model(names[0])[0]
        kinds |= {family.denoiser_class, family.vae_class}
    assert len(kinds) == 15
    for kind in kinds:
        for parameter in inspect.signature(kind).parameters.values():
            assert not isinstance(parameter.annotation, str), (kind, parameter)


# ---- Numbers -----------------------------------------------------------------------------------------------
NUMBERS = {
    "t2v unet": dict(norm_eps="x", mid_block_scale_factor=None, downsample_padding=10**5),
    "t2v vae": dict(scaling_factor=0, norm_num_groups=-1, sample_size=NAN),
    "t2v text_encoder": dict(layer_norm_eps=INFINITE, eos_token_id=None, num_attention_heads=-1),
    "t2v scheduler": dict(trained_betas=[0.1, 0.2], beta_start=-1, clip_sample_range="x"),
    "t2v scheduler/": dict(beta_schedule="foo"),
    "wan transformer": dict(eps=0, rope_max_seq_len=0, patch_size=[1, 2, None]),
    "wan vae": dict(latents_std=[1.0] * 15 + ["x"], latents_mean=[1.0] * 15, patch_size=2),
    "wan vae/": dict(latents_std=[1.0] * 15 + [0], latents_mean=[1.0] * 15 + [1e6], dropout=NAN),
    "wan text_encoder": dict(dropout_rate=NAN, relative_attention_max_distance=0, d_kv=[]),
    "i2v feature_extractor": dict(image_std=[1, 1, 0], image_mean=None, rescale_factor=[]),
    "i2v image_encoder": dict(layer_norm_eps=-1, attention_dropout="x", patch_size=0),
    "cogvideox transformer": dict(norm_eps=1e9, spatial_interpolation_scale=INFINITE, num_layers="x"),
    "ltx vae": dict(resnet_norm_eps=None, scaling_factor=NAN, patch_size=-1),
    "svd unet": dict(num_attention_heads=[2, None], layers_per_block=[], addition_time_embed_dim=16),
    "svd scheduler": dict(trained_betas=0, sigma_max=1e400, sigma_min=-1, num_train_timesteps=10**6),
    "animatediff unet": dict(norm_eps=-1, motion_num_attention_heads="x", cross_attention_dim=0),
}
FILES = {"scheduler": "scheduler_config.json", "feature_extractor": "preprocessor_config.json"}


@pytest.mark.parametrize("place", NUMBERS)
def test_a_number_that_is_none_is_named(place, edited):
    model, part = place.strip("/").split()
    file = f"{part}/{FILES.get(part, 'config.json')}"
    for name, value in NUMBERS[place].items():
        said = f"--model: .*{file}.*{'foo is not implemented' if value == 'foo' else name}"
        if name == "patch_size" and value == 2:
            said = "VAE's scale is not 8"
        if name == "addition_time_embed_dim":
            said = "projection_class_embeddings_input_dim is not 3 x 16"
        refused(edited(model, file, **{name: value}), said)


def passes(kind, **config):
    damaged.check_config("", kind, config)


def test_plausible_numbers_pass():
    unet = dict(norm_eps=1e-6, mid_block_scale_factor=0.7071, sample_size=[72, 128])
    passes(diffusers.UNet3DConditionModel, **unet, attention_head_dim=[5, 10], other=NAN)
    passes(diffusers.AutoencoderKL, scaling_factor=15, shift_factor=-0.1, latents_mean=[0.0, -1])
    passes(diffusers.AutoencoderKLCogVideoX, force_upcast=False, temporal_compression_ratio=4.0)
    passes(diffusers.UNet2DConditionModel, norm_num_groups=None, freq_shift=1, upcast_attention=True)
    passes(diffusers.DPMSolverMultistepScheduler, lambda_min_clipped=-INFINITE)
    passes(diffusers.UniPCMultistepScheduler, sigma_max=700.0, shift_terminal=0.1, disable_corrector=[0, 1])
    passes(diffusers.AutoencoderKLWan, latents_mean=[-1.0, 0, 3.5], latents_std=[1e-3, 5.5], attn_scales=[])
    passes(CLIPTextConfig, eos_token_id=2, pad_token_id=0, layer_norm_eps=1e-12)
    passes(T5Config, dropout_rate=0.0, decoder_start_token_id=0, n_positions="of no use")


# ---- Size --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "model, file, name",
    [
        ("t2v", "unet/config.json", "layers_per_block"),
        ("t2v", "vae/config.json", "layers_per_block"),
        ("t2v", "text_encoder/config.json", "num_hidden_layers"),
        ("wan", "transformer/config.json", "num_layers"),
        ("wan", "text_encoder/config.json", "num_layers"),
        ("cogvideox", "transformer/config.json", "num_layers"),
        ("ltx", "transformer/config.json", "num_layers"),
    ],
)
def test_a_network_of_thousands_of_layers_is_refused_soon(model, file, name, edited):
    folder = edited(model, file, **{name: 10_000})
    begin = time.process_time()
    refused(folder, "--model: .*(more than 20000 modules|damaged)")
    assert time.process_time() - begin < 20  # on a slow core; in the middle of building it


def test_there_is_room_for_networks_ten_times_as_large_as_published():
    """In modules, of which Wan 14B has 1,158."""
    with torch.device("meta"):
        published = diffusers.WanTransformer3DModel()
    assert published.config.num_layers == 40 and sum(1 for _ in published.modules()) * 10 < checkpoint.MODULES


def test_weights_of_another_size_than_the_config_are_refused_before_a_network_loads(edited):
    refused(
        edited("wan", "transformer/config.json", ffn_dim=201), "transformer: its weights hold .* get both"
    )
    refused(edited("t2v", "vae/config.json", layers_per_block=2), "vae: its weights hold .* get both again")
    refused(edited("wan", "text_encoder/config.json", d_kv=10**5), "text_encoder: its weights hold .* both")
    folder = edited("t2v", "unet/config.json", sample_size=9)
    door(folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)
    save_file(dict(list(whole.items())[1:]), file)
    refused(folder, "unet: its weights hold")
    file.write_bytes(file.read_bytes()[:99])
    refused(folder, "the weights in .*unet are damaged")
    file.unlink()
    door(folder)  # they may be on the hub
    torch.save(whole, file.with_suffix(".bin"))
    door(folder)


def test_wan_2_2_is_no_anyflow(edited):
    """By its parts, and by the setting that tells it from Wan 2.1."""
    folder = edited("wan22", "model_index.json", _class_name="AnyFlowPipeline")
    refused(folder, "AnyFlowPipeline with expand_timesteps")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"expand_timesteps": False}))
    refused(folder, "has a WanTransformer3DModel, there is code for AnyFlowTransformer3DModel")
