"""DIS and SIFT on pairs with exact answers, on unlike sizes, and on input that cannot work."""

import pytest
import torch
from PIL import Image

from l2m_viz.data import load_sample, resize_image, to_uint8, write_image
from l2m_viz.errors import ImageError, MissingError, ShapeError
from l2m_viz.evaluation import end_point_error
from l2m_viz.geometry import normalized_grid, pixel_grid, sample_image, to_normalized
from l2m_viz.matching import load_matcher


@pytest.fixture(scope="module")
def photo():
    return load_sample("coffee").image_A


@pytest.mark.parametrize(("name", "tol_px"), [("dis", 0.3), ("sift", 0.8)])
def test_a_shift_is_found_in_pictures_of_unlike_size(photo, name, tol_px):
    a, b = photo[50:290, 100:420], photo[60:320, 93:400]  # x_B = x_A + 7, y_B = y_A - 10
    match = load_matcher(name).match(a, b)
    assert (match.hw_A, match.hw_B) == ((240, 320), (260, 307))
    points = torch.tensor([[150.0, 120.0], [200.0, 60.0], [190.0, 150.0]])
    answer, certainty = match.query(points)
    torch.testing.assert_close(answer, points + torch.tensor([7.0, -10.0]), atol=tol_px, rtol=0)
    assert (certainty > 0.1).all()
    back, _ = match.query(answer, "B_to_A")
    torch.testing.assert_close(back, points, atol=2 * tol_px, rtol=0)
    matches = match.sample(200, torch.Generator().manual_seed(0))
    error = (matches.points_B - matches.points_A - torch.tensor([7.0, -10.0])).norm(dim=-1)
    assert error.median() < 0.2


@pytest.mark.parametrize(("name", "epe_px", "share_under_1px"), [("dis", 0.5, 0.7), ("sift", 1.5, 0.4)])
def test_the_real_stereo_pair_against_measured_disparity(name, epe_px, share_under_1px):
    sample = load_sample("motorcycle")
    match = load_matcher(name).match(sample.image_A, sample.image_B)
    estimated = sample_image(match.warp_A_to_B, normalized_grid(match.hw_A))
    error = end_point_error(estimated, sample.warp_A_to_B, match.hw_B)[sample.covisibility_A_to_B]
    assert error.median() < epe_px
    assert (error < 1).float().mean() > share_under_1px


def test_sift_finds_a_half_turn(photo):
    a = photo[50:290, 100:420]
    match = load_matcher("sift").match(a, a.flip(0, 1))
    matches = match.sample(200)
    assert len(matches) > 100
    error = (matches.points_A + matches.points_B - torch.tensor([320.0, 240.0])).norm(dim=-1)
    assert error.median() < 0.5  # a bias of a quarter of a pixel in each keypoint would show as 0.7


def test_large_images_are_worked_on_small_but_answered_in_original_pixels(photo):
    big = torch.nn.functional.interpolate(photo.permute(2, 0, 1)[None], scale_factor=4, mode="bicubic")[0]
    big = big.permute(1, 2, 0).clamp(0, 1).contiguous()
    match = load_matcher("dis").match(big, big.roll(16, dims=1))
    assert match.hw_A == (1600, 2400)
    assert max(match.warp_A_to_B.shape) <= 1024
    answer, _ = match.query(torch.tensor([[1000.0, 700.0]]))
    torch.testing.assert_close(answer, torch.tensor([[1016.0, 700.0]]), atol=0.7, rtol=0)


@pytest.mark.parametrize("name", ["dis", "sift"])
def test_unrelated_pictures_have_less_overlap_than_a_stereo_pair(photo, name):
    sample = load_sample("motorcycle")
    unrelated = load_matcher(name).match(photo, load_sample("chelsea").image_A)
    stereo = load_matcher(name).match(sample.image_A, sample.image_B)
    assert unrelated.overlap < 0.15
    assert stereo.overlap > 0.5


