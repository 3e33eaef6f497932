"""Trees in photographs from the air: a small detector without anchors draws boxes around their crowns.

The left part of deepforest's largest photograph trains, its right part judges. The other sites are photographs of
another place in Yellowstone, of Florida and of California. The detector has one resolution. Each place gives a score,
highest in the middle of a crown, and says how far the four sides of that crown are.

Sources: places and sides as in FCOS, Tian et al. 2019 (arXiv:1904.01355); scores as in CenterNet, Zhou et al. 2019
(arXiv:1904.07850); their loss as in generalized focal loss, Li et al. 2020 (arXiv:2006.04388).
"""

import contextlib
import io
import xml.etree.ElementTree as ElementTree
import zipfile
from functools import lru_cache

import numpy as np
import torch
from packages import open_wheel
from PIL import Image
from segmentation import standardise
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, max_pool2d
from torch.utils.data import TensorDataset

from normlab.nn import build_norm

SIDE, STRIDE = 256, 8  # pixels of a tile, and from one place to the next
MOST = 100  # boxes that are kept of a tile, and asked of the detector
WIDTH = 1 / 6  # deviation of the scores around a box's middle, as a share of its sides
NEAR = 0.2  # score from which a place learns the sides of its box
HERE, ELSEWHERE = 1, 2  # sites, in the fifth column of a box; 0 where there is none
VISIBLE = 0.4  # of a box, from which it belongs to a tile
DEEPFOREST = (
    "deepforest==2.1.0",
    "deepforest-2.1.0-py3-none-any.whl",
    "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
)
EDGE = 1792  # pixels from the left of the first photograph: what is right of them judges
PHOTOS = ("2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop", "OSBS_029", "SOAP_061")
Photo = tuple[Tensor, Tensor]  # (3, H, W) in 0 to 1, and boxes (N, 4): left, top, right, bottom


def make_model(norm: str) -> nn.Module:
    """The detector."""
    return Detector(norm)


class Detector(nn.Module):
    """Scores and boxes at every eighth pixel: a residual net down to 1/16 and back to 1/8."""

    def __init__(self, norm: str):
        super().__init__()
        self.stem = nn.Sequential(block(3, 12, norm, stride=2), block(12, 24, norm, stride=2))
        self.eighth = nn.Sequential(block(24, 32, norm, stride=2), Residual(32, norm))
        self.sixteenth = nn.Sequential(block(32, 48, norm, stride=2), Residual(48, norm), nn.Conv2d(48, 32, 1))
        self.head = nn.Sequential(Residual(32, norm), block(32, 32, norm))
        self.predict = nn.Conv2d(32, 5, 1)
        nn.init.zeros_(self.predict.bias)
        nn.init.constant_(self.predict.bias[:1], -3.0)  # a crown's middle is rare

    def forward(self, images: Tensor) -> Tensor:
        """(N, 5, H / 8, W / 8): a score, and the logarithms of the distances to the four sides, in strides."""
        fine = self.eighth(self.stem(images))
        return self.predict(self.head(fine + interpolate(self.sixteenth(fine), scale_factor=2.0)))


class Residual(nn.Module):
    """Two convolutions with norms, added to what came."""

    def __init__(self, width: int, norm: str):
        super().__init__()
        self.first, self.second = block(width, width, norm), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = build_norm(norm, width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """What came and what is made of it."""
        return torch.relu(x + self.norm(self.second(self.first(x))))


def block(in_channels: int, out_channels: int, norm: str, stride: int = 1) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, build_norm(norm, out_channels, 2), nn.ReLU())


def loss(output: Tensor, label: Tensor) -> Tensor:
    """Focal loss of the scores, and one less the intersection over union of boxes, both a box.

    Args:
        output: of the detector.
        label: (N, MOST, 5), boxes and their site.
    """
    found, boxes, there = output.flatten(2).transpose(1, 2), label[..., :4], label[..., 4] > 0
    places = grid(output)
    middles, sizes = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]).clamp(min=1)
    middles = (middles / STRIDE).floor() * STRIDE + STRIDE / 2  # the place it is in
    away = (places[:, None] - middles[:, None]) / sizes[:, None]  # (N, places, MOST, 2)
    heat = torch.exp(-away.square().sum(-1) / (2 * WIDTH**2)) * there[:, None]
    target, which = heat.max(-1)
    score = found[..., 0]
    focus = (target - score.sigmoid()).square()
    scores = (focus * binary_cross_entropy_with_logits(score, target, reduction="none")).sum()
    own = boxes.gather(1, which[..., None].expand(-1, -1, 4))
    near = target * (target > NEAR)
    misses = (near * (1 - overlap(boxes_of(found, places), own))).sum() / near.sum().clamp(min=1)
    return scores / there.sum().clamp(min=1) + misses


