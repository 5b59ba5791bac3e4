from .data import (
    Sample as Sample,
    list_samples as list_samples,
    load_sample as load_sample,
    read_image as read_image,
    write_image as write_image,
)
from .demo import DemoResult as DemoResult, run_demo as run_demo
from .encoders import Encoder as Encoder, FeaturePCA as FeaturePCA, load_encoder as load_encoder
from .errors import (
    FileFormatError as FileFormatError,
    ImageError as ImageError,
    L2MError as L2MError,
    MissingError as MissingError,
    ShapeError as ShapeError,
)
from .evaluation import (
    Report as Report,
    estimate_pose as estimate_pose,
    evaluate as evaluate,
    load_dev_pairs as load_dev_pairs,
    pck as pck,
    pose_auc as pose_auc,
)
from .gaussians import (
    FeatureView as FeatureView,
    FitCfg as FitCfg,
    FitStep as FitStep,
    Gaussians as Gaussians,
    LiftedFeatures as LiftedFeatures,
    Picked as Picked,
    Render as Render,
    feature_similarity as feature_similarity,
    gaussians_from_depth as gaussians_from_depth,
    lift_features as lift_features,
    lift_features_steps as lift_features_steps,
    pick as pick,
    rasterize as rasterize,
    read_ply as read_ply,
    write_ply as write_ply,
)
from .geometry import Camera as Camera
from .lifting import (
    Depth as Depth,
    LiftedScene as LiftedScene,
    View as View,
    ViewSamplerCfg as ViewSamplerCfg,
    estimate_depth as estimate_depth,
    lift as lift,
    read_depth as read_depth,
    sample_cameras as sample_cameras,
    synthesise_views as synthesise_views,
    warp_from_depth as warp_from_depth,
)
from .matching import (
    Match as Match,
    Matcher as Matcher,
    Matches as Matches,
    list_matchers as list_matchers,
    load_matcher as load_matcher,
)
from .training import (
    Pair as Pair,
    PairCfg as PairCfg,
    PairStream as PairStream,
    ShardReader as ShardReader,
    augment as augment,
    make_pair as make_pair,
)

__version__: str
