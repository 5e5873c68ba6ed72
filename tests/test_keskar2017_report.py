"""The report of the reproduction: a page that stands alone, tables and files with the record's numbers, verdicts by rule."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys

import matplotlib
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keskar2017_example import example_record
from keskar2017_page import Page
from sharpness_plugins.cli import main
from sharpness_plugins.experiments.keskar2017 import run
from sharpness_plugins.experiments.keskar2017.record import Record, box
from sharpness_plugins.experiments.keskar2017.record import test_accuracy as accuracy
from sharpness_plugins.experiments.keskar2017.report import markdown_tables, write_report, writing
from sharpness_plugins.experiments.keskar2017.report.agreement import CLAIMS, claims
from sharpness_plugins.experiments.keskar2017.report.drawing import Rendered, render
from sharpness_plugins.experiments.keskar2017.report.figures import all_drawings
from sharpness_plugins.experiments.keskar2017.report.published import PAPER, box_ratios, half_epsilon_ratios, published_for
from sharpness_plugins.experiments.keskar2017.report.reading import Reading
from sharpness_plugins.experiments.keskar2017.report.verdicts import Agreement, direction, monotone
from sharpness_plugins.experiments.paired import Paired, pair
from sharpness_plugins.experiments.training import Evaluation


def varied(record: Record) -> Record:
    """Every number of every network another one, so that a mix-up shows; orders stay."""
    draw = random.Random(0)

    def change(network):
        factor = draw.uniform(0.8, 1.2)
        boxes = tuple(dataclasses.replace(b, value=b.value * factor) for b in network.boxes)
        test = Evaluation(network.test.loss, network.test.accuracy - draw.uniform(0, 0.004))
        cone = dataclasses.replace(network.cone, random_rises=tuple(draw.uniform(0.001, 0.02) for _ in range(20)))
        return dataclasses.replace(network, boxes=boxes, test=test, distance=network.distance * factor, cone=cone)

    return dataclasses.replace(record, all_networks=tuple(map(change, record.all_networks)))


@pytest.fixture(scope="module")
def record():
    return varied(example_record())


@pytest.fixture(scope="module")
def folder(record, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(record, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def rows_of(folder, name) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "data" / f"{name}.csv").read_text(encoding="utf-8"))))


def same(text: str, number: float) -> bool:
    """Exactly, bit for bit; NaN equals NaN."""
    return float(text) == number or (math.isnan(float(text)) and math.isnan(number))


# --- the page stands alone


def test_the_page_is_well_formed_and_asks_for_nothing(page, folder):
    assert page.declaration.lower() == "doctype html"
    assert not [tag for tag in ("script", "link", "iframe", "object", "embed", "base") if page.elements(tag)]
    ids = {element.attributes["id"] for element in page.every() if "id" in element.attributes}
    for element in page.every():
        for name in ("src", "srcset", "data", "action", "poster", "background"):
            assert element.attributes.get(name, "data:").startswith("data:")
        if element.tag == "a":
            target = element.attributes["href"]
            if target.startswith("#"):
                assert target[1:] in ids
            elif not target.startswith("https://arxiv.org/abs/"):
                assert (folder / target).is_file(), target
        for name in ("href", "xlink:href"):
            if element.tag != "a" and name in element.attributes:
                assert element.attributes[name][1:] in ids
    style = page.elements("style")[0].text
    assert "@import" not in style
    assert "url(" not in style
    assert set(re.findall(r"https?://[^\s\"'<)]+", (folder / "report.html").read_text())) <= {
        "https://arxiv.org/abs/1609.04836",
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_the_page_can_be_read_without_eyes_and_on_a_phone(page):
    assert page.elements("html")[0].attributes["lang"] == "en"
    assert any("width=device-width" in meta.attributes.get("content", "") for meta in page.elements("meta"))
    ids = [element.attributes["id"] for element in page.every() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    figures = page.elements("svg")
    assert len(figures) >= 11
    for svg in figures:
        assert svg.attributes["role"] == "img"
        title, description = svg.all("title")[0], svg.all("desc")[0]
        assert svg.attributes["aria-labelledby"].split() == [title.attributes["id"], description.attributes["id"]]
        assert title.text
        assert re.search(r"\d", description.text), description.text  # numbers, not a shrug
        assert "nan" not in description.text
    for figure in page.elements("figure"):
        assert figure.all("figcaption")[0].text
    for table in page.elements("table"):
        assert table.all("caption")[0].text
        assert {cell.attributes.get("scope") for cell in table.all("th")} == {"col", "row"}
        widths = {len(row.all("th") + row.all("td")) for row in table.all("tr")}
        assert len(widths) == 1
    levels = [int(element.tag[1]) for element in page.every() if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_the_page_says_what_was_run_and_how_to_read_it(page, record):
    text = page.root.text
    for part in (
        record.command,
        "ReLU network 64-256x4-10",
        "216,586 weights",
        "torch 2.6.0",
        "learning rate 0.001",
        *record.sentences,
        "correlate, not a cause",
        "BatchNorm",
        "Dinh et al. 2017",
        "an epoch's mean loss below 0.002",
    ):
        assert part in text
    assert "Do large batches end in sharper minima that test worse?" in page.elements("p")[0].text


def test_every_file_of_the_index_is_there_and_every_file_is_in_it(page, folder):
    listed = {a.attributes["href"] for a in page.elements("a") if not a.attributes["href"].startswith(("#", "http"))}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == listed
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert {f"{name}.{kind}" for name in names for kind in ("pdf", "png")} == {
        path.name for path in (folder / "figures").iterdir()
    }
    assert all(path.read_bytes().startswith(b"%PDF") for path in (folder / "figures").glob("*.pdf"))


# --- the same bytes


def test_the_same_record_gives_the_same_bytes_whatever_the_users_style(record, folder, tmp_path):
    """In another process, with another hash seed and matplotlibrc."""
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: black\nsvg.fonttype: path\nbackend: svg\n")
    program = (
        "import sys; from pathlib import Path\n"
        "from sharpness_plugins.experiments.keskar2017.record import Record\n"
        "from sharpness_plugins.experiments.keskar2017.report import write_report\n"
        "write_report(Record.read(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "import matplotlib; assert matplotlib.rcParams['font.size'] == 20\n"
    )
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "again")]
    environment = {"PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "MPLCONFIGDIR": str(tmp_path)}
    subprocess.run(command, check=True, env={**os.environ, **environment})
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(
        str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_no_date_is_in_any_file(folder):
    for path in folder.rglob("*"):
        if path.suffix in (".pdf", ".html"):
            assert b"CreationDate" not in path.read_bytes()
            assert b"dc:date" not in path.read_bytes()


def test_without_matplotlib_nothing_is_written_and_the_error_says_what_to_install(record, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"sharpness-plugins\[plots\]"):
        write_report(record, tmp_path)
    assert not list(tmp_path.iterdir())


# --- numbers


def agrees(cell: str, *numbers: float) -> bool:
    """A cell's numbers are these, rounded to the digits that it shows."""
    texts = re.findall(r"[-+]?\d+(?:\.\d+)?", cell)[: len(numbers)]
    return all(
        abs(float(text) - number) <= 0.5000001 * 10 ** -len(text.partition(".")[2])
        for text, number in zip(texts, numbers, strict=True)
    )


