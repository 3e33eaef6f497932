"""Which parameters weight decay pulls towards 0, and which it spares."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ..errors import check, check_no_class, is_real

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer: weights that decay, and norms and biases that do not.

    γ and β of a norm set the scale of what follows, and decay would shrink it. Spared are all parameters of torch's
    norms, all biases, and all parameters of one dimension or none, as those of other people's norms are.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        >>> groups = parameter_groups(model, weight_decay=0.01)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.01), (3, 0.0)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)

    Args:
        model: any module; its parameters that do not learn are left out.
        weight_decay: of the first group.

    Returns:
        The groups that have parameters, each parameter once, in the order of the model.

    Raises:
        InputError: an argument cannot be used, or a parameter is not made yet.
    """
    check_no_class("model", model)
    check(isinstance(model, nn.Module), "model", type(model).__name__, "a torch.nn.Module")
    check(is_real(weight_decay) and weight_decay >= 0, "weight_decay", weight_decay, "a number from 0")
    lazy = [name for name, part in model.named_parameters() if is_lazy(part)]
    check(not lazy, "model", ", ".join(lazy), "one whose parameters are all there: run a batch through it first")
    of_norms = {id(part) for module in model.modules() if isinstance(module, NORMS) for part in module.parameters()}
    decaying, spared = [], []
    for name, part in model.named_parameters():
        if part.requires_grad:
            spare = part.dim() <= 1 or name.split(".")[-1] == "bias" or id(part) in of_norms
            (spared if spare else decaying).append(part)
    groups = {"params": decaying, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}
    return [group for group in groups if group["params"]]
