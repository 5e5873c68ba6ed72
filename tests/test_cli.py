"""The console script, run for real on small models."""

import json
import os
import subprocess
import sys
import sysconfig
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from sharpness_plugins import measure_sharpness
from sharpness_plugins.cli import CommandError, ExperimentProgress, load_checkpoint, main
from sharpness_plugins.experiments.curve import WarmStartCurve
from sharpness_plugins.experiments.demo import DemoSettings
from sharpness_plugins.experiments.recipes import ExperimentEvent, Recipe
from sharpness_plugins.metrics import EpsilonBox
from sharpness_plugins.registry import MetricSpec, fresh_registry
from sharpness_plugins.report import SharpnessReport

SETUP = """
    import torch
    from torch import nn

    def net():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))

    def data():
        x = torch.linspace(-1, 1, 40).reshape(10, 4)
        return [(x[:6], torch.arange(6) % 3), (x[6:], torch.arange(4) % 3)]

    def build():
        return net(), data()

    def regression():
        loader = [(x, torch.zeros(len(x), 3)) for x, _ in data()]
        return {"model": net(), "loader": loader, "criterion": nn.MSELoss(), "seed": 5}

    def wrong_type():
        return net()

    def wrong_mapping():
        return {"model": net(), "data": data()}

    def wrong_argument():
        return {"model": net(), "loader": data(), "critreion": nn.MSELoss()}

    def broken():
        return net().to("nowhere")

    def no_loss():
        return net(), [(x, torch.zeros(len(x), 3)) for x, _ in data()]
"""


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A folder to be in, with setup_file.py; what the command imports from it is forgotten afterwards."""
    (tmp_path / "setup_file.py").write_text(textwrap.dedent(SETUP))
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield tmp_path
    sys.modules.pop("setup_file", None)
    assert sys.path == before


def expected(**settings):
    namespace = {}
    exec(textwrap.dedent(SETUP), namespace)
    model, loader = namespace["build"]()
    return measure_sharpness(model, loader, **{"metrics": "epsilon_box", **settings})


def script(*arguments, **settings):
    program = Path(sysconfig.get_path("scripts")) / "sharpness"
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, **settings)


def error_of(capsys):
    """The one line on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("sharpness: error: ")
    return lines[0]


# --- the command itself


