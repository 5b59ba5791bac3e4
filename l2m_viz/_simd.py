"""Eight float32 lanes as one numba value: what LLVM's vectoriser would make of a row of pixels, if only it always did.

LLVM gives up, silently, on loops that read and write several planes of one buffer; the kernel then runs several times
slower. Here eight neighbouring pixels (or Gaussians) are one value, `f32x8`, and its arithmetic becomes vector
instructions on any processor: one AVX register, two of SSE or NEON. Nothing is compiled at install, the instructions
are emitted through numba's extension interface. A float32 beside an `f32x8` stands for eight equal lanes. Arrays are
contiguous, one-dimensional and float32 unless said otherwise; indices are uint64, and nothing checks bounds.
"""

import operator

import numba.core.types as nb
from llvmlite import ir
from numba.core import cgutils
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 8
_BYTE, _SHORT, _INT, _LONG, _FLOAT = (
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.FloatType(),
)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_FLAGS = (
    "contract",
    "nsz",
    "arcp",
)  # fused multiply-add and reciprocals; NaN and infinity keep their meaning


class _Lanes(nb.Type):
    """Type of eight float32 values."""

    def __init__(self):
        super().__init__(name="f32x8")


f32x8 = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _VECTOR)


def _each(values):
    return ir.Constant(_VECTOR, [float(value) for value in values])


def _all(value):
    return _each([value] * LANES)


def _all_int(value):
    return ir.Constant(_INTS, [value] * LANES)


def _broadcast(builder, scalar):
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(undefined, scalar, ir.Constant(_INT, 0)), undefined, _all_int(0)
    )


def _call(builder, name, *args):
    """Call one of LLVM's own functions of vectors."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v8f32"), args)


def _add(builder, a, b):
    return builder.fadd(a, b, flags=_FLAGS)


def _multiply(builder, a, b):
    return builder.fmul(a, b, flags=_FLAGS)


def _define_operator(symbol, instruction):
    pairs = ((f32x8, f32x8), (f32x8, nb.float32), (nb.float32, f32x8))

    @infer_global(symbol)  # pyright: ignore[reportOptionalCall]
    class _Typing(ConcreteTemplate):
        cases = [signature(f32x8, a, b) for a, b in pairs]  # noqa: RUF012 (numba's name)

    def lower(context, builder, sig, args):
        a, b = (
            value if kind is f32x8 else _broadcast(builder, value)
            for kind, value in zip(sig.args, args, strict=True)
        )
        return getattr(builder, instruction)(a, b, flags=_FLAGS)

    for a, b in pairs:
        lower_builtin(symbol, a, b)(lower)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_symbol, _instruction)


@intrinsic
def splat(typingctx, value):
    """The same float32 in all lanes."""

    def codegen(context, builder, sig, args):
        return _broadcast(builder, args[0])

    return f32x8(nb.float32), codegen


@intrinsic
def ramp(typingctx):
    """0, 1, ..., 7."""

    def codegen(context, builder, sig, args):
        return _each(range(LANES))

    return f32x8(), codegen


def _element(context, builder, kind, array, index):
    """Pointer to an element."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


@intrinsic
def load(typingctx, array, index):
    """Eight neighbours from ``index`` on."""

    def codegen(context, builder, sig, args):
        pointer = _element(context, builder, sig.args[0], args[0], args[1])
        return builder.load(builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)

    return f32x8(array, nb.uint64), codegen


@intrinsic
def load_at(typingctx, array, x, y, width, last):
    """Eight elements, array[width * floor(y) + floor(x)], of positions >= 0; nothing beyond ``last`` is read."""

    def codegen(context, builder, sig, args):
        x, y = (builder.fptosi(value, _INTS) for value in args[1:3])
        width, last = (_broadcast(builder, builder.trunc(value, _INT)) for value in args[3:5])
        place = builder.add(builder.mul(y, width), x)
        inside = builder.icmp_unsigned("<", place, last)  # negative ones are large
        place = builder.select(inside, place, last)
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        # llvmlite's `gep` takes no vector of indices: addresses are added up as numbers.
        long = ir.VectorType(_LONG, LANES)
        bytes_ = builder.shl(builder.zext(place, long), ir.Constant(long, [2] * LANES))
        start = _broadcast(builder, builder.ptrtoint(data, _LONG))
        addresses = builder.inttoptr(builder.add(start, bytes_), ir.VectorType(data.type, LANES))
        mask = ir.VectorType(ir.IntType(1), LANES)
        kind = ir.FunctionType(_VECTOR, [addresses.type, _INT, mask, _VECTOR])
        gather = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.gather.v8f32.v8p0")
        every, nothing = ir.Constant(mask, [1] * LANES), ir.Constant(_VECTOR, ir.Undefined)
        return builder.call(gather, [addresses, ir.Constant(_INT, 4), every, nothing])

    return f32x8(array, f32x8, f32x8, nb.int64, nb.int64), codegen


