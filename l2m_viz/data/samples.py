"""Pictures that are already on the disk: samples inside the scikit-image wheel. Nothing is ever downloaded.

``motorcycle`` is a rectified stereo pair with measured disparity d (Middlebury 2014, quarter size), so its
depth, poses, warp and covisibility are known. scikit-image's docstring is silent or wrong about most of this;
measured here:

* d belongs to the left image (A), and the right one (B) shows that point at x_B = x_A - d;
* unknown disparity is +inf, not NaN;
* the principal points of the two cameras differ by 31.086 px ("doffs"), so Z = f b / (d + 31.086), not f b /
d.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from l2m_viz.data.images import read_image
from l2m_viz.errors import MissingError
from l2m_viz.geometry import inside_image, pixel_grid, to_normalized

_PHOTOS = {  # name: file, source
    "astronaut": ("astronaut.png", "NASA, portrait of Eileen Collins; public domain"),
    "coffee": ("coffee.png", "Rachel Michetti, Pikolo Espresso Bar; CC0"),
    "chelsea": ("chelsea.png", "Stefan van der Walt; CC0"),
    "rocket": ("rocket.jpg", "SpaceX, launch of DSCOVR; public domain"),
}
_MOTORCYCLE_SOURCE = "Middlebury stereo 2014, Motorcycle, quarter size (Scharstein et al., GCPR 2014)"
# Middlebury's calibration divided by 4, as scikit-image publishes it; px, except the baseline in metres.
_FOCAL, _CX, _CY, _DOFFS, _BASELINE = 994.978, 311.193, 254.877, 31.086, 0.193001
_OCCLUSION_TOL = 1.0  # px of disparity by which a pixel may lie behind what B sees at the same place


@dataclass(frozen=True)
class Sample:
    """A photo, or a pair with its geometry; a single photo has None in every tensor after ``image_A``.

    ``depth_A`` is in metres and ``warp_A_to_B`` normalised; both are finite everywhere and mean something
    only where ``valid_A``. ``covisibility_A_to_B`` implies ``valid_A``. ``source`` is origin and licence.
    """

    name: str
    image_A: Float[Tensor, "h w 3"]
    image_B: Float[Tensor, "h w 3"] | None = None
    depth_A: Float[Tensor, "h w"] | None = None
    valid_A: Bool[Tensor, "h w"] | None = None
    K_A: Float[Tensor, "3 3"] | None = None
    K_B: Float[Tensor, "3 3"] | None = None
    T_A_to_B: Float[Tensor, "4 4"] | None = None
    warp_A_to_B: Float[Tensor, "h w 2"] | None = None
    covisibility_A_to_B: Bool[Tensor, "h w"] | None = None
    source: str = ""


def list_samples() -> list[str]:
    """Names for `load_sample`; the first is the pair with ground truth, the others are single photos.

    >>> list_samples()
    ['motorcycle', 'astronaut', 'coffee', 'chelsea', 'rocket']
    """
    return ["motorcycle", *_PHOTOS]


def load_sample(name: str) -> Sample:
    """Load a sample from the installed scikit-image; every call returns tensors of its own.

    Raises:
        MissingError: there is no sample of this name, or scikit-image is not installed, or lacks the file.
    """
    if name == "motorcycle":
        return _motorcycle()
    if name not in _PHOTOS:
        raise MissingError("no such sample", expected=f"one of {', '.join(list_samples())}", got=repr(name))
    file, source = _PHOTOS[name]
    return Sample(name, read_image(_sample_path(file)), source=source)


def _sample_path(file: str) -> Path:
    """Find a file inside the installed package, not by scikit-image's loader, which would try the network."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingError("the samples are files of scikit-image", todo="run `pip install scikit-image`")
    path = Path(spec.origin).parent / "data" / file
    if not path.is_file():
        todo = "install scikit-image from its wheel, which carries it"
        raise MissingError(f"sample file {file}", expected=f"it at {path}", got="no such file", todo=todo)
    return path


def _motorcycle() -> Sample:
    with np.load(_sample_path("motorcycle_disp.npz"), allow_pickle=False) as archive:
        disparity_px = torch.from_numpy(archive["arr_0"].astype(np.float32))  # [h w], of the left image
    image_A = read_image(_sample_path("motorcycle_left.png"))
    image_B = read_image(_sample_path("motorcycle_right.png"))
    valid = torch.isfinite(disparity_px)
    disparity_px = torch.where(valid, disparity_px, 0.0)
    hw = (image_A.shape[0], image_A.shape[1])

    # The published principal point is the full-size one divided by 4, which is exact where an image spans [0, W], as
    # ours does; so it is taken as it is. Disparity cannot tell (only cx_B - cx_A enters it).
    K_A = torch.tensor([[_FOCAL, 0.0, _CX], [0.0, _FOCAL, _CY], [0.0, 0.0, 1.0]])
    K_B = torch.tensor([[_FOCAL, 0.0, _CX + _DOFFS], [0.0, _FOCAL, _CY], [0.0, 0.0, 1.0]])
    T_A_to_B = torch.eye(4)
    T_A_to_B[0, 3] = -_BASELINE  # B stands to the right of A

    depth = _FOCAL * _BASELINE / (disparity_px + _DOFFS)
    points_B = pixel_grid(hw)
    points_B[..., 0] -= disparity_px
    warp = to_normalized(points_B, hw)
    return Sample(
        "motorcycle",
        image_A,
        image_B=image_B,
        depth_A=torch.where(valid, depth, 1.0),
        valid_A=valid,
        K_A=K_A,
        K_B=K_B,
        T_A_to_B=T_A_to_B,
        warp_A_to_B=warp,
        covisibility_A_to_B=valid & inside_image(warp) & _unoccluded(disparity_px, valid),
        source=_MOTORCYCLE_SOURCE,
    )


def _unoccluded(disparity_px: Float[Tensor, "h w"], valid: Bool[Tensor, "h w"]) -> Bool[Tensor, "h w"]:
    """Say which left pixels the right camera sees: none lands beside them with a larger disparity (nearer).

    A z-buffer in the right image: each pixel of A falls between two columns of B and is written to both,
    which closes the cracks where a surface is stretched; then it must hold its place in both, up to
    `_OCCLUSION_TOL`.
    """
    height, width = disparity_px.shape
    x_B = torch.arange(width) - disparity_px  # integer pixel centres are handy for columns
    left = x_B.floor().long()
    seen = torch.ones_like(valid)
    nearest = torch.full(
        (height, width + 2), -torch.inf
    )  # one spare column on either side for what falls outside
    columns = [(left + step + 1).clamp(0, width + 1) for step in (0, 1)]
    written = torch.where(valid, disparity_px, -torch.inf)
    for column in columns:
        nearest.scatter_reduce_(1, column, written, "amax")
    for column in columns:
        inner = (column > 0) & (column <= width)
        seen &= ~inner | (disparity_px >= nearest.gather(1, column) - _OCCLUSION_TOL)
    return seen & valid
