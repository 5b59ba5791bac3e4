"""Matches for hloc and COLMAP: real readers, and a scene whose correspondences are known in closed form."""

import shutil
import sqlite3

import h5py
import numpy as np
import pycolmap
import pytest
import torch

from l2m_viz.errors import FileFormatError, L2MError, MissingError, ShapeError
from l2m_viz.matching import Match, NamedMatch, write_colmap, write_hloc

HW = (120, 160)
F = 130.0
# Cameras inside a ball of radius 4, all looking along z more or less: (yaw in radians, centre).
CAMERAS = [
    (0.0, (0.0, 0.0, 0.0)),
    (0.1, (0.6, 0.1, 0.1)),
    (-0.1, (-0.5, 0.3, 0.2)),
    (0.05, (0.2, -0.6, -0.1)),
]
NAMES = [f"room/{i}.jpg" for i in range(len(CAMERAS))]
K = torch.tensor([[F, 0, HW[1] / 2], [0, F, HW[0] / 2], [0, 0, 1]])


def _pose(camera: int) -> tuple[np.ndarray, np.ndarray]:
    """Camera to world, and centre."""
    yaw, centre = CAMERAS[camera]
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]), np.array(centre)


def _project(points: np.ndarray, a: int, b: int) -> np.ndarray:
    """Where points (n, 2) of camera a, px, are in camera b: through the inside of the ball |X| = 4, no code of ours."""
    R, t = _pose(a)
    rays = np.stack([(points[:, 0] - HW[1] / 2) / F, (points[:, 1] - HW[0] / 2) / F, np.ones(len(points))], 1)
    rays = (rays / np.linalg.norm(rays, axis=1, keepdims=True)) @ R.T
    along = rays @ t
    X = t + rays * (-along + np.sqrt(along**2 - t @ t + 16))[:, None]
    R2, t2 = _pose(b)
    seen = (X - t2) @ R2
    return np.stack([F * seen[:, 0] / seen[:, 2] + HW[1] / 2, F * seen[:, 1] / seen[:, 2] + HW[0] / 2], 1)


