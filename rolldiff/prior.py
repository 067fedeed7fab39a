"""An autoregressive transformer over the codes of images, one after another in raster order.

    p(codes | label) = prod_i p(code_i | code_1 … code_{i-1}, label)

It is made of the decoder's own blocks: one code is one group, its time is its label, and the cache
holds the codes before it, so that a code costs one token.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rolldiff.conditioning import Conditions
from rolldiff.conditions import ClassLabels
from rolldiff.hub import Pretrained
from rolldiff.nn.blocks import Block, Kept, Memory, norm
from rolldiff.nn.places import causal_bias
from rolldiff.streams import Streams
from rolldiff.tokenizer import Tokenizer

__all__ = ["Prior"]


class Prior(Pretrained):
    """A distribution over sequences of codes.

    Args:
        num_tokens: codes an image.
        codes: the size of the codebook.
        num_classes: class labels; 0 for none.
        width: channels inside; a multiple of `heads`.
        depth: blocks.
        heads: attention heads.
        dropout: how often an embedded code is set to 0 in training, against learning sequences by
            heart.
        drop_cond: how often the label is dropped in training, for guidance.

    Raises:
        ValueError: if a size is out of range.
    """

    def __init__(
        self,
        num_tokens: int,
        codes: int,
        *,
        num_classes: int = 0,
        width: int = 96,
        depth: int = 3,
        heads: int = 3,
        dropout: float = 0.1,
        drop_cond: float = 0.1,
    ) -> None:
        super().__init__()
        if min(num_tokens, codes, width, depth, heads) < 1 or width % heads:
            raise ValueError(
                "sizes must be 1 or more, and width a multiple of heads, got "
                f"{num_tokens} tokens, {codes} codes, width {width}, depth {depth}, heads {heads}"
            )
        if not (0 <= dropout < 1 and 0 <= drop_cond <= 1):
            raise ValueError(
                f"dropout and drop_cond must be in [0, 1], got {dropout} and {drop_cond}"
            )
        self.config = {
            "num_tokens": num_tokens,
            "codes": codes,
            "num_classes": num_classes,
            "width": width,
            "depth": depth,
            "heads": heads,
            "dropout": dropout,
            "drop_cond": drop_cond,
        }
        self.num_tokens, self.codes, self.heads = num_tokens, codes, heads
        self.dropout, self.drop_cond = dropout, drop_cond
        self.condition = Conditions.of(ClassLabels(num_classes))
        # The last code starts the sequence, the last label says nothing.
        self.embed = nn.Embedding(codes + 1, width)
        self.place = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        self.label = nn.Embedding(num_classes + 1, 4 * width)
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(depth))
        self.head = nn.Linear(width, codes)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.label.weight)
        nn.init.zeros_(self.head.weight)
        # Codes have learned places: nothing is turned.
        self.register_buffer("_cos", torch.ones(1), persistent=False)
        self.register_buffer("_sin", torch.zeros(1), persistent=False)
        self._read: list[Tokenizer] = []

    def reading(self, tokenizer: Tokenizer) -> "Prior":
        """The prior, for training on images: `loss` then takes what this tokenizer makes of them.

        The tokenizer is no part of the prior's weights.

        Raises:
            ValueError: if its codes are others.
        """
        theirs = (tokenizer.num_tokens, tokenizer.codes)
        if theirs != (self.num_tokens, self.codes):
            raise ValueError(
                f"tokenizer must give {self.num_tokens} codes of {self.codes}, got {theirs}"
            )
        self._read = [tokenizer.requires_grad_(False).eval()]
        return self

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it is reading images through.

        Raises:
            ValueError: if there is none.
        """
        if not self._read:
            raise ValueError("prior must be given a tokenizer first (reading), got none")
        return self._read[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.place.device

    def loss(
        self, image: Tensor, cond: Any = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The mean negative logarithm of the probability of a code, in nats.

        Args:
            image: images, for a prior that is `reading` them; or codes `[B, N]`.
            cond: class labels, `[B]`, or None.
            generator: a CPU generator for what is dropped.
        """
        codes = image
        if image.is_floating_point():
            codes = self.tokenizer.to(image.device).encode(image)
        if codes.shape[1:] != (self.num_tokens,):
            raise ValueError(
                f"codes must have shape (B, {self.num_tokens}), got {tuple(codes.shape)}"
            )
        label = self._label(cond, len(codes), codes.device)
        dropped = torch.rand(len(codes), generator=generator).to(codes.device) < self.drop_cond
        label = label.where(~dropped, self.label.num_embeddings - 1)
        start = codes.new_full((len(codes), 1), self.codes)
        h = self.embed(torch.cat([start, codes[:, :-1]], dim=1))
        kept = torch.rand(h.shape[:2], generator=generator).to(h.device) >= self.dropout
        number = torch.arange(self.num_tokens, device=h.device)
        bias = causal_bias(number, number)
        logits = self._logits(h * kept[..., None], label, slice(0, self.num_tokens), bias=bias)
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    @torch.no_grad()
    def write(
        self,
        cond: Any = None,
        *,
        num_images: int | None = None,
        temperature: float = 1.0,
        guidance: float = 0.0,
        seed: int | torch.Generator | None = None,
        first: int = 0,
    ) -> Iterator[Int[Tensor, " B"]]:
        """Draw codes, one after another for all images at once.

        Args:
            cond: class labels, `[B]`, one number for all, or None.
            num_images: how many; by default as many as `cond` has.
            temperature: above 0; 1 draws from the distribution that was learned, less is safer.
            guidance: 0 for none; otherwise `l + guidance (l - l_null)` on the logits.
            seed: a seed or a generator; image i gets the same codes alone and in any batch.
            first: the index of the first image in the seed's stream.

        Yields:
            The next code of each image, `num_tokens` times.

        Raises:
            ValueError: at the first code, if an argument is out of range.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if guidance and cond is None:
            raise ValueError(f"guidance needs a condition, got guidance {guidance} without cond")
        count = num_images or self.condition.count(cond) or 1
        label = self._label(cond, count, self.device)
        if guidance:
            label = torch.cat([label, torch.full_like(label, self.label.num_embeddings - 1)])
        streams = Streams(seed, count, first=first)
        size = self.place.shape[1] // self.heads
        shape = (len(label), self.heads, self.num_tokens, size)
        memory = [(self.place.new_zeros(shape), self.place.new_zeros(shape)) for _ in self.blocks]
        code = torch.full((count,), self.codes, device=self.device)
        for i in range(self.num_tokens):
            h = self.embed(code)[:, None].repeat(len(label) // count, 1, 1)
            logits = self._logits(h, label, slice(i, i + 1), memory=memory)[:, 0].double()
            if guidance:
                logits, null = logits.chunk(2)
                logits = logits + guidance * (logits - null)
            # The largest of logits plus Gumbel noise is a draw; the noise is that of each image.
            u = torch.special.ndtr(streams.normal(self.codes).double()).to(logits.device)
            gumbel = -(-u.clamp(1e-12, 1 - 1e-12).log()).log()
            code = (logits / temperature + gumbel).argmax(-1)
            yield code

    def compile(self, *, mode: str | None = None) -> None:
        """A prior is not compiled: it writes one code at a time, each after a longer past.

        Raises:
            ValueError: always.
        """
        raise ValueError("compile must be false for a prior, which is not compiled")

    def _label(self, cond: Any, batch: int, device: torch.device) -> Int[Tensor, " B"]:
        null = torch.full((batch,), self.label.num_embeddings - 1, device=device)
        given = self.condition.check(cond, batch, device)
        for value, there in given.values():
            return value.where(there, null)
        return null

    def _logits(
        self,
        h: Float[Tensor, "B n width"],
        label: Int[Tensor, " B"],
        span: slice,
        *,
        bias: Tensor | None = None,
        memory: list[Memory] | None = None,
    ) -> Float[Tensor, "B n codes"]:
        h = h + self.place[span]
        modulation = 1 + self.label(label)[:, None].unflatten(-1, (4, -1))
        kept: list[tuple[Kept, Kept] | None] = [None] * len(self.blocks)
        if memory is not None:
            kept = [(Kept.at(k, span), Kept.at(v, span)) for k, v in memory]
        for block, before in zip(self.blocks, kept, strict=True):
            h = block(h, modulation, self._cos, self._sin, bias, before)
        return self.head(norm(h))
