"""The development pairs: small real pairs with truth, in a folder that the user gives, and pairs without any overlap.

| benchmark | pairs | truth | files below the folder |
|---|---|---|---|
| rgbd | 7 | measured depth in mm and poses | rgbd/color_N.png, rgbd/depth_N.png, rgbd/pose.txt (N = 1 .. 5) |
| graf | 2 | a plane's homography | graf/imgN.png, graf/H1toNp |
| cones | 1 | measured disparity | stereo_cones/cones_{left,right,gt,mask}.png |
| motorcycle | 1 | measured disparity | none: it is a sample of `load_sample` |
| unrelated | 5 | nothing is covisible | the first images of the others, and sacre_coeur/A.jpg |

The files count pixel centres at integers; here is the border where they are shifted.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from l2m_viz.data import load_sample, read_image
from l2m_viz.errors import FileFormatError, L2MError, MissingError
from l2m_viz.evaluation.evaluate import EvalPair
from l2m_viz.geometry import (
    from_integer_centers,
    inside_image,
    invert_pose,
    normalized_grid,
    pixel_grid,
    pose_from_rotation,
    relative_pose,
    rotation_from_quat,
    sample_image,
    to_integer_centers,
    to_normalized,
    transform_points,
    unproject_depth,
)
from l2m_viz.lifting import read_depth, warp_from_depth

DevBenchmark = Literal["rgbd", "graf", "cones", "motorcycle", "unrelated"]
DEV_BENCHMARKS: tuple[DevBenchmark, ...] = get_args(DevBenchmark)

_RGBD_PAIRS = ((1, 2), (1, 3), (2, 3), (2, 4), (3, 4), (3, 5), (4, 5))
_RGBD_FOCAL, _RGBD_CENTER = (518.0, 519.0), (325.5, 253.5)  # px; the centre counts pixels from integers
_MILLIMETRE = 0.001
_UNRELATED = (
    "rgbd/color_1.png",
    "graf/img1.png",
    "stereo_cones/cones_left.png",
    "motorcycle",
    "sacre_coeur/A.jpg",
)


def load_dev_pairs(folder: str | Path, benchmarks: Sequence[DevBenchmark] = DEV_BENCHMARKS) -> list[EvalPair]:
    """Read the pairs of these benchmarks.

    Raises:
        L2MError: there is no benchmark of this name.
        MissingError: a file is absent.
        ImageError: a picture cannot be read.
        FileFormatError: a depth, pose or homography file cannot be read.
    """
    for name in benchmarks:
        if name not in _LOADERS:
            raise L2MError("no such benchmark", expected=f"some of {', '.join(_LOADERS)}", got=repr(name))
    return [pair for name in benchmarks for pair in _LOADERS[name](Path(folder))]


def _rgbd(folder: Path) -> list[EvalPair]:
    """Depth and pose of both frames say where a pixel went, and whether it is seen there."""
    poses = _read_numbers(folder, "rgbd/pose.txt", columns=7)
    frames = range(1, 6)
    if len(poses) < len(frames):
        raise FileFormatError(f"{folder / 'rgbd/pose.txt'}", expected="5 lines", got=str(len(poses)))
    images = {n: read_image(_file(folder, f"rgbd/color_{n}.png")) for n in frames}
    depths = {n: read_depth(_file(folder, f"rgbd/depth_{n}.png"), scale=_MILLIMETRE) for n in frames}
    center = from_integer_centers(torch.tensor(_RGBD_CENTER)).tolist()
    K = torch.tensor([[_RGBD_FOCAL[0], 0.0, center[0]], [0.0, _RGBD_FOCAL[1], center[1]], [0.0, 0.0, 1.0]])
    pairs = []
    for a, b in _RGBD_PAIRS:
        T = relative_pose(*(invert_pose(_pose(poses[n - 1])) for n in (a, b))).float()
        A, B = depths[a], depths[b]
        warp, covisible = warp_from_depth(A.depth, K, B.depth, K, T, A.valid_mask, B.valid_mask)
        in_front = transform_points(T, unproject_depth(A.depth, K))[..., 2] > 0
        lands = in_front & inside_image(warp)
        # Whether B sees a point is known where both depths are, or where the point leaves B's frame.
        measured = sample_image(B.valid_mask.float(), warp, mode="nearest") > 0.5
        known = A.valid_mask & (~lands | measured | covisible)
        pairs.append(
            EvalPair(
                "rgbd", f"{a}-{b}", images[a], images[b], warp, covisible, known, K_A=K, K_B=K, T_A_to_B=T
            )
        )
    return pairs


def _graf(folder: Path) -> list[EvalPair]:
    """One plane seen from three places: the homography is the truth of every pixel."""
    image_A = read_image(_file(folder, "graf/img1.png"))
    pairs = []
    for n in (2, 3):
        image_B = read_image(_file(folder, f"graf/img{n}.png"))
        homography = _read_numbers(folder, f"graf/H1to{n}p", columns=3)
        if homography.shape != (3, 3):
            got = str(tuple(homography.shape))
            raise FileFormatError(
                f"{folder / 'graf' / f'H1to{n}p'}", expected="3 lines of 3 numbers", got=got
            )
        points = to_integer_centers(pixel_grid(_hw(image_A), dtype=torch.float64))
        mapped = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1) @ homography.T
        in_front = mapped[..., 2] > 0
        landed = from_integer_centers(mapped[..., :2] / torch.where(in_front, mapped[..., 2], 1.0)[..., None])
        warp = to_normalized(landed, _hw(image_B)).float()
        covisible = in_front & inside_image(warp)
        pairs.append(
            EvalPair("graf", f"1-{n}", image_A, image_B, warp, covisible, torch.ones_like(covisible))
        )
    return pairs


def _cones(folder: Path) -> list[EvalPair]:
    """Rectified stereo: a pixel of the left image lies ``disparity`` pixels further left in the right one."""
    image_A, image_B = (
        read_image(_file(folder, f"stereo_cones/cones_{side}.png")) for side in ("left", "right")
    )
    # not a depth, but a grey map whose 0 is unknown: at scale 1 the reader gives its numbers as they are
    disparity_px = read_depth(_file(folder, "stereo_cones/cones_gt.png"))
    unoccluded = read_image(_file(folder, "stereo_cones/cones_mask.png"))[..., 0] > 0.5
    landed = pixel_grid(_hw(image_A))
    landed[..., 0] -= disparity_px.depth
    warp = to_normalized(landed, _hw(image_B))
    known = disparity_px.valid_mask
    covisible = known & unoccluded & inside_image(warp)
    return [EvalPair("cones", "left-right", image_A, image_B, warp, covisible, known)]


def _motorcycle(folder: Path) -> list[EvalPair]:
    """The embedded stereo sample; its pose is left out, because one rectified pair makes no pose benchmark."""
    del folder  # it comes with scikit-image
    sample = load_sample("motorcycle")
    truth = sample.warp_A_to_B, sample.covisibility_A_to_B, sample.valid_A
    assert sample.image_B is not None and not any(value is None for value in truth)
    return [EvalPair("motorcycle", "left-right", sample.image_A, sample.image_B, *truth)]  # pyright: ignore


def _unrelated(folder: Path) -> list[EvalPair]:
    """Each scene with the next one, of which it shows nothing."""
    images = {}
    for name in _UNRELATED:
        sample = name == "motorcycle"
        images[Path(name).parts[0]] = load_sample(name).image_A if sample else read_image(_file(folder, name))
    names = list(images)
    pairs = []
    for a, b in zip(names, [*names[1:], names[0]], strict=True):
        nowhere = torch.zeros(_hw(images[a]), dtype=torch.bool)
        warp = normalized_grid(_hw(images[a]))
        pairs.append(EvalPair("unrelated", f"{a}-{b}", images[a], images[b], warp, nowhere, ~nowhere))
    return pairs


_LOADERS: dict[str, Callable[[Path], list[EvalPair]]] = {
    "rgbd": _rgbd,
    "graf": _graf,
    "cones": _cones,
    "motorcycle": _motorcycle,
    "unrelated": _unrelated,
}


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        todo = (
            "name the folder that holds rgbd, graf, stereo_cones and sacre_coeur, or choose other benchmarks"
        )
        raise MissingError(f"no development pairs in {folder}", expected=f"a file {name}", todo=todo)
    return path


def _read_numbers(folder: Path, name: str, columns: int) -> Float64[Tensor, "n c"]:
    """Read a text file of one row of numbers a line."""
    path = _file(folder, name)
    expected = f"lines of {columns} numbers"
    try:
        rows = np.loadtxt(path, dtype=np.float64, ndmin=2)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"cannot read {path}", expected=expected, got=str(error)[:200]) from error
    if rows.shape[1] != columns or not np.isfinite(rows).all():
        raise FileFormatError(f"cannot read {path}", expected=expected, got=f"shape {rows.shape}")
    return torch.from_numpy(rows)


def _pose(line: Float64[Tensor, " 7"]) -> Float64[Tensor, "4 4"]:
    """Camera to world, of a line tx ty tz qx qy qz qw."""
    return pose_from_rotation(rotation_from_quat(line[[6, 3, 4, 5]]), line[:3])


def _hw(image: Float[Tensor, "h w 3"]) -> tuple[int, int]:
    return image.shape[0], image.shape[1]
