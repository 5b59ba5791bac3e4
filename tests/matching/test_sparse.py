"""Keypoints spread over a warp, and kornia's matchers on weights that the test makes, through the real loading code.

LightGlue's weights are set so that its layers pass descriptors through: it then matches mutual nearest neighbours, and
what it finds is known from the detector alone.
"""

import re

import pytest
import torch

from l2m_viz.data import load_sample, resize_image
from l2m_viz.errors import FileFormatError, ShapeError
from l2m_viz.geometry import pixel_grid, to_pixel
from l2m_viz.matching import sparse
from l2m_viz.matching.sparse import SparseCfg, SpreadCfg, match_from_keypoints

feature = pytest.importorskip("kornia.feature")


@pytest.fixture(scope="module")
def photo():
    return resize_image(load_sample("coffee").image_A[:, 50:550], (96, 120))


# --- from keypoints to a warp -----------------------------------------------------------------------------


def test_pixels_move_as_the_nearest_keypoint():
    points_A = torch.tensor([[10.0, 20.0], [70.0, 30.0]])
    points_B = torch.tensor([[30.0, 10.0], [20.0, 60.0]])
    certainty = torch.tensor([0.9, 0.4])
    match = match_from_keypoints(points_A, points_B, certainty, (40, 90), (80, 50), matcher="test", zoom=0.5)
    grid = pixel_grid((40, 90))
    nearest = torch.cdist(grid.reshape(-1, 2), points_A).argmin(1).reshape(40, 90)
    expected = points_B[nearest] + 0.5 * (grid - points_A[nearest])
    inside = ((expected >= 0) & (expected <= torch.tensor([50.0, 80.0]))).all(-1)
    answer = to_pixel(match.warp_A_to_B, (80, 50))
    torch.testing.assert_close(answer[inside], expected[inside], atol=1e-3, rtol=0)
    distance = (grid - points_A[nearest]).norm(dim=-1)
    reach = 9.0  # a tenth of the long side
    torch.testing.assert_close(match.certainty_A_to_B, (1 - distance / reach).clamp(min=0), atol=1e-5, rtol=0)
    assert torch.equal(match.keypoints_B, points_B)
    back, _ = match.query(points_B, "B_to_A")
    torch.testing.assert_close(back, points_A, atol=1.0, rtol=0)


def test_zoom_is_read_from_the_distances_between_keypoints():
    points_A = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([200.0, 100.0])
    points_B = 1.5 * points_A + torch.tensor([3.0, 8.0])
    points_B[::9] = torch.tensor([5.0, 5.0])  # some are wrong
    ones = torch.ones(40)
    match = match_from_keypoints(points_A, points_B, ones, (100, 200), (160, 310), matcher="test")
    given = match_from_keypoints(points_A, points_B, ones, (100, 200), (160, 310), matcher="test", zoom=1.5)
    torch.testing.assert_close(match.warp_A_to_B, given.warp_A_to_B, atol=1e-4, rtol=0)
    torch.testing.assert_close(match.warp_B_to_A, given.warp_B_to_A, atol=1e-4, rtol=0)


@pytest.mark.parametrize("num", [0, 1])
def test_few_keypoints_are_no_error(num):
    points = torch.full((num, 2), 12.5)
    match = match_from_keypoints(points, points, torch.ones(num), (30, 40), (30, 40), matcher="test")
    assert torch.isfinite(match.warp_A_to_B).all()
    assert match.certainty_A_to_B.max().item() == pytest.approx(num, abs=0.3)
    assert len(match.sample(5)) == num


def test_large_pictures_have_small_warps():
    points = torch.tensor([[1000.0, 500.0]])
    cfg = SpreadCfg(warp_max_side=64)
    match = match_from_keypoints(
        points, points, torch.ones(1), (1000, 2000), (1000, 2000), matcher="t", cfg=cfg
    )
    assert match.warp_A_to_B.shape == (32, 64, 2)
    answer, _ = match.query(points)
    torch.testing.assert_close(answer, points, atol=1e-2, rtol=0)


# --- LightGlue --------------------------------------------------------------------------------------------


