"""Pairs on disk: WebDataset shards, an index that knows every shard by its hash, and the way back to `Pair`.

A shard is an uncompressed tar of a few hundred pairs. A pair is four members that share the pair's number as key:

    000000042.image_A.png    8 bits, lossless
    000000042.image_B.png
    000000042.truth.npz      depths as float32, masks packed to bits; not compressed, no pickles
    000000042.json           seed, K, T, the photo's path and hash, the settings

The warps are not stored: `warp_from_depth` makes the same bits of depth, K and T again (`encode_pair` makes sure of
it), and they would be more than half of all bytes. Covisibility is stored: it knows of cuts in the mesh, which depth
does not. A pair that was read back differs from the one that was made in its colours only, by their rounding to 8 bits.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from l2m_viz.data.files import Saved, atomic_write, write_text
from l2m_viz.data.images import read_image, to_uint8
from l2m_viz.errors import FileFormatError, L2MError, ShapeError
from l2m_viz.geometry import HW, invert_pose
from l2m_viz.lifting import warp_from_depth
from l2m_viz.training.pairs import Pair

INDEX_NAME = "index.json"
_FORMAT = "l2m_viz pairs 1"
_MASKS = (
    "valid_A",
    "valid_B",
    "hole_mask_B",
    "inpainted_mask_B",
    "covisibility_A_to_B",
    "covisibility_B_to_A",
)
_PARTS = ("image_A.png", "image_B.png", "truth.npz", "json")
_MEMBER = re.compile(rf"(\d{{9,18}})\.({'|'.join(map(re.escape, _PARTS))})", re.ASCII)
_SHARD_NAME = re.compile(r"pairs-\d{6,9}\.tar", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
# Files come from strangers: nothing larger is read, let alone decoded.
_MAX_PIXELS = 4096 * 4096
_MAX_BYTES = {"image_A.png": 2**27, "image_B.png": 2**27, "truth.npz": 2**28, "json": 2**16}
_MAX_INDEX_BYTES = 2**28
_MAX_TAIL_BYTES = 2**20  # zeros behind the last member: tar fills up to 10 kB
# Runs of equal bytes are all that is worth looking for in photos behind PNG's filters: 3.5 times as fast as level 6,
# and 2 % larger.
_PNG_COMPRESSION = {"compress_level": 1, "compress_type": zlib.Z_RLE}
_TODO_DAMAGED = "`l2m synth` with `--verify` makes damaged shards again"


@dataclass(frozen=True)
class PairRecord:
    """A pair and where it came from.

    Attributes:
        index: Number of the pair; it and the settings decide everything.
        pair: The pair.
        photo: Path of the photo below the folder of photos.
        photo_sha256: Hash of the photo's file.
        background: The photo behind the holes, if there is one.
        settings: `PairCfg` of this pair, as JSON.
    """

    index: int
    pair: Pair
    photo: str
    photo_sha256: str
    background: str | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class PairTruth(Saved):
    """What ``truth.npz`` holds: z-depth of both views, and masks with eight pixels a byte, rows filled up with zeros.

    ``np.unpackbits(mask, axis=1, count=width)`` gives a mask's pixels back.
    """

    depth_A: Float[Tensor, "h w"]
    depth_B: Float[Tensor, "h w"]
    valid_A: UInt8[Tensor, "h eighths"]
    valid_B: UInt8[Tensor, "h eighths"]
    hole_mask_B: UInt8[Tensor, "h eighths"]
    inpainted_mask_B: UInt8[Tensor, "h eighths"]
    covisibility_A_to_B: UInt8[Tensor, "h eighths"]
    covisibility_B_to_A: UInt8[Tensor, "h eighths"]


# --- one pair ------------------------------------------------------------------------------------------------


def encode_pair(record: PairRecord) -> dict[str, bytes]:
    """Return the members of a pair, without their key: ``{"image_A.png": ..., ...}``.

    Raises:
        ShapeError: the views differ in size, or are larger than a reader accepts.
        L2MError: the warps do not follow from depth and cameras, so that they would be lost.
    """
    pair = record.pair
    height, width = pair.depth_A.shape
    if pair.depth_B.shape != pair.depth_A.shape or height * width > _MAX_PIXELS:
        got = f"{tuple(pair.depth_A.shape)} and {tuple(pair.depth_B.shape)}"
        raise ShapeError("encode_pair", expected=f"views of one size, at most {_MAX_PIXELS} px", got=got)
    warps = _warps(pair.depth_A, pair.depth_B, pair.valid_A, pair.valid_B, pair.K_A, pair.K_B, pair.T_A_to_B)
    if not (torch.equal(warps[0], pair.warp_A_to_B) and torch.equal(warps[1], pair.warp_B_to_A)):
        raise L2MError(
            "encode_pair", expected="warps of warp_from_depth", got=f"others in pair {record.index}"
        )
    masks = {name: _packed(getattr(pair, name)) for name in _MASKS}
    info = {
        "index": record.index,
        "seed": pair.seed,
        "photo": record.photo,
        "photo_sha256": record.photo_sha256,
        "background": record.background,
        **{name: getattr(pair, name).tolist() for name in ("K_A", "K_B", "T_A_to_B")},
        "settings": record.settings,
    }
    return {
        "image_A.png": _png(pair.image_A),
        "image_B.png": _png(pair.image_B),
        "truth.npz": PairTruth(pair.depth_A, pair.depth_B, **masks).to_bytes(),
        "json": json.dumps(info).encode(),
    }


def decode_pair(parts: Mapping[str, Any], name: str = "pair") -> PairRecord:
    """Build a pair from the bytes of its members; ``name`` says in errors where they came from.

    ``parts`` may be a sample of the `webdataset` library as it is: other entries and the case of names do not matter.

    Raises:
        FileFormatError: a part is missing, too large, damaged, or does not fit the others.
        ImageError: a picture is damaged.
    """
    data = _whole_parts(parts, name)
    info = _decode_info(data["json"], name)
    image_A, image_B = (
        read_image(data[part], max_pixels=_MAX_PIXELS) for part in ("image_A.png", "image_B.png")
    )
    hw = image_A.shape[0], image_A.shape[1]
    truth = _decode_truth(data["truth.npz"], hw, name)
    if image_B.shape != image_A.shape:
        got = f"{tuple(image_A.shape)} and {tuple(image_B.shape)}"
        raise FileFormatError(f"cannot read {name}", expected="two views of one size", got=got)
    masks = {mask: _unpacked(getattr(truth, mask), hw) for mask in _MASKS}
    cameras = {key: torch.tensor(info[key], dtype=torch.float32) for key in ("K_A", "K_B", "T_A_to_B")}
    warp_A_to_B, warp_B_to_A = _warps(
        truth.depth_A, truth.depth_B, masks["valid_A"], masks["valid_B"], **cameras
    )
    pair = Pair(
        image_A=image_A,
        image_B=image_B,
        depth_A=truth.depth_A,
        depth_B=truth.depth_B,
        warp_A_to_B=warp_A_to_B,
        warp_B_to_A=warp_B_to_A,
        seed=info["seed"],
        **masks,
        **cameras,
    )
    own = {key: info[key] for key in ("index", "photo", "photo_sha256", "background", "settings")}
    return PairRecord(pair=pair, **own)


def _warps(
    depth_A: Tensor,
    depth_B: Tensor,
    valid_A: Tensor,
    valid_B: Tensor,
    K_A: Tensor,
    K_B: Tensor,
    T_A_to_B: Tensor,
) -> tuple[Float[Tensor, "h w 2"], Float[Tensor, "h w 2"]]:
    """Both warps as `make_pair` computes them."""
    warp_A_to_B, _ = warp_from_depth(depth_A, K_A, depth_B, K_B, T_A_to_B, valid_A, valid_B)
    warp_B_to_A, _ = warp_from_depth(depth_B, K_B, depth_A, K_A, invert_pose(T_A_to_B), valid_B, valid_A)
    return warp_A_to_B, warp_B_to_A


def _png(image: Float[Tensor, "h w 3"]) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(to_uint8(image)).save(buffer, "PNG", **_PNG_COMPRESSION)
    return buffer.getvalue()


def _packed(mask: Bool[Tensor, "h w"]) -> UInt8[Tensor, "h eighths"]:
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1))


def _unpacked(packed: UInt8[Tensor, "h eighths"], hw: HW) -> Bool[Tensor, "h w"]:
    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=1, count=hw[1]).astype(bool))


def _whole_parts(parts: Mapping[str, Any], name: str) -> dict[str, bytes]:
    lower = {key.lower(): value for key, value in parts.items()}  # webdataset lowers the names of members
    data = {part: lower.get(part.lower()) for part in _PARTS}
    for part, value in data.items():
        if not isinstance(value, bytes) or len(value) > _MAX_BYTES[part]:
            got = f"{len(value)} B" if isinstance(value, bytes) else type(value).__name__
            expected = f"at most {_MAX_BYTES[part]} B of {part}"
            raise FileFormatError(f"cannot read {name}", expected=expected, got=got)
    return {part: bytes(value) for part, value in data.items() if value is not None}


def _decode_info(data: bytes, name: str) -> dict[str, Any]:
    """Read a pair's JSON and check its every field."""
    try:
        info = json.loads(data)
        sizes = {"K_A": (3, 3), "K_B": (3, 3), "T_A_to_B": (4, 4)}
        right = {
            **{key: type(info[key]) is int and info[key] >= 0 for key in ("index", "seed")},
            **{key: isinstance(info[key], str) for key in ("photo", "photo_sha256")},
            **{key: _is_finite_matrix(info[key], size) for key, size in sizes.items()},
            "background": isinstance(info["background"], str | None),
            "settings": isinstance(info["settings"], dict),
        }
    except Exception as error:  # not JSON, not UTF-8, nested too deep, a list, a missing field
        got = f"{type(error).__name__}: {error}"
        raise FileFormatError(f"cannot read {name}", expected="the JSON of a pair", got=got) from error
    if wrong := [key for key, is_right in right.items() if not is_right]:
        got = f"something else in {wrong}"
        raise FileFormatError(f"cannot read {name}", expected="the JSON of a pair", got=got)
    return info


