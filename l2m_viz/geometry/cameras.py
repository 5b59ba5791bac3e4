"""Pinhole cameras and rigid poses.

Symbols: ``K`` (3, 3) intrinsics in pixels; camera axes as in OpenCV, +x right, +y down, +z forward; ``w2c`` (4, 4)
maps world to camera points and ``c2w`` is its inverse; ``T_A_to_B`` maps points of camera A to points of camera B;
``depth`` is z in the camera frame, not the length of the ray.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from l2m_viz.errors import L2MError, ShapeError, require_tensor
from l2m_viz.geometry.pixels import HW, pixel_grid


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: intrinsics in pixels, world-to-camera pose, image size in pixels.

    Raises:
        ShapeError: ``K`` is not (3, 3), ``w2c`` is not (4, 4), or the image has no pixels.
        L2MError: a value is not finite, a focal length is not positive, or ``w2c`` is not rigid.
    """

    K: Float[Tensor, "3 3"]
    w2c: Float[Tensor, "4 4"]
    width: int
    height: int

    def __post_init__(self) -> None:
        require_tensor("Camera.K", self.K)
        require_tensor("Camera.w2c", self.w2c)
        if tuple(self.K.shape) != (3, 3) or tuple(self.w2c.shape) != (4, 4):
            got = f"K {tuple(self.K.shape)} and w2c {tuple(self.w2c.shape)}"
            raise ShapeError("Camera", expected="K (3, 3) and w2c (4, 4)", got=got)
        if self.width < 1 or self.height < 1:
            raise ShapeError(
                "Camera image size", expected="at least 1x1 px", got=f"{self.width}x{self.height}"
            )
        # in NumPy: a dozen operations on nine numbers, each of which takes torch several times as long
        K, pose = (value.detach().double().cpu().numpy() for value in (self.K, self.w2c))
        if not (np.isfinite(K).all() and np.isfinite(pose).all()):
            raise L2MError("Camera", expected="finite K and w2c", got="NaN or infinity")
        if K[0, 0] <= 0 or K[1, 1] <= 0:
            focal = f"fx {K[0, 0]:g}, fy {K[1, 1]:g}"
            raise L2MError("Camera focal length", expected="fx > 0 and fy > 0 px", got=focal)
        if max(abs(K[0, 1]), abs(K[1, 0]), abs(K[2, 0]), abs(K[2, 1]), abs(K[2, 2] - 1)) > 1e-6:
            got = str(self.K.tolist())
            raise L2MError(
                "Camera K", expected="no skew, last row (0, 0, 1)", got=got, todo="undistort first"
            )
        R = pose[:3, :3]
        skewed = np.abs(R @ R.T - np.eye(3)).max() > 1e-3
        if skewed or np.linalg.det(R) < 0 or pose[3].tolist() != [0.0, 0.0, 0.0, 1.0]:
            todo = "w2c holds a rotation and a translation; put scale into the scene"
            raise L2MError("Camera w2c", expected="a rigid transform", got="scale, skew or mirror", todo=todo)

    @property
    def hw(self) -> HW:
        """Image size (H, W) in pixels."""
        return self.height, self.width

    @property
    def c2w(self) -> Float[Tensor, "4 4"]:
        """Camera-to-world pose."""
        return invert_pose(self.w2c)

    @property
    def center(self) -> Float[Tensor, " 3"]:
        """Optical centre in world coordinates."""
        return self.c2w[:3, 3]

    @property
    def fov_y(self) -> float:
        """Vertical field of view in radians, for a principal point at the centre."""
        return 2 * float(torch.atan(self.height / (2 * self.K[1, 1])))

    def resized(self, hw: HW) -> "Camera":
        """The same view with another number of pixels."""
        return replace(self, K=resize_K(self.K, self.hw, hw), width=hw[1], height=hw[0])


def intrinsics(focal: float, hw: HW) -> Float[Tensor, "3 3"]:
    """Build ``K`` from a focal length in pixels, principal point at the image's centre.

    >>> intrinsics(100.0, (60, 80)).tolist()
    [[100.0, 0.0, 40.0], [0.0, 100.0, 30.0], [0.0, 0.0, 1.0]]
    """
    return torch.tensor([[focal, 0.0, hw[1] / 2], [0.0, focal, hw[0] / 2], [0.0, 0.0, 1.0]])


def resize_K(K: Float[Tensor, "*batch 3 3"], hw: HW, hw_to: HW) -> Float[Tensor, "*batch 3 3"]:
    """Rescale ``K`` when an image of size ``hw`` is resized to ``hw_to`` (no half-pixel term in our convention)."""
    scale = torch.tensor([hw_to[1] / hw[1], hw_to[0] / hw[0], 1.0], dtype=K.dtype, device=K.device)
    return K * scale[:, None]


