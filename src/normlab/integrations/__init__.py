"""The norms by their names in other people's factories: MONAI, mmcv and timm; and a trainer for nnU-Net.

Every norm gets two names there: `running` and `normlab_running`. Where the library has a name already, as MONAI has
`batch`, `group`, `instance` and `layer`, the short one stays the library's, and its configurations mean what they did.
So `normlab_group` is always the norm of this package.

Two norms are left out, `mabn` and `group_ws`: they need a convolution of their own, which a factory of norms cannot
give. Norms that are the activation too, `evonorm_b0`, `evonorm_s0` and `filter_response`, want a net without another
one, such as MONAI's with `act=""`.
"""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..nn import NORMS, build_norm
from ..nn.registry import CONVS

__all__ = ["NNUNET", "PREFIX", "register_mmcv", "register_monai", "register_timm"]

PREFIX = "normlab_"
NNUNET = Path(__file__).parent / "nnunet"  # the folder to put into nnU-Net's variable nnUNet_extTrainer


def register_monai() -> list[str]:
    """Add the norms to MONAI's `Norm`, for 1, 2 and 3 space dimensions. A second call adds what is new since.

    Returns:
        The names that were added.

    Raises:
        ImportError: MONAI is not installed.

    Example:
        >>> from monai.networks.nets import UNet
        >>> names = register_monai()
        >>> net = UNet(3, 1, 2, channels=(4, 8), strides=(2,), norm=("running", {"momentum": 0.05}))
    """
    from monai.networks.layers.factories import Norm as factory

    def add(name: str, registered: str) -> None:
        norm = NORMS[registered]
        factory.add_factory_callable(name, lambda dims: norm.layers[dims - 1], norm.summary)

    return _add_all(add, factory.names, str.upper)


def register_mmcv() -> list[str]:
    """Add the norms to the registry that mmcv, mmdet and mmseg take them from: `norm_cfg=dict(type="running")`.

    `running` and `running2d` have two space dimensions, `running1d` and `running3d` one and three. mmcv calls `running`
    and other batch norms `bn1`, `bn2`, … in a net, as its own, so that pretrained weights load.

    Returns:
        The names that were added, without the `1d`, `2d` and `3d`.

    Raises:
        ImportError: mmengine is not installed.
    """
    from mmengine.registry import MODELS  # pyright: ignore[reportMissingImports]

    def add(name: str, registered: str) -> None:
        for suffix, dims in (("", 2), ("1d", 1), ("2d", 2), ("3d", 3)):
            MODELS.register_module(name=name + suffix, module=_as_class(registered, dims))

    return _add_all(add, MODELS.module_dict)


def register_timm() -> list[str]:
    """Add the norms to timm's names: `timm.create_model("resnet18", norm_layer="running")`.

    Nets whose layers are norm and activation in one, such as EfficientNet, take no other norm by name. Convert them
    when they are built: `normlab.convert(net, "running")`.

    Returns:
        The names that were added.

    Raises:
        ImportError: timm is not installed.
    """
    from timm.layers import create_norm  # pyright: ignore[reportMissingImports]

    names = create_norm._NORM_MAP  # timm has no public way to add one

    def add(name: str, registered: str) -> None:
        names[_in_timm(name)] = NORMS[registered].layers[1]

    return _add_all(add, names, _in_timm)


def _in_timm(name: str) -> str:
    """How timm spells a name before it looks it up."""
    return name.replace("_", "").lower()


def _add_all(add: Callable[[str, str], None], taken: Iterable[str], spelled: Callable[[str], str] = str) -> list[str]:
    """Call `add` with each name that is free, and the name of the norm here.

    Args:
        add: adds a name.
        taken: those that the library has.
        spelled: how the library writes a name.

    Returns:
        The names that were added.
    """
    taken, added = set(taken), []
    for norm in NORMS:
        if NORMS[norm].convs != CONVS or spelled(PREFIX + norm) in taken:
            continue
        for name in (norm, PREFIX + norm):
            if spelled(name) not in taken:
                add(name, norm)
                added.append(name)
    return added


def _as_class(norm: str, dims: int) -> type:
    """A class whose call builds the norm. mmcv takes no functions, and gives every norm an eps, needed or not."""
    layer = NORMS[norm].layers[dims - 1]
    parameters = inspect.signature(layer).parameters
    takes_eps = "eps" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())

    def build(cls: type, num_features: int, **options: Any) -> nn.Module:
        if not takes_eps:
            options.pop("eps", None)
        return build_norm(norm, num_features, dims, **options)

    name = type(build_norm(norm, 8, dims)).__name__  # of it mmcv makes the short name: bn1 of RunningBatchNorm2d
    return type(name, (), {"__new__": build, "__doc__": NORMS[norm].summary})
