"""A module's weight where the module itself is not called."""

from __future__ import annotations

import torch
from torch.nn import Parameter


def ready_weight(module: torch.nn.Module) -> Parameter:
    """The weight of a module whose forward pass is not called.

    With --overlap-param-gather the engine waits for a module's weights in a hook before that call: elsewhere the
    weight may still be the last step's, or in the middle of its collective.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    return module.weight
