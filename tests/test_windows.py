"""Text to rows of tokens."""

import random

import pytest
import torch
from conftest import ROOT, shared

from wanda_dvc.engine.windows import cut, draw, load_tokenizer, tokenize
from wanda_dvc.errors import UserError


def test_draw_is_the_authors_draw():
    tokens = torch.arange(13)  # so few places that one more or one fewer would show
    random.seed(7)
    expected = [random.randint(0, 13 - 10 - 1) for _ in range(50)]
    assert draw(tokens, samples=50, length=10, seed=7)[:, 0].tolist() == expected


def test_draw_leaves_the_global_generator_alone():
    random.seed(1)
    before = random.getstate()
    draw(torch.arange(100), samples=2, length=10, seed=0)
    assert random.getstate() == before


def test_cut_takes_whole_windows_in_order():
    windows = cut(torch.arange(25), length=10, windows=None)
    assert [window.tolist() for window in windows] == [list(range(10)), list(range(10, 20))]
    assert [window.tolist() for window in cut(torch.arange(25), length=10, windows=1)] == [list(range(10))]


@pytest.mark.parametrize(("tokens", "lengths"), [(23, [10, 10, 3]), (21, [10, 10]), (20, [10, 10]), (7, [7]), (2, [2])])
def test_all_tokens_make_a_shorter_last_window_that_has_a_token_to_predict(tokens: int, lengths: list[int]):
    windows = cut(torch.arange(tokens), length=10, windows="all")
    assert list(map(len, windows)) == lengths
    assert torch.cat(windows).tolist() == list(range(sum(lengths)))


def test_too_short_a_text_says_how_short():
    with pytest.raises(UserError, match=r"10 tokens, expected more than 10 \(calibration.length\)"):
        draw(torch.arange(10), samples=1, length=10, seed=0)
    with pytest.raises(UserError, match="perplexity.texts.a: 25 tokens, expected 3 windows of 10 or more"):
        cut(torch.arange(25), length=10, windows=3, name="perplexity.texts.a")
    with pytest.raises(UserError, match="the text: 1 tokens, expected 2 tokens or more"):
        cut(torch.arange(1), length=10, windows="all")


def test_windows_are_those_of_the_reference():
    """WikiText-2 as the Wanda authors join it for calibration, and as the papers join it for perplexity."""
    import json

    from safetensors.torch import load_file

    folder = shared()
    if not (ROOT / "models" / "dense").is_dir():
        pytest.skip("models/dense is not there: `make repro` makes it")
    tokenizer = load_tokenizer(ROOT / "models" / "dense")

    def text(split: str, join: str) -> str:
        path = folder / "datasets/Salesforce/wikitext/wikitext-2-raw-v1" / f"{split}.jsonl"
        return join.join(json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())

    reference = load_file(folder / "reference/windows.safetensors")
    test = tokenize(text("test", "\n\n"), tokenizer)
    assert (len(test), len(cut(test, length=2048, windows=None))) == (304986, 148)
    assert torch.equal(torch.stack(cut(test, length=2048, windows=16)), reference["evaluation"].long())
    drawn = draw(tokenize(text("validation", " "), tokenizer), samples=32, length=2048, seed=0)
    assert torch.equal(drawn, reference["calibration"].long())
