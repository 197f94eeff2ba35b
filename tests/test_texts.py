"""A calibration, or a recovery, on several texts: their shares, their windows, and what names them."""

import itertools
import random
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from c4 import SHARD, documents, packed
from conftest import Make, Patch, calibrate, committed, fetch, mask_and_apply
from hypothesis import given
from hypothesis import strategies as st
from repository import Repository

from wanda_dvc.engine.windows import cut, draw, interleaved, load_tokenizer, tokenize
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params, apportion, check_params, download_sources, read_params, resolved
from wanda_dvc.results.card import card
from wanda_dvc.stages import stage_inputs
from wanda_dvc.stages.inputs import check_distinct, draw_calibration
from wanda_dvc.stages.plan import plan
from wanda_dvc.stages.recover import VALIDATION_WINDOWS, training_windows
from wanda_dvc.study.artifact import read_provenance
from wanda_dvc.study.files import load_json

calibrate_stage: Any = import_module("wanda_dvc.stages.calibrate")
KINDS = {"digits": "0123456789 ", "lower": "abcdefghij ", "upper": "ABCDEFGHIJ ", "signs": "+-*/=<>!?; "}


def params(texts: object, **calibration: object) -> Params:
    content = committed()
    content["calibration"] |= {"text": texts, **calibration}
    return check_params(content)


@pytest.fixture
def sources(tmp_path: Path) -> list[dict[str, Any]]:
    """Four texts without a common character but the space: the text of a window is known by its first one."""
    folder = tmp_path / "sources-of-texts"
    folder.mkdir()
    for name, characters in KINDS.items():
        text = "".join(random.Random(name).choices(characters[:-1], k=3000))
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return [{"source": str(folder / f"{name}.txt")} for name in KINDS]


# --- settings ---


def test_a_list_of_one_text_is_that_text():
    one, listed = params({"source": "c4"}), params([{"source": "c4"}])
    assert stage_inputs(one) == stage_inputs(listed)
    assert resolved(one) == resolved(listed)
    assert download_sources(one) == download_sources(listed)
    assert stage_inputs(one)["calibrate/norms"]["shares"] == [32]


SHARES = [  # calibration.windows, the windows of each text, and their shares
    (32, [None, None], [16, 16]),
    (32, [None, None, None], [11, 11, 10]),
    (32, [24, None, None], [24, 4, 4]),
    (32, [None, 5, None, 1], [13, 5, 13, 1]),
    (32, [20, 12], [20, 12]),
    (4, [None] * 4, [1] * 4),
    (32, [20, 13], None),
    (32, [20, 11], None),
    (32, [32, None], None),
    (3, [None] * 4, None),
    (32, [31], None),
]


@pytest.mark.parametrize(("windows", "named", "shares"), SHARES)
def test_windows_are_shared_by_the_texts(windows: int, named: list[int | None], shares: list[int] | None):
    texts = [{"source": f"org/text{index}", "windows": count} for index, count in enumerate(named)]
    if shares is None:
        with pytest.raises(UserError, match=rf"calibration.text: found \[.*\] windows by text, expected .* {windows},"):
            params(texts, windows=windows)
        return
    given_params = params(texts, windows=windows)
    assert given_params.calibration.shares == shares
    inputs = stage_inputs(given_params)
    assert inputs["calibrate/norms"]["shares"] == shares
    assert [text["dataset"] for text in inputs["download/calibration"]["texts"]] == [text["source"] for text in texts]
    written_out = [{"source": f"org/text{index}", "windows": count} for index, count in enumerate(shares)]
    assert resolved(params(written_out, windows=windows)) == resolved(given_params)


