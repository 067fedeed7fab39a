"""The likelihood of images by either method, in bits per dimension."""

import math
import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from rolldiff.diffusion.process import PerSampleNoise
from rolldiff.likelihood.bound import bound
from rolldiff.likelihood.config import Likelihood, LikelihoodConfig, check_levels
from rolldiff.likelihood.flow import ode
from rolldiff.likelihood.teacher import Teacher

__all__ = ["log_likelihood"]


def log_likelihood(
    teacher: Teacher,
    image: Float[Tensor, "B C H W"],
    config: LikelihoodConfig,
    *,
    tokens: Callable[[Tensor], Tensor],
    steps: int,
    samples: PerSampleNoise,
) -> Likelihood:
    """The likelihood of images.

    Args:
        teacher: the network, shown the images.
        image: the images.
        config: how.
        tokens: from images to tokens in decode order, an orthonormal map.
        steps: of the ODE's solver, from data to noise.
        samples: the noise of each image.

    Raises:
        UsageError: if the values of the images are not levels.
    """
    start = time.perf_counter()
    if config.dequantization is not None:
        check_levels(image, config.levels)
    if config.method == "bound":
        nats, standard_error = bound(teacher, image, config, tokens=tokens, samples=samples)
        solver_error, divergence = torch.full_like(standard_error, torch.nan), None
    else:
        nats, standard_error, solver_error, divergence = ode(
            teacher, image, config, tokens=tokens, steps=steps, samples=samples
        )
    scale = math.log(2) * image[0].numel()
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return Likelihood(
        bits_per_dim=-nats / scale,
        nats=nats,
        standard_error=standard_error / scale,
        solver_error=solver_error / scale,
        nfe=teacher.work.nfe,
        products=teacher.work.products,
        seconds=time.perf_counter() - start,
        divergence=divergence,
        config=config,
    )
