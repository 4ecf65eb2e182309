"""The alert rules and the dashboard in ``examples/``: what they ask for is there."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from quorumfs.control.metrics import metrics

ROOT = Path(__file__).parents[2]
ALERTS, DASHBOARD = (ROOT / "examples" / name for name in ("alerts.yml", "dashboard.json"))
PROMTOOL = ROOT / ".guest" / "promtool"


def promtool(*arguments: str | Path, cwd: Path) -> str:
    command = [str(PROMTOOL), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_understands_the_alerts(tmp_path: Path) -> None:
    assert "SUCCESS: 7 rules found" in promtool("check", "rules", ALERTS, cwd=tmp_path)


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """And only then, by promtool's own simulation of time."""
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(ROOT / "tests" / "data" / "alerts_test.yml", tmp_path)
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml", cwd=tmp_path)


@pytest.mark.parametrize("path", [ALERTS, DASHBOARD], ids=lambda path: path.name)
def test_each_metric_that_is_asked_for_is_told(path: Path) -> None:
    told = {sample for metric in metrics([]) for sample in names(metric.name, metric.type)}
    asked = set(re.findall(r"\bquorumfs_\w+", path.read_text()))
    assert asked
    assert asked <= told


def names(metric: str, kind: str) -> list[str]:
    endings = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}
    return [metric + ending for ending in endings.get(kind, [""])]


def test_the_dashboard_is_for_any_prometheus() -> None:
    """No data source of one machine, and each panel has a place of its own."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {"${source}"}
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len({panel["id"] for panel in panels}) == len(panels)
