"""Pairs from single photos: exact where they say so, and the same again from their seed."""

from dataclasses import replace

import cv2
import PIL.Image
import pytest
import torch

from l2m_viz.data import load_sample, resize_image, write_image
from l2m_viz.errors import ImageError, L2MError
from l2m_viz.geometry import (
    normalized_grid,
    project,
    sample_image,
    sample_warp,
    to_normalized,
    transform_points,
    unproject_depth,
)
from l2m_viz.lifting import RelightCfg, ViewSamplerCfg, estimate_depth
from l2m_viz.training import Pair, PairCfg, make_pair
from l2m_viz.training.pairs import NoPairError, read_photo

HW = (96, 128)


@pytest.fixture(scope="module")
def photo():
    return load_sample("coffee").image_A


@pytest.fixture(
    scope="module",
    params=[(seed, p_surround) for p_surround in (0.0, 1.0) for seed in range(3)],
    ids=lambda param: f"seed {param[0]}" + ", surrounded" * int(param[1]),
)
def pair(photo, request):
    seed, p_surround = request.param
    return make_pair(photo, PairCfg(hw=HW, difficulty=0.7, p_surround=p_surround), seed=seed)


def test_the_warp_is_the_projection_of_the_depth(pair):
    points = transform_points(pair.T_A_to_B, unproject_depth(pair.depth_A, pair.K_A))
    expected = to_normalized(project(points, pair.K_B)[0], HW)
    seen = pair.covisibility_A_to_B
    torch.testing.assert_close(pair.warp_A_to_B[seen], expected[seen], atol=1e-4, rtol=0)


def test_covisible_points_look_alike_and_come_back(pair):
    seen = pair.covisibility_A_to_B
    assert pair.overlap >= 0.15
    error = (sample_image(pair.image_B, pair.warp_A_to_B) - pair.image_A).abs().mean(dim=-1)[seen]
    assert error.median() < 0.02
    there = pair.warp_A_to_B[seen]
    both = sample_image(pair.covisibility_B_to_A.float(), there) > 0.999
    back = sample_warp(pair.warp_B_to_A, there)[both]
    here = to_normalized(
        torch.stack(
            torch.meshgrid(torch.arange(HW[1]) + 0.5, torch.arange(HW[0]) + 0.5, indexing="xy"), dim=-1
        ),
        HW,
    )[seen][both]
    error_px = (back - here).norm(dim=-1) * HW[1] / 2
    assert both.float().mean() > 0.8 and error_px.median() < 0.05


def test_holes_and_what_is_unknown_are_never_covisible(pair):
    assert not (pair.covisibility_A_to_B & ~pair.valid_A).any()
    assert not (pair.covisibility_B_to_A & pair.hole_mask_B).any()
    landed = sample_image(pair.hole_mask_B.float(), pair.warp_A_to_B, mode="nearest")[
        pair.covisibility_A_to_B
    ]
    assert landed.mean() < 0.01  # bilinear depth may vouch for a point whose nearest sample is a hole


def test_surrounded_the_second_view_sees_beyond_the_first(photo):
    """Without, all that B shows is from A, so it lands inside A again; beyond is what A does not show."""

    def beyond(seed, p_surround):
        sideways = ViewSamplerCfg(
            dolly=(0.0, 0.0)
        )  # going forward, a camera would see less of the scene, not more
        cfg = PairCfg(hw=HW, depth="flat", views=sideways, p_surround=p_surround)
        pair = make_pair(photo, cfg, seed=seed)
        outside = (pair.warp_B_to_A.abs() > 1 + 1 / HW[0]).any(dim=-1) & pair.valid_B
        assert not (outside & pair.covisibility_B_to_A).any()
        return outside.float().mean()

    assert all(beyond(seed, 0.0) == 0 for seed in range(4))
    assert (
        max(beyond(seed, 1.0) for seed in range(4)) > 0.15
    )  # a camera that goes forward sees less, not more


def test_surrounded_the_first_view_is_an_upright_window_of_the_photo(photo):
    pair = make_pair(photo, PairCfg(hw=HW, p_surround=1.0, crop=(1.0, 1.0), surround=(2.0, 2.0)), seed=4)
    height, width = photo.shape[:2]
    scale = 2 * max(
        HW[0] / height, HW[1] / width
    )  # the largest crop of the right shape becomes two views wide
    small = resize_image(photo, (round(height * scale), round(width * scale)))
    found = cv2.matchTemplate(small.numpy(), pair.image_A.numpy(), cv2.TM_CCOEFF_NORMED)
    assert found.max() > 0.98
    assert pair.K_A[0, 2] == HW[1] / 2 and pair.K_A[1, 2] == HW[0] / 2


