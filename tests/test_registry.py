"""The registry against real distributions: folders of tests/data/plugins with a dist-info, put on the path."""

import copy
import importlib
import inspect
import math
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest

from sharpness_plugins import plugin_loading, registry
from sharpness_plugins.errors import DuplicateNameError, PluginWarning, SharpnessError, UnknownNameError
from sharpness_plugins.registry import (
    MetricSpec,
    available_metrics,
    call_hook,
    first_answer,
    fresh_registry,
    get_metric,
    metric,
    metric_name,
    metric_provenance,
    metric_settings,
    plugins,
)
from sharpness_plugins.report import Kind, MetricResult
from sharpness_plugins.specs import spec_of

DATA = Path(__file__).parent / "data" / "plugins"


class Objective:
    """As much of an objective as the metrics here ask for."""

    def value(self):
        return 3.0


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.delenv("SHARPNESS_PLUGINS_DISABLE", raising=False)
    monkeypatch.delenv("SHARPNESS_PLUGINS_STRICT", raising=False)
    with fresh_registry() as fresh:
        yield fresh
    for name in [name for name in sys.modules if name.startswith("sp_")]:
        del sys.modules[name]


@pytest.fixture
def install(monkeypatch):
    def put_on_path(*distributions):
        for distribution in distributions:
            monkeypatch.syspath_prepend(str(DATA / distribution))

    return put_on_path


ONE_METRIC = "from sharpness_plugins import metric\n@metric('{}')\ndef f(objective): return 0.0\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a distribution and puts it on the path: for what is too small for a folder of its own."""

    def write_distribution(name, entry_point, **modules):
        info = tmp_path / f"{name.replace('-', '_')}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[sharpness_plugins]\n{entry_point}\n")
        for module, text in modules.items():
            (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))

    write_distribution.folder = tmp_path
    return write_distribution


def warnings_of(use):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use()
    assert all(issubclass(warning.category, PluginWarning) for warning in caught)
    return [str(warning.message) for warning in caught]


def only_warning(use=plugins):
    (sentence,) = warnings_of(use)
    return sentence


def record_of(name):
    (record,) = [record for record in plugins() if record.name == name]
    return record


# --- what loads --------------------------------------------------------------------------------------------------


def test_builtins_are_a_plugin_like_any_other():
    assert plugins()[0].name == "builtin"
    assert plugins()[0].status == "loaded"
    assert {"epsilon_box", "random_subspace", "hessian_topk"} <= set(plugins()[0].offers["metric"])
    offer = available_metrics()["epsilon_box"]
    assert (offer.plugin, offer.distribution) == ("builtin", "sharpness-plugins")


def test_module_with_decorated_metrics_is_a_plugin(install):
    install("good")
    offers = available_metrics("good_*")
    assert list(offers) == ["good_loss", "good_rise"]
    assert {(o.plugin, o.distribution, o.version) for o in offers.values()} == {("good", "sp-good", "1.2")}
    assert offers["good_loss"].spec.summary == "Loss times scale."
    assert offers["good_rise"].spec.summary == ""  # not the signature that @dataclass writes
    result = get_metric("good_loss", scale=2.0)(Objective(), None)
    assert result.value == 6.0
    rise = get_metric("good_rise", size=0.25)
    assert metric_settings(rise) == {"size": 0.25}
    assert metric_provenance(rise) == metric_provenance(get_metric("good_loss")) == ("good", "sp-good", "1.2")


def test_dotted_factory_is_imported_on_first_use_only(install):
    install("lazy")
    assert available_metrics()["lazy_fisher"].spec.summary == "trace of the Fisher matrix"
    assert "sp_lazy" in sys.modules
    assert "sp_lazy_metrics" not in sys.modules
    assert get_metric("lazy_fisher", samples=4)(Objective(), None) == 4.0
    assert metric_provenance(get_metric("lazy_fisher")) == ("lazy", "sp-lazy", "0.2")


