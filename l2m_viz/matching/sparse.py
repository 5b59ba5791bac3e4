"""Sparse matchers behind the dense `Match`: how keypoints become a warp, and the learned matchers of kornia."""

import re
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2m_viz.data.images import fit_long_side
from l2m_viz.encoders.weights import Checkpoint, State, load_strict
from l2m_viz.errors import ShapeError
from l2m_viz.geometry import HW, from_integer_centers, pixel_grid, to_normalized, to_pixel
from l2m_viz.matching.match import Match
from l2m_viz.matching.matcher import Matcher


@dataclass(frozen=True)
class SpreadCfg:
    """How far a keypoint speaks for the pixels around it."""

    reach_px: float = 32.0
    # ... but in a small image no farther than this share of its long side.
    max_reach: float = 0.1
    # The dense warp is piecewise constant: more pixels than this would hold nothing new.
    warp_max_side: int = 512


def match_from_keypoints(
    points_A: Float[Tensor, "n 2"],
    points_B: Float[Tensor, "n 2"],
    certainty: Float[Tensor, " n"],
    hw_A: HW,
    hw_B: HW,
    *,
    matcher: str,
    zoom: float | None = None,
    cfg: SpreadCfg | None = None,
) -> Match:
    """Make a dense `Match` of matched keypoints in original pixels: every pixel moves as the nearest keypoint.

    Args:
        points_A: Keypoints of A.
        points_B: Their partners in B.
        certainty: Their certainties.
        hw_A: Size (H, W) of image A.
        hw_B: Size (H, W) of image B.
        matcher: Who found them.
        zoom: Pixels of B to one of A; None: what the distances between keypoints say.
        cfg: How far a keypoint speaks.
    """
    cfg = cfg or SpreadCfg()
    zoom = _zoom(points_A, points_B) if zoom is None else zoom
    warp_A, certainty_A = _spread(points_A, points_B, hw_A, hw_B, zoom, cfg)
    warp_B, certainty_B = _spread(points_B, points_A, hw_B, hw_A, 1 / zoom, cfg)
    return Match(
        warp_A, certainty_A, warp_B, certainty_B, hw_A, hw_B, matcher=matcher,
        keypoints_A=points_A, keypoints_B=points_B, keypoint_certainty=certainty,
    )  # fmt: skip


def _spread(
    points: Float[Tensor, "n 2"],
    partners: Float[Tensor, "n 2"],
    hw: HW,
    hw_to: HW,
    zoom: float,
    cfg: SpreadCfg,
) -> tuple[Float[Tensor, "h w 2"], Float[Tensor, "h w"]]:
    """Warp and certainty of one direction; ``zoom`` is the pixels of the other image to one of this."""
    scale = min(1.0, cfg.warp_max_side / max(hw))
    small: HW = (max(1, round(hw[0] * scale)), max(1, round(hw[1] * scale)))
    grid = to_pixel(to_normalized(pixel_grid(small), small), hw)  # original pixels
    if len(points) == 0:
        return to_normalized(grid, hw), torch.zeros(small)
    from scipy.spatial import KDTree

    distance_px, nearest = KDTree(points.numpy()).query(grid.numpy())
    nearest = torch.from_numpy(nearest)
    target = partners[nearest] + zoom * (grid - points[nearest])
    reach_px = min(cfg.reach_px, cfg.max_reach * max(hw))
    certainty = (1 - torch.from_numpy(distance_px).float() / reach_px).clamp(min=0)
    return to_normalized(target, hw_to).clamp(-1, 1), certainty


def _zoom(points_A: Float[Tensor, "n 2"], points_B: Float[Tensor, "n 2"]) -> float:
    """Median ratio of the distances between two keypoints in B and in A; 1 if there are none to compare."""
    half = len(points_A) // 2
    apart_A = (points_A[:half] - points_A[-half:]).norm(dim=-1)
    apart_B = (points_B[:half] - points_B[-half:]).norm(dim=-1)
    usable = (apart_A > 1) & (apart_B > 1)
    return (apart_B[usable] / apart_A[usable]).median().item() if half and usable.any() else 1.0


@dataclass(frozen=True)
class SparseCfg:
    """Settings of the learned sparse matchers.

    Attributes:
        max_side: Larger images are worked on at this long side.
        max_keypoints: Of each image, the strongest first; LoFTR has none.
        spread: How far a keypoint speaks for the pixels around it.
    """

    max_side: int = 1024
    max_keypoints: int = 2048
    spread: SpreadCfg = field(default_factory=SpreadCfg)


