"""Loaders on small folders whose truth is known, and on the real ones where they are."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from l2m_viz.cli import main
from l2m_viz.data import load_sample
from l2m_viz.errors import FileFormatError, L2MError, MissingError
from l2m_viz.evaluation import Report, evaluate, load_dev_pairs
from l2m_viz.geometry import flow_from_warp, pixel_grid, to_pixel, transform_points
from l2m_viz.matching import load_matcher

HW = (24, 40)
REAL = Path(__file__).parents[3] / "shared" / "data" / "eval"


def save_png(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def random_picture(seed: int, hw=HW) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A wall at 2 m seen by a camera that moves 1 cm to the right a frame; a plane magnified; shifted stereo."""
    depth_mm = np.full(HW, 2000, np.uint16)
    for n in range(1, 6):
        save_png(tmp_path / f"rgbd/color_{n}.png", random_picture(n))
        holed = depth_mm.copy()
        if n == 2:
            holed[10:14, 12:20] = 0
        save_png(tmp_path / f"rgbd/depth_{n}.png", holed)
    poses = [f"{0.01 * n} 0 0 0 0 0 1" for n in range(1, 6)]
    (tmp_path / "rgbd/pose.txt").write_text("\n".join(poses) + "\n")
    for n in (1, 2, 3):
        save_png(tmp_path / f"graf/img{n}.png", random_picture(10 + n, (30, 44) if n == 3 else HW))
    (tmp_path / "graf/H1to2p").write_text("2 0 0\n0 2 0\n0 0 1\n")
    (tmp_path / "graf/H1to3p").write_text("1 0 4\n0 1 -3\n0 0 1\n")
    disparity = np.full(HW, 3, np.uint8)
    disparity[:5] = 0
    unoccluded = np.full((*HW, 3), 255, np.uint8)
    unoccluded[:, 30:] = 0
    for name, array in (
        ("gt", disparity),
        ("mask", unoccluded),
        ("left", random_picture(20)),
        ("right", random_picture(21)),
    ):
        save_png(tmp_path / f"stereo_cones/cones_{name}.png", array)  # fmt: skip
    save_png(tmp_path / "sacre_coeur/A.jpg", random_picture(30, (36, 20)))
    return tmp_path


def flow(pair):
    return flow_from_warp(pair.warp_A_to_B, tuple(pair.image_B.shape[:2]))


