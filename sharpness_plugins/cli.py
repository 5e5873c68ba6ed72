"""The console script ``sharpness``: demo, warm-start, reproduce, measure, list, doctor.

Heavy modules are imported by the sub-command that needs them, so that ``--help`` and ``list`` answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import platform
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from . import files
from .errors import MeasurementWarning, PluginWarning, SharpnessError, UnknownNameError, did_you_mean, missing_dependency
from .texts import name_and_settings

if TYPE_CHECKING:
    from torch import nn

    from .experiments.curve import WarmStartCurve
    from .experiments.demo import DemoResult
    from .experiments.keskar2017.run import ReproductionEvent
    from .experiments.recipes import ExperimentEvent
    from .registry import Offer

__all__ = ["main"]

OK, USER_ERROR, METRIC_FAILED, INTERRUPTED = 0, 1, 2, 130
REDRAW_SECONDS = 0.1
OPTIONAL_PACKAGES = {  # import name -> extra that brings it, or None where only the package itself is needed
    "sklearn": "demo",
    "matplotlib": "plots",
    "timm": "timm",
    "lightning": "lightning",
    "transformers": "huggingface",
    "accelerate": "huggingface",
    "pandas": None,
}
DISTRIBUTIONS = {"sklearn": "scikit-learn"}


class CommandError(Exception):
    """Something that the user can mend; the message is one sentence or two."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    0: fine; 1: an error that the user can mend, in one line on standard error; 2: a metric failed or was stopped at a time
    limit, with the report printed all the same; 130: interrupted by Ctrl-C, with the report as far as it came.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what it had to say
        return stop.code if isinstance(stop.code, int) else USER_ERROR
    _tolerate_narrow_encodings()
    command: Callable[[argparse.Namespace], int] = arguments.command
    with warnings.catch_warnings():
        warnings.showwarning = _warning_printer(warnings.showwarning)
        try:
            code = command(arguments)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            print("\nsharpness: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # the reader of our output, head for one, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
            return OK
        except Exception as error:
            if arguments.traceback:
                traceback.print_exc()
            print(f"sharpness: error: {_sentence(error)}", file=sys.stderr)
            return USER_ERROR


def _sentence(error: Exception) -> str:
    """The message alone where it was written for users; else with the type, and how to see where it came from."""
    text = " ".join(str(error).split())
    if isinstance(error, (CommandError, SharpnessError, ImportError)):
        return text
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {text} (--traceback shows where)"


def _warning_printer(otherwise: Callable[..., None]) -> Callable[..., None]:
    """One line for our own warnings, without the place in our code that nobody can act on."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, (PluginWarning, MeasurementWarning)):
            print(f"sharpness: warning: {message}", file=sys.stderr)
        else:
            otherwise(message, category, *place, **more)

    return show


def _tolerate_narrow_encodings() -> None:
    """Print ``?`` for a Greek letter rather than fail, where output goes to a file in a legacy encoding."""
    for stream in (sys.stdout, sys.stderr):
        encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
        if encoding != "utf8" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


# --- arguments


class _Parser(argparse.ArgumentParser):
    """argparse leaves with 2 on a wrong argument, which here means that a metric failed."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print(f"sharpness: error: {message}", file=sys.stderr)
        raise SystemExit(USER_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sharpness", description="How sharp is this minimum? Sharpness measured on any PyTorch model.")
    parser.add_argument("--version", action="version", version=f"sharpness-plugins {_version('sharpness-plugins')}")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="{demo,warm-start,reproduce,measure,list,doctor}"
    )
    _add_demo(commands)
    _add_warm_start(commands)
    _add_reproduce(commands)
    _add_measure(commands)
    _add_list(commands)
    _add_doctor(commands)
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="with an error, show where it came from")
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="small against large batches on real digits: trains, measures, prints one table (a minute or two)",
        description="Trains one network on scikit-learn's digits with each batch size, and with a few epochs of the "
        "smallest before the largest, to the same training loss, measures the sharpness of every minimum, and compares "
        "with Keskar et al. (2017). Needs sharpness-plugins[demo].",
    )
    demo.add_argument("--seeds", type=int, default=3, metavar="N", help="number of repetitions (default: 3)")
    demo.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 100, 500], metavar="B", help="default: 16 100 500")
    demo.add_argument("--device", default="cpu", help="default: cpu")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("sharpness-demo"),
        metavar="DIR",
        help="folder to write (default: sharpness-demo)",
    )
    demo.add_argument("--quiet", action="store_true", help="no progress")
    demo.set_defaults(command=_demo)


