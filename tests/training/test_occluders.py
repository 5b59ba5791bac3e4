"""Occluders: their truth against depth and cameras, their colours against the truth, and what they hide."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from l2m_viz.errors import L2MError
from l2m_viz.geometry import (
    inside_image,
    intrinsics,
    invert_pose,
    pose_from_rotation,
    project,
    rotation_from_axis_angle,
    sample_image,
    to_normalized,
    transform_points,
    unproject_depth,
)
from l2m_viz.training.occluders import Occluder, OccluderCfg, draw_occluder, put_into, with_occluders

ALWAYS = OccluderCfg(share=1.0, thickness=(0.12, 0.25))  # of 48 px: thinner ones fall between the pixels
HW = (48, 64)


@pytest.fixture(scope="module")
def before(make_batch):
    return make_batch()


@pytest.fixture(scope="module")
def after(before):
    return with_occluders(before, ALWAYS)


def put_before(view, occluder):
    """The pair with one more thing in it; the one given stays as it is."""
    new = {name: values.clone(memory_format=torch.contiguous_format) for name, values in view.items()}
    put_into(new, occluder)
    return new


def _sides(batch, i):
    """Everything of pair i that belongs to A, and to B, and the pose from each to the other."""
    pose = batch.T_A_to_B[i]
    for one, two, there in (("A", "B", pose), ("B", "A", invert_pose(pose))):
        yield {
            "depth": getattr(batch, f"depth_{one}")[i],
            "image": getattr(batch, f"image_{one}")[i],
            "K": getattr(batch, f"K_{one}")[i],
            "warp": getattr(batch, f"warp_{one}_to_{two}")[i],
            "covisible": getattr(batch, f"covisibility_{one}_to_{two}")[i],
            "others_depth": getattr(batch, f"depth_{two}")[i],
            "others_image": getattr(batch, f"image_{two}")[i],
            "others_K": getattr(batch, f"K_{two}")[i],
            "pose": there,
        }


def test_truth_is_where_depth_and_cameras_say(before, after):
    changed = 0
    for i in range(len(after.photos)):
        for side, old in zip(_sides(after, i), _sides(before, i), strict=True):
            front = side["depth"] != old["depth"]
            changed += front.sum().item()
            points = transform_points(side["pose"], unproject_depth(side["depth"], side["K"]))
            pixels, z = project(points, side["others_K"])
            seen = side["covisible"]
            if not (seen & front).any():
                continue
            error = (to_normalized(pixels, HW) - side["warp"]).norm(dim=-1)
            assert error[seen & front].max() < 1e-4  # else: the scene's own, which the pair's tests look at
            assert inside_image(side["warp"][seen & front]).all() and (z[seen & front] > 0).all()
            # at the other end is the same point, but for a border pixel whose neighbour is another surface
            there = sample_image(side["others_depth"], side["warp"], mode="nearest")
            agrees = (there / z - 1).abs()[seen & front] < 0.1
            assert agrees.float().mean() > 0.8
    assert changed > 1000


def test_an_occluder_has_the_same_colours_in_both_views(before):
    grey = torch.full_like(
        before.image_A, 0.5
    )  # so that things have no texture, which a smaller view would lose
    before = replace(before, image_A=grey, image_B=grey)
    after, compared = with_occluders(before, ALWAYS), 0
    for i in range(len(after.photos)):
        for side, old in zip(_sides(after, i), _sides(before, i), strict=True):
            thing = (side["depth"] != old["depth"]) & side["covisible"]
            if thing.sum() < 50:
                continue
            compared += 1
            sampled = sample_image(side["others_image"], side["warp"])
            assert (sampled - side["image"])[thing].abs().median() < 0.01
            assert (side["image"] - 0.5)[thing].abs().median() > 0.02
    assert compared > 4


def test_a_bar_over_a_flat_scene_is_where_the_algebra_puts_it():
    """Camera B is 0.2 to the right: the scene, at depth 2, moves by 0.1 f px, a bar at depth 1 by 0.2 f px."""
    focal, width = 40.0, HW[1]
    alpha = torch.zeros(HW)
    alpha[:, 40:44] = 1.0
    scene, bar = focal * 0.2 / 2, focal * 0.2 / 1  # 4 and 8 px to the left
    columns = torch.arange(width) + 0.5
    grid_y = (torch.arange(HW[0]) + 0.5)[:, None].expand(HW) / HW[0] * 2 - 1
    warp = {
        sign: torch.stack([((columns + sign * scene) / width * 2 - 1).expand(HW), grid_y], dim=-1)
        for sign in (-1, 1)
    }
    grey = torch.full((*HW, 3), 0.5)
    pose = pose_from_rotation(torch.eye(3), torch.tensor([-0.2, 0.0, 0.0]))
    view = {
        "image_A": grey, "image_B": grey, "depth_A": torch.full(HW, 2.0), "depth_B": torch.full(HW, 2.0),
        "valid_A": torch.ones(HW, dtype=torch.bool), "valid_B": columns.expand(HW) < width - scene,
        "hole_mask_B": columns.expand(HW) > width - scene, "inpainted_mask_B": columns.expand(HW) > width - scene,
        "warp_A_to_B": warp[-1], "covisibility_A_to_B": columns.expand(HW) > scene,
        "warp_B_to_A": warp[1], "covisibility_B_to_A": columns.expand(HW) < width - scene,
        "K_A": intrinsics(focal, HW), "K_B": intrinsics(focal, HW), "T_A_to_B": pose,
    }  # fmt: skip
    red = torch.tensor([1.0, 0.0, 0.0])
    new = put_before(view, Occluder(alpha, red.expand(*HW, 3), torch.tensor([0.0, 0.0, 1.0]), 1.0))

    def columns_where(mask):
        assert (mask == mask[:1]).all()  # every row is alike
        return mask[0].nonzero()[:, 0].tolist()

    for side, place in (("A", range(40, 44)), ("B", range(32, 36))):
        assert columns_where((new[f"image_{side}"] - red).abs().amax(dim=-1) < 1e-3) == list(place)
        assert columns_where(new[f"depth_{side}"] < 1.5) == list(place)
        torch.testing.assert_close(new[f"depth_{side}"][:, place.start], torch.ones(HW[0]))
    moved = (new["warp_A_to_B"] - view["warp_A_to_B"])[..., 0] * width / 2
    torch.testing.assert_close(moved[:, 40:44], torch.full((HW[0], 4), scene - bar), atol=1e-4, rtol=0)
    # the bar hides columns 32 to 35 of B, which are 36 to 39 of A's scene; and A's 40 to 43, which are B's 36 to 39
    assert columns_where(view["covisibility_A_to_B"] & ~new["covisibility_A_to_B"]) == [36, 37, 38, 39]
    assert columns_where(view["covisibility_B_to_A"] & ~new["covisibility_B_to_A"]) == [36, 37, 38, 39]
    assert new["covisibility_A_to_B"][:, 40:44].all() and new["covisibility_B_to_A"][:, 32:36].all()


def test_a_nearer_scene_hides_the_occluder(before):
    view = {name: value[0] for name, value in vars(before).items() if isinstance(value, torch.Tensor)}
    far = view["depth_A"].max().item() * 10
    everywhere = Occluder(torch.ones(HW), torch.zeros(*HW, 3), torch.tensor([0.0, 0.0, 1.0]), far)
    new = put_before(view, everywhere)
    assert torch.equal(new["image_A"][view["valid_A"]], view["image_A"][view["valid_A"]])
    assert torch.equal(new["covisibility_A_to_B"], view["covisibility_A_to_B"])


def test_one_turned_away_from_the_second_camera_is_not_in_its_view(before):
    """Camera B looks the other way: the occluder, before A, lies behind it."""
    turned = pose_from_rotation(rotation_from_axis_angle(torch.tensor([0.0, math.pi, 0.0])), torch.zeros(3))
    batch = replace(before, T_A_to_B=turned.expand_as(before.T_A_to_B))
    new = with_occluders(batch, ALWAYS)
    assert torch.equal(new.image_B, batch.image_B) and not torch.equal(new.image_A, batch.image_A)
    assert not (new.covisibility_A_to_B & (new.depth_A != batch.depth_A)).any()
    assert new.warp_A_to_B.isfinite().all()


def test_holes_that_an_occluder_covers_are_none(before, after):
    covered = before.hole_mask_B & ~after.hole_mask_B
    assert covered.any() and after.valid_B[covered].all()
    assert not (after.inpainted_mask_B & ~after.hole_mask_B).any()


def test_a_pairs_occluders_depend_on_its_seed_alone(before, after):
    some = [4, 1]
    fields = {name: value[some] for name, value in vars(before).items() if isinstance(value, torch.Tensor)}
    fewer = replace(before, **fields, photos=("photo",) * 2, backgrounds=(None,) * 2)
    again = with_occluders(fewer, ALWAYS)
    assert torch.equal(again.image_B, after.image_B[some])
    assert torch.equal(again.warp_A_to_B, after.warp_A_to_B[some])


def test_shares_are_kept_and_none_is_the_same_object(before):
    assert with_occluders(before, OccluderCfg()) is before
    hidden = [
        torch.equal(with_occluders(replace(before, seeds=before.seeds + 100 * k), OccluderCfg(share=0.5)).depth_A[i],
                    before.depth_A[i])
        for k in range(8) for i in range(6)
    ]  # fmt: skip
    assert 10 <= sum(hidden) <= 38  # a fair coin's 48 tosses, outside less than once in 10,000


def test_a_plane_is_nearer_than_all_that_it_hides():
    rng = np.random.default_rng(0)
    depth = 1 + torch.rand(HW, generator=torch.Generator().manual_seed(0))
    K, valid = intrinsics(40.0, HW), torch.ones(HW, dtype=torch.bool)
    for _ in range(50):
        occluder = draw_occluder(torch.rand(*HW, 3), depth, valid, K, ALWAYS, rng)
        points = unproject_depth(torch.ones(HW), K)
        z = occluder.distance / (points @ occluder.normal)
        shape = occluder.alpha > 0
        assert (z[shape] > 0).all() and (z[shape] < depth[shape]).all()
        assert occluder.color.min() >= 0 and occluder.color.max() <= 1
        assert math.degrees(math.acos(occluder.normal[2])) <= ALWAYS.tilt_deg + 1e-3


@pytest.mark.parametrize(
    "wrong",
    [{"share": -0.1}, {"num": 0}, {"thickness": (0.0, 0.1)}, {"nearer": (0.5, 1.5)}, {"tilt_deg": 85.0}],
)
def test_settings_without_sense_are_refused(wrong):
    with pytest.raises(L2MError, match=next(iter(wrong))):
        replace(ALWAYS, **wrong)
