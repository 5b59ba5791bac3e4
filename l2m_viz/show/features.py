"""Encoders compared across two views: features as colours on one basis, and how far those of one point are apart."""

from collections.abc import Sequence

from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from l2m_viz.data import fit_long_side
from l2m_viz.encoders import Encoder, FeaturePCA
from l2m_viz.errors import ShapeError
from l2m_viz.evaluation import EvalPair
from l2m_viz.geometry import HW, normalized_grid, sample_image
from l2m_viz.show import figures
from l2m_viz.show.figures import Panel

# One scale for all encoders: 0 is the same direction, 1 a right angle, beyond what corresponding points show.
DISTANCE_LIMITS = (0.0, 0.5)

_COLUMNS = 3


def compare_encoders(encoders: Sequence[tuple[str, Encoder]], pair: EvalPair, long_side: int = 320) -> Figure:
    """Draw a photo, another view of it, and below what each encoder says of both.

    Encoders of one width share one PCA basis, fitted once on all their features of both views: there equal colour means
    equal feature, also from one encoder to the other, as between a 2D encoder and the 3D-aware one that it became.

    Raises:
        ShapeError: there are no encoders.
    """
    if not encoders:
        raise ShapeError("compare_encoders", expected="at least one encoder", got="none")
    image_A, image_B = (fit_long_side(image, long_side) for image in (pair.image_A, pair.image_B))
    seen = _nearest(pair.covisibility_A_to_B, _hw(image_A))
    told = {name: (encoder(image_A), encoder(image_B)) for name, encoder in encoders}
    bases = FeaturePCA.fit_by_width(
        (features for both in told.values() for features in both), num_components=3
    )
    rows = [Panel(pair.title, image_A), Panel("from elsewhere", image_B), Panel("seen by both", seen, "mask")]
    for name, (of_A, of_B) in told.items():
        pca = bases[of_A.shape[-1]]
        distance, known = feature_distance(of_A, of_B, pair)
        median = distance[known].median().item() if known.any() else float("nan")
        rows += [
            Panel(f"{name}: the photo", pca.colors(pca.project(of_A))),
            Panel(f"{name}: from elsewhere", pca.colors(pca.project(of_B))),
            Panel(
                f"same point, median {median:.2f}",
                distance,
                "error",
                known,
                "cosine distance",
                DISTANCE_LIMITS,
            ),
        ]
    return figures.panels(*rows, columns=_COLUMNS)


def feature_distance(
    features_A: Float[Tensor, "h w d"], features_B: Float[Tensor, "h2 w2 d2"], pair: EvalPair
) -> tuple[Float[Tensor, "h w"], Bool[Tensor, "h w"]]:
    """Cosine distance between the features of the same point in both views, and the cells where B sees it.

    Raises:
        ShapeError: the features differ in width.
    """
    if features_A.shape[-1] != features_B.shape[-1]:
        got = f"{features_A.shape[-1]} and {features_B.shape[-1]} channels"
        raise ShapeError("feature_distance", expected="features of one width", got=got)
    centers = normalized_grid(_hw(features_A))
    there = sample_image(features_B, sample_image(pair.warp_A_to_B, centers))
    seen = sample_image(pair.covisibility_A_to_B.float(), centers) > 1 - 1e-5
    return 1 - F.cosine_similarity(features_A, there, dim=-1), seen


def _nearest(mask: Bool[Tensor, "h w"], hw: HW) -> Bool[Tensor, "h2 w2"]:
    return sample_image(mask.float(), normalized_grid(hw), mode="nearest") > 0.5


def _hw(image: Tensor) -> HW:
    return image.shape[0], image.shape[1]