def invert_pose(pose: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Invert a rigid transform in closed form, [R t]^-1 = [R^T  -R^T t]."""
    rotation_t = pose[..., :3, :3].transpose(-1, -2)
    inverse = torch.zeros_like(pose)
    inverse[..., :3, :3] = rotation_t
    inverse[..., :3, 3] = -(rotation_t @ pose[..., :3, 3:])[..., 0]
    inverse[..., 3, 3] = 1
    return inverse


def relative_pose(
    w2c_A: Float[Tensor, "*batch 4 4"], w2c_B: Float[Tensor, "*batch 4 4"]
) -> Float[Tensor, "*batch 4 4"]:
    """Return ``T_A_to_B`` = w2c_B @ c2w_A."""
    return w2c_B @ invert_pose(w2c_A)


def pose_from_rotation(
    rotation: Float[Tensor, "3 3"], translation: Float[Tensor, " 3"]
) -> Float[Tensor, "4 4"]:
    """Put a rotation and a translation into one (4, 4) transform."""
    pose = torch.eye(4, dtype=rotation.dtype, device=rotation.device)
    pose[:3, :3], pose[:3, 3] = rotation, translation
    return pose


def rotation_from_axis_angle(axis_angle: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """Exponential map of so(3): rotate by |v| radians about v (Rodrigues' formula).

    >>> rotation_from_axis_angle(torch.zeros(3)).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    x, y, z = axis_angle.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1)
    return torch.linalg.matrix_exp(skew.unflatten(-1, (3, 3)))


def rotation_from_quat(quats: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3 3"]:
    """Rotation matrices of quaternions (w, x, y, z), which need not be of unit length.

    >>> rotation_from_quat(torch.tensor([2.0, 0.0, 0.0, 0.0])).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    w, x, y, z = (quats / quats.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def quat_from_rotation(rotation: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """Unit quaternions (w, x, y, z) of rotation matrices; inverse of `rotation_from_quat` up to sign.

    Each of the four rows below is the quaternion times one of its own entries (Shepperd 1978); the row with the largest
    such entry is taken, so that nothing is divided by a small number.
    """
    (r00, r01, r02), (r10, r11, r12), (r20, r21, r22) = (row.unbind(-1) for row in rotation.unbind(-2))
    rows = [
        1 + r00 + r11 + r22, r21 - r12, r02 - r20, r10 - r01,
        r21 - r12, 1 + r00 - r11 - r22, r10 + r01, r02 + r20,
        r02 - r20, r10 + r01, 1 - r00 + r11 - r22, r21 + r12,
        r10 - r01, r02 + r20, r21 + r12, 1 - r00 - r11 + r22,
    ]  # fmt: skip
    candidates = torch.stack(rows, dim=-1).unflatten(-1, (4, 4))
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    quats = candidates.gather(-2, best[..., None, None].expand(*best.shape, 1, 4))[..., 0, :]
    return quats / quats.norm(dim=-1, keepdim=True)


def look_at(
    eye: Float[Tensor, " 3"], target: Float[Tensor, " 3"], down: Float[Tensor, " 3"] | None = None
) -> Float[Tensor, "4 4"]:
    """Return the ``w2c`` of a camera at ``eye`` that looks at ``target``; ``down`` is the image's +y, world +y if None.

    Raises:
        L2MError: ``eye`` equals ``target``, or the view direction is parallel to ``down``.
    """
    down = torch.tensor([0.0, 1.0, 0.0], dtype=eye.dtype, device=eye.device) if down is None else down
    forward = target - eye
    right = torch.linalg.cross(down, forward)
    if right.norm() <= 1e-6 * forward.norm() or forward.norm() == 0:
        got = f"eye {eye.tolist()}, target {target.tolist()}, down {down.tolist()}"
        raise L2MError("look_at", expected="a view direction not parallel to `down`", got=got)
    forward, right = forward / forward.norm(), right / right.norm()
    # rows: camera axes in the world
    rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
    return pose_from_rotation(rotation, -rotation @ eye)


def transform_points(
    pose: Float[Tensor, "4 4"], points: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch 3"]:
    """Apply a rigid transform to points."""
    return points @ pose[:3, :3].T + pose[:3, 3]


def project(
    points_cam: Float[Tensor, "*batch 3"], K: Float[Tensor, "3 3"]
) -> tuple[Float[Tensor, "*batch 2"], Float[Tensor, "*batch"]]:
    """Project camera points to pixels; return (pixels, depth). Pixels mean something only where depth > 0."""
    depth = points_cam[..., 2]
    safe_depth = torch.where(depth.abs() < 1e-12, torch.full_like(depth, 1e-12), depth)
    homogeneous = points_cam @ K.T
    return homogeneous[..., :2] / safe_depth[..., None], depth


def unproject(
    points_px: Float[Tensor, "*batch 2"], depth: Float[Tensor, "*batch"], K: Float[Tensor, "3 3"]
) -> Float[Tensor, "*batch 3"]:
    """Lift pixels with depth to camera points; inverse of `project` where depth > 0."""
    return ray_directions(points_px, K) * depth[..., None]


def unproject_depth(depth: Float[Tensor, "h w"], K: Float[Tensor, "3 3"]) -> Float[Tensor, "h w 3"]:
    """Lift a depth map to the camera points of all its pixel centres."""
    height, width = depth.shape
    return unproject(pixel_grid((height, width), device=depth.device, dtype=depth.dtype), depth, K)


def ray_directions(
    points_px: Float[Tensor, "*batch 2"], K: Float[Tensor, "3 3"]
) -> Float[Tensor, "*batch 3"]:
    """Return camera-frame ray directions of pixels, scaled to z = 1, so that depth is the ray's parameter."""
    ones = torch.ones_like(points_px[..., :1])
    return torch.cat([points_px, ones], dim=-1) @ torch.linalg.inv(K).T


def plane_homography(
    K_A: Float[Tensor, "3 3"],
    K_B: Float[Tensor, "3 3"],
    T_A_to_B: Float[Tensor, "4 4"],
    normal: Float[Tensor, " 3"],
    distance: float,
) -> Float[Tensor, "3 3"]:
    """Homography that the plane n . X = d (in camera A's frame) induces, H = K_B (R + t n^T / d) K_A^-1.

    Hartley and Zisserman, Multiple View Geometry, 2nd ed., eq. 13.2 (their sign of d is the opposite).
    """
    rotation, translation = T_A_to_B[:3, :3], T_A_to_B[:3, 3]
    return K_B @ (rotation + torch.outer(translation, normal) / distance) @ torch.linalg.inv(K_A)
