"""The report: what it may compare, what it shows of outside names, its pictures. A repository: test_experiments.py."""

import html
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Patch
from experiment_files import write_results

from wanda_dvc.results.experiments import Experiment
from wanda_dvc.results.measures import MEASURES, Results
from wanda_dvc.results.report import chart, group, page, report, section, svg, why_separate
from wanda_dvc.results.show import settings_line, table_notes
from wanda_dvc.stages import MODELS
from wanda_dvc.study.folder import Study

MEASURE = {measure.name: measure for measure in MEASURES}
GOLDEN = Path(__file__).parent / "corpus/report.txt"


def text_of(source: str) -> str:
    """The text of a page: a row of a table is a line of cells, a picture its title."""
    body = re.sub(r'<img alt="([^"]*)"[^>]*>', r"[\1]", source.partition("<body>")[2])
    body = re.sub(r"</t[hd]>\s*<t[hd]>|</?t[hd]>", " | ", body)
    lines = [" ".join(line.split()) for line in re.sub(r"<[^>]*>", "", body).splitlines()]
    return html.unescape("\n".join(line for line in lines if line))


def said_of(*experiments: Experiment, notes: Sequence[tuple[str, str]] = ()) -> str:
    """The text of the report of experiments."""
    return text_of(page("study", list(experiments), list(notes)))


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Experiment]:
    """Experiments named e0, e1, … of results like `write_results`'."""
    found: list[Experiment] = []

    def make(
        recipe: str = "wanda", sparsity: float = 0.5, loss: float = 2.5, right: int = 20, **words: Any
    ) -> Experiment:
        name = f"e{len(found)}"
        study = write_results(tmp_path / name, recipe, sparsity, loss, right, **words)
        found.append(Experiment(name, None, study, {model: Results.of(study, model) for model in MODELS}))
        return found[-1]

    return make


def test_experiments_on_one_and_on_several_texts_differ(made: Callable[..., Experiment], tmp_path: Path):
    """Several texts have other settings' names than one. Pairs differ in the text: no test compares their recipes."""
    first, second = ({"source": str(tmp_path / f"{name}.txt")} for name in "ab")
    texts: dict[str, Any] = {"wanda": first, "admm": second, "wanda-refit": [first, second]}
    members = [made(recipe, calibration__text=text) for recipe, text in texts.items()]
    for some in (members, members[1:]):
        shown = section(some, first=some[0])
        (settings,) = (line for line in shown["protocol"] if line.startswith("Settings"))
        assert "calibration.windows" in settings
        assert ".source" not in settings
        names = [row[0] for row in shown["results"]]
        assert sum("calibration.text.1.source" in name for name in names) == 2  # of the model, and against dense
        assert len(names) == 2 + 2 * len(some)  # the headings, dense, and each model twice


def test_a_note_names_the_models_that_it_is_of(made: Callable[..., Experiment]):
    """Another calibration text, and a text of another name in the settings."""
    one, other = made(), made(calibration__text__source="wikitext2", calibration__text__split="train")
    models = {"e0": one.final, "e1": other.final}
    first, _, second, *_ = table_notes({"e0": one.params, "e1": other.params}, models, base="e0")
    assert re.fullmatch(r"e0: Perplexity on embedded: 4 windows .* has the same source.*", first)
    assert re.fullmatch(r"e1: Perplexity on embedded: 4 windows .* has another source.", second)
    renamed = one.params.model_copy(deep=True)
    renamed.perplexity.texts["docs"] = renamed.perplexity.texts.pop("embedded")
    assert next(table_notes({"e0": renamed}, models, base="e0")).endswith("float32.")


def test_only_comparable_results_are_compared(made: Callable[..., Experiment]):
    said = said_of(made(), made("magnitude-rows", loss=3.5, right=4, text="1"))
    assert settings_line(made(sparsity=0.7, pattern="2:4").params) == "/models/tiny: wanda, pattern 2:4, sparsity 0.5"
    assert "\ntiny (differs in tokens_sha256)\n" in said
    assert "against magnitude-rows" not in said
    assert "| e0: wanda, sparsity 0.5 against dense | | | 1.649 ×" in said
    assert "| e1: magnitude-rows, sparsity 0.5 against dense | | | 4.482 ×" in said
    assert ": wanda, recovery.tokens 4,096, sparsity 0.5 |" in said_of(made(recovery__tokens=4096))


def test_a_protocol_that_is_not_known_matches_all_and_joins_none(made: Callable[..., Experiment]):
    unknown, one, other = made(), made(), made()
    for results in unknown.results.values():
        for name in ("perplexity/embedded", "zero_shot"):
            results.details(name).clear()
    other.final.details("perplexity/embedded")["protocol"]["tokens_sha256"] = "1"
    assert group([unknown, one, other]) == [[unknown, one], [other]]
    assert why_separate(one, made(dtype="bfloat16")) == ["dtype"]
    assert why_separate(unknown, made(perplexity__length=65)) == ["perplexity.length"]  # then the settings say it


