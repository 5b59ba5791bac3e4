"""The dense matcher at the official sizes, random weights: local correlation, sampling, and the whole network.

The whole network against the yardstick takes minutes and 8 GB, so it is marked slow: `make bench ARGS="-m slow"`. Each
variant runs alone in a process of its own, which is how its peak of memory is known.
"""

import multiprocessing
import os
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from l2m_viz.encoders.winograd import transform_filters, winograd_conv
from l2m_viz.geometry import HW, normalized_grid
from l2m_viz.matching import Match
from l2m_viz.matching.dense import DenseMatcher
from l2m_viz.matching.depthwise import convolve
from l2m_viz.matching.local_correlation import local_correlation
from l2m_viz.matching.matcher import fastest_precision
from l2m_viz.matching.network import DenseNetwork, official_cfg
from l2m_viz.matching.propagation import PropagationCfg, _propagate_in_torch, propagate
from l2m_viz.matching.weights import official_key

from .yardstick_matcher import Yardstick, naive_local_correlation

RESOLUTION, UPSAMPLE_RESOLUTION = (560, 560), (864, 864)
_seconds: dict[str, float] = {}


def _correlation_inputs():
    generator = torch.Generator().manual_seed(0)
    hw = (70, 70)  # 1/8 of 560
    a, b = (torch.randn(1, 512, *hw, generator=generator) for _ in range(2))
    warp = normalized_grid(hw).permute(2, 0, 1)[None] + 0.03 * torch.randn(1, 2, *hw, generator=generator)
    return [
        a.contiguous(memory_format=torch.channels_last),
        b.contiguous(memory_format=torch.channels_last),
        warp,
    ]


@pytest.mark.parametrize("form", ["naive", "ours"])
def bench_local_correlation(benchmark, in_units, capsys, form):
    """Radius 3, 512 channels, against sampling every channel at every place."""
    a, b, warp = _correlation_inputs()
    if form == "naive":
        a, b = a.contiguous(), b.contiguous()
        in_units("local correlation, naive", lambda: naive_local_correlation(a, b, warp, 3))
    else:
        moved, flops = 4 * (2 * a.numel() + warp.numel() * 25), 2 * 64 * a.numel()
        in_units("local correlation", lambda: local_correlation(a, b, warp, 3), moved=moved, flops=flops)
    ours, naive = (
        local_correlation(a, b, warp, 3),
        naive_local_correlation(a.contiguous(), b.contiguous(), warp, 3),
    )
    assert (ours - naive.view_as(ours)).abs().max() < 1e-4
    _seconds[form] = benchmark.stats.stats.median
    if "naive" in _seconds and form == "ours":
        ratio = _seconds["naive"] / _seconds["ours"]
        benchmark.extra_info["ratio"] = ratio
        with capsys.disabled():
            print(f"\n{ratio:.0f} times as fast as sampling; aim: ten", end="")


@pytest.mark.parametrize("form", ["torch", "numba"])
def bench_propagation(benchmark, in_units, form):
    """Both directions at l2m-tiny's stride 2 of 512x704 px: a near square before something far, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    hw = (256, 352)
    a, b = (
        torch.nn.functional.normalize(torch.randn(2, 16, *hw, generator=generator), dim=1) for _ in range(2)
    )
    warp = normalized_grid(hw).permute(2, 0, 1).expand(2, 2, *hw) + 5e-4 * torch.randn(
        2, 2, *hw, generator=generator
    )
    warp[:, 0, 64:192, 88:264] += 0.1
    logit = torch.zeros_like(warp[:, :1])  # every cell asks
    if form == "torch":
        in_units(
            "propagation in torch",
            lambda: _propagate_in_torch(a, b, warp, logit[:, 0] == 0, PropagationCfg()),
        )
    else:
        moved = 4 * (a.numel() + b.numel() + 2 * warp.numel())
        in_units("propagation", lambda: propagate(a, b, warp, logit), moved=moved, flops=0)
    _seconds[f"propagation in {form}"] = benchmark.stats.stats.median
    if "propagation in torch" in _seconds and form == "numba":
        benchmark.extra_info["ratio"] = _seconds["propagation in torch"] / _seconds["propagation in numba"]


@pytest.mark.parametrize("form", ["torch", "ours"])
def bench_wide_convolution(benchmark, in_units, form):
    """A 3x3 layer of VGG19's last level at 864x864 with its ReLU: by Winograd's filters, made anew each time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 512, 108, 120, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(512, 512, 3, 3, generator=generator) / 68, torch.zeros(512)
    weight = weight.contiguous(memory_format=torch.channels_last)
    direct = 2 * 9 * 512 * x.numel()
    with torch.no_grad():
        if form == "torch":
            in_units(
                "3x3 layer, torch", lambda: torch.conv2d(x, weight, bias, padding=1).relu_(), flops=direct
            )
        else:  # 36 products for 16 results instead of 9 for each
            work = lambda: winograd_conv(x, transform_filters(weight), bias, relu=True)  # noqa: E731
            in_units("3x3 layer", work, flops=direct / 4)
    _ratio(benchmark, "3x3 layer", form)