def test_dotted_factory_may_name_a_decorated_function(install):
    install("lazy")
    for _ in range(2):  # the second time its module, and with it the decorator, has been run
        assert get_metric("lazy_loss", scale=5.0)(Objective(), None).value == 5.0
    assert available_metrics("lazy_loss")["lazy_loss"].plugin == "lazy"
    assert "lazy_private" not in available_metrics()  # its plugin does not offer it


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lazy_typo", "AttributeError: module 'sp_lazy_metrics' has no attribute 'Fischer'"),
        ("lazy_broken", "SystemExit: no licence"),
        ("lazy_number", "that is 3, not callable"),
    ],
)
def test_factory_that_cannot_be_imported_names_its_plugin(install, name, reason):
    install("lazy")
    with pytest.raises(ImportError) as caught:
        get_metric(name)
    assert reason in str(caught.value)
    assert "'lazy' (sp-lazy 0.2)" in str(caught.value)


def test_factory_that_makes_no_metric_is_refused(install):
    install("lazy")
    with pytest.raises(TypeError, match=r"'lazy_not_a_metric' of plugin 'lazy' \(sp-lazy 0.2\) is 3"):
        get_metric("lazy_not_a_metric")


def test_entry_point_may_name_an_object_a_class_a_spec_or_a_metric(install):
    install("kinds")
    sentences = warnings_of(plugins)
    by_name = {offer.spec.name: offer.plugin for offer in available_metrics("by_*").values()}
    assert by_name == {
        "by_instance": "an_instance",
        "by_class": "a_class",
        "by_spec": "a_spec",
        "by_function": "a_function",
        "by_metric_class": "a_metric_class",
    }
    # One class under four names: it is known by the one that it bears itself.
    assert metric_provenance(get_metric("by_spec")) == ("a_metric_class", "sp-kinds", "0.1")
    assert len(sentences) == 3
    empty, needs_arguments, not_there = sentences
    assert "'empty'" in empty
    assert "neither a @metric nor a function marked with @hookimpl" in empty
    assert "TypeError" in needs_arguments
    assert "AttributeError: module 'sp_kinds' has no attribute 'absent'" in not_there
    assert record_of("empty").status == record_of("not_there").status == "failed"


def test_imported_metric_belongs_to_the_distribution_that_defines_it(install):
    install("good", "borrows")  # sp-borrows loads first
    assert {key: offer.distribution for key, offer in available_metrics("[bg]o*").items()} == {
        "borrows_own": "sp-borrows",
        "good_loss": "sp-good",
        "good_rise": "sp-good",
    }


def test_distributions_with_one_entry_point_name_both_load(install):
    install("twin_a", "twin_b")
    assert [record.distribution for record in plugins() if record.name == "twin"] == ["sp-twin-a", "sp-twin-b"]
    assert list(available_metrics("twin_*")) == [
        "sp-twin-a:twin_shared",
        "sp-twin-b:twin_shared",
        "twin_a",
        "twin_b",
    ]
    with pytest.raises(DuplicateNameError, match="Ask for 'sp-twin-a:twin_shared' or 'sp-twin-b:twin_shared'"):
        get_metric("twin:twin_shared")
    assert get_metric("sp-twin-b:twin_shared")(Objective(), None).value == ord("b")
    assert get_metric("SP_Twin_A:twin_shared")(Objective(), None).value == ord("a")


# --- what does not -----------------------------------------------------------------------------------------------

FAULTY = {
    "import_error": ("importerr", "skipped", "ModuleNotFoundError: No module named 'sp_core_that_is_not_there'", []),
    "exits": ("exits", "skipped", "SystemExit: 0", []),
    "hook_raises": ("hookraises", "in part", "RuntimeError: licence server is away", ["before_the_fault"]),
    "misspelt": (
        "misspelt",
        "in part",
        "no hook 'sharpness_metrcs'. Did you mean 'sharpness_metrics'?",
        ["beside_misspelt"],
    ),
    "unmarked": ("unmarked", "skipped", "sharpness_metrics is not marked with @hookimpl", []),
    "wrong_argument": (
        "wrongarg",
        "in part",
        "sharpness_measure_end(raport) does not fit its hook, which may ask for these arguments: report",
        ["beside_wrong_argument"],
    ),
    "wrong_types": (
        "wrongtypes",
        "in part",
        "yielded 'sp_wrong_types:Metric', which is not a MetricSpec; sharpness_metrics yielded None, which is not "
        "a MetricSpec; it offers metric 'among_wrong_types' twice",
        ["among_wrong_types"],
    ),
}


