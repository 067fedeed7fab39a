"""Starting from the weights of another training, whose settings may be others.

The network must be the same. What may differ is how it is conditioned, the size of the images, and
everything that is no weight: group counts, orders, overlaps, the optimizer.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

from rolldiff.decoder import Decoder
from rolldiff.diffusion.process import LossSpace, Prediction
from rolldiff.diffusion.timesteps import TrainingDistribution
from rolldiff.errors import UsageError, warn_user
from rolldiff.hub import Pretrained, read_checkpoint
from rolldiff.trust import trusted_prefixes

__all__ = ["decoder_of", "read_init", "start_from"]

# Parts of the names of weights that a training may begin without, and the settings of a network
# that may be others. All others must agree: some of them no weight shows, such as DiT's heads.
FREE = ("cond_embedder.", "pos_embed")
SETTINGS = {"layout", "condition", "window", "causal", "gradient_checkpointing"}
SHOWN = 5

M = TypeVar("M", bound=Pretrained)


def start_from(model: Pretrained, source: Pretrained) -> list[str]:
    """Load the weights of a model into another one, in place.

    Args:
        model: where they are loaded.
        source: whose weights they are.

    Returns:
        What stays as it was, because the source has none of this name and shape.

    Raises:
        UsageError: if the networks differ, or predict something else; nothing is loaded then.
    """
    if type(model) is not type(source):
        raise UsageError(
            f"init must be a {type(model).__name__}, as what is trained, got a "
            f"{type(source).__name__}"
        )
    ours, theirs = (_prediction(each) for each in (model, source))
    if ours != theirs:
        raise UsageError(
            f"decoder.prediction must be that of the weights of init, {theirs}, got {ours}"
        )
    own, given = model.state_dict(), source.state_dict()
    fitting = {n for n in own.keys() & given.keys() if own[n].shape == given[n].shape}
    different = {
        name: f"{name} {_shape(own, name)} here, {_shape(given, name)} in init"
        for name in sorted((own.keys() | given.keys()) - fitting)
    }
    refused = [text for name, text in different.items() if not any(part in name for part in FREE)]
    refused = refused or [
        f"{name} {mine} here, {other} in init" for name, (mine, other) in _settings(model, source)
    ]
    if refused:
        more = f"; and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        raise UsageError(
            f"init must be weights of the same network: {'; '.join(refused[:SHOWN])}{more}"
        )
    model.load_state_dict(own | {name: given[name] for name in fitting})
    if _noise(model) != _noise(source):
        warn_user(f"noise is {_noise(model)} here and {_noise(source)} in init")
    return [text for name, text in different.items() if name in own]


def _shape(state: dict[str, object], name: str) -> str:
    found = state.get(name)
    return "none" if found is None else str(tuple(getattr(found, "shape", ())))


def decoder_of(
    init: str | None,
    *,
    training: TrainingDistribution,
    loss_space: LossSpace = "velocity",
    prediction: Prediction | None = None,
    latents: bool | None = None,
    trust: object = None,
) -> Decoder:
    """The decoder that a training starts from, to be trained for other settings.

    Args:
        init: a run, a checkpoint or a repository on the Hub.
        training: the settings that training draws from now on.
        loss_space: the space of the squared error from now on.
        prediction: what the network predicts, if that is to be checked.
        latents: whether its images are latents from now on; None for as before.
        trust: packages whose classes it may name.

    Raises:
        UsageError: if there are no such weights, or they predict something else.
    """
    if init is None:
        raise UsageError("init must be given with decoder=init, got null")
    source = read_init(init, Decoder, trust=trust)
    if prediction not in (None, source.prediction):
        raise UsageError(
            f"decoder.prediction must be that of the weights of init, {source.prediction}, got "
            f"{prediction}; where a recipe for the data has set it, ~recipe leaves that out"
        )
    changed: dict[str, Any] = {"training": training, "loss_space": loss_space}
    if latents is not None:
        changed["latents"] = latents
    return Decoder(**source.train().config | changed)


def read_init(init: str, kind: type[M], *, trust: object = None) -> M:
    """The model that a training starts from.

    Raises:
        UsageError: if there is none, or it is of another kind.
    """
    try:
        return read_checkpoint(init, kind, trusted=trusted_prefixes(trust))
    except UsageError as error:  # which speaks of a checkpoint
        raise UsageError(f"init must be weights to start from: {error}") from error


def _settings(model: Pretrained, source: Pretrained) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The settings of two networks that must agree and do not."""
    ours, theirs = (
        getattr(getattr(getattr(each, "decoder", each), "backbone", None), "config", {})
        for each in (model, source)
    )
    for name in sorted(ours.keys() - SETTINGS):
        if ours[name] != theirs.get(name):
            yield name, (ours[name], theirs.get(name))


def _prediction(model: Pretrained) -> object:
    return getattr(getattr(model, "decoder", model), "prediction", None)


def _noise(model: Pretrained) -> object:
    return getattr(getattr(model, "decoder", model), "noise", None)