class SparseMatcher(Matcher):
    """Base of kornia's matchers: images are shrunk to ``max_side``, keypoints come back in original pixels."""

    def __init__(self, name: str, device: torch.device, cfg: SparseCfg) -> None:
        self.name, self.device, self.cfg = name, device, cfg

    def _match_pair(self, image_A: Float[Tensor, "ha wa 3"], image_B: Float[Tensor, "hb wb 3"]) -> Match:
        small_A, small_B = (fit_long_side(image, self.cfg.max_side) for image in (image_A, image_B))
        for image in (small_A, small_B):
            if min(image.shape[:2]) < _MIN_SIDE:
                got = f"{image.shape[1]}x{image.shape[0]} px, at a long side of at most {self.cfg.max_side}"
                expected = f"images of at least {_MIN_SIDE}x{_MIN_SIDE} px"
                raise ShapeError(f"matcher '{self.name}'", expected=expected, got=got)
        points_A, points_B, certainty = self._correspondences(self._batch(small_A), self._batch(small_B))
        return match_from_keypoints(
            _rescaled(points_A, small_A, image_A), _rescaled(points_B, small_B, image_B),
            certainty.float().cpu(), _hw(image_A), _hw(image_B), matcher=self.name, cfg=self.cfg.spread,
        )  # fmt: skip

    @abstractmethod
    def _correspondences(
        self, image_A: Float[Tensor, "1 3 ha wa"], image_B: Float[Tensor, "1 3 hb wb"]
    ) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 2"], Float[Tensor, " n"]]:
        """Matched points of both images in our pixel coordinates, and the certainty of each match."""

    def _batch(self, image: Float[Tensor, "h w 3"]) -> Float[Tensor, "1 3 h w"]:
        return image.permute(2, 0, 1)[None].to(self.device)


class LoFTRMatcher(SparseMatcher):
    """LoFTR (Sun et al., CVPR 2021): no keypoints, a match for every coarse cell that is sure of itself."""

    def __init__(self, network: nn.Module, device: torch.device, cfg: SparseCfg | None = None) -> None:
        super().__init__("loftr", device, cfg or SparseCfg(max_side=840))
        self.network = network.to(device).eval()

    def _correspondences(
        self, image_A: Float[Tensor, "1 3 ha wa"], image_B: Float[Tensor, "1 3 hb wb"]
    ) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 2"], Float[Tensor, " n"]]:
        from kornia.color import rgb_to_grayscale

        found = self.network({"image0": rgb_to_grayscale(image_A), "image1": rgb_to_grayscale(image_B)})
        # Its weights were trained with the first pixel's centre at (0.5, 0.5), kornia says, and it is not shifted
        # there to kornia's integer centres: its coordinates are ours.
        return found["keypoints0"], found["keypoints1"], found["confidence"]


# Keypoints (n, 2), the first pixel's centre at (0, 0), and their descriptors (n, d), of an image (1, 3, H, W)
_Detector = Callable[[Tensor], tuple[Tensor, Tensor]]


class LightGlueMatcher(SparseMatcher):
    """Keypoints of a learned detector, matched by LightGlue (Lindenberger et al., ICCV 2023)."""

    def __init__(
        self, name: str, detect: _Detector, lightglue: nn.Module, device: torch.device, cfg: SparseCfg
    ) -> None:
        super().__init__(name, device, cfg)
        self.detect = detect
        self.lightglue = lightglue.to(device).eval()

    def _correspondences(
        self, image_A: Float[Tensor, "1 3 ha wa"], image_B: Float[Tensor, "1 3 hb wb"]
    ) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 2"], Float[Tensor, " n"]]:
        (keypoints_A, descriptors_A), (keypoints_B, descriptors_B) = (
            self.detect(image_A),
            self.detect(image_B),
        )
        found = self.lightglue({
            "image0": {"keypoints": keypoints_A[None], "descriptors": descriptors_A[None], "image": image_A},
            "image1": {"keypoints": keypoints_B[None], "descriptors": descriptors_B[None], "image": image_B},
        })  # fmt: skip
        index_A, index_B = found["matches"][0].unbind(-1)
        points_A, points_B = (
            from_integer_centers(keypoints_A[index_A]),
            from_integer_centers(keypoints_B[index_B]),
        )
        return points_A, points_B, found["scores"][0]


def load_loftr(weights: str | Path | None = None, device: torch.device | None = None) -> LoFTRMatcher:
    """LoFTR for outdoor scenes, with the published weights or a file of the same format."""
    from kornia.feature import LoFTR

    network = load_strict(LoFTR(pretrained=None), LOFTR_OUTDOOR.read(weights), "LoFTR")
    return LoFTRMatcher(network, device or torch.device("cpu"))