def _add_warm_start(commands: Any) -> None:
    warm = commands.add_parser(
        "warm-start",
        help="what large batches gain from a few epochs of small ones before: the paper's Figure 5 (two to four minutes)",
        description="Trains a network on scikit-learn's digits, a tenth of the labels wrong, with small batches; after so "
        "many epochs large batches take over, and go to the same training loss. Prints accuracy, sharpness and cost of "
        "every warm start beside the cold start, seed by seed. Needs sharpness-plugins[demo].",
    )
    warm.add_argument("--epochs", type=int, nargs="+", metavar="N", help="of small batches (default: 0 5 12 25 50)")
    warm.add_argument("--seeds", type=int, metavar="N", help="number of repetitions (default: 6)")
    warm.add_argument("--small-batch", type=int, default=8, metavar="B", help="default: 8")
    warm.add_argument("--large-batch", type=int, default=400, metavar="B", help="default: 400")
    warm.add_argument(
        "--match",
        default="loss:0.005",
        metavar="WHAT:VALUE",
        help="where every training ends: loss:0.005 (default), epochs:60, steps:1000",
    )
    warm.add_argument("--quick", action="store_true", help="2 seeds and epochs 0 12 unless told: half a minute")
    warm.add_argument(
        "--out",
        type=Path,
        default=Path("sharpness-warm-start"),
        metavar="DIR",
        help="folder to write (default: sharpness-warm-start)",
    )
    warm.add_argument("--quiet", action="store_true", help="no progress")
    warm.set_defaults(command=_warm_start)


def _add_reproduce(commands: Any) -> None:
    from .experiments.keskar2017.command import add_arguments

    reproduce = commands.add_parser(
        "reproduce",
        help="Keskar et al. (2017), its tables and figures, with controls that it lacks (a quarter of an hour on digits)",
        description="Trains the paper's networks with small and large batches, measures every minimum by the paper's solver "
        "and by ours, repeats Figures 3 to 6, the remedies and the controls that the paper lacks, and says what reproduces "
        "and what does not. What is done is kept in --out: the same command goes on after a kill. Under torchrun the ranks "
        "share the work. Needs sharpness-plugins[demo] for digits; other data are read from original files of yours.",
    )
    add_arguments(reproduce)
    reproduce.set_defaults(command=_reproduce)


def _add_measure(commands: Any) -> None:
    measure = commands.add_parser(
        "measure",
        help="measure a model of yours",
        description="Calls a function of yours that returns (model, loader), or a mapping of arguments of "
        "measure_sharpness with at least these two, and prints the report. Without it, the checkpoint has to describe "
        "itself, as those of timm's train.py do: sharpness measure --checkpoint last.pth.tar --data DIR.",
    )
    measure.add_argument("setup", nargs="?", metavar="SETUP", help="module:function or path/to/file.py:function")
    measure.add_argument(
        "--metric",
        action="append",
        metavar="NAME[:KEY=VALUE,...]",
        help="epsilon_box:epsilon=5e-4, for one; repeatable (default: the three built-in metrics)",
    )
    measure.add_argument("--checkpoint", type=Path, metavar="FILE", help="load a state dict that torch.save wrote")
    measure.add_argument("--data", metavar="DIR", help="without SETUP: what the checkpoint's model is measured on")
    measure.add_argument(
        "--select", action="append", metavar="GLOB", help="perturb only the parameters of these names; repeatable"
    )
    measure.add_argument("--batch-norm", choices=["eval", "batch"], help="running or batch statistics (default: eval)")
    measure.add_argument("--max-samples", type=int, metavar="N", help="use at most the first N samples")
    measure.add_argument("--seed", type=int, metavar="N", help="default: 0")
    measure.add_argument("--device", help="default: where the model is")
    measure.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the measurement would take, from one timed gradient and product, and end",
    )
    measure.add_argument(
        "--memory", metavar="BYTES", help="what may be kept between evaluations: 4GB (default: half of what is free)"
    )
    measure.add_argument(
        "--time-limit", type=float, metavar="S", help="stop after so many seconds, with what there is by then"
    )
    measure.add_argument("--metric-time-limit", type=float, metavar="S", help="the same for each metric")
    measure.add_argument(
        "--state-file",
        type=Path,
        metavar="FILE",
        help="keep the state of the measurement here, and go on from it if it is there, after a kill to the same numbers",
    )
    measure.add_argument("--json", metavar="FILE", help="also write the report as JSON; - prints it instead of the table")
    measure.add_argument("--quiet", action="store_true", help="no progress")
    measure.set_defaults(command=_measure)


