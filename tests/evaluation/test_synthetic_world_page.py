import json
import pathlib
from html.parser import HTMLParser

from flamingo_jax.evaluation.charts import last_gates, training_charts
from flamingo_jax.evaluation.media import LoadedMedia, Preprocessing
from flamingo_jax.evaluation.protocol.benchmark import Prediction, summarise
from flamingo_jax.evaluation.synthetic_world.page import Highlight, write_report
from flamingo_jax.json_lines import read_lines
from flamingo_jax.web_page import Table
from tests.evaluation.world import visual
from tests.inference.tiny_models import tiny_config

METRICS = [
    {
        "step": 10,
        "loss": 3.0,
        "loss/ltip": 2.0,
        "gates/attention": [0.0, 0.1],
        "gates/dense": [0.2, 0.0],
    },
    {
        "step": 20,
        "loss": 2.0,
        "loss/ltip": 1.0,
        "gates/attention": [0.3, 0.4],
        "gates/dense": [0.5, 0.6],
    },
    {"step": 20, "held_out/ltip/loss": 1.5, "held_out/ltip/loss_without_images": 2.5},
]


class Counter(HTMLParser):
    """Counts opened elements and keeps the sources of images; complains where elements are
    not closed in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.sources: list[str] = []
        self.opened: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:  # type: ignore[type-arg]
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("meta", "img"):
            self.opened.append(tag)
        self.sources += [value for name, value in attrs if name == "src"]

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list) -> None:  # type: ignore[type-arg]
        self.counts[tag] = self.counts.get(tag, 0) + 1


def test_the_report_is_one_whole_file(tmp_path: pathlib.Path) -> None:
    predictions = [
        Prediction(
            str(n),
            "<image>Output:",
            "a <b>red</b> star",
            ("a star",),
            float(n % 3 == 0),
            media=LoadedMedia(visual(n, 1 + 7 * (n % 2))),
        )
        for n in range(30)
    ]
    write_report(
        tmp_path,
        {"seen": {"x": 0.5}},
        title="A & B",
        tables=[Table("Results", ["", "seen"], [["x", 0.5], ["y", None], ["z", 12]])],
        results=[("captions", summarise("captions", 0, predictions))],
        how=Preprocessing.of(tiny_config(40)),
        training={"flamingo": METRICS, "none": []},
        highlights=[Highlight("captions & more", 0.75, "by chance", 0.5), Highlight("all", 1.0)],
        lines={"binding": {"model": ([1, 2], [0.5, 0.9])}},
    )
    assert json.loads((tmp_path / "report.json").read_text()) == {"seen": {"x": 0.5}}
    text = (tmp_path / "report.html").read_text()
    page = Counter()
    page.feed(text)
    assert not page.opened
    assert page.counts["svg"] == 4
    assert page.counts["img"] == 12
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "a &lt;b&gt;red&lt;/b&gt; star" in text
    assert "50.0 %" in text
    assert "captions &amp; more<b>75 %</b>" in text and "<em>50 %</em> by chance" in text
    assert "33.3 % of 30" in text


def test_charts_show_what_was_measured() -> None:
    assert len(training_charts("stage", METRICS)) == 3
    assert len(training_charts("stage", METRICS[:1])) == 2
    assert training_charts("stage", []) == []
    assert last_gates(METRICS) == {"attention": [0.3, 0.4], "dense": [0.5, 0.6]}


def test_a_metrics_file_cut_short_is_read_as_far_as_it_is_whole(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_lines(file) == []
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_lines(file) == [{"step": 1, "loss": 2.0}]