def test_rgbd_is_what_camera_and_wall_say(folder):
    pairs = load_dev_pairs(folder, ["rgbd"])
    assert [pair.name for pair in pairs] == ["1-2", "1-3", "2-3", "2-4", "3-4", "3-5", "4-5"]
    first = pairs[0]
    shift = -518.0 * 0.01 / 2.0  # f t / Z: the picture moves against the camera
    expected = torch.tensor([shift, 0.0]).expand(*HW, 2)
    torch.testing.assert_close(flow(first), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(flow(pairs[1]), 2 * expected, atol=1e-3, rtol=0)
    columns = pixel_grid(HW)[..., 0] + shift
    # covisible: lands inside B, and B's depth is known at the nearest pixel or at all four around
    assert not first.covisibility_A_to_B[columns < 0].any()
    hole = torch.zeros(HW, dtype=torch.bool)
    hole[10:14] = ((columns > 12) & (columns < 20))[10:14]
    assert torch.equal(first.covisibility_A_to_B, (columns >= 0) & ~hole)
    assert torch.equal(first.known, ~hole)  # outside B is known not to be seen
    third = pairs[2]  # from frame 2, whose own hole is unknown
    assert not third.known[10:14, 12:20].any()
    assert not third.covisibility_A_to_B[10:14, 12:20].any()


def test_rgbd_intrinsics_are_counted_from_the_corner(folder):
    K = load_dev_pairs(folder, ["rgbd"])[0].K_A
    torch.testing.assert_close(K, torch.tensor([[518.0, 0.0, 326.0], [0.0, 519.0, 254.0], [0.0, 0.0, 1.0]]))


def test_rgbd_poses_are_camera_to_world_with_the_scalar_last(folder):
    quarter = np.sqrt(0.5)
    lines = ["0 0 0 0 0 0 1", f"1 2 3 0 0 {quarter} {quarter}", *["0 0 0 0 0 0 1"] * 3]
    (folder / "rgbd/pose.txt").write_text("\n".join(lines))
    T = load_dev_pairs(folder, ["rgbd"])[0].T_A_to_B
    # camera 2 is turned by +90 degrees about z: its x axis is the world's y; it stands at (1, 2, 3)
    for world, in_camera_2 in (((1.0, 2.0, 3.0), (0.0, 0.0, 0.0)), ((1.0, 3.0, 3.0), (1.0, 0.0, 0.0))):
        point = transform_points(T, torch.tensor(world))  # camera 1 is the world
        torch.testing.assert_close(point, torch.tensor(in_camera_2), atol=1e-6, rtol=0)


def test_graf_homographies_map_integer_centres(folder):
    doubled, shifted = load_dev_pairs(folder, ["graf"])
    landed = to_pixel(doubled.warp_A_to_B, HW)
    torch.testing.assert_close(landed[0, 0], torch.tensor([0.5, 0.5]))  # the first centre stays: 2 * 0 = 0
    torch.testing.assert_close(landed[3, 7], torch.tensor([14.5, 6.5]))
    expected = torch.zeros(HW, dtype=torch.bool)
    expected[:12, :20] = True  # 2 * 19 = 38 is inside 40 columns, 2 * 20 = 40 is not
    assert torch.equal(doubled.covisibility_A_to_B, expected)
    assert doubled.known.all()
    torch.testing.assert_close(flow(shifted), torch.tensor([4.0, -3.0]).expand(*HW, 2), atol=1e-4, rtol=0)
    assert shifted.covisibility_A_to_B[3:].all()
    assert not shifted.covisibility_A_to_B[:3].any()


def test_a_plane_behind_the_camera_is_not_covisible(folder):
    (folder / "graf/H1to2p").write_text("1 0 0\n0 1 0\n-0.1 0 1\n")  # w = 1 - x / 10 changes sign at x = 10
    pair = load_dev_pairs(folder, ["graf"])[0]
    assert torch.isfinite(pair.warp_A_to_B).all()
    assert not pair.covisibility_A_to_B[:, 10:].any()
    assert pair.covisibility_A_to_B[0, :8].all()  # x / (1 - x / 10) = 23.3 at x = 7


def test_cones_disparity_goes_left(folder):
    (pair,) = load_dev_pairs(folder, ["cones"])
    torch.testing.assert_close(flow(pair)[5:], torch.tensor([-3.0, 0.0]).expand(19, 40, 2), atol=1e-4, rtol=0)
    expected = torch.zeros(HW, dtype=torch.bool)
    expected[5:, 3:30] = True
    assert torch.equal(pair.covisibility_A_to_B, expected)
    assert torch.equal(pair.known, torch.arange(24)[:, None].expand(HW) >= 5)


def test_motorcycle_is_the_sample_and_needs_no_folder(tmp_path):
    (pair,) = load_dev_pairs(tmp_path / "absent", ["motorcycle"])
    sample = load_sample("motorcycle")
    assert torch.equal(pair.covisibility_A_to_B, sample.covisibility_A_to_B)
    assert torch.equal(pair.known, sample.valid_A)


def test_unrelated_pairs_are_of_two_scenes_each_and_nothing_is_covisible(folder):
    pairs = load_dev_pairs(folder, ["unrelated"])
    assert len(pairs) == 5
    for pair, following in zip(pairs, [*pairs[1:], pairs[0]], strict=True):
        assert torch.equal(pair.image_B, following.image_A)
        assert not torch.equal(pair.image_A, pair.image_B)
        assert not pair.covisibility_A_to_B.any()
        assert pair.known.all()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("rgbd", "rgbd/depth_4.png"),
        ("graf", "graf/H1to3p"),
        ("cones", "stereo_cones/cones_mask.png"),
        ("unrelated", "sacre_coeur/A.jpg"),
    ],
)
def test_an_absent_file_is_named(folder, source, name):
    (folder / name).unlink()
    with pytest.raises(MissingError, match=f"no development pairs in .*{name}.*Name the folder"):
        load_dev_pairs(folder, [source])


@pytest.mark.parametrize(
    ("name", "content", "source"),
    [
        ("rgbd/pose.txt", "0 0 0 0 0 0 1\n", "rgbd"),
        ("rgbd/pose.txt", "0 0 0 1\n" * 5, "rgbd"),
        ("rgbd/pose.txt", "0 0 0 0 0 0 nan\n" * 5, "rgbd"),
        ("graf/H1to2p", "1 0 0\n0 1 0\n", "graf"),
        ("graf/H1to2p", "a b c\n", "graf"),
    ],
)
def test_a_spoiled_text_file_is_named(folder, name, content, source):
    (folder / name).write_text(content)
    with pytest.raises(FileFormatError, match=name):
        load_dev_pairs(folder, [source])


