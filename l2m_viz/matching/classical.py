"""Matchers that need no weights: DIS optical flow and RootSIFT, behind the same `Match` as the networks."""

from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from l2m_viz.data.images import fit_long_side, to_uint8
from l2m_viz.errors import ShapeError
from l2m_viz.geometry import (
    HW,
    from_integer_centers,
    inside_image,
    sample_image,
    to_normalized,
    to_pixel,
    warp_from_flow,
)
from l2m_viz.matching.match import Match
from l2m_viz.matching.matcher import Matcher
from l2m_viz.matching.sparse import SpreadCfg, match_from_keypoints


class DisMatcher(Matcher):
    """Dense inverse search optical flow (Kroeger et al., ECCV 2016), both ways, with forward-backward certainty.

    It follows small motion to a fraction of a pixel and knows nothing of wide baselines; its certainty says where the
    two directions agree.
    """

    name = "dis"

    @dataclass(frozen=True)
    class Cfg:
        """Settings of `DisMatcher`."""

        # Larger images are worked on at this long side; flow beyond some hundred pixels is not found anyway.
        max_side: int = 1024
        # Forward-backward error, in pixels of the working size, at which certainty has fallen to 1/e.
        error_scale_px: float = 1.0
        # Long sides that differ by more than this factor are a difference of resolution, not of cropping.
        max_size_ratio: float = 1.5
        # Neighbourhood that must hold some texture, and the standard deviation (of 255 grey levels) at which certainty
        # is halved: about the noise of a camera.
        texture_window_px: int = 15
        texture_scale: float = 1.0

    def __init__(self, cfg: Cfg | None = None) -> None:
        self.cfg = cfg or self.Cfg()

    def _match_pair(self, image_A: Float[Tensor, "ha wa 3"], image_B: Float[Tensor, "hb wb 3"]) -> Match:
        _require_size("dis", image_A, image_B)
        grey_A, grey_B = (_grey(image) for image in self._working_sizes(image_A, image_B))
        canvas: HW = (
            max(
                grey_A.shape[0], grey_B.shape[0], _MIN_SIDE
            ),  # a narrow strip was reduced below what DIS takes
            max(grey_A.shape[1], grey_B.shape[1], _MIN_SIDE),
        )
        padded_A, padded_B = _pad(grey_A, canvas), _pad(grey_B, canvas)
        dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        flow_A = _flow(dis, padded_A, padded_B)[: grey_A.shape[0], : grey_A.shape[1]]
        flow_B = _flow(dis, padded_B, padded_A)[: grey_B.shape[0], : grey_B.shape[1]]
        texture_A, texture_B = self._texture(grey_A), self._texture(grey_B)
        warp_A, certainty_A = self._verify(flow_A, flow_B, texture_A, texture_B)
        warp_B, certainty_B = self._verify(flow_B, flow_A, texture_B, texture_A)
        return Match(warp_A, certainty_A, warp_B, certainty_B, _hw(image_A), _hw(image_B), matcher=self.name)

    def _working_sizes(self, image_A: Tensor, image_B: Tensor) -> tuple[Tensor, Tensor]:
        """Reduce both by one factor, or, when one is a much larger picture, to one long side.

        Flow cannot follow a zoom. Two pictures whose sizes are alike come from one camera, perhaps cropped; beyond
        ``max_size_ratio`` they differ in resolution.
        """
        long_A, long_B = max(image_A.shape[:2]), max(image_B.shape[:2])
        if max(long_A, long_B) > self.cfg.max_size_ratio * min(long_A, long_B):
            long_side = min(self.cfg.max_side, long_A, long_B)
            return fit_long_side(image_A, long_side), fit_long_side(image_B, long_side)
        scale = min(1.0, self.cfg.max_side / max(long_A, long_B))
        return fit_long_side(image_A, round(scale * long_A)), fit_long_side(image_B, round(scale * long_B))

    def _verify(
        self,
        forward: Float[Tensor, "ha wa 2"],
        backward: Float[Tensor, "hb wb 2"],
        texture: Float[Tensor, "ha wa"],
        texture_to: Float[Tensor, "hb wb"],
    ) -> tuple[Float[Tensor, "ha wa 2"], Float[Tensor, "ha wa"]]:
        """Warp, and certainty: both directions agree, and there is something to see at both ends."""
        warp = warp_from_flow(forward, _hw(backward))
        error_px = (forward + sample_image(backward, warp)).norm(dim=-1)
        agreement = torch.exp(-error_px / self.cfg.error_scale_px)
        seen = torch.minimum(texture, sample_image(texture_to, warp))
        return warp.clamp(-1, 1), (agreement * inside_image(warp) * seen).clamp(0, 1)

    def _texture(self, grey: UInt8[np.ndarray, "h w"]) -> Float[Tensor, "h w"]:
        """Between 0 where the neighbourhood is blank, on which any two pictures agree, and 1 where it is textured."""
        window = (self.cfg.texture_window_px, self.cfg.texture_window_px)
        values = grey.astype(np.float32)
        variance = cv2.blur(values * values, window) - cv2.blur(values, window) ** 2
        variance = torch.from_numpy(np.maximum(variance, 0))
        return variance / (variance + self.cfg.texture_scale**2)


