"""PLY files: the standard layout, other people's files, metadata that bothers no other reader, damage."""

import hashlib
import io
import json
import re
import struct
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from plyfile import PlyData

from l2m_viz.encoders import FeaturePCA
from l2m_viz.errors import FileFormatError, L2MError
from l2m_viz.gaussians import Gaussians, read_ply, write_ply

NUM = 4
# As graphdeco-inria/gaussian-splatting and gsplat's exporter write it, normals aside.
REQUIRED = [
    *("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
]
CODES = {  # PLY's types, by both of their names, in `struct`
    **{"char": "b", "uchar": "B", "short": "h", "ushort": "H", "int": "i", "uint": "I"},
    **{"int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I"},
    **{"float": "f", "double": "d", "float32": "f", "float64": "d"},
}
TENSORS = ("means", "quats", "log_scales", "logit_opacities", "colors", "features", "sh_rest", "sh_dc")


def ours(num_features: int | None = 6, num_rest: int | None = 8, n: int = NUM, **metadata) -> Gaussians:
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    return Gaussians(
        means=random(n, 3),
        quats=3 * random(n, 4),
        log_scales=random(n, 3),
        logit_opacities=random(n),
        colors=torch.rand(n, 3, generator=generator),
        features=None if num_features is None else random(n, num_features),
        sh_rest=None if num_rest is None else random(n, num_rest, 3),
        **metadata,
    )


def basis(d: int = 6, k: int = 2) -> FeaturePCA:
    return FeaturePCA.fit(torch.randn(100, d, generator=torch.Generator().manual_seed(1)), k)


def full() -> Gaussians:
    return ours(backbone="dinov2-vits14", length_unit="m", pca=basis())


def values_of(names: list[str], n: int = NUM) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=n) for name in names}  # doubles that no float32 equals


def by_hand(
    path, values, kind="float", layout="binary_little_endian", newline="\n", comments=(), elements=("", "")
):
    """A PLY of one vertex element, byte by byte; ``kind`` is one type or a type for each property."""
    kinds = kind if isinstance(kind, dict) else dict.fromkeys(values, kind)
    n = len(next(iter(values.values())))
    before, after = elements
    lines = ["ply", f"format {layout} 1.0", *(f"comment {text}" for text in comments), *before.split("\n")]
    lines += [f"element vertex {n}", *(f"property {kinds[name]} {name}" for name in values)]
    lines += [*after.split("\n"), "end_header", ""]
    data = newline.join(line for i, line in enumerate(lines) if line or i == len(lines) - 1).encode()
    for row in range(n):
        cells = [values[name][row] for name in values]
        if layout == "ascii":
            data += " ".join(f"{value:.17g}" for value in cells).encode() + newline.encode()
        else:
            order = "<" if layout.endswith("little_endian") else ">"
            codes = "".join(CODES[kinds[name]] for name in values)
            cells = [c if k in "fd" else int(c) for c, k in zip(cells, codes, strict=True)]
            data += struct.pack(order + codes, *cells)
    path.write_bytes(data)
    return path


def check(gaussians: Gaussians, values: dict[str, np.ndarray]):
    """What was read is what the file says, bit for bit in float32."""
    n = len(gaussians)

    def column(name):
        return torch.from_numpy(np.asarray(values[name])[:n].astype(np.float32))

    def columns(*names):
        return torch.stack([column(name) for name in names], dim=-1)

    assert torch.equal(gaussians.means, columns("x", "y", "z"))
    assert torch.equal(gaussians.sh_dc, columns("f_dc_0", "f_dc_1", "f_dc_2"))
    assert torch.equal(gaussians.logit_opacities, column("opacity"))
    assert torch.equal(gaussians.log_scales, columns("scale_0", "scale_1", "scale_2"))
    assert torch.equal(gaussians.quats, columns("rot_0", "rot_1", "rot_2", "rot_3"))
    expected = 0.5 + 0.28209479177387814 * columns("f_dc_0", "f_dc_1", "f_dc_2").double()
    if gaussians.sh_rest is None:
        expected = expected.clamp(min=0)
    torch.testing.assert_close(gaussians.colors.double(), expected, atol=3e-7, rtol=0)


