"""Augmentation: closed forms of each effect, libjpeg, scipy and kornia as second opinions, and nothing moves."""

import io
from dataclasses import fields, replace

import kornia
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
import torch
from scipy.stats import kstest
from skimage.registration import phase_cross_correlation

from l2m_viz.data import load_sample, resize_image
from l2m_viz.errors import ImageError, L2MError, ShapeError
from l2m_viz.training.augment import (
    CROSS_MODAL,
    Augmentation,
    AugmentCfg,
    Effect,
    apply_augmentations,
    augment,
    sample_augmentation,
)
from l2m_viz.training.degradations import (
    RGB_FROM_YCC,
    YCC_FROM_RGB,
    add_noise,
    compress,
    correlate,
    gaussian_blur,
    motion_blur,
    motion_kernel,
    resample,
    vignette,
)
from l2m_viz.training.modalities import edges, false_colors, sketch

HW = (52, 76)  # neither a multiple of 8
LUMA = (0.299, 0.587, 0.114)
NOTHING = AugmentCfg(
    **{
        field.name: replace(field.default, probability=0.0)
        for field in fields(AugmentCfg)
        if isinstance(field.default, Effect)
    },
    grey=0.0,
)
EFFECTS = [field.name for field in fields(AugmentCfg) if isinstance(field.default, Effect)]
MODALITIES = ("color", "grey", "false-color", "edges", "sketch")


@pytest.fixture(scope="module")
def photos():
    """Two views (2, H, W, 3) of values inside (0, 1), so that mild changes are not clipped."""
    pictures = [resize_image(load_sample(name).image_A, HW) for name in ("astronaut", "coffee")]
    return 0.1 + 0.8 * torch.stack(pictures)


def _applied(image: torch.Tensor, **values) -> torch.Tensor:
    return apply_augmentations(image[None], [Augmentation(**values)])[0]


def _planes(image: torch.Tensor) -> torch.Tensor:
    return image.permute(2, 0, 1).contiguous()


# --- colour and tone -------------------------------------------------------------------------------------


def test_no_augmentation_changes_nothing(photos):
    torch.testing.assert_close(apply_augmentations(photos, [Augmentation()] * 2), photos, atol=1e-6, rtol=0)
    torch.testing.assert_close(augment(photos, NOTHING), photos, atol=1e-6, rtol=0)


def test_colours_are_their_formulas(photos):
    image = photos[0].double().numpy()
    luma = image @ LUMA
    grey = np.repeat(luma[..., None], 3, axis=-1)
    expected = {
        (("brightness", 1.1),): 1.1 * image,
        (("contrast", 0.7),): 0.7 * image + 0.3 * luma.mean(),
        (("gamma", 1.3),): image**1.3,
        (("white_balance", (0.9, 1.0, 1.05)),): image * (0.9, 1.0, 1.05),
        (("saturation", 0.0),): grey,
        (("saturation", 0.4),): 0.4 * image + 0.6 * grey,
        (("hue_deg", 360.0),): image,
        # Half a turn mirrors each colour at the grey of its brightness.
        (("hue_deg", 180.0), ("saturation", 0.2)): grey - 0.2 * (image - grey),
        (("inverted", True),): 1 - image,
        (("inverted", True), ("brightness", 0.9)): 0.9 * (1 - image),
        (("inverted", True), ("contrast", 0.8)): 0.8 * (1 - image) + 0.2 * (1 - luma).mean(),
        (("modality", "grey"),): grey,
        (("modality", "grey"), ("brightness", 1.05), ("contrast", 0.9), ("gamma", 0.8)): (
            1.05 * (0.9 * grey + 0.1 * luma.mean())
        )
        ** 0.8,
        (("brightness", 3.0),): np.minimum(3 * image, 1),
        (("brightness", 2.0), ("gamma", 2.0)): np.minimum(2 * image, 1) ** 2,  # clipped before the tone curve
    }
    for values, picture in expected.items():
        clipped = np.clip(picture, 0, 1)
        np.testing.assert_allclose(
            _applied(photos[0], **dict(values)), clipped, atol=2e-6, err_msg=str(values)
        )