@pytest.mark.parametrize("distribution", FAULTY)
def test_faulty_plugin_is_one_warning_and_keeps_what_works(install, distribution):
    name, extent, reason, kept = FAULTY[distribution]
    install("good", distribution)
    sentence = only_warning()
    assert sentence.startswith(f"sharpness plugin {name!r} from sp-{distribution.replace('_', '-')} 0.1 ")
    assert extent in sentence.split(":")[0]
    assert reason in sentence
    assert sentence.endswith(f"Disable it with SHARPNESS_PLUGINS_DISABLE={name}")
    assert list(record_of(name).offers.get("metric", ())) == kept
    assert record_of(name).status == ("loaded" if kept else "failed")
    assert reason in record_of(name).error
    assert set(kept) | {"good_loss", "epsilon_box"} <= set(available_metrics())
    assert "import_error_loss" not in available_metrics()
    assert warnings_of(plugins) == []  # said once


def test_all_faulty_plugins_at_once(install):
    install("good", "lazy", "bad_numbers", *FAULTY)
    assert len(warnings_of(plugins)) == len(FAULTY)
    assert {"good_loss", "lazy_fisher", "raises_always", "returns_nan", "epsilon_box"} <= set(available_metrics())
    with pytest.raises(UnknownNameError, match=r"Plugins not in use: .*'importerr' \(failed\)"):
        get_metric("import_error_loss")


def test_warnings_turned_into_errors_do_not_lose_the_rest(install):
    install("exits", "good")
    with pytest.raises(PluginWarning, match="'exits'"):  # pytest runs with warnings as errors
        available_metrics()
    assert "good_loss" in available_metrics()


def test_metrics_that_raise_or_return_nan_load(install):
    install("bad_numbers")
    assert math.isnan(get_metric("returns_nan")(Objective(), None).value)
    with pytest.raises(ArithmeticError):
        get_metric("raises_always")(Objective(), None)


def test_keyboard_interrupt_passes_and_leaves_no_half_built_registry(install, monkeypatch):
    install("ctrl_c", "good")
    with pytest.raises(KeyboardInterrupt):
        available_metrics()
    monkeypatch.setenv("SHARPNESS_PLUGINS_DISABLE", "ctrl_c")
    assert "good_loss" in available_metrics()
    assert [record.name for record in plugins()].count("builtin") == 1


def test_missing_metadata_of_a_plugin_does_not_stop_it(write, install):
    write("sp-nameless", "nameless = sp_nameless", sp_nameless=ONE_METRIC.format("nameless"))
    next(write.folder.glob("*.dist-info/METADATA")).unlink()
    install("exits")
    sentences = warnings_of(plugins)
    assert available_metrics()["nameless"].distribution == "unknown"
    assert len(sentences) == 1


def test_distribution_of_damaged_metadata_is_unknown():
    class Damaged:
        @property
        def dist(self):
            raise KeyError("Version")

    assert plugin_loading._distribution(Damaged()) == ("unknown", "unknown")


def test_unreadable_entry_points_leave_the_builtins(monkeypatch):
    def unreadable(group):
        raise TypeError("damaged entry_points.txt")

    monkeypatch.setattr(plugin_loading, "entry_points", unreadable)
    assert "cannot be read: TypeError: damaged entry_points.txt" in only_warning()
    assert "epsilon_box" in available_metrics()


def test_warning_about_a_shared_entry_point_name_disables_only_the_faulty_one(install, write):
    install("twin_a")
    write("sp-twin-c", "twin = sp_not_there")
    assert only_warning().endswith("SHARPNESS_PLUGINS_DISABLE=sp-twin-c")


def test_metric_exported_by_two_distributions_is_one_metric(install, write):
    install("good")
    write("sp-reexport", "again = sp_reexport", sp_reexport="from sp_good import loss")
    assert available_metrics("good_loss")["good_loss"].distribution == "sp-good"
    assert record_of("again").offers == {"metric": ("good_loss",)}


def test_lazy_names_of_a_plugin_module_are_left_alone(write):
    lazy = (
        "woken = []\n"
        "def __dir__(): return ['heavy', 'sharpness_metrics']\n"
        "def __getattr__(name): woken.append(name); raise AttributeError(name)\n"
    )
    write("sp-heavy", "heavy = sp_heavy", sp_heavy=lazy + ONE_METRIC.format("light"))
    assert "light" in available_metrics()
    assert not {"heavy", "sharpness_metrics"} & set(sys.modules["sp_heavy"].woken)


