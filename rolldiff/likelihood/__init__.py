"""Likelihood: bits per dimension of images, as a function of groups, order and overlap.

For given data the groups can be teacher-forced (`teacher.py`): the clean groups before a window of
moving ones are known, so all windows of an image move in one call and the cost does not grow with
the number of groups. For an ideal network all settings have the same likelihood (the chain rule,
and the multivariate I-MMSE relation), so every difference between settings is the network's.

Images of so many levels have a probability, from the density of what lies between two levels:
uniform noise, a truncated normal distribution (Zheng et al. 2023, i-DODE, §4.1), or for the bound
the probability of each level given a noisy value (Kingma et al. 2021, VDM, eq. 8).
"""

from rolldiff.likelihood.config import Likelihood, LikelihoodConfig
from rolldiff.likelihood.evaluate import log_likelihood
from rolldiff.likelihood.flow import encode
from rolldiff.likelihood.teacher import Teacher

__all__ = ["Likelihood", "LikelihoodConfig", "Teacher", "encode", "log_likelihood"]
