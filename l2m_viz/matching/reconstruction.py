"""Matches for structure from motion: files of hloc (HDF5) and databases of COLMAP, with keypoints that pairs share.

A reconstruction needs tracks, the same keypoint of an image in several pairs. Matches drawn at random hardly ever meet
again, and then only two images register. So every image has keypoints of its own, the centres of a lattice that depends
on its size alone; a pair adds, for each that is matched with certainty, its partner in the other image where it lies,
between pixels. Nothing is rounded. A sparse matcher's keypoints are shared as they are.
"""

import math
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from l2m_viz.data.files import atomic_write
from l2m_viz.errors import FileFormatError, L2MError, MissingError, ShapeError
from l2m_viz.geometry import HW, normalized_grid, to_integer_centers, to_pixel
from l2m_viz.matching.match import Match, Matches

if TYPE_CHECKING:
    import h5py
    import pycolmap

FEATURES, MATCHES = "features.h5", "matches.h5"
_FOCAL_OVER_SIDE = 1.2  # COLMAP's guess for a camera that it knows nothing about
_EXTRA = "pip install 'l2m-viz[reconstruction]'"


class NamedMatch(NamedTuple):
    """A match and its images' names: paths relative to the folder of images that the reconstruction will be given."""

    name_A: str
    name_B: str
    match: Match
    # Intrinsics (3, 3) in pixels where they are known; COLMAP starts from them.
    K_A: Float[torch.Tensor, "3 3"] | None = None
    K_B: Float[torch.Tensor, "3 3"] | None = None


def shared_matches(match: Match, num: int, min_certainty: float) -> Matches:
    """Matches whose ends in one image at least are the same in every pair of that image.

    Args:
        match: Of a dense matcher, or of a sparse one.
        num: At most so many keypoints of each image's own, and so at most 2 ``num`` matches; of a sparse matcher the
            most certain ``num``.
        min_certainty: Less certain ones are left out.

    Raises:
        L2MError: ``num`` is not positive, or the certainty not from 0 to 1.
    """
    if not isinstance(num, int) or num < 1:
        raise L2MError("matches for a reconstruction", expected="a whole num >= 1", got=repr(num))
    if not 0 <= min_certainty <= 1:
        got = f"{min_certainty:g}"
        raise L2MError("matches for a reconstruction", expected="min_certainty from 0 to 1", got=got)
    if match.keypoints_A is not None:
        found = match.sample(num)
    else:
        own_A, own_B = _lattice(match.hw_A, num), _lattice(match.hw_B, num)
        there, certainty_A = match.query(own_A, "A_to_B")
        back, certainty_B = match.query(own_B, "B_to_A")
        found = Matches(
            torch.cat([own_A, back]), torch.cat([there, own_B]), torch.cat([certainty_A, certainty_B])
        )
    certain = (found.certainty >= min_certainty) & (found.certainty > 0)
    # an answer on the border itself was clamped to it: the partner is outside
    for points, hw in ((found.points_A, match.hw_A), (found.points_B, match.hw_B)):
        certain &= ((points > 0) & (points < torch.tensor(hw[::-1]))).all(dim=-1)
    return Matches(found.points_A[certain], found.points_B[certain], found.certainty[certain])