def test_table_2_has_the_records_accuracies(page, record):
    rows = {row[0]: row[1:] for row in page.table("table2")}
    for study, name in (("protocol", "here, the paper's protocol"), ("equal_updates", "here, equal number of steps")):
        tests = [[100 * value for value in record.values(study, role, accuracy)] for role in ("small", "large")]
        for cell, values in zip(rows[name][2:4], tests, strict=True):
            assert agrees(cell, statistics.fmean(values), statistics.stdev(values)), cell
        paired = record.paired(study, accuracy)
        assert agrees(rows[name][4], 100 * paired.mean_difference, 100 * paired.standard_error)
    assert rows["paper, C1"] == ["99.89±0.02", "99.66±0.20", "80.04±0.12", "77.26±0.42", "-2.78"]


@pytest.mark.parametrize(("name", "space"), [("table3", "full"), ("table4", "subspace")])
def test_tables_3_and_4_have_the_records_sharpness_by_every_solver(page, record, name, space):
    rows = {row[0]: row[1:] for row in page.table(name)}
    for solver, words in (("lbfgsb", "the same, scaled"), ("ours", "our solver")):
        cells = rows[f"here, equal training loss: {words}"]
        for place, epsilon in ((0, 1e-3), (3, 5e-4)):
            both = [record.values("matched_loss", role, box(space, epsilon, solver)) for role in ("small", "large")]
            for cell, values in zip(cells[place : place + 2], both, strict=True):
                assert agrees(cell, statistics.fmean(values), statistics.stdev(values)), cell
            assert agrees(cells[place + 2], statistics.fmean(both[1]) / statistics.fmean(both[0]))
        assert agrees(cells[6], 4.0, 0.0)
    stuck = rows["here, equal training loss: the paper's solver"]
    moved = [n.box(space, 1e-3, "published").kind != "not converged" for n in record.networks("matched_loss", "small")]
    assert (stuck[0] == "–") == (not any(moved))  # what did not move is no zero


