"""What the demo, the lift command and the viewer start from: a photo lifted with its depth, and a second view of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.data import Sample, fit_long_side, load_sample, read_image
from l2m_viz.encoders import FeaturePCA, load_encoder
from l2m_viz.errors import FileFormatError, L2MError, ShapeError
from l2m_viz.gaussians import Gaussians, gaussians_from_depth
from l2m_viz.geometry import HW, Camera, intrinsics, normalized_grid, sample_image
from l2m_viz.lifting import Depth, LiftedScene, estimate_depth, lift, orbit_cameras, read_depth

ENCODER = "l2m-tiny"  # whose features are shown unless another is named
NUM_FEATURES = 16  # PCA components of the descriptor that each Gaussian carries
# Focal length over the long side of a photo without calibration: 61 degrees, a phone's main camera held either way. The
# paper's sampler draws wider lenses for training pairs; for looking at a photo a usual lens is the better guess.
FOCAL_OVER_LONG_SIDE = 0.85
_MIN_SIDE = 32  # px; less holds too few cells of features for the basis, and no optical flow
_ASPECT_TOL = 0.03  # between photo and depth: networks round their sizes to multiples of 14 or 32
_SECOND_VIEW = 0.24  # units of the scene to the side, where there is no real second camera


@dataclass(frozen=True)
class PhotoCfg:
    """Which photo, and its depth."""

    # Embedded sample to use when no photo is given.
    sample: str = "motorcycle"
    # A photo of your own.
    image: Path | None = None
    # Its depth (.npy, .npz, 16-bit .png, ...); without it the offline prior guesses.
    depth: Path | None = None
    # "disparity" if the depth file holds inverse depth up to scale and shift.
    depth_kind: Literal["depth", "disparity"] = "depth"
    # Factor on the numbers of the depth file, 0.001 for millimetres.
    depth_scale: float = 1.0
    # Larger photos are reduced to this long side in pixels (the measured stereo sample never is).
    max_side: int = 800
    # Whose features the Gaussians carry: "l2m-tiny" (3D-aware), "l2m-tiny-2d", "dense-sift" and others.
    encoder: str = ENCODER


@dataclass(frozen=True)
class LiftedPhoto:
    """A lifted photo A and a second camera B.

    ``image_B``, ``warp_A_to_B`` and ``covisibility_A_to_B`` are measured, and None where no real second photo exists.
    """

    title: str
    scene: LiftedScene
    depth: Depth
    camera_B: Camera
    image_B: Float[Tensor, "h w 3"] | None = None
    warp_A_to_B: Float[Tensor, "h w 2"] | None = None
    covisibility_A_to_B: Bool[Tensor, "h w"] | None = None

    @property
    def length_unit(self) -> str:
        """Unit of depth, for labels."""
        return self.depth.length_unit


def lift_photo(cfg: PhotoCfg) -> LiftedPhoto:
    """Read the photo at working size, read or guess its depth, lift it, and find or choose a second camera.

    Raises:
        ImageError: the photo cannot be read.
        FileFormatError: the depth cannot be read.
        MissingError: there is no such sample.
    """
    sample = None if cfg.image else load_sample(cfg.sample)
    if cfg.depth is not None and sample is not None and sample.depth_A is not None:
        raise L2MError(
            f"sample '{cfg.sample}' has its own measured depth", todo="give your photo with --image"
        )
    if sample is not None and sample.depth_A is not None:
        return _lift_measured(sample)
    photo = read_image(cfg.image) if cfg.image else load_sample(cfg.sample).image_A
    image = fit_long_side(photo, cfg.max_side)
    hw: HW = (image.shape[0], image.shape[1])
    if min(hw) < _MIN_SIDE:
        got = f"{photo.shape[1]}x{photo.shape[0]} px, worked on at {hw[1]}x{hw[0]} px"
        todo = "take a larger or less narrow photo, or raise --max-side"
        raise ShapeError(
            "the photo is too small", expected=f"both sides >= {_MIN_SIDE} px", got=got, todo=todo
        )
    K = intrinsics(FOCAL_OVER_LONG_SIDE * max(hw), hw)
    depth = estimate_depth(image, "prior", K=K) if cfg.depth is None else _depth_of_photo(cfg, photo, hw)
    scene = lift(image, depth, K)
    camera_B = orbit_cameras(scene, 4, _SECOND_VIEW)[1]
    return LiftedPhoto(cfg.image.name if cfg.image else cfg.sample, scene, depth, camera_B)


def feature_gaussians(
    image: Float[Tensor, "h w 3"], depth: Depth, K: Float[Tensor, "3 3"], encoder: str = ENCODER
) -> tuple[Gaussians, FeaturePCA]:
    """One Gaussian a pixel that carries the principal components of the encoder's features, and the PCA basis.

    The Gaussians name the encoder (``backbone``) and hold the same basis (``pca``), so that their file says what the
    features are.

    Raises:
        MissingError: there is no such encoder, or its weights are not here.
    """
    (gaussians,) = comparable_gaussians(image, depth, K, [encoder]).values()
    assert gaussians.pca is not None
    return gaussians, gaussians.pca


def comparable_gaussians(
    image: Float[Tensor, "h w 3"], depth: Depth, K: Float[Tensor, "3 3"], encoders: Sequence[str]
) -> dict[str, Gaussians]:
    """The Gaussians of `feature_gaussians` for each encoder, by its name.

    Encoders of one width share one PCA basis, fitted on the features of all of them: there equal colour means equal
    feature, also from one encoder to the other, as between a 2D encoder and the 3D-aware one that it became.

    Raises:
        MissingError: there is no such encoder, or its weights are not here.
    """
    loaded = [load_encoder(name) for name in encoders]
    cells = {encoder.name: encoder(image) for encoder in loaded}
    bases = FeaturePCA.fit_by_width(cells.values(), NUM_FEATURES)
    pixels = normalized_grid((image.shape[0], image.shape[1]))
    made = {}
    for name, features in cells.items():
        pca = bases[features.shape[-1]]
        gaussians = gaussians_from_depth(image, depth, K, sample_image(pca.project(features), pixels))
        made[name] = replace(gaussians, backbone=name, pca=pca)
    return made


def _depth_of_photo(cfg: PhotoCfg, photo: Float[Tensor, "h w 3"], hw: HW) -> Depth:
    assert cfg.depth is not None
    depth = read_depth(cfg.depth, cfg.depth_kind, scale=cfg.depth_scale)
    aspect, photo_aspect = depth.hw[1] / depth.hw[0], photo.shape[1] / photo.shape[0]
    if abs(aspect / photo_aspect - 1) > _ASPECT_TOL:
        expected = f"the photo's shape {photo.shape[1]}x{photo.shape[0]}, at any scale"
        todo = "rotate or crop the depth as the photo is"
        got = f"{depth.hw[1]}x{depth.hw[0]}"
        raise FileFormatError(f"{cfg.depth} does not fit the photo", expected=expected, got=got, todo=todo)
    return depth.resized(hw)


def _lift_measured(sample: Sample) -> LiftedPhoto:
    assert sample.image_B is not None and sample.depth_A is not None and sample.valid_A is not None
    assert sample.K_A is not None and sample.K_B is not None and sample.T_A_to_B is not None
    depth = Depth(sample.depth_A, sample.valid_A, "metric", "measured")
    height, width = sample.image_B.shape[:2]
    return LiftedPhoto(
        sample.name,
        lift(sample.image_A, depth, sample.K_A),
        depth,
        Camera(sample.K_B, sample.T_A_to_B, width=width, height=height),
        sample.image_B,
        sample.warp_A_to_B,
        sample.covisibility_A_to_B,
    )
