"""docs/grafana.json: it has the shape of a dashboard, and asks for nothing that /metrics does not have.

The shape is that of Grafana's schema, of whose fields only those that are used are written down here. The
whole schema is in the package grafana-foundation-sdk, whose `Dashboard` reads the file and loses nothing.
"""

import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict, Field

from megatron_star.engine.expert_load import ExpertLoad
from megatron_star.server.metrics import PREFIX, STORE_COUNTS, ExpertCollector

FILE = Path(__file__).parents[2] / "docs/grafana.json"
ROWS = ["Load", "Latency", "Tokens", "Cache", "KV memory", "Experts", "Store", "Errors"]
SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_sum", "_count"),
    "info": ("_info",),
    "gauge": ("",),
}
Count = Annotated[int, Field(ge=0)]


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class DataSource(Shape):
    type: Literal["prometheus"]
    uid: Literal["${datasource}"]


class Place(Shape):
    h: Annotated[int, Field(gt=0)]
    w: Annotated[int, Field(gt=0, le=24)]
    x: Annotated[int, Field(ge=0, lt=24)]
    y: Count


class Target(Shape):
    refId: Annotated[str, Field(pattern="^[A-Z]$")]
    expr: str
    legendFormat: str


class Defaults(Shape):
    unit: Literal["short", "reqps", "ops", "s", "percentunit", "bytes", "Bps"]
    min: Literal[0]


class FieldConfig(Shape):
    defaults: Defaults
    overrides: Annotated[list, Field(max_length=0)]


class Legend(Shape):
    displayMode: Literal["list", "table", "hidden"]
    placement: Literal["bottom", "right"]
    showLegend: bool


class Tooltip(Shape):
    mode: Literal["single", "multi", "none"]
    sort: Literal["asc", "desc", "none"]


class Options(Shape):
    legend: Legend
    tooltip: Tooltip


class Row(Shape):
    id: Annotated[int, Field(gt=0)]
    type: Literal["row"]
    title: str
    collapsed: Literal[False]
    gridPos: Place
    panels: Annotated[list, Field(max_length=0)]


class TimeSeries(Shape):
    id: Annotated[int, Field(gt=0)]
    type: Literal["timeseries"]
    title: str
    description: Annotated[str, Field(min_length=1)]
    datasource: DataSource
    gridPos: Place
    fieldConfig: FieldConfig
    options: Options
    targets: Annotated[list[Target], Field(min_length=1)]


class Variable(Shape):
    name: str
    label: str
    type: Literal["datasource", "query"]
    query: str
    hide: Literal[0]
    datasource: DataSource | None = None
    refresh: Literal[1, 2] | None = None
    sort: Literal[0, 1] | None = None
    multi: bool = False
    includeAll: bool = False
    current: dict[Literal["text", "value"], str] | None = None


class Times(Shape):
    from_: Annotated[str, Field(alias="from", pattern="^now-")]
    to: Literal["now"]


class Dashboard(Shape):
    uid: Annotated[str, Field(max_length=40)]
    title: str
    description: str
    tags: list[str]
    schemaVersion: Annotated[int, Field(ge=36)]
    version: Count
    editable: bool
    graphTooltip: Literal[0, 1, 2]
    timezone: Literal["browser", "utc"]
    refresh: str
    time: Times
    links: Annotated[list, Field(max_length=0)]
    annotations: dict[Literal["list"], list]
    templating: dict[Literal["list"], list[Variable]]
    panels: list[Annotated[Row | TimeSeries, Field(discriminator="type")]]


@pytest.fixture(scope="module")
def dashboard() -> Dashboard:
    return Dashboard.model_validate_json(FILE.read_text())


def test_the_dashboard_has_its_rows_and_panels_that_do_not_lie_on_each_other(dashboard):
    panels = dashboard.panels
    assert [panel.title for panel in panels if panel.type == "row"] == ROWS
    assert len({panel.id for panel in panels}) == len(panels)
    places = [panel.gridPos for panel in panels]
    assert all(place.x + place.w <= 24 for place in places)
    for one, two in combinations(places, 2):
        apart = one.x + one.w <= two.x or two.x + two.w <= one.x
        assert apart or one.y + one.h <= two.y or two.y + two.h <= one.y


def metric_names(exposition: str) -> set[str]:
    """As PromQL asks for them."""
    families = text_string_to_metric_families(exposition)
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def names_with_experts() -> set[str]:
    """What a model with experts adds."""
    counts = torch.ones(1, 2, dtype=torch.int64)
    load = ExpertLoad(layers=(0,), ep_size=2, counted=counts, total=counts, recent=counts)
    collector = ExpertCollector(SimpleNamespace(expert_load=lambda: load), each_expert=True)
    return {family.name + suffix for family in collector.collect() for suffix in SUFFIXES[family.type]}


@pytest.fixture
def served(server) -> set[str]:
    """What /metrics has, of any model and with a store."""
    server.put()
    of_store = {f"{PREFIX}_context_store_{name}_total" for name in STORE_COUNTS}
    return metric_names(httpx.get(f"{server.url}/metrics").text) | names_with_experts() | of_store


def test_what_is_said_to_answer_for_vllms_metrics_is_there(served):
    text = (FILE.parent / "operations.md").read_text()
    rows = re.findall(r"^\| `vllm:.*\| (.*) \|$", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)", row)}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in served} | served
    assert len(rows) > 5 and {f"{PREFIX}_{name}" for name in named} <= families


def test_every_expression_asks_for_metrics_that_there_are(dashboard, served):
    queries = [variable.query for variable in dashboard.templating["list"] if variable.type == "query"]
    queries += [target.expr for panel in dashboard.panels if panel.type != "row" for target in panel.targets]
    for query in queries:
        asked = set(re.findall(rf"\b{PREFIX}_\w+", query))
        assert asked and asked <= served, f"{query}: {asked - served}"


def test_every_expression_keeps_to_the_servers_that_are_chosen(dashboard):
    for panel in dashboard.panels:
        for target in getattr(panel, "targets", ()):
            names = re.findall(rf"\b{PREFIX}_\w+", target.expr)
            assert target.expr.count('instance=~"$instance"') == len(names), target.expr


def test_labels_in_legends_are_those_that_an_expression_keeps(dashboard):
    for panel in dashboard.panels:
        for target in getattr(panel, "targets", ()):
            shown = set(re.findall(r"{{(\w+)}}", target.legendFormat))
            kept = set(re.findall(r"\w+", " ".join(re.findall(r" by \(([^)]*)\)", target.expr))))
            assert shown <= kept, (target.legendFormat, target.expr)
