"""Relighting against closed forms: Lambert and inverse square on planes and a sphere, a shadow cast through a point."""

from dataclasses import replace

import numba
import numpy as np
import pytest
import torch

from l2m_viz.data import load_sample, resize_image
from l2m_viz.errors import ImageError, L2MError, ShapeError
from l2m_viz.geometry import Camera, intrinsics, look_at, pose_from_rotation, rotation_from_axis_angle
from l2m_viz.geometry.scenes import (
    AnalyticScene,
    Plane,
    Sphere,
    fronto_parallel_plane,
    slanted_plane,
    sphere_on_plane,
    two_planes,
)
from l2m_viz.lifting import Lighting, RelightCfg, ShadeCfg, lift, sample_lighting, shade, shade_batch

HW = (60, 84)  # neither side a multiple of eight lanes
CAMERA = Camera(intrinsics(70.0, HW), torch.eye(4), width=HW[1], height=HW[0])
GREY = 0.5
EXACT = ShadeCfg(steps=200, thickness=0.02)  # nearly the closed form of infinitely thin surfaces


def _lighting(*positions: tuple[float, float, float], **fields) -> Lighting:
    lights = torch.tensor(positions).reshape(-1, 3)
    n = len(lights)
    given = {"colors": torch.tensor([[1.0, 0.8, 0.6]]).expand(n, 3), "energies": torch.full((n,), 1.5)}
    given |= {"ambient": torch.full((3,), 0.1), "white_balance": torch.ones(3)}
    return Lighting(**({"positions": lights} | given | fields))


def _light(picture: torch.Tensor, color: float = GREY) -> np.ndarray:
    """What light made grey look so: the camera's response of an exposure of 1 undone, in float64."""
    return (picture.double().numpy() / color) ** 2.2


def _shaded(scene: AnalyticScene, lighting: Lighting, camera: Camera = CAMERA, cfg: ShadeCfg | None = None):
    depth, valid = scene.depth(camera)
    return shade(torch.full((*camera.hw, 3), GREY), depth, valid, camera, lighting, cfg)


def _lambert(points: torch.Tensor, normals, lighting: Lighting, min_distance: float = 0.0) -> np.ndarray:
    """Ambient and direct light without shadows, in float64, from exact points and normals."""
    at = points.double().numpy()
    normals = np.broadcast_to(np.asarray(normals, float), at.shape)
    light = np.broadcast_to(lighting.ambient.double().numpy(), at.shape).copy()
    for position, color, energy in zip(lighting.positions, lighting.colors, lighting.energies, strict=True):
        to_light = position.double().numpy() - at
        distance = np.linalg.norm(to_light, axis=-1)
        cosine = ((normals * to_light).sum(-1) / distance).clip(min=0)
        received = energy.item() * cosine / distance.clip(min=min_distance) ** 2
        light += received[..., None] * color.double().numpy()
    return light


def _unit(vector) -> np.ndarray:
    return np.asarray(vector, float) / np.linalg.norm(vector)


# --- light -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shadows", [False, True])
def test_a_plane_that_faces_a_light(shadows):
    lighting = _lighting((0.3, -0.2, 0.5), shadows=shadows)
    points, _ = fronto_parallel_plane().points(CAMERA)
    expected = _lambert(points, (0, 0, -1), lighting)
    assert expected[..., 0].max() == pytest.approx(0.1 + 1.5 / 1.5**2, rel=2e-3)  # the foot of the light
    np.testing.assert_allclose(_light(_shaded(fronto_parallel_plane(), lighting)), expected, rtol=2e-4)


def test_a_tilted_plane_has_its_own_normal_everywhere():
    lighting = _lighting((0.8, 0.3, 0.4), (-1.0, 0.2, -0.5))  # the second one behind the camera
    points, _ = slanted_plane().points(CAMERA)
    expected = _lambert(points, -_unit((0.35, -0.25, 1.0)), lighting)
    np.testing.assert_allclose(_light(_shaded(slanted_plane(), lighting)), expected, rtol=1e-3)