def test_the_picture_has_room_for_the_names_of_many_experiments():
    """Matplotlib warns of axes without any height. No interval is known."""
    results = Results({"perplexity/embedded": {"perplexity": 2.0}})
    points = [(f"{number} {'calibration.text.source=wikitext2 ' * 3}", 0.5, results) for number in range(24)]
    svg(chart(MEASURE["perplexity"], "embedded", points, results))


def test_the_picture_shows_what_the_table_says(made: Callable[..., Experiment]):
    more, less = made(), made(sparsity=0.07, loss=2.1, right=23)  # in the order of their names
    dense = more.results["dense"]
    for name, on, scale in (("mean_acc", "", "linear"), ("perplexity", "embedded", "log")):
        measure = MEASURE[name]
        (ax,) = chart(measure, on, [("wanda", 0.07, less.final), ("wanda", 0.5, more.final)], dense).axes
        bars: Any = ax.collections[0]
        models = (dense, less.final, more.final)
        read: list[Any] = [measure.read(one, on) for one in models]
        x = np.array([[100 * sparsity, *one[:3]] for sparsity, one in zip((0.07, 0.5), read[1:], strict=True)])
        np.testing.assert_allclose(np.array(ax.lines[0].get_xydata()), x[:, :2])
        np.testing.assert_allclose(np.array(bars.get_segments())[:, :, 1], x[:, 2:])
        assert ax.lines[-1].get_ydata()[0] == read[0].value  # type: ignore[index]
        assert ax.get_yscale() == scale


def test_the_dense_model_has_the_texts_of_all_experiments_and_no_removed_one(made: Callable[..., Experiment]):
    one, other = made(), made("magnitude-rows", loss=3.5, perplexity__texts__more__source="ptb")
    other.results["dense"].metrics["perplexity/more"] = {"perplexity": 2.0}
    said = said_of(one, other)
    assert re.search(r"\| dense \|.* 7.39 \(6.49 to 8.41\) .* 2.00 ", said)
    assert re.search(r"\| e0: wanda, sparsity 0.5 against dense \|.* 1.649 × ", said)
    assert made(on="removed").final.texts == []


HOSTILE = "<script>alert(1)</script>|`code`|``|&lt;[x](y)|*a*|__b__|$c$|0.12345|\\"


def test_no_local_path_is_published(made: Callable[..., Experiment]):
    """Of models, texts and notes."""
    words = {"model": "/home/me/models, old/small", "perplexity__texts__embedded__source": "/home/me/data/own.txt"}
    one = made(**words, calibration__text__source="/home/me/a/same.txt", recovery__text__source="/home/me/c/long.txt")
    other = made(**words, calibration__text__source="/home/me/My (b): texts/same.txt")
    one.notes.append("metrics of /home/me/study/metrics/x.json: damaged")
    said = said_of(one, other, notes=[("waiting", "queued (model=/home/me/models/other)")])
    assert "/home" not in said
    assert "me/" not in said
    assert "recovery.text.source='long.txt'" in said_of(other, one)
    for shown in ("\nsmall\n", "source='same.txt'", "x.json: damaged", "model=other"):
        assert shown in said


def test_pages_show_names_as_they_are(made: Callable[..., Experiment], tmp_path: Path):
    """Two experiments whose names, model and text are markup."""
    plain = HOSTILE.replace("/", "")
    experiments = [made(model=f"/m/{plain}", perplexity__texts__embedded__source=f"/t/{plain}.txt") for _ in range(2)]
    for number, one in enumerate(experiments):
        one.name = f"{number}{HOSTILE}"
    unfinished = [(HOSTILE, f"queued (sparsity={HOSTILE})"), (HOSTILE, "no results")]
    source = page(HOSTILE, experiments, unfinished)
    assert "<script" not in source
    assert f"<title>{html.escape(HOSTILE)}</title>" in source.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")
    for expected in (f"1{HOSTILE}: wanda, sparsity 0.5", f"{HOSTILE}: no results"):
        assert expected in text_of(source)


def test_equal_results_give_equal_bytes(made: Callable[..., Experiment], tmp_path: Path, monkeypatch: Patch):
    experiments, study = [made()], Study(tmp_path / "e0")
    monkeypatch.setattr("wanda_dvc.results.report.collect", lambda **_: (experiments, []))
    output = tmp_path / "report.html"
    report(study=study, output=output)
    before = output.read_bytes()
    report(study=study, output=output)
    assert output.read_bytes() == before


def test_the_page_is_the_golden_one(made: Callable[..., Experiment]):
    """Two methods at two sparsities, one of them diverged; the page stands on its own."""
    experiments = [
        made("wanda", 0.5, 2.5, 20),
        made("magnitude-rows", 0.5, 3.5, 4),
        made("magnitude-rows", 0.7, math.nan, 12),
        made("wanda", 0.7, 3.0, 23),
    ]
    source = page("Pruning study: study", experiments, [("waiting", "queued (sparsity=0.3)"), ("lost", "no results")])
    text = re.sub(r"wanda-dvc \d[^ ]*\.", "wanda-dvc VERSION.", text_of(source)) + "\n"
    assert text == GOLDEN.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:image/svg)', source)
    assert "<script" not in source
    assert source.count("<img") == 2