class SiftMatcher(Matcher):
    """RootSIFT (Lowe 2004; Arandjelovic, Zisserman 2012) with mutual nearest neighbours and the ratio test.

    Sparse: `Match.sample` returns its own sub-pixel keypoints, and the dense warp moves every pixel as the nearest
    keypoint, with a certainty that falls to 0 at ``spread.reach_px``.
    """

    name = "sift"

    @dataclass(frozen=True)
    class Cfg:
        """Settings of `SiftMatcher`."""

        max_side: int = 1600
        max_keypoints: int = 4096
        # Best over second-best distance above which a match is ambiguous (Lowe's value).
        max_ratio: float = 0.8
        spread: SpreadCfg = field(default_factory=SpreadCfg)

    def __init__(self, cfg: Cfg | None = None) -> None:
        self.cfg = cfg or self.Cfg()

    def _match_pair(self, image_A: Float[Tensor, "ha wa 3"], image_B: Float[Tensor, "hb wb 3"]) -> Match:
        hw_A, hw_B = _hw(image_A), _hw(image_B)
        (points_A, sizes_A, descriptors_A), (points_B, sizes_B, descriptors_B) = map(
            self._detect, (image_A, image_B)
        )
        index_A, index_B, ratio = self._pair_up(descriptors_A, descriptors_B)
        points_A, points_B = points_A[index_A], points_B[index_B]
        zoom = (sizes_B[index_B] / sizes_A[index_A]).median().item() if len(index_A) else 1.0
        return match_from_keypoints(
            points_A, points_B, 1 - ratio, hw_A, hw_B, matcher=self.name, zoom=zoom, cfg=self.cfg.spread
        )

    def _detect(
        self, image: Float[Tensor, "h w 3"]
    ) -> tuple[Float[Tensor, "n 2"], Float[Tensor, " n"], Float32[np.ndarray, "n 128"]]:
        """Keypoints and their sizes in original pixels, and their RootSIFT descriptors."""
        small = fit_long_side(image, self.cfg.max_side)
        # OpenCV's default pyramid shifts every keypoint by a quarter of a pixel; the precise one does not.
        detector = cv2.SIFT.create(nfeatures=self.cfg.max_keypoints, enable_precise_upscale=True)
        keypoints, sift = detector.detectAndCompute(_grey(small), None)  # pyright: ignore
        if not keypoints:
            return torch.zeros(0, 2), torch.zeros(0), np.zeros((0, 128), np.float32)
        points = from_integer_centers(torch.tensor([k.pt for k in keypoints], dtype=torch.float32))
        sizes = torch.tensor([k.size for k in keypoints]) * (image.shape[1] / small.shape[1])
        root = np.sqrt(sift / np.maximum(np.abs(sift).sum(axis=1, keepdims=True), 1e-12))
        return to_pixel(to_normalized(points, _hw(small)), _hw(image)), sizes, root.astype(np.float32)

    def _pair_up(self, a: np.ndarray, b: np.ndarray) -> tuple[Tensor, Tensor, Float[Tensor, " m"]]:
        """Mutual nearest neighbours that pass the ratio test: indices in A, in B, and the ratios."""
        if len(a) < 2 or len(b) < 2:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0)
        distance = torch.cdist(torch.from_numpy(a), torch.from_numpy(b))
        two, index_B = distance.topk(2, dim=1, largest=False)
        ratio = two[:, 0] / two[:, 1].clamp(min=1e-12)
        mutual = distance.argmin(dim=0)[index_B[:, 0]] == torch.arange(len(a))
        keep = mutual & (ratio < self.cfg.max_ratio)
        return keep.nonzero()[:, 0], index_B[keep, 0], ratio[keep]


_MIN_SIDE = 16  # px; DIS's coarsest patches do not fit into less


def _require_size(name: str, *images: Tensor) -> None:
    for image in images:
        if min(image.shape[:2]) < _MIN_SIDE:
            got = f"{image.shape[1]}x{image.shape[0]} px"
            raise ShapeError(
                f"matcher '{name}'", expected=f"images of at least {_MIN_SIDE}x{_MIN_SIDE} px", got=got
            )


def _hw(image: Tensor) -> HW:
    return image.shape[0], image.shape[1]


def _grey(image: Float[Tensor, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    return cv2.cvtColor(to_uint8(image), cv2.COLOR_RGB2GRAY).astype(np.uint8, copy=False)


def _pad(grey: UInt8[np.ndarray, "h w"], hw: HW) -> UInt8[np.ndarray, "h2 w2"]:
    bottom, right = hw[0] - grey.shape[0], hw[1] - grey.shape[1]
    return cv2.copyMakeBorder(grey, 0, bottom, 0, right, cv2.BORDER_REPLICATE).astype(np.uint8, copy=False)


def _flow(dis: cv2.DISOpticalFlow, grey_A: np.ndarray, grey_B: np.ndarray) -> Float[Tensor, "h w 2"]:
    return torch.from_numpy(dis.calc(grey_A, grey_B, None))  # pyright: ignore[reportArgumentType, reportCallIssue]