@pytest.mark.parametrize(
    ("marker", "reason"),
    [
        ("@hookimpl(wrapper=True)", "is a hook wrapper, which is not supported"),
        ("@hookimpl(specname='sharpness_measure_done')", "no hook 'sharpness_measure_done'"),
        ("@hookimpl(specname='sharpness_measure_done', optionalhook=True)", None),
    ],
)
def test_hook_options(write, marker, reason):
    hook = f"from sharpness_plugins import hookimpl\n{marker}\ndef sharpness_measure_end(report): yield\n"
    write("sp-options", "options = sp_options", sp_options=hook + ONE_METRIC.format("beside_options"))
    sentences = warnings_of(plugins)
    assert len(sentences) == (reason is not None)
    assert reason is None or reason in sentences[0]
    assert "beside_options" in available_metrics()
    assert list(call_hook("sharpness_measure_end", report=None)) == []


@pytest.mark.parametrize("order", ["@staticmethod\n    @hookimpl", "@hookimpl\n    @staticmethod"])
def test_static_method_is_a_hook_or_is_said_not_to_be(write, order):
    write(
        "sp-static",
        "static = sp_static:Plugin",
        sp_static="from sharpness_plugins import hookimpl\n"
        f"class Plugin:\n    {order}\n    def sharpness_measure_end(report): return report\n",
    )
    sentences = warnings_of(plugins)
    answers = list(call_hook("sharpness_measure_end", report=5))
    assert (answers == [("static", 5)]) != any("sharpness_measure_end" in sentence for sentence in sentences)
    assert answers or order.startswith("@hookimpl")


@pytest.mark.parametrize("named", ["exits", "sp-exits", "SP_Exits", "good, exits ,"])
def test_disabled_plugin_is_not_imported(install, monkeypatch, named):
    install("exits")
    monkeypatch.setenv("SHARPNESS_PLUGINS_DISABLE", named)
    assert record_of("exits").status == "disabled"
    assert "sp_exits" not in sys.modules


def test_disabling_resolves_a_duplicate(install, monkeypatch):
    install("good", "duplicate")
    monkeypatch.setenv("SHARPNESS_PLUGINS_DISABLE", "sp-duplicate")
    assert available_metrics("good_loss")["good_loss"].plugin == "good"


@pytest.mark.parametrize("distribution", FAULTY)
def test_strict_mode_raises_and_names_the_plugin(install, monkeypatch, distribution):
    install(distribution)
    monkeypatch.setenv("SHARPNESS_PLUGINS_STRICT", "1")
    with pytest.raises(SharpnessError, match=f"plugin '{FAULTY[distribution][0]}' from sp-"):
        plugins()
    monkeypatch.setenv("SHARPNESS_PLUGINS_STRICT", "0")
    assert only_warning()


# --- names -------------------------------------------------------------------------------------------------------


def test_name_offered_twice_names_both_and_the_way_out(install):
    install("good", "duplicate")
    with pytest.raises(DuplicateNameError) as caught:
        get_metric("good_loss")
    for part in ("'good' (sp-good 1.2)", "'dup' (sp-duplicate 3.0)", "'dup:good_loss'", "'good:good_loss'", "DISABLE="):
        assert part in str(caught.value)
    assert get_metric("dup:good_loss")(Objective(), None) == 7.0
    assert get_metric("good:good_loss")(Objective(), None).value == 3.0
    assert "good_loss" not in available_metrics()
    assert list(available_metrics("good_loss")) == ["dup:good_loss", "good:good_loss"]
    assert [get_metric(key) for key in available_metrics("good_loss")]


def test_builtin_name_is_not_overridden_in_silence(install):
    install("duplicate")
    with pytest.raises(DuplicateNameError, match=r"'builtin' \(sharpness-plugins .*'dup' \(sp-duplicate 3.0\)"):
        get_metric("epsilon_box")
    assert type(get_metric("builtin:epsilon_box")).__name__ == "EpsilonBox"
    assert get_metric("dup:epsilon_box")(Objective(), None) == 7.0


def test_qualified_name_works_without_need(install):
    install("good")
    assert get_metric("good:good_loss") == get_metric("sp-good:good_loss") == get_metric("good_loss")
    with pytest.raises(UnknownNameError, match="Did you mean 'good:good_loss'"):
        get_metric("god:good_loss")
    with pytest.raises(UnknownNameError):
        get_metric("builtin:good_loss")


