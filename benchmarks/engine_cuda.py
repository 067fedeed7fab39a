"""The part for a GPU: the same ratios, and how much of the device a network uses.

Utilisation is the floating-point operations that the network needs, over the seconds, over what
products of large matrices reach on the same device. All of it takes a device, so that a CPU can try
it at tiny sizes (`QUICK`), where the figures mean nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from engine_loops import bare_loop
from engine_results import Results
from engine_rounds import Cases, now
from torch import Tensor, nn

from rolldiff import Cost, DecodeOutput, Decoder, GroupSchedule, Training

# num_groups, overlap, cache
CASES = {
    "joint": (1, 0.0, True),
    "g16": (16, 0.0, True),
    "overlap_half": (16, 0.5, True),
    "g64": (64, 0.0, True),
    "g16_uncached": (16, 0.0, False),
}


@dataclass(frozen=True)
class Sizes:
    """The network of `conf/experiment/cifar10.yaml`, 30 million parameters and 256 tokens."""

    image_size: int = 32
    width: int = 448
    depth: int = 12
    heads: int = 7
    steps: int = 16
    batches: Sequence[int] = (1, 64)
    exact_batch: int = 4
    training_batch: int = 256
    training_steps: int = 10
    matrices: Sequence[int] = (4096, 8192, 16384)
    products: int = 30
    rounds: int = 7


QUICK = Sizes(16, 16, 2, 2, 2, (1, 3), 2, 4, 1, (64, 128), 2, 1)


def measure(results: Results, sizes: Sizes, device: torch.device) -> None:
    """Add all metrics to the results, under `cuda_…`."""
    model = network(sizes, device)
    exactness(results, model, sizes)  # first: what is not compiled takes no time to compile
    rate = matrix_rate(sizes, device)
    results.put("cuda_matrix_tflops", [rate / 1e12])
    # All blocks share what is compiled, and every kind of call has its own. Beyond the usual limit
    # of 8 calls would quietly run as they are: raise it, and fail rather than time that.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        model.compile()
        for batch in sizes.batches:
            measure_decodes(results, model, sizes, batch, rate)
        measure_training(results, model, sizes, rate)


def network(sizes: Sizes, device: torch.device) -> Decoder:
    """Random weights that let every token matter to every other."""
    torch.manual_seed(0)
    model = Decoder.build(
        image_size=sizes.image_size,
        patch=2,
        width=sizes.width,
        depth=sizes.depth,
        heads=sizes.heads,
        num_classes=10,
        prediction="velocity",
        training=Training(num_groups=(1, 2, 4, 8, 16, 64)),
    )
    for parameter in model.backbone.parameters():
        nn.init.normal_(parameter, std=0.03)
    return model.to(device)


def decode(
    model: Decoder, batch: int, *, steps: int, case: str, dtype: torch.dtype | None = None
) -> DecodeOutput:
    num_groups, overlap, cache = CASES[case]
    return model.decode(
        _label(batch),
        num_groups=num_groups,
        overlap=overlap,
        steps=steps,
        seed=0,
        cache=cache,
        dtype=dtype,
    )


def _label(batch: int) -> Tensor:
    return torch.arange(batch) % 10


def exactness(results: Results, model: Decoder, sizes: Sizes) -> None:
    """The cache against none, in float32."""
    kept, plain = (
        decode(model, sizes.exact_batch, steps=sizes.steps, case=case, dtype=torch.float32).image
        for case in ("g16", "g16_uncached")
    )
    results.put("cuda_max_relative_difference", [((kept - plain).norm() / plain.norm()).item()])


def matrix_rate(sizes: Sizes, device: torch.device) -> float:
    """The most operations a second that products of large matrices reach."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return max(_product_rate(n, sizes.products, device, dtype) for n in sizes.matrices)


