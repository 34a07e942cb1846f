"""What the process imports that workers are forked from: slow to import, and starts nothing."""

from __future__ import annotations

import contextlib

with contextlib.suppress(ImportError):
    import numpy as numpy
    import torch as torch

from . import worker as worker
