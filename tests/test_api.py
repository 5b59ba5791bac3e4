"""The public API is short, explicit and light."""

import subprocess
import sys

import l2m_viz

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
