"""Every network of MONAI, small, in two and three dimensions, with batch norm where it can have it."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.networks import nets
from torch import Tensor, nn

BATCH = {"norm": "batch"}
BATCH_NAME = {"norm_name": ("BATCH", {"affine": True})}
BERT = SimpleNamespace(
    hidden_size=8,
    num_attention_heads=2,
    attention_probs_dropout_prob=0.0,
    hidden_dropout_prob=0.0,
    layer_norm_eps=1e-12,
)


def images(dims: int, side: int = 16, channels: int = 1, number: int = 2) -> Tensor:
    """Images of noise, `(number, channels, side, …)`."""
    return torch.randn(number, channels, *[side] * dims)


def one(side: int = 16, channels: int = 1) -> Callable[[int], tuple[Any, ...]]:
    """The inputs of a network that takes images alone."""
    return lambda dims: (images(dims, side, channels),)


class Network(NamedTuple):
    """How to build a network for a number of space dimensions, its inputs, and the numbers of dimensions to try."""

    build: Callable[[int], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]] = one()
    dims: tuple[int, ...] = (2, 3)


def dints(space: type[nn.Module]) -> Callable[[int], nn.Module]:
    """A network of two blocks and two depths with every cell, for search or for use."""
    options = {"channel_mul": 0.25, "num_blocks": 2, "num_depths": 2, "norm_name": "batch"}

    def build(dims: int) -> nn.Module:
        code = None if space is nets.TopologySearch else [np.ones((2, 4), dtype=int), np.ones((2, 4), dtype=int)]
        cells = space(arch_code=code, spatial_dims=dims, **options)
        return nets.DiNTS(cells, 1, 2, norm_name="batch", spatial_dims=dims, node_a=torch.ones(3, 2))

    return build


def vista(_: int) -> nn.Module:
    from monai.networks.nets.vista3d import ClassMappingClassify, PointMappingSAM

    encoder = nets.SegResNetDS2(3, 8, 1, 8, blocks_down=(1, 1), **BATCH)
    return nets.VISTA3D(encoder, ClassMappingClassify(8, 8), PointMappingSAM(8, n_classes=8, last_supported=4))


def voxel_morph_unet(dims: int) -> nn.Module:
    return nets.VoxelMorphUNet(dims, 2, dims, (4, 8, 8, 8), (4, 4), **BATCH)


def diffusion(net: type[nn.Module], **options: Any) -> Callable[[int], nn.Module]:
    small = {"num_res_blocks": 1, "channels": (8, 8), "attention_levels": (False, True), "norm_num_groups": 4}
    return lambda dims: net(dims, in_channels=1, num_head_channels=4, **small, **options)


def autoencoder(net: type[nn.Module], **options: Any) -> Callable[[int], nn.Module]:
    small = {"num_res_blocks": 1, "channels": (8, 8), "attention_levels": (False, True), "norm_num_groups": 4}
    return lambda dims: net(dims, **small, **options)


def densenet(net: type[nn.Module]) -> Network:
    small = {"init_features": 8, "growth_rate": 4, "block_config": (2, 2)}
    return Network(lambda dims: net(spatial_dims=dims, in_channels=1, out_channels=3, **small))


def senet(net: type[nn.Module], **options: Any) -> Network:
    small = {"layers": (1, 1, 1, 1), "in_channels": 1, "num_classes": 3, "inplanes": 16, **options}
    return Network(lambda dims: net(spatial_dims=dims, **small))


def efficientnet(net: type[nn.Module]) -> Network:
    return Network(lambda dims: net("efficientnet-b0", pretrained=False, spatial_dims=dims, in_channels=1), one(32))


def resnet(dims: int) -> nn.Module:
    return nets.ResNet("basic", [1, 1, 1, 1], [4, 8, 8, 16], dims, 1, num_classes=3)


def mil_backbone() -> nn.Module:
    net = resnet(2)
    net.fc = nn.Identity()
    return net


def features(net: type[nn.Module]) -> Network:
    return Network(lambda dims: net("resnet10", pretrained=False, spatial_dims=dims, in_channels=1))


def transformer(dims: int) -> dict[str, Any]:
    return {"hidden_size": 12, "mlp_dim": 16, "num_heads": 2, "spatial_dims": dims, "img_size": [16] * dims}


def transformer_decoder() -> dict[str, Any]:
    return {"decoder_hidden_size": 12, "decoder_mlp_dim": 16, "decoder_num_layers": 1, "decoder_num_heads": 2}


def words(*sizes: int) -> Callable[[int], tuple[Any, ...]]:
    return lambda _: tuple(torch.randn(2, size, 8) for size in sizes)


def channels_last(dims: int) -> tuple[Any, ...]:
    return (images(dims, 4, 4).movedim(1, -1),)


def pair(dims: int) -> tuple[Any, ...]:
    return images(dims), images(dims)


def timed(dims: int) -> tuple[Any, ...]:
    return images(dims), torch.tensor([3, 50])


def classes(dims: int) -> Tensor:
    """A map of three classes, one-hot."""
    return nn.functional.one_hot(torch.randint(3, (2, *[16] * dims)), 3).movedim(-1, 1).float()


NETWORKS = {
    "AHNet": Network(lambda d: nets.AHNet((1, 1, 1, 1), d, 1, 2, 2, "trilinear" if d == 3 else "bilinear"), one(32)),
    "AttentionUnet": Network(lambda d: nets.AttentionUnet(d, 1, 2, (4, 8, 16), (2, 2))),
    "AutoEncoder": Network(
        lambda d: nets.AutoEncoder(d, 1, 1, (4, 8), (2, 2), num_res_units=1, inter_channels=[8, 8], **BATCH)
    ),
    "AutoencoderKL": Network(autoencoder(nets.AutoencoderKL)),
    "BasicUNet": Network(lambda d: nets.BasicUNet(d, 1, 2, (4, 4, 8, 8, 16, 4), **BATCH)),
    "BasicUNetPlusPlus": Network(
        lambda d: nets.BasicUNetPlusPlus(d, 1, 2, (4, 4, 8, 8, 16, 4), deep_supervision=True, **BATCH)
    ),
    "BertAttention": Network(lambda _: nets.BertAttention(BERT), words(4, 5), (1,)),
    "BertMixedLayer": Network(lambda _: nets.BertMixedLayer(BERT), words(4, 5), (1,)),
    "BertOutput": Network(lambda _: nets.BertOutput(BERT), words(4, 4), (1,)),
    "Classifier": Network(lambda d: nets.Classifier((1, *[16] * d), 3, (4, 8), (2, 2), **BATCH)),
    "ControlNet": Network(
        diffusion(nets.ControlNet, conditioning_embedding_num_channels=(8,)), lambda d: (*timed(d), images(d))
    ),
    "Critic": Network(lambda d: nets.Critic((1, *[16] * d), (4, 8), (2, 2), **BATCH)),
    "DecoderOnlyTransformer": Network(
        lambda _: nets.DecoderOnlyTransformer(8, 6, 8, 2, 2), lambda _: (torch.randint(8, (2, 6)),), (1,)
    ),
    "DenseNet": densenet(nets.DenseNet),
    "DenseNet121": densenet(nets.DenseNet121),
    "DenseNet169": densenet(nets.DenseNet169),
    "DenseNet201": densenet(nets.DenseNet201),
    "DenseNet264": densenet(nets.DenseNet264),
    "DiffusionModelUNet": Network(diffusion(nets.DiffusionModelUNet, out_channels=1), timed),
    "DiNTS": Network(dints(nets.TopologySearch)),
    "Discriminator": Network(lambda d: nets.Discriminator((1, *[16] * d), (4, 8), (2, 2), **BATCH)),
    "DynUNet": Network(
        lambda d: nets.DynUNet(d, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], [4, 8, 8], **BATCH_NAME, res_block=True)
    ),
    "EfficientNet": Network(
        lambda d: nets.EfficientNet(["r1_k3_s11_e1_i32_o8_se0.25", "r2_k3_s22_e2_i8_o8_se0.25"], d, 1, 3, image_size=16)
    ),
    "EfficientNetBN": efficientnet(nets.EfficientNetBN),
    "EfficientNetBNFeatures": efficientnet(nets.EfficientNetBNFeatures),
    "EfficientNetEncoder": efficientnet(nets.EfficientNetEncoder),
    "FlexibleUNet": Network(
        lambda d: nets.FlexibleUNet(1, 2, "resnet10", decoder_channels=(8, 8, 8, 4, 4), spatial_dims=d), one(32)
    ),
    "FullyConnectedNet": Network(lambda _: nets.FullyConnectedNet(4, 2, (8, 8)), lambda _: (torch.randn(2, 4),), (1,)),
    "Generator": Network(
        lambda d: nets.Generator((8,), (4, *[4] * d), (4, 1), (2, 2), **BATCH), lambda _: (torch.randn(2, 8),)
    ),
    "GlobalNet": Network(lambda d: nets.GlobalNet([16] * d, d, 1, 4, 2)),
    "HighResBlock": Network(lambda d: nets.HighResBlock(d, 1, 4)),
    "HighResNet": Network(lambda d: nets.HighResNet(d, 1, 2), one(8)),
    "HoVerNet": Network(lambda _: nets.HoVerNet(out_classes=3), lambda _: (images(2, 256, 3, number=1),), (2,)),
    "LocalNet": Network(lambda d: nets.LocalNet(d, 1, 4, (0, 1, 2))),
    "MaskedAutoEncoderViT": Network(
        lambda d: nets.MaskedAutoEncoderViT(1, patch_size=8, num_layers=1, **transformer(d), **transformer_decoder())
    ),
    "MedNeXt": Network(
        lambda d: nets.MedNeXt(
            d, 4, 1, 2, kernel_size=3, blocks_down=(1, 1), blocks_bottleneck=1, blocks_up=(1, 1), deep_supervision=True
        )
    ),
    "MILModel": Network(
        lambda _: nets.MILModel(2, "att_trans", backbone=mil_backbone(), backbone_num_features=16, trans_blocks=1),
        lambda _: (torch.randn(2, 3, 1, 16, 16),),
        (2,),
    ),
    "MultiScalePatchDiscriminator": Network(
        lambda d: nets.MultiScalePatchDiscriminator(2, 1, d, 4, 1, kernel_size=3, minimum_size_im=16)
    ),
    "NaViT": Network(
        lambda d: nets.NaViT([16] * d, 8, 3, 12, 16, 1, 2, spatial_dims=d),
        lambda d: ([[images(d)[0], images(d, 8)[0]], [images(d)[0]]],),
    ),
    "NetAdapter": Network(lambda d: nets.NetAdapter(resnet(d), 2, d, pool=None)),
    "PatchDiscriminator": Network(lambda d: nets.PatchDiscriminator(d, 4, 1, num_layers_d=2)),
    "PatchMerging": Network(
        lambda d: nets.PatchMerging(4, spatial_dims=d), lambda d: (images(d, 4, 4).movedim(1, -1),)
    ),
    "PatchMergingV2": Network(
        lambda d: nets.PatchMergingV2(4, spatial_dims=d), lambda d: (images(d, 4, 4).movedim(1, -1),)
    ),
    "Pooler": Network(lambda _: nets.Pooler(8), words(4), (1,)),
    "Quicknat": Network(lambda _: nets.Quicknat(2, 1, 4, act="RELU", adn_ordering="NA", **BATCH), one(32), (2,)),
    "RegUNet": Network(lambda d: nets.RegUNet(d, 1, 4, 2)),
    "Regressor": Network(lambda d: nets.Regressor((1, *[16] * d), (2,), (4, 8), (2, 2), **BATCH)),
    "ResNet": Network(resnet),
    "ResNetBlock": Network(lambda d: nets.ResNetBlock(4, 4, d), one(8, 4)),
    "ResNetBottleneck": Network(lambda d: nets.ResNetBottleneck(16, 4, d), one(8, 16)),
    "ResNetEncoder": features(nets.ResNetEncoder),
    "ResNetFeatures": features(nets.ResNetFeatures),
    "SegResNet": Network(lambda d: nets.SegResNet(d, 4, 1, 2, **BATCH)),
    "SegResNetDS": Network(lambda d: nets.SegResNetDS(d, 4, 1, 2, dsdepth=2, **BATCH)),
    "SegResNetDS2": Network(lambda d: nets.SegResNetDS2(d, 4, 1, 2, dsdepth=2, **BATCH)),
    "SegResNetVAE": Network(lambda d: nets.SegResNetVAE([16] * d, spatial_dims=d, init_filters=8, vae_nz=8, **BATCH)),
    "SENet": senet(partial(nets.SENet, block="se_bottleneck", groups=64, reduction=16), downsample_kernel_size=1),
    "SENet154": senet(nets.SENet154, downsample_kernel_size=1),
    "SEResNet50": senet(nets.SEResNet50),
    "SEResNet101": senet(nets.SEResNet101),
    "SEResNet152": senet(nets.SEResNet152),
    "SEResNext50": senet(nets.SEResNext50, groups=2),
    "SEResNext101": senet(nets.SEResNext101, groups=2),
    "SPADEAutoencoderKL": Network(
        autoencoder(nets.SPADEAutoencoderKL, label_nc=3, spade_intermediate_channels=8),
        lambda d: (images(d), classes(d)),
    ),
    "SPADEDiffusionModelUNet": Network(
        diffusion(nets.SPADEDiffusionModelUNet, out_channels=1, label_nc=3, spade_intermediate_channels=8),
        lambda d: (*timed(d), classes(d)),
    ),
    "SPADENet": Network(
        lambda d: nets.SPADENet(d, 1, 1, 3, [16] * d, [8, 4], z_dim=4, spade_intermediate_channels=8, **BATCH),
        lambda d: (classes(d), images(d)),
    ),
    "SwinUNETR": Network(
        lambda d: nets.SwinUNETR(1, 2, 2, (1,) * 4, (1, 1, 2, 2), 2, **BATCH_NAME, feature_size=12, spatial_dims=d),
        one(32),
    ),
    "TopologyInstance": Network(dints(nets.TopologyInstance)),
    "UNet": Network(lambda d: nets.UNet(d, 1, 2, (4, 8, 16), (2, 2), num_res_units=2, **BATCH)),
    "UNETR": Network(lambda d: nets.UNETR(1, 2, feature_size=4, **BATCH_NAME, **transformer(d))),
    "VarAutoEncoder": Network(lambda d: nets.VarAutoEncoder(d, (1, *[16] * d), 1, 4, (4, 8), (2, 2), **BATCH)),
    "VarFullyConnectedNet": Network(
        lambda _: nets.VarFullyConnectedNet(4, 4, 2, (8,), (8,)), lambda _: (torch.randn(2, 4),), (1,)
    ),
    "VISTA3D": Network(vista, lambda d: (images(d, number=1), None, None, None, torch.tensor([[1], [2]])), (3,)),
    "ViT": Network(lambda d: nets.ViT(1, patch_size=8, num_layers=1, classification=True, **transformer(d))),
    "ViTAutoEnc": Network(lambda d: nets.ViTAutoEnc(1, patch_size=4, num_layers=1, deconv_chns=4, **transformer(d))),
    "VNet": Network(lambda d: nets.VNet(d, 1, 2, dropout_dim=d)),
    "VoxelMorph": Network(lambda d: nets.VoxelMorph(voxel_morph_unet(d), spatial_dims=d), pair),
    "VoxelMorphUNet": Network(voxel_morph_unet, lambda d: (images(d, channels=2),)),
    "VQVAE": Network(
        lambda d: nets.VQVAE(
            d, 1, 1, (4, 4), 1, (4, 4), ((2, 4, 1, 1),) * 2, ((2, 4, 1, 1, 0),) * 2, num_embeddings=8, embedding_dim=4
        )
    ),
}
# Networks without batch norm, and why.
WITHOUT_BATCH_NORM = {
    "AutoencoderKL": "group norm",
    "BertAttention": "no norm",
    "BertMixedLayer": "layer norm",
    "BertOutput": "layer norm",
    "ControlNet": "group norm",
    "DecoderOnlyTransformer": "layer norm",
    "DiffusionModelUNet": "group and layer norm",
    "FullyConnectedNet": "no norm",
    "MaskedAutoEncoderViT": "layer norm",
    "MedNeXt": "group norm, or layer norm",
    "NaViT": "layer and RMS norm",
    "PatchMerging": "layer norm",
    "PatchMergingV2": "layer norm",
    "Pooler": "no norm",
    "Quicknat": "instance norm, whatever norm it is given",
    "SPADEAutoencoderKL": "group and instance norm",
    "SPADEDiffusionModelUNet": "group, instance and layer norm",
    "VarFullyConnectedNet": "no norm",
    "ViT": "layer norm",
    "ViTAutoEnc": "layer norm",
    "VQVAE": "no norm",
}
# Networks that are not built, and why.
MISSING = {
    "BertPreTrainedModel": "abstract: has no layers and no forward",
    "DAF3D": "needs torchvision",
    "HyenaNDUNETR": "needs nvsubquadratic",
    "MultiModal": "needs transformers",
    "TopologyConstruction": "abstract: has no forward",
    "TopologySearch": "the inside of DiNTS, see there",
    "TorchVisionFCModel": "needs torchvision",
    "Transchex": "needs transformers, and weights from a hub",
}


def public() -> set[str]:
    """The names of MONAI's network classes, without aliases."""
    return {kind.__name__ for kind in vars(nets).values() if isinstance(kind, type) and issubclass(kind, nn.Module)}