@pytest.mark.parametrize("arguments", [["--help"], ["measure", "--help"], ["list"], ["list", "--json"]])
def test_help_and_list_do_not_import_torch(arguments):
    program = (
        "import sys; from sharpness_plugins.cli import main; code = main(sys.argv[1:]);"
        "assert code == 0, code; assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_wrong_arguments_end_with_1_and_a_line(capsys):
    assert main(["measure", "a:b", "--batch-norm", "off"]) == 1
    assert "sharpness: error: argument --batch-norm: invalid choice: 'off'" in capsys.readouterr().err
    assert main([]) == 1
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sharpness-plugins ")


def test_ctrl_c_is_one_line_and_130(capsys, monkeypatch, setup):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sharpness_plugins.measure_sharpness", interrupt)
    monkeypatch.setattr("sharpness_plugins.cli._setup", lambda *args, **kwargs: {"model": None, "loader": None})
    assert main(["measure", "setup_file.py:build"]) == 130
    assert capsys.readouterr().err.strip() == "sharpness: interrupted"


def test_output_survives_a_narrow_encoding():
    done = script("list", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "epsilon_box" in done.stdout


def test_a_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    program = [sys.executable, "-m", "sharpness_plugins", "list"]
    with open(write, "wb") as pipe:
        done = subprocess.run(program, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# --- measure


def test_installed_script_measures_what_the_library_measures(setup):
    done = script("measure", "setup_file:build", "--metric", "epsilon_box:epsilon=5e-4", "--json", "-", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress in a log
    report = SharpnessReport.from_json(done.stdout)
    library = expected(metrics=EpsilonBox(epsilon=5e-4), seed=3)
    assert list(report) == ["epsilon_box"]
    assert report["epsilon_box"].value == pytest.approx(library["epsilon_box"].value, rel=1e-6)
    assert report.provenance["seed"] == 3


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "sharpness_plugins", "list", "hessian*"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "hessian_topk" in done.stdout
    assert "epsilon_box" not in done.stdout


def test_report_is_printed_and_written(setup, capsys):
    assert main(["measure", "setup_file.py:build", "--metric", "epsilon_box", "--json", "out.json"]) == 0
    printed, report = capsys.readouterr().out, SharpnessReport.from_json((setup / "out.json").read_text())
    assert f"{report['epsilon_box'].value:.5g}" in printed
    assert report["epsilon_box"].value == expected()["epsilon_box"].value


def test_options_reach_the_measurement(setup, capsys):
    options = ["--select", "0.*", "--select", "2.bias", "--max-samples", "7", "--seed", "4", "--device", "cpu", "--quiet"]
    options += ["--batch-norm", "batch", "--json", "-"]
    assert main(["measure", "setup_file:build", "--metric", "epsilon_box", *options]) == 0
    provenance = json.loads(capsys.readouterr().out)["provenance"]
    assert provenance["dim"] == 4 * 3 + 3 + 3
    assert provenance["num_samples"] == 7
    assert (provenance["seed"], provenance["batch_norm"], provenance["device"]) == (4, "batch", "cpu")


def test_a_mapping_gives_further_arguments_and_options_override_it(setup, capsys):
    command = ["measure", "setup_file:regression", "--metric", "epsilon_box", "--json", "-"]
    assert main(command) == 0
    provenance = json.loads(capsys.readouterr().out)["provenance"]
    assert provenance["seed"] == 5
    assert "MSELoss" in provenance["loss_rule"]
    assert main([*command, "--seed", "6"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]["seed"] == 6


def test_a_failed_metric_is_2_and_the_report_is_printed(setup, capsys):
    with fresh_registry() as registry, warnings.catch_warnings():

        class Bad:
            def __call__(self, objective, rng):
                raise RuntimeError("no luck today")

        registry.register(MetricSpec("bad", Bad, summary="fails"))
        options = ["--metric", "bad", "--metric", "epsilon_box", "--json", "out.json"]
        warnings.simplefilter("default")
        assert main(["measure", "setup_file:build", *options]) == 2
    printed = capsys.readouterr()
    assert "no luck today" in printed.out
    assert printed.err.startswith("sharpness: warning: ")
    report = SharpnessReport.from_json((setup / "out.json").read_text())
    assert report["epsilon_box"].value == expected()["epsilon_box"].value


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("setup_file", "must be module:function or path/to/file.py:function, got 'setup_file'"),
        ("setup_file:biuld", "has no function 'biuld'. Did you mean 'build'? Functions: net, data, build"),
        ("absent_module:build", "absent_module cannot be imported: ModuleNotFoundError: No module named 'absent_module'"),
        ("absent.py:build", "there is no file absent.py"),
        (
            "setup_file:wrong_type",
            "must return (model, loader), or a mapping with 'model' and 'loader'; it returned Sequential",
        ),
        ("setup_file:wrong_mapping", "it returned a mapping with 'model', 'data'"),
        ("setup_file:wrong_argument", "'critreion', which is no argument of measure_sharpness. Did you mean 'criterion'?"),
        ("setup_file:broken", "setup_file:broken failed: RuntimeError"),
        ("setup_file:no_loss", "loss"),
    ],
)
def test_a_wrong_setup_is_one_sentence(setup, capsys, reference, message):
    assert main(["measure", reference, "--metric", "epsilon_box"]) == 1
    assert message in error_of(capsys)


def test_an_error_in_the_users_file_names_the_line(setup, capsys):
    (setup / "faulty.py").write_text("x = 1\ny = x / 0\n")
    assert main(["measure", "faulty.py:build"]) == 1
    assert error_of(capsys).endswith("faulty.py cannot be imported: ZeroDivisionError: division by zero (faulty.py, line 2)")
    assert "faulty" not in sys.modules
    (setup / "faulty.py").write_text("x = (\n")
    assert main(["measure", "faulty.py:build"]) == 1
    assert "SyntaxError" in error_of(capsys)


def test_traceback_on_request(setup, capsys):
    assert main(["measure", "setup_file:broken", "--traceback"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--metric", "epsilon_boks"], "Did you mean 'epsilon_box'?"),
        (["--metric", "epsilon_box:epsilom=1e-3"], "Did you mean 'epsilon'?"),
        (["--metric", "epsilon_box:1e-3"], "'1e-3' is not KEY=VALUE"),
        (["--metric", "epsilon_box:epsilon=1e-3,fast"], "'fast' is not KEY=VALUE"),
        (["--metric", "epsilon_box:epsilon=-1"], "-1"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
        (["--device", "toaster"], "Here are: cpu"),
        (["--select", "9.*"], "9.*"),
    ],
)
def test_a_wrong_option_is_one_sentence(setup, capsys, option, message):
    assert main(["measure", "setup_file:build", *option]) == 1
    assert message in error_of(capsys)


# --- checkpoints


@pytest.fixture
def net():
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))


def loads(model, saved, tmp_path):
    """Whether ``saved``, as a file, brings the model to twice its weights."""
    goal = {name: 2 * value for name, value in model.state_dict().items()}
    torch.save(saved(goal), tmp_path / "c.pt")
    load_checkpoint(model, tmp_path / "c.pt")
    return all(torch.equal(value, goal[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "saved",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
        lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    ],
    ids=["plain", "state_dict", "model", "model_state_dict", "DataParallel", "compiled", "both"],
)
def test_checkpoint_forms(net, saved, tmp_path):
    assert loads(net, saved, tmp_path)


def test_checkpoint_into_a_wrapped_model(net, tmp_path):
    wrapped = torch.nn.Module()
    wrapped.module = net
    assert loads(wrapped, lambda state: {name.removeprefix("module."): v for name, v in state.items()}, tmp_path)


def test_measure_uses_the_checkpoint(setup, capsys):
    namespace = {}
    exec(textwrap.dedent(SETUP), namespace)
    model, loader = namespace["build"]()
    with torch.no_grad():
        model[0].weight.mul_(3)
    torch.save({"state_dict": model.state_dict()}, "c.pt")
    command = ["measure", "setup_file:build", "--metric", "epsilon_box", "--checkpoint", "c.pt", "--json", "-"]
    assert main(command) == 0
    value = SharpnessReport.from_json(capsys.readouterr().out)["epsilon_box"].value
    assert value == measure_sharpness(model, loader, "epsilon_box")["epsilon_box"].value
    assert value != expected()["epsilon_box"].value


class Custom:
    """What a pickle of a whole model contains: a class by name."""


def damaged(kind, state, path):
    if kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "truncated, old format":
        torch.save(state, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "text":
        path.write_text("this is not a checkpoint\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code":
        torch.save({"state_dict": state, "config": Custom()}, path)
    elif kind == "whole model":
        torch.save(torch.nn.Linear(2, 2), path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "no state":
        torch.save({"epoch": 3}, path)
    elif kind == "missing":
        torch.save({name: v for name, v in state.items() if name != "1.bias"}, path)
    elif kind == "surplus":
        torch.save({**state, "head.weight": torch.zeros(1)}, path)
    elif kind == "shape":
        torch.save({**state, "0.weight": torch.zeros(7, 4)}, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "there is no checkpoint"),
        ("folder", "is a folder"),
        ("truncated", "cut off or was not written by torch.save"),
        ("truncated, old format", "cut off or was not written by torch.save"),
        ("text", "cut off or was not written by torch.save"),
        ("empty", "cut off or was not written by torch.save"),
        ("code", "could run any code"),
        ("whole model", "could run any code"),
        ("tensor", "holds no state dict, but a Tensor"),
        ("no state", "holds no state dict, but a mapping with 'epoch'"),
        ("missing", "does not fit Sequential: the file lacks 1.bias."),
        ("surplus", "the model lacks head.weight."),
        ("shape", "0.weight is (7, 4) in the file and (3, 4) in the model"),
    ],
)
def test_a_wrong_checkpoint_is_one_sentence_and_the_model_stays(net, tmp_path, kind, message):
    path = tmp_path / "c.pt"
    damaged(kind, {name: 2 * value for name, value in net.state_dict().items()}, path)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CommandError) as raised:
        load_checkpoint(net, path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_wrong_checkpoint_ends_the_command_with_1(setup, capsys):
    Path("c.pt").write_text("nothing")
    assert main(["measure", "setup_file:build", "--checkpoint", "c.pt"]) == 1
    assert "checkpoint c.pt cannot be read" in error_of(capsys)


# --- list and doctor


def test_list_names_every_metric_with_its_origin(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("epsilon_box", "hessian_topk", "random_subspace"):
        assert any(line.startswith(name) and "sharpness-plugins" in line for line in lines)


def test_list_json(capsys):
    assert main(["list", "epsilon*", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert [metric["name"] for metric in metrics] == ["epsilon_box"]
    assert metrics[0]["duplicate"] is False


def test_list_without_a_match_is_an_error(capsys):
    with fresh_registry():  # other tests have metrics of their own
        assert main(["list", "nothing*"]) == 1
    told = error_of(capsys)
    assert "nothing matches 'nothing*'. There are metrics: adaptive_topk, epsilon_box" in told
    assert "schedules: cap, double" in told


def test_list_shows_every_kind_or_one(capsys):
    assert main(["list"]) == 0
    heads = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "what it is" in line]
    assert heads == ["metric", "schedule", "signal", "coupling", "optimizer"]
    assert main(["list", "--kind", "coupling", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["name"] for one in told["couplings"]} == {"adam_sde", "adascale", "linear", "momentum", "none", "sqrt"}
    assert "metrics" not in told


class Rival:
    def __call__(self, objective, rng):
        raise AssertionError("listing ran a metric")


def test_list_marks_a_name_offered_twice(capsys):
    with fresh_registry() as registry:
        registry.register(MetricSpec("epsilon_box", Rival, summary="another"))
        assert main(["list", "epsilon_box"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("one of several named 'epsilon_box'" in line for line in lines) == 2
    assert any(line.startswith("builtin:epsilon_box") for line in lines)


@pytest.fixture
def faulty_plugin(tmp_path, monkeypatch):
    """A distribution on the path whose plugin cannot be imported."""
    info = tmp_path / "acme_sharpness-0.3.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-sharpness\nVersion: 0.3.1\n")
    (info / "entry_points.txt").write_text("[sharpness_plugins]\nfisher = acme_absent.plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with fresh_registry():
        yield


def test_list_ends_with_the_plugins_that_failed(faulty_plugin, capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr()
    assert "plugin 'fisher' from acme-sharpness 0.3.1, failed: ModuleNotFoundError" in printed.out.splitlines()[-1]
    assert printed.err == ""


def test_doctor_fails_with_a_plugin_that_failed(faulty_plugin, capsys):
    assert main(["doctor"]) == 1
    assert "failed, acme-sharpness 0.3.1" in capsys.readouterr().out


def test_a_plugin_that_failed_is_a_line_while_measuring(faulty_plugin, setup, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["measure", "setup_file:build", "--metric", "epsilon_box"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("sharpness: warning: ")
    assert len(err.splitlines()) == 1


def test_doctor_lists_versions_devices_and_what_is_missing(capsys, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "timm" else find(name, *rest))
    with fresh_registry():
        code = main(["doctor"])
    out = capsys.readouterr().out
    assert code == 0
    assert torch.__version__.split("+")[0] in out
    assert "cpu (" in out
    assert 'not installed; pip install "sharpness-plugins[timm]"' in out
    assert "plugin builtin" in out


# --- demo


@pytest.fixture
def tiny_demo(monkeypatch):
    """The demo on the smallest settings; only what the command does not set is changed."""
    small = {"widths": (64, 8, 10), "num_train": 60, "warm_epochs": 1, "max_epochs": 4}
    monkeypatch.setattr("sharpness_plugins.experiments.demo.DemoSettings", lambda *given: DemoSettings(*given, **small))


def test_demo_prints_the_table_and_names_the_folder(tiny_demo, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--seeds", "1", "--batch-sizes", "60", "15", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[2].split()[:6] == ["batch", "15", "batch", "60", "warm", "start"]
    assert "Training loss is NOT matched: 3 of 3 networks" in printed.out
    assert str(out) in printed.out.splitlines()[-1]
    assert {path.name for path in out.iterdir()} == {
        "results.json", "results.csv", "table.txt", "alpha_plot.png", "sharpness_vs_batch_size.png",
    }  # fmt: skip
    lines = printed.err.splitlines()  # in a log: a line per network
    assert [line.partition(":")[0] for line in lines] == [
        "network 1 of 3 (seed 0, batch 15)",
        "network 2 of 3 (seed 0, batch 60)",
        "network 3 of 3 (seed 0, batch 15 for 1 epoch then batch 60)",
    ]
    assert "target NOT reached" in lines[0]
    settings = json.loads((out / "results.json").read_text())["settings"]
    assert (settings["seeds"], settings["batch_sizes"], settings["device"]) == (1, [15, 60], "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--batch-sizes", "16"], "at least two different"),
        (["--batch-sizes", "16", "5000"], "the 500 training samples"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used"),
    ],
)
def test_demo_refuses_wrong_options_before_it_trains(options, message, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), *options]) == 1
    assert message in error_of(capsys)
    assert not (tmp_path / "demo").exists()


def test_demo_refuses_a_file_as_folder_before_it_trains(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in error_of(capsys)


def test_demo_without_scikit_learn_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert 'pip install "sharpness-plugins[demo]"' in error_of(capsys)


# --- warm start


TINY_WARM_START = ["--epochs", "1", "--seeds", "2", "--small-batch", "200", "--large-batch", "400"]


def test_warm_start_prints_the_tables_and_writes_the_files(tmp_path, capsys):
    out = tmp_path / "warm"
    assert main(["warm-start", *TINY_WARM_START, "--match", "steps:3", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "Warm start: batch 200, then batch 400 with a new optimizer to 3 steps" in printed.out
    assert "matched in steps, not in loss" in printed.out
    assert printed.out.splitlines()[-1].endswith(" s)")
    assert {path.name for path in out.iterdir()} == {"results.json", "results.csv", "table.txt", "warm_start.png"}
    assert (out / "warm_start.png").read_bytes().startswith(b"\x89PNG")
    curve = WarmStartCurve.from_json((out / "results.json").read_text())
    assert (curve.settings.epochs, curve.settings.seeds, str(curve.settings.match)) == ((0, 1), (0, 1), "steps:3")
    assert f"{curve}\n" == (out / "table.txt").read_text()
    assert [line.partition(":")[0] for line in printed.err.splitlines()][:2] == [
        "network 1 of 8 (seed 0, batch 200)",
        "network 2 of 8 (seed 0, batch 400)",
    ]


def test_warm_start_quick_is_small_unless_told(tmp_path, monkeypatch):
    asked = []

    def stop(settings, *rest, **more):
        asked.append((settings.epochs, len(settings.seeds), settings.small_batch, settings.large_batch, str(settings.match)))
        raise KeyboardInterrupt

    monkeypatch.setattr("sharpness_plugins.experiments.warm_start.run_warm_start", stop)
    for options in ([], ["--quick"], ["--quick", "--seeds", "1", "--epochs", "3"]):
        assert main(["warm-start", "--out", str(tmp_path / "w"), *options]) == 130
    assert asked == [
        ((0, 5, 12, 25, 50), 6, 8, 400, "loss:0.005"),
        ((0, 12), 2, 8, 400, "loss:0.005"),
        ((0, 3), 1, 8, 400, "loss:0.005"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "seeds must be at least one"),
        (["--epochs", "-1"], "epochs must be whole numbers from 0 on, got (-1,)"),
        (["--small-batch", "400"], "small_batch must be at least 1 and below large_batch, got 400 and 400"),
        (["--large-batch", "801"], "the 800 training samples, got 801"),
        (["--match", "accuracy:1"], "match must be a positive loss, or a whole number of epochs or steps"),
        (["--match", "loss"], "match must be loss:VALUE, epochs:N or steps:N, got 'loss'"),
    ],
)
def test_warm_start_refuses_wrong_options_before_it_trains(options, message, tmp_path, capsys):
    assert main(["warm-start", "--out", str(tmp_path / "warm"), *options]) == 1
    assert message in error_of(capsys)
    assert not (tmp_path / "warm").exists()


def test_warm_start_without_scikit_learn_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["warm-start", "--out", str(tmp_path / "warm")]) == 1
    assert 'pip install "sharpness-plugins[demo]"' in error_of(capsys)


def test_warm_start_interrupted_keeps_the_seeds_that_are_complete(tmp_path, capsys, monkeypatch):
    class Impatient(ExperimentProgress):
        def __call__(self, event):
            if event.seed == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr("sharpness_plugins.cli.ExperimentProgress", Impatient)
    assert main(["warm-start", *TINY_WARM_START, "--match", "steps:3", "--out", str(tmp_path)]) == 130
    printed = capsys.readouterr()
    assert printed.err == "sharpness: interrupted after 1 of 2 seeds\n"
    curve = WarmStartCurve.from_json((tmp_path / "results.json").read_text())
    assert [run.seed for run in curve.runs] == [0]
    assert str(curve) in printed.out


class Terminal:
    def __init__(self, is_terminal):
        self.text, self.isatty = "", lambda: is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_redraws_on_a_terminal_only(monkeypatch):
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_, **__: os.terminal_size((30, 20)))  # pytest asks, too
    about = (1, 2, 0, Recipe(16))
    events = [ExperimentEvent(*about, "epoch 1, training loss 2.2"), ExperimentEvent(*about, "19 epochs", finished=True)]
    shown = {}
    for is_terminal in (True, False):
        stream = Terminal(is_terminal)
        progress = ExperimentProgress(stream)
        for event in events:
            progress(event)
        shown[is_terminal] = stream.text
    assert shown[False] == "network 1 of 2 (seed 0, batch 16): 19 epochs\n"
    drawn, _, kept = shown[True].removeprefix("\r\x1b[2K").partition("\r\x1b[2K")
    assert drawn == str(events[0])[:29]  # a line that wrapped could not be redrawn
    assert kept == shown[False]
