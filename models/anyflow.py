"""AnyFlow (Gu et al. 2026, arXiv 2605.13724): Wan 2.1 in few steps, f is the mean slope of a step."""

import diffusers
import torch

from models.wan import Wan
from rewards import require
from vader import tabulate


class AnyFlow(Wan):
    anyflow = Wan.wan | dict(source="nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", num_inference_steps=4)
    presets = {"anyflow": anyflow | dict(guidance_scale=1.0)}

    text_pipeline = lora_pipeline = diffusers.AnyFlowPipeline
    denoiser_class = diffusers.AnyFlowTransformer3DModel
    checkpointed = ("AnyFlowTransformerBlock",)
    comfy_names = None  # it does not run this model
    index_settings = ()  # Wan 2.2's is another model

    @classmethod
    def variant(cls, source):
        return cls

    def schedule(self, cfg):
        """t: (T, 2), a step's time and the next one's."""
        own = cfg.timestep_spacing == "linspace"
        require(own, "--timestep_spacing: this model has steps of its own, leave it out")
        scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=cfg.shift or self.shift())
        scheduler.set_timesteps(cfg.num_inference_steps)
        schedule = tabulate(scheduler)
        return schedule._replace(t=torch.stack([schedule.t, 1000 * scheduler.sigmas[1:]], dim=1))

    def denoise(self, x, t, cond):
        t, r = t.to(self.device)[:, None, None].expand(2, len(x), x.shape[2])
        frames = x.transpose(1, 2).to(self.dtype)
        f = self.denoiser(frames, timestep=t, r_timestep=r, **cond, return_dict=False)[0]
        return f.transpose(1, 2).float()