def test_unknown_name_suggests_and_lists(install):
    install("good")
    with pytest.raises(
        UnknownNameError, match=r"no metric 'good_los'\. Did you mean 'good_loss'\? Available: .*epsilon_box"
    ):
        get_metric("good_los")


@pytest.mark.parametrize("name", ["good_loss", "good_rise", "lazy_fisher"])
def test_unknown_setting_names_metric_and_settings(install, name):
    install("good", "lazy")
    near, shown = {
        "good_loss": ("scal", "'scale'? Settings: scale=1.0"),
        "good_rise": ("sise", "'size'? Settings: size=0.5"),
        "lazy_fisher": ("sample", "'samples'? Settings: samples=10, layers=()"),
    }[name]
    with pytest.raises(TypeError) as caught:
        get_metric(name, **{near: 1})
    assert str(caught.value) == f"metric {name!r} has no setting {near!r}. Did you mean {shown}"


def test_required_setting_is_asked_for(own_registry):
    class Scaled:
        def __init__(self, scale, offset=0):
            self.scale = scale

        def __call__(self, objective, rng):
            return self.scale

    own_registry.register(MetricSpec("scaled", Scaled))
    with pytest.raises(TypeError, match=r"metric 'scaled' needs scale\. Settings: scale, offset=0"):
        get_metric("scaled", offset=1)
    assert get_metric("scaled", scale=2)(Objective(), None) == 2


@pytest.mark.parametrize("name", ["", "a-b", "a b", "1a", "a:b", "a.b"])
def test_spec_name_is_an_identifier(name):
    with pytest.raises(ValueError, match="identifier"):
        MetricSpec(name, "a:b")


@pytest.mark.parametrize("factory", ["a.b", "a.b:", ":c", "a b:c", "a.b:c:d", "a/b.py:c"])
def test_spec_factory_text_is_checked(factory):
    with pytest.raises(ValueError, match=r"must look like 'package.module:attribute'"):
        MetricSpec("a", factory)


def test_spec_types_are_checked():
    with pytest.raises(TypeError, match="callable"):
        MetricSpec("a", 3)
    with pytest.raises(TypeError, match="string"):
        MetricSpec(print, "a:b")


# --- hooks -------------------------------------------------------------------------------------------------------


def test_every_listener_hears_though_one_raises(install):
    install("listeners")
    answers = []
    sentence = only_warning(lambda: answers.extend(call_hook("sharpness_measure_end", report="R")))
    assert answers == [("c_quiet", "second"), ("a_quiet", "first")]
    assert "'b_loud' from sp-listeners 0.1 failed in sharpness_measure_end: SystemExit: 3" in sentence
    assert sentence.endswith("SHARPNESS_PLUGINS_DISABLE=b_loud")


def test_hooks_are_called_though_nobody_reads_the_answers(install, monkeypatch):
    install("listeners")
    monkeypatch.setenv("SHARPNESS_PLUGINS_DISABLE", "b_loud")
    call_hook("sharpness_measure_end", report="R")
    assert sys.modules["sp_listeners"].heard == [("second", "R"), ("first", "R")]


def test_first_answer_wins_and_ends_the_asking(install, monkeypatch):
    install("listeners")
    monkeypatch.setenv("SHARPNESS_PLUGINS_DISABLE", "b_loud")
    ask = {"model": None, "criterion": None}
    assert first_answer("sharpness_resolve_loss", batch="pair", **ask) == "second: pair"
    assert sys.modules["sp_listeners"].heard == [("second", "pair")]
    assert first_answer("sharpness_resolve_loss", batch="unknown", **ask) is None


def test_our_own_wrong_call_is_not_blamed_on_a_plugin(install):
    install("listeners")
    with pytest.raises(TypeError, match="sharpness_measure_end is called with report; got raport"):
        call_hook("sharpness_measure_end", raport=None)


def test_failing_listener_raises_in_strict_mode(install, monkeypatch):
    install("listeners")
    monkeypatch.setenv("SHARPNESS_PLUGINS_STRICT", "1")
    with pytest.raises(SharpnessError, match="'b_loud'"):
        call_hook("sharpness_measure_end", report=None)