def test_hue_turns_chroma_and_keeps_brightness(photos):
    image = 0.5 + 0.3 * (photos[0] - 0.5)  # stays inside [0, 1] at every angle
    turned = _applied(image, hue_deg=40.0)
    before, after = (each.double().numpy() @ YCC_FROM_RGB.T for each in (image, turned))
    np.testing.assert_allclose(after[..., 0], before[..., 0], atol=1e-6)
    before, after = (each[..., 1] + 1j * each[..., 2] for each in (before, after))
    np.testing.assert_allclose(after, before * np.exp(1j * np.radians(40.0)), atol=1e-6)


def test_luma_and_chroma_are_those_of_jfif(photos):
    ours = photos[0].double().numpy() @ YCC_FROM_RGB.T + np.array([0, 0.5, 0.5])
    theirs = kornia.color.rgb_to_ycbcr(_planes(photos[0]).double()).permute(1, 2, 0)
    np.testing.assert_allclose(ours, theirs, atol=2e-3)  # kornia rounds its factors to three digits
    np.testing.assert_allclose(RGB_FROM_YCC[:, 0], 1, atol=1e-12)  # `compress` adds luma as it is
    np.testing.assert_allclose(RGB_FROM_YCC[1], (1, -0.344136, -0.714136), atol=1e-6)


def test_black_stays_black_and_white_stays_white():
    for value in (0.0, 1.0):
        image = torch.full((*HW, 3), value)
        picture = _applied(image, gamma=0.7, contrast=1.3, jpeg_quality=40, blur_sigma=1.0, hue_deg=30.0)
        torch.testing.assert_close(picture, image, atol=1e-5, rtol=0)


# --- lens, sensor, file ----------------------------------------------------------------------------------


def test_correlation_is_scipys():
    generator = np.random.default_rng(0)
    planes, kernel = generator.random((3, *HW)), generator.normal(size=(3, 7))
    kernel[1, 2] = 0
    expected = scipy.ndimage.correlate(planes, kernel[None], mode="nearest")
    np.testing.assert_allclose(correlate(torch.from_numpy(planes), kernel), expected, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.4, 1.5, 4.0])
def test_gaussian_blur_is_kornias(photos, sigma):
    side = 2 * int(np.ceil(3 * sigma)) + 1
    planes = _planes(photos[1])
    theirs = kornia.filters.gaussian_blur2d(planes[None], (side, side), (sigma, sigma), "replicate")[0]
    torch.testing.assert_close(gaussian_blur(planes, sigma), theirs, atol=2e-6, rtol=0)


def test_motion_kernels_are_lines():
    np.testing.assert_allclose(motion_kernel(1.0, 33.0).sum(), 1)
    assert motion_kernel(1.0, 33.0)[1, 1] == pytest.approx(1)
    for length in (3.0, 5.6, 9.0):
        for angle in (0.0, 30.0, 90.0, 135.0):
            kernel = motion_kernel(length, angle)
            offset = np.arange(len(kernel)) - len(kernel) // 2
            x, y = kernel.sum(axis=0), kernel.sum(axis=1)
            assert kernel.sum() == pytest.approx(1, abs=1e-4)
            np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-12)  # centred
            along = np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))])
            covariance = (offset * kernel).sum(axis=0) @ offset, offset**2 @ x, offset**2 @ y
            spread = along @ [[covariance[1], 0], [0, covariance[2]]] @ along
            across = np.einsum("yx,y,x->", kernel, offset, offset)
            spread += 2 * along[0] * along[1] * across
            # That of a uniform line from end to end of its pixels' centres, wider by up to a pixel of interpolation.
            assert (length - 1) ** 2 / 12 - 0.02 < spread < length**2 / 12 + 0.7, (length, angle)
    np.testing.assert_allclose(motion_kernel(5.0, 0.0)[3, 1:6].sum(), 1)  # along x, in the middle row
    np.testing.assert_allclose(motion_kernel(5.0, 90.0)[1:6, 3].sum(), 1)


