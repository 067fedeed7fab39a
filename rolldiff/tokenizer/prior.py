"""`Prior`: an autoregressive transformer over the codes of images, in raster order.

    p(codes | label) = prod_i p(code_i | code_1 … code_{i-1}, label)

It uses the decoder's blocks: one code is one group, the label takes the place of the time, and the
cache holds the codes before, so that each code costs one token evaluation.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rolldiff.conditioning import ClassLabels, Conditioning
from rolldiff.decoder import check_generator
from rolldiff.diffusion.layout import MAX_TOKENS
from rolldiff.diffusion.process import MAX_IMAGES, PerSampleNoise, Shard
from rolldiff.diffusion.schedule import attention_mask
from rolldiff.errors import UsageError, finite_number, warn_user, whole_number
from rolldiff.hub import Pretrained
from rolldiff.nn.transformer import MAX_DEPTH, MAX_WIDTH, Block, KVCache, norm
from rolldiff.tokenizer.tokenizer import MAX_CODES, check_codes

__all__ = ["Prior"]


class Prior(Pretrained):
    """A distribution over sequences of codes.

    Args:
        num_tokens: codes per image.
        codebook_size: number of different codes.
        num_classes: class labels; 0 for none.
        width: channels; a multiple of `heads`, at most 2^16.
        depth: blocks, at most 1000.
        heads: attention heads.
        dropout: probability of zeroing an embedded code in training, against memorising sequences.
        drop_cond: probability of dropping the label in training, for guidance.

    Raises:
        UsageError: if a size is out of range.
    """

    def __init__(
        self,
        num_tokens: int,
        codebook_size: int,
        *,
        num_classes: int = 0,
        width: int = 96,
        depth: int = 3,
        heads: int = 3,
        dropout: float = 0.1,
        drop_cond: float = 0.1,
    ) -> None:
        super().__init__()
        num_tokens = whole_number(num_tokens, "num_tokens", maximum=MAX_TOKENS)
        codebook_size = whole_number(codebook_size, "codebook_size", maximum=MAX_CODES)
        num_classes = ClassLabels(num_classes).num_classes
        width = whole_number(width, "width", maximum=MAX_WIDTH)
        depth = whole_number(depth, "depth", maximum=MAX_DEPTH)
        heads = whole_number(heads, "heads")
        if width % heads:
            raise UsageError(
                f"width must be a multiple of heads, got width {width} and heads {heads}"
            )
        dropout = finite_number(dropout, "dropout", minimum=0, maximum=1)
        if dropout == 1:
            raise UsageError(f"dropout must be below 1, got {dropout}")
        drop_cond = finite_number(drop_cond, "drop_cond", minimum=0, maximum=1)
        self.config = {
            "num_tokens": num_tokens,
            "codebook_size": codebook_size,
            "num_classes": num_classes,
            "width": width,
            "depth": depth,
            "heads": heads,
            "dropout": dropout,
            "drop_cond": drop_cond,
        }
        self.num_tokens, self.codebook_size, self.heads = num_tokens, codebook_size, heads
        self.dropout, self.drop_cond = dropout, drop_cond
        self.conditioning = Conditioning.of(ClassLabels(num_classes))
        # The last embedding starts a sequence, and the last label is null.
        self.embed = nn.Embedding(codebook_size + 1, width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        self.label = nn.Embedding(num_classes + 1, 4 * width)
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(depth))
        self.head = nn.Linear(width, codebook_size)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.label.weight)
        nn.init.zeros_(self.head.weight)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.pos_embed.device

    def loss(
        self,
        codes: Int[Tensor, "B N"],
        cond: Any = None,
        *,
        generator: torch.Generator | None = None,
        shard: Shard = Shard(),
    ) -> Tensor:
        """The mean negative log-probability per code, in nats.

        Args:
            codes: `[B, N]`, in raster order.
            cond: class labels, `[B]`, or None.
            generator: a CPU generator for what is dropped.
            shard: which part of a global batch this is, see `Decoder.loss`.

        Raises:
            UsageError: if an argument has the wrong shape, type or range.
        """
        codes = check_codes(codes, self.codebook_size, self.num_tokens).long()
        check_generator(generator, shard=shard)
        label = self._label(cond, len(codes), codes.device)
        batch = len(codes) * shard.count
        draws = shard.rows(torch.rand(batch, generator=generator))
        dropped = draws.to(codes.device) < self.drop_cond
        label = label.where(~dropped, self.label.num_embeddings - 1)
        start = codes.new_full((len(codes), 1), self.codebook_size)
        h = self.embed(torch.cat([start, codes[:, :-1]], dim=1))
        draws = shard.rows(torch.rand(batch, h.shape[1], generator=generator))
        kept = draws.to(h.device) >= self.dropout
        logits = self._logits(h * kept[..., None], label, start=0)
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    def forward(self, codes: Tensor, cond: Any = None, **options: Any) -> Tensor:
        """The loss, for wrappers that call a module, such as `DistributedDataParallel`."""
        return self.loss(codes, cond, **options)

    def generate(
        self,
        cond: Any = None,
        *,
        num_images: int | None = None,
        temperature: float = 1.0,
        guidance: float = 0.0,
        seed: int | torch.Generator | None = None,
        start_index: int = 0,
    ) -> Iterator[Int[Tensor, " B"]]:
        """Sample codes, one after another for all images at once.

        Args:
            cond: class labels, `[B]`, one number for all, or None.
            num_images: number of images, at most 2^20; by default as many as `cond` has.
            temperature: above 0; 1 samples the learned distribution, less sharpens it.
            guidance: 0 for none; otherwise `l + guidance (l - l_null)` on the logits.
            seed: a seed or a generator; image i gets the same codes alone and in any batch.
            start_index: index of the first image in the seed's sequence of images.

        Yields:
            The next code of each image, `num_tokens` times.

        Raises:
            UsageError: at once, if an argument is out of range.

        Warns:
            UserWarning: if a label is missing, or guidance asked for, and the prior was trained
                with `drop_cond=0`.
        """
        temperature = finite_number(temperature, "temperature", minimum=0)
        if temperature == 0:
            raise UsageError(f"temperature must be above 0, got {temperature}")
        guidance = finite_number(guidance, "guidance")
        passed = self.conditioning.split(cond)
        if guidance and not passed:
            raise UsageError(f"guidance needs a condition, got guidance {guidance} without cond")
        if self.drop_cond == 0 and self.conditioning.names and (guidance or not passed):
            setting = f"guidance {guidance:g}" if passed else "no cond"
            warn_user(
                f"generating beyond what this prior was trained for: {setting} (trained: "
                "drop_cond=0, always with a condition)"
            )
        if num_images is None:
            num_images = self.conditioning.count(cond) or 1
        count = whole_number(num_images, "num_images", maximum=MAX_IMAGES)
        numbers = 2 * len(self.blocks) * self.pos_embed.numel()
        if count * numbers >= 2**33:
            raise UsageError(
                f"num_images must be at most {(2**33 - 1) // numbers} for a cache of {numbers} "
                f"values per image, got {count}"
            )
        label = self._label(cond, count, self.device)
        if guidance:
            label = torch.cat([label, torch.full_like(label, self.label.num_embeddings - 1)])
        samples = PerSampleNoise(seed, count, start_index=start_index)
        return self._codes(label, samples, count, temperature=temperature, guidance=guidance)

    @torch.no_grad()
    def _codes(
        self,
        label: Int[Tensor, " B"],
        samples: PerSampleNoise,
        count: int,
        *,
        temperature: float,
        guidance: float,
    ) -> Iterator[Int[Tensor, " B"]]:
        size = self.pos_embed.shape[1] // self.heads
        shape = (len(label), self.heads, self.num_tokens, size)
        cache = KVCache(len(self.blocks), shape, self.pos_embed)
        code = torch.full((count,), self.codebook_size, device=self.device)
        for i in range(self.num_tokens):
            h = self.embed(code)[:, None].repeat(len(label) // count, 1, 1)
            logits = self._logits(h, label, start=i, cache=cache)[:, 0].double()
            if guidance:
                logits, null = logits.chunk(2)
                logits = logits + guidance * (logits - null)
            # Gumbel-max sampling, with the noise of each image's own generator.
            u = torch.special.ndtr(samples.normal(self.codebook_size).double()).to(logits.device)
            gumbel = -(-u.clamp(1e-12, 1 - 1e-12).log()).log()
            code = (logits / temperature + gumbel).argmax(-1)
            yield code

    def _label(self, cond: Any, batch: int, device: torch.device) -> Int[Tensor, " B"]:
        null = torch.full((batch,), self.label.num_embeddings - 1, device=device)
        for value, mask in self.conditioning.validate(cond, batch, device).values():
            return value.where(mask, null)
        return null

    def _logits(
        self,
        h: Float[Tensor, "B n width"],
        label: Int[Tensor, " B"],
        *,
        start: int,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "B n codes"]:
        span = slice(start, start + h.shape[1])
        h = h + self.pos_embed[span]
        modulation = 1 + self.label(label)[:, None].unflatten(-1, (4, -1))
        index = torch.arange(span.stop, device=h.device)
        mask = attention_mask(index[span], index) if h.shape[1] > 1 else None
        slots = [None] * len(self.blocks) if cache is None else cache.slots(span)
        for block, kv in zip(self.blocks, slots, strict=True):
            h = block(h, modulation, attn_mask=mask, kv=kv)
        return self.head(norm(h))