@given(count=st.integers(0, 500), shares=st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_shares_are_in_proportion_and_sum_up(count: int, shares: list[int]):
    counts = apportion(count, shares)
    assert sum(counts) == count
    for number, share in zip(counts, shares, strict=True):
        assert abs(number - count * share / sum(shares)) <= 1
    if len(set(shares)) == 1:
        assert counts == sorted(counts, reverse=True)


REFUSED: list[tuple[object, str]] = [
    ([], "calibration.text: found [], expected a text"),
    ([{"source": "org/a"}] * 2, "calibration.text.1: found the text of calibration.text.0 (org/a, train), expected"),
    ([{"source": "c4"}, {"source": "embedded", "split": "test"}], "calibration.text.1: found the text that perplexity"),
    ([{"source": "c4"}, {"source": "a.txt"}], "calibration.text.1: found {'source': 'a.txt'}, expected a file"),
    ([{"source": "c4"}, {"sorce": "ptb"}], "calibration.text.1.source: missing"),
    ([{"source": "c4"}, {"source": "ptb", "window": 3}], "calibration.text.1.window: no such setting; did you mean"),
    ([{"source": "c4", "windows": 0}], "calibration.text.0.windows: found 0, expected greater than or equal to 1"),
    ([{"source": "c4"}, "ptb"], 'calibration.text.1: found "ptb", expected settings'),
    ([{"source": f"org/{index}"} for index in range(9)], "calibration.text: found [{'source': 'org/0'}, "),
]


@pytest.mark.parametrize(("texts", "expected"), REFUSED)
def test_a_wrong_list_is_refused_with_the_place_of_the_problem(texts: object, expected: str):
    with pytest.raises(UserError) as refused:
        params(texts)
    assert any(problem.startswith(f"params.yaml: {expected}") for problem in refused.value.problems)


def test_a_recoverys_texts_have_shares_in_proportion():
    content = committed() | {"recovery": {"tokens": 100, "text": [{"source": "c4", "windows": 3}, {"source": "ptb"}]}}
    inputs = stage_inputs(check_params(content))
    assert inputs["recover"]["shares"] == [3, 1]
    assert [text["source"] for text in inputs["download/recovery"]["texts"]] == ["c4", "ptb"]
    own = stage_inputs(params([{"source": "c4", "windows": 20}, {"source": "ptb"}]))
    assert own["recover"] == {}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["c4", "ptb"], "The calibration text (c4, ptb) has another source"),
        (["c4", "embedded"], "The calibration text (c4, embedded) has the same source: on text from other"),
    ],
)
def test_a_text_of_any_calibration_source_is_known(texts: list[str], said: str):
    assert params([{"source": source} for source in texts]).about_text("embedded").startswith(said)


# --- windows ---


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_the_first_windows_have_each_text_in_proportion(counts: list[int]):
    text_of = [text for text, count in enumerate(counts) for _ in range(count)]
    order = interleaved(counts)
    assert sorted(order) == list(range(sum(counts)))
    for text in range(len(counts)):  # in the order of their draw
        mine = [index for index in order if text_of[index] == text]
        assert mine == sorted(mine)
    texts = [text_of[index] for index in order]
    assert set(texts[: len(counts)]) == set(range(len(counts)))
    for end in range(1, len(texts) + 1):
        seen = Counter(texts[:end])
        for text, count in enumerate(counts):
            assert abs(seen[text] - end * count / sum(counts)) <= len(counts)


