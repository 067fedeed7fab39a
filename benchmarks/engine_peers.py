"""Loops of other libraries around networks of the same size, for `engine.py`.

`pip install -c constraints.txt -e '.[peers]'` installs them; one that is absent is left out.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec

import torch

from rolldiff import Decoder

_LIBRARIES: list[torch.library.Library] = []


def loops(
    side: int, width: int, depth: int, heads: int, *, steps: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """One decode of one image by each library at hand, with random weights."""
    found: dict[str, Callable[[], object]] = {}
    _complete_torchvision()
    if find_spec("diffusers") is not None:
        found["diffusers_joint"] = _diffusers(side, width, depth, heads, steps, device)
    if find_spec("spatialreasoners") is not None and device.type == "cpu":
        for num_groups in (1, 4, 16):
            found[f"spatialreasoners_g{num_groups}"] = _spatialreasoners(
                side, width, depth, heads, num_groups, steps
            )
    return found


def flow_loop(model: Decoder, steps: int) -> Callable[[], torch.Tensor] | None:
    """The network of a decoder under the flow-matching Euler scheduler of diffusers."""
    if find_spec("diffusers") is None:
        return None
    _complete_torchvision()
    from diffusers import FlowMatchEulerDiscreteScheduler

    backbone, layout = model.backbone, model.layout
    order = torch.arange(layout.num_tokens)
    scheduler = FlowMatchEulerDiscreteScheduler()

    @torch.inference_mode()
    def loop() -> torch.Tensor:
        x_t = torch.randn(1, layout.num_tokens, layout.token_dim)
        scheduler.set_timesteps(steps)
        time = backbone.embed_time(scheduler.sigmas)
        context = backbone.prepare(order)
        for i, t in enumerate(scheduler.timesteps):
            x_t = scheduler.step(backbone(x_t, time[i : i + 1], context), t, x_t).prev_sample
        return x_t

    return loop


def _diffusers(
    side: int, width: int, depth: int, heads: int, steps: int, device: torch.device
) -> Callable[[], object]:
    """DiT with the flow-matching Euler scheduler."""
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=3,
        num_layers=depth,
        sample_size=side,
        patch_size=1,
        num_embeds_ada_norm=1000,
    )
    network = network.to(device).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    label = torch.zeros(1, dtype=torch.long, device=device)

    @torch.no_grad()
    def decode() -> torch.Tensor:
        x_t = torch.randn(1, 3, side, side, device=device)
        scheduler.set_timesteps(steps, device=device)
        for t in scheduler.timesteps:
            y = network(x_t, timestep=t[None], class_labels=label).sample
            x_t = scheduler.step(y, t, x_t).prev_sample
        return x_t

    return decode


def _spatialreasoners(
    side: int, width: int, depth: int, heads: int, num_groups: int, steps: int
) -> Callable[[], object]:
    """Its DiT under its own raster sampler, groups being square patches of one-pixel tokens."""
    from spatialreasoners.benchmark.evaluation.inference_sampler import (
        ScheduledInferenceSamplerCfg,
        get_inference_sampler,
    )
    from spatialreasoners.benchmark.evaluation.inference_sampler.sampling_schedule import RasterCfg
    from spatialreasoners.denoising_model import DenoisingModel, DenoisingModelCfg
    from spatialreasoners.denoising_model.denoiser import DiTCfg
    from spatialreasoners.denoising_model.denoiser.dit.modules import DiTBlockCfg
    from spatialreasoners.denoising_model.denoiser.embedding import EmbeddingSinusodialCfg
    from spatialreasoners.denoising_model.denoiser.modules.attention import AttentionCfg
    from spatialreasoners.denoising_model.flow import RectifiedFlowCfg
    from spatialreasoners.denoising_model.tokenizer import ImageDiTTokenizerCfg
    from spatialreasoners.misc.step_tracker import StepTracker
    from spatialreasoners.type_extensions import ConditioningCfg
    from spatialreasoners.variable_mapper import ImageVariableMapperCfg, get_variable_mapper

    patch = side // math.isqrt(num_groups)
    mapper = get_variable_mapper(ImageVariableMapperCfg(variable_patch_size=patch), (3, side, side))
    network = DenoisingModel(
        DenoisingModelCfg(
            denoiser=DiTCfg(
                time_embedding=EmbeddingSinusodialCfg(d_emb=256),
                block=DiTBlockCfg(attention=AttentionCfg(num_heads=heads), mlp_ratio=4.0),
                d_hid=width,
                depth=depth,
            ),
            flow=RectifiedFlowCfg(),
            tokenizer=ImageDiTTokenizerCfg(num_tokens_per_spatial_dim=patch),
            conditioning=ConditioningCfg(),
            learn_uncertainty=False,
            learn_variance=False,
        ),
        mapper,
        num_classes=None,
        step_tracker=StepTracker(offset=0),
    ).eval()
    sampler = get_inference_sampler(
        ScheduledInferenceSamplerCfg(sampling_schedule=RasterCfg(num_steps=steps)), mapper
    )

    @torch.no_grad()
    def decode() -> object:
        noise = torch.randn(1, mapper.num_variables, mapper.num_features)
        *_, last = sampler(network, z_t=noise, t=torch.ones(1, mapper.num_variables))
        return last.z_t

    return decode


def _complete_torchvision() -> None:
    """Let the peers be imported; what is timed of them calls nothing of torchvision.

    Beside a CPU build of torch the usual torchvision lacks its compiled operators, and its later
    versions lack `io.write_video`, which spatialreasoners asks for: both by imports only.
    """
    if find_spec("torchvision") is None:
        return
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)  # it goes when the object goes
    import torchvision.io

    if not hasattr(torchvision.io, "write_video"):
        torchvision.io.write_video = None