def test_the_light_of_another_camera_is_that_of_the_world():
    pose = look_at(torch.tensor([0.6, -0.4, 0.3]), torch.tensor([0.0, 0.0, 3.0]))
    camera = Camera(intrinsics(60.0, (44, 70)), pose, width=70, height=44)
    lighting = _lighting((0.8, 0.3, 0.4), (-1.0, 0.2, -0.5))
    points, _ = slanted_plane().points(camera)
    expected = _lambert(points, -_unit((0.35, -0.25, 1.0)), lighting)
    np.testing.assert_allclose(_light(_shaded(slanted_plane(), lighting, camera)), expected, rtol=1e-3)


def test_no_closer_than_the_least_distance():
    lighting = _lighting((0.0, 0.0, 1.9), min_distance=0.5)
    points, _ = fronto_parallel_plane().points(CAMERA)
    expected = _lambert(points, (0, 0, -1), lighting, min_distance=0.5)
    np.testing.assert_allclose(
        _light(_shaded(fronto_parallel_plane(), lighting), GREY).clip(max=1), expected.clip(max=1), rtol=2e-3
    )


def test_a_sphere_is_round():
    lighting = _lighting((-1.2, -0.8, 1.0), shadows=False)
    points, _ = sphere_on_plane().points(CAMERA)
    normals = (points - torch.tensor([0.1, 0.0, 3.0])).double().numpy()
    distance = np.linalg.norm(normals, axis=-1, keepdims=True)
    on_sphere = (distance < 0.7001)[..., 0]
    facing = on_sphere & (normals[..., 2] / distance[..., 0] < -0.4)  # its rim spans several pixels of slope
    expected = _lambert(points, normals / distance, lighting)
    error = np.abs(_light(_shaded(sphere_on_plane(), lighting)) - expected)[facing]
    assert facing.sum() > 500
    assert error.max() < 0.03 and error.mean() < 0.002  # of up to 0.5


def test_nothing_is_averaged_across_a_cut_edge():
    # Square and wall both face the camera: one wrong neighbour in a slope or in the light and an edge pixel differs.
    lighting = _lighting((0.3, -0.2, 0.5), shadows=False)
    points, _ = two_planes().points(CAMERA)
    expected = _lambert(points, (0, 0, -1), lighting)
    np.testing.assert_allclose(_light(_shaded(two_planes(), lighting)), expected, rtol=2e-4)


# --- shadows ---------------------------------------------------------------------------------------------