@pytest.mark.parametrize("form", ["torch", "ours"])
@pytest.mark.parametrize("width", [40, 569])
def bench_depthwise(benchmark, in_units, form, width):
    """A refiner's depth-wise 5x5 layer with its ReLU: l2m-tiny's finest one, and the official one at stride 4."""
    generator = torch.Generator().manual_seed(0)
    hw = (256, 352) if width == 40 else (64, 216)
    x, weight = (
        torch.randn(1, *hw, width, generator=generator),
        torch.randn(width, 1, 5, 5, generator=generator),
    )
    bias, out = torch.zeros(width), torch.empty_like(x)
    cost = {"moved": 2 * x.nbytes, "flops": 50 * x.numel()}
    with torch.no_grad():
        if form == "torch":
            channels_first = x.permute(0, 3, 1, 2)
            work = lambda: torch.conv2d(channels_first, weight, bias, padding=2, groups=width).relu_()  # noqa: E731
            in_units(f"depth-wise layer, {width} channels, torch", work, **cost)
        else:
            work = lambda: convolve(x, 0, weight, bias, out, relu=True)  # noqa: E731
            in_units(f"depth-wise layer, {width} channels", work, **cost)
    _ratio(benchmark, f"depth-wise {width}", form)


def _ratio(benchmark, name: str, form: str) -> None:
    """Note how much quicker ours is, once torch's has been measured."""
    _seconds[f"{name} {form}"] = benchmark.stats.stats.median
    if form == "ours" and f"{name} torch" in _seconds:
        benchmark.extra_info["ratio"] = _seconds[f"{name} torch"] / _seconds[f"{name} ours"]


def bench_balanced_sampling(in_units):
    """10,000 matches from both directions of a match at 864x864: at most 40 units."""
    generator = torch.Generator().manual_seed(0)
    warp = normalized_grid(UPSAMPLE_RESOLUTION) * 0.9 + 0.02 * torch.randn(864, 864, 2, generator=generator)
    certainty = torch.rand(864, 864, generator=generator)
    match = Match(warp, certainty, warp, certainty, (864, 864), (864, 864))

    def sample():
        match.__dict__.pop("_weights", None)  # the first call finds what may be drawn, and keeps it
        return match.sample(10_000, generator)

    in_units("sample 10,000 of 864x864, both ways (aim: 40)", sample)


def _unit() -> float:
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    torch.mm(a, b)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _images() -> tuple[torch.Tensor, torch.Tensor]:
    from l2m_viz.data import load_sample

    sample = load_sample("motorcycle")
    assert sample.image_B is not None
    return sample.image_A, sample.image_B


def _network() -> DenseNetwork:
    """Random weights whose batch norms have seen one small pair, so that no map is all zeros or all alike."""
    torch.manual_seed(0)
    network = DenseNetwork(official_cfg())
    torch.nn.init.normal_(network.encoder.vit.pos_embed, std=0.2)  # tokens that know where they are
    norms = [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    small = [torch.nn.functional.interpolate(x.permute(2, 0, 1)[None], (112, 168)) for x in _images()]
    with torch.no_grad():
        network.train()(*small)
    return network.eval()


def _run(variant: str, resolution: HW, upsample: HW, out: str) -> None:
    """Match one pair, and leave time, unit, peak memory and the result in a file."""
    precision = "bfloat16" if variant == "bfloat16" else "float32"
    cfg = DenseMatcher.Cfg(resolution, upsample, precision=precision)
    matcher = DenseMatcher("official", _network(), cfg, "cpu")
    match = _match_by_yardstick(matcher) if variant == "yardstick" else lambda: _match(matcher)
    before = _unit()
    cpu, start = time.process_time(), time.perf_counter()
    with torch.no_grad():
        warp, certainty = match()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    unit = (before + _unit()) / 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    numbers = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "unit": unit,
        "peak": peak,
        "load": os.getloadavg()[0],
    }
    np.savez(out, warp=warp, certainty=certainty, **numbers)


def _match(matcher: DenseMatcher) -> tuple[torch.Tensor, torch.Tensor]:
    match = matcher.match(*_images())
    warps = torch.stack([match.warp_A_to_B, match.warp_B_to_A])
    return warps, torch.stack([match.certainty_A_to_B, match.certainty_B_to_A])


def _match_by_yardstick(matcher: DenseMatcher):
    """The yardstick with the matcher's weights, on images that the matcher prepared."""
    upsample = matcher.cfg.upsample_resolution or matcher.cfg.resolution
    sizes = (matcher.cfg.resolution, upsample)
    batches = [torch.cat(matcher._batch([_images()], size)).contiguous() for size in sizes]
    yardstick = Yardstick().eval()
    weights = {official_key(name): value.contiguous() for name, value in matcher.network.state_dict().items()}
    yardstick.load_state_dict(weights, assign=True)

    def match() -> tuple[torch.Tensor, torch.Tensor]:
        warp, certainty = yardstick(*batches)
        return warp.permute(0, 2, 3, 1), certainty[:, 0]

    return match