def test_motion_blur_is_the_mean_along_the_line(photos):
    planes = _planes(photos[0])
    left, right = torch.roll(planes, 1, 2), torch.roll(planes, -1, 2)
    expected = (2 * left + 3 * planes + 2 * right) / 7  # seven samples at -1, -2/3, ..., 1, shared bilinearly
    blurred = motion_blur(planes, 3.0, 0.0)
    torch.testing.assert_close(blurred[..., 1:-1], expected[..., 1:-1], atol=1e-6, rtol=0)


def test_vignette_falls_with_the_square_of_the_distance():
    height, width = HW
    picture = vignette(torch.ones(3, *HW), 0.4)
    for y, x in ((0, 0), (20, 75), (51, 3), (26, 38)):
        square = ((2 * x + 1) / width - 1) ** 2 + ((2 * y + 1) / height - 1) ** 2
        assert picture[1, y, x] == pytest.approx(1 - 0.2 * square, abs=1e-6)
    assert picture.max() > 0.999 and 0.6 < picture.min() < 0.62


def test_noise_has_its_variance_and_no_mean():
    values = torch.tensor([0.1, 0.4, 0.9])
    for read, shot in ((0.03, 0.0), (0.0, 0.004), (0.02, 0.003)):
        planes = values[:, None, None].expand(3, 300, 400)
        noise = add_noise(planes, read, shot, torch.Generator().manual_seed(1)) - planes
        expected = (read**2 + shot * values).sqrt()
        torch.testing.assert_close(noise.std(dim=(1, 2)), expected, rtol=0.02, atol=0)
        assert (noise.mean(dim=(1, 2)).abs() < 4 * expected / (300 * 400) ** 0.5).all()
        assert np.abs(np.corrcoef(noise.flatten(1).numpy()) - np.eye(3)).max() < 0.02
        assert kstest((noise / expected[:, None, None]).flatten().numpy()[::7], "norm").pvalue > 1e-3


def test_resampling_takes_what_is_finer_and_leaves_the_rest():
    y, x = torch.meshgrid(torch.arange(HW[0]), torch.arange(HW[1]), indexing="ij")
    checkers = ((x + y) % 2).float()[None]
    assert resample(checkers, 0.5).std() < 0.02
    waves = 0.5 + 0.4 * torch.sin(x / 12)[None]
    for scale in (0.3, 0.55, 0.9):
        inside = resample(waves, scale)[..., 4:-4]  # at the border there is less to average
        torch.testing.assert_close(inside, waves[..., 4:-4], atol=0.02, rtol=0)


@pytest.mark.parametrize("quality", [10, 49, 50, 75, 92])
@pytest.mark.parametrize("colored", [True, False])
def test_compression_is_libjpegs(quality, colored):
    hw = (205, 311)
    image = resize_image(load_sample("coffee").image_A, hw)
    planes = _planes(image) if colored else image[..., 1][None].contiguous()
    exact = (planes * 255).round() / 255
    array = np.moveaxis((exact * 255).byte().numpy(), 0, -1)
    file = io.BytesIO()
    PIL.Image.fromarray(array if colored else array[..., 0]).save(file, "JPEG", quality=quality)
    theirs = np.atleast_3d(np.asarray(PIL.Image.open(file), np.float32) / 255)
    ours = np.moveaxis(compress(exact, quality).clamp(0, 1).numpy(), 0, -1)
    original = np.moveaxis(exact.numpy(), 0, -1)
    lost = np.sqrt(np.mean((theirs - original) ** 2))
    different = np.sqrt(np.mean((ours - theirs) ** 2))
    # libjpeg rounds to 8 bits several times and smooths the halved chroma; neither is much beside the loss.
    assert different < (0.5 if colored else 0.15) * lost + 1 / 255, (different, lost)
    assert np.sqrt(np.mean((ours - original) ** 2)) == pytest.approx(lost, rel=0.1, abs=0.5 / 255)


