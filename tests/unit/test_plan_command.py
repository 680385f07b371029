"""``tutel plan``: what it prints, what it refuses, and its exit status."""

import json
import subprocess
import sys

import pytest
from tutel.commands import main, quantities
from tutel.commands.plan import OVERLAP_DEGREES
from tutel.distributed.cost import Links, Sizes, choose_degree, cost

SHARED = ["--world-size=8", "--node-size=4", "--shards=4", "--top=1", "--tokens=256", "--model-dim=64"]
SHARED += ["--hidden=4096", "--dtype=float32"]
SIZES = Sizes(256, 64, 4096, 64, num_experts=2, top_k=1, world_size=8, element_size=4)


def plan(capsys, *options, status=0):
    assert main(["plan", *options]) == status
    return capsys.readouterr()


def as_json(capsys, *options):
    return json.loads(plan(capsys, "--json", *options).out)


@pytest.fixture(autouse=True)
def no_links(monkeypatch):
    monkeypatch.delenv("TUTEL_LINKS", raising=False)


def test_json_is_the_model(capsys):
    found = as_json(
        capsys, *SHARED, "--intra=8Gbit", "--inter=1e8", "--latency-intra=2us", "--latency-inter=1e-3", "--rate=1T"
    )
    links = Links(1e9, 1e8, 2e-6, 1e-3, 4, 1e12)
    [one] = found["plans"]
    assert one["sizes"] == {**vars(SIZES)}
    assert found["links"] == vars(links)
    assert len(one["ways"]) == 1 + 3 * len(OVERLAP_DEGREES) * 2
    for way in one["ways"]:
        chunks, staged = way.pop("overlap_degree"), way.pop("hierarchical")
        expected = cost(SIZES, links, way["degree"], training=True, overlap_degree=chunks, hierarchical=staged)
        assert way == vars(expected)
    assert one["auto"] == choose_degree(SIZES, links, [0, 1, 2, 4], True)
    assert one["fastest"]["seconds_total"] == min(way["seconds_total"] for way in one["ways"])


def test_two_link_speeds_two_degrees(capsys, monkeypatch):
    chosen = [as_json(capsys, *SHARED, f"--inter={inter}")["plans"][0]["auto"] for inter in ("200GB", "10MB")]
    assert chosen[0] != chosen[1]
    monkeypatch.setenv("TUTEL_LINKS", "inter=10e6")
    assert as_json(capsys, *SHARED)["plans"][0]["auto"] == chosen[1]


def test_options_win_over_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("TUTEL_LINKS", "intra=3e9,inter=2e9,latency=1e-4,rate=5e12")
    assert as_json(capsys)["links"] == {**vars(Links(3e9, 2e9, 1e-4, 1e-4, 8, 5e12))}
    assert as_json(capsys, "--latency-inter=2e-4", "--inter=1GB")["links"] == vars(Links(3e9, 1e9, 1e-4, 2e-4, 8, 5e12))


