"""Pixels, cameras, projection, relative poses, and analytic scenes with exact answers.

The conventions live here, once.
"""

from l2m_viz.geometry.cameras import (
    Camera as Camera,
    intrinsics as intrinsics,
    invert_pose as invert_pose,
    look_at as look_at,
    plane_homography as plane_homography,
    pose_from_rotation as pose_from_rotation,
    project as project,
    quat_from_rotation as quat_from_rotation,
    ray_directions as ray_directions,
    relative_pose as relative_pose,
    resize_K as resize_K,
    rotation_from_axis_angle as rotation_from_axis_angle,
    rotation_from_quat as rotation_from_quat,
    transform_points as transform_points,
    unproject as unproject,
    unproject_depth as unproject_depth,
)
from l2m_viz.geometry.pixels import (
    HW as HW,
    flow_from_warp as flow_from_warp,
    from_integer_centers as from_integer_centers,
    inside_image as inside_image,
    normalized_grid as normalized_grid,
    pixel_grid as pixel_grid,
    sample_image as sample_image,
    sample_warp as sample_warp,
    to_integer_centers as to_integer_centers,
    to_normalized as to_normalized,
    to_pixel as to_pixel,
    warp_from_flow as warp_from_flow,
)
