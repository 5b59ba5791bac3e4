"""Our geometry against measured frames: lift frame A, look from B's pose, compare with the real frame B."""

from pathlib import Path

import pytest
import torch

from l2m_viz.evaluation import load_dev_pairs
from l2m_viz.geometry import Camera, invert_pose, normalized_grid, sample_image
from l2m_viz.lifting import lift, read_depth, warp_from_depth

EVAL = Path(__file__).parents[2].parent / "shared" / "data" / "eval"


@pytest.fixture(scope="module")
def frames():
    """The seven RGB-D pairs with both measured depths."""
    if not EVAL.is_dir():
        pytest.skip(f"the measured frames are not here: {EVAL}")
    depths = {n: read_depth(EVAL / "rgbd" / f"depth_{n}.png", scale=0.001) for n in range(1, 6)}
    pairs = load_dev_pairs(EVAL, ["rgbd"])
    return [(pair, *(depths[int(n)] for n in pair.name.split("-"))) for pair in pairs]


def _median(values):
    return values.median().item()


def test_a_lifted_frame_seen_from_the_next_pose_is_the_next_frame(frames):
    """The median depth is right within 4 %, and colours fit better than four pixels beside."""
    for pair, depth_A, depth_B in frames:
        scene = lift(pair.image_A, depth_A, pair.K_A)
        hw = (pair.image_B.shape[0], pair.image_B.shape[1])
        view = scene.render(Camera(pair.K_B, pair.T_A_to_B, width=hw[1], height=hw[0]))
        both = ~view.hole_mask & depth_B.valid_mask
        relative = ((view.depth - depth_B.depth).abs() / depth_B.depth)[both]
        # what is hidden in B but visible to A is not B's to judge
        same = both.clone()
        same[both] = relative < 0.05
        right = _median((view.image - pair.image_B).abs().mean(dim=-1)[same])
        beside = _median((view.image.roll(4, dims=1) - pair.image_B).abs().mean(dim=-1)[same])
        agree = (relative < 0.05).float().mean().item()
        print(
            f"rgbd {pair.name}: covered {both.float().mean():.2f}, depth error median {_median(relative):.4f}, "
            f"within 5 % {agree:.3f}; colour {right:.4f}, 4 px beside {beside:.4f}"
        )
        assert both.float().mean() > 0.15
        assert _median(relative) < 0.04  # what A's camera saw and B's does not is in it
        assert right < beside


def test_truth_of_measured_frames_is_consistent_both_ways(frames):
    """A pixel that went to B and came back is where it was, on the measured surfaces and within the mesh's grid."""
    for pair, depth_A, depth_B in frames:
        T = invert_pose(pair.T_A_to_B)
        back, seen_B = warp_from_depth(
            depth_B.depth, pair.K_B, depth_A.depth, pair.K_A, T, depth_B.valid_mask, depth_A.valid_mask
        )
        warp, seen = pair.warp_A_to_B, pair.covisibility_A_to_B
        returned = sample_image(back, warp)
        seen_twice = seen & (sample_image(seen_B.float(), warp) > 0.99)
        hw = (pair.image_A.shape[0], pair.image_A.shape[1])
        error_px = ((returned - normalized_grid(hw)) * torch.tensor([hw[1], hw[0]]) / 2).norm(dim=-1)[
            seen_twice
        ]
        colour = (sample_image(pair.image_B, warp) - pair.image_A).abs().mean(dim=-1)
        print(
            f"rgbd {pair.name}: covisible {seen.float().mean():.2f}, there and back {_median(error_px):.2f} px, "
            f"colour {_median(colour[seen]):.4f}"
        )
        assert _median(error_px) < 1.5