def write_hloc(
    folder: str | Path, pairs: Iterable[NamedMatch], *, num: int = 2500, min_certainty: float = 0.5
) -> int:
    """Add pairs to ``features.h5`` and ``matches.h5``, as hloc's `reconstruction` and `triangulation` read them.

    Keypoints are (x, y) with whole numbers at pixel centres, hloc's convention. A pair that is there is replaced, both
    files are whole or as they were; keypoints of earlier pairs keep their numbers.

    Args:
        folder: Made if it is not there.
        pairs: May be made one after the other: each is written before the next is asked for.
        num: See `shared_matches`.
        min_certainty: See `shared_matches`.

    Returns:
        The number of matches written.

    Raises:
        MissingError: the package h5py is not installed.
        FileFormatError: a file that is there is not HDF5, or its keypoints come from another method.
        L2MError: a pair of an image with itself, or a name that is none.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingError("hloc files", expected="the package h5py", got=str(error), todo=_EXTRA) from error
    folder, total = Path(folder), 0
    with (  # features take their place first: a reader never meets a match without its keypoints
        _edited(folder / MATCHES) as new_matches,
        _edited(folder / FEATURES) as new_features,
        _opened(h5py, new_matches) as matches,
        _opened(h5py, new_features) as features,
    ):
        for pair in pairs:
            _check_names(pair)
            found = shared_matches(pair.match, num, min_certainty)
            ends = ((pair.name_A, found.points_A), (pair.name_B, found.points_B))
            index_A, index_B = (
                _add_hloc_keypoints(features, name, to_integer_centers(points).numpy())
                for name, points in ends
            )
            names = pair.name_A, pair.name_B
            _write_hloc_pair(matches, features, names, (index_A, index_B), found.certainty)
            total += len(found)
    return total


def write_colmap(
    database: str | Path, pairs: Iterable[NamedMatch], *, num: int = 2500, min_certainty: float = 0.5
) -> int:
    """Add cameras, images, keypoints and matches to a COLMAP database, for `colmap geometric_verifier` and the mapper.

    An image that is not there gets a camera of its own: PINHOLE with its intrinsics, or without them SIMPLE_RADIAL with
    COLMAP's guess of the focal length. A pair that is there is replaced, and has to be verified again. The database is
    changed as a whole or not at all.

    Args:
        database: Made if it is not there.
        pairs: See `write_hloc`.
        num: See `shared_matches`.
        min_certainty: See `shared_matches`.

    Returns:
        The number of matches written.

    Raises:
        MissingError: the package pycolmap is not installed.
        FileFormatError: the file is not a database of COLMAP, is in use, or has other sizes or keypoints for an image.
        L2MError: a pair of an image with itself, or a name that is none.
        ShapeError: intrinsics that are not (3, 3).
    """
    try:
        import pycolmap
    except ImportError as error:
        what = "COLMAP database"
        raise MissingError(what, expected="the package pycolmap", got=str(error), todo=_EXTRA) from error
    database, total = Path(database), 0
    with _edited(database, _copy_database) as temporary, _colmap(pycolmap, temporary, database) as db:
        for pair in pairs:
            _check_names(pair)
            found = shared_matches(pair.match, num, min_certainty)
            image_A = _colmap_image(pycolmap, db, pair.name_A, pair.match.hw_A, pair.K_A)
            image_B = _colmap_image(pycolmap, db, pair.name_B, pair.match.hw_B, pair.K_B)
            index_A = _add_colmap_keypoints(db, image_A, pair.name_A, found.points_A.numpy())
            index_B = _add_colmap_keypoints(db, image_B, pair.name_B, found.points_B.numpy())
            if db.exists_matches(image_A, image_B):
                db.delete_matches(image_A, image_B)
            if db.exists_two_view_geometry(image_A, image_B):
                db.delete_two_view_geometry(image_A, image_B)
            db.write_matches(image_A, image_B, np.stack([index_A, index_B], axis=1).astype(np.uint32))
            total += len(found)
    return total


def _lattice(hw: HW, num: int) -> Float[torch.Tensor, "n 2"]:
    """At most ``num`` points (x, y) in pixels, the centres of cells that are as square as they can be."""
    columns = min(num, max(1, round(math.sqrt(num * hw[1] / hw[0]))))
    return to_pixel(normalized_grid((max(1, num // columns), columns)).flatten(0, 1), hw)


def _numbered(known: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``known`` (n, 2) with the points behind it that are not in it yet, and the number of each point there."""
    both = np.ascontiguousarray(np.concatenate([known, points]), np.float32)
    _, first, inverse = np.unique(both.view(np.complex64), return_index=True, return_inverse=True)
    first = first[inverse.reshape(-1)]  # for each row the first equal one
    new = np.unique(first[len(known) :])
    new = new[new >= len(known)]
    order = np.arange(len(both))
    order[new] = len(known) + np.arange(len(new))
    return np.concatenate([both[: len(known)], both[new]]), order[first[len(known) :]]


def _check_names(pair: NamedMatch) -> None:
    for name in (pair.name_A, pair.name_B):
        if not name or name.startswith("/") or "\\" in name:
            raise L2MError(
                "name of an image",
                expected="a path relative to the folder of images, with /",
                got=repr(name),
            )
    if pair.name_A == pair.name_B:
        todo = "give two images two names"
        raise L2MError("pair", expected="two images", got=f"{pair.name_A!r} twice", todo=todo)


@contextmanager
def _edited(path: Path, copy: Any = shutil.copyfile) -> Iterator[Path]:  # noqa: ANN401 (what shutil has)
    """A copy of the file, or none yet, that takes its place when the block ends without an error."""
    with atomic_write(path) as file:
        temporary = Path(file.name)
        if path.exists():
            copy(path, temporary)
        else:
            temporary.unlink()  # who opens it makes it
        yield temporary


@contextmanager
def _opened(h5py: Any, path: Path) -> "Iterator[h5py.File]":  # noqa: ANN401 (a module)
    try:
        file = h5py.File(path, "a")
    except OSError as error:
        expected = "an HDF5 file"
        raise FileFormatError(f"cannot add to {path.parent}", expected=expected, got=str(error)) from error
    with file:
        yield file


def _add_hloc_keypoints(file: "h5py.File", name: str, points: np.ndarray) -> np.ndarray:
    """Add an image's keypoints; return their numbers."""
    group = file.require_group(name)
    if "descriptors" in group:
        todo = "write into another folder"
        got = f"{name} with descriptors"
        raise FileFormatError(f"{FEATURES}", expected="keypoints that were written here", got=got, todo=todo)
    known = np.asarray(group["keypoints"]) if "keypoints" in group else np.empty((0, 2), np.float32)
    keypoints, index = _numbered(known, points)
    if len(keypoints) > len(known) or "keypoints" not in group:
        if "keypoints" in group:
            del group["keypoints"]
        group.create_dataset("keypoints", data=keypoints)
    return index