def test_a_seed_makes_the_same_pair_again(photo, tmp_path):
    cfg = PairCfg(hw=HW, holes="background")
    other = load_sample("rocket").image_A
    first = make_pair(photo, cfg, torch.Generator().manual_seed(5), background=other)
    again = make_pair(photo, cfg, seed=first.seed, background=other)
    assert torch.equal(first.image_B, again.image_B) and torch.equal(first.warp_A_to_B, again.warp_A_to_B)
    assert (first.inpainted_mask_B == first.hole_mask_B).all() and first.hole_mask_B.any()
    first.save(tmp_path / "pair.npz")
    assert torch.equal(Pair.load(tmp_path / "pair.npz").warp_B_to_A, first.warp_B_to_A)


def test_difficulty_moves_the_camera(photo):
    moves = []
    for difficulty in (0.0, 0.3, 1.0):
        pairs = [make_pair(photo, PairCfg(hw=HW, difficulty=difficulty), seed=seed) for seed in range(4)]
        moves.append(sum(pair.T_A_to_B[:3, 3].norm().item() for pair in pairs))
    assert moves[0] == 0 and moves[0] < moves[1] < moves[2]


def test_random_planes_are_random_and_reproducible(photo):
    depths = [
        estimate_depth(photo, "random-planes", generator=torch.Generator().manual_seed(s)).depth
        for s in (0, 0, 1)
    ]
    assert torch.equal(depths[0], depths[1]) and not torch.allclose(depths[0], depths[2])
    assert depths[0].min() >= 1 - 1e-5 and depths[0].max() <= 1 / 0.08 + 1e-3


def test_light_changes_colours_and_nothing_else(photo):
    plain, lit = (make_pair(photo, PairCfg(hw=HW, p_relight=p), seed=3) for p in (0.0, 1.0))
    for name in (
        "depth_B",
        "valid_A",
        "hole_mask_B",
        "warp_A_to_B",
        "covisibility_A_to_B",
        "covisibility_B_to_A",
    ):
        assert torch.equal(getattr(plain, name), getattr(lit, name))
    for name in ("image_A", "image_B"):
        before, after = getattr(plain, name), getattr(lit, name)
        assert (before - after).abs().mean() > 0.01 and 0 <= after.min() <= after.max() <= 1
    assert not lit.image_B[lit.hole_mask_B].any()  # a hole stays black


def test_views_may_be_lit_alike_or_apart(photo):
    """Covisible points of views lit alike, with no shadow to end at a different pixel, still look alike."""
    light = RelightCfg(shadow_probability=0.0)
    errors = {0.0: [], 1.0: []}
    for apart, found in errors.items():
        for seed in range(4):
            cfg = PairCfg(
                hw=HW, depth="prior", difficulty=0.3, p_relight=1.0, p_relight_apart=apart, relight=light
            )
            pair = make_pair(photo, cfg, seed=seed)
            error = (sample_image(pair.image_B, pair.warp_A_to_B) - pair.image_A).abs().mean(dim=-1)
            found.append(error[pair.covisibility_A_to_B].median().item())
    assert max(errors[0.0]) < 0.02 < sum(errors[1.0]) / 4


def test_probabilities_are_shares(photo):
    cfg = PairCfg(
        hw=(24, 32), holes="background", p_fill=0.3, p_relight=0.6, views=ViewSamplerCfg(roll_deg=(90, 90))
    )
    cfg = replace(cfg, p_roll=0.5, min_overlap=0.01)
    grey = torch.full((24, 32, 3), 0.25)
    pairs = [make_pair(photo, cfg, seed=seed, background=grey) for seed in range(60)]
    plain = [make_pair(photo, replace(cfg, p_relight=0.0), seed=seed, background=grey) for seed in range(60)]
    filled = sum(bool(pair.inpainted_mask_B.any()) for pair in pairs)
    lit = sum(not torch.equal(a.image_A, b.image_A) for a, b in zip(pairs, plain, strict=True))
    rolled = sum(abs(pair.T_A_to_B[0, 0].item()) < 0.5 for pair in pairs)
    for count, share in ((filled, 18), (lit, 36), (rolled, 30)):
        assert abs(count - share) <= 12  # three standard deviations


def test_an_orbit_is_as_exact_and_for_its_share_of_the_pairs(photo):
    views = ViewSamplerCfg(
        shift=(0.0, 0.05),
        dolly=(0.0, 0.05),
        rotation_deg=(0.0, 1.0),
        orbit_deg=(12.0, 15.0),
        pivot=(1.5, 2.0),
    )
    pair = make_pair(photo, PairCfg(hw=HW, views=views), seed=2)
    seen = pair.covisibility_A_to_B
    error = (sample_image(pair.image_B, pair.warp_A_to_B) - pair.image_A).abs().mean(dim=-1)[seen]
    assert pair.T_A_to_B[2, 2] < 0.985  # more than 10 degrees between the lines of sight
    assert pair.overlap >= 0.15 and error.median() < 0.02
    cfg = PairCfg(hw=(24, 32), views=views, p_orbit=0.5, min_overlap=0.01)
    orbits = sum(make_pair(photo, cfg, seed=seed).T_A_to_B[2, 2].item() < 0.99 for seed in range(60))
    assert abs(orbits - 30) <= 12  # three standard deviations


