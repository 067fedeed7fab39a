"""What is swept: the settings of a decode, and which steps make them cost the same.

A setting that differs from another only in what does not matter (the overlap of one group, an
overlap that rounds to the same stagger) is the same setting and is measured once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from rolldiff import cost
from rolldiff.grouping import Grouping
from rolldiff.schedule import RollingSchedule

__all__ = ["Match", "Setting", "counted", "grid", "groups_in_words", "matched"]

Match = Literal["nfe", "tokens", "seconds"]


@dataclass(frozen=True)
class Setting:
    """How a cell decodes; see `Decoder.decode`. `step` is the name of a leaf of `conf/step`."""

    num_groups: int
    overlap: float
    steps: int
    order: str
    step: str = "euler"
    guidance: float = 0.0

    def same_but_steps(self) -> "Setting":
        """What stays when only the steps change."""
        return replace(self, steps=0)

    def words(self) -> str:
        """The setting in a few words; what is usual is left out."""
        groups = groups_in_words(self.num_groups, self.overlap)
        return ", ".join([groups, f"{self.steps} steps", *self.manner()])

    def manner(self) -> list[str]:
        """Order, step rule and guidance, as far as they are not the usual ones."""
        words = []
        if self.num_groups > 1 and self.order != "top_to_bottom":
            words.append(self.order)
        if self.step != "euler":
            words.append(self.step)
        if self.guidance:
            words.append(f"guidance {self.guidance:g}")
        return words

    def as_dict(self) -> dict[str, Any]:
        """The settings as flat keys."""
        return asdict(self)


def groups_in_words(num_groups: int, overlap: float) -> str:
    """Groups and overlap; one group has none."""
    return f"{num_groups} groups, overlap {overlap:g}" if num_groups > 1 else "1 group"


def grid(
    num_tokens: int,
    *,
    num_groups: Sequence[int],
    overlap: Sequence[float],
    steps: Sequence[int],
    order: Sequence[str],
    step: Sequence[str],
    guidance: Sequence[float],
    joint_steps: Sequence[int] = (),
) -> list[Setting]:
    """All combinations, each once.

    Args:
        num_tokens: of the decoder.
        num_groups: see `Setting`, as all that follow.
        overlap: of the schedule.
        steps: solver steps a group.
        order: of the decode.
        step: the solver step.
        guidance: towards the condition.
        joint_steps: more steps for one group, which has no other way to spend as many calls as
            several do.

    Raises:
        ValueError: if a value is out of range or a list is empty.
    """
    swept = {
        "num_groups": num_groups,
        "overlap": overlap,
        "steps": steps,
        "order": order,
        "step": step,
        "guidance": guidance,
    }
    for name, values in swept.items():
        if not values:
            raise ValueError(f"bench.{name} must hold a value at least, got none")
    found: dict[tuple[object, ...], Setting] = {}
    every = [*steps, *(s for s in joint_steps if s not in steps)]
    for g, s, o, way, rule, w in product(num_groups, every, overlap, order, step, guidance):
        if g > 1 and s not in steps:
            continue
        Grouping(num_tokens, g)
        stagger = RollingSchedule(g, o).stagger(s)
        # One group knows neither overlap nor order.
        setting = Setting(g, o, s, way, rule, w) if g > 1 else Setting(1, 0.0, s, order[0], rule, w)
        found.setdefault((g, stagger if g > 1 else 0, s, setting.order, rule, w), setting)
    return list(found.values())


def matched(
    settings: Sequence[Setting],
    match: Match,
    *,
    counts: Callable[[Setting], tuple[int, int]],
    seconds: Callable[[Setting], tuple[float, float]] | None = None,
) -> list[Setting]:
    """The same settings, with the steps that bring each to the costs of one group.

    The budgets are what one group costs at each of the steps asked for. A setting gets the steps
    that bring it nearest; one that stays off by more than half of the budget is left out.

    Args:
        settings: from `grid`.
        match: which cost.
        counts: `nfe` and `tokens` of a setting, exact.
        seconds: offset and slope of its seconds over its steps, measured; for `seconds` only.

    Raises:
        ValueError: if one group is not among the settings.
    """
    joint = [setting for setting in settings if setting.num_groups == 1]
    if not joint:
        raise ValueError("bench.match must have num_groups 1 among bench.num_groups, got none")

    def cost_of(setting: Setting) -> float:
        if seconds is not None:
            offset, slope = seconds(setting.same_but_steps())
            return offset + slope * setting.steps
        return float(counts(setting)[0 if match == "nfe" else 1])

    found: dict[Setting, None] = {}
    for setting in settings:
        same = [j for j in joint if (j.steps, j.step) == (setting.steps, setting.step)]
        budget = cost_of(next((j for j in same if j.guidance == setting.guidance), same[0]))
        # Twice the steps and more: a setting may take fewer seconds a step than one group.
        tried = [replace(setting, steps=steps) for steps in range(1, 3 * setting.steps)]
        off = {trial: abs(math.log(cost_of(trial) / budget)) for trial in tried}
        nearest = min(tried, key=off.__getitem__)
        if off[nearest] < math.log(1.5):
            found[nearest] = None
    return list(found)


def counted(setting: Setting, num_tokens: int, *, calls: int, causal: bool) -> tuple[int, int]:
    """`nfe` and `tokens` of a setting, by the closed formula."""
    return cost.predict(
        num_tokens,
        RollingSchedule(setting.num_groups, setting.overlap),
        setting.steps,
        calls=calls,
        guidance=setting.guidance != 0,
        causal=causal,
    )
