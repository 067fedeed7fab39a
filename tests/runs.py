"""What the tests of trainings share: their settings, composed, and the warnings that they allow."""

import pytest
from hydra import compose, initialize_config_dir

from rolldiff.cli import config_dir

# Lightning's own, about short trainings and about those that are resumed.
ALLOWED = pytest.mark.filterwarnings(
    "ignore::UserWarning:lightning",
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:Checkpoint directory",
    "ignore:You're resuming from a checkpoint",
)


def composed(*overrides):
    """The configuration of `rolldiff train` with these settings."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", list(overrides))