# --- modalities ------------------------------------------------------------------------------------------


def test_false_colours_are_cosines_of_brightness():
    luma = torch.linspace(0, 1, 5 * 3).reshape(1, 3, 5)
    picture = false_colors(luma, (0.5, 1.0, 0.5), (0.0, 0.0, 0.5))
    torch.testing.assert_close(picture[0], (0.5 + 0.5 * torch.cos(torch.pi * luma))[0])
    assert picture[:, 0, 0].tolist() == pytest.approx([1, 1, 0], abs=1e-6)
    assert picture[:, 1, 2].tolist() == pytest.approx([0.5, 0, 0.5], abs=1e-6)
    assert picture[:, 2, 4].tolist() == pytest.approx([0, 1, 1], abs=1e-6)


def test_edges_are_gradients(photos):
    luma = photos[0].double().numpy() @ LUMA
    slope = np.hypot(*(scipy.ndimage.sobel(luma, axis=axis, mode="nearest") / 8 for axis in (0, 1)))
    expected = np.minimum(slope / (4 * slope.mean()), 1)
    np.testing.assert_allclose(edges(torch.from_numpy(luma)[None])[0], expected, atol=1e-9)
    assert edges(torch.full((1, *HW), 0.3)).max() < 1e-3  # rounding is no edge


def test_a_sketch_draws_what_is_darker_than_its_surroundings():
    luma = torch.full((1, *HW), 0.6)
    torch.testing.assert_close(sketch(luma, 3.0), torch.ones(1, *HW), atol=1e-5, rtol=0)
    luma[:, 20:22, 30:50], luma[:, 40:42, 30:50] = 0.1, 0.9
    picture = sketch(luma, 3.0)
    assert picture[0, 20:22, 32:48].max() < 0.1 and picture[0, 40:42, 32:48].min() == 1
    assert picture[0, :10].min() > 0.99


def test_grey_sensors_have_grey_noise(photos):
    for modality in ("grey", "edges", "sketch"):
        picture = _applied(photos[0], modality=modality, read_noise=0.05, white_balance=(1.1, 1.0, 0.9))
        assert (picture == picture[..., :1]).all()


def test_a_patch_covers_its_place_alone(photos):
    picture = _applied(photos[0], patch=(0.25, 0.5, 0.5, 0.25), patch_color=(0.2, 0.4, 0.6))
    covered = torch.zeros(HW, dtype=torch.bool)
    covered[26:39, 19:57] = True
    assert torch.equal(picture[covered], torch.tensor([0.2, 0.4, 0.6]).expand(13 * 38, 3))
    torch.testing.assert_close(picture[~covered], photos[0][~covered], atol=1e-6, rtol=0)


# --- nothing moves ---------------------------------------------------------------------------------------


def _dot_offset(change, at: tuple[int, int]) -> np.ndarray:
    """Where the effect of a dot is seen, relative to the dot, (x, y) in pixels."""
    plain = torch.full((1, *HW, 3), 0.5)
    dotted = plain.clone()
    dotted[:, at[0] - 1 : at[0] + 2, at[1] - 1 : at[1] + 2] = torch.tensor([0.9, 0.2, 0.1])
    seen = (change(dotted) - change(plain)).abs().sum(dim=(0, 3))
    y, x = torch.nonzero(seen > 0.5 * seen.max()).float().mean(dim=0).tolist()
    return np.array([x - at[1], y - at[0]])


_DOTS = [(10, 12), (17, 55), (26, 33), (39, 20), (41, 61), (13, 36), (31, 66)]