def _add_list(commands: Any) -> None:
    listing = commands.add_parser(
        "list", help="metrics, batch-size schedules, signals and couplings, and where they come from"
    )
    listing.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="of names: 'hessian*' (default: all)")
    kinds = ["metric", "schedule", "signal", "coupling", "optimizer"]
    listing.add_argument("--kind", choices=kinds, help="of what (default: all)")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(command=_list)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser("doctor", help="versions, devices, optional packages, plugins: what works here")
    doctor.set_defaults(command=_doctor)


# --- demo and warm start


def _demo(arguments: argparse.Namespace) -> int:
    from .experiments.demo import DemoSettings, run_demo

    _check_device(arguments.device)
    try:
        settings = DemoSettings(arguments.seeds, tuple(arguments.batch_sizes), arguments.device)
    except ValueError as error:
        raise CommandError(str(error)) from None
    arguments.out.mkdir(parents=True, exist_ok=True)  # before two minutes of work, not after
    listener = None if arguments.quiet else ExperimentProgress(sys.stderr)
    result = run_demo(settings, listener=listener)
    return _written(result, arguments.out)


def _written(result: DemoResult | WarmStartCurve, folder: Path) -> int:
    files = result.write(folder)
    print(result)
    print(f"\nWrote {', '.join(path.name for path in files)} to {folder}{os.sep} ({result.seconds:.0f} s)")
    return METRIC_FAILED if result.failed else OK


def _warm_start(arguments: argparse.Namespace) -> int:
    from .experiments.curve import WarmStartSettings
    from .experiments.data import digits_noisy_split
    from .experiments.match import Match
    from .experiments.networks import noisy_digits_network
    from .experiments.warm_start import WarmStartInterrupted, run_warm_start

    seeds = arguments.seeds if arguments.seeds is not None else (2 if arguments.quick else 6)
    epochs = arguments.epochs or ([0, 12] if arguments.quick else [0, 5, 12, 25, 50])
    missing_dependency("matplotlib.figure", extra="demo", purpose="the picture of the warm start")
    try:
        settings = WarmStartSettings(
            arguments.small_batch,
            arguments.large_batch,
            tuple(epochs),
            tuple(range(seeds)),
            Match.parse(arguments.match),
            title="ReLU network 64-128-128-10, 800 digits with 10 % of the labels wrong",
        )
        settings.check(digits_noisy_split(0))
    except ValueError as error:
        raise CommandError(str(error)) from None
    arguments.out.mkdir(parents=True, exist_ok=True)  # before minutes of work, not after
    listener = None if arguments.quiet else ExperimentProgress(sys.stderr)
    try:
        curve = run_warm_start(settings, noisy_digits_network, digits_noisy_split, listener=listener)
    except WarmStartInterrupted as stop:
        _written(stop.curve, arguments.out)
        print(f"sharpness: interrupted after {len(stop.curve.runs)} of {seeds} seeds", file=sys.stderr)
        return INTERRUPTED
    return _written(curve, arguments.out)


def _reproduce(arguments: argparse.Namespace) -> int:
    from .experiments.keskar2017.command import reproduce_command

    _check_device(arguments.device)
    return reproduce_command(arguments, None if arguments.quiet else ExperimentProgress(sys.stderr))


