"""What the trainings of a tokenizer and of a prior leave behind."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rolldiff.decoder import DecodeConfig
from rolldiff.evaluation.images import labelled_rows, make_grid, save_gif
from rolldiff.evaluation.metrics import pixel_distance, psnr
from rolldiff.progress import progress
from rolldiff.report import Reported, check_ask, floor, some
from rolldiff.tokenizer.pipeline import Generation, measure_latency
from rolldiff.tokenizer.prior import Prior
from rolldiff.tokenizer.tokenizer import Tokenizer

__all__ = ["PriorReport", "TokenizerReport"]

BATCH = 500
SHOWN = 16


@dataclass(frozen=True)
class TokenizerReport:
    """Of a tokenizer: how near the images come back, for several group counts.

    Args:
        num_groups: the group counts.
        steps: solver steps a group.
        samples: images, at most.
    """

    num_groups: Sequence[int]
    steps: int = 16
    samples: int = 2000

    def check(self, model: nn.Module) -> None:
        assert isinstance(model, Tokenizer)
        check_ask(
            model.decoder.layout.num_tokens,
            num_groups=self.num_groups,
            steps=self.steps,
            samples=self.samples,
        )

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, image: Tensor, *, label: Tensor, folder: Path, seed: int
    ) -> Reported:
        assert isinstance(model, Tokenizer)
        image, label = some(image, label, self.samples, seed=seed)
        codes = torch.cat([model.encode(part.to(model.device)) for part in image.split(BATCH)])
        page = {"data": image[:SHOWN]}
        ratios, distances = {}, {}
        for num_groups in progress(self.num_groups, "measuring", unit="setting"):
            ask = {"num_groups": num_groups, "steps": self.steps, "seed": seed}
            parts = []
            for number, part in enumerate(codes.split(BATCH)):
                told = model.dequantize(part)
                parts.append(
                    model.decoder.decode(told, start_index=number * BATCH, **ask).image.cpu()
                )
            drawn = torch.cat(parts)
            page[f"num_groups {num_groups}"] = drawn[:SHOWN]
            ratios[str(num_groups)] = psnr(image, drawn)
            distances[str(num_groups)] = pixel_distance(image, drawn)
        labelled_rows(page).save(folder / "reconstructions.png")
        used = codes.flatten().bincount(minlength=model.codebook_size) / codes.numel()
        perplexity = float((-(used * used.clamp(min=1e-12).log()).sum()).exp())
        lines = ["num_groups  psnr (dB)  fd_pixels"]
        lines += [f"{g:>10}  {ratios[g]:9.2f}  {distances[g]:9.3f}" for g in ratios]
        bits = model.num_tokens * math.log2(model.codebook_size)
        lines += [f"{model.num_tokens} codes of {model.codebook_size} an image, {bits:.0f} bits"]
        return Reported(
            {
                "psnr": ratios,
                "fd_pixels": distances,
                "fd_pixels_floor": floor(image),
                "tokens_per_image": model.num_tokens,
                "codes": model.codebook_size,
                "bits_per_image": bits,
                "codes_in_use": perplexity,
                "samples": len(image),
                "steps_per_group": self.steps,
            },
            "\n".join(lines),
            f"rolldiff train experiment=prior tokenizer={folder}",
        )


@dataclass(frozen=True)
class PriorReport:
    """Of a prior: the distance of what it and its tokenizer generate, and the time to see it.

    Args:
        tokenizer: the run folder of the tokenizer.
        num_groups: groups of the decode.
        overlap: of its schedule.
        steps: solver steps a group.
        samples: images, at most, that as many generated ones are compared to.
    """

    tokenizer: str
    num_groups: int = 4
    overlap: float = 0.0
    steps: int = 16
    samples: int = 2000

    def check(self, model: nn.Module) -> None:
        assert isinstance(model, Prior)
        check_ask(
            Tokenizer.from_pretrained(self.tokenizer).decoder.layout.num_tokens,
            num_groups=[self.num_groups],
            overlap=self.overlap,
            steps=self.steps,
            samples=self.samples,
        )

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, image: Tensor, *, label: Tensor, folder: Path, seed: int
    ) -> Reported:
        assert isinstance(model, Prior)
        tokenizer = Tokenizer.from_pretrained(self.tokenizer).to(model.device)
        image, label = some(image, label, self.samples, seed=seed)
        settings: dict[str, Any] = {
            "num_groups": self.num_groups,
            "overlap": self.overlap,
            "steps": self.steps,
        }
        drawn, codes = [], []
        for first in progress(range(0, len(image), BATCH), "measuring", unit="batch"):
            part = label[first : first + BATCH] if model.conditioning.parts else None
            count = min(BATCH, len(image) - first)
            written = list(model.generate(part, num_images=count, seed=seed, start_index=first))
            codes.append(torch.stack(written, dim=1))
            told = tokenizer.dequantize(codes[-1])
            found = tokenizer.decoder.decode(told, seed=seed, start_index=first, **settings)
            drawn.append(found.image.cpu())
        generated = torch.cat(drawn)
        real = torch.cat([tokenizer.encode(part.to(model.device)) for part in image.split(BATCH)])
        seen = {tuple(row) for row in real.tolist()}
        known = sum(tuple(row) in seen for row in torch.cat(codes).tolist()) / len(image)
        chosen = torch.cat([(label == c).nonzero()[:2, 0] for c in label.unique()])[:20]
        page = {"data": image[chosen], "generated": generated[chosen]}
        labelled_rows(page).save(folder / "samples.png")
        cond = int(label[0]) if model.conditioning.parts else None
        generation = Generation(
            model, tokenizer, cond=cond, seed=seed, config=DecodeConfig(**settings)
        )
        measure_latency(generation, wait=False)  # the first one warms up
        arriving, waiting = (
            measure_latency(generation, wait=False),
            measure_latency(generation, wait=True),
        )
        frames = [make_grid(frame.image) for frame in generation.stream()]
        save_gif(frames, folder / "stream.gif")
        distance = pixel_distance(image, generated)
        table = [
            f"generated images: fd_pixels {distance:.3f}",
            f"sequences that the data has too: {known:.0%}",
            f"first row after {arriving.first_row:.3f} s ({arriving.codes_at_first_row} of "
            f"{model.num_tokens} codes), whole picture after {arriving.whole:.3f} s",
            f"all codes first: first row after {waiting.first_row:.3f} s, whole picture after "
            f"{waiting.whole:.3f} s",
        ]
        return Reported(
            {
                "fd_pixels": distance,
                "fd_pixels_floor": floor(image),
                "sequences_in_data": known,
                "tokens_per_image": model.num_tokens,
                "while_written": asdict(arriving),
                "all_written_first": asdict(waiting),
                "samples": len(image),
                "num_groups": self.num_groups,
                "overlap": self.overlap,
                "steps_per_group": self.steps,
            },
            "\n".join(table),
            f"rolldiff generate prior={folder} tokenizer={self.tokenizer} label=3 "
            f"num_groups={self.num_groups} out=stream.gif",
        )
