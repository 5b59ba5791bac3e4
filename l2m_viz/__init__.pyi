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
from .gaussians import (
    Gaussians as Gaussians,
    Render as Render,
    gaussians_from_depth as gaussians_from_depth,
    rasterize as rasterize,
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
    warp_from_depth as warp_from_depth,
)
from .matching import (
    Match as Match,
    Matcher as Matcher,
    Matches as Matches,
    list_matchers as list_matchers,
    load_matcher as load_matcher,
)

__version__: str