class ExperimentProgress:
    """One line per finished network, anywhere; on a terminal also a line redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._drawn_at = 0.0

    def __call__(self, event: ExperimentEvent | ReproductionEvent) -> None:
        on_terminal, now = self._stream.isatty(), time.monotonic()
        if event.finished:
            self._stream.write((CLEAR_LINE if on_terminal else "") + f"{event}\n")
        elif on_terminal and now - self._drawn_at >= REDRAW_SECONDS:
            self._drawn_at = now
            width = shutil.get_terminal_size().columns - 1  # a line that wraps cannot be redrawn
            self._stream.write(CLEAR_LINE + str(event)[:width])
        self._stream.flush()


CLEAR_LINE = "\r\x1b[2K"


def _check_device(device: str | None) -> None:
    if device is None:
        return
    import torch

    try:
        torch.zeros(1, device=device)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"device {device!r} cannot be used: {reason}. Here are: {', '.join(_devices())}") from None


def _devices() -> list[str]:
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


# --- measure


def _measure(arguments: argparse.Namespace) -> int:
    from . import measure_sharpness

    asked = [_asked(text) for text in arguments.metric or ()]
    _check_device(arguments.device)
    with _importable_from_here():
        if arguments.setup is None:
            settings = _opened(arguments.checkpoint, arguments.data)
        elif arguments.data is not None:
            raise CommandError(f"--data is for checkpoints that describe themselves; {arguments.setup} has its own loader")
        else:
            settings = _setup(arguments.setup, allowed=list(inspect.signature(measure_sharpness).parameters))
            if arguments.checkpoint is not None:
                load_checkpoint(settings["model"], arguments.checkpoint)
        if asked:
            settings["metrics"] = [_metric(name, given) for name, given in asked]
        given = ["select", "batch_norm", "max_samples", "seed", "device"]
        given += ["memory", "time_limit", "metric_time_limit", "state_file"]
        for name in given:
            if getattr(arguments, name) is not None:  # what is not given is left to the set-up, then to the library
                settings[name] = getattr(arguments, name)
        if arguments.quiet:
            settings["progress"] = False
        if arguments.dry_run:
            return _dry_run(arguments, settings)
        with warnings.catch_warnings():
            # the table says so
            warnings.filterwarnings("ignore", "the measurement was stopped by Ctrl-C", MeasurementWarning)
            report = measure_sharpness(**settings)
    if arguments.json == "-":
        print(report.to_json())
    else:
        print(report)
    if arguments.json not in (None, "-"):
        files.write(arguments.json, report.to_json() + "\n")
    if report.stopped == "by Ctrl-C":
        print("sharpness: interrupted", file=sys.stderr)
        return INTERRUPTED
    incomplete = any(result.status.kind in ("failed", "interrupted", "not measured") for result in report.values())
    return METRIC_FAILED if incomplete else OK


def _dry_run(arguments: argparse.Namespace, settings: Mapping[str, Any]) -> int:
    from . import plan_measurement

    known = inspect.signature(plan_measurement).parameters
    plan = plan_measurement(**{name: value for name, value in settings.items() if name in known})
    print(plan.to_json() if arguments.json == "-" else plan)
    if arguments.json not in (None, "-"):
        files.write(arguments.json, plan.to_json() + "\n")
    return OK


def _asked(text: str) -> tuple[str, dict[str, Any]]:
    try:
        return name_and_settings(text)
    except ValueError as error:
        raise CommandError(f"metric {error}") from error


def _metric(name: str, settings: Mapping[str, Any]) -> Any:
    from .registry import available_metrics, get_metric

    try:
        return get_metric(name, **settings)
    except UnknownNameError:
        metric, colon, rest = name.partition(":")
        if colon and available_metrics(metric):
            raise CommandError(f"metric {name!r}: {rest!r} is not KEY=VALUE. Example: epsilon_box:epsilon=5e-4") from None
        raise
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


@contextlib.contextmanager
def _importable_from_here() -> Iterator[None]:
    """The current directory first on the path, as for ``python -m``; a console script has its own folder there."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