def _product_rate(n: int, products: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def several() -> None:
        for _ in range(products):
            a @ b

    several()
    start = now(device)
    several()
    return 2 * n**3 * products / (now(device) - start)


def flops(backbone: nn.Module, tokens: float, *, seen: float, times: float) -> float:
    """What a forward pass needs: `2 (matrices) (rows) + 4 depth width (tokens) (seen)`.

    Args:
        backbone: a `Transformer`.
        tokens: token evaluations, all images together.
        seen: tokens that a token attends to, on average.
        times: local times that are embedded: one a token in training, a few in a decode.
    """
    of_time = _matrices(backbone.time_embed)
    of_tokens = _matrices(backbone) - of_time
    depth, width = len(backbone.blocks), backbone.pos_embed.shape[1]
    return 2 * (of_tokens * tokens + of_time * times) + 4 * depth * width * tokens * seen


def _matrices(module: nn.Module) -> int:
    linear = (part for part in module.modules() if isinstance(part, nn.Linear))
    return sum(part.weight.numel() for part in linear)


def seen(num_tokens: int, num_groups: int) -> float:
    """Tokens that a token attends to: its own group and those before it."""
    schedule = GroupSchedule(num_tokens=num_tokens, num_groups=num_groups)
    return sum(schedule.ends[g + 1] for g in schedule.group.tolist()) / num_tokens


def measure_decodes(
    results: Results, model: Decoder, sizes: Sizes, batch: int, rate: float
) -> None:
    """Ratios over one group, images per second and utilisation."""
    costs: dict[str, list[Cost]] = {case: [] for case in CASES}

    def measured(case: str) -> None:
        costs[case].append(decode(model, batch, steps=sizes.steps, case=case).cost)

    cases: Cases = {case: lambda case=case: measured(case) for case in CASES}
    cases["bare"] = bare_loop(model, batch, sizes.steps)
    rounds = results.watch.time_rounds(cases, sizes.rounds, device=model.device)
    key = f"cuda_b{batch}_"
    results.ratio(f"{key}loop_overhead", rounds, "joint", "bare")
    for case in ("g16", "overlap_half", "g64"):
        results.ratio(f"{key}{case}_cached_over_joint", rounds, case, "joint")
    results.ratio(f"{key}g16_uncached_over_cached", rounds, "g16_uncached", "g16")
    counted = costs["g16"][1:]  # a first time compiles
    firsts = [cost.seconds_to_first_group / cost.seconds for cost in counted]
    results.put(f"{key}first_group_over_total", firsts)
    for case, num_groups in (("joint", 1), ("g16", 16)):
        needed = flops(
            model.backbone,
            costs[case][0].tokens * batch,
            seen=seen(model.layout.num_tokens, num_groups),
            times=sizes.steps + 1,
        )
        results.put(f"{key}{case}_images_per_second", [batch / s for s in rounds[case]])
        results.put(f"{key}{case}_utilisation", [needed / s / rate for s in rounds[case]])


def measure_training(results: Results, model: Decoder, sizes: Sizes, rate: float) -> None:
    """Steps of training: loss, gradient and AdamW; a backward pass counts as two forward ones."""
    batch, device, num_tokens = sizes.training_batch, model.device, model.layout.num_tokens
    cuda = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    image = torch.rand(batch, *model.layout.image_shape, device=device) * 2 - 1
    label = _label(batch).to(device)

    def train() -> None:
        for _ in range(sizes.training_steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                loss = model.loss(image, label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    rounds = results.watch.time_rounds({"train": train}, sizes.rounds, device=device)
    seconds = [s / sizes.training_steps for s in rounds["train"]]
    tokens = batch * num_tokens
    needed = 3 * flops(model.backbone, tokens, seen=num_tokens, times=tokens)
    results.put("cuda_training_step_seconds", seconds)
    results.put("cuda_training_images_per_second", [batch / s for s in seconds])
    results.put("cuda_training_utilisation", [needed / s / rate for s in seconds])
