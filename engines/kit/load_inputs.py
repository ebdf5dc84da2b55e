"""Golden inputs for a bfloat16 engine: `polygraphy run --data-loader-script kit/load_inputs.py`.

NumPy has no bfloat16, so the golden files hold such values as float32, exactly, and PyTorch narrows them.
KIT_INPUTS names the file.
"""

import os

import numpy as np
import torch
from polygraphy.json import load_json


def load_data():
    """One set of inputs a run, by name."""
    for feeds in load_json(os.environ["KIT_INPUTS"]):
        yield {name: _tensor(values) for name, values in feeds.items()}


def _tensor(values):
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