def test_csv_files_give_the_records_numbers_exactly(folder, record):
    by_key = {(n.seed, n.condition): n for n in record.all_networks}

    def network(row):
        return by_key[int(row["seed"]), record.studies[row["study"]][row["role"]]]

    for name, space in (("table3", "full"), ("table4", "subspace")):
        rows = rows_of(folder, name)
        assert len(rows) == 6 * sum(len(record.networks(s, r)) for s, roles in record.studies.items() for r in roles)
        for row in rows:
            found = network(row).box(space, float(row["epsilon"]), row["solver"])
            assert same(row["sharpness [%]"], found.value)
            assert row["kind"] == found.kind
    for row in rows_of(folder, "networks"):
        assert same(row["test_accuracy [share]"], network(row).test.accuracy)
        assert same(row["distance [norm of weights]"], network(row).distance)
    curves = {curve.kind: curve for curve in record.curves}
    for kind, curve in curves.items():
        for row, alpha, train in zip(rows_of(folder, f"figure3_{kind}"), curve.alphas, curve.train, strict=True):
            assert same(row["alpha"], alpha)
            assert same(row["train_loss [nats]"], train.loss)
    points = [p for t in record.trajectories if t.purpose == "sharpness_against_loss" for p in t.points]
    for row, point in zip(rows_of(folder, "figure6"), points, strict=True):
        assert same(row["train_loss [nats]"], point.train.loss)
        assert same(row["full_space sharpness, epsilon 1e-3 [%]"], point.sharpness)
    for row in rows_of(folder, "cone"):
        cone = network(row).cone
        rises = cone.random_rises if row["direction"] == "random" else cone.top_rises
        assert same(row["rise [%]"], rises[int(row["number"]) - 1])
    for name in ("density", "quadrature", "eigenvalues", "counts"):
        seen = {(row["seed"], json.dumps([row["study"], row["role"]])) for row in rows_of(folder, name)}
        assert len(seen) == len(record.all_networks)  # each once
    assert Record.read(folder).to_json() == record.to_json()


def test_every_figure_and_table_of_the_page_has_its_numbers_as_csv(page, folder):
    data = {path.stem for path in (folder / "data").glob("*.csv")}
    drawn = {figure.attributes["id"].removeprefix("figure-") for figure in page.elements("figure")}
    named = {table.attributes["id"].removeprefix("table-") for table in page.elements("table") if "id" in table.attributes}
    assert named <= data
    assert {re.sub("_(protocol|matched_loss)$", "", name) for name in drawn} <= data


def test_the_figures_draw_the_records_numbers(record):
    drawings = {drawing.name: drawing for drawing in all_drawings(Reading(record))}
    above, below = drawings["figure5"].draw().axes
    cold = record.values("warm_start", "cold", box("full", 1e-3, "ours"))
    line = below.containers[0].lines[0]
    assert line.get_xdata().tolist() == [0, 12]
    assert line.get_ydata()[0] == pytest.approx(statistics.fmean(cold))
    bars = below.containers[0].lines[2][0].get_segments()[0]
    assert (bars[1, 1] - bars[0, 1]) / 2 == pytest.approx(statistics.stdev(cold))
    assert above.get_ylabel() == "test accuracy [%]"
    left, right = drawings["figure4"].draw().axes
    sizes, values = left.containers[0].lines[0].get_data()
    assert list(sizes) == pytest.approx([16, 50, 500], rel=0.04)  # the two studies are moved apart
    assert values[2] == pytest.approx(100 * statistics.fmean(record.values("batch_sizes", "500", accuracy)))
    assert (right.get_xscale(), right.get_yscale()) == ("log", "log")
    curve = record.curves[0]
    assert drawings["figure3_straight_matched_loss"].draw().axes[0].get_lines()[0].get_ydata().tolist() == [
        point.loss for point in curve.train
    ]