def _square_shadow(light: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the square of `two_planes` hides the light from the wall: (wall, shadow, pixels beside an edge)."""
    points, _ = two_planes().points(CAMERA)
    points, origin = points.double().numpy(), np.array(light)
    wall = points[..., 2] > 3
    crossing = origin + (points - origin) * ((2 - light[2]) / (points[..., 2:] - light[2]))
    shadow = wall & (np.abs(crossing[..., :2] - (0.1, -0.05)) <= 0.45).all(-1)
    near_edge = np.zeros_like(wall)
    for mask in (wall, shadow):
        padded = np.pad(mask, 3, mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7))
        near_edge |= windows.any((-1, -2)) & ~windows.all((-1, -2))
    return wall, shadow, near_edge


@pytest.mark.parametrize("light", [(-0.9, 0.25, 0.5), (0.9, -0.5, 1.0), (-1.8, 0.5, -1.0), (-0.5, 0.1, 0.2)])
def test_a_square_casts_its_shadow_where_rays_through_it_end(light):
    lighting = _lighting(light)
    wall, shadow, near_edge = _square_shadow(light)
    points, _ = two_planes().points(CAMERA)
    lit = _lambert(points, (0, 0, -1), lighting)[..., 0] - 0.1
    visible = (_light(_shaded(two_planes(), lighting, cfg=EXACT))[..., 0] - 0.1) / lit
    assert (shadow & ~near_edge).sum() > 60
    assert (visible[shadow & ~near_edge] < 0.02).all()
    assert (visible[wall & ~shadow & ~near_edge] > 0.98).mean() > 0.998
    assert (visible[~wall] > 0.98).all()  # the square itself is lit
    # As it comes the square is a quarter of its distance deep: it hides more, and never less.
    visible = (_light(_shaded(two_planes(), lighting))[..., 0] - 0.1) / lit
    assert (
        visible[shadow & ~near_edge].mean() < 0.1
    )  # near its edge a ray may slip in between two of 24 steps
    assert visible[wall & ~shadow & ~near_edge].mean() > 0.75


def test_a_wider_lamp_has_a_softer_shadow():
    _, shadow, _ = _square_shadow((-0.9, 0.25, 0.5))
    widths = []
    for radius in (0.0, 0.1, 0.3):
        lighting = _lighting((-0.9, 0.25, 0.5), radius=radius)
        points, _ = two_planes().points(CAMERA)
        lit = _lambert(points, (0, 0, -1), lighting)[..., 0] - 0.1
        visible = (_light(_shaded(two_planes(), lighting, cfg=EXACT))[..., 0] - 0.1) / lit
        widths.append(((visible > 0.05) & (visible < 0.95)).sum())
        assert visible[shadow].mean() < 0.5
    assert widths[0] < widths[1] < widths[2]


@pytest.mark.parametrize("light", [(1.5, 0.5, 1.0), (-2.0, 1.0, 2.0), (0.1, -2.0, 1.8), (0.4, 0.3, -2.0)])
def test_a_surface_does_not_shadow_itself(light):
    scene = AnalyticScene((Plane((0.35, -0.25, 1.0), 3.0), Sphere((0.0, 0.0, 2.6), 0.5)))
    for surface in (slanted_plane(), scene):
        on, off = (_shaded(surface, _lighting(light, shadows=shadows)) for shadows in (True, False))
        points, _ = surface.points(CAMERA)
        flat = ~(np.linalg.norm((points - torch.tensor([0.0, 0.0, 2.6])).numpy(), axis=-1) < 0.501)
        if surface is scene:  # the sphere's lit side
            normals = (points - torch.tensor([0.0, 0.0, 2.6])).numpy() / 0.5
            to_light = np.array(light) - points.numpy()
            flat = ~flat & ((normals * to_light).sum(-1) > 0.3 * np.linalg.norm(to_light, axis=-1))
        assert flat.sum() > 80
        np.testing.assert_allclose(on.numpy()[flat], off.numpy()[flat], atol=2e-3)


# --- the camera's response -------------------------------------------------------------------------------


def test_ambient_light_alone_multiplies_light_not_pixel_values():
    image = torch.rand(*HW, 3, generator=torch.Generator().manual_seed(0))
    depth, valid = slanted_plane().depth(CAMERA)
    lighting = _lighting(ambient=torch.tensor([0.5, 0.4, 0.6]), exposure=1.3)
    picture = shade(image, depth, valid, CAMERA, lighting)
    linear = image.double() ** 2.2 * 1.3 * torch.tensor([0.5, 0.4, 0.6], dtype=torch.float64)
    torch.testing.assert_close(picture.double(), linear ** (1 / 2.2), atol=1e-6, rtol=1e-5)
    balanced = replace(lighting, white_balance=torch.tensor([3.0, 1.0, 0.9]), gamma=0.8)
    expected = (linear * torch.tensor([3.0, 1.0, 0.9])) ** (1 / 2.2)
    assert (expected > 1).any()
    picture = shade(image, depth, valid, CAMERA, balanced)
    torch.testing.assert_close(picture.double(), expected.clamp(max=1) ** 0.8, atol=1e-6, rtol=1e-5)


def test_light_of_strength_one_leaves_the_photo_alone():
    image = torch.rand(*HW, 3, generator=torch.Generator().manual_seed(0))
    depth, valid = slanted_plane().depth(CAMERA)
    picture = shade(image, depth, valid, CAMERA, _lighting(ambient=torch.ones(3)))
    torch.testing.assert_close(picture, image, atol=2e-6, rtol=0)


def test_pixels_without_depth_get_ambient_light_and_black_holes_stay_black():
    depth, valid = fronto_parallel_plane().depth(CAMERA)
    valid[20:30, 40:55] = False
    depth[~valid] = float("nan")  # means nothing there
    image = torch.full((*HW, 3), GREY)
    image[:, 50:] = 0
    lighting = _lighting((0.3, -0.2, 0.5))
    picture = shade(image, depth, valid, CAMERA, lighting)
    np.testing.assert_allclose(_light(picture[20:30, 40:50]), 0.1, rtol=1e-4)
    assert (picture[:, 50:] == 0).all()
    points, _ = fronto_parallel_plane().points(CAMERA)
    around = valid.numpy() & (
        np.arange(HW[1]) < 50
    )  # no light leaks into or out of the hole, which shadows nothing
    np.testing.assert_allclose(
        _light(picture)[around], _lambert(points, (0, 0, -1), lighting)[around], rtol=2e-4
    )


# --- random lightings ------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_lighting():
    first, second, other = (
        sample_lighting(2.0, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first.positions, second.positions) and torch.equal(first.colors, second.colors)
    assert (first.exposure, first.gamma, first.radius) == (second.exposure, second.gamma, second.radius)
    assert first.exposure != other.exposure


def test_draws_fill_the_official_ranges_and_stay_inside():
    generator = torch.Generator().manual_seed(0)
    drawn = [sample_lighting(1.0, generator=generator) for _ in range(400)]
    assert np.unique([len(lighting.energies) for lighting in drawn]).tolist() == [2, 3, 4, 5]
    x, y, z = torch.cat([lighting.positions for lighting in drawn]).unbind(-1)
    assert -2 <= x.min() < -1.9 and 2.9 < x.max() <= 3 and -2 <= y.min() < -1.9 and 1.9 < y.max() <= 2
    assert 0.4 < (x < 0).float().mean() < 0.6  # a side first, then a place
    assert torch.unique(z).tolist() == [0.5, 1.0, 2.0]
    colors = torch.cat([lighting.colors for lighting in drawn])
    assert colors.min() == 0.5 and colors.max() <= 1 and 0.45 < (colors == 0.5).float().mean() < 0.55
    energies = torch.cat([lighting.energies for lighting in drawn])
    assert 0.8 <= energies.min() < 0.85 and 3.9 < energies.max() <= 4.0  # one to five, as 400 to 2000 W
    ambient = torch.stack([lighting.ambient for lighting in drawn])
    assert 0.4 <= ambient.min() < 0.42 and 0.63 < ambient.max() <= 0.65
    assert 0.75 < np.mean([lighting.shadows for lighting in drawn]) < 0.85
    for name, (low, high) in {"exposure": (0.7, 1.4), "gamma": (0.8, 1.25), "radius": (0.02, 0.2)}.items():
        values = [getattr(lighting, name) for lighting in drawn]
        assert low <= min(values) < low * 1.3 and high * 0.95 < max(values) <= high * (1 + 1e-6)


def test_millimetres_and_metres_give_the_same_picture():
    sample = load_sample("motorcycle")
    hw = (50, 74)
    image, valid = resize_image(sample.image_A, hw), torch.ones(hw, dtype=torch.bool)
    depth = 2 + torch.nn.functional.interpolate(
        torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(1)), hw, mode="bicubic"
    )
    pictures = []
    for scale in (1.0, 1000.0):
        scene = lift(image, scale * depth[0, 0], intrinsics(60.0, hw))
        lighting = sample_lighting(scene.unit, generator=torch.Generator().manual_seed(2))
        lighting = replace(lighting, shadows=True)
        pictures.append(shade(image, scene.depth, valid, scene.camera, lighting))
    different = (pictures[0] - pictures[1]).abs().amax(-1) > 1e-4  # a sample may round to the next pixel
    assert different.float().mean() < 0.001


def test_pictures_are_neither_black_nor_blown_out():
    sample = load_sample("motorcycle")
    hw = (100, 148)
    image = resize_image(sample.image_A, hw)
    rows, columns = torch.arange(100) * 5 + 2, torch.arange(148) * 5 + 2
    depth, valid = (value[rows][:, columns] for value in (sample.depth_A, sample.valid_A))
    camera = Camera(sample.K_A.float() * torch.tensor([[0.2], [0.2], [1.0]]), torch.eye(4), 148, 100)
    unit = float(np.percentile(depth[valid].numpy(), 2))
    generator = torch.Generator().manual_seed(0)
    brightness, white = [], []
    for _ in range(40):
        picture = shade(image, depth, valid, camera, sample_lighting(unit, generator=generator))
        brightness.append((picture.mean() / image.mean()).item())
        white.append(((picture > 0.999).float().mean() - (image > 0.999).float().mean()).item())
    assert min(brightness) > 0.4 and max(brightness) < 1.7 and abs(np.median(brightness) - 1) < 0.2
    assert np.quantile(white, 0.9) < 0.2
    assert np.std(brightness) > 0.1  # and not always the same


# --- the twin, files, errors -----------------------------------------------------------------------------


def _rough_views() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Camera], list[Lighting]]:
    """Three views of bumps, steps and holes, each in a light of its own."""
    generator = torch.Generator().manual_seed(5)
    bumps = torch.nn.functional.interpolate(
        torch.rand(3, 1, 6, 9, generator=generator), HW, mode="bicubic", align_corners=False
    )[:, 0]
    depth = 2 + bumps
    depth[:, 15:40, 30:50] -= 0.8
    valid = torch.rand(3, *HW, generator=generator) > 0.02
    valid[1, :, 60:66] = False
    image = torch.rand(3, *HW, 3, generator=generator)
    pose = pose_from_rotation(
        rotation_from_axis_angle(torch.tensor([0.1, -0.2, 0.05])), torch.tensor([0.3, 0, 0.2])
    )
    cameras = [CAMERA, replace(CAMERA, w2c=pose), replace(CAMERA, K=intrinsics(45.0, HW))]
    counts = (2, 5, 3)
    lightings = [
        sample_lighting(1.5, RelightCfg(num_lights=(n, n), shadow_probability=n != 3), generator)
        for n in counts
    ]
    return image, depth, valid, cameras, lightings


@pytest.mark.parametrize("cfg", [ShadeCfg(), ShadeCfg(steps=7, smoothing=0.05, thickness=0.5)])
def test_the_batched_twin_gives_the_same_pictures(cfg):
    image, depth, valid, cameras, lightings = _rough_views()
    batch = shade_batch(image, depth, valid, cameras, lightings, cfg)
    assert [lighting.shadows for lighting in lightings] == [True, True, False]
    for k in range(3):
        one = shade(image[k], depth[k], valid[k], cameras[k], lightings[k], cfg)
        different = (one - batch[k]).abs().amax(-1) > 1e-4  # a sample may round to the next pixel
        assert different.float().mean() < 0.001
    assert (shade(image[0], depth[0], valid[0], cameras[0], lightings[1]) - batch[0]).abs().mean() > 0.01


@pytest.mark.parametrize("hw", [(1, 1), (2, 3), (3, 17), (19, 4)])
def test_small_pictures(hw):
    generator = torch.Generator().manual_seed(0)
    image, depth = torch.rand(*hw, 3, generator=generator), 1 + torch.rand(hw, generator=generator)
    valid = torch.ones(hw, dtype=torch.bool)
    camera = Camera(intrinsics(5.0, hw), torch.eye(4), width=hw[1], height=hw[0])
    lighting = _lighting((0.3, -0.2, 0.5), (-1.0, 0.4, -0.3))
    one = shade(image, depth, valid, camera, lighting)
    batch = shade_batch(image[None], depth[None], valid[None], [camera], [lighting])
    torch.testing.assert_close(one, batch[0], atol=1e-4, rtol=0)


def test_extreme_places_of_lights_harm_nothing():
    image, depth, valid, cameras, _ = _rough_views()
    on_surface = (0.0, 0.0, float(depth[0, 30, 42]))
    for position in ((0.0, 0.0, 0.0), (0.0, 0.0, 1e8), (1e8, 0.0, -1e8), (1e-20, 0.0, 0.02), on_surface):
        picture = shade(image[0], depth[0], valid[0], cameras[0], _lighting(position))
        assert torch.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1


def test_a_lighting_survives_a_file(tmp_path):
    lighting = sample_lighting(1.3, generator=torch.Generator().manual_seed(0))
    lighting.save(tmp_path / "light.npz")
    loaded = Lighting.load(tmp_path / "light.npz")
    depth, valid = slanted_plane().depth(CAMERA)
    image = torch.full((*HW, 3), GREY)
    assert torch.equal(
        shade(image, depth, valid, CAMERA, lighting), shade(image, depth, valid, CAMERA, loaded)
    )


def test_what_cannot_be_lit_is_refused(unchecked):
    depth, valid = slanted_plane().depth(CAMERA)
    image, lighting = torch.full((*HW, 3), GREY), _lighting((0.3, -0.2, 0.5))
    with pytest.raises(ShapeError, match=r"image \(60, 80, 3\)"):
        shade(image[:, :80], depth, valid, CAMERA, lighting)
    with pytest.raises(ShapeError, match="one camera and one lighting each"):
        shade(image, depth, valid, replace(CAMERA, width=60), lighting)
    with pytest.raises(ShapeError, match="mask"):
        shade(image, depth, valid[:9], CAMERA, lighting)
    with pytest.raises(ShapeError, match="one camera and one lighting each"):
        shade_batch(image[None], depth[None], valid[None], [CAMERA], [lighting, lighting])
    for bad in (float("nan"), -1.0, 0.0, float("inf")):
        broken = depth.clone()
        broken[3, 4] = bad
        with pytest.raises(L2MError, match="Mask what is unknown"):
            shade(image, broken, valid, CAMERA, lighting)
        valid_elsewhere = valid.clone()
        valid_elsewhere[3, 4] = False
        assert torch.isfinite(shade(image, broken, valid_elsewhere, CAMERA, lighting)).all()
    image[5, 6, 1] = float("nan")
    with pytest.raises(ImageError, match="not finite"):
        shade(image, depth, valid, CAMERA, lighting)


@pytest.mark.parametrize(
    "wrong",
    [
        {"positions": torch.tensor([[float("nan"), 0.0, 1.0]])},
        {"energies": torch.tensor([-1.0])},
        {"ambient": torch.tensor([0.1, -0.1, 0.1])},
        {"exposure": 0.0},
        {"gamma": float("inf")},
        {"radius": -0.1},
    ],
)
def test_impossible_light_is_refused(wrong):
    with pytest.raises(L2MError, match="Lighting: expected finite numbers"):
        _lighting((0.0, 0.0, 1.0), **wrong)


def test_impossible_settings_are_refused(unchecked):
    with pytest.raises(ShapeError, match="Lighting"):
        _lighting((0.0, 0.0, 1.0), energies=torch.ones(2))
    with pytest.raises(L2MError, match="unit"):
        sample_lighting(0.0)
    for wrong in ({"exposure": (0.0, 1.0)}, {"energy": (2.0, 1.0)}, {"num_lights": (3, 2)}):
        with pytest.raises(L2MError, match="RelightCfg"):
            RelightCfg(**wrong)
    for wrong in ({"steps": 0}, {"thickness": 0.001}, {"smoothing": float("nan")}):
        with pytest.raises(L2MError, match="ShadeCfg"):
            ShadeCfg(**wrong)


def test_the_picture_does_not_depend_on_the_number_of_threads():
    image, depth, valid, cameras, lightings = _rough_views()
    threads = numba.get_num_threads()
    pictures = []
    try:
        for count in (1, threads):
            numba.set_num_threads(count)
            pictures.append(shade(image[1], depth[1], valid[1], cameras[1], lightings[1]))
    finally:
        numba.set_num_threads(threads)
    assert torch.equal(*pictures)
