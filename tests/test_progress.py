"""Who hears of progress, and what a reader sees."""

import io
import math
import sys
import types

import pytest

from sharpness_plugins import progress
from sharpness_plugins.progress import ProgressEvent, resolve_listener


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def _width_of_eighty(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def screen(written):
    """The line that a terminal shows after these characters: a carriage return overwrites from the left."""
    line, column = [], 0
    for character in written:
        if character == "\r":
            column = 0
            continue
        line[column : column + 1] = character
        column += 1
    return "".join(line)


def test_time_left_is_the_share_still_to_do_at_the_same_pace():
    assert ProgressEvent("m", 5.0, 20.0, 10.0).seconds_left == 30.0
    assert ProgressEvent("m", 25.0, 20.0, 10.0).seconds_left == 0.0  # the metric's guess was too low
    assert str(ProgressEvent("m", 5.0, 20.0, 10.0)) == "m: 5.0 of about 20 passes over the data, 0:10, about 0:30 left"
    assert str(ProgressEvent("m", 50.0, 100.0, 5400.4)).endswith("1:30:00, about 1:30:00 left")
    assert str(ProgressEvent("m", 1.0, 2.0, 59.7)).endswith("1:00, about 1:00 left")


@pytest.mark.parametrize("expected", [None, 0.0, -1.0, math.inf, math.nan])
def test_no_time_left_where_the_metric_does_not_know(expected):
    event = ProgressEvent("m", 5.0, expected, 10.0)
    assert event.seconds_left is None
    assert str(event) == "m: 5.0 passes over the data, 0:10"


def test_no_time_left_before_the_first_batch():
    assert ProgressEvent("m", 0.0, 20.0, 0.0).seconds_left is None


def test_terminal_line_is_redrawn_in_place_and_wiped_at_the_end(clock):
    stream = Terminal()
    listener = resolve_listener(None, stream)
    long, short = ProgressEvent("a_long_name", 1.0, 20.0, 2.0), ProgressEvent("b", 2.0, None, 3.0)
    for event in (long, short):
        listener(event)
        assert screen(stream.getvalue()).rstrip() == str(event)  # nothing of the longer line is left
        clock.now += 1
    listener(ProgressEvent(None, 0.0, None, 0.0))
    assert screen(stream.getvalue()).strip() == ""
    assert stream.getvalue().endswith("\r")
    assert "\n" not in stream.getvalue()


def test_terminal_is_redrawn_at_most_ten_times_a_second_and_always_wiped(clock):
    stream = Terminal()
    listener = resolve_listener(None, stream)
    for step in range(100):
        listener(ProgressEvent("m", step / 10, 10.0, 1.0))
        clock.now += 0.01
    assert 9 <= stream.getvalue().count("\r") <= 11
    listener(ProgressEvent(None, 0.0, None, 0.0))
    assert screen(stream.getvalue()).strip() == ""


def test_a_line_wider_than_the_terminal_is_cut_because_it_could_not_be_redrawn(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    resolve_listener(None, stream)(ProgressEvent("a_metric_with_a_long_name", 1.0, 2.0, 3.0))
    assert len(screen(stream.getvalue())) == 19


def test_nothing_is_written_where_nothing_was_drawn():
    stream = Terminal()
    resolve_listener(None, stream)(ProgressEvent(None, 0.0, None, 0.0))
    assert stream.getvalue() == ""


def test_logs_are_quiet_unless_asked():
    log = io.StringIO()
    assert resolve_listener(None, log) is None
    listener = resolve_listener(True, log)
    listener(ProgressEvent("m", 1.0, 2.0, 3.0))
    assert "m: 1.0 of about 2" in log.getvalue()


def test_false_is_quiet_on_a_terminal_too():
    assert resolve_listener(False, Terminal()) is None


def test_standard_error_is_the_stream_and_may_be_missing(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    resolve_listener(None)(ProgressEvent("m", 1.0, 2.0, 3.0))
    assert "m: 1.0" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    assert resolve_listener(None) is None
    assert resolve_listener(True) is None


def test_a_callable_gets_the_events_themselves():
    events = []
    assert resolve_listener(events.append, Terminal()) == events.append


class ZMQInteractiveShell:
    pass


class ColabShell(ZMQInteractiveShell):
    pass


@pytest.mark.parametrize("shell", [ZMQInteractiveShell(), ColabShell()])
def test_notebook_draws_in_one_output_area(monkeypatch, clock, shell):
    shown = []

    class Handle:
        def update(self, data, *, raw):
            assert raw
            shown.append(data["text/plain"])

    def display(data, *, raw, display_id):
        assert raw
        assert display_id
        shown.append(data["text/plain"])
        return Handle()

    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: shell
    ipython.display = types.ModuleType("IPython.display")
    ipython.display.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython.display)
    listener = resolve_listener(None, io.StringIO())
    event = ProgressEvent("m", 1.0, 2.0, 3.0)
    listener(event)
    listener(event)  # too soon to draw again
    clock.now += 1
    listener(ProgressEvent(None, 0.0, None, 0.0))
    assert shown == ["", str(event), ""]
    assert resolve_listener(False, io.StringIO()) is None


def test_a_terminal_shell_of_ipython_is_no_notebook(monkeypatch):
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = lambda: type("TerminalInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert isinstance(resolve_listener(None, Terminal()), progress.TerminalProgress)
    assert resolve_listener(None, io.StringIO()) is None
    ipython.get_ipython = lambda: None  # imported by a plain script
    assert resolve_listener(None, io.StringIO()) is None
