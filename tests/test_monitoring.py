"""The dashboard and the alerts in clusters/, loaded by a real Prometheus that scrapes a server's pages."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import loopback
from fronts import Front
from headtail.adapters.storage import open_storage
from headtail.core.task import load_task
from headtail.stages import serve
from local_server import Running
from ports import free_port
from test_serve import published, says, segments
from timescale import limit

CLUSTERS = Path(__file__).parent.parent / "clusters"
RULES, DASHBOARD = CLUSTERS / "prometheus-rules.yaml", CLUSTERS / "grafana-dashboard.json"
PROMETHEUS = [name for name in ("prometheus", "promtool") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(PROMETHEUS), reason="needs the Debian package prometheus")
_NAME = re.compile(r"\bheadtail_[a-z_]+\b")
_SUFFIX = re.compile(r"_(bucket|sum|count)$")


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return found


def queries() -> list[str]:
    """The dashboard's queries, with its variables filled in."""
    texts = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return [
        text.replace("$__rate_interval", "1m").replace("$job", "headtail").replace("$instance", ".*").replace("$task", ".*")
        for text in texts
    ]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def metrics_of(text: str) -> set[str]:
    """Names in the exposition format, without those that a histogram or the client library adds."""
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    return {name for name in names if not name.endswith("_created")}


class Prometheus:
    """A Prometheus with the shipped rules that scrapes one address."""

    def __init__(self, folder: Path, target: str) -> None:
        self.url, self.folder = f"http://127.0.0.1:{free_port()}", folder
        scrape = {"job_name": "headtail", "scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
        config = {"global": {"evaluation_interval": "1s"}, "rule_files": [str(RULES)], "scrape_configs": [scrape]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def __enter__(self) -> Prometheus:
        options = [f"--config.file={self.folder}/prometheus.yml", f"--storage.tsdb.path={self.folder}/data"]
        address = f"--web.listen-address={self.url.removeprefix('http://')}"
        self.log = (self.folder / "log").open("w")
        self.process = subprocess.Popen(["prometheus", *options, address], stdout=self.log, stderr=subprocess.STDOUT)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(limit(20))
        self.log.close()

    def get(self, path: str, **arguments: str) -> Any:
        body = loopback.get(f"{self.url}/api/v1/{path}", params=arguments).json()
        assert body["status"] == "success", (arguments, body)
        return body["data"]

    def until(self, check: Callable[[], Any]) -> Any:
        end = time.monotonic() + limit(60)
        while True:
            try:
                if found := check():
                    return found
            except (httpx.TransportError, ValueError):  # a 503 without JSON while it starts
                pass
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < end, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.2)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, str]]:
    """Prometheus over the pages of a front that has answered, degraded and refused; and the text of its /metrics."""
    folder = tmp_path_factory.mktemp("monitoring")
    task, store = load_task("query_segmentation"), open_storage(str(folder / "store"))
    published(store, folder, task)
    front = Front(store, serve.Config(), folder, says(task, segments("rare")))

    async def use() -> None:
        async with front.client() as http:
            for query in ("pizza near me", "rare", ""):
                await http.post("/v1/answer", json={"query": query})
            front.answerer.tiers = ()
            await http.post("/v1/answer", json={"query": "another one"})

    asyncio.run(use())
    for kind in ("compared", "agreed"):  # as the process of shadow mode counts
        front.counters.add(f"shadow/teacher/{kind}")
    front.counters.add("client/current/teacher")
    with Running(front.pages()) as pages:
        text = loopback.get(f"{pages.url}/metrics").text
        with Prometheus(folder, pages.url.removeprefix("http://")) as prometheus:
            prometheus.until(lambda: prometheus.get("query", query='up{job="headtail"} == 1')["result"])
            yield prometheus, text


def test_prometheus_takes_every_query_and_every_rule(watched: tuple[Prometheus, str]) -> None:
    prometheus, _ = watched
    for expression in [*queries(), *(rule["expr"] for rule in rules())]:
        prometheus.get("query", query=expression)

    def evaluated() -> list[dict[str, Any]]:
        found = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        return found if found and all(rule["health"] != "unknown" for rule in found) else []

    loaded = prometheus.until(evaluated)
    assert {rule["name"]: rule["health"] for rule in loaded} == {rule["alert"]: "ok" for rule in rules()}


