"""Measure every form of a convolution in every pass, for the table by which the CPU's are chosen."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax.files import absolute, write_bytes
from compat_jax.models import forms as convolutions
from compat_jax.models import rates
from compat_jax.models.forms import Geometry, Passes
from compat_jax.models.passes import FORWARD, OF_INPUTS, OF_KERNEL
from compat_jax.models.rates import Measured
from launch.benchmarks.sides import Context
from launch.benchmarks.timing import Result, alternate, machine, seconds_of

_SLOWEST = 4  # times the platform's own form: such a form is measured once, and no more
_TINY = 8


def measure(context: Context) -> Iterator[Result]:
    """Measure the convolutions of the package's table again, and write the new one if it has a place."""
    tiny, found = context.sizes_name == "tiny", []
    photos = context.sizes.photos
    shapes = {row[1:6]: row for row in rates.measured()}.values()
    for shape in list(shapes)[: 1 if tiny else None]:
        if tiny:
            shape = shape._replace(side=_TINY, inputs=_TINY, outputs=_TINY)
        for dtype in context.photo_dtypes:
            row = shape._replace(dtype=dtype)
            again = _measured(row, batch=photos.batch, repeats=photos.repeats)
            found.append(again)
            yield _line(again)
    if context.places.rates is not None:
        facts = machine()
        kept = {name: facts[name] for name in ("processor", "cores", "versions")}
        text = rates.dumped(found, **kept, batch=photos.batch, unit="ms")
        write_bytes(absolute(context.places.rates), text.encode())


def applicable(row: Measured) -> Passes:
    """Return the names of the forms of each pass that can compute a convolution, as three tuples."""
    can = {"winograd": (row.kernel, row.stride) == (3, 1), "matmul": row.kernel == 1}

    def of(table):
        return tuple(name for name in table if can.get(name, True))

    return Passes(of(FORWARD), of(OF_INPUTS), of(OF_KERNEL))  # type: ignore[arg-type]


def _measured(row: Measured, *, batch: int, repeats: int) -> Measured:
    """Time each form of each pass."""
    geometry = Geometry(row.stride, (row.kernel - 1) // 2)
    rng = np.random.default_rng(0)
    x = _normal(rng, (batch, row.side, row.side, row.inputs), row.dtype)
    kernel = _normal(rng, (row.kernel, row.kernel, row.inputs, row.outputs), row.dtype)
    gradient = _normal(rng, jax.eval_shape(_native(geometry), x, kernel).shape, row.dtype)
    times = {}
    for name, names in applicable(row)._asdict().items():
        sides = {one: _side(name, one, geometry, (x, kernel, gradient)) for one in names}
        first = alternate(sides, 1, 1)
        within = _SLOWEST * first["native"].median
        kept = {one: side for one, side in sides.items() if first[one].median <= within}
        times[name] = {
            one: round(1e3 * timing.median, 3)
            for one, timing in alternate(kept, repeats, 0).items()
        }
    return row._replace(milliseconds=times)


def _native(geometry: Geometry) -> Callable:
    return lambda x, kernel: convolutions.native(x, kernel, geometry)


def _normal(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)


def _side(pass_name, form, geometry, arrays) -> Callable[[], float]:
    x, kernel, gradient = arrays
    if pass_name == "forward":
        run = jax.jit(lambda x, kernel, _: FORWARD[form](x, kernel, geometry))
    else:
        table = OF_INPUTS if pass_name == "of_inputs" else OF_KERNEL
        run = jax.jit(lambda x, kernel, g: table[form](x, kernel, geometry, g))
    return seconds_of(lambda: run(x, kernel, gradient))


def _line(row: Measured) -> Result:
    fastest = {name: min(times, key=times.__getitem__) for name, times in row.milliseconds.items()}
    total = sum(min(times.values()) for times in row.milliseconds.values())
    native = sum(times["native"] for times in row.milliseconds.values())
    kernel = f"{row.kernel}x{row.kernel}/{row.stride}"
    return Result(
        measure="forms",
        what=f"{kernel} {row.side} px {row.inputs}-{row.outputs} {row.dtype}",
        value=total,
        unit="ms",
        ratio=total / native,
        note=", ".join(f"{name} {form}" for name, form in fastest.items()) + "; ratio to native",
    )