@intrinsic
def store(typingctx, array, index, value):
    """Write eight neighbours from ``index`` on."""

    def codegen(context, builder, sig, args):
        pointer = _element(context, builder, sig.args[0], args[0], args[1])
        builder.store(args[2], builder.bitcast(pointer, _VECTOR.as_pointer()), align=4)
        return context.get_dummy_value()

    return nb.void(array, nb.uint64, f32x8), codegen


def _rows(builder, first, last):
    """first, first + 1, ..., first + 7, none beyond ``last``."""
    rows = [builder.add(first, ir.Constant(_LONG, lane)) for lane in range(LANES)]
    return [builder.select(builder.icmp_unsigned("<", row, last), row, last) for row in rows]


@intrinsic
def load_column(typingctx, array, first, last, column):
    """One column of eight rows, from ``first`` on, of a two-dimensional array; ``last`` stands for those beyond it.

    The array is of float32 or of bool (0 and 1).
    """

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0])
        width = cgutils.unpack_tuple(builder, data.shape)[1]
        vector = ir.Constant(_VECTOR, ir.Undefined)
        for lane, row in enumerate(_rows(builder, args[1], args[2])):
            value = builder.load(builder.gep(data.data, [builder.add(builder.mul(row, width), args[3])]))
            if sig.args[0].dtype == nb.boolean:
                value = builder.uitofp(value, _FLOAT)
            vector = builder.insert_element(vector, value, ir.Constant(_INT, lane))
        return vector

    return f32x8(array, nb.uint64, nb.uint64, nb.uint64), codegen


@intrinsic
def store_column(typingctx, array, first, last, column, value):
    """Write one column of eight rows; the array is of float32 or int16 (rounded towards zero)."""

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0])
        width = cgutils.unpack_tuple(builder, data.shape)[1]
        vector = args[4]
        if sig.args[0].dtype == nb.int16:
            vector = builder.trunc(builder.fptosi(vector, _INTS), ir.VectorType(_SHORT, LANES))
        # From the last lane to the first: where several stand for one row, the row's own comes last.
        for lane, row in reversed(list(enumerate(_rows(builder, args[1], args[2])))):
            place = builder.add(builder.mul(row, width), args[3])
            value = builder.extract_element(vector, ir.Constant(_INT, lane))
            builder.store(value, builder.gep(data.data, [place]))
        return context.get_dummy_value()

    return nb.void(array, nb.uint64, nb.uint64, nb.uint64, f32x8), codegen


@intrinsic
def where_greater(typingctx, a, b, yes, no):
    """Lanes of ``yes`` where a > b, of ``no`` elsewhere."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[2], args[3])

    return f32x8(f32x8, f32x8, f32x8, f32x8), codegen


@intrinsic
def minimum(typingctx, a, b):
    """The smaller one; b where one is NaN."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", *args), *args)

    return f32x8(f32x8, f32x8), codegen


@intrinsic
def maximum(typingctx, a, b):
    """The larger one; b where one is NaN."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return f32x8(f32x8, f32x8), codegen


@intrinsic
def negative_magnitude(typingctx, a):
    """-|a|."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.or_(builder.bitcast(args[0], _INTS), _all_int(-(2**31))), _VECTOR)

    return f32x8(f32x8), codegen


@intrinsic
def floor(typingctx, a):
    """Largest whole number not above."""

    def codegen(context, builder, sig, args):
        return _call(builder, "floor", args[0])

    return f32x8(f32x8), codegen


@intrinsic
def sqrt(typingctx, a):
    """Square root."""

    def codegen(context, builder, sig, args):
        return _call(builder, "sqrt", args[0])

    return f32x8(f32x8), codegen