def _is_finite_matrix(value: object, size: tuple[int, int]) -> bool:
    array = np.asarray(value, np.float32)
    return array.shape == size and bool(np.isfinite(array).all())


def _decode_truth(data: bytes, hw: HW, name: str) -> PairTruth:
    """Read a pair's npz; members that are compressed could unfold to any size and are refused."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
    except Exception as error:  # BadZipFile, struct.error, NotImplementedError, ...
        got = f"{type(error).__name__}: {error}"
        raise FileFormatError(f"cannot read {name}", expected="truth.npz", got=got) from error
    if not stored:
        raise FileFormatError(
            f"cannot read {name}", expected="an npz that is not compressed", got="one that is"
        )
    truth = PairTruth.from_bytes(data, name)
    sizes = {"depth_A": (hw, torch.float32), "depth_B": (hw, torch.float32)}
    sizes |= {mask: ((hw[0], -(-hw[1] // 8)), torch.uint8) for mask in _MASKS}
    for key, expected in sizes.items():
        value = getattr(truth, key)
        got = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value).__name__
        if got != expected:
            raise FileFormatError(f"{key} of {name}", expected=str(expected), got=str(got))
    return truth


# --- one shard -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """What the index knows of a shard."""

    name: str
    num_pairs: int
    bytes: int
    sha256: str


def shard_name(number: int) -> str:
    """File name of a shard.

    >>> shard_name(7)
    'pairs-000007.tar'
    """
    return f"pairs-{number:06d}.tar"


def write_shard(path: Path, pairs: Iterable[tuple[int, dict[str, bytes]]]) -> Shard:
    """Write numbered pairs, as `encode_pair` made them, to a tar that appears when it is whole.

    The same pairs make the same bytes: no dates, no owners.
    """
    count = 0
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index, parts in pairs:
            for part in _PARTS:
                member = tarfile.TarInfo(f"{index:09d}.{part}")
                member.size = len(parts[part])
                tar.addfile(member, io.BytesIO(parts[part]))
            count += 1
    return Shard(path.name, count, path.stat().st_size, _sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Place:
    """Where in a shard the bytes of a member are."""

    offset: int
    size: int


_Places = tuple[
    tuple[int, dict[str, _Place]], ...
]  # of each pair, in the file's order: its number, its parts


def _list_pairs(path: Path) -> _Places:
    """Find the pairs of a shard without reading them.

    Raises:
        FileFormatError: no tar, an end that is missing, a member that has no business there, a pair without a part.
    """
    found: dict[int, dict[str, _Place]] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                index, part = _checked_name(member, path)
                if part in found.setdefault(index, {}):
                    raise FileFormatError(f"{path}", expected="each member once", got=f"{member.name} twice")
                found[index][part] = _Place(member.offset_data, member.size)
            _require_end(file, tar.offset, path)
    except FileFormatError:
        raise
    except FileNotFoundError as error:
        raise FileFormatError(f"no such file {path}", todo="check the path") from error
    except Exception as error:  # TarError, but a foreign file raises anything
        got = f"{type(error).__name__}: {error}"
        raise FileFormatError(f"cannot read {path}", expected="a tar", got=got, todo=_TODO_DAMAGED) from error
    if broken := [index for index, parts in found.items() if len(parts) < len(_PARTS)]:
        got = f"less of pair {broken[0]}"
        raise FileFormatError(f"{path}", expected=f"all of {_PARTS}", got=got, todo=_TODO_DAMAGED)
    return tuple(found.items())


def _checked_name(member: tarfile.TarInfo, path: Path) -> tuple[int, str]:
    """Number and part of a member; links, folders, paths and giants are refused."""
    match = _MEMBER.fullmatch(member.name)
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if match is None or not plain or not 0 <= member.size <= _MAX_BYTES[match[2]]:
        got = f"{member.name[:80]!r} of type {member.type!r}, {member.size} B"
        expected = f"files named 000000000.{{{', '.join(_PARTS)}}}"
        raise FileFormatError(f"{path}", expected=expected, got=got, todo="do not unpack it; it is foreign")
    return int(match[1]), match[2]


def _require_end(file: io.BufferedIOBase, end: int, path: Path) -> None:
    """A tar ends with zeros; tarfile takes a cut or a damaged header for the end, too."""
    size = file.seek(0, os.SEEK_END)
    file.seek(end)
    tail = file.read(_MAX_TAIL_BYTES + 1)
    if len(tail) < 2 * tarfile.BLOCKSIZE or len(tail) > _MAX_TAIL_BYTES or any(tail):
        got = f"{size} B that end otherwise"
        raise FileFormatError(
            f"{path}", expected="a whole tar, zeros at its end", got=got, todo=_TODO_DAMAGED
        )


# --- many shards ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardIndex:
    """What ``index.json`` holds.

    Attributes:
        settings: How pairs are made; another value of any of them would make other pairs.
        num_pairs: Pairs wanted; fewer are there while the work is not finished.
        shards: The shards that are whole, by name.
    """

    settings: dict[str, Any]
    num_pairs: int
    shards: tuple[Shard, ...] = ()

    @property
    def num_made(self) -> int:
        """Pairs that are there."""
        return sum(shard.num_pairs for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Write ``index.json`` atomically."""
        write_text(folder / INDEX_NAME, json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "ShardIndex":
        """Read ``index.json``.

        Raises:
            FileFormatError: it is not there, damaged or foreign.
        """
        path = folder / INDEX_NAME
        try:
            with path.open("rb") as file:
                values = json.loads(file.read(_MAX_INDEX_BYTES))
            if values["format"] != _FORMAT:
                raise ValueError(f"format {values['format']!r}")
            shards = tuple(_checked_shard(entry) for entry in values["shards"])
            if not isinstance(values["settings"], dict) or type(values["num_pairs"]) is not int:
                raise TypeError("settings or num_pairs")
        except FileNotFoundError as error:
            raise FileFormatError(f"no {INDEX_NAME} in {folder}", todo="check the path") from error
        except Exception as error:  # not JSON, a missing field, another type
            got = f"{type(error).__name__}: {error}"
            raise FileFormatError(f"cannot read {path}", expected=f"JSON of {_FORMAT!r}", got=got) from error
        return cls(values["settings"], values["num_pairs"], shards)


def _checked_shard(entry: dict[str, Any]) -> Shard:
    shard = Shard(**entry)
    numbers = (shard.num_pairs, shard.bytes)
    if not all(type(number) is int and number > 0 for number in numbers):
        raise TypeError(f"{entry}")
    # a name with a path in it would lead out of the folder
    if not (_SHARD_NAME.fullmatch(shard.name) and _HASH.fullmatch(shard.sha256)):
        raise ValueError(f"{entry}")
    return shard


def shard_damage(folder: Path, shard: Shard, *, verify: bool = True) -> str:
    """Say what is wrong with a shard, nothing if it is whole; without ``verify`` only its size is compared."""
    path = folder / shard.name
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != shard.bytes:
        return f"has {size} B instead of {shard.bytes}"
    if verify and _sha256(path) != shard.sha256:
        return "has another hash"
    return ""


def damaged_shards(folder: str | Path) -> dict[str, str]:
    """Compare every shard of a folder with its hash; return what is wrong by name, nothing if all are whole.

    Raises:
        FileFormatError: the folder has no index.
    """
    folder = Path(folder)
    damage = {shard.name: shard_damage(folder, shard) for shard in ShardIndex.load(folder).shards}
    return {name: what for name, what in damage.items() if what}


class ShardReader:
    """The pairs of a folder of shards, or of one shard, by number and in order.

    A `torch.utils.data` map-style dataset, too: it can be sent to worker processes, and holds no open file.

    Args:
        source: Folder with ``index.json``, or a single ``.tar``.

    Raises:
        FileFormatError: no such folder or shard, or it is foreign; on reading: a shard or pair is damaged.
    """

    def __init__(self, source: str | Path) -> None:
        source = Path(source)
        self.index = ShardIndex.load(source) if source.is_dir() else None
        self._folder = source if source.is_dir() else source.parent
        self._names = [source.name] if self.index is None else [shard.name for shard in self.index.shards]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, position: int) -> Pair:
        return self.record(position).pair

    def __iter__(self) -> Iterator[Pair]:
        return (self[position] for position in range(len(self)))

    def record(self, position: int) -> PairRecord:
        """A pair together with where it came from."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"pair {position} of {len(self)}")
        position %= len(self)
        number = bisect_right(self._ends, position)
        first = self._ends[number - 1] if number else 0
        path, places = self._folder / self._names[number], self._places(number)
        index, parts = places[position - first]
        with path.open("rb") as file:
            data = {part: _read_at(file, place) for part, place in parts.items()}
        name = f"pair {index} of {path}"
        record = decode_pair(data, name)
        if record.index != index:
            raise FileFormatError(f"cannot read {name}", expected="its own number", got=str(record.index))
        return record

    @cached_property
    def _ends(self) -> list[int]:
        """Number of pairs up to the end of each shard."""
        if self.index is None:
            return [len(self._places(0))]
        return list(accumulate(shard.num_pairs for shard in self.index.shards))

    def _places(self, number: int) -> _Places:
        """List a shard's pairs, which the index must agree with."""
        path = self._folder / self._names[number]
        if self.index is None:
            return _listed(path)
        shard = self.index.shards[number]
        if damage := shard_damage(self._folder, shard, verify=False):
            raise FileFormatError(f"{path} {damage}", todo=_TODO_DAMAGED)
        places = _listed(path)
        if len(places) != shard.num_pairs:
            expected, got = f"{shard.num_pairs} pairs", str(len(places))
            raise FileFormatError(f"{path}", expected=expected, got=got, todo=_TODO_DAMAGED)
        return places


def _listed(path: Path) -> _Places:
    """List a shard's pairs once, and again when the file has changed."""
    state = path.stat() if path.exists() else None
    return _list_once(path, (state.st_size, state.st_mtime_ns, state.st_ino) if state else None)


@lru_cache(maxsize=64)
def _list_once(path: Path, state: tuple[int, int, int] | None) -> _Places:
    del state  # part of the key only
    return _list_pairs(path)


def _read_at(file: io.BufferedIOBase, place: _Place) -> bytes:
    file.seek(place.offset)
    return file.read(place.size)
