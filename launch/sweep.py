"""Run a grid of configurations, and print mean and spread of what comes out.

  python -m launch.sweep --config=configs/glyphs.py:replace=false --workdir=runs/sweep \\
      --grid='method=hoc,er;seed=0,1,2'
  python -m launch.sweep --config=configs/glyphs.py --workdir=runs/rates \\
      --grid='method=hoc,er;optim.lr=0.01,0.03' --pretrained='runs/models-{method}/chain'

A name of the grid is an argument of the configuration file (method, seed, ...) or a field of the
configuration (optim.lr, tasks.rehearsal, ...). Every cell is a run in WORKDIR/CELL, trained and
evaluated in this one process, so that cells of one shape share their compiled programs; its result is a
line of WORKDIR/results.jsonl. Killed at any time, run the same command to resume; more values may be
added later, and more metrics. `python -m launch.train --config=FILE.py --help` lists the fields.
"""

import ast
import contextlib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from compat_jax.errors import UserError, unknown
from compat_jax.files import absolute, first_line
from launch import _cli as cli
from launch import _config_flag
from launch import _evaluation as evaluation

flags.DEFINE_string("config", None, "FILE.py:key=value,... that all cells share")
flags.DEFINE_string("grid", None, "NAME=VALUE,VALUE;NAME=..., the last name varies fastest")
flags.DEFINE_string("workdir", None, "folder of the sweep")
flags.DEFINE_string(
    "pretrained",
    "",
    "chain of replacement models; {method}, {optim.lr} and other names of the grid are filled in",
)
evaluation.define_metric()
flags.DEFINE_list("over", ["seed"], "names to average over in the table")
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Parse, run what is missing, print the table."""
    args = flags.FLAGS
    file = cli.require("config", "configs/glyphs.py")
    text = cli.require("grid", "method=hoc,er;seed=0,1,2")
    workdir = cli.require("workdir", "runs/sweep")
    cli.start_jax()
    from compat_jax import config as configs
    from compat_jax import experiment, sweep

    evaluation.check_metrics()
    cells, folder, stop = sweep.grid(text), absolute(workdir), cli.StopSignal()
    check_over(args.over, cells)
    made = {}
    for cell in cells:
        with _of_grid(cell):
            made[cell.name] = _config(file, cell, args.pretrained)
            configs.run_of(made[cell.name])
    results = sweep.Results(folder / "results.jsonl")
    digests = {cell.name: _digest(made[cell.name]) for cell in cells}
    for number, cell in enumerate(cells):
        known = results.of(cell, digests[cell.name])
        missing = [metric for metric in args.metric if f"{metric} AA" not in known]
        if not missing:
            continue
        print(f"cell {number + 1} of {len(cells)}: {cell.name}")
        config, place = made[cell.name], folder / cell.name
        with _of_grid(cell):
            session = configs.session_of(config, stop, progress=args.progress)
            done = experiment.train(config, place, session)
            chain = getattr(done, "chain", done)
            found = experiment.evaluate(chain, config=config, metrics=missing, session=session)
        results.add(cell, _numbers(found), chain=str(chain.path), settings=digests[cell.name])
    wanted = [f"{metric} {name}" for metric in args.metric for name in ("AC", "AA")]
    entries = []
    for cell in cells:
        numbers = results.of(cell, digests[cell.name])
        entries.append({"cell": cell.values, "metrics": {name: numbers[name] for name in wanted}})
    print(sweep.table(entries, args.over))


def check_over(names: Sequence[str], cells: Sequence[Any]) -> None:
    """Refuse names to average over that the grid lacks; seed is there by default.

    Args:
      names: to average over.
      cells: of the grid.

    Raises:
      UserError: an unknown name.
    """
    valid = {*cells[0].values, "seed"}
    for name in names:
        if name not in valid:
            raise unknown("name of the grid", name, valid, "over")


@contextlib.contextmanager
def _of_grid(cell) -> Iterator[None]:
    """Say that the grid gave the values of a cell, where errors within a block are about one of them."""
    try:
        yield
    except UserError as error:
        if error.argument in cell.values:
            error.argument = "grid"
        raise


@contextlib.contextmanager
def _of_file(path) -> Iterator[None]:
    """Say that the configuration file failed: it is code of the user's and may raise anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} failed ({first_line(error)})", "config") from error


def _digest(config) -> str:
    """SHA-256 of what decides the numbers of a cell."""
    from compat_jax import config as configs

    data = config.data.to_json_best_effort(sort_keys=True)
    parts = [json.dumps(configs.run_of(config).describe(), sort_keys=True), data]
    return hashlib.sha256("\n".join([*parts, str(config.get("pretrained"))]).encode()).hexdigest()


def _numbers(found) -> dict[str, Any]:
    """AC and AA of every metric."""
    numbers = {}
    for name, result in found.items():
        several = len(result.matrix) > 1  # one version has no pair
        numbers[f"{name} AC"] = result.average_compatibility if several else None
        numbers[f"{name} AA"] = result.average_accuracy
    return {k: None if v != v else float(v) for k, v in numbers.items()}


def _config(file: str, cell, pretrained: str) -> ConfigDict:
    """The configuration of a cell: names that the file does not take are fields."""
    path, _, shared = _config_flag.config_file(file).partition(":")
    get_config = _module(path).get_config
    arguments = [shared] if shared else []
    fields = {}
    for name, value in cell.values.items():
        with _of_file(path):
            is_argument = "." not in name and _takes(get_config, f"{name}={value}")
        if is_argument:
            arguments.append(f"{name}={value}")
        else:
            fields[name] = _literal(value)
    with _of_file(path):
        config = get_config(",".join(arguments))
    if pretrained:
        fields["pretrained"] = filled_in(pretrained, cell.values)
    for name, value in fields.items():
        try:
            config.update_from_flattened_dict({name: value})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{name}={value!r} of the grid: {str(error)[:200]}", "grid") from error
    return config


def filled_in(text: str, values: Mapping[str, str]) -> str:
    """Return a text with the values of a cell in the place of their {names}.

    Raises:
      UserError: a name that the grid lacks.
    """

    def value(match):
        if match[1] not in values:
            raise unknown("name of the grid", match[1], values, "pretrained")
        return values[match[1]]

    return re.sub(r"\{([^{}]*)\}", value, text)


def _takes(get_config, argument) -> bool:
    try:
        get_config(argument)
    except UserError as error:
        if "unknown argument of the configuration" in str(error):
            return False
        error.argument = "grid"
        raise
    return True


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _module(path: str):
    spec = importlib.util.spec_from_file_location("sweep_config", path)
    if spec is None or spec.loader is None:
        raise UserError(
            f"{path} is no configuration file, FILE.py: {_config_flag.examples()}", "config"
        )
    module = importlib.util.module_from_spec(spec)
    with _of_file(path):
        spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no get_config(): {_config_flag.examples()}", "config")
    return module


if __name__ == "__main__":
    cli.run(main, __doc__)
