"""The prior: what it gets right on pictures whose answer is plain, how far it is off on measured depth."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from l2m_viz.errors import ImageError, ShapeError
from l2m_viz.geometry import intrinsics
from l2m_viz.lifting.depth import read_depth
from l2m_viz.lifting.prior import FAR_DEPTH, ground_plane, prior_cues, prior_disparity

EVAL = Path(__file__).parents[2].parent / "shared" / "data" / "eval"


def noise(hw: tuple[int, int], amount: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, amount, (*hw, 1))


def as_image(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.clip(0, 1)).float()


def landscape(hw: tuple[int, int] = (120, 180), horizon: float = 0.5) -> torch.Tensor:
    """Blue sky, brighter towards the horizon, over brown ground with some texture."""
    height, width = hw
    y = (np.arange(height)[:, None, None] + 0.5) / height * np.ones((1, width, 1))
    sky = np.array([0.35, 0.55, 0.95]) + 0.3 * y
    ground = np.array([0.45, 0.33, 0.2]) + noise(hw, 0.04)
    return as_image(np.where(y < horizon, sky, ground))


def with_post(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand a dark red post on the ground in front of the horizon; its mask."""
    height, width = image.shape[:2]
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[int(0.3 * height) : int(0.8 * height), int(0.42 * width) : int(0.56 * width)] = True
    return torch.where(mask[..., None], torch.tensor([0.55, 0.1, 0.1]), image), mask


def test_sky_is_far_and_ground_comes_nearer_downwards():
    image = landscape()
    cues, disparity = prior_cues(image), prior_disparity(image)
    assert cues.sky[:50].mean() > 0.9
    assert cues.sky[70:].mean() < 0.1
    assert cues.horizon == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(disparity[:50].mean(), torch.tensor(1 / FAR_DEPTH), atol=0.03, rtol=0)
    ground_rows = disparity[64:].mean(dim=1)
    assert (ground_rows.diff() > -5e-3).all()
    assert ground_rows[-1] - ground_rows[0] > 0.3
    assert disparity[:50].max() < disparity[64:].min()  # no sky is nearer than any ground


def test_what_stands_on_the_ground_is_nearer_than_what_is_behind_it():
    image, post = with_post(landscape())
    disparity = prior_disparity(image)
    for rows in (slice(40, 58), slice(62, 75)):  # in front of the sky, in front of the ground
        inside = disparity[rows][post[rows]].mean()
        outside = disparity[rows][~post[rows]].mean()
        assert inside > outside + 0.1
    upright = disparity[40:90][post[40:90]]
    assert upright.std() < 0.15  # it stands: one distance, not a ramp


def test_depth_edges_lie_on_image_edges():
    image, post = with_post(landscape((240, 330)))
    image = torch.nn.functional.interpolate(image.permute(2, 0, 1)[None], scale_factor=2.0)[0].permute(
        1, 2, 0
    )
    post = post.repeat_interleave(2, 0).repeat_interleave(2, 1)  # larger than the prior's working size
    disparity = prior_disparity(image)
    row = 180  # in front of the sky
    step = disparity[row].diff().abs()
    edges = post[row].int().diff().abs().nonzero().flatten()
    assert len(edges) == 2
    for edge in edges:
        assert abs(int(step[edge - 20 : edge + 21].argmax()) - 20) <= 2
        # nearly the whole jump happens within three pixels: a mesh can be cut there
        jump = (disparity[row, edge + 12] - disparity[row, edge - 11]).abs()
        assert step[edge - 2 : edge + 3].sum() > 0.7 * jump


def test_a_subject_on_a_plain_backdrop_is_near():
    y, x = np.mgrid[0:150, 0:200]
    disc = (y - 80) ** 2 + (x - 100) ** 2 < 35**2
    backdrop = np.array([0.45, 0.5, 0.42]) + noise((150, 200), 0.02)
    image = as_image(
        np.where(disc[..., None], np.array([0.8, 0.3, 0.1]) + noise((150, 200), 0.05, 1), backdrop)
    )
    cues = prior_cues(image)
    assert cues.subject[disc].mean() > cues.subject[~disc].mean() + 0.5
    level = disc[40:115]
    assert cues.disparity[40:115][level].mean() > cues.disparity[40:115][~level].mean() + 0.1


def test_range_shape_and_cues():
    image = torch.rand(90, 130, 3, generator=torch.Generator().manual_seed(0))
    cues = prior_cues(image)
    assert cues.disparity.shape == (90, 130)
    assert cues.disparity.dtype == torch.float32
    for cue in (cues.ground, cues.sky, cues.subject, cues.detail):
        assert cue.shape == (90, 130)
        assert 0 <= cue.min() <= cue.max() <= 1
    assert 1 / FAR_DEPTH <= cues.disparity.min() <= cues.disparity.max() <= 1


def test_the_same_photo_gives_the_same_guess_and_is_not_touched():
    image, _ = with_post(landscape())
    before = image.clone()
    assert torch.equal(prior_disparity(image), prior_disparity(image))
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    "hw", [(1, 1), (2, 2), (2, 50), (50, 2), (1, 300), (3, 5), (9, 9), (17, 400), (700, 30)]
)
def test_any_size(hw):
    disparity = prior_disparity(torch.rand(*hw, 3, generator=torch.Generator().manual_seed(1)))
    assert disparity.shape == hw
    assert torch.isfinite(disparity).all()
    assert disparity.min() >= 1 / FAR_DEPTH
    assert disparity.max() <= 1


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_picture_without_content_gets_the_ground_plane(level):
    disparity = prior_disparity(torch.full((60, 80, 3), level))
    assert disparity.std(dim=1).max() < 0.02
    assert disparity[-1].mean() > disparity[0].mean() + 0.2