def test_an_unknown_benchmark_is_refused(folder, unchecked):
    with pytest.raises(L2MError, match="some of rgbd, graf"):
        load_dev_pairs(folder, ["megadepth"])


def test_the_command_prints_the_table_and_writes_files(folder, tmp_path, monkeypatch, capsys):
    out, pictures = tmp_path / "dev.json", tmp_path / "pictures"
    arguments = ["--matcher", "dis", "sift", "--benchmark", "cones", "graf"]
    command = ["l2m", "eval", "dev", "--data", str(folder), *arguments]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(out), "--pictures", str(pictures)])
    main()
    printed = capsys.readouterr().out
    report = Report.load(out)
    assert report.to_markdown() in printed
    assert [(row.benchmark, row.matcher) for row in report.benchmarks()] == [
        ("cones", "dis"), ("cones", "sift"), ("graf", "dis"), ("graf", "sift"),
    ]  # fmt: skip
    assert sorted(path.name for path in pictures.iterdir()) == [
        "dis_cones.png", "dis_graf.png", "sift_cones.png", "sift_graf.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "table.csv"], "in .json or .md"),
        (["--weights", "w.safetensors"], "only one with --weights"),
        (["--benchmark", "cones", "--matcher", "magic"], "no matcher named 'magic'"),
    ],
)
def test_the_command_refuses_what_cannot_work_in_one_line(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["l2m", "eval", "dev", "--data", str(folder), *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def scorer():
    """The independent scorer beside the data: it shares nothing with this package but the matchers."""
    path = REAL.parents[1] / "tools" / "score_dev.py"
    if not (path.is_file() and REAL.is_dir()):
        pytest.skip(f"the development pairs and their scorer are not here: {path}")
    spec = importlib.util.spec_from_file_location("score_dev", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("source", ["rgbd", "graf", "cones", "motorcycle"])
def test_the_truth_of_the_real_pairs_is_that_of_the_independent_scorer(scorer, source):
    pairs, theirs = load_dev_pairs(REAL, [source]), list(getattr(scorer, source)())
    assert len(pairs) == len(theirs)
    for pair, other in zip(pairs, theirs, strict=True):
        covisible, valid = pair.covisibility_A_to_B.numpy(), other["valid"]
        # occlusion is tested in another way: depth also bilinearly, the stereo z-buffer at two columns
        assert np.mean(covisible != valid) < 0.015
        assert np.mean(pair.known.numpy() != other["known"]) < 1e-4
        landed = to_pixel(pair.warp_A_to_B, tuple(pair.image_B.shape[:2])).numpy()
        assert np.abs(landed - other["gt"])[covisible & valid].max() < 1e-3
        assert np.abs(pair.image_A.numpy() * 255 - other["a"]).max() < 1e-3
        if source == "rgbd":
            assert np.abs(pair.T_A_to_B.numpy() - other["T"]).max() < 1e-6


def test_figures_of_a_real_pair_are_those_of_the_independent_scorer(scorer):
    (pair,) = load_dev_pairs(REAL, ["cones"])
    matcher = load_matcher("dis")
    (result,) = evaluate(matcher, [pair]).results
    (other,) = scorer.cones()
    match = matcher.match(other["a"], other["b"])

    def query(points):
        found, certainty = match.query(torch.as_tensor(points, dtype=torch.float32))
        return found.double().numpy(), certainty.double().numpy()

    epe_px, *rest = scorer.dense(other, query, step=1)  # as we do, at every pixel
    assert result.epe_px == pytest.approx(epe_px, abs=1e-3)
    ours = (result.pck1, result.pck3, result.pck5, result.pck10, result.ap)
    assert ours == pytest.approx(rest, abs=1e-3)


@pytest.mark.slow
def test_the_table_of_the_real_pairs(scorer):
    """`shared/data/README.md`, row DIS; two deviations over the shuffles for the pose."""
    (rgbd,) = evaluate(load_matcher("dis"), load_dev_pairs(REAL, ["rgbd"])).benchmarks()
    assert rgbd.epe_px == pytest.approx(71.5, abs=1.0)
    assert rgbd.pck5 == pytest.approx(0.435, abs=0.01)
    assert rgbd.auc == pytest.approx((0.460, 0.516, 0.544), abs=0.04)
