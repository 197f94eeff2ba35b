"""Looking at statistics: one linear, features that stand out again and again, two sets side by side."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from wanda_dvc.cli import app
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.statistics import BlockStats, InputStats
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import read_provenance
from wanda_dvc.study.tensors import seal, write_stats

ATTENTION, MLP = ["q_proj", "k_proj"], ["up_proj"]


def write(folder: Path, norms: list[list[torch.Tensor]], *, tokens: int = 4, source: str = "a text") -> None:
    """Statistics of blocks with two distinct inputs each, from their norms."""
    folder.mkdir(parents=True, exist_ok=True)
    for block, both in enumerate(norms):
        readers = {
            f"layers.{block}.{names[0]}": [f"layers.{block}.{name}" for name in names] for names in (ATTENTION, MLP)
        }
        inputs = {
            name: InputStats(norm.double() ** 2, torch.zeros(len(norm), dtype=torch.float64), tokens)
            for name, norm in zip(readers, both, strict=True)
        }
        write_stats(folder, block, BlockStats(inputs, readers, []))
    made = {
        "made_by": "calibrate",
        "model": {"source": "tiny", "sha256": "0"},
        "text": {"source": source, "sha256": "0"},
        "params": {"windows": 1, "length": 4, "dtype": "float32"},
    }
    seal(folder, made)


def flat(**larger: float) -> torch.Tensor:
    """Twenty features of norm 2, but for `f3=…` and the like."""
    norm = torch.full((20,), 2.0)
    for name, value in larger.items():
        norm[int(name[1:])] = value
    return norm


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Three blocks; feature 3 of attention's input is an outlier in all, 7 in the last two, 9 in one.

    Feature 11 of the MLP's input is just below the limit in two.
    """
    (tmp_path / "params.yaml").touch()
    write(
        tmp_path / "stats/norms",
        [
            [flat(f3=50, f9=40), flat(f11=12)],
            [flat(f3=20, f7=13), flat(f3=16)],
            [flat(f3=14, f7=30), flat(f11=12)],
        ],
    )
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def stats(*words: str) -> str:
    done = CliRunner().invoke(app, ["stats", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_one_linear_is_what_it_reads(study: Project):
    for name in ("k_proj", "layers.1.k_proj"):
        records = json.loads(stats("--linear", name, "--json"))
        assert all(f"layers.{record['block']}.k_proj" in record["linears"] for record in records)
        assert [record["block"] for record in records] == ([0, 1, 2] if name == "k_proj" else [1])
    assert len(json.loads(stats("--layer", "2", "--linear", "up_proj", "--json"))) == 1


def test_a_linear_is_named_by_whole_words(study: Project):
    with pytest.raises(UserError, match=r"--linear: got proj, expected .*k_proj, q_proj, up_proj"):
        stats("--linear", "proj")


def test_recurring_features_are_outliers_in_more_than_one_block(study: Project):
    assert json.loads(stats("--recurring", "--json")) == [
        {"input": "q_proj, k_proj", "feature": 3, "blocks": [0, 1, 2], "largest_ratio": 25.0},
        {"input": "q_proj, k_proj", "feature": 7, "blocks": [1, 2], "largest_ratio": 15.0},
    ]
    table = stats("--recurring")
    assert "3 of 3" in table
    assert "0–2" in table


def test_several_experts_of_a_block_are_one_block_and_each_has_its_median(study: Project):
    """Two blocks of three experts, of which the last one is small."""
    norms = [flat(f3=50), flat(f3=50), flat() / 20]
    inputs = {
        f"layers.0.experts.{number}.w1": InputStats(norm.double() ** 2, torch.zeros(20, dtype=torch.float64), 4)
        for number, norm in enumerate(norms)
    }
    made = read_provenance(study.stats, "calibrate")
    (study.stats / "block_002.safetensors").unlink()
    for block in range(2):
        own = {name.replace("layers.0", f"layers.{block}"): x for name, x in inputs.items()}
        write_stats(study.stats, block, BlockStats(own, {name: [name] for name in own}, []))
    seal(study.stats, made)
    assert json.loads(stats("--recurring", "--json")) == [
        {"input": "w1", "feature": 3, "blocks": [0, 1], "largest_ratio": 25.0}
    ]


def test_nothing_recurs_where_all_is_flat(study: Project):
    write(study.stats, [[flat(), flat()]] * 3)
    assert stats("--recurring") == "No feature is an outlier in more than one block.\n"
    assert json.loads(stats("--recurring", "--json")) == []


def test_a_ratio_to_a_median_of_0_is_null_in_json(study: Project):
    """More than half of the features are 0 in each block: JSON has no number for the ratio."""
    sparse = torch.zeros(20)
    sparse[3] = 5.0
    write(study.stats, [[sparse, flat()]] * 3)

    (record,) = json.loads(stats("--recurring", "--json"), parse_constant=pytest.fail)
    assert record == {"input": "q_proj, k_proj", "feature": 3, "blocks": [0, 1, 2], "largest_ratio": None}
    assert "inf" not in stats("--recurring")


def test_statistics_equal_themselves_whatever_the_number_of_tokens(study: Project, tmp_path: Path):
    """Norms grow with the root of the tokens; what is compared doesn't."""
    write(tmp_path / "other", [[2 * flat(f3=50, f9=40), 2 * flat()]] * 3, tokens=16, source="another text")
    write(study.stats, [[flat(f3=50, f9=40), flat()]] * 3)
    compared = json.loads(stats("--compare", "other", "--json"))
    for record in compared["inputs"]:
        assert record["largest_change"] == record["mean_change"] == 0
        assert record["outliers_gained"] == record["outliers_lost"] == []
        constant = record["input"] == "up_proj"
        assert record["correlation"] is None if constant else record["correlation"] == pytest.approx(1)
    assert "1 windows of 4 tokens of another text" in stats("--compare", "other")


def test_a_comparison_says_what_changed_and_where(study: Project, tmp_path: Path):
    there = [
        [flat(f3=50, f9=40), flat(f11=12)],
        [flat(f3=10, f5=26), flat(f3=16)],
        [flat(f3=14, f7=30), flat(f11=12)],
    ]
    write(Project(tmp_path / "other").stats, there)
    records = json.loads(stats("--compare", "other", "--json"))["inputs"]
    changed = [record for record in records if record["largest_change"]]
    assert [(record["block"], record["input"]) for record in changed] == [(1, "q_proj, k_proj")]
    (one,) = changed
    # Here against there: feature 3 20 / 10, 5 2 / 26, 7 13 / 2.
    assert (one["largest_change"], one["at_feature"]) == (pytest.approx(5.5), 7)
    assert one["mean_change"] == pytest.approx((1 + 24 / 26 + 5.5) / 20)
    assert (one["outliers_gained"], one["outliers_lost"]) == ([3, 7], [5])
    here = torch.stack([flat(f3=20, f7=13), there[1][0]]).double()
    assert one["correlation"] == pytest.approx(torch.corrcoef(here)[0, 1].item())


def test_a_feature_that_is_0_there_is_named_and_has_no_change(study: Project, tmp_path: Path):
    write(tmp_path / "other", [[flat(f5=0), flat()]] * 3)
    write(study.stats, [[flat(f5=8, f6=3), flat()]] * 3)
    first = json.loads(stats("--compare", "other", "--json"))["inputs"][0]
    assert first["excited_here_alone"] == [5]
    assert (first["largest_change"], first["at_feature"]) == (pytest.approx(0.5), 6)
    assert first["mean_change"] == pytest.approx(0.5 / 19)


def test_what_no_token_reached_is_compared_with_nothing(study: Project, tmp_path: Path):
    write(tmp_path / "other", [[torch.zeros(20), flat()]] * 3, tokens=0)
    assert all(r["correlation"] is None for r in json.loads(stats("--compare", "other", "--json"))["inputs"])
    assert "nan" not in stats("--compare", "other")


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        ([[flat(), flat()]], "1 blocks, expected 3"),
        ([[flat()[:10], flat()]] * 3, "no input of layers.0.q_proj with 20 features"),
    ],
)
def test_another_models_statistics_are_refused(
    study: Project, tmp_path: Path, norms: list[list[torch.Tensor]], said: str
):
    write(tmp_path / "other", norms)
    with pytest.raises(UserError, match=said):
        stats("--compare", "other")


def test_a_folder_without_statistics_is_refused(study: Project, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no statistics"):
        stats("--compare", "empty")


@pytest.mark.parametrize(
    "words", ["--recurring --layer 1", "--compare stats --linear up_proj", "--compare stats --recurring"]
)
def test_one_view_at_a_time(study: Project, words: str):
    done = CliRunner().invoke(app, ["stats", *words.split()])
    assert done.exit_code == 2
    assert "exclude" in done.output
