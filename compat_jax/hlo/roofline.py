"""How fast a chip can do a program's work at best."""

import dataclasses
from collections.abc import Iterable

from compat_jax.hlo.chips import Chip
from compat_jax.hlo.kernels import Collective, Kernel, Program


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that one step takes at least on one device.

    Attributes:
      compute: its matrix products and convolutions at the peak rate of their type.
      memory: its arguments and results once, and the part of every other array that is larger than
        the cache whenever a kernel reads or writes it.
      links: what every device receives from others in collectives, at the full rate of the links.
      kernels: its kernels one after the other, each at the peak rate and with all that it reads and
        writes in main memory. Not a bound: a cache, or kernels side by side, can be faster. Launches
        and latencies, rates below the peak, make it slower.
    """

    compute: float
    memory: float
    links: float
    kernels: float

    @property
    def seconds(self) -> float:
        """Return the lower bound of the step."""
        return max(self.compute, self.memory, self.links)

    @property
    def limit(self) -> str:
        """Return what sets the lower bound: "FLOP", "memory" or "links"."""
        times = {"FLOP": self.compute, "memory": self.memory, "links": self.links}
        return max(times, key=lambda name: times[name])


def bound(program: Program, chip: Chip) -> Bound:
    """Return the lower bound of one step of a program on a chip whose rates are known."""
    kernels = program.kernels
    compute = sum(k.times * products(k, chip) for k in kernels)
    carried = sum(k.inputs + k.results for k in kernels)
    beyond = sum(k.times * sum(max(0, size - chip.cache) for size in k.sizes) for k in kernels)
    return Bound(
        compute=compute,
        memory=(max(0, carried - chip.cache) + beyond) / chip.bandwidth,
        links=sum(k.times * links(k.collective, chip) for k in kernels if k.collective),
        kernels=max(alone(kernels, chip), sum(k.times * k.size for k in kernels) / chip.bandwidth),
    )


def products(kernel: Kernel, chip: Chip) -> float:
    """Return the seconds that one launch's products take at the peak rate of their type."""
    # A type that the maker gives no rate for runs as fast as the fastest: it stays a lower bound.
    fastest = max(chip.peaks.values())
    return sum(flops / chip.peaks.get(kind, fastest) for kind, flops in kernel.flops.items())


def links(collective: Collective, chip: Chip) -> float:
    """Return the seconds that a collective takes at least: what a device receives from the others.

    A switch that adds up itself sends every device the sum once; a ring takes up to twice as long.
    """
    others = (collective.devices - 1) / collective.devices
    return others * collective.size / chip.link


def seconds_of(kernel: Kernel, chip: Chip) -> float:
    """Return the seconds of one launch: at the peak rate, all that it touches in main memory."""
    seconds = max(products(kernel, chip), kernel.size / chip.bandwidth)
    return max(seconds, links(kernel.collective, chip)) if kernel.collective else seconds


def alone(kernels: Iterable[Kernel], chip: Chip) -> float:
    """Return the seconds of kernels one after the other; what is prefetched runs beside them."""
    return sum(k.times * seconds_of(k, chip) for k in kernels if k.kind != "prefetch")


def duration(seconds: float) -> str:
    """Write a time of a step, or of a part of one: "6.77 ms" or "54.3 µs"."""
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"