def load_disk_lightglue(
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    device: torch.device | None = None,
    cfg: SparseCfg | None = None,
) -> LightGlueMatcher:
    """DISK (Tyszkiewicz et al., NeurIPS 2020) and LightGlue; ``weights`` are LightGlue's, the backbone's DISK's."""
    from kornia.feature import DISK

    device, cfg = device or torch.device("cpu"), cfg or SparseCfg()
    disk = load_strict(DISK(), DISK_DEPTH.read(backbone_weights), "DISK").to(device).eval()

    def detect(image: Tensor) -> tuple[Tensor, Tensor]:
        features = disk(image, n=cfg.max_keypoints, pad_if_not_divisible=True)[0]
        return features.keypoints.float(), features.descriptors

    return LightGlueMatcher("disk-lightglue", detect, _lightglue(DISK_LIGHTGLUE, weights), device, cfg)


def load_aliked_lightglue(
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    device: torch.device | None = None,
    cfg: SparseCfg | None = None,
) -> LightGlueMatcher:
    """ALIKED (Zhao et al. 2023) and LightGlue; ``weights`` are LightGlue's, the backbone's ALIKED's."""
    from kornia.feature import ALIKED

    device, cfg = device or torch.device("cpu"), cfg or SparseCfg()
    network = ALIKED(max_num_keypoints=cfg.max_keypoints)
    aliked = load_strict(network, ALIKED_N16.read(backbone_weights), "ALIKED").to(device).eval()

    def detect(image: Tensor) -> tuple[Tensor, Tensor]:
        features = aliked(image)[0]
        return features.keypoints, features.descriptors

    return LightGlueMatcher("aliked-lightglue", detect, _lightglue(ALIKED_LIGHTGLUE, weights), device, cfg)


def _lightglue(checkpoint: Checkpoint, weights: str | Path | None) -> nn.Module:
    from kornia.feature import LightGlue

    network = LightGlue(features=None, input_dim=128)  # pyright: ignore[reportArgumentType] - None fetches nothing
    computed = {"confidence_thresholds": network.state_dict()["confidence_thresholds"]}  # not in every file
    return load_strict(network, computed | checkpoint.read(weights), "LightGlue")


def _lightglue_keys(state: State) -> State:
    """The published files list self- and cross-attention apart, kornia layer by layer."""
    return {
        re.sub(r"^(self_attn|cross_attn)\.(\d+)\.", r"transformers.\2.\1.", key): tensor
        for key, tensor in state.items()
    }


def _rescaled(points: Tensor, small: Tensor, image: Tensor) -> Float[Tensor, "n 2"]:
    """Points of the shrunk image in pixels of the original."""
    return to_pixel(to_normalized(points.float().cpu(), _hw(small)), _hw(image))


def _hw(image: Tensor) -> HW:
    return image.shape[0], image.shape[1]


_MIN_SIDE = 32  # px; the coarsest maps of the networks need some cells

_GLUE = "https://github.com/cvg/LightGlue/releases/download/v0.1_arxiv"

# Digests are what projects that pin the same addresses agree on; empty: none published. Aliases are kornia's names.
LOFTR_OUTDOOR = Checkpoint(
    "loftr",
    "loftr_outdoor.ckpt",
    "https://huggingface.co/kornia/loftr/resolve/main/loftr_outdoor.ckpt",
    licence="Apache-2.0",
)
DISK_DEPTH = Checkpoint(
    "disk",
    "depth-save.pth",
    "https://raw.githubusercontent.com/cvlab-epfl/disk/master/depth-save.pth",
    sha256="9c2ee4ded238892dfa51569941372601e35e4a74aa6f84ea80053d2ab1c07abe",
    licence="Apache-2.0",
)
DISK_LIGHTGLUE = Checkpoint(
    "disk-lightglue",
    "disk_lightglue.pth",
    f"{_GLUE}/disk_lightglue.pth",
    sha256="b5b21d47ea24f2c5e501aec9c91b9716e4c8c3429a4dc1e615c133c4c9378335",
    licence="Apache-2.0",
    aliases=("disk_lightglue_v0-1_arxiv-pth",),
    adapt=_lightglue_keys,
)
ALIKED_N16 = Checkpoint(
    "aliked",
    "aliked-n16.pth",
    "https://github.com/Shiaoming/ALIKED/raw/main/models/aliked-n16.pth",
    licence="BSD-3-Clause",
)
ALIKED_LIGHTGLUE = Checkpoint(
    "aliked-lightglue",
    "aliked_lightglue.pth",
    f"{_GLUE}/aliked_lightglue.pth",
    licence="Apache-2.0",
    aliases=("aliked_lightglue_v0-1_arxiv-pth",),
    adapt=_lightglue_keys,
)
