"""Say what a compiled program wastes."""

from collections.abc import Iterable

from compat_jax.hlo.chips import Chip
from compat_jax.hlo.kernels import Collective, Kernel, Kind, Program
from compat_jax.hlo.roofline import alone, bound, duration, links, seconds_of

# Seconds: a kernel of less work takes as long to launch as to run.
SMALL = 1e-6
# Bytes: gradients are larger; statistics of BatchNorm and sums of a loss are smaller.
LARGE = 1 << 20
_MOVING: dict[Kind, str] = {
    "transpose": "only reorder an array",
    "convert": "only change a type",
    "copy": "only copy, pad or cut",
}


def findings(program: Program, chip: Chip, *, low_precision: bool) -> list[str]:
    """Judge one step of a program as an engineer would.

    Args:
      program: see `kernels.read`.
      chip: with known rates.
      low_precision: whether bfloat16 was asked for.

    Returns:
      Lines; the first says where the time goes, kernels one by one.
    """
    lines = [_shares(program, chip)]
    if low_precision:
        lines += _wide_products(program)
    for kind in _MOVING:
        lines += _moving(program, chip, kind)
    lines += _repeated(program, chip)
    lines += _collectives(program, chip)
    lines += _host(program, chip)
    lines += _small(program, chip)
    return lines


def _shares(program, chip):
    total = bound(program, chip).kernels
    names = ("products", "elementwise work and reductions", "moving numbers", "collectives")
    parts = dict.fromkeys((*names, "prefetching beside them"), 0.0)
    for kernel in program.kernels:
        name = names[1]
        if kernel.flops:
            name = names[0]
        elif kernel.kind in _MOVING:
            name = names[2]
        elif kernel.kind == "collective":
            name = names[3]
        elif kernel.kind == "prefetch":
            name = "prefetching beside them"
        parts[name] += kernel.times * seconds_of(kernel, chip)
    shares = [f"{_percent(seconds, total)} {name}" for name, seconds in parts.items() if seconds]
    return f"one by one: {', '.join(shares)}"


def _wide_products(program):
    products = [k for k in program.kernels if k.flops]
    wide = [k for k in products if any(kind.startswith("f32") for kind in k.flops)]
    if not wide:
        return []
    flops = [k.times * sum(k.flops.values()) for k in wide]
    largest = wide[flops.index(max(flops))]
    share = _percent(sum(flops), sum(program.flops.values()))
    return [
        f"products of float32 where bfloat16 was asked for: {_count(wide)} of {_count(products)}, "
        f"{share} of the FLOP, {_name(largest)} the largest"
    ]


def _moving(program, chip, kind):
    kernels = [k for k in program.kernels if k.kind == kind and k.size]
    if not kernels:
        return []
    beside = _count(k for k in kernels if k.feeds)
    return [
        f"kernels that {_MOVING[kind]}: {_sizes(kernels, program, chip)}; {beside} feed a product"
    ]


def _repeated(program, chip):
    kernels = [k for k in program.kernels if k.repeats and k.kind != "prefetch"]
    if not kernels:
        return []
    return [f"kernels that compute the same in every step: {_sizes(kernels, program, chip)}"]


def _sizes(kernels, program, chip):
    size = sum(k.times * k.size for k in kernels)
    largest = max(kernels, key=lambda k: k.times * k.size)
    return (
        f"{_count(kernels)}, {size / 2**20:.1f} MiB, "
        f"{_percent(alone(kernels, chip), bound(program, chip).kernels)} of the time, "
        f"{_name(largest)} the largest"
    )


def _collectives(program, chip):
    found = [(k.times, k.collective) for k in program.kernels if k.collective]
    large = [(times, c) for times, c in found if c.size >= LARGE]
    small = [(times, c) for times, c in found if c.size < LARGE]
    lines = []
    if large:
        time = sum(times * links(c, chip) for times, c in large)
        hidden = sum(times * _hidden(c, chip) for times, c in large)
        size = sum(times * c.size for times, c in large)
        lines.append(
            f"collectives of 1 MiB and more: {sum(times for times, _ in large)}, "
            f"{size / 2**20:.1f} MiB, {duration(time)} on the links, {_percent(hidden, time)} of it "
            "beside other kernels"
        )
    if small:
        waiting = sum(times for times, c in small if not any(k.flops for k in c.hides))
        lines.append(
            f"smaller collectives: {sum(times for times, _ in small)}, {waiting} of them beside no "
            "product, while all devices wait"
        )
    return lines


def _hidden(collective: Collective, chip: Chip) -> float:
    others = [k for k in collective.hides if k.kind != "collective"]
    return min(links(collective, chip), alone(others, chip))


def _host(program, chip):
    transfers = [k for k in program.kernels if k.kind == "host"]
    lines = []
    if transfers:
        size = sum(k.times * k.size for k in transfers)
        lines.append(
            f"transfers between host and device: {_count(transfers)}, {size / 2**20:.1f} MiB"
        )
    if program.loops and chip.is_gpu:
        lines.append(
            "the host reads one number after each step, whether another one follows, and launches "
            "that one only then"
        )
    return lines


def _small(program, chip):
    kernels = [k for k in program.kernels if k.kind not in ("prefetch", "collective")]
    small = [k for k in kernels if seconds_of(k, chip) < SMALL]
    if not chip.is_gpu or not small:
        return []
    return [
        f"kernels with less than 1 µs of work: {_count(small)} of {_count(kernels)}, "
        f"{duration(alone(small, chip))} in all; their launches take longer"
    ]


def _name(kernel: Kernel) -> str:
    parts = [part for part in kernel.place.split(";")[0].split("/") if part]
    parts = [p for p in parts if p not in ("cond", "while", "body") and not p.startswith("branch_")]
    return "/".join(parts[-3:]) or kernel.name


def _count(kernels: Iterable[Kernel]) -> int:
    return sum(k.times for k in kernels)


def _percent(part: float, total: float) -> str:
    share = 100 * part / total if total else 0.0
    return f"{share:.0f} %" if share >= 10 or not share else f"{share:.1f} %"
