"""Files whole or not at all: full disks, kills, and several processes that write one file at once."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from sharpness_plugins import files
from sharpness_plugins.monitor import CSVSink, JSONLSink, Measurement

POSIX = pytest.mark.skipif(os.name != "posix", reason="about links, modes, limits and locks of POSIX")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["ü\n", b"\x89PNG\x00"])
def test_a_file_is_what_was_written(tmp_path, content):
    path = tmp_path / "results.json"
    for text in ("old", content):
        files.write(path, text)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(tmp_path) == ["results.json"]


@contextlib.contextmanager
def disk_full_after(num_bytes):
    """No file may grow beyond so many bytes: the system refuses as a full disk does."""
    resource = pytest.importorskip("resource", reason="a limit on the size of files stands for a full disk")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@POSIX
@pytest.mark.parametrize("room", [0, 1, 99])
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path, room):
    path = tmp_path / "results.json"
    files.write(path, "old")
    with disk_full_after(room), pytest.raises(OSError, match="File too large"):
        files.write(path, "x" * 100)
    with disk_full_after(room + 4), pytest.raises(OSError, match="File too large"):
        files.append(path, "x" * 100)
    with disk_full_after(room + 4), pytest.raises(OSError, match="File too large"):
        files.update(path, lambda old: "x" * 200)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.json"]


@POSIX
def test_a_link_stays_a_link_and_the_mode_stays(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    files.write(real, "old")
    real.chmod(0o640)
    link.symlink_to(real)
    files.write(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


@POSIX
def test_new_files_have_the_mode_that_is_usual_here(tmp_path):
    (tmp_path / "usual").write_text("")
    files.write(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@POSIX
def test_what_is_no_plain_file_is_written_to_directly(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    files.write(pipe, "report")
    reader.join(10)
    assert got == ["report"]
    assert pipe.is_fifo()
    with pytest.raises(OSError, match="No space left on device"):
        files.write("/dev/full", "report")
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path, "report")
    with pytest.raises(FileNotFoundError):
        files.write(tmp_path / "no" / "folder", "report")


def test_half_a_line_of_a_killed_process_stays_by_itself(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    files.append(path, '{"step": 2}')
    assert path.read_text().splitlines() == ['{"step": 1}', '{"ste', '{"step": 2}']


def test_half_a_row_of_a_killed_process_costs_no_other_row(tmp_path):
    path = tmp_path / "run.csv"
    CSVSink(path)(measurement(1, a=1.0))
    with path.open("a") as file:
        file.write("2,20")
    CSVSink(path)(measurement(3, a=3.0))
    CSVSink(path)(measurement(4, a=4.0, b=5.0))
    found = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [row["step"] for row in found] == ["1", "2", "3", "4"]
    assert [row["a"] for row in found] == ["1.0", "", "3.0", "4.0"]


def measurement(step, **values):
    return Measurement(step, 10 * step, None, 0.5, values, {}, {}, 0.0)


WRITER = """
import sys, time
from sharpness_plugins import files
from sharpness_plugins.monitor import CSVSink, JSONLSink, Measurement

folder, me, start = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
sinks = [JSONLSink(f"{folder}/run.jsonl"), CSVSink(f"{folder}/run.csv")]
time.sleep(max(0.0, start - time.time()))
for step in range(40):
    values = {f"of_{me}": step + 0.5, **({f"late_{me}": 1.0} if step > 20 else {})}
    for sink in sinks:
        sink(Measurement(step, me, None, 0.25, values, {}, {}, 0.0))
    files.write(f"{folder}/report.json", str(me) * 100_000)
"""


@POSIX
def test_several_processes_write_the_same_files_and_nothing_is_lost_or_torn(tmp_path):
    """Two processes, forty measurements each, columns that come and go, and one report that both of them replace."""
    start = str(time.time() + 3)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(me), start]) for me in range(2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        with contextlib.suppress(FileNotFoundError):
            text = (tmp_path / "report.json").read_text()
            assert len(text) == 100_000
            assert len(set(text)) == 1, "a report of two processes at once"
            seen.add(text[0])
        time.sleep(0.001)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen
    lines = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    expected = sorted((me, step) for me in range(2) for step in range(40))
    assert sorted((line["samples"], line["step"]) for line in lines) == expected
    rows = list(csv.DictReader(io.StringIO((tmp_path / "run.csv").read_text())))
    assert sorted((int(row["samples"]), int(row["step"])) for row in rows) == expected
    for row in rows:
        me, step = row["samples"], int(row["step"])
        assert float(row[f"of_{me}"]) == step + 0.5
        assert row[f"late_{me}"] == ("1.0" if step > 20 else "")
        assert not any(row[f"of_{other}"] for other in "01" if other != me)
    assert names(tmp_path) == ["report.json", "run.csv", "run.jsonl"]


@POSIX
def test_threads_of_one_process_wait_for_each_other_too(tmp_path):
    path = tmp_path / "count"

    def count():
        for _ in range(20):
            files.update(path, lambda old: str(int(old or 0) + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() == "80"


KILLED = """
import sys
from sharpness_plugins import files

files.write(sys.argv[1], "0" * 2_000_000)
print("ready", flush=True)
while True:
    for digit in "123456789":
        files.write(sys.argv[1], digit * 2_000_000)
"""


@POSIX
def test_a_kill_while_writing_leaves_one_whole_file(tmp_path):
    path = tmp_path / "report.json"
    for delay in (0.0, 0.013, 0.031):
        writer = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        text = path.read_text()
        assert len(text) == 2_000_000
        assert len(set(text)) == 1


@POSIX
def test_a_file_that_stays_locked_is_an_error_in_time_and_the_run_goes_on(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    path = tmp_path / "run.jsonl"
    with path.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError, match="has been locked by another process"):
            JSONLSink(path)(measurement(1))
    JSONLSink(path)(measurement(2))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2]


@POSIX
def test_a_file_system_without_locks_still_takes_lines(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    files.append(tmp_path / "run.jsonl", "one")
    monkeypatch.setattr(files, "fcntl", None)
    files.append(tmp_path / "run.jsonl", "two")
    assert (tmp_path / "run.jsonl").read_text() == "one\ntwo\n"