# --- our files, read by others


def test_the_layout_is_the_standard_one(tmp_path):
    gaussians = ours()
    write_ply(gaussians, tmp_path / "g.ply")
    ply = PlyData.read(tmp_path / "g.ply")
    names = [
        "x",
        "y",
        "z",
        "nx",
        "ny",
        "nz",
        "f_dc_0",
        "f_dc_1",
        "f_dc_2",
        *(f"f_rest_{i}" for i in range(24)),
    ]
    names += ["opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    names += [f"feat_{i}" for i in range(6)]
    (vertex,) = ply.elements
    assert (ply.text, ply.byte_order, ply.comments, vertex.name) == (False, "<", [], "vertex")
    assert [prop.name for prop in vertex.properties] == names
    assert {prop.val_dtype for prop in vertex.properties} == {"f4"}
    sh_rest = gaussians.sh_rest.numpy()
    for name, expected in {
        "y": gaussians.means[:, 1],
        "nz": torch.zeros(NUM),
        "opacity": torch.logit(gaussians.opacities),
        "scale_2": gaussians.scales[:, 2].log(),
        "rot_0": gaussians.quats[:, 0],  # w
        "feat_5": gaussians.features[:, 5],
        "f_rest_0": sh_rest[:, 0, 0],
        "f_rest_7": sh_rest[:, 7, 0],  # the last of red
        "f_rest_8": sh_rest[:, 0, 1],  # the first of green
        "f_rest_23": sh_rest[:, 7, 2],
    }.items():
        np.testing.assert_allclose(vertex[name], expected, atol=1e-6, err_msg=name)
    shown = 0.5 + 0.28209479177387814 * np.stack([vertex[f"f_dc_{i}"] for i in range(3)], axis=1)
    np.testing.assert_allclose(shown, gaussians.colors, atol=1e-6)


def test_without_features_and_harmonics_it_has_the_seventeen_properties_of_degree_0(tmp_path):
    write_ply(ours(None, None), tmp_path / "g.ply")
    header, _, rows = (tmp_path / "g.ply").read_bytes().partition(b"end_header\n")
    assert header.count(b"property float ") == 17
    assert len(rows) == NUM * 17 * 4


@pytest.mark.parametrize(("num_features", "num_rest"), [(384, None), (340, 15)])
def test_gsplat_js_finds_the_end_of_the_header_and_the_rows(tmp_path, num_features, num_rest):
    """Its parser in words of Python: the first 10 KB, each `property` line a float, a fixed stride from there on."""
    gaussians = ours(
        num_features, num_rest, backbone="b" * 240, length_unit="relative", pca=basis(num_features)
    )
    write_ply(gaussians, tmp_path / "g.ply")
    data = (tmp_path / "g.ply").read_bytes()
    header = data[: 10 * 1024].decode(errors="replace")
    end = header.index("end_header\n")
    count = int(re.search(r"element vertex (\d+)\n", header)[1])
    names = [line.split(" ")[2] for line in header[:end].split("\n") if line.startswith("property ")]
    rows = np.frombuffer(data, "<f4", count * len(names), end + 11).reshape(count, -1)
    assert count == NUM
    np.testing.assert_array_equal(rows[:, names.index("z")], gaussians.means[:, 2])
    np.testing.assert_array_equal(rows[:, names.index("rot_3")], gaussians.quats[:, 3])
    np.testing.assert_array_equal(rows[:, names.index("feat_0")], gaussians.features[:, 0])


def test_the_header_word_for_word(tmp_path):
    write_ply(ours(1, None, backbone="dino"), tmp_path / "g.ply")
    header, _, rows = (tmp_path / "g.ply").read_bytes().partition(b"end_header\n")
    lines = header.decode("ascii").split("\n")
    start = ["ply", "format binary_little_endian 1.0", 'comment l2m_viz {"backbone": "dino"}']
    assert lines[:5] == [*start, "element vertex 4", "property float x"]
    assert lines[-2:] == ["property float feat_0", ""]
    assert len(rows) == NUM * 18 * 4


# --- there and back


@pytest.mark.parametrize("num_features", [None, 1, 6])
@pytest.mark.parametrize("num_rest", [None, 3, 8, 15, 24])
def test_round_trip(tmp_path, num_features, num_rest):
    before = ours(num_features, num_rest)
    write_ply(before, tmp_path / "g.ply")
    after = read_ply(tmp_path / "g.ply")
    for name in set(TENSORS) - {"colors", "sh_dc"}:
        one, two = getattr(before, name), getattr(after, name)
        assert (one is None and two is None) or torch.equal(one, two), name
        assert two is None or two.is_contiguous(), name
    torch.testing.assert_close(after.colors, before.colors, atol=1e-7, rtol=0)
    assert (after.backbone, after.length_unit, after.pca) == (None, None, None)
    write_ply(after, tmp_path / "again.ply")
    assert (tmp_path / "again.ply").read_bytes() == (tmp_path / "g.ply").read_bytes()


def test_metadata_come_back(tmp_path):
    before = replace(full(), backbone='é "quoted"\nend_header\n')
    write_ply(before, tmp_path / "g.ply")
    after = read_ply(tmp_path / "g.ply")
    assert (after.backbone, after.length_unit) == (before.backbone, "m")
    for field in fields(FeaturePCA):
        assert torch.equal(getattr(after.pca, field.name), getattr(before.pca, field.name)), field.name
    write_ply(replace(before, pca=None, length_unit=None), tmp_path / "g.ply")
    after = read_ply(tmp_path / "g.ply")
    assert (after.backbone, after.length_unit, after.pca) == (before.backbone, None, None)


def test_other_readers_do_not_see_the_metadata(tmp_path):
    write_ply(full(), tmp_path / "with.ply")
    write_ply(ours(), tmp_path / "without.ply")
    one, two = PlyData.read(tmp_path / "with.ply"), PlyData.read(tmp_path / "without.ply")
    assert len(one.elements) == 1
    np.testing.assert_array_equal(one["vertex"].data, two["vertex"].data)
    (comment,) = one.comments
    assert json.loads(comment.removeprefix("l2m_viz "))["backbone"] == "dinov2-vits14"


def test_gradients_and_views_are_written(tmp_path):
    gaussians = ours()
    leaf = gaussians.means.T.contiguous().T.requires_grad_()  # neither a leaf's value nor packed memory
    write_ply(replace(gaussians, means=leaf), tmp_path / "g.ply")
    assert torch.equal(read_ply(tmp_path / "g.ply").means, gaussians.means)


# --- other people's files


@pytest.mark.parametrize("layout", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("kind", ["float", "float32", "double"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_third_party_layouts(tmp_path, layout, kind, newline):
    names = [*REQUIRED[::-1], "nx", "ny", "nz", *(f"f_rest_{i}" for i in range(9))]
    values = values_of(names)
    read = read_ply(by_hand(tmp_path / "g.ply", values, kind, layout, newline))
    check(read, values)
    for k in range(3):
        for channel in range(3):
            expected = values[f"f_rest_{3 * channel + k}"].astype(np.float32)
            np.testing.assert_array_equal(read.sh_rest[:, k, channel], expected)
    assert read.features is None and read.backbone is None


@pytest.mark.parametrize("layout", ["ascii", "binary_little_endian", "binary_big_endian"])
def test_a_shuffled_file_of_mixed_types_with_strangers(tmp_path, layout):
    order = [*REQUIRED, *(f"feat_{i}" for i in range(11)), "red", "segment_id", "confidence"]
    np.random.default_rng(1).shuffle(order)
    values = values_of(order) | {"red": np.array([0, 255, 7, 9]), "segment_id": np.array([-1, 2, 3, 2**30])}
    values = {name: values[name] for name in order}
    kinds = dict.fromkeys(order, "float") | {
        "red": "uchar",
        "segment_id": "int",
        "x": "double",
        "feat_3": "double",
    }
    path = by_hand(tmp_path / "g.ply", values, kinds, layout, comments=["made by Zoë", "l2m_viz is not ours"])
    read = read_ply(path)
    check(read, values)
    for i in range(11):  # feat_10 comes after feat_9, not after feat_1
        np.testing.assert_array_equal(read.features[:, i], values[f"feat_{i}"].astype(np.float32))


@pytest.mark.parametrize("layout", ["ascii", "binary_little_endian"])
def test_elements_around_the_vertices(tmp_path, layout):
    values = values_of(REQUIRED)
    camera = "element camera 2\nproperty float focal\nproperty uchar id"
    faces = "element face 1\nproperty list uchar int vertex_indices"
    path = by_hand(tmp_path / "g.ply", values, "float", layout, elements=(camera, faces))
    header, end, rows = path.read_bytes().partition(b"end_header\n")
    ascii_file = layout == "ascii"
    first = b"1.5 3\n2.5 4\n" if ascii_file else struct.pack("<fBfB", 1.5, 3, 2.5, 4)
    path.write_bytes(header + end + first + rows + (b"3 0 1 2\n" if ascii_file else b"\x03" + b"\0" * 12))
    check(read_ply(path), values)


@pytest.mark.parametrize("layout", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("kind", sorted(CODES))
def test_every_type_by_both_names(tmp_path, layout, kind):
    values = values_of([*REQUIRED, "stranger"]) | {"x": np.array([1, 2, 3, 100])}
    values["stranger"] = values["x"]
    path = by_hand(
        tmp_path / "g.ply",
        values,
        dict.fromkeys(REQUIRED, "float") | {"x": kind, "stranger": kind},
        layout,
    )
    check(read_ply(path), values)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_remarks_anywhere_in_the_header(tmp_path, newline):
    path = by_hand(tmp_path / "g.ply", values_of(REQUIRED), newline=newline)
    header, end, rows = path.read_bytes().partition(b"end_header")
    lines = header.decode().split(newline)
    lines[1:1] = ["comment", "obj_info made by hand", ""]  # before the format, too
    lines[6:6] = ["  comment  property float x", "obj_info", 'comment l2m_viz {"backbone": "dino"}']
    path.write_bytes(newline.join(lines).encode() + end + rows)
    check(read_ply(path), values_of(REQUIRED))
    assert read_ply(path).backbone == "dino"


def test_plyfile_writes_what_we_read(tmp_path):
    write_ply(full(), tmp_path / "g.ply")
    ply = PlyData.read(tmp_path / "g.ply")
    for text, byte_order in ((True, "="), (False, ">")):
        PlyData(ply.elements, text=text, byte_order=byte_order).write(tmp_path / "other.ply")
        read, expected = read_ply(tmp_path / "other.ply"), read_ply(tmp_path / "g.ply")
        for name in TENSORS:
            assert torch.equal(getattr(read, name), getattr(expected, name)), name


@pytest.mark.parametrize("num_rest", [0, 45])
def test_f_dc_survives_bit_for_bit(tmp_path, num_rest):
    n = 5000
    values = values_of([*REQUIRED, *(f"f_rest_{i}" for i in range(num_rest))], n)
    values |= {f"f_dc_{i}": 3 * values[f"f_dc_{i}"] for i in range(3)}  # colours far outside [0, 1], too
    read = read_ply(by_hand(tmp_path / "in.ply", values))
    write_ply(read, tmp_path / "out.ply")
    written = PlyData.read(tmp_path / "out.ply")["vertex"]
    for name, value in values.items():
        assert written[name].tobytes() == value.astype("<f4").tobytes(), name


def test_a_new_colour_is_written_not_the_old_coefficients(tmp_path):
    values = values_of(REQUIRED)
    read = read_ply(by_hand(tmp_path / "in.ply", values))
    colors = read.colors.clone()
    colors[2] = torch.tensor([1.0, 0.25, 0.5])
    write_ply(replace(read, colors=colors), tmp_path / "out.ply")
    again = read_ply(tmp_path / "out.ply")
    torch.testing.assert_close(again.colors, colors, atol=3e-7, rtol=0)
    torch.testing.assert_close(again.colors[2], colors[2], atol=1e-7, rtol=0)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(again.sh_dc[others], read.sh_dc[others])


def test_a_negative_colour_is_black_where_no_harmonic_could_raise_it(tmp_path):
    """Inria's renderer draws max(0, 0.5 + Y_00 f_dc)."""
    values = values_of([*REQUIRED, *(f"f_rest_{i}" for i in range(9))])
    values |= {
        "f_dc_0": np.array([-4.0, -1.0, 0.0, 9.0]),
        "f_dc_1": np.zeros(4),
        "f_dc_2": np.zeros(4) - 2.5,
    }
    expected = [0.5 - 4 * 0.282094792, 0.5 - 0.282094792, 0.5, 0.5 + 9 * 0.282094792]
    lit = read_ply(by_hand(tmp_path / "sh.ply", values))
    np.testing.assert_allclose(lit.colors[:, 0], expected, atol=3e-7)
    read = read_ply(by_hand(tmp_path / "in.ply", {name: values[name] for name in REQUIRED}))
    np.testing.assert_allclose(read.colors[:, 0], [0.0, *expected[1:]], atol=3e-7)
    assert read.colors[:, 2].tolist() == [0.0] * 4

    colors = read.colors.clone()
    colors[1] = torch.tensor([0.25, 0.5, 0.0])
    for gaussians in (replace(read, colors=colors), replace(lit, sh_rest=None)):
        write_ply(gaussians, tmp_path / "out.ply")
        written = PlyData.read(tmp_path / "out.ply")["vertex"]
        same = (gaussians.colors == read.colors).all(dim=1) | (gaussians.colors == lit.colors).all(dim=1)
        for name in ("f_dc_0", "f_dc_1", "f_dc_2"):
            assert written[name][same].tobytes() == values[name][same].astype("<f4").tobytes()
        torch.testing.assert_close(read_ply(tmp_path / "out.ply").colors, gaussians.colors.clamp(min=0))


def test_black_in_place_of_a_negative_colour_under_harmonics_is_a_new_colour(tmp_path):
    values = values_of([*REQUIRED, *(f"f_rest_{i}" for i in range(9))]) | {"f_dc_0": np.full(4, -4.0)}
    read = read_ply(by_hand(tmp_path / "in.ply", values))
    write_ply(replace(read, colors=read.colors.clamp(min=0)), tmp_path / "out.ply")
    torch.testing.assert_close(
        read_ply(tmp_path / "out.ply").colors, read.colors.clamp(min=0), atol=1e-6, rtol=0
    )


# --- errors


def refused(path, pattern):
    with pytest.raises(FileFormatError, match=pattern) as caught:
        read_ply(path)
    assert str(path) in str(caught.value)


def test_no_such_file(tmp_path):
    refused(tmp_path / "absent.ply", "no such file")
    refused(tmp_path, "cannot read")  # a folder


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"", "expected a PLY file, got an empty one"),
        (b"\x89PNG\r\n\x1a\n", "expected a PLY file, got one that begins with .*PNG"),
        (b"ply", "expected a PLY file"),
        (b"play\n", "expected a PLY file"),
        (b"ply\nformat ascii 1.0\n", "end_header.*truncated"),
        (b"ply\nend_header\n", "expected a PLY header"),
        (b"ply\nformat ascii 1.0\nend_header\n", "expected vertices, got nothing"),
        (b"ply\nformat ascii 2.0\nend_header\n", "expected a PLY header"),
        (b"ply\nformat binary_middle_endian 1.0\nend_header\n", "expected a PLY header"),
        (b"ply\nformat ascii 1.0\nproperty float x\nend_header\n", "expected a PLY header"),
        (b"ply\nformat ascii 1.0\nelement vertex 1\nproperty real x\nend_header\n", "expected a PLY header"),
        (
            b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float\nend_header\n",
            "the line 'property float'",
        ),
        (
            b"ply\nformat ascii 1.0\nelement a 1\nproperty list uchar x\nend_header\n",
            "the line 'property list",
        ),
        (
            b"ply\nformat ascii 1.0\nelement a 1\nproperty list uchar real x\nend_header\n",
            "the line 'property l",
        ),
        (b"ply\nformat ascii 1.0\nformat ascii 1.0\nend_header\n", "the line 'format ascii 1.0'"),
        (b"ply\nelement vertex 1\nproperty float x\nend_header\n", "without a line like 'format ascii 1.0'"),
        (b"ply\nformat ascii 1.0\nelement a 1\nelement a 2\nend_header\n", "two elements with same name 'a'"),
        (b"ply\nformat ascii 1.0\nvertices 3\nend_header\n", "the line 'vertices 3'"),
        (b"ply\nformat ascii 1.0\nelement face 3\nproperty float x\nend_header\n", "vertices, got 3 face"),
        (b"ply\nformat ascii 1.0\nelement vertex -3\nend_header\n", "element vertex -3"),
        (b"ply\nformat ascii 1.0\nelement vertex\nend_header\n", "got 'element vertex'"),
        (b"ply\nformat ascii 1.0\nelement vertex 1_0\nend_header\n", "element vertex 1_0"),
        (b"ply\nformat ascii 1.0\nelement vertex 1" + b"0" * 5000 + b"\nend_header\n", "element vertex 1000"),
        (b"ply\nformat ascii 1.0\nelement\x1cvertex 1\x1c\nend_header\n", "cannot read"),
        (b"ply\n" + b"comment x\n" * 200_000, "end_header"),
    ],
)
def test_not_a_ply(tmp_path, data, pattern):
    (tmp_path / "x.ply").write_bytes(data)
    refused(tmp_path / "x.ply", pattern)


def test_zero_vertices(tmp_path):
    refused(by_hand(tmp_path / "g.ply", values_of(REQUIRED, 0)), "expected vertices, got 0 vertex")


@pytest.mark.parametrize("layout", ["ascii", "binary_little_endian"])
@pytest.mark.parametrize("count", [NUM + 1, 10**9, 10**12, 10**17])
def test_more_vertices_than_the_file_has(tmp_path, layout, count):
    path = by_hand(tmp_path / "g.ply", values_of(REQUIRED), layout=layout)
    path.write_bytes(path.read_bytes().replace(f"vertex {NUM}\n".encode(), f"vertex {count}\n".encode()))
    refused(path, rf"{count} vertices as its header says, got .*truncated")


@pytest.mark.parametrize("layout", ["ascii", "binary_little_endian"])
def test_more_elements_before_the_vertices_than_the_file_has(tmp_path, layout):
    before = f"element camera {10**15}\nproperty float focal"
    path = by_hand(tmp_path / "g.ply", values_of(REQUIRED), layout=layout, elements=(before, ""))
    refused(path, "4 vertices as its header says, got 0")


def test_other_vertices_than_gaussians(tmp_path):
    names = ["x", "y", "z", "nx", "ny", "nz"]
    refused(
        by_hand(tmp_path / "cloud.ply", values_of(names)), "none called f_dc_0.*opacity.*rot_3.*A point cloud"
    )
    packed = dict.fromkeys(["packed_position", "packed_color"], np.arange(NUM))
    refused(by_hand(tmp_path / "packed.ply", packed, "int"), "uncompressed")
    without = values_of([name for name in REQUIRED if name != "opacity"])
    refused(by_hand(tmp_path / "g.ply", without), "none called opacity")
    path = by_hand(tmp_path / "list.ply", values_of(REQUIRED))
    path.write_bytes(path.read_bytes().replace(b"property float x", b"property list uchar float x"))
    refused(path, "lists in x")
    lists = ("element face 1\nproperty list uchar int vertex_indices", "")
    refused(by_hand(tmp_path / "g.ply", values_of(REQUIRED), elements=lists), "lists before the vertices")


@pytest.mark.parametrize("count", [1, 3, 10, 44, 46, 48, 75])
def test_f_rest_of_no_degree(tmp_path, count):
    values = values_of([*REQUIRED, *(f"f_rest_{i}" for i in range(count))])
    refused(by_hand(tmp_path / "g.ply", values), f"9, 24, 45, 72 properties f_rest, or none, got {count}")


@pytest.mark.parametrize("name", ["feat_4", "feat_02"])
def test_features_with_gaps(tmp_path, name):
    values = values_of([*REQUIRED, "feat_0", "feat_1", name])
    refused(by_hand(tmp_path / "g.ply", values), "none called feat_2.*without gaps")


def test_a_property_twice(tmp_path):
    path = by_hand(tmp_path / "g.ply", values_of([*REQUIRED, "other"]))
    path.write_bytes(path.read_bytes().replace(b" other\n", b" x\n"))
    refused(path, "two properties with same name")


@pytest.mark.parametrize("layout", ["ascii", "binary_little_endian"])
@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("x", np.nan, "means: .*finite.* 1 of 4 rows"),
        ("opacity", np.inf, "logit_opacities: .*finite"),
        ("scale_1", 1e39, "log_scales: .*finite"),  # a double that float32 does not reach
    ],
)
def test_values_that_no_gaussian_has(tmp_path, layout, name, value, pattern):
    values = values_of(REQUIRED)
    values[name][2] = value
    refused(by_hand(tmp_path / "g.ply", values, "double", layout), pattern)