def test_docstring_of_every_hook_holds_a_plugin_that_loads(own_registry):
    for name in own_registry._hooks().names:
        text = inspect.getdoc(getattr(registry.Hooks, name)).split("::\n", 1)[1]
        code = "\n".join(line for line in text.splitlines() if line.startswith(" ") or not line)
        scope = {}
        exec(textwrap.dedent(code), scope)
        plugin = type("Plugin", (), {name: staticmethod(scope[name])})()
        taken, problems = registry.HookTable(registry.Hooks).add(plugin, None)
        assert (taken, problems) == ([name], [])


# --- the decorator -----------------------------------------------------------------------------------------------


@metric("gradient_like", summary="for the tests")
def gradient_like(objective, rng, *, order=2.0, label="x"):
    return objective.value() * order if rng is None else rng


@metric("without_rng")
def without_rng(objective, power=1):
    return objective.value() ** power


def test_decorated_function_is_a_metric():
    result = gradient_like(Objective(), None)
    assert isinstance(result, MetricResult)
    assert (result.value, result.status.kind) == (6.0, Kind.ESTIMATE)
    assert result.status.message == "value as returned by gradient_like"
    assert gradient_like(Objective(), 11).value == 11.0  # the generator arrives
    assert without_rng.with_settings(power=2)(Objective(), object()).value == 9.0
    assert metric_name(gradient_like) == "gradient_like"
    assert metric_settings(gradient_like.with_settings(order=1.0)) == {"order": 1.0, "label": "x"}
    assert gradient_like.settings["order"] == 2.0
    assert repr(without_rng) == "without_rng(power=1)"


def test_settings_of_a_function_are_checked_and_frozen():
    with pytest.raises(TypeError, match=r"'without_rng' has no setting 'pwer'. Did you mean 'power'\? Settings: power=1"):
        without_rng.with_settings(pwer=2)
    with pytest.raises(FrozenInstanceError):
        without_rng.name = "other"
    with pytest.raises(TypeError):
        without_rng.settings["power"] = 2


def test_result_passes_and_numbers_are_taken():
    torch = pytest.importorskip("torch")
    whole = MetricResult(1.0)
    cases = [(whole, None), (True, 1.0), (torch.tensor(2.0, requires_grad=True), 2.0), (torch.tensor([3.0]), 3.0)]
    for returned, value in cases:
        got = metric("returns")(lambda objective, returned=returned: returned)(None, None)
        assert got is whole if value is None else got.value == value


@pytest.mark.parametrize("returned", [None, "0.5", [1.0, 2.0], 1j], ids=repr)
def test_anything_but_a_number_is_refused(returned):
    with pytest.raises(TypeError, match=f"'returns' must return one number .* a {type(returned).__name__}"):
        metric("returns")(lambda objective: returned)(None, None)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda: 0, "takes no objective"),
        (lambda *, objective=None: 0, "takes no objective"),
        (lambda objective, generator: 0, "'generator' has no default"),
        (lambda objective, *, scale: 0, "'scale' has no default"),
        (lambda objective, **settings: 0, r"'\*\*settings' is not a setting"),
        (lambda objective, rng, /: 0, "'rng' is not a setting with a name"),
    ],
)
def test_function_with_another_signature_is_refused_at_once(function, reason):
    with pytest.raises(TypeError, match=reason):
        metric("refused")(function)
    assert "refused" not in available_metrics()


def test_decorator_without_a_name_says_how():
    with pytest.raises(TypeError, match=r'@metric\("a_name"\)'):

        @metric
        def forgotten(objective):
            return 0.0


def test_decorated_class_stays_itself():
    @dataclass(frozen=True)
    class Before:
        k: int = 5

        def __call__(self, objective, rng):
            return float(self.k)

    after = metric("top")(Before)
    assert after is Before
    assert metric_name(after()) == "top"
    assert metric_settings(after(k=2)) == {"k": 2}
    assert get_metric("top", k=3) == Before(3)

    @dataclass(frozen=True)
    class Heir(Before):
        pass

    assert metric_provenance(Before()) == (__name__, "", "")
    assert metric_provenance(Heir()) is None
    assert spec_of(Before).name == "top"
    assert spec_of(Heir) is None  # else a plugin that offers the heir would offer the base


