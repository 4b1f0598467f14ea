"""The networks of `fastres bench coverage`: of torchvision, timm, transformers, and by hand.

All are built from their constructors or configurations with random weights; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from fastres.cli.errors import CommandError
from fastres.cli.libraries import library

from .conditions import ROOT

#: Images that networks are run on: [2, 3, SIZE, SIZE].
SIZE = 64


def _torchvision(name: str) -> nn.Module:
    return library("torchvision.models").get_model(name, weights=None)


def _segmentation(name: str) -> nn.Module:
    module = library("torchvision.models.segmentation")
    return getattr(module, name)(weights=None, weights_backbone=None, num_classes=5)


def _detection_backbone(name: str) -> nn.Module:
    """As the weights of detectors build it: with frozen norms."""
    backbones = library("torchvision.models.detection.backbone_utils")
    return backbones.resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=3)


def _timm(name: str, **options: Any) -> nn.Module:
    return library("timm").create_model(name, pretrained=False, **options)


def _frozen(name: str) -> nn.Module:
    """With the norms of its first stages frozen, as for fine-tuning."""
    model = _timm(name)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    library("timm.utils").freeze(model, names[: len(names) // 2], include_bn_running_stats=True)
    return model


def _from_config(kind: str, name: str, **options: Any) -> nn.Module:
    library("torchvision")  # transformers imports it too, but does not survive a broken one
    transformers = library("transformers")
    config = getattr(transformers, f"{name}Config")(**options)
    return (
        getattr(transformers, kind).from_config(config)
        if kind.startswith("Auto")
        else getattr(transformers, kind)(config)
    )


def _resnet_config(**options: Any) -> Any:
    return library("transformers").ResNetConfig(**options)


_SMALL: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64}  # fmt: skip


def _detr(name: str) -> nn.Module:
    backbone = _resnet_config(out_features=["stage4"])
    options = {**_SMALL, "use_timm_backbone": False, "backbone_config": backbone}
    options |= {"backbone": None, "use_pretrained_backbone": False}
    return _from_config(f"{name}Model", name, **options)


def _upernet() -> nn.Module:
    backbone = _resnet_config(out_features=["stage1", "stage2", "stage3", "stage4"])
    return _from_config("UperNetForSemanticSegmentation", "UperNet", backbone_config=backbone,
        hidden_size=32, auxiliary_in_channels=1024, num_labels=5)  # fmt: skip


def _maskformer() -> nn.Module:
    transformers = library("transformers")
    backbone = _resnet_config(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = transformers.MaskFormerConfig(
        backbone_config=backbone, decoder_config=transformers.DetrConfig(**_SMALL),
        fpn_feature_size=32, mask_feature_size=32,
    )  # fmt: skip
    return transformers.MaskFormerModel(config)


def _rt_detr() -> nn.Module:
    return _from_config("RTDetrModel", "RTDetr", num_queries=10, decoder_layers=1)


def _by_hand(name: str) -> nn.Module:
    """A stem and blocks as tests/handwritten.py has them."""
    folder = ROOT.parent / "tests"
    if not (folder / "handwritten.py").is_file():
        raise CommandError(f"blocks written by hand must be in {folder}, got no handwritten.py")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module("handwritten").network(name)


_TORCHVISION = (
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "vgg16_bn",
    "regnet_x_400mf", "regnet_y_400mf", "googlenet", "mobilenet_v2", "mobilenet_v3_small",
    "efficientnet_b0", "shufflenet_v2_x1_0", "mnasnet1_0",
)  # fmt: skip
_SEGMENTATION = ("fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large")
_TIMM = (
    "resnet18", "resnet50", "resnet50c", "resnet50d", "resnet50s", "resnet50t", "resnet26d",
    "resnext50_32x4d", "resnetaa50", "resnetaa50d", "resnetblur50", "seresnet50", "seresnet50t",
    "seresnextaa101d_32x8d", "ecaresnet50d", "ecaresnet50t", "ecaresnetlight",
    "legacy_seresnet50", "resnetv2_50", "resnetv2_50d", "resnetrs50", "skresnet18",
    "resnet32ts", "resnet33ts", "seresnet33ts", "resnet51q", "gcresnet33ts", "regnetx_004",
    "regnety_004", "regnetz_b16", "dla34", "dla60", "dla60_res2net", "hrnet_w18_small",
    "densenet121", "vgg11_bn", "res2net50_26w_4s", "resnest14d", "resnest50d", "cspresnet50",
    "darknet53", "repvgg_a0", "selecsls42b", "dpn68b", "hgnetv2_b0", "tresnet_m",
)  # fmt: skip
_HAND = (
    "textbook", "textbook-bias", "cifar", "bottleneck", "pre-activation", "wide", "squeeze-excite",
    "double-conv", "option-a", "vgg", "dense", "detectron2", "detectron2-frozen", "mmdetection",
)  # fmt: skip


def _all() -> Mapping[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {}
    found |= {f"torchvision:{n}": partial(_torchvision, n) for n in _TORCHVISION}
    found |= {f"torchvision:{n}": partial(_segmentation, n) for n in _SEGMENTATION}
    found |= {
        f"torchvision:{n}_fpn backbone, frozen norms": partial(_detection_backbone, n)
        for n in ("resnet18", "resnet50")
    }
    found |= {f"timm:{n}": partial(_timm, n) for n in _TIMM}
    found["timm:resnet50, SiLU"] = partial(_timm, "resnet50", act_layer=nn.SiLU)
    found["timm:resnet50, features_only"] = partial(_timm, "resnet50", features_only=True)
    found["timm:resnet50, half frozen"] = partial(_frozen, "resnet50")
    resnet, auto = "ResNet", "AutoModelForImageClassification"
    found["transformers:ResNet, basic"] = partial(
        _from_config, auto, resnet, layer_type="basic", hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
    )  # fmt: skip
    found["transformers:ResNet, bottleneck"] = partial(_from_config, auto, resnet)
    found["transformers:ResNet, SiLU"] = partial(_from_config, auto, resnet, hidden_act="silu")
    found["transformers:ResNet, GELU"] = partial(_from_config, auto, resnet, hidden_act="gelu")
    for kind in ("x", "y"):
        found[f"transformers:RegNet, {kind}"] = partial(
            _from_config, auto, "RegNet", layer_type=kind
        )
    found["transformers:RTDetr"] = _rt_detr
    found["transformers:Detr, ResNet-50"] = partial(_detr, "Detr")
    found["transformers:TableTransformer, ResNet-50"] = partial(_detr, "TableTransformer")
    found["transformers:UperNet, ResNet-50"] = _upernet
    found["transformers:MaskFormer, ResNet-50"] = _maskformer
    found |= {f"by hand:{n}": partial(_by_hand, n) for n in _HAND}
    return found


#: What builds each, by the name that it has in the table.
ZOO = _all()