def _measure(variant: str, folder: Path, resolution=RESOLUTION, upsample=UPSAMPLE_RESOLUTION) -> dict:
    out = folder / f"{variant}.npz"
    process = multiprocessing.get_context("spawn").Process(
        target=_run, args=(variant, resolution, upsample, str(out))
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    with np.load(out) as result:
        return dict(result)


def _agreement(ours: dict, theirs: dict, tolerance: float) -> float:
    """Share of the pixels whose warp and certainty agree."""
    warp = np.abs(ours["warp"] - theirs["warp"]).max(axis=-1) < tolerance
    return float((warp & (np.abs(ours["certainty"] - theirs["certainty"]) < tolerance)).mean())


def bench_small_network_equals_the_yardstick(benchmark, tmp_path):
    """The same weights at a rectangular size, quickly: 99.9 % of the pixels within 1e-3."""
    sizes = ((112, 168), (160, 224))
    yardstick = _measure("yardstick", tmp_path, *sizes)
    ours = benchmark.pedantic(lambda: _measure("float32", tmp_path, *sizes), rounds=1)
    assert _agreement(ours, yardstick, 1e-3) >= 0.999


@pytest.mark.slow
def bench_whole_network(benchmark, tmp_path, capsys):
    """560 then 864, one pair, both ways, against the yardstick; bfloat16 only where the processor multiplies it.

    How fast is told beside what was aimed at; what fails is a result that is not the yardstick's.
    """
    quick = fastest_precision(torch.device("cpu")) == "bfloat16"
    # The yardstick first: a virtual machine gets its memory from the host when it is first touched, which takes time.
    variants = ("yardstick", "float32", "bfloat16") if quick else ("yardstick", "float32")
    results = {variant: _measure(variant, tmp_path) for variant in variants}
    benchmark.pedantic(lambda: None, rounds=1)  # timed inside, each variant in its process
    yardstick = results["yardstick"]
    for variant, result in results.items():
        numbers = {
            "seconds": result["seconds"],
            "units": result["seconds"] / result["unit"],
            "peak_gb": result["peak"] / 1e9,
            "times as fast": yardstick["seconds"] / result["seconds"],
            "agreement": _agreement(result, yardstick, 1e-3),
        }
        benchmark.extra_info[variant] = numbers
        with capsys.disabled():
            told = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            print(
                f"\n{variant}: {told} (unit {result['unit'] * 1e3:.1f} ms, load {result['load']:.1f}){_AIMS[variant]}",
                end="",
            )
    assert _agreement(results["float32"], yardstick, 1e-3) >= 0.999


_AIMS = {
    "yardstick": "",
    "float32": "; aim: twice as fast, 4,150 units, 3.75 GB",
    "bfloat16": "; aim: five times as fast",
}


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["float32", "bfloat16", "compiled"])
@pytest.mark.parametrize("batch", [1, 8])
def bench_whole_network_on_a_gpu(benchmark, capsys, variant, batch):
    """560 then 864, both ways, images in and `Match` out; "compiled" is bfloat16 under `torch.compile`."""
    precision = "float32" if variant == "float32" else "bfloat16"
    cfg = DenseMatcher.Cfg(RESOLUTION, UPSAMPLE_RESOLUTION, precision=precision, batch_size=batch)
    matcher = DenseMatcher("official", _network(), cfg, "cuda")
    pairs = [tuple(image.cuda() for image in _images())] * batch
    if variant == "compiled":
        for name in ("forward", "upsample"):
            setattr(matcher.network, name, torch.compile(getattr(matcher.network, name)))
    run_network, match = (
        (lambda: _on_gpu(matcher, pairs)),
        (lambda: matcher.match(*map(list, zip(*pairs, strict=True)))),
    )
    for _ in range(3):
        run_network()
    torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(match, rounds=5)
    peak, seconds = torch.cuda.max_memory_allocated() / 1e9, []
    for _ in range(10):
        start = time.perf_counter()
        run_network()
        seconds.append(time.perf_counter() - start)
    network, whole = (t / batch * 1e3 for t in (statistics.median(seconds), benchmark.stats.stats.median))
    benchmark.extra_info |= {"network_ms": network, "whole_ms": whole, "peak_gb": peak}
    with capsys.disabled():
        print(
            f"\n{variant}, batches of {batch}: {network:.1f} ms a pair, {whole:.1f} ms with `Match` on the CPU, "
            f"peak {peak:.2f} GB",
            end="",
        )


def _on_gpu(matcher: DenseMatcher, pairs: list) -> None:
    with torch.no_grad():
        matcher._run(pairs)
    torch.cuda.synchronize()