# --- what the paper published


def test_the_papers_ratios_are_those_of_its_tables():
    ratios = box_ratios("full", 1e-3)
    assert {name: round(ratio) for name, ratio in ratios.items()} == {
        "F1": 167, "F2": 223, "C1": 25, "C2": 107, "C3": 9, "C4": 33,
    }  # fmt: skip
    assert half_epsilon_ratios("subspace", 1)["F1"] == pytest.approx(9.22 / 9.17)
    for known in PAPER:
        for epsilon in (1e-3, 5e-4):
            for full, subspace in zip(known.boxes("full", epsilon), known.boxes("subspace", epsilon), strict=True):
                assert subspace.mean < full.mean
        assert known.test[1].mean < known.test[0].mean


def test_the_papers_numbers_stand_alone_only_beside_its_own_network(record):
    def as_network(name, data, **more):
        problems = {"main": dataclasses.replace(record.problems["main"], network=name)}
        return dataclasses.replace(record, problems=problems, settings={"data": data, **more})

    assert published_for(as_network("C1", "cifar10")).name == "C1"
    assert published_for(as_network("C1", "digits")) is None
    assert published_for(as_network("C1", "cifar10", width=0.1)) is None
    assert published_for(record) is None
    ours = {claim.key: claim for claim in claims(Reading(as_network("C1", "cifar10")))}
    assert "24.7 times" in ours["sharper"].paper
    assert ours["order"].agrees is Agreement.PARTLY  # 8 times, a third of 24.7 is 8.2
    assert "paper, F1" not in markdown_tables(as_network("C1", "cifar10"))


# --- verdicts


def test_a_direction_needs_the_sign_and_two_standard_errors():
    def verdict(*pairs, sign=1):
        return direction(pair(*zip(*pairs, strict=True)), sign)[0]

    assert verdict((1, 2), (1, 2.2), (1, 2.1)) is Agreement.YES
    assert verdict((1, 2), (1, 2.2), (1, 2.1), sign=-1) is Agreement.NO
    assert verdict((1, 5), (1, 0.9), (1, 1.0)) is Agreement.PARTLY
    assert verdict((1, 2)) is Agreement.PARTLY
    assert verdict((1, 1), (2, 2)) is Agreement.NO
    assert direction(None, 1)[0] is Agreement.UNKNOWN
    assert "in 1 of 3 seeds" in direction(Paired((1, 1, 1), (5, 0.9, 1.0)), 1)[1]


@pytest.mark.parametrize(
    ("values", "agrees"),
    [((3, 2, 1), "yes"), ((3, 3.5, 1), "partly"), ((1, 2, 3), "no"), ((3, math.nan, 1), "yes"), ((3,), "not measured")],
)
def test_monotone_means(values, agrees):
    assert monotone(enumerate(values), -1)[0] == agrees


def test_the_example_agrees_where_it_was_made_to():
    found = {claim.key: claim for claim in claims(Reading(example_record()))}
    assert len(found) == len(CLAIMS)
    for key in ("gap", "fit", "sharper", "half_epsilon", "subspace", "below_full", "warm_sharpness", "cone"):
        assert found[key].agrees is Agreement.YES, key
        assert found[key].reason == ""
    assert found["sharper_published"].agrees is Agreement.UNKNOWN
    assert "stopped where it started" in found["sharper_published"].reason
    for key, why in (("order", "below 8.67"), ("distances", "2 lies below 3 to 10"), ("loss", "no more than early")):
        assert found[key].agrees is Agreement.PARTLY
        assert why in found[key].reason
    assert all(claim.rule and claim.paper and claim.here for claim in found.values())
    assert all(claim.reason for claim in found.values() if claim.agrees is not Agreement.YES)


def changed(record: Record, study: str, role: str, **changes) -> Record:
    condition = record.studies[study][role]
    networks = tuple(
        dataclasses.replace(n, **{key: value(n) for key, value in changes.items()}) if n.condition == condition else n
        for n in record.all_networks
    )
    return dataclasses.replace(record, all_networks=networks)


def verdicts(record: Record) -> dict[str, Agreement]:
    return {claim.key: claim.agrees for claim in claims(Reading(record))}


