"""Random planes for a batch: segments against Dijkstra's algorithm, ranges, and what decides them."""

import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from l2m_viz.data import load_sample, resize_image
from l2m_viz.errors import ShapeError
from l2m_viz.lifting import torch_planes
from l2m_viz.lifting.random_planes import RandomPlanesCfg
from l2m_viz.lifting.torch_planes import random_planes_disparity_batch

HW = (88, 120)
NAMES = ("coffee", "astronaut", "rocket")


@pytest.fixture(scope="module")
def photos():
    return torch.stack([resize_image(load_sample(name).image_A, HW) for name in NAMES])


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _distances(photo: torch.Tensor, places: np.ndarray) -> np.ndarray:
    """Length of the shortest way from every seed to every pixel, by Dijkstra's algorithm on the grid graph."""
    colors = photo.numpy()
    numbers = np.arange(colors[0].size).reshape(colors[0].shape)
    edges = []
    for axis, ends in ((2, (numbers[:, :-1], numbers[:, 1:])), (1, (numbers[:-1], numbers[1:]))):
        cost = torch_planes._COLOR_COST * np.abs(np.diff(colors, axis=axis)).sum(axis=0)
        edges.append([values.ravel() for values in (1 + np.rint(16 * cost) / 16, *ends)])
    cost, start, end = (np.concatenate(values) for values in zip(*edges, strict=True))
    graph = coo_matrix((cost, (start, end)), shape=(numbers.size, numbers.size)).tocsr()
    return dijkstra(graph, directed=False, indices=places).reshape(-1, *numbers.shape)


@pytest.mark.parametrize(("rounds", "share"), [(torch_planes._ROUNDS, 0.95), (40, 0.999)])
def test_every_pixel_is_its_nearest_seed_s(photos, monkeypatch, rounds, share):
    """But for pixels whose way has more bends than there are rounds."""
    monkeypatch.setattr(torch_planes, "_ROUNDS", rounds)
    small = torch_planes._smaller(photos, HW)
    generator = torch.Generator().manual_seed(1)
    places = torch.stack([torch.randperm(HW[0] * HW[1], generator=generator)[:25] for _ in NAMES])
    labels = torch_planes._segments(small, places)
    for k in range(len(NAMES)):
        distances = _distances(small[k], places[k].numpy())
        mine = np.take_along_axis(distances, labels[k].numpy()[None], axis=0)[0]
        assert np.isclose(mine, distances.min(axis=0), atol=0.1).mean() >= share


def test_segments_end_where_colours_change():
    """Two halves of a picture, each with seeds of its own, however far they are and near those of the other."""
    picture = torch.zeros(1, 3, 40, 60)
    picture[..., 30:] = 0.8
    places = torch.tensor([[20 * 60 + 28, 20 * 60 + 58, 5 * 60 + 3]])
    labels = torch_planes._segments(picture, places)[0]
    assert (labels[:, :30] != 1).all() and (labels[:, 30:] == 1).all()


def test_a_place_given_twice_is_its_first_segment():
    places = torch.tensor([[10, 500, 500, 500]])
    labels = torch_planes._segments(torch.rand(1, 3, 20, 30), places)
    assert set(labels.unique().tolist()) == {0, 1}


def test_the_range_is_that_of_the_settings(photos):
    cfg = RandomPlanesCfg(farthest=(0.2, 0.3))
    disparity = random_planes_disparity_batch(photos, _generators(0, 1, 2), cfg)
    torch.testing.assert_close(disparity.amax(dim=(1, 2)), torch.ones(3))
    low = disparity.amin(dim=(1, 2))
    assert (low > 0.2 - 1e-6).all() and (low < 0.3 + 1e-6).all()


def test_steps_follow_the_segments_and_only_where_some_are_lifted(photos):
    def steepest(lifted: float) -> torch.Tensor:
        cfg = RandomPlanesCfg(lifted_share=(lifted, lifted), num_segments=(30, 30))
        disparity = random_planes_disparity_batch(photos, _generators(3, 4, 5), cfg)
        return disparity.diff(dim=2).abs().amax(dim=(1, 2))

    assert (steepest(0.0) < 0.03).all() and (steepest(1.0) > 0.1).all()


def test_photo_and_generator_decide_not_the_batch(photos):
    together = random_planes_disparity_batch(photos, _generators(0, 1, 2))
    alone = random_planes_disparity_batch(photos[1:2], _generators(1))
    torch.testing.assert_close(alone[0], together[1], atol=1e-6, rtol=0)
    other = random_planes_disparity_batch(photos[1:2], _generators(7))
    assert (other[0] - together[1]).abs().mean() > 0.02


def test_one_generator_a_photo(photos):
    with pytest.raises(ShapeError, match="one a photo"):
        random_planes_disparity_batch(photos, _generators(0))