@pytest.mark.parametrize("name", [*EFFECTS, *MODALITIES[1:], "inverted"])
def test_a_dot_stays_where_it_is(name):
    if name in EFFECTS:
        cfg = replace(NOTHING, **{name: replace(getattr(NOTHING, name), probability=1.0)})
        if name == "patch":
            cfg = replace(cfg, patch=Effect(1.0, 0.05, 0.06))
    else:
        cfg = replace(NOTHING, **{name.replace("-", "_"): 1.0})
    offsets = []
    for seed, at in enumerate(_DOTS * 3):
        seeds = torch.tensor([seed])
        offset = _dot_offset(lambda image, seeds=seeds: augment(image, cfg, seeds=seeds), at)
        offsets.append(offset)
        # A block of JPEG has 16 pixels with halved colour, all of which answer to the dot.
        assert np.abs(offset).max() <= (8 if name == "jpeg_quality" else 0.75), (seed, offset)
    assert np.abs(np.mean(offsets, axis=0)).max() < (1.5 if name == "jpeg_quality" else 0.15)


def test_the_dot_would_tell_a_shift_or_a_flip():
    np.testing.assert_allclose(
        _dot_offset(lambda image: torch.roll(image, (2, -1), (1, 2)), _DOTS[0]), (-1, 2)
    )
    assert np.abs(_dot_offset(lambda image: image.flip(2), _DOTS[0])).max() > 10


@pytest.mark.parametrize("effect", ["blur_sigma", "motion_length", "resample_scale"])
def test_a_ramp_stays_a_ramp(effect):
    """What moves a picture by d pixels changes a ramp by d times its slope."""
    y, x = torch.meshgrid(torch.arange(160.0) + 0.5, torch.arange(208.0) + 0.5, indexing="ij")
    ramp = torch.stack([x, y, x + y], dim=-1) / 400
    cfg = replace(NOTHING, **{effect: replace(getattr(NOTHING, effect), probability=1.0)})
    batch = ramp.expand(24, -1, -1, -1)
    moved_px = 400 * (augment(batch, cfg, torch.Generator().manual_seed(0)) - ramp)[:, 16:-16, 16:-16]
    assert moved_px.abs().max() < 0.15
    assert moved_px.mean(dim=(0, 1, 2)).abs().max() < 0.02


def test_photos_register_at_rest():
    image = resize_image(load_sample("astronaut").image_A, (150, 186))
    generator = torch.Generator().manual_seed(3)
    for picture in augment(image.expand(40, -1, -1, -1), None, generator):
        before, after = (_edge_map(each) for each in (image, picture))
        shift, _, _ = phase_cross_correlation(before, after, upsample_factor=20)
        assert np.abs(shift).max() <= 0.2


def _edge_map(image: torch.Tensor) -> np.ndarray:
    luma = scipy.ndimage.gaussian_filter(image.numpy() @ LUMA, 1.0)
    return np.hypot(scipy.ndimage.sobel(luma, 0), scipy.ndimage.sobel(luma, 1))


# --- draws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [AugmentCfg(), CROSS_MODAL])
def test_a_batch_is_what_its_images_are_one_by_one(photos, cfg):
    seeds = torch.tensor([5, 2**40 + 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])
    images = photos.repeat(6, 1, 1, 1)
    batch = augment(images, cfg, seeds=seeds)
    singles = [augment(images[i : i + 1], cfg, seeds=seeds[i : i + 1]) for i in range(12)]
    assert torch.equal(batch, torch.cat(singles))
    assert torch.equal(augment(images.flip(0), cfg, seeds=seeds.flip(0)), batch.flip(0))
    assert not torch.equal(augment(images, cfg, seeds=seeds + 1), batch)
    assert sample_augmentation(cfg, 5) != sample_augmentation(cfg, 2**40 + 5)  # all 64 bits count