def test_class_that_is_no_frozen_dataclass_is_refused():
    class Plain:
        pass

    @dataclass
    class Mutable:
        pass

    @dataclass(frozen=True)
    class Named:
        name: str = "x"

    for cls, reason in [(Plain, "frozen"), (Mutable, "frozen"), (Named, "field 'name'")]:
        with pytest.raises(TypeError, match=reason):
            metric("refused")(cls)


def define(source, module="__main__"):
    exec(source, {"__name__": module, "metric": metric})


def test_running_a_cell_again_replaces_the_metric():
    define("@metric('cell')\ndef f(objective): return 1.0")
    define("@metric('cell')\ndef f(objective): return 2.0")
    assert get_metric("cell")(None, None).value == 2.0
    define("@metric('cell')\ndef renamed(objective): return 3.0")
    assert get_metric("cell")(None, None).value == 3.0
    offer = available_metrics()["cell"]
    assert (offer.plugin, offer.distribution, offer.version) == ("__main__", "", "")


def test_functions_made_in_a_loop_are_all_kept():
    define("for p in (1, 2):\n    @metric(f'l{p}')\n    def norm(objective, p=p): return p", module="somewhere")
    assert [get_metric(name)(None, None).value for name in ("l1", "l2")] == [1.0, 2.0]


def test_one_name_in_two_modules_is_offered_twice():
    define("@metric('same')\ndef f(objective): return 1.0", module="one")
    define("@metric('same')\ndef f(objective): return 2.0", module="two")
    with pytest.raises(DuplicateNameError, match=r"'one' \(this process\) and 'two' \(this process\)"):
        get_metric("same")
    assert get_metric("two:same")(None, None).value == 2.0


def test_module_imported_by_hand_first_is_not_offered_twice(install, own_registry):
    install("good")
    import sp_good

    assert ("metric", "good_loss", "sp_good:loss") in own_registry._session  # else this would test nothing
    offer = available_metrics("good_loss")["good_loss"]
    assert offer.distribution == "sp-good"
    assert metric_provenance(sp_good.loss.with_settings(scale=3.0)) == ("good", "sp-good", "1.2")


def test_reloaded_module_replaces_its_metrics_and_keeps_their_provenance(install):
    install("good")
    assert available_metrics("good_loss")
    module = sys.modules["sp_good"]
    old = module.loss
    importlib.reload(module)
    assert module.loss is not old
    assert metric_provenance(module.loss) == ("good", "sp-good", "1.2")
    assert get_metric("good_loss").function is module.loss.function


def test_pickle_gives_an_equal_metric(install):
    install("good")
    loss = get_metric("good_loss", scale=4.0)
    for made in (loss, copy.deepcopy(loss)):
        again = pickle.loads(pickle.dumps(made))
        assert again == made
        assert again(Objective(), None).value == 12.0
        assert metric_provenance(again) == ("good", "sp-good", "1.2")
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(metric("local")(lambda objective: 0.0))


@pytest.mark.parametrize(
    ("given", "name"),
    [("HessianTopK", "hessian_top_k"), ("EpsilonBox", "epsilon_box"), ("SAMSharpness", "sam_sharpness"), ("L2", "l2")],
)
def test_name_of_a_class_is_its_snake_case(given, name):
    assert metric_name(type(given, (), {})()) == name


def test_plain_function_has_a_name_and_no_settings():
    def plain(objective, rng):
        return 0.0

    assert metric_name(plain) == "plain"
    assert metric_settings(plain) == {}
    assert metric_provenance(plain) is None


# --- one process -------------------------------------------------------------------------------------------------


def test_listing_imports_no_torch():
    code = (
        "import sys\n"
        "from sharpness_plugins.registry import available_metrics, plugins\n"
        "assert {'good_loss', 'lazy_fisher', 'epsilon_box'} <= set(available_metrics()), available_metrics()\n"
        "assert len(plugins()) >= 3\n"
        "loaded = {'torch', 'scipy', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    path = os.pathsep.join([str(DATA / "good"), str(DATA / "lazy"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_threads_share_one_build(install):
    install("good")
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(sorted(available_metrics()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert all(names == seen[0] and "good_loss" in names for names in seen)
    assert [record.name for record in plugins()].count("good") == 1


def test_fresh_registry_forgets_what_was_registered_inside():
    with fresh_registry():
        metric("passing")(lambda objective: 0.0)
        assert "passing" in available_metrics()
    assert "passing" not in available_metrics()