def test_a_rolled_pair_is_as_exact(photo):
    views = ViewSamplerCfg(
        shift=(0.1, 0.2), dolly=(0.1, 0.2), rotation_deg=(1.0, 3.0), roll_deg=(150.0, 180.0)
    )
    pair = make_pair(photo, PairCfg(hw=HW, views=views), seed=1)
    assert pair.T_A_to_B[0, 0] < -0.8  # upside down
    seen = pair.covisibility_A_to_B
    error = (sample_image(pair.image_B, pair.warp_A_to_B) - pair.image_A).abs().mean(dim=-1)[seen]
    assert pair.overlap >= 0.15 and error.median() < 0.02


def test_the_sky_is_valid_in_neither_view():
    picture = 0.3 * torch.rand(96, 128, 3, generator=torch.Generator().manual_seed(0))
    picture[:48] = torch.tensor([0.35, 0.55, 0.9])
    cfg = PairCfg(hw=HW, sky="offline", difficulty=0.3, crop=(1.0, 1.0), min_overlap=0.05)
    for seed in range(3):
        pair = make_pair(picture, cfg, seed=seed)
        blue_A, blue_B = (image[..., 2] > 0.6 for image in (pair.image_A, pair.image_B))
        assert blue_A.float().mean() > 0.3
        assert not (blue_A & (pair.valid_A | pair.covisibility_A_to_B)).any()
        assert not (blue_B & (pair.valid_B | pair.covisibility_B_to_A)).any()
        assert pair.valid_A.float().mean() > 0.4


def test_nothing_but_sky_is_no_pair(photo, monkeypatch):
    monkeypatch.setattr(
        "l2m_viz.lifting.synthesis.sky_mask", lambda image, *_: torch.ones(image.shape[:2], dtype=torch.bool)
    )
    with pytest.raises(NoPairError, match="not sky"):
        make_pair(photo, PairCfg(hw=HW, sky="offline"), seed=0)


def test_a_large_jpeg_is_read_smaller_but_large_enough(tmp_path):
    """Smooth colours, so that a picture reduced while decoding equals one reduced afterwards."""
    hw = (1200, 1800)
    image = normalized_grid(hw).div(2).add(0.5)
    image = torch.cat([image, image[..., :1] * image[..., 1:]], dim=-1)
    write_image(tmp_path / "large.jpg", image)
    write_image(tmp_path / "large.png", image)
    cfg = PairCfg(hw=(96, 128), crop=(0.6, 1.0))
    read = read_photo(tmp_path / "large.jpg", cfg)
    assert tuple(read.shape[:2]) == (300, 450)  # a quarter; an eighth would leave 150 px for 128 / 0.6
    torch.testing.assert_close(read, resize_image(image, (300, 450)), atol=0.012, rtol=0)
    assert read_photo(tmp_path / "large.png", cfg).shape[:2] == hw
    assert torch.equal(
        read_photo(tmp_path / "large.jpg"), resize_image(read_photo(tmp_path / "large.jpg"), (600, 900))
    )


def test_a_turned_jpeg_stays_upright(tmp_path):
    picture = PIL.Image.new("RGB", (600, 900))
    picture.paste((255, 0, 0), (0, 0, 600, 450))  # red half, on top as stored
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was held turned: the stored top is the right side
    picture.save(tmp_path / "turned.jpg", exif=exif)
    read = read_photo(tmp_path / "turned.jpg", PairCfg(hw=(96, 128)))
    assert tuple(read.shape[:2]) == (300, 450)
    assert read[:, 230:, 0].mean() > 0.95 and read[:, :220, 0].mean() < 0.05


def test_what_cannot_be_read_says_so(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    whole = tmp_path / "whole.jpg"
    write_image(whole, torch.rand(90, 120, 3))
    (tmp_path / "half.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    for name, message in (("text.jpg", "text"), ("half.jpg", "half.jpg"), ("absent.jpg", "no such file")):
        with pytest.raises(ImageError, match=message):
            read_photo(tmp_path / name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hw": (1, 64)}, "2x2"),
        ({"crop": (0.0, 1.0)}, "crop"),
        ({"holes": "magic"}, "holes"),
        ({"p_fill": 1.5}, "p_fill"),
        ({"difficulty": float("nan")}, "difficulty"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(L2MError, match=message):
        PairCfg(**settings)


def test_a_background_comes_exactly_when_it_is_used(photo):
    with pytest.raises(L2MError, match="another photo"):
        make_pair(photo, PairCfg(hw=HW, holes="background"))
    with pytest.raises(L2MError, match="expected none"):
        make_pair(photo, PairCfg(hw=HW), background=photo)


def test_impossible_settings_are_refused(photo, unchecked):
    with pytest.raises(L2MError, match="difficulty"):
        make_pair(photo, PairCfg(hw=HW, difficulty=-1.0))
    with pytest.raises(L2MError, match="overlap"):
        make_pair(photo, PairCfg(hw=HW, min_overlap=1.1))