def test_what_turns_round_does_not_agree():
    record = example_record()
    better = changed(record, "protocol", "large", test=lambda n: Evaluation(0.2, 0.97))
    assert verdicts(better)["gap"] is Agreement.NO
    less_trained = changed(record, "protocol", "large", train=lambda n: Evaluation(0.2, 0.9))
    assert verdicts(less_trained)["fit"] is Agreement.NO
    far = changed(record, "protocol", "small", distance=lambda n: 25.0)
    assert verdicts(far)["distances"] is Agreement.YES
    steep = changed(record, "matched_loss", "large", cone=lambda n: dataclasses.replace(n.cone, random_rises=(2.0,) * 20))
    assert verdicts(steep)["cone"] is Agreement.NO
    flat = changed(
        record, "warm_start", "12", boxes=lambda n: tuple(dataclasses.replace(b, value=3 * b.value) for b in n.boxes)
    )
    assert verdicts(flat)["warm_sharpness"] is Agreement.NO
    helped = changed(record, "remedies", "adversarial", test=lambda n: Evaluation(0.2, 0.97 + 0.001 * n.seed))
    assert verdicts(record)["adversarial"] is Agreement.YES
    assert verdicts(helped)["adversarial"] is Agreement.NO
    augmented = changed(record, "remedies", "augmentation", test=lambda n: Evaluation(0.2, 0.97 + 0.001 * n.seed))
    assert verdicts(augmented)["augmentation"] is Agreement.YES


def test_a_solver_that_finds_little_agrees_partly_at_best():
    record = example_record()

    def as_found(network, share):
        return tuple(
            dataclasses.replace(b, kind="lower bound", value=share * network.box(b.space, b.epsilon, "ours").value)
            if b.solver == "published"
            else b
            for b in network.boxes
        )

    for share, agrees in ((0.9, Agreement.YES), (0.01, Agreement.PARTLY)):
        tried = changed(record, "protocol", "small", boxes=lambda n, share=share: as_found(n, share))
        found = {claim.key: claim for claim in claims(Reading(tried))}["sharper_published"]
        assert found.agrees is agrees
        assert ("on 2 of 4 networks it found less than half" in found.reason) == (share < 0.5)


def test_one_seed_is_no_more_than_partly():
    record = example_record()
    alone = dataclasses.replace(record, all_networks=tuple(n for n in record.all_networks if n.seed == 0))
    found = {claim.key: claim for claim in claims(Reading(alone))}
    for key in ("gap", "sharper", "subspace", "adversarial"):
        assert found[key].agrees is Agreement.PARTLY
        assert "only seed" in found[key].reason


# --- what is missing is said


@pytest.fixture
def quick_page(monkeypatch, tmp_path):
    """The page with figures that are drawn and laid out, but not saved."""

    def drawn(drawing):
        drawing.draw()
        return Rendered(drawing, b"", b"", f'<svg role="img"><title>{drawing.name}</title></svg>')

    monkeypatch.setattr(writing, "render", drawn)

    def page_of(record) -> Page:
        write_report(Record.from_json(record.to_json()), tmp_path)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return page_of


def test_an_empty_record_gives_a_page_that_says_so(quick_page):
    record = dataclasses.replace(
        example_record(), problems={}, studies={}, all_networks=(), curves=(), trajectories=(), sentences=(), versions={}
    )
    text = quick_page(record).root.text
    for part in (
        "None of the paper's claims can be judged",
        "Not run: remedies",
        "The curved line of Figure 3 is not in the record",
        "Nothing to show: Figure 5 needs the study warm start",
        "does not say which network",
    ):
        assert part in text


def test_what_failed_or_was_given_up_is_said(quick_page):
    record = example_record()
    broken = changed(
        record, "matched_loss", "large",
        ended=lambda n: False, curvature=lambda n: None, cone=lambda n: None,
        boxes=lambda n: tuple(dataclasses.replace(b, value=math.nan, kind="failed") for b in n.boxes),
        test=lambda n: Evaluation(math.nan, math.nan),
    )  # fmt: skip
    text = quick_page(broken).root.text
    assert "2 of" in text
    assert "did not come to their ending: batch 500, learning rate 0.001" in text
    assert "not finite" in text
    assert "have no value to use (failed" in text
    assert "equal training loss (2 of 4 given up)" in text
    unmatched = changed(record, "matched_loss", "large", ended=lambda n: False)
    assert "at equal training loss, where" in quick_page(record).elements("p")[0].text
    assert "at equal training loss, where" not in quick_page(unmatched).elements("p")[0].text


