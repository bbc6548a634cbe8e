"""The table that `launch.benchmark` prints."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compat_jax.errors import UserError
from launch.benchmarks.timing import Result
from launch.benchmarks.work import Sizes

_HEAD = "| measure | what | median | ± | n | GFLOP/s | of matmul | ratio | goal | |"


def head(machine: Mapping[str, Any], command: str, matmul: Mapping[str, float]) -> str:
    """Return the hardware, the versions, the command and the first two lines of the table.

    Args:
      machine: see `timing.machine`.
      command: the command that was run.
      matmul: operations a second of a large matmul, by dtype.
    """
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    speeds = ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in matmul.items())
    return "\n".join(
        [
            f"device: {machine['device']}, {machine['processor']}, {machine['cores']} cores",
            f"versions: Python {machine['python']}, {versions}",
            f"command: {command}",
            f"large matmul: {speeds}",
            "",
            _HEAD,
            "|---" * (_HEAD.count("|") - 1) + "|",
        ]
    )


def line(result: Result, matmul: Mapping[str, float]) -> str:
    """Return a result as a row of the table; `matmul` as in `head`."""
    if math.isnan(result.value):
        return f"| {result.measure} | {result.what} | {result.note} |" + " |" * 7
    peak = matmul["bfloat16" if "bfloat16" in result.what else "float32"]
    met = {True: "met", False: "missed", None: ""}[result.met]
    parts = [
        result.measure,
        result.what + (f" ({result.note})" if result.note else ""),
        f"{result.value:.4g} {result.unit}".strip(),
        "" if result.spread is None else f"{100 * result.spread:.0f} %",
        str(result.repeats),
        "" if result.flops is None else f"{result.flops / 1e9:.0f}",
        "" if result.flops is None else f"{100 * result.flops / peak:.0f} %",
        "" if result.ratio is None else f"{result.ratio:.3g}",
        result.goal or "",
        met,
    ]
    return "| " + " | ".join(parts) + " |"


def content(
    results: Sequence[Result],
    *,
    machine: Mapping[str, Any],
    command: str,
    matmul: Mapping[str, float],
    sizes: Sizes,
) -> dict[str, Any]:
    """Return the results and everything in the head of the table as JSON values.

    Args:
      results: lines of the table.
      machine: as in `head`.
      command: as in `head`.
      matmul: as in `head`.
      sizes: of the workloads.
    """
    return {
        **machine,
        "command": command,
        "matmul_flops": dict(matmul),
        "sizes": dataclasses.asdict(sizes),
        "results": [_finite(dataclasses.asdict(r)) for r in results],
    }


def write(path: str, found: Mapping[str, Any]) -> None:
    """Write what `content` returned as JSON.

    Raises:
      UserError: the file cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: str) -> dict[str, Any]:
    """Read a file that `write`, or `launch.plan --json`, wrote.

    Raises:
      UserError: it cannot be read, or is none of these.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {path}: {reason}", "numbers") from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"results", "programs"} & {*found}:
        raise UserError(
            f"{path} holds no numbers that launch.benchmark --json or launch.plan --json wrote",
            "numbers",
        )
    return found


def _finite(content):
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in content.items()}
