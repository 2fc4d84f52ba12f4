"""AnimateDiff (Guo et al. 2023): Stable Diffusion 1.5 with a motion adapter, in one folder or two."""

import functools

import diffusers
import torch

import rewards
from rewards import as_bad_input
from vader import PUBLISHED, TextToVideoUNet, read_config, tabulate


class AnimateDiff(TextToVideoUNet):
    animatediff = dict(source="stable-diffusion-v1-5/stable-diffusion-v1-5", num_frames=16)
    animatediff |= dict(height=512, width=512, num_inference_steps=25, guidance_scale=7.5)
    presets = {"animatediff": PUBLISHED | animatediff}
    motion = "guoyww/animatediff-motion-adapter-v1-5-2"  # where the image model's folder has none

    lora_pipeline = diffusers.AnimateDiffPipeline
    denoiser_class = diffusers.UNetMotionModel
    also_loads = ("UNet2DConditionModel",)  # and a motion adapter from elsewhere
    checkpointed = ("ResnetBlock2D", "Transformer2DModel", "AnimateDiffTransformer3D")

    @classmethod
    def in_one(cls, source) -> bool:
        """Is the motion adapter in the U-Net already?"""
        return read_config(source, "unet/config.json").get("_class_name") == "UNetMotionModel"

    @classmethod
    def build_on_meta(cls, source):
        """The denoiser without its weights."""
        config = read_config(source, "unet/config.json")
        with torch.device("meta"), as_bad_input(f"--model: {source}: a config.json is damaged"):
            if cls.in_one(source):
                return diffusers.UNetMotionModel.from_config(config)
            unet = diffusers.UNet2DConditionModel.from_config(config)
            adapter = diffusers.MotionAdapter.from_config(read_config(cls.motion, "config.json"))
            return diffusers.UNetMotionModel.from_unet2d(unet, adapter, load_weights=False)

    def schedule(self, cfg):
        # the adapter was trained on linear betas, whatever the image model's scheduler says
        config = read_config(self.source, "scheduler/scheduler_config.json")
        config |= dict(beta_schedule="linear", clip_sample=False, timestep_spacing=cfg.timestep_spacing)
        scheduler = diffusers.DDIMScheduler.from_config(config)
        scheduler.set_timesteps(cfg.num_inference_steps)
        return tabulate(scheduler, cfg.eta)

    def load_denoiser(self, folder):
        if self.in_one(self.source):
            return super().load_denoiser(folder)
        load = functools.partial(rewards.load, flag="--model", dtype=self.dtype)
        unet = load(diffusers.UNet2DConditionModel, self.source, subfolder=folder)
        adapter = load(diffusers.MotionAdapter, self.motion)
        return diffusers.UNetMotionModel.from_unet2d(unet, adapter).to(self.dtype)

    def denoise(self, x, t, cond):
        text = cond["encoder_hidden_states"].repeat_interleave(x.shape[2], dim=0)  # every frame has its own
        return super().denoise(x, t, {"encoder_hidden_states": text})