def test_swapping_the_images_swaps_the_match(photo):
    a, b = photo[50:290, 100:420], photo[60:320, 93:400]  # not for sift: its ratio test looks from A only
    forward, swapped = load_matcher("dis").match(a, b), load_matcher("dis").match(b, a)
    torch.testing.assert_close(forward.warp_A_to_B, swapped.warp_B_to_A)
    torch.testing.assert_close(forward.certainty_B_to_A, swapped.certainty_A_to_B)


@pytest.mark.parametrize("name", ["dis", "sift"])
def test_a_blank_image_gives_an_answer_not_a_crash(photo, name):
    match = load_matcher(name).match(torch.full((40, 60, 3), 0.5), photo[:200, :300])
    assert torch.isfinite(match.warp_A_to_B).all()
    assert ((match.certainty_A_to_B >= 0) & (match.certainty_A_to_B <= 1)).all()
    assert len(match.sample(100, torch.Generator().manual_seed(0))) <= 100


@pytest.mark.parametrize("name", ["dis", "sift"])
def test_a_photo_and_a_blank_picture_have_no_overlap(photo, name):
    """Flow from anywhere to a blank picture is nothing, and so is the way back: they agree."""
    match = load_matcher(name).match(photo[:200, :300], torch.zeros(200, 300, 3))
    assert match.overlap < 0.01
    assert len(match.sample(100)) == 0


@pytest.mark.parametrize("name", ["dis", "sift"])
def test_two_blank_pictures_have_no_overlap(name):
    match = load_matcher(name).match(torch.full((40, 60, 3), 0.5), torch.zeros(40, 60, 3))
    assert match.overlap < 0.01
    assert len(match.sample(100)) == 0


@pytest.mark.parametrize("name", ["dis", "sift"])
def test_the_same_photo_at_another_resolution_is_the_same_photo(photo, name):
    big = resize_image(photo, (900, 1350))
    match = load_matcher(name).match(resize_image(photo, (300, 450)), big)
    y, x = torch.meshgrid(torch.arange(40.0, 280, 20), torch.arange(40.0, 430, 20), indexing="ij")
    points = torch.stack([x, y], dim=-1)
    answer, certainty = match.query(points)
    error = (answer - 3 * points).norm(dim=-1)
    assert (certainty > 0.3).float().mean() > 0.2
    assert error[certainty > 0.3].median() < 3


def test_a_narrow_strip_is_matched_with_itself(photo):
    strip = resize_image(photo, (20, 2400))
    match = load_matcher("dis").match(strip, strip)
    answer, _ = match.query(torch.tensor([[1200.0, 10.0]]))
    torch.testing.assert_close(answer, torch.tensor([[1200.0, 10.0]]), atol=2.0, rtol=0)


def test_paths_pil_arrays_and_lists_are_the_same(photo, tmp_path):
    a, b = photo[50:290, 100:420], photo[60:320, 93:400]
    write_image(tmp_path / "a.png", a)
    matcher = load_matcher("dis")
    expected = matcher.match(a, b)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(to_uint8(a)), to_uint8(a)):
        torch.testing.assert_close(matcher.match(image, to_uint8(b)).warp_A_to_B, expected.warp_A_to_B)
    several = matcher.match([a, b], [b, a])
    assert torch.equal(several[0].warp_A_to_B, expected.warp_A_to_B)
    assert torch.equal(several[1].warp_A_to_B, expected.warp_B_to_A)


def test_errors(photo, tmp_path, unchecked):
    with pytest.raises(MissingError, match=r"dis, .*sift"):
        load_matcher("romeo")
    with pytest.raises(ShapeError, match="16x16"):
        load_matcher("dis").match(photo[:9, :200], photo)
    with pytest.raises(ShapeError, match="one length"):
        load_matcher("dis").match([photo], [photo, photo])
    with pytest.raises(ShapeError, match="two lists"):
        load_matcher("dis").match([photo], photo)
    with pytest.raises(ImageError):
        load_matcher("dis").match(tmp_path / "absent.png", photo)


def test_the_warp_of_dis_is_absolute(photo):
    a = photo[50:290, 100:420]
    match = load_matcher("dis").match(a, a)
    torch.testing.assert_close(
        match.warp_A_to_B, to_normalized(pixel_grid((240, 320)), (240, 320)), atol=2e-3, rtol=0
    )
