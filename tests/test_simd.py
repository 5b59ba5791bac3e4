"""The vector instructions against numpy."""

import numba
import numpy as np
import pytest

from l2m_viz import _simd


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=17).astype(np.float32)


def test_exponential_and_logarithm_are_accurate_over_their_whole_range():
    @numba.njit
    def tables(x, power, logarithm):
        for i in range(0, len(x), 8):
            _simd.store(power, np.uint64(i), _simd.exp2(_simd.load(x, np.uint64(i))))
            _simd.store(logarithm, np.uint64(i), _simd.log2(_simd.load(power, np.uint64(i))))

    x = np.linspace(-120, 120, 8000, dtype=np.float32)
    power, logarithm = np.empty_like(x), np.empty_like(x)
    tables(x, power, logarithm)
    np.testing.assert_allclose(power, np.exp2(x.astype(np.float64)), rtol=5e-7)
    np.testing.assert_allclose(logarithm, np.log2(power.astype(np.float64)), rtol=3e-7, atol=3e-7)


def test_arithmetic_takes_vectors_and_numbers(values):
    @numba.njit
    def work(x, number, out, sums):
        a, b = _simd.load(x, np.uint64(1)), _simd.load(x, np.uint64(9))
        _simd.store(out, np.uint64(0), (a + number) * b - number / b + _simd.ramp())
        sums[0] = _simd.total(a)
        return _simd.greater(a, b)

    out, sums = np.zeros(8, np.float32), np.zeros(1, np.float32)
    a, b = values[1:9].astype(np.float64), values[9:17].astype(np.float64)
    bits = work(values, np.float32(1.5), out, sums)
    np.testing.assert_allclose(out, (a + 1.5) * b - 1.5 / b + np.arange(8), rtol=1e-5)
    assert sums[0] == pytest.approx(a.sum(), rel=1e-5)
    assert bits == sum(1 << lane for lane in range(8) if a[lane] > b[lane])


def test_choices_and_roots(values):
    @numba.njit
    def work(x, out):
        a, b = _simd.load(x, np.uint64(0)), _simd.load(x, np.uint64(8))
        _simd.store(out, np.uint64(0), _simd.minimum(a, b))
        _simd.store(out, np.uint64(8), _simd.maximum(a, b))
        _simd.store(out, np.uint64(16), _simd.where_greater(a, b, _simd.sqrt(a * a), _simd.floor(b)))
        _simd.store(out, np.uint64(24), _simd.negative_magnitude(a))

    out, (a, b) = np.zeros(32, np.float32), (values[:8], values[8:16])
    work(values, out)
    expected = [np.minimum(a, b), np.maximum(a, b), np.where(a > b, np.abs(a), np.floor(b)), -np.abs(a)]
    np.testing.assert_allclose(out, np.concatenate(expected), rtol=1e-6)


def test_places_of_bits():
    @numba.njit
    def places(bits):
        return _simd.lowest_bit(bits), _simd.highest_bit(bits)

    assert places(np.int64(0b0101000)) == (3, 5)
    assert places(np.int64(0)) == (64, -1)


@pytest.mark.parametrize("rows", [1, 3, 8, 21])
def test_columns_of_any_number_of_rows(rows):
    @numba.njit
    def work(source, target, whole):
        last = np.uint64(len(source) - 1)
        for i in range(0, len(source), 8):
            column = _simd.load_column(source, np.uint64(i), last, np.uint64(1))
            _simd.store_column(target, np.uint64(i), last, np.uint64(2), column + np.float32(1))
            _simd.store_column(whole, np.uint64(i), last, np.uint64(0), _simd.floor(column * np.float32(100)))

    source = np.random.default_rng(1).normal(size=(rows, 3)).astype(np.float32)
    target, whole = np.zeros((rows, 4), np.float32), np.zeros((rows, 2), np.int16)
    work(source, target, whole)
    np.testing.assert_allclose(target[:, 2], source[:, 1] + 1, rtol=1e-6)
    np.testing.assert_array_equal(whole[:, 0], np.floor(source[:, 1] * np.float32(100)))
    assert not target[:, [0, 1, 3]].any() and not whole[:, 1].any()
