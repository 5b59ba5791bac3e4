"""Where the sky is: it has no depth worth learning from and no texture to match.

Masks only ever change ``valid_mask``: the depth values stay as they are, and no file is touched. To mask both views of
a pair, lift the masked depth, so that the sky is in no render; or carry the mask over with
``scene.render_attributes(camera, sky[..., None].float())``.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.data.images import require_image, resize_image
from l2m_viz.errors import FileFormatError, L2MError, MissingError, ShapeError
from l2m_viz.lifting.depth import Depth, as_depth
from l2m_viz.lifting.networks import INSTALL, NetworkFiles, load_once

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

SKYSEG = NetworkFiles("skyseg", ("JianyuanWang/skyseg",), ("skyseg.onnx",))

_SKYSEG_SIDE = 320  # px, of the square picture that the network sees
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_WORK_SIDE = 256  # px, long side of the reduced picture that the offline rules look at
_NEAREST_SKY = 20.0  # m; a metric depth below it is a ceiling or a wall
_MIN_CORE = 0.02  # of the picture; from less, the colours of the sky cannot be learnt
_TOP, _BOTTOM = (
    0.03,
    0.05,
)  # of the height; what reaches in there touches the border, through a scan's thin frame


def sky_mask(
    image: Float[Tensor, "h w 3"],
    depth: Depth | Float[Tensor, "h w"] | None = None,
    method: str = "offline",
) -> Bool[Tensor, "h w"]:
    """Say which pixels show the sky.

    Args:
        image: RGB in [0, 1].
        depth: If known, what is nearer than the rest of the scene is not sky, whatever it looks like.
        method: "offline" goes by rules, without weights: smooth, blue or bright, connected to the top, not reaching
            the ground. In doubt it says no: of 40 photos that nobody had looked at before, it found 11 of 16 skies and
            saw none in the other 24. It misses dusk, grey clouds and what shines through branches, takes hills in haze
            along, and in some sets of product photos a blue-grey or white wall. "skyseg" is the network that the
            authors use, whose file has to be on this machine; see `l2m_viz.lifting.networks`.

    Raises:
        ShapeError: the image is not (H, W, 3), or the depth has another size.
        ImageError: the image's values are not finite or leave [0, 1].
        MissingError: onnxruntime or the network's file is not here; the message says how to get it.
        FileFormatError: the file is damaged or another network.
        L2MError: no such method.
    """
    require_image("sky_mask", image)
    if depth is not None and tuple(as_depth(depth).hw) != tuple(image.shape[:2]):
        got = f"{tuple(image.shape[:2])} and {as_depth(depth).hw}"
        raise ShapeError("sky_mask", expected="image and depth of one size", got=got)
    if method not in _METHODS:
        expected = "one of " + ", ".join(f'"{name}"' for name in _METHODS)
        raise L2MError("sky_mask method", expected=expected, got=repr(method))
    mask = _METHODS[method](image.detach().cpu().float().clamp(0, 1))
    return mask if depth is None else _far(mask, as_depth(depth))


def mask_sky(depth: Depth, sky: Bool[Tensor, "h w"]) -> Depth:
    """Return the same depth with the sky invalid; the argument, and its values, stay as they are.

    Raises:
        ShapeError: depth and mask differ in size.
        L2MError: nothing valid would be left.
    """
    if tuple(sky.shape) != tuple(depth.hw):
        got = f"{depth.hw} and {tuple(sky.shape)}"
        raise ShapeError("mask_sky", expected="depth and mask of one size", got=got)
    valid = depth.valid_mask & ~sky
    if not valid.any():
        todo = "skip this photo"
        raise L2MError("mask_sky", expected="a valid pixel that is not sky", got="none", todo=todo)
    return replace(depth, valid_mask=valid)


def _far(mask: Bool[Tensor, "h w"], depth: Depth) -> Bool[Tensor, "h w"]:
    """Take out of a mask what the depth calls near; all of it, if that is most of it. Unknown depth decides nothing."""
    known, others = mask & depth.valid_mask, ~mask & depth.valid_mask
    near = torch.zeros_like(mask)
    if others.any():
        near |= depth.depth < float(np.percentile(depth.depth[others].numpy(), 75))
    if depth.kind == "metric":
        near |= depth.depth < _NEAREST_SKY
    near &= known
    mostly_near = 2 * int(near.sum()) > int(known.sum())
    return torch.zeros_like(mask) if mostly_near else mask & ~near


# --- skyseg ----------------------------------------------------------------------------------------------


def _skyseg_mask(image: Float[Tensor, "h w 3"]) -> Bool[Tensor, "h w"]:
    """Threshold the network's own probability at one half.

    The official script stretches each output to its full range first, so that every photo has a sky, and brings the
    square back by the width alone, so that the mask of a picture that is not square lies beside it.
    """
    folder = SKYSEG.find()
    session = _load(SKYSEG, folder)
    pixels = (resize_image(image, (_SKYSEG_SIDE, _SKYSEG_SIDE)) - torch.tensor(_MEAN)) / torch.tensor(
        _DEVIATION
    )
    pixels = pixels.permute(2, 0, 1)[None].contiguous()  # [1 3 320 320]
    with SKYSEG.loading(folder):
        output = session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: pixels.numpy()})[
            0
        ]
    probability = torch.from_numpy(np.array(output, np.float32))
    if probability.numel() != _SKYSEG_SIDE**2 or not ((probability >= 0) & (probability <= 1)).all():
        expected = f"{_SKYSEG_SIDE}x{_SKYSEG_SIDE} probabilities in [0, 1]"
        got = f"{tuple(probability.shape)} from {float(probability.min()):g} to {float(probability.max()):g}"
        raise FileFormatError(f"{folder / SKYSEG.files[0]} answers", expected=expected, got=got)
    square = probability.view(1, 1, _SKYSEG_SIDE, _SKYSEG_SIDE)
    return F.interpolate(square, image.shape[:2], mode="bilinear", align_corners=False)[0, 0] > 0.5


@load_once
def _load(network: NetworkFiles, folder: Path) -> "InferenceSession":
    try:
        from onnxruntime import InferenceSession
    except ImportError as error:
        raise MissingError(f"{network.name} needs onnxruntime", todo=INSTALL) from error
    return InferenceSession(str(folder / network.files[0]), providers=["CPUExecutionProvider"])


# --- rules -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Region:
    """What the rules look at in a region that may be sky; lightness L and colours a, b are CIELAB / 100."""

    area: float  # share of the picture
    top: float  # share of the columns in which it reaches the top
    bottom: float  # share of the columns in which it reaches the bottom
    same_below: float  # share of the bottom that has its colours
    lightness: float
    b: float  # negative is blue
    roughness: float  # mean, without the rim
    slope: float  # of lightness, from the top of the picture to its bottom
    lightness_of_rest: float  # 80th percentile of what has other colours


def _offline_mask(image: Float[Tensor, "h w 3"]) -> Bool[Tensor, "h w"]:
    full = np.ascontiguousarray(image.numpy())
    height, width = full.shape[:2]
    scale = min(1.0, _WORK_SIDE / max(height, width))
    wh = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(full, wh, interpolation=cv2.INTER_AREA) if scale < 1 else full
    lab = _lab(small)
    core = _core(lab)
    nothing = torch.zeros(height, width, dtype=torch.bool)
    if core.mean() < _MIN_CORE:
        return nothing
    mean, precision = lab[core].mean(axis=0), _precision(lab[core])
    alike = _distance(lab, mean, precision) < 2.5
    region = _touching(core | (alike & (_roughness(lab) < 0.05) & (lab[..., 2] < 0.1)), core)
    region = cv2.morphologyEx(region.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)) > 0
    if not _is_sky(_described(region, lab, alike)):
        return nothing
    return torch.from_numpy(_to_the_edges(region, _distance(_lab(full), mean, precision) < 2.5))


def _core(lab: np.ndarray) -> np.ndarray:
    """Smooth, blue or pale and bright, connected to the top."""
    lightness, a, b = lab[..., 0], lab[..., 1], lab[..., 2]
    darkest = np.where(b < -0.15, 0.22, 0.28)  # polarised skies are deep
    blue = (b < -0.06) & (a < 0.15) & (lightness > darkest)
    brightest_part = np.clip(np.quantile(lightness, 0.6), 0.7, 0.9)
    pale = (b < 0.06) & (a < 0.05) & (a > -0.15) & (lightness > brightest_part)
    top = np.zeros(lightness.shape, bool)
    top[: _rows(_TOP, top)] = True
    return _touching((_roughness(lab) < 0.02) & (blue | pale), top)


def _described(region: np.ndarray, lab: np.ndarray, alike: np.ndarray) -> _Region:
    lightness, b = lab[..., 0], lab[..., 2]
    rows = np.broadcast_to(((np.arange(len(region)) + 0.5) / len(region))[:, None], region.shape)
    inner = cv2.erode(region.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    rest = lightness[~region & ~alike]
    offset = rows[region] - rows[region].mean()
    return _Region(
        area=float(region.mean()),
        top=float(region[: _rows(_TOP, region)].any(axis=0).mean()),
        bottom=float(region[-_rows(_BOTTOM, region) :].any(axis=0).mean()),
        same_below=float(alike[-_rows(_BOTTOM, region) :].mean()),
        lightness=float(lightness[region].mean()),
        b=float(b[region].mean()),
        roughness=float(_roughness(lab)[inner].mean()) if inner.any() else 0.0,
        slope=float((offset * lightness[region]).sum() / max((offset**2).sum(), 1e-9)),
        lightness_of_rest=float(np.quantile(rest, 0.8)) if rest.size else 0.0,
    )


def _is_sky(region: _Region) -> bool:
    """Refuse what is more likely something else; the thresholds were set on 670 photos, of which about 100 show sky."""
    if region.b < -0.04:  # a blue thing is sky more often than a white one
        fits = region.area >= 0.05 and region.top >= 0.25 and (region.b < -0.06 or region.lightness > 0.5)
    else:  # not paper, snow, a wall in the light of a window
        brighter = region.lightness >= max(0.9, region.lightness_of_rest + 0.15)
        fits = region.area >= 0.08 and region.top >= 0.6 and brighter and region.same_below < 0.3
    # the wall behind a product or a portrait goes down to the bottom; so does a road
    backdrop = region.bottom > (0.5 if region.b < -0.1 else 0.05)
    # skies grow lighter towards the horizon, the sea towards the top
    water = region.lightness < 0.5 and region.slope < 0
    thing = region.top < 0.3 and region.lightness < region.lightness_of_rest - 0.1
    rough = region.roughness > 0.014  # ripples, cloth, blurred leaves
    return fits and not (backdrop or water or thing or rough)


def _to_the_edges(region: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Bring a region to full size and let it grow, by the blur of the roughness, over pixels of the sky's colours."""
    height, width = alike.shape
    grown = cv2.dilate(region.astype(np.uint8), np.ones((9, 9), np.uint8))
    near = cv2.resize(grown, (width, height), interpolation=cv2.INTER_NEAREST) > 0
    inside = cv2.resize(region.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5
    return _touching(inside | (near & alike), inside)


def _rows(share: float, region: np.ndarray) -> int:
    return max(1, round(share * len(region)))


def _lab(rgb: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB) / np.float32(100)


def _roughness(lab: np.ndarray) -> np.ndarray:
    """Local mean of the length of the lightness gradient per pixel."""
    lightness = np.ascontiguousarray(lab[..., 0])
    gradient = np.hypot(cv2.Sobel(lightness, cv2.CV_32F, 1, 0), cv2.Sobel(lightness, cv2.CV_32F, 0, 1)) / 8
    return cv2.GaussianBlur(gradient, (0, 0), 1.5)


def _precision(colors: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.cov(colors.T, bias=True) + 0.03**2 * np.eye(3))


def _distance(lab: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Mahalanobis distance of every colour from those of the core."""
    offset = lab - mean
    return np.sqrt(np.einsum("hwi,ij,hwj->hw", offset, precision.astype(np.float32), offset, optimize=True))


def _touching(mask: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """Keep the connected parts of a mask that share a pixel with the seed."""
    _, components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    kept = np.unique(components[seed])
    return np.isin(components, kept[kept > 0])


_METHODS = {"offline": _offline_mask, "skyseg": _skyseg_mask}