def _write_hloc_pair(
    matches: "h5py.File",
    features: "h5py.File",
    names: tuple[str, str],
    index: tuple[np.ndarray, np.ndarray],
    certainty: torch.Tensor,
) -> None:
    """Write a pair as hloc does: for each keypoint of A the number of its partner in B, or -1."""
    there, back = ("/".join(name.replace("/", "-") for name in order) for order in (names, names[::-1]))
    for key in (there, back):
        if key in matches:
            del matches[key]
            first = key.partition("/")[0]
            if not len(matches.require_group(first)):  # an empty group is not false
                del matches[first]
    count = len(np.asarray(features[f"{names[0]}/keypoints"]))
    partner, score = np.full(count, -1, np.int32), np.zeros(count, np.float16)
    rising = certainty.argsort(
        stable=True
    ).numpy()  # where a keypoint has two partners, the more certain one stays
    partner[index[0][rising]], score[index[0][rising]] = index[1][rising], certainty.numpy()[rising]
    group = matches.create_group(there)
    group.create_dataset("matches0", data=partner)
    group.create_dataset("matching_scores0", data=score)


def _copy_database(source: Path, target: Path) -> None:
    """Copy a database through SQLite, which knows of its unfinished business."""
    if any(source.with_name(source.name + end).exists() for end in ("-wal", "-journal")):
        todo = "close the program that has it open"
        raise FileFormatError(
            f"{source}", expected="a database that is not in use", got="one that is", todo=todo
        )
    try:
        with (
            closing(sqlite3.connect(f"file:{source}?mode=rw", uri=True)) as old,
            closing(sqlite3.connect(target)) as new,
        ):
            old.backup(new)
    except sqlite3.Error as error:
        got = str(error)
        raise FileFormatError(f"{source}", expected="a database of COLMAP", got=got) from error


@contextmanager
def _colmap(pycolmap: Any, path: Path, name: Path) -> "Iterator[pycolmap.Database]":  # noqa: ANN401 (a module)
    try:
        database = pycolmap.Database.open(path)
    except RuntimeError as error:
        got = str(error)
        raise FileFormatError(f"{name}", expected="a database of COLMAP", got=got) from error
    with database, pycolmap.DatabaseTransaction(database):
        yield database


def _colmap_image(
    pycolmap: Any,  # noqa: ANN401 (a module)
    db: "pycolmap.Database",
    name: str,
    hw: HW,
    K: Float[torch.Tensor, "3 3"] | None,
) -> int:
    """Number of an image in the database; a new one gets a camera, and the rig and frame that COLMAP 4 asks for."""
    image = db.read_image_with_name(name)
    if image is not None:
        camera = db.read_camera(image.camera_id)
        if (camera.height, camera.width) != hw:
            got = f"{hw[1]}x{hw[0]} px"
            expected = f"{camera.width}x{camera.height} px as in the database"
            raise FileFormatError(f"image {name}", expected=expected, got=got)
        return image.image_id
    camera = pycolmap.Camera(model="SIMPLE_RADIAL", width=hw[1], height=hw[0])
    if K is None:
        camera.params = [_FOCAL_OVER_SIDE * max(hw), hw[1] / 2, hw[0] / 2, 0.0]
    else:
        if tuple(K.shape) != (3, 3):
            raise ShapeError(f"intrinsics of {name}", expected="K (3, 3) in px", got=str(tuple(K.shape)))
        camera = pycolmap.Camera(model="PINHOLE", width=hw[1], height=hw[0])
        camera.params = [float(K[0, 0]), float(K[1, 1]), float(K[0, 2]), float(K[1, 2])]
        camera.has_prior_focal_length = True
    camera.camera_id = db.write_camera(camera)
    rig = pycolmap.Rig()
    rig.add_ref_sensor(camera.sensor_id)
    image = pycolmap.Image(name=name, camera_id=camera.camera_id)
    image.image_id = db.write_image(image)
    frame = pycolmap.Frame()
    frame.rig_id = db.write_rig(rig)
    frame.add_data_id(image.data_id)
    db.write_frame(frame)
    return image.image_id


def _add_colmap_keypoints(db: "pycolmap.Database", image: int, name: str, points: np.ndarray) -> np.ndarray:
    """Add an image's keypoints; return their numbers."""
    known = db.read_keypoints(image) if db.exists_keypoints(image) else np.empty((0, 2), np.float32)
    if known.shape[1] != 2 or db.exists_descriptors(image):
        got, todo = f"{name} with another method's", "write into another database"
        raise FileFormatError("keypoints", expected="those that were written here", got=got, todo=todo)
    keypoints, index = _numbered(known, points)
    if db.exists_keypoints(image):
        db.update_keypoints(image, keypoints)
    else:
        db.write_keypoints(image, keypoints)
    return index