def test_grey_photo():
    grey = landscape().mean(dim=-1, keepdim=True).expand(-1, -1, 3)
    disparity = prior_disparity(grey)
    assert disparity[100:].mean() > disparity[:40].mean() + 0.2


def test_principal_point_moves_the_horizon():
    image = torch.full((60, 80, 3), 0.5)
    K_low = intrinsics(60.0, (60, 80))
    K_low[1, 2] = 45.0
    assert prior_cues(image, K_low).horizon == pytest.approx(0.75)
    assert prior_cues(image, intrinsics(60.0, (60, 80))).horizon == pytest.approx(0.5)
    assert prior_disparity(image, K_low)[30].mean() < prior_disparity(image)[30].mean()


def test_ground_plane_is_the_mean_over_uncertain_horizons():
    rows = (np.arange(40) + 0.5) / 40
    horizons = np.random.default_rng(0).normal(0.5, 0.2, 200_000)
    sampled = np.array([np.maximum(0, y - horizons).mean() for y in rows])
    sampled /= np.maximum(0, 1 - horizons).mean()
    np.testing.assert_allclose(ground_plane(40, 0.5, 0.2), sampled, atol=5e-3)
    certain = ground_plane(40, 0.5, 1e-4)  # a known horizon: the plane of a level camera
    np.testing.assert_allclose(certain, np.maximum(0, rows - 0.5) / 0.5, atol=1e-3)


@pytest.mark.parametrize(
    ("image", "error"),
    [
        (torch.full((4, 6, 3), float("nan")), ImageError),
        (torch.full((4, 6, 3), float("inf")), ImageError),
        (torch.full((4, 6, 3), 200.0), ImageError),
        (torch.full((4, 6, 3), -1.0), ImageError),
        (torch.rand(4, 6), (ShapeError, TypeCheckError)),  # the latter where annotations are checked
        (torch.rand(4, 6, 4), (ShapeError, TypeCheckError)),
        (torch.rand(0, 6, 3), ShapeError),
    ],
)
def test_pictures_that_are_none(image, error):
    with pytest.raises(error):
        prior_disparity(image)


def test_intrinsics_that_are_none():
    with pytest.raises((ShapeError, TypeCheckError)):
        prior_disparity(torch.rand(4, 6, 3), torch.eye(4))
    with pytest.raises(ShapeError):
        prior_disparity(torch.rand(4, 6, 3), torch.full((3, 3), float("nan")))


# --- measured depth ---------------------------------------------------------------------------------------


def aligned_errors(
    guess: torch.Tensor, inverse_depth: torch.Tensor, valid: torch.Tensor
) -> tuple[float, float]:
    """Fit scale and shift by least squares in inverse depth; return (RMSE / mean truth, depth abs-rel)."""
    g, truth = guess[valid].double(), inverse_depth[valid].double()
    design = torch.stack([g, torch.ones_like(g)], dim=-1)
    fitted = design @ torch.linalg.lstsq(design, truth[:, None], driver="gelsd").solution[:, 0]
    rmse = (fitted - truth).square().mean().sqrt() / truth.mean()
    positive = fitted.clamp(truth.min(), truth.max())  # a depth from a negative inverse depth means nothing
    return float(rmse), float(((1 / positive - 1 / truth).abs() * truth).mean())


def measured() -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Photos with true inverse depth, up to scale and shift: five frames of a room, two stereo pairs."""
    from PIL import Image
    from skimage.data import stereo_motorcycle

    def read(path: Path) -> torch.Tensor:
        return as_image(np.asarray(Image.open(path).convert("RGB")) / 255)

    for i in range(1, 6):
        depth = read_depth(EVAL / "rgbd" / f"depth_{i}.png", scale=0.001)
        yield f"rgbd {i}", read(EVAL / "rgbd" / f"color_{i}.png"), 1 / depth.depth, depth.valid_mask
    cones = read_depth(EVAL / "stereo_cones" / "cones_gt.png", kind="disparity")
    yield "cones", read(EVAL / "stereo_cones" / "cones_left.png"), 1 / cones.depth, cones.valid_mask
    left, _, disparity = stereo_motorcycle()
    valid = torch.from_numpy(np.isfinite(disparity))
    yield "motorcycle", as_image(left / 255), torch.from_numpy(np.nan_to_num(disparity, posinf=0)), valid


def test_prior_is_nearer_to_measured_depth_than_a_plane_and_a_ramp():
    if not EVAL.is_dir():
        pytest.skip(f"no development data at {EVAL}")
    table = {}
    for name, image, inverse_depth, valid in measured():
        ramp = torch.linspace(0, 1, len(valid))[:, None].expand(valid.shape)
        guesses = {"constant": torch.zeros(valid.shape), "ramp": ramp, "prior": prior_disparity(image)}
        table[name] = {key: aligned_errors(guess, inverse_depth, valid) for key, guess in guesses.items()}
        print(f"{name:11}", *(f"{key} {rmse:.3f} {rel:.3f}" for key, (rmse, rel) in table[name].items()))
    rgbd = {key: np.mean([table[f"rgbd {i}"][key] for i in range(1, 6)], axis=0) for key in table["cones"]}
    print("rgbd mean  ", *(f"{key} {rmse:.3f} {rel:.3f}" for key, (rmse, rel) in rgbd.items()))
    for errors in (rgbd, table["cones"], table["motorcycle"]):
        assert errors["prior"][0] < errors["ramp"][0]
        assert errors["prior"][1] < errors["ramp"][1]
        assert errors["prior"][0] < errors["constant"][0]
        assert errors["prior"][1] < errors["constant"][1]