# Polynomial through 2^f at the Chebyshev nodes of [-1/2, 1/2], highest power first: 1e-7 relative.
_EXP2 = (1.3390863364e-3, 9.6760319183e-3, 5.5503571142e-2, 2.4022107485e-1, 6.9314718803e-1, 1.0000000755)


@intrinsic
def exp2(typingctx, a):
    """2^a for -126 <= a <= 126, to 3e-7 relative."""

    def codegen(context, builder, sig, args):
        whole = _call(builder, "rint", args[0])
        rest = builder.fsub(args[0], whole)
        value = _all(_EXP2[0])
        for coefficient in _EXP2[1:]:
            value = _add(builder, _multiply(builder, value, rest), _all(coefficient))
        exponent = builder.shl(builder.fptosi(whole, _INTS), _all_int(23))
        return builder.bitcast(builder.add(builder.bitcast(value, _INTS), exponent), _VECTOR)

    return f32x8(f32x8), codegen


@intrinsic
def log2(typingctx, a):
    """Logarithm of normal positive numbers: the exponent, plus the series of artanh for a mantissa about 1."""

    def codegen(context, builder, sig, args):
        bits = builder.bitcast(args[0], _INTS)
        exponent = builder.ashr(builder.sub(bits, _all_int(0x3F3504F3)), _all_int(23))  # from sqrt(1/2) on
        mantissa = builder.bitcast(builder.sub(bits, builder.shl(exponent, _all_int(23))), _VECTOR)
        s = builder.fdiv(builder.fsub(mantissa, _all(1)), _add(builder, mantissa, _all(1)))
        ss = _multiply(builder, s, s)
        series = _all(1 / 9)
        for denominator in (7, 5, 3, 1):
            series = _add(builder, _multiply(builder, series, ss), _all(1 / denominator))
        fraction = _multiply(builder, _multiply(builder, series, s), _all(2 / 0.6931471805599453))
        return _add(builder, fraction, builder.sitofp(exponent, _VECTOR))

    return f32x8(f32x8), codegen


@intrinsic
def greater(typingctx, a, b):
    """Bits of the lanes in which a > b, lane 0 in bit 0."""

    def codegen(context, builder, sig, args):
        return builder.zext(builder.bitcast(builder.fcmp_ordered(">", *args), _BYTE), _LONG)

    return nb.int64(f32x8, f32x8), codegen


@intrinsic
def lowest_bit(typingctx, bits):
    """Place of the lowest bit set; 64 if there is none."""

    def codegen(context, builder, sig, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return nb.int64(nb.int64), codegen


@intrinsic
def highest_bit(typingctx, bits):
    """Place of the highest bit set; -1 if there is none."""

    def codegen(context, builder, sig, args):
        return builder.sub(ir.Constant(_LONG, 63), builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0)))

    return nb.int64(nb.int64), codegen


@intrinsic
def total(typingctx, a):
    """Sum of the lanes, by halves."""

    def codegen(context, builder, sig, args):
        value, half = args[0], LANES
        while half > 1:
            half //= 2
            turned = ir.Constant(_INTS, [(lane + half) % LANES for lane in range(LANES)])
            value = _add(builder, value, builder.shuffle_vector(value, value, turned))
        return builder.extract_element(value, ir.Constant(_INT, 0))

    return nb.float32(f32x8), codegen


@intrinsic
def next_of(typingctx, counter):
    """The int64 in counter[0], which is one more for whoever asks next: each thread gets numbers of its own."""

    def codegen(context, builder, sig, args):
        place = _element(context, builder, sig.args[0], args[0], ir.Constant(_LONG, 0))
        return builder.atomic_rmw("add", place, ir.Constant(_LONG, 1), "monotonic")

    return nb.int64(counter), codegen


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of an element that will be read soon; of an array of any type."""

    def codegen(context, builder, sig, args):
        pointer = builder.bitcast(
            _element(context, builder, sig.args[0], args[0], args[1]), _BYTE.as_pointer()
        )
        kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT, _INT, _INT])
        read, keep, data = (ir.Constant(_INT, value) for value in (0, 3, 1))
        builder.call(
            cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8"),
            [pointer, read, keep, data],
        )
        return context.get_dummy_value()

    return nb.void(array, nb.uint64), codegen