def test_a_quaternion_of_zeros(tmp_path):
    values = values_of(REQUIRED)
    for i in range(4):
        values[f"rot_{i}"][1] = 0
    refused(by_hand(tmp_path / "g.ply", values), "quats: .*1 zero rows of 4")


@pytest.mark.parametrize("change", [("\n", " 1\n"), (" ", "\n"), ("0.", "O."), ("0.", "\x00"), ("0.", "ö.")])
def test_wrong_lines_of_ascii(tmp_path, change):
    path = by_hand(tmp_path / "g.ply", values_of(REQUIRED), layout="ascii")
    header, end, rows = path.read_bytes().partition(b"end_header\n")
    path.write_bytes(header + end + rows.decode().replace(*change, 1).encode())
    refused(path, "cannot read")


def test_blank_lines_of_ascii_are_nothing(tmp_path):
    values = values_of(REQUIRED)
    path = by_hand(tmp_path / "g.ply", values, layout="ascii")
    header, end, rows = path.read_bytes().partition(b"end_header\n")
    path.write_bytes(header + end + b"\n" + rows.replace(b"\n", b"\n \n"))
    check(read_ply(path), values)


# --- the block after the vertices


def test_bytes_after_the_vertices_are_ignored_where_no_comment_speaks_of_them(tmp_path):
    write_ply(ours(), tmp_path / "g.ply")
    with (tmp_path / "g.ply").open("ab") as file:
        file.write(b"something else")
    assert read_ply(tmp_path / "g.ply").pca is None
    write_ply(full(), tmp_path / "g.ply")
    with (tmp_path / "g.ply").open("ab") as file:
        file.write(b"something else")
    assert read_ply(tmp_path / "g.ply").pca is not None


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped", "moved"])
def test_a_damaged_block(tmp_path, damage):
    write_ply(full(), tmp_path / "g.ply")
    data = (tmp_path / "g.ply").read_bytes()
    size = len(full().pca.to_bytes())
    flipped = bytearray(data)
    flipped[-size // 2] ^= 1
    (tmp_path / "g.ply").write_bytes(
        {
            "cut": data[:-1],
            "gone": data[:-size],
            "flipped": bytes(flipped),
            "moved": data[:-size] + b"\0" + data[-size:],
        }[damage]
    )
    refused(tmp_path / "g.ply", "PCA basis in .* bytes.*remove the comment")
    bare = re.sub(rb"comment l2m_viz.*\n", b"", (tmp_path / "g.ply").read_bytes())  # as the message says
    (tmp_path / "g.ply").write_bytes(bare)
    assert torch.equal(read_ply(tmp_path / "g.ply").features, full().features)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"backbone": 3}',
        '{"length_unit": ["m"]}',
        '{"pca": 1}',
        '{"pca": {}}',
        '{"pca": {"bytes": "1", "sha256": "a"}}',
        '{"pca": {"bytes": -1, "sha256": "a"}}',
        '{"pca": {"bytes": 1e300, "sha256": "a"}}',
        '{"pca": {"bytes": 1000000000000000000, "sha256": "a"}}',
        '{"pca": ' + "[" * 100_000,
    ],
)
def test_a_damaged_comment(tmp_path, text):
    refused(by_hand(tmp_path / "g.ply", values_of(REQUIRED), comments=[f"l2m_viz {text}"]), "cannot read")