def _side(a: int, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = np.mgrid[: HW[0], : HW[1]] + 0.5
    there = _project(np.stack([x.ravel(), y.ravel()], 1), a, b)
    warp = torch.tensor(there / [HW[1] / 2, HW[0] / 2] - 1, dtype=torch.float32).view(*HW, 2)
    return warp, (warp.abs() < 1).all(-1).float()


def _match(a: int, b: int) -> Match:
    return Match(*_side(a, b), *_side(b, a), hw_A=HW, hw_B=HW)


def _pairs():
    count = len(CAMERAS)
    return [
        NamedMatch(NAMES[a], NAMES[b], _match(a, b), K, K) for a in range(count) for b in range(a + 1, count)
    ]


def _hloc_matches(path, name_A, name_B):
    """As hloc reads them: its names of pairs, and -1 for no partner."""
    with h5py.File(path) as file:
        partner = np.asarray(file[f"{name_A.replace('/', '-')}/{name_B.replace('/', '-')}/matches0"])
    found = np.flatnonzero(partner != -1)
    return np.stack([found, partner[found]], 1)


def _hloc_keypoints(path, name):
    with h5py.File(path) as file:
        return np.asarray(file[f"{name}/keypoints"])


def test_colmap_reconstructs_every_image_of_the_scene(tmp_path):
    """Two images would register with any matches; four do only if the pairs share keypoints."""
    database = tmp_path / "scene.db"
    assert write_colmap(database, iter(_pairs()), num=400) > 6 * 400
    pycolmap.geometric_verification(database)
    (tmp_path / "images").mkdir()
    options = pycolmap.IncrementalPipelineOptions()
    options.extract_colors = False  # there are no pictures
    options.ba_refine_focal_length = False
    found = pycolmap.incremental_mapping(database, tmp_path / "images", tmp_path / "sparse", options)
    scene = max(found.values(), key=lambda s: s.num_reg_images())
    assert scene.num_reg_images() == len(CAMERAS)
    assert (
        scene.compute_mean_reprojection_error() < 0.05
    )  # px: nothing was rounded, and half a pixel is not lost
    lengths = [point.track.length() for point in scene.points3D.values()]
    assert np.mean(np.array(lengths) > 2) > 0.3
    true = np.array([_pose(i)[1] for i in range(len(CAMERAS))])
    images = {image.name: image for image in scene.images.values()}
    centres = np.array([images[name].projection_center() for name in NAMES])
    true, centres = ((x - x.mean(0)) / np.linalg.norm(x - x.mean(0)) for x in (true, centres))
    u, _, v = np.linalg.svd(centres.T @ true)
    assert np.abs(centres @ u @ v - true).max() < 2e-3


def test_hloc_files_hold_the_true_positions_and_shared_keypoints(tmp_path):
    total = write_hloc(tmp_path, iter(_pairs()), num=300)
    counted = 0
    for a, b, shared in ((0, 1, (0, 2)), (1, 3, (1, 2)), (2, 3, (0, 3))):
        index = _hloc_matches(tmp_path / "matches.h5", NAMES[a], NAMES[b])
        points = [_hloc_keypoints(tmp_path / "features.h5", NAMES[i]) for i in (a, b)]
        assert len(index) > 300
        # whole numbers are pixel centres in hloc
        there = _project(points[0][index[:, 0]].astype(float) + 0.5, a, b)
        assert np.abs(there - (points[1][index[:, 1]] + 0.5)).max() < 0.02
        assert [len(np.unique(p, axis=0)) for p in points] == [len(p) for p in points]
        other = _hloc_matches(tmp_path / "matches.h5", *(NAMES[i] for i in shared))
        same_image = (a, b).index(next(iter({a, b} & set(shared))))
        mine = set(index[:, same_image])
        theirs = set(other[:, shared.index((a, b)[same_image])])
        assert len(mine & theirs) > 100
        counted += len(index)
    assert counted < total


def test_a_pair_written_again_replaces_the_first(tmp_path):
    pair = _match(0, 1)
    database = tmp_path / "a.db"
    for _ in range(2):
        count = pair.to_colmap(database, "0.jpg", "1.jpg", num=50)
        assert pair.to_hloc(tmp_path, "0.jpg", "1.jpg", num=50) == count
        with pycolmap.Database.open(database) as db:
            assert db.num_images() == 2
            matches = db.read_matches(1, 2)
            points = db.read_keypoints(1)[matches[:, 0]], db.read_keypoints(2)[matches[:, 1]]
            camera = db.read_camera(1)
        assert len(matches) == count
        assert (
            np.abs(_project(points[0].astype(float), 0, 1) - points[1]).max() < 0.02
        )  # our pixels are COLMAP's
        assert (camera.model.name, camera.has_prior_focal_length) == ("SIMPLE_RADIAL", False)
        assert len(_hloc_matches(tmp_path / "matches.h5", "0.jpg", "1.jpg")) == count
    assert not list(tmp_path.glob(".*"))


def test_the_pair_in_the_other_order_is_the_same_pair(tmp_path):
    pair = _match(0, 1)
    swapped = Match(*_side(1, 0), *_side(0, 1), hw_A=HW, hw_B=HW)
    assert pair.to_hloc(tmp_path, "0", "1", num=50) == swapped.to_hloc(tmp_path, "1", "0", num=50)
    with h5py.File(tmp_path / "matches.h5") as file:
        assert list(file) == ["1"]
        assert list(file.require_group("1")) == ["0"]
    pair.to_colmap(tmp_path / "a.db", "0", "1", num=50)
    swapped.to_colmap(tmp_path / "a.db", "1", "0", num=50)
    with pycolmap.Database.open(tmp_path / "a.db") as db:
        assert db.num_matched_image_pairs() == 1


def test_sparse_keypoints_are_shared_as_they_are(tmp_path):
    points = torch.tensor([[10.25, 20.5], [30.0, 40.0], [50.0, 60.125]])
    certainty = torch.tensor([0.9, 0.2, 0.8])
    warp, sure = torch.zeros(2, 3, 2), torch.zeros(2, 3)
    match = Match(warp, sure, warp, sure, HW, HW, "sift", points, points + 5, certainty)
    assert match.to_hloc(tmp_path, "a", "b") == 2
    assert match.to_hloc(tmp_path, "a", "c", min_certainty=0.1) == 3
    assert sorted(_hloc_keypoints(tmp_path / "features.h5", "a").tolist()) == (points - 0.5).tolist()
    assert len(_hloc_matches(tmp_path / "matches.h5", "a", "b")) == 2


def test_images_that_do_not_match_give_none(tmp_path):
    match = Match(torch.zeros(4, 5, 2), torch.zeros(4, 5), torch.zeros(4, 5, 2), torch.zeros(4, 5), HW, HW)
    assert match.to_hloc(tmp_path, "a", "b", min_certainty=0.0) == 0
    assert match.to_colmap(tmp_path / "a.db", "a", "b", min_certainty=0.0) == 0
    assert len(_hloc_matches(tmp_path / "matches.h5", "a", "b")) == 0


def test_an_error_half_way_leaves_the_files_as_they_were(tmp_path):
    match = _match(0, 1)
    match.to_hloc(tmp_path, "0", "1", num=50)
    match.to_colmap(tmp_path / "a.db", "0", "1", num=50)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def pairs():
        yield NamedMatch("0", "2", _match(0, 2))
        raise KeyboardInterrupt

    for write, place in ((write_hloc, tmp_path), (write_colmap, tmp_path / "a.db")):
        with pytest.raises(KeyboardInterrupt):
            write(place, pairs())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("names", [("a", "a"), ("", "b"), ("/a", "b"), ("a\\b", "c")])
def test_names_that_are_none(tmp_path, names):
    for write, place in ((_match(0, 1).to_hloc, tmp_path), (_match(0, 1).to_colmap, tmp_path / "a.db")):
        with pytest.raises(L2MError, match=r"name of an image|two images"):
            write(place, *names)
    assert not list(tmp_path.iterdir())


def test_numbers_out_of_range(tmp_path, unchecked):
    with pytest.raises(L2MError, match="num >= 1"):
        _match(0, 1).to_hloc(tmp_path, "a", "b", num=0)
    with pytest.raises(L2MError, match="from 0 to 1"):
        _match(0, 1).to_hloc(tmp_path, "a", "b", min_certainty=2.0)
    with pytest.raises(ShapeError, match=r"K \(3, 3\)"):
        _match(0, 1).to_colmap(tmp_path / "a.db", "a", "b", K_A=torch.eye(4))
    assert not list(tmp_path.iterdir())


def test_foreign_files_are_said_and_kept(tmp_path):
    match = _match(0, 1)
    (tmp_path / "matches.h5").write_bytes(b"not HDF5")
    (tmp_path / "a.db").write_bytes(b"not SQLite" * 99)
    with pytest.raises(FileFormatError, match="HDF5"):
        match.to_hloc(tmp_path, "a", "b")
    with pytest.raises(FileFormatError, match="COLMAP"):
        match.to_colmap(tmp_path / "a.db", "a", "b")
    assert (tmp_path / "matches.h5").read_bytes() == b"not HDF5"
    assert (tmp_path / "a.db").read_bytes() == b"not SQLite" * 99
    assert len(list(tmp_path.iterdir())) == 2


def test_keypoints_of_another_method_are_not_mixed(tmp_path):
    match = _match(0, 1)
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file.create_dataset("a/keypoints", data=np.zeros((1, 2), np.float32))
        file.create_dataset("a/descriptors", data=np.zeros((128, 1), np.float32))
    with pytest.raises(FileFormatError, match="descriptors"):
        match.to_hloc(tmp_path, "a", "b")
    match.to_colmap(tmp_path / "a.db", "a", "b", num=20)
    with pycolmap.Database.open(tmp_path / "a.db") as db:
        db.update_keypoints(1, np.zeros((3, 4), np.float32))  # with scale and orientation
    with pytest.raises(FileFormatError, match="another method"):
        match.to_colmap(tmp_path / "a.db", "a", "b", num=20)
    other_size = Match(*_side(0, 1), *_side(1, 0), hw_A=(60, 80), hw_B=HW)
    with pytest.raises(FileFormatError, match="160x120 px as in the database"):
        other_size.to_colmap(tmp_path / "a.db", "a", "b")


def test_a_database_in_use_is_left_alone(tmp_path):
    match = _match(0, 1)
    match.to_colmap(tmp_path / "a.db", "a", "b", num=20)
    other = sqlite3.connect(tmp_path / "a.db")
    other.execute("PRAGMA journal_mode=WAL")
    other.execute("CREATE TABLE x (y)")
    with pytest.raises(FileFormatError, match="in use"):
        match.to_colmap(tmp_path / "a.db", "a", "c", num=20)
    other.close()
    shutil.copy(tmp_path / "a.db", tmp_path / "b.db")
    match.to_colmap(tmp_path / "b.db", "a", "c", num=20)


@pytest.mark.parametrize(("package", "write"), [("h5py", "to_hloc"), ("pycolmap", "to_colmap")])
def test_without_the_package_the_error_names_it(tmp_path, monkeypatch, package, write):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(MissingError, match=rf"{package}.*l2m-viz\[reconstruction\]"):
        getattr(_match(0, 1), write)(tmp_path / "x", "a", "b")