def test_scale_reaches_4096_ranks(capsys):
    found = as_json(capsys, "--scale")
    ranks = [each["sizes"]["world_size"] for each in found["plans"]]
    assert ranks == [2**power for power in range(13)]
    # Weak scaling: the same work and the same parameters a rank.
    assert len({each["fastest"]["seconds_compute"] for each in found["plans"]}) == 1
    assert {each["sizes"]["num_experts"] // each["sizes"]["world_size"] for each in found["plans"]} == {2}
    totals = [each["fastest"]["seconds_total"] for each in found["plans"]]
    assert totals == sorted(totals)
    assert any("Weak scaling" in line for line in found["assumptions"])
    # Of one expert over four ranks, those come that have two experts to choose from.
    shared = as_json(capsys, "--scale", "--shards=4")
    assert [each["sizes"]["world_size"] for each in shared["plans"]] == [2**power for power in range(3, 13)]
    thirds = as_json(capsys, "--scale", "--shards=3", "--top=1")
    assert [each["sizes"]["world_size"] for each in thirds["plans"]] == [3 * 2**power for power in range(11)]


def test_ranks_that_do_not_fill_nodes_are_mentioned(capsys):
    line = "Of ranks that do not fill nodes of 8, each counts as a node of its own."
    assert line in plan(capsys, "--world-size=12").out
    assert line not in plan(capsys, "--world-size=6").out
    assert line in plan(capsys, "--scale", "--shards=3", "--top=1").out


def test_inference_is_the_forward_only(capsys):
    training, inference = (as_json(capsys, *more)["plans"][0]["fastest"] for more in ([], ["--inference"]))
    assert training["seconds_compute"] == pytest.approx(3 * inference["seconds_compute"])
    assert inference["memory"] < training["memory"]


def test_tables_name_every_mode_and_the_choice(capsys):
    text = plan(capsys, *SHARED).out
    rows = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert rows == ["0", "1", "2", "4", "1", "1", "2", "2", "4", "4"]
    auto = as_json(capsys, *SHARED)["plans"][0]["auto"]
    assert f"parallel_type='auto' chooses r = {auto}: " in text
    assert "more of weights" in text or "more of rows" in text
    assert "Fastest of all: r = " in text
    assert "node, then across" in text
    assert "Assumed:" in text
    [chosen] = [line for line in text.splitlines() if "│ auto" in line or "auto │" in line]
    assert chosen.split("│")[1].strip() == str(auto)


def test_curve_has_a_row_for_each_number_of_ranks(capsys):
    text = plan(capsys, "--scale").out
    rows = [line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│")]
    assert rows == [str(2**power) for power in range(13)]
    assert "Weak scaling" in text
    assert "100%" in text


@pytest.mark.parametrize("scale", [[], ["--scale"]])
def test_plot(capsys, tmp_path, scale):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    plan(capsys, *scale, f"--plot={path}")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_that_cannot_be_written(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    printed = plan(capsys, f"--plot={tmp_path / 'nowhere' / 'plan.png'}", status=1)
    assert "tutel plan: error: --plot: " in printed.err


def test_plot_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    printed = plan(capsys, "--plot=plan.png", status=1)
    assert "--plot: needs matplotlib, which is not installed" in printed.err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--world-size=6", "--shards=4"], "shards must divide world_size (6), got 4"),
        (["--world-size=0"], "world_size must be at least 1, got 0"),
        (["--top=99"], "top_k must be at most num_experts (32), got 99"),
        (["--tokens=-1"], "tokens must be at least 0, got -1"),
        (["--inter=0"], "inter must be above 0, got 0.0"),
        (["--node-size=0"], "node_size must be at least 1, got 0"),
        (["--scale", "--shards=8192"], "--scale ends at 4096 ranks, which have fewer experts than top=2"),
        ([f"--tokens={10**400}"], "int too large to convert to float"),
    ],
)
def test_sizes_that_do_not_fit(capsys, options, text):
    printed = plan(capsys, *options, status=2)
    assert printed.err.startswith("tutel plan: error: ")
    assert text in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["plan", "--inter=quick"], "must be bytes a second such as 12.5GB or 100Gbit, got 'quick'"),
        (["plan", "--latency-intra=-1"], "must be a time such as 5us or 2e-6, got '-1'"),
        (["plan", "--shards=2", "--local-experts=2"], "not allowed with argument"),
        (["plan", "--dtype=int8"], "invalid choice"),
        (["plot"], "invalid choice"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_calls(capsys, options, text):
    with pytest.raises(SystemExit) as raised:
        main(options)
    assert raised.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("value", ["inter", "inter=fast", "speed=3", "intra=0", "latency=-1", "inter=inf"])
def test_environment_that_is_written_wrongly(capsys, monkeypatch, value):
    monkeypatch.setenv("TUTEL_LINKS", f"rate=1e12,{value}")
    printed = plan(capsys, status=2)
    assert f"environment variable TUTEL_LINKS must hold intra=NUMBER, inter=NUMBER, latency=NUMBER or rate=NUMBER, " \
        f"separated by commas; got {value!r}" in printed.err  # fmt: skip


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (quantities.bandwidth, "12.5GB/s", 12.5e9),
        (quantities.bandwidth, "100Gbit", 12.5e9),
        (quantities.bandwidth, "3e9", 3e9),
        (quantities.bandwidth, ".5 kB", 500.0),
        (quantities.duration, "5us", 5e-6),
        (quantities.duration, "2e-6", 2e-6),
        (quantities.duration, "1.5ms", 1.5e-3),
        (quantities.rate, "312T", 312e12),
        (quantities.rate, "1.5 PFLOP/s", 1.5e15),
    ],
)
def test_quantities(read, text, value):
    assert read(text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (quantities.show_bytes(999.9), "1.00 kB"),
        (quantities.show_bytes(0), "0 B"),
        (quantities.show_bytes(123_456_789), "123 MB"),
        (quantities.show_seconds(0.00999), "9.99 ms"),
        (quantities.show_seconds(3e-10), "0.3 ns"),
        (quantities.show_seconds(61.0), "61.0 s"),
    ],
)
def test_quantities_as_text(text, shown):
    assert text == shown


def test_as_a_module():
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tutel", "plan", "--json"], capture_output=True, text=True, timeout=120
    )
    assert printed.returncode == 0, printed.stderr
    assert json.loads(printed.stdout)["training"] is True
    refused = subprocess.run([sys.executable, "-m", "tutel", "plan", "--tokens=-1"], capture_output=True, timeout=120)
    assert refused.returncode == 2