def test_what_a_newer_version_adds_to_the_comment_is_ignored(tmp_path):
    text = 'l2m_viz {"backbone": "next", "units": 3}'
    assert read_ply(by_hand(tmp_path / "g.ply", values_of(REQUIRED), comments=[text])).backbone == "next"


def test_a_pickle_in_the_block_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return ((tmp_path / "exploded").mkdir, ())

    buffer, bomb = io.BytesIO(), np.empty(1, object)
    bomb[0] = Bomb()
    meta = np.frombuffer(json.dumps({"type": "FeaturePCA", "fields": {}}).encode(), np.uint8)
    np.savez(buffer, __meta__=meta, mean=bomb)
    block = buffer.getvalue()
    text = {"pca": {"bytes": len(block), "sha256": hashlib.sha256(block).hexdigest()}}
    path = by_hand(tmp_path / "g.ply", values_of(REQUIRED), comments=[f"l2m_viz {json.dumps(text)}"])
    with path.open("ab") as file:
        file.write(block)
    refused(path, "PCA basis")
    assert not (tmp_path / "exploded").exists()


def test_a_basis_of_other_features(tmp_path):
    block = basis(d=9, k=2).to_bytes()
    text = {"pca": {"bytes": len(block), "sha256": hashlib.sha256(block).hexdigest()}}
    values = values_of([*REQUIRED, *(f"feat_{i}" for i in range(6))])
    path = by_hand(tmp_path / "g.ply", values, comments=[f"l2m_viz {json.dumps(text)}"])
    with path.open("ab") as file:
        file.write(block)
    refused(path, "pca: expected features of 9")