def _setup(reference: str, allowed: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``measure_sharpness``, from the user's function."""
    place, colon, name = reference.rpartition(":")
    if not (colon and place and name):
        raise CommandError(f"SETUP must be module:function or path/to/file.py:function, got {reference!r}")
    module = _import(place)
    function = getattr(module, name, None)
    if not callable(function):
        offered = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise CommandError(
            f"{place} has no function {name!r}.{did_you_mean(name, offered)} Functions: {', '.join(offered) or 'none'}"
        )
    with _users_code(f"{reference} failed"):
        made = function()
    if isinstance(made, tuple) and len(made) == 2:
        return {"model": made[0], "loader": made[1]}
    if not isinstance(made, Mapping) or not {"model", "loader"} <= set(made):
        got = (
            f"a mapping with {', '.join(map(repr, made)) or 'nothing'}" if isinstance(made, Mapping) else type(made).__name__
        )
        raise CommandError(
            f"{reference} must return (model, loader), or a mapping with 'model' and 'loader'; it returned {got}"
        )
    for key in made:
        if key not in allowed:
            raise CommandError(
                f"{reference} returned {key!r}, which is no argument of measure_sharpness."
                f"{did_you_mean(str(key), allowed)} Arguments: {', '.join(allowed)}"
            )
    return dict(made)


def _import(place: str) -> ModuleType:
    if not place.endswith(".py"):
        with _users_code(f"{place} cannot be imported"):
            return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise CommandError(f"there is no file {place}. SETUP is path/to/file.py:function")
    sys.path.insert(0, str(path.resolve().parent))  # its neighbours are importable, as for a script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{place} cannot be imported: Python knows no loader for it")
    module = importlib.util.module_from_spec(spec)
    with _users_code(f"{place} cannot be imported"), _registered(module):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _registered(module: ModuleType) -> Iterator[None]:
    """Known by its name while and after it runs, which dataclasses and pickles of the module need; not if it fails."""
    taken = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        yield
    except BaseException:
        if taken is None:
            del sys.modules[module.__name__]
        else:
            sys.modules[module.__name__] = taken
        raise


@contextlib.contextmanager
def _users_code(what: str) -> Iterator[None]:
    """An exception in the user's file: what it was and on which line, in one sentence."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if len(frames) > 1 else ""
        if isinstance(error, SyntaxError):
            place = f" ({Path(error.filename or '?').name}, line {error.lineno})"
        text = " ".join(str(error).split())
        raise CommandError(f"{what}: {type(error).__name__}: {text}{place}") from error


def _opened(path: Path | None, data: str | None) -> dict[str, Any]:
    """Arguments of ``measure_sharpness``, from a checkpoint that describes itself."""
    from .registry import first_answer

    if path is None or data is None:
        raise CommandError(
            "what is to be measured? Give SETUP (module:function or path/to/file.py:function), or --checkpoint and --data "
            "for a checkpoint that describes itself"
        )
    if not path.is_file():
        raise CommandError(f"there is no checkpoint {path}")
    opener = first_answer("sharpness_open_checkpoint", path=str(path))
    if opener is None:
        raise CommandError(
            f"checkpoint {path} does not describe its model in a way that a plugin here understands. Give SETUP, a function "
            "that builds the model: sharpness measure file.py:function --checkpoint ..."
        )
    return dict(opener(data))


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a state dict into ``model``, strictly, and without running code from the file.

    The file holds the state dict itself, or a mapping with it under ``state_dict``, ``model_state_dict`` or ``model``.
    Prefixes of ``DataParallel`` and ``torch.compile`` are ignored on both sides.
    """
    state = _state_dict(_read_checkpoint(path), path)
    own = {_unwrapped(name): name for name in model.state_dict()}
    renamed = {own.get(_unwrapped(name), name): value for name, value in state.items()}
    problem = _mismatch(model.state_dict(), renamed)
    if problem:
        raise CommandError(
            f"checkpoint {path} does not fit {type(model).__name__}: {problem}. "
            "Let the function build the architecture that was trained."
        )
    model.load_state_dict(renamed)


def _read_checkpoint(path: Path) -> object:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CommandError(f"there is no checkpoint {path}") from None
    except IsADirectoryError:
        raise CommandError(f"checkpoint {path} is a folder. Name the file in it that torch.save wrote.") from None
    except OSError:
        raise
    except Exception as error:  # the unpickler stumbles over foreign bytes in many ways
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise CommandError(
                f"checkpoint {path} holds Python objects besides tensors, and to load them could run any code. "
                "Save it again with torch.save(model.state_dict(), ...)."
            ) from error
        raise CommandError(
            f"checkpoint {path} cannot be read: it is cut off or was not written by torch.save. "
            "Copy it again, or save it again with torch.save(model.state_dict(), ...)."
        ) from error


def _state_dict(loaded: object, path: Path) -> Mapping[str, Any]:
    if isinstance(loaded, Mapping):
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(loaded.get(key), Mapping):
                return dict(loaded[key])
        if any(hasattr(value, "shape") for value in loaded.values()):
            return loaded
    found = f"a mapping with {', '.join(map(repr, loaded))}" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
    raise CommandError(
        f"checkpoint {path} holds no state dict, but {found}. "
        "Expected are a state dict, or a mapping with one under 'state_dict', 'model_state_dict' or 'model'."
    )


def _unwrapped(name: str) -> str:
    """Without the prefixes of DataParallel (outermost) and of torch.compile (anywhere)."""
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def _mismatch(own: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What is missing, what is too much, what has another shape; empty if it fits."""

    def some(names: Sequence[str]) -> str:
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    missing = [name for name in own if name not in given]
    surplus = [name for name in given if name not in own]
    shapes = [
        f"{name} is {_kind(given[name])} in the file and {_kind(own[name])} in the model"
        for name in own
        if name in given and _kind(given[name]) != _kind(own[name])
    ]
    said = [f"the file lacks {some(missing)}"] if missing else []
    said += [f"the model lacks {some(surplus)}"] if surplus else []
    said += [some(shapes)] if shapes else []
    return "; ".join(said)


def _kind(value: Any) -> str:
    """The shape of a tensor, and what else one must not be copied into another for; the type of what is none."""
    import torch

    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    odd = "complex " * value.is_complex() + "sparse " * (value.layout is not torch.strided)
    return f"{odd}{tuple(value.shape)}"


# --- list and doctor


def _list(arguments: argparse.Namespace) -> int:
    from .registry import KINDS, available, plugins

    warnings.simplefilter("ignore", PluginWarning)  # what failed is said at the end of the list
    kinds = [kind for kind in KINDS if arguments.kind in (None, kind.kind)]
    offers = {kind.kind: available(kind, arguments.pattern) for kind in kinds}
    faulty = [record for record in plugins() if record.error]
    if arguments.json:
        told: dict[str, Any] = {
            f"{kind}s": [_offer_told(*offer) for offer in found.items()] for kind, found in offers.items()
        }
        failed = [{"plugin": r.name, "distribution": r.distribution, "status": r.status, "error": r.error} for r in faulty]
        print(json.dumps({**told, "faulty_plugins": failed}, indent=2))
        return OK
    if not any(offers.values()):
        known = "; ".join(f"{kind.kind}s: {', '.join(available(kind)) or 'none'}" for kind in kinds)
        raise CommandError(f"nothing matches {arguments.pattern!r}. There are {known}")
    blocks = [_aligned(_offer_rows(kind, found)) for kind, found in offers.items() if found]
    print("\n\n".join(blocks))
    for record in faulty:
        print(f"\nplugin {record.name!r} from {record.distribution} {record.version}, {record.status}: {record.error}")
    return OK


def _offer_told(name: str, offer: Offer) -> dict[str, Any]:
    return {
        "name": name,
        "summary": offer.spec.summary,
        "plugin": offer.plugin,
        "distribution": offer.distribution,
        "version": offer.version,
        "duplicate": name != offer.spec.name,
    }


def _offer_rows(kind: str, offers: Mapping[str, Offer]) -> list[list[str]]:
    rows = [[kind, "what it is", "plugin", "from"]]
    for name, offer in offers.items():
        duplicate = "" if name == offer.spec.name else f" (one of several named {offer.spec.name!r})"
        origin = f"{offer.distribution} {offer.version}" if offer.distribution else "this process"
        rows.append([name, offer.spec.summary + duplicate, offer.plugin, origin])
    return rows


def _doctor(arguments: argparse.Namespace) -> int:
    from .registry import plugins

    warnings.simplefilter("ignore", PluginWarning)  # each plugin is listed with its fault
    rows = [["python", platform.python_version()]]
    rows += [[name, _version(name)] for name in ("sharpness-plugins", "torch", "numpy", "scipy", "pluggy")]
    rows.append(["devices", ", ".join(map(_device_name, _devices()))])
    rows.append(["", ""])
    for package, extra in OPTIONAL_PACKAGES.items():
        distribution = DISTRIBUTIONS.get(package, package)
        install = f'pip install "sharpness-plugins[{extra}]"' if extra else f"pip install {distribution}"
        missing = importlib.util.find_spec(package) is None
        rows.append([distribution, f"not installed; {install}" if missing else _version(distribution)])
    rows.append(["", ""])
    records = plugins()
    for record in records:
        said = f"{record.status}, {record.distribution} {record.version}"
        said += "".join(f", {len(names)} {kind}{'s' * (len(names) != 1)}" for kind, names in record.offers.items())
        rows.append([f"plugin {record.name}", said + (f": {record.error}" if record.error else "")])
    print(_aligned(rows))
    return USER_ERROR if any(record.status == "failed" for record in records) else OK


def _device_name(device: str) -> str:
    import torch

    if device == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown version"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
