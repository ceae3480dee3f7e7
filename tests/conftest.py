"""Torch on one thread and hypothesis without deadlines, so that results depend neither on the number of cores nor on how busy they are."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("headwise", deadline=None, derandomize=True)
settings.load_profile("headwise")