@pytest.mark.parametrize("texts", [2, 4, 8])
def test_every_fourth_of_sixteen_chunks_has_several_texts(texts: int):
    """A repair holds these out: two of each eight windows."""
    counts = [32 // texts] * texts
    of_windows = [index // counts[0] for index in interleaved(counts)]
    held_out = {text for start in range(0, 32, 8) for text in of_windows[start : start + 2]}
    assert len(held_out) >= min(texts, 4)


def test_windows_of_a_text_depend_on_no_other_text(study: Make, sources: list[dict[str, Any]]):
    drawn: dict[str, dict[str, list[list[int]]]] = {}  # by list of texts, by text
    for names in ([0, 1], [1, 0], [0, 2, 3], [3, 1, 0, 2]):
        listed = [sources[index] | {"windows": 3} for index in names]
        made = study(calibration__text=listed, calibration__windows=3 * len(names))
        fetch(made, "model", "calibration")
        windows = draw_calibration(made).tokens.tolist()
        tokenizer = load_tokenizer(made.model("dense"))
        text_of = {tokenizer.decode(window)[-1]: None for window in windows}
        assert len(text_of) > 1
        for place, index in enumerate(names):
            text = Path(sources[index]["source"]).read_text(encoding="utf-8")
            alone = draw(tokenize(text, tokenizer), samples=3, length=64, seed=0).tokens.tolist()
            assert made.text(f"calibration/{place}") == text
            mine = [window for window in windows if window in alone]
            assert mine == alone, "as of this text alone, in its order"
            drawn.setdefault(str(names), {})[str(index)] = mine
    assert len(drawn) == 4


def test_documents_in_a_list_are_drawn_as_alone(study: Make, sources: list[dict[str, Any]], tmp_path: Path):
    shard = tmp_path / "mirror/allenai/c4" / SHARD
    shard.parent.mkdir(parents=True)
    shard.write_bytes(packed(documents()))
    windows = []
    for texts, count in (({"source": "c4"}, 6), ([sources[0], {"source": "c4"}], 12)):
        made = study(calibration__text=texts, calibration__windows=count, runtime__mirror=str(tmp_path / "mirror"))
        windows.append(draw_calibration(fetch(made, "model", "calibration")).tokens.tolist())
    assert windows[0] == [window for window in windows[1] if window in windows[0]]
    assert len(windows[1]) == 12


def test_provenance_of_the_statistics_names_all_texts(study: Make, sources: list[dict[str, Any]]):
    texts = [sources[0] | {"windows": 3}, sources[1]]
    made = study(calibration__text=texts, calibration__windows=4, recipe="admm")
    calibrate(study=fetch(made))
    fetched = read_provenance(made.data("calibration"), "download calibration")
    stats = read_provenance(made.norms, "calibrate")
    assert fetched["source"] == stats["text"]["source"] == "digits.txt; lower.txt"
    assert (stats["text"]["sha256"], stats["params"]["shares"]) == (fetched["sha256"], [3, 1])
    mask_and_apply(made)
    written = card(made, load_json(made.metrics("pruned", "sparsity")))
    assert "3 + 1 windows of 64 tokens of digits.txt; lower.txt" in written.replace("\\", "")


@pytest.mark.parametrize(("count", "windows", "back"), [(2, 20, 16), (1, 20, 8), (2, 12, 12), (1, 4, 4)])
def test_the_backward_pass_has_eight_windows_of_each_text(
    count: int, windows: int, back: int, study: Make, sources: list[dict[str, Any]]
):
    made = study(calibration__text=sources[:count], calibration__windows=windows, recipe="fisher")
    with mock.patch.object(calibrate_stage, "backward", wraps=calibrate_stage.backward) as run:
        calibrate(study=fetch(made, "model", "calibration"))
    assert torch.equal(run.call_args.args[1], draw_calibration(made).tokens[:back])
    assert read_provenance(made.fisher, "calibrate")["windows_back"] == back


def test_a_recovery_takes_windows_of_all_texts_and_none_of_the_calibration(study: Make, sources: list[dict[str, Any]]):
    settings = {"calibration__text": [sources[0] | {"windows": 3}, sources[1]], "calibration__windows": 4}
    made = fetch(study(**settings, recovery__tokens=64 * 16), "model", "calibration")
    tokenizer = load_tokenizer(made.model("dense"))

    def kinds(windows: torch.Tensor) -> list[str]:
        return ["digits" if tokenizer.decode(window)[-1].isdigit() else "lower" for window in windows.tolist()]

    training, validation = training_windows(made)
    assert Counter(kinds(training)) == {"digits": 12, "lower": 4}
    assert Counter(kinds(validation["text"])) == {"digits": VALIDATION_WINDOWS, "lower": VALIDATION_WINDOWS}
    assert len(set(kinds(training)[:4])) == 2
    windows = draw_calibration(made).tokens.tolist()
    drawn = {tuple(window[start : start + 32]) for window in windows for start in range(33)}
    for window in [*training.tolist(), *validation["text"].tolist()]:
        assert not any(tuple(window[start : start + 32]) in drawn for start in range(33))
    own = [sources[2] | {"windows": 1}, sources[3] | {"windows": 3}]
    made = study(**settings, recovery__tokens=64 * 16, recovery__text=own)
    training, _ = training_windows(fetch(made, "recovery"))
    signs = [tokenizer.decode(window)[-1] in KINDS["signs"] for window in training.tolist()]
    assert (len(signs), sum(signs)) == (16, 12)


# --- links to sources ---


def test_links_follow_from_one_text_to_several_and_back(study: Make, sources: list[dict[str, Any]], tmp_path: Path):
    contents = {source["source"]: Path(source["source"]).read_bytes() for source in sources}
    place = tmp_path / "sources/calibration"
    lists: list[Any] = [sources[0], sources[:2], [*sources[1:3], {"source": "c4"}], sources[:2], {"source": "c4"}]
    for texts, again in itertools.product(lists, lists):
        plan(study=study(calibration__text=again, calibration__windows=4))
        plan(study=study(calibration__text=texts, calibration__windows=4))
        if isinstance(texts, dict):
            assert place.is_symlink() == texts["source"].startswith("/")
            assert place.is_file()
            continue
        assert not place.is_symlink()
        assert sorted(path.name for path in place.iterdir()) == [str(index) for index in range(len(texts))]
        for index, text in enumerate(texts):
            if text["source"].startswith("/"):
                assert str((place / str(index)).readlink()) == text["source"]
    assert contents == {source: Path(source).read_bytes() for source in contents}


@pytest.mark.pipeline
def test_only_what_depends_on_a_text_or_its_share_runs_again(
    tmp_path: Path, tiny: Path, texts: dict[str, str], sources: list[dict[str, Any]]
):
    study = Repository.new(tmp_path / "study", tiny, settings=texts | {"calibration__windows": 4})
    fetched, norms = {"plan", "download-calibration"}, "calibrate-norms"
    study.repro(norms)
    thrice = sources[0] | {"windows": 3}
    assert study.repro(norms, calibration__text=sources[:2]) == fetched | {norms}
    assert study.repro(norms, calibration__text=[thrice, sources[1]]) == {"plan", norms}
    assert study.repro(norms, calibration__text=[thrice, sources[2]]) == fetched | {norms}
    assert study.repro(norms) == set()
    Path(sources[2]["source"]).write_text("9876543210" * 300, encoding="utf-8")
    assert study.repro(norms) == fetched | {norms}
    assert study.repro(norms) == set()
    study.commit()
    listed = f"calibration.text=[{{source: {sources[1]['source']}}},{{source: {sources[3]['source']}}}]"
    study.run("dvc", "exp", "run", norms, "-S", listed)
    now = read_params(study.root / "params.yaml").calibration.text
    assert [text.source for text in now] == [sources[index]["source"] for index in (1, 3)]
    one = ["-S", "~calibration.text", "-S", f"+calibration.text={{source: {sources[0]['source']}}}"]
    study.run("dvc", "exp", "run", norms, *one)
    study.run("dvc", "exp", "run", norms, "-S", "~calibration.text", "-S", f"+{listed}")
    assert load_json(study.root / "stats/norms/provenance.json")["text"]["source"] == "lower.txt; signs.txt"


# --- distinct tokens ---


WIDEST = 100  # features: solvers want 1,000 tokens


@pytest.mark.parametrize(
    ("settings", "solves"),
    [
        ({"recipe": "wanda"}, False),
        ({"recipe": "wanda", "calibration__statistics": "gram"}, False),
        ({"recipe": "wanda", "group": "outputs"}, False),
        ({"recipe": "wanda-refit"}, True),
        ({"recipe": "admm"}, True),
        ({"recipe": "fisher"}, True),
        ({"recipe": "sparsegpt", "propagation": "pruned"}, True),
    ],
)
@pytest.mark.parametrize(
    ("drawn", "distinct", "result"),
    [
        (99000, 499, "refused"),
        (1000, 900, "silent"),
        (5000, 899, "reported"),
        (1000, 500, "reported"),
        (1000, 499, "refused"),
        (999, 499, "reported"),  # a user's choice
        (64, 64, "reported"),
        (64000, 64000, "silent"),
    ],
)
def test_distinct_tokens_for_solvers(
    study: Make, settings: dict[str, str], solves: bool, drawn: int, distinct: int, result: str
):
    made = study(**settings, calibration__windows=1, calibration__length=drawn)
    if result == "refused" and solves:
        with pytest.raises(UserError, match=rf"calibration.text: {distinct} distinct tokens, expected 1,000 .* recipe"):
            check_distinct(made, distinct, WIDEST)
    else:
        assert ("distinct tokens, expected 1,000" in check_distinct(made, distinct, WIDEST)) == (result != "silent")


def test_tokens_that_several_windows_have_count_once(study: Make, sources: list[dict[str, Any]], monkeypatch: Patch):
    made = study(calibration__text=sources[:2], calibration__windows=40)
    fetch(made, "model", "calibration")
    tokenizer = load_tokenizer(made.model("dense"))
    expected = 0
    for source in sources[:2]:
        tokens = tokenize(Path(source["source"]).read_text(encoding="utf-8"), tokenizer)
        positions = draw(torch.arange(len(tokens)), samples=20, length=64, seed=0).tokens
        expected += len({position for window in positions.tolist() for position in window})
    assert draw_calibration(made).distinct == expected < 40 * 64
    assert len(cut(torch.arange(expected), length=64, windows=None)) < 40
