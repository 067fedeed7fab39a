"""Quality against cost: a sweep over the settings of a decode, and a report."""

from rolldiff.bench.run import bench

__all__ = ["bench"]
