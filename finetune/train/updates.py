"""Updating each weight in the backward pass.

Full fine-tuning holds a gradient for every weight until the optimiser has used it: 15 GB of a 7B model in bf16. Used
and freed where the backward pass completes it (Lv et al. 2023, LOMO, arXiv:2306.09782), there are never more than a
few. The norm of all gradients is then unknown when the first one is used, so that nothing can be clipped.
"""

from __future__ import annotations

import weakref
from types import MethodType

import torch


def update_in_backward(optimizer: torch.optim.Optimizer) -> None:
    """From now on each weight is updated as soon as its gradient is complete, and the gradient freed; the optimiser's
    own `step` does nothing. Moments, learning rates and saved states are those of the optimiser as before."""
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            parameter.register_post_accumulate_grad_hook(_updating(weakref.ref(optimizer), number))
    # A method, because schedulers of learning rates wrap it as one.
    optimizer.step = MethodType(lambda self, closure=None: None, optimizer)


def _updating(reference: weakref.ref[torch.optim.Optimizer], group: int):
    # Weakly: a weight that holds what holds the weight would stay on the GPU when its model is gone.
    @torch.no_grad()
    def hook(parameter: torch.nn.Parameter) -> None:
        optimizer = reference()
        # Looked up anew: whoever loads a state replaces the groups.
        groups = optimizer.param_groups
        optimizer.param_groups = [{**groups[group], "params": [parameter]}]
        type(optimizer).step(optimizer)
        optimizer.param_groups = groups
        parameter.grad = None

    return hook