def test_names_too_long_for_the_header(tmp_path):
    with pytest.raises(L2MError, match=r"backbone and length_unit.*at most 300"):
        write_ply(ours(backbone="x" * 300), tmp_path / "g.ply")
    assert not (tmp_path / "g.ply").exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(FileFormatError, match="cannot write"):
        write_ply(ours(), tmp_path / "file" / "g.ply")


# --- damage of any kind is one kind of error


@pytest.mark.parametrize("make", ["ours", "ascii"])
def test_truncated_anywhere(tmp_path, make):
    if make == "ours":
        write_ply(full(), tmp_path / "g.ply")
    else:
        by_hand(tmp_path / "g.ply", values_of(REQUIRED), layout="ascii")
    data = (tmp_path / "g.ply").read_bytes()
    # An ASCII file without its last digits is a shorter number, which nobody can tell.
    last = len(data) if make == "ours" else data.rindex(b" ")
    for cut in [*range(0, last, 7), last - 1]:
        (tmp_path / "g.ply").write_bytes(data[:cut])
        refused(tmp_path / "g.ply", "cannot read")


@pytest.mark.parametrize("layout", ["ours", "ascii", "binary_big_endian"])
def test_damaged_anywhere(tmp_path, layout):
    path = tmp_path / "g.ply"
    if layout == "ours":
        write_ply(full(), path)
    else:
        by_hand(path, values_of([*REQUIRED, *(f"f_rest_{i}" for i in range(9))]), layout=layout)
    data = path.read_bytes()
    length = data.index(b"end_header")
    rng = np.random.default_rng(0)
    words = re.split(rb"(\s+)", data[:length])
    others = [
        b"",
        b"-1",
        b"0",
        b"9" * 18,
        b"x",
        b"list",
        b"double",
        b"uchar",
        b"vertex",
        b"end_header",
        b"\xff",
    ]
    damaged = []
    for _ in range(300):  # header words
        changed = list(words)
        changed[2 * rng.integers(0, len(words) // 2)] = others[rng.integers(0, len(others))]
        damaged.append(b"".join(changed) + data[length:])
    for end in (length, len(data)):  # header bytes, any bytes
        for _ in range(200):
            flipped = bytearray(data)
            for at in rng.integers(0, end, 2):
                flipped[at] ^= int(rng.integers(1, 256))
            damaged.append(bytes(flipped))
    refusals = 0
    for each in damaged:
        path.write_bytes(each)
        try:
            read_ply(path)  # another number, or another word in a comment, is a good file
        except FileFormatError:
            refusals += 1
    assert refusals > 300