def test_the_generator_decides_alone(photos):
    state = torch.get_rng_state()
    before = photos.clone()
    first, second, third = (augment(photos, None, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(photos, before)
    same = augment(photos[:1].expand(6, -1, -1, -1), CROSS_MODAL, torch.Generator().manual_seed(0))
    assert len({picture.sum().item() for picture in same}) == 6  # each image has draws of its own


def test_effects_occur_as_often_and_as_strongly_as_they_should():
    cfg = replace(CROSS_MODAL, patch=Effect(0.4, 0.1, 0.3))
    drawn = [sample_augmentation(cfg, seed) for seed in range(1000)]
    for name in EFFECTS:
        effect, neutral = getattr(cfg, name), getattr(Augmentation(), name)
        values = np.array([getattr(each, name) for each in drawn if getattr(each, name) != neutral], float)
        bound = 4 * np.sqrt(effect.probability * (1 - effect.probability) / 1000)
        assert abs(len(values) / 1000 - effect.probability) < bound, name
        if name == "patch":
            assert values[:, 2:].min() >= 0.1 and values[:, 2:].max() <= 0.3
            assert values.min() >= 0 and (values[:, :2] + values[:, 2:]).max() <= 1
            continue
        assert effect.low - 0.5 * (name == "jpeg_quality") <= values.min() <= values.max() <= effect.high
        low, high = effect.low, effect.high
        if name in {"brightness", "contrast", "gamma", "white_balance"}:
            values, low, high = np.log(values).ravel(), np.log(low), np.log(high)
        assert kstest((values - low) / (high - low), "uniform").pvalue > 1e-3, name
    shown = [each.modality for each in drawn]
    for modality, probability in (("grey", 0.2), ("false-color", 0.2), ("edges", 0.1), ("sketch", 0.1)):
        assert abs(shown.count(modality) / 1000 - probability) < 0.05
    assert abs(np.mean([each.inverted for each in drawn]) - 0.2) < 0.05


def test_cross_modal_effects_are_off_unless_asked_for():
    drawn = [sample_augmentation(AugmentCfg(), seed) for seed in range(150)]
    assert {each.modality for each in drawn} == {"color", "grey"}
    assert not any(each.inverted or each.patch for each in drawn)


def test_the_probability_of_one_effect_changes_no_other():
    more = replace(AugmentCfg(), blur_sigma=Effect(1.0, 0.4, 1.5), patch=Effect(1.0, 0.1, 0.2), grey=0.0)
    for seed in range(30):
        first, second = sample_augmentation(AugmentCfg(), seed), sample_augmentation(more, seed)
        different = {
            field.name for field in fields(first) if getattr(first, field.name) != getattr(second, field.name)
        }
        assert different <= {"blur_sigma", "patch", "modality"}


# --- limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hw", [(1, 1), (1, 7), (3, 2), (17, 9)])
def test_any_size_and_any_picture_stays_a_picture(hw):
    every = AugmentCfg(
        **{name: replace(getattr(AugmentCfg(), name), probability=1.0) for name in EFFECTS}, grey=0.0
    )
    images = torch.rand(6, *hw, 3, generator=torch.Generator().manual_seed(0))
    images[1], images[2], images[3, ..., 1] = 0, 1, 0
    for modality in MODALITIES:
        chance = {} if modality == "color" else {modality.replace("-", "_"): 1.0}
        pictures = augment(images, replace(every, inverted=0.5, **chance), torch.Generator().manual_seed(1))
        assert pictures.shape == images.shape and pictures.dtype == torch.float32
        assert torch.isfinite(pictures).all() and pictures.min() >= 0 and pictures.max() <= 1


def test_pictures_keep_what_a_matcher_needs():
    image = resize_image(load_sample("astronaut").image_A, (150, 186))
    pictures = augment(image.expand(100, -1, -1, -1), None, torch.Generator().manual_seed(0))
    contrast = pictures.std(dim=(1, 2)).mean(dim=-1) / image.std(dim=(0, 1)).mean()
    clipped = ((pictures == 0) | (pictures == 1)).float().mean(dim=(1, 2, 3))
    assert contrast.min() > 0.4 and contrast.max() < 1.7
    assert clipped.quantile(0.9) < 0.25


def test_half_precision_regions_and_gradients_change_nothing(photos):
    seeds = torch.tensor([3, 4])
    expected = augment(photos, seeds=seeds)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = augment(photos.clone().requires_grad_(), seeds=seeds)
    assert torch.equal(inside, expected) and not inside.requires_grad


def test_strided_images_and_empty_batches(photos):
    seeds = torch.tensor([3, 4])
    strided = photos.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(augment(strided, seeds=seeds), augment(photos, seeds=seeds), atol=2e-6, rtol=0)
    assert augment(photos[:0]).shape == (0, *HW, 3)


def test_what_cannot_be_augmented_is_refused(photos, unchecked):
    with pytest.raises(ShapeError, match=r"expected \(B, H, W, 3\)"):
        augment(photos[0])
    with pytest.raises(ShapeError, match="seeds: expected 2"):
        augment(photos, seeds=torch.tensor([1]))
    with pytest.raises(ShapeError, match="expected 2 augmentations"):
        apply_augmentations(photos, [Augmentation()])
    with pytest.raises(ImageError, match="float32"):
        augment(photos.double())
    with pytest.raises(ImageError, match="divide by 255"):
        augment(photos * 255)
    photos = photos.clone()
    photos[1, 3, 4, 0] = float("nan")
    with pytest.raises(ImageError, match="not finite"):
        augment(photos)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"brightness": Effect(0.5, 0.0, 1.0)}, "AugmentCfg brightness"),
        ({"blur_sigma": Effect(0.5, 0.0, 1.0)}, "AugmentCfg blur_sigma"),
        ({"resample_scale": Effect(0.5, 0.5, 1.5)}, "AugmentCfg resample_scale"),
        ({"jpeg_quality": Effect(0.5, 0.0, 50.0)}, "AugmentCfg jpeg_quality"),
        ({"read_noise": Effect(0.5, -0.1, 0.1)}, "AugmentCfg read_noise"),
        ({"grey": 0.6, "edges": 0.6}, "not above 1 together"),
        ({"inverted": 1.5}, "probabilities"),
        ({"sketch": float("nan")}, "probabilities"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(L2MError, match=message):
        AugmentCfg(**wrong)


@pytest.mark.parametrize("values", [(1.1, 0, 1), (0.5, 2, 1), (float("nan"), 0, 1), (0.5, 0, float("inf"))])
def test_impossible_effects_are_refused(values):
    with pytest.raises(L2MError, match="Effect"):
        Effect(*(float(value) for value in values))


@pytest.mark.gpu
@pytest.mark.parametrize("cfg", [AugmentCfg(), CROSS_MODAL])
def test_a_gpu_gives_the_same_pictures(photos, cfg):
    """But for the noise, whose generator belongs to the device."""
    silent = replace(cfg, read_noise=Effect(0.0, 0.0, 0.0), shot_noise=Effect(0.0, 0.0, 0.0))
    images, seeds = photos.repeat(8, 1, 1, 1), torch.arange(16)
    ours = augment(images.cuda(), silent, seeds=seeds).cpu()
    different = (ours - augment(images, silent, seeds=seeds)).abs().amax(dim=-1) > 1e-4
    assert different.float().mean() < 0.02  # a coefficient of JPEG may round to the next step
    noisy = augment(images.cuda(), replace(cfg, read_noise=Effect(1.0, 0.05, 0.05)), seeds=seeds).cpu()
    assert torch.isfinite(noisy).all() and noisy.min() >= 0 and noisy.max() <= 1