def test_each_metric_of_dashboard_and_rules_is_there_and_each_that_is_there_is_shown(watched: tuple[Prometheus, str]) -> None:
    prometheus, text = watched
    scraped = {name for name in prometheus.get("label/__name__/values") if name.startswith("headtail_")}
    in_dashboard, in_rules = (set(_NAME.findall(" ".join(texts))) for texts in (queries(), [rule["expr"] for rule in rules()]))
    assert in_dashboard
    assert not in_dashboard - scraped
    assert not in_rules - scraped
    families = {_SUFFIX.sub("", name) for name in in_dashboard}
    assert metrics_of(text) == families, "a metric that no panel shows, or a panel of one that is gone"
    documented = set(_NAME.findall((CLUSTERS.parent / "docs" / "monitoring.md").read_text(encoding="utf-8")))
    assert documented == families


def test_a_healthy_server_raises_no_alert_and_panels_have_figures(watched: tuple[Prometheus, str]) -> None:
    prometheus, _ = watched
    prometheus.until(lambda: prometheus.get("query", query="count_over_time(headtail_fronts[1m]) > 3")["result"])
    assert not [alert for alert in prometheus.get("alerts")["alerts"] if alert["state"] == "firing"]
    without = [expression for expression in queries() if not prometheus.get("query", query=expression)["result"]]
    assert all('source="dynamic"' in expression for expression in without), without


def test_the_file_is_a_dashboard() -> None:
    found = dashboard()
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids))
    places = [[panel["gridPos"][name] for name in "xywh"] for panel in found["panels"]]
    cells = [(column, row) for x, y, w, h in places for column in range(x, x + w) for row in range(y, y + h)]
    assert len(cells) == len(set(cells)), "two panels lie on one another"
    assert max(column for column, _ in cells) < 24
    assert {variable["name"] for variable in found["templating"]["list"]} == {"datasource", "job", "instance", "task"}
    for panel in found["panels"]:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    """promtool's own unit test of rules: a tenth of all answers is the fallback; then a hundredth."""

    def series(degraded: int) -> list[dict[str, str]]:
        labels = '{job="headtail", instance="a"'
        return [
            {"series": f"up{labels}}}", "values": "1x30"},
            {"series": f'headtail_requests_total{labels}, path="cache"}}', "values": f"0+{6000 - degraded}x30"},
            {"series": f'headtail_requests_total{labels}, path="fallback"}}', "values": f"0+{degraded}x30"},
            {"series": f'headtail_degraded_total{labels}, reason="timeout"}}', "values": f"0+{degraded}x30"},
            {"series": f"headtail_fronts{labels}}}", "values": "2x15 0x15"},
        ]

    def expect(name: str, minute: int, fires: bool, **labels: str) -> dict[str, Any]:
        rule = next(rule for rule in rules() if rule["alert"] == name)
        notes = {key: text.replace("{{ $value | humanizePercentage }}", "10%") for key, text in rule["annotations"].items()}
        alert = {"exp_labels": {**rule["labels"], "instance": "a", **labels}, "exp_annotations": notes}
        return {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": [alert] if fires else []}

    def task(name: str, degraded: int) -> list[dict[str, str]]:
        """The same of one of two tasks in a server, each with a release of its own."""
        mine = [one | {"series": one["series"].replace('"a"', f'"a", task="{name}"')} for one in series(degraded)[1:]]
        labels = f'job="headtail", instance="a", task="{name}", release="{name}", snapshot="{name}"'
        return [*mine, {"series": f"headtail_release_info{{{labels}}}", "values": "2x30"}]

    job = {"job": "headtail"}
    tests = [
        {"interval": "1m", "input_series": series(600), "alert_rule_test": [expect("HeadtailDegraded", 20, True)]},
        {
            "interval": "1m",
            "input_series": [*task("good", 60), *task("bad", 600)],
            "alert_rule_test": [expect("HeadtailDegraded", 20, True, task="bad"), expect("HeadtailReleasesDiffer", 30, False)],
        },
        {
            "interval": "1m",
            "input_series": series(60),
            "alert_rule_test": [
                expect("HeadtailDegraded", 20, False),
                expect("HeadtailNoFront", 14, False),
                expect("HeadtailNoFront", 25, True, **job),
                expect("HeadtailDown", 25, False),
            ],
        },
    ]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}), encoding="utf-8")
    ran = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
