"""What the benchmark makes of its runs."""

import os
import signal
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from benchmark import interrupts, processes, rows, summary, table
from benchmark.alternation import Run
from benchmark.chart import Chart, Panel
from benchmark.contenders import STANDARD, named

ROW = rows.ROWS[0]
RUN = Run(
    place="here",
    family="fifo over 2",
    contender="ours",
    disk_bytes=1 << 30,
    used_bytes=1 << 30,
    row=ROW.name,
    round_number=1,
    iops=100,
    bytes_per_s=409600,
    p99_us=10,
    sync_p99_us=0,
    moved_bytes=1 << 29,
    user_s=1,
    system_s=2,
    resident_bytes=1,
    peak_bytes=2,
)


def test_a_median_ignores_the_one_round_that_was_disturbed() -> None:
    runs = [replace(RUN, iops=speed, p99_us=speed) for speed in (100, 1, 120)]
    figures = summary.figures(ROW, runs)
    assert figures.iops == 100
    assert figures.p99_us == 100


def test_cpu_time_is_told_for_what_was_moved() -> None:
    figures = summary.figures(ROW, [RUN])
    assert figures.cpu_s_per_gib == 6  # 3 s for half a GiB
    assert figures.cpu_us_per_operation == pytest.approx(6e6 * 4096 / (1 << 30))


def test_a_ratio_is_of_medians_and_shows_the_spread_of_rounds() -> None:
    ours = [replace(RUN, iops=speed) for speed in (100, 300, 200)]
    peer = [replace(RUN, iops=speed) for speed in (100, 100, 400)]
    assert summary.ratio(ours, peer) == summary.Ratio(2.0, 0.5, 3.0)


def test_runs_are_found_by_all_that_is_asked_for() -> None:
    other = replace(RUN, contender="peer")
    assert summary.of([RUN, other], contender="peer", family="fifo over 2") == [other]
    assert summary.of([RUN, other], contender="peer", family="vote over 3") == []


def test_only_votes_of_large_blocks_have_the_higher_goal() -> None:
    by_name = {row.name: row for row in rows.ROWS}
    assert summary.goal(by_name["64k randrw qd8"], voting=True) == 4
    assert summary.goal(by_name["64k randrw qd8"], voting=False) == 1.2
    assert summary.goal(by_name["4k randread qd1"], voting=True) == 1.2


def test_rows_are_chosen_by_name() -> None:
    assert [row.name for row in rows.matching(["1M *"])] == ["1M read qd4", "1M write qd4"]
    with pytest.raises(ValueError, match="no row matches"):
        rows.matching(["2M *"])


def test_a_contender_that_nobody_knows_is_refused() -> None:
    assert named("peer") is STANDARD["peer"]
    with pytest.raises(ValueError, match="paer"):
        named("paer")
    with pytest.raises(ValueError, match="old=/nowhere"):
        named("old=/nowhere")


def test_columns_are_aligned() -> None:
    assert table.lines(["row", "n"], [["a", "10"], ["bcde", "2"]]) == [
        "row    n",
        "a     10",
        "bcde   2",
    ]


def test_a_bar_is_as_long_as_its_value() -> None:
    bars = {"one": {"fifo": 1.0, "vote": 0.5}, "a < b": {"fifo": 4.0, "vote": 2.0}}
    document = Chart("Speed", "note", [Panel("tmpfs", bars)], (1.0, 1.2)).svg()
    root = ElementTree.fromstring(document)
    space = "{http://www.w3.org/2000/svg}"
    rectangles = list(root.iter(f"{space}rect"))
    legend = [each for each in rectangles if each.get("width") == "10"]
    panel = [each for each in rectangles if each.get("width") != "10"]
    assert len(legend) == 2
    lengths = [float(bar.get("width", "")) for bar in panel]
    assert lengths == pytest.approx([lengths[0] * value for value in (1, 0.5, 4, 2)], rel=0.01)
    assert {bar.get("fill") for bar in panel} == {bar.get("fill") for bar in legend}
    assert "a < b" in {text.text for text in root.iter(f"{space}text")}
    dashes = [line.get("stroke-dasharray") for line in root.iter(f"{space}line")]
    assert sum(each != "none" for each in dashes) == 2


def test_the_cpu_time_of_a_process_is_that_of_its_threads() -> None:
    threads = processes.thread_times(os.getpid())
    whole = processes.usage(os.getpid())
    assert os.getpid() in threads
    # How a thread's time splits into user and system is an estimate; their sum is not.
    of_threads = sum(times.user_s + times.system_s for times in threads.values())
    assert of_threads <= whole.user_s + whole.system_s + 2 / os.sysconf("SC_CLK_TCK")
    assert of_threads > 0
    assert 0 < whole.resident_bytes <= whole.peak_bytes


def test_an_interruption_waits_for_what_must_not_be_interrupted() -> None:
    handlers = {signum: signal.getsignal(signum) for signum in interrupts.SIGNALS}
    done = []
    try:
        interrupts.install()
        with pytest.raises(KeyboardInterrupt), interrupts.deferred():  # noqa: PT012
            with interrupts.deferred():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        signal.raise_signal(signal.SIGTERM)  # a second one must not stop the cleaning up
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert done == ["inner", "outer"]
