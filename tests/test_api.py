"""The public API is short, explicit and light."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import l2m_viz
from l2m_viz import (
    Camera,
    Gaussians,
    L2MError,
    ShapeError,
    estimate_depth,
    gaussians_from_depth,
    lift,
    read_depth,
)

# A change here is a change for users: make it on purpose, and write it into the README.
NAMES = [
    "Camera",
    "DemoResult",
    "Depth",
    "Encoder",
    "FeaturePCA",
    "FeatureView",
    "FileFormatError",
    "FitCfg",
    "FitStep",
    "Gaussians",
    "ImageError",
    "L2MError",
    "LiftedFeatures",
    "LiftedScene",
    "Match",
    "Matcher",
    "Matches",
    "MissingError",
    "Pair",
    "PairCfg",
    "PairStream",
    "Picked",
    "Render",
    "Report",
    "Sample",
    "ShapeError",
    "ShardReader",
    "View",
    "ViewSamplerCfg",
    "augment",
    "estimate_depth",
    "estimate_pose",
    "evaluate",
    "feature_similarity",
    "gaussians_from_depth",
    "lift",
    "lift_features",
    "lift_features_steps",
    "list_matchers",
    "list_samples",
    "load_dev_pairs",
    "load_encoder",
    "load_matcher",
    "load_sample",
    "make_pair",
    "pck",
    "pick",
    "pose_auc",
    "rasterize",
    "read_depth",
    "read_image",
    "read_ply",
    "run_demo",
    "sample_cameras",
    "synthesise_views",
    "warp_from_depth",
    "write_image",
    "write_ply",
]

HEAVY = (
    "torch",
    "gradio",
    "viser",
    "gsplat",
    "transformers",
    "diffusers",
    "ray",
    "onnxruntime",
    "cv2",
    "matplotlib",
)


def test_the_names_are_these():
    assert sorted(l2m_viz.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(l2m_viz, name).__doc__, f"{name} has no docstring"


def _modules_after(code: str) -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}; import sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(shown.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    assert not _modules_after("import l2m_viz").intersection(HEAVY)


def test_the_core_never_imports_what_is_optional():
    everything = "import l2m_viz; [getattr(l2m_viz, name) for name in l2m_viz.__all__]"
    optional = ("gradio", "viser", "gsplat", "transformers", "diffusers", "ray", "onnxruntime", "kornia")
    assert not _modules_after(everything).intersection(optional)


def _arrays():
    return np.full((20, 30, 3), 0.5, np.float32), np.ones((20, 30), np.float32), np.diag([20.0, 20.0, 1.0])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda image, depth, K: lift(image, torch.tensor(depth), torch.tensor(K)), "lift: the image"),
        (lambda image, depth, K: lift(torch.tensor(image), depth, torch.tensor(K)), "depth"),
        (lambda image, depth, K: lift(torch.tensor(image), torch.tensor(depth), K.tolist()), "lift: K"),
        (lambda image, depth, K: gaussians_from_depth(torch.tensor(image), torch.tensor(depth), K), "K"),
        (lambda image, depth, K: estimate_depth(image, "prior"), "image"),
        (lambda image, depth, K: Camera(K, torch.eye(4), 30, 20), "Camera.K"),
        (lambda image, depth, K: Camera(torch.tensor(K), np.eye(4).tolist(), 30, 20), "Camera.w2c"),
        (lambda image, depth, K: Gaussians(*(np.zeros((2, n)) for n in (3, 4, 3, 1, 3))), "Gaussians.means"),
    ],
)
def test_arrays_and_lists_where_tensors_belong_are_named(unchecked, call, name):
    with pytest.raises(ShapeError, match=rf"{name}: expected a torch tensor, got a (ndarray|list)"):
        call(*_arrays())


@pytest.mark.parametrize(("scale", "shift"), [("1", 0.0), (1.0, None)])
def test_a_scale_that_is_no_number_is_said(unchecked, scale, shift):
    with pytest.raises(L2MError, match="finite numbers"):
        read_depth("depth.npy", scale=scale, shift=shift)