PARTS = ("studies", "roles", "seeds", "curves", "trajectories", "boxes", "curvature", "cone", "nan", "problems", "points")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(parts=st.sets(st.sampled_from(PARTS), min_size=1, max_size=4), draw=st.randoms(use_true_random=False))
def test_any_parts_may_be_missing(quick_page, parts, draw):
    page = quick_page(without(example_record(), parts, draw))
    assert "nan" not in {word.strip(".,;:%") for word in page.root.text.lower().split()}
    assert len(page.elements("section")) == 16


def without(record: Record, parts: set[str], draw) -> Record:
    def some(values):
        return tuple(value for value in values if draw.random() < 0.5)

    def thinner(network):
        if "boxes" in parts:
            network = dataclasses.replace(network, boxes=some(network.boxes))
        if "curvature" in parts:
            curvature = network.curvature
            bare = dataclasses.replace(curvature, nodes=(), weights=(), grid=(), density=(), density_error=(), width=0.0)
            network = dataclasses.replace(network, curvature=draw.choice([None, bare, curvature]))
        if "cone" in parts:
            bare = dataclasses.replace(network.cone, random_rises=(), top_rises=())
            network = dataclasses.replace(network, cone=draw.choice([None, bare, network.cone]))
        if "nan" in parts and draw.random() < 0.5:
            nan = Evaluation(math.nan, math.nan)
            boxes = tuple(dataclasses.replace(b, value=draw.choice([math.nan, -1.0, 0.0, b.value])) for b in network.boxes)
            network = dataclasses.replace(network, train=nan, test=nan, distance=math.nan, boxes=boxes, epoch_loss=math.nan)
        return network

    networks = tuple(map(thinner, record.all_networks))
    if "seeds" in parts:
        networks = some(networks)
    studies = dict(record.studies)
    if "studies" in parts:
        studies = {study: roles for study, roles in studies.items() if draw.random() < 0.5}
    if "roles" in parts:
        studies = {study: {r: c for r, c in roles.items() if draw.random() < 0.6} for study, roles in studies.items()}
    trajectories = some(record.trajectories) if "trajectories" in parts else record.trajectories
    if "points" in parts:
        trajectories = tuple(dataclasses.replace(t, points=some(t.points)) for t in trajectories)
    curves = some(record.curves) if "curves" in parts else record.curves
    if "points" in parts:
        curves = tuple(dataclasses.replace(c, alphas=c.alphas[:3], train=c.train[:3], test=c.test[:2]) for c in curves)
    return dataclasses.replace(
        record,
        studies=studies,
        all_networks=networks,
        curves=curves,
        trajectories=trajectories,
        problems={} if "problems" in parts else record.problems,
        large_eigenvalue=math.nan if "curvature" in parts else record.large_eigenvalue,
    )


def test_what_a_record_says_is_text_and_never_markup(quick_page):
    record = example_record()
    odd = "<script>alert('x')</script> & \"quotes\""
    problems = {"main": dataclasses.replace(record.problems["main"], description=odd, data=odd)}
    page = quick_page(dataclasses.replace(record, problems=problems, sentences=(odd,), command=odd))
    assert not page.elements("script")
    assert page.root.text.count(odd) >= 3


# --- the command, and the figures' style


def test_the_command_writes_the_report_and_says_where(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "reproduce", lambda *arguments, **settings: example_record())
    drawn = Rendered(None, b"pdf", b"png", '<svg role="img"><title>t</title></svg>')
    monkeypatch.setattr(writing, "render", lambda drawing: dataclasses.replace(drawn, drawing=drawing))
    assert main(["reproduce", "keskar2017", "--quiet", "--out", str(tmp_path)]) == 0
    assert "Wrote report.html and" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_a_figure_leaves_the_users_style_alone(record):
    before = dict(matplotlib.rcParams)
    rendered = render(all_drawings(Reading(record))[0])
    assert dict(matplotlib.rcParams) == before
    assert rendered.svg.startswith("<svg viewBox=")
    assert "#000000" not in rendered.svg  # colours follow the page, which has a dark side
    assert "var(--ink)" in rendered.svg