def passing_lightglue():
    """Weights with which every layer adds nothing, so that the assignment is a softmax of descriptors' products."""
    state = feature.LightGlue(features=None, input_dim=128).state_dict()
    for key, tensor in state.items():
        if key.startswith(("transformers", "token_confidence")):
            tensor.zero_()
    state["input_proj.weight"] = torch.eye(256, 128)
    state["input_proj.bias"].zero_()
    for i in range(9):
        state[f"log_assignment.{i}.final_proj.weight"] = 30 * torch.eye(256)
        state[f"log_assignment.{i}.final_proj.bias"].zero_()
        state[f"log_assignment.{i}.matchability.weight"].zero_()
        state[f"log_assignment.{i}.matchability.bias"].fill_(10)
    state.pop("confidence_thresholds")  # computed: files may lack it
    # the published files list the two kinds of layers apart
    return {
        re.sub(r"^transformers\.(\d)\.(self|cross)_attn", r"\2_attn.\1", key): state[key] for key in state
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    disk = feature.DISK()
    torch.save({"extractor": disk.state_dict(), "optimizer": {"lr": 0.1}}, folder / "disk.pth")
    torch.save(feature.ALIKED().state_dict(), folder / "aliked.pth")
    torch.save(passing_lightglue(), folder / "lightglue.pth")
    loftr = feature.LoFTR(pretrained=None)
    torch.save(
        {"state_dict": {f"matcher.{k}": v for k, v in loftr.state_dict().items()}}, folder / "loftr.ckpt"
    )
    return folder


@pytest.fixture(scope="module")
def disk(files):
    return sparse.load_disk_lightglue(
        files / "lightglue.pth", files / "disk.pth", cfg=SparseCfg(max_keypoints=80)
    )


def test_disk_keypoints_are_the_maxima_of_its_heatmap_half_a_pixel_further(disk, files, photo):
    match = disk.match(photo, photo)
    network = feature.DISK().eval()
    network.load_state_dict(torch.load(files / "disk.pth", weights_only=True)["extractor"])
    padded = torch.nn.functional.pad(photo.permute(2, 0, 1)[None], (0, 8))  # 120 to 128 columns
    with torch.no_grad():
        heatmap = network.heatmap_and_dense_descriptors(padded)[0][0, 0, :, :120]
    assert len(match.keypoints_A) > 20
    assert torch.equal(match.keypoints_A, match.keypoints_B)
    whole = (match.keypoints_A - 0.5).round()
    torch.testing.assert_close(match.keypoints_A, whole + 0.5, atol=1e-3, rtol=0)
    windows = torch.nn.functional.max_pool2d(heatmap[None], 5, 1, 2)[0]
    at = (whole[:, 1].long(), whole[:, 0].long())
    assert torch.equal(heatmap[at], windows[at])
    assert (match.keypoint_certainty > 0.1).all()


def test_a_crop_is_found_where_it_was_cut(disk, photo):
    """Multiples of 16 px, the U-Net's coarsest cell; its norms see the whole picture, so that not all are found."""
    match = disk.match(photo, photo[16:, 32:])
    moves, counts = (match.keypoints_B - match.keypoints_A).round().unique(dim=0, return_counts=True)
    assert counts.max() >= 5
    assert moves[counts.argmax()].tolist() == [-32, -16]


def test_shrunk_pictures_are_answered_in_original_pixels(files, photo):
    half = resize_image(photo, (48, 60))
    cfg = SparseCfg(max_side=60, max_keypoints=50)
    shrinking = sparse.load_disk_lightglue(files / "lightglue.pth", files / "disk.pth", cfg=cfg)
    small, large = shrinking.match(half, half), shrinking.match(photo, photo)
    assert large.hw_A == (96, 120)
    torch.testing.assert_close(large.keypoints_A, small.keypoints_A.mul(2), atol=1e-4, rtol=0)


def test_aliked_keypoints_are_half_a_pixel_further_than_kornias(files, photo):
    cfg = SparseCfg(max_keypoints=60)
    matcher = sparse.load_aliked_lightglue(files / "lightglue.pth", files / "aliked.pth", cfg=cfg)
    match = matcher.match(photo, photo)
    network = feature.ALIKED(max_num_keypoints=60).eval()
    network.load_state_dict(torch.load(files / "aliked.pth", weights_only=True))
    with torch.no_grad():
        keypoints = network(photo.permute(2, 0, 1)[None])[0].keypoints
    assert len(match.keypoints_A) > 5
    apart = (match.keypoints_A[:, None] - 0.5 - keypoints).norm(dim=-1)
    assert apart.amin(dim=1).max() < 1e-3
    assert matcher.name == match.matcher == "aliked-lightglue"


def test_loftr_coordinates_are_taken_as_they_are(files, photo):
    matcher = sparse.load_loftr(files / "loftr.ckpt")
    matcher.network.coarse_matching.thr = 0.0  # random weights are sure of nothing
    match = matcher.match(photo, photo[:64, :96])
    luma = torch.tensor([0.299, 0.587, 0.114])
    grey_A, grey_B = ((image @ luma)[None, None] for image in (photo, photo[:64, :96]))
    with torch.no_grad():
        found = matcher.network({"image0": grey_A, "image1": grey_B})
    assert len(match.keypoints_A) > 0
    torch.testing.assert_close(match.keypoints_A, found["keypoints0"], atol=1e-3, rtol=0)
    torch.testing.assert_close(match.keypoints_B, found["keypoints1"], atol=1e-2, rtol=0)
    assert (match.keypoints_A / 8 - (match.keypoints_A / 8).round()).abs().max() < 1e-3


def test_blank_pictures_are_no_error(disk):
    match = disk.match(torch.zeros(40, 56, 3), torch.full((48, 64, 3), 0.5))
    assert torch.isfinite(match.warp_A_to_B).all()


def test_a_picture_of_a_few_pixels_is_refused(disk, photo):
    with pytest.raises(ShapeError, match="32x32"):
        disk.match(photo, photo[:20])


def test_weights_of_another_network_are_refused_by_name(files):
    with pytest.raises(FileFormatError, match=r"do not fit LightGlue.*unexpected"):
        sparse.load_disk_lightglue(files / "disk.pth", files / "disk.pth")
    with pytest.raises(FileFormatError, match="do not fit DISK"):
        sparse.load_disk_lightglue(files / "lightglue.pth", files / "lightglue.pth")