def grid(output: Tensor) -> Tensor:
    """The places of the scores in pixels, (places, 2): x and y."""
    y, x = (STRIDE * (torch.arange(size, device=output.device) + 0.5) for size in output.shape[2:])
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def boxes_of(found: Tensor, places: Tensor) -> Tensor:
    """The boxes (N, places, 4) that an output (N, places, 5) says."""
    sides = STRIDE * found[..., 1:].clamp(max=4).exp()
    return torch.cat([places - sides[..., :2], places + sides[..., 2:]], -1)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4), pair by pair."""
    shared = torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])
    shared = shared.clamp(min=0).prod(-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(-1) for boxes in (one, other)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-6)


def detect(output: Tensor) -> tuple[Tensor, Tensor]:
    """The boxes (N, MOST, 4) of the highest scores, and the scores; of neighbours, the highest alone is taken."""
    scores = output[:, :1].sigmoid()
    peaks = torch.where(scores == max_pool2d(scores, 3, 1, 1), scores, 0.0).flatten(1)
    best, where = peaks.topk(min(MOST, peaks.shape[1]))
    boxes = boxes_of(output.flatten(2).transpose(1, 2), grid(output))
    return boxes.gather(1, where[..., None].expand(-1, -1, 4)).clamp(0, SIDE), best


class AveragePrecision:
    """COCO's average precision of one site at an overlap of 0.5; NaN where no image is of that site."""

    site = HERE

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.truth: list[Tensor] = []
        self.found: list[Tensor] = []

    def update(self, output: Tensor, label: Tensor) -> None:
        """Add the images of the site."""
        for boxes, scores, own in zip(*detect(output), label, strict=True):
            if own[0, 4] == self.site:
                self.truth.append(own[own[:, 4] > 0, :4])
                self.found.append(torch.cat([boxes, scores[:, None]], 1)[scores > 0.01])

    __call__ = update  # as torchmetrics; a study takes what can be called

    def compute(self) -> float:
        """The average precision of what was added."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if not self.truth:
            return float("nan")
        truth, found = COCO(), COCO()
        images = [{"id": image} for image in range(len(self.truth))]
        truth.dataset = {"images": images, "categories": [{"id": 1}], "annotations": annotations(self.truth)}
        found.dataset = truth.dataset | {"annotations": annotations(self.found)}
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            found.createIndex()
            judge = COCOeval(truth, found, "bbox")
            judge.params.iouThrs = np.array([0.5])
            judge.evaluate()
            judge.accumulate()
        precision = judge.eval["precision"][0, :, 0, 0, -1]
        return float(precision[precision >= 0].mean())


class AveragePrecisionElsewhere(AveragePrecision):
    """The same of the other sites."""

    site = ELSEWHERE


def annotations(images: list[Tensor]) -> list[dict]:
    """Boxes (N, 4), or with a score (N, 5), of each image as COCO has them."""
    made = []
    for image, boxes in enumerate(images):
        for left, top, right, bottom, *score in boxes.tolist():
            box = {"id": len(made) + 1, "image_id": image, "category_id": 1, "iscrowd": 0}
            box |= {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}
            made.append(box | ({"score": score[0]} if score else {}))
    return made


def make_raw() -> tuple[TensorDataset, TensorDataset]:
    """Tiles as they are, from -2 to 2."""
    return make_tiles(load(), raw=True)


def make_standardised() -> tuple[TensorDataset, TensorDataset]:
    """Each tile with mean 0 and deviation 1."""
    return make_tiles(load(), raw=False)


def make_tiles(photos: list[Photo], raw: bool) -> tuple[TensorDataset, TensorDataset]:
    """Tiles to train on, each and its mirror image, and those that judge."""
    (image, boxes), *others = photos
    left, right = (image[..., :EDGE], boxes), (image[..., EDGE:], boxes - torch.tensor([EDGE, 0, EDGE, 0]))
    images, labels = tiles(left, HERE)
    mirrored = labels.clone()
    mirrored[..., [0, 2]] = SIDE - labels[..., [2, 0]]
    mirrored[labels[..., 4] == 0] = 0
    images, labels = torch.cat([images, images.flip(-1)]), torch.cat([labels, mirrored])
    judged = [tiles(right, HERE), *(tiles(photo, ELSEWHERE) for photo in others)]
    valid, valid_labels = (torch.cat(parts) for parts in zip(*judged, strict=True))
    if not raw:
        images, valid = standardise(images), standardise(valid)
    return TensorDataset(images, labels), TensorDataset(valid, valid_labels)


def tiles(photo: Photo, site: int) -> tuple[Tensor, Tensor]:
    """Tiles (N, 3, SIDE, SIDE) with a tree or more, and their labels (N, MOST, 5): boxes, and the site."""
    image, boxes = photo
    images, labels = [], []
    for top in corners(image.shape[1]):
        for left in corners(image.shape[2]):
            own = (boxes - torch.tensor([left, top, left, top])).clamp(0, SIDE)
            visible = (own[:, 2:] - own[:, :2]).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
            own = own[visible >= VISIBLE][:MOST]
            if len(own):
                label = torch.zeros(MOST, 5)
                label[: len(own), :4], label[: len(own), 4] = own, site
                images.append(4 * image[:, top : top + SIDE, left : left + SIDE] - 2)
                labels.append(label)
    return torch.stack(images), torch.stack(labels)


def corners(size: int) -> list[int]:
    """Where tiles begin that cover a photograph; the last one may overlap the one before."""
    return [*range(0, size - SIDE, SIDE), size - SIDE]


@lru_cache(maxsize=1)
def load() -> list[Photo]:
    """The photographs: one to train and to judge, then those of other sites."""
    wheel = open_wheel(*DEEPFOREST)
    return [read(wheel, name) for name in PHOTOS]


def read(wheel: zipfile.ZipFile, name: str) -> Photo:
    """A photograph and the boxes that were drawn in it."""
    with Image.open(io.BytesIO(wheel.read(f"deepforest/data/{name}.png"))) as image:
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)
    drawn = ElementTree.fromstring(wheel.read(f"deepforest/data/{name}.xml")).iter("bndbox")
    boxes = [[float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")] for box in drawn]
    return pixels, torch.tensor(boxes)
