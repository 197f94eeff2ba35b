"""The Hub, played by a server on this machine that speaks the few requests of the real client; and text to tokens."""

import errno
import gzip
import hashlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import offline
import pytest
import torch
from c4 import SHARD, documents, packed
from conftest import ROOT, Capture, Make, Patch, fetch, save_tiny_model, shared
from safetensors.torch import load_file

from wanda_dvc.commands.prune import describe_run
from wanda_dvc.commands.request import check_request
from wanda_dvc.engine.windows import cut, draw, draw_from_documents, load_tokenizer, tokenize
from wanda_dvc.errors import UserError
from wanda_dvc.stages.download import download, find_model_config
from wanda_dvc.stages.inputs import draw_calibration
from wanda_dvc.stages.recover import training_windows
from wanda_dvc.study.artifact import file_digest, write_provenance
from wanda_dvc.study.files import load_json, open_documents

COMMIT, OLDER = "c" * 40, "0" * 40
Answer = tuple[int, dict[str, str], bytes]  # status, headers, content


@dataclass
class Hub:
    """Repositories by path, `models/ORG/NAME` or `datasets/ORG/NAME`; all revisions hold the same files."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": OLDER})
    status: int = 200
    card: dict[str, Any] | None = None  # the metadata of each repository's README.md
    asked: list[tuple[str, str]] = field(default_factory=list)  # method, path

    def add(self, path: str, folder: Path | None = None, /, **files: bytes) -> None:
        found = {file.name: file.read_bytes() for file in folder.iterdir()} if folder else {}
        self.repositories[path] = found | {name.replace("__", "/"): content for name, content in files.items()}

    @property
    def fetched(self) -> list[str]:
        """The files whose content was asked for."""
        contents = [path.partition("/resolve/")[2] for method, path in self.asked if method == "GET"]
        return [path.partition("/")[2] for path in contents if path]

    def answer(self, path: str, logged_in: bool) -> Answer:  # noqa: PLR0911 - an answer for each kind of request
        path, _, _ = path.partition("?")
        if self.status != 200:
            return self.status, {"X-Error-Message": "Service in pieces"}, b""
        parts = path.removeprefix("/api/").strip("/").split("/")
        if not path.startswith("/api/") and parts[0] != "datasets":
            parts.insert(0, "models")
        repository, rest = "/".join(parts[:3]), [part.replace("%2F", "/") for part in parts[3:]]
        if repository not in self.repositories:
            return (404 if logged_in else 401), {"X-Error-Code": "RepoNotFound"}, b""
        files = self.repositories[repository]
        known = self.revisions | {commit: commit for commit in self.revisions.values()}
        verb, revision = rest[0] if rest else "", rest[1] if len(rest) > 1 else "main"
        if verb in ("auth-check", "resolve") and repository in self.gated:
            return (403 if logged_in else 401), {"X-Error-Code": "GatedRepo"}, b""
        if revision not in known:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if verb in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "/".join(parts[1:3]), "sha": known[revision], "siblings": siblings, "cardData": self.card}
            return 200, {}, json.dumps(info | {"gated": "manual" if repository in self.gated else False}).encode()
        if verb == "tree":
            entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
            return 200, {}, json.dumps(entries).encode()
        if verb == "auth-check":
            return 200, {}, b"{}"
        name = "/".join(rest[2:])
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        tag = hashlib.sha256(files[name]).hexdigest()
        return 200, {"X-Repo-Commit": known[revision], "ETag": f'"{tag}"'}, files[name]


@pytest.fixture
def hub(monkeypatch: Patch, tmp_path: Path) -> Iterator[Hub]:
    played = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            played.asked.append((self.command, self.path))
            status, headers, content = played.answer(self.path, "Authorization" in self.headers)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    with offline.loopback(), ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield played
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


# --- models ---


def test_a_model_is_what_is_needed_of_a_commit(study: Make, hub: Hub, tiny: Path, tmp_path: Path):
    made = study(model="org/tiny@v1")
    doubles = ("pytorch_model.bin", "consolidated.safetensors", "original__model.pth", "README.md")
    tiny, hub.card = shutil.copytree(tiny, made.root / "source"), {"license": "mit"}
    (tiny / "chat_template.jinja").write_text("{{ messages }}")
    hub.add("models/org/tiny", tiny, **dict.fromkeys(doubles, b"x"))
    config = find_model_config(made)
    assert config is not None
    assert hub.fetched == ["config.json"]
    assert config.read_bytes() == (tiny / "config.json").read_bytes()
    download(study=made, source="model")
    cached = {path.stat().st_ino for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert {(made.model("dense") / path.name).stat().st_ino for path in tiny.iterdir()} <= cached  # no second copy
    asked = len(hub.asked)
    assert find_model_config(made) == made.model("dense") / "config.json"
    assert len(hub.asked) == asked
    names = {path.name for path in tiny.iterdir()}
    assert {path.name for path in made.model("dense").iterdir()} == names | {"provenance.json"}
    assert set(hub.fetched) == names
    assert all((made.model("dense") / name).read_bytes() == (tiny / name).read_bytes() for name in names)
    found = load_json(made.model("dense") / "provenance.json")
    assert (found["source"], found["revision"], found["license"]) == ("org/tiny", OLDER, "mit")
    assert len([path for _, path in hub.asked if "/revision/" in path]) == 2  # resolved once for each call
    assert all(f"/resolve/{OLDER}/" in path for _, path in hub.asked if "/resolve/" in path)
    before = (made.model("dense") / "provenance.json").read_bytes()
    download(study=study(model=f"org/tiny@{OLDER}"), source="model")
    assert (made.model("dense") / "provenance.json").read_bytes() == before  # whatever name the commit went by
    download(study=(made := study(model="org/tiny")), source="model")
    assert load_json(made.model("dense") / "provenance.json")["revision"] == COMMIT
    assert "main" not in (made.model("dense") / "provenance.json").read_text()


def test_a_dry_run_fetches_the_config_alone(study: Make, hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: Patch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    hub.add("models/org/tiny", tiny)
    request = check_request(model="org/tiny", target=tmp_path / "out")
    assert "Fetched unless present: org/tiny (model), c4 (calibration)." in describe_run(request)
    assert hub.fetched == ["config.json"]
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("end", "seen"), [(KeyboardInterrupt(), "^$"), (RuntimeError("hf_xet"), "log in"), (OSError("cut short"), "log in")]
)
def test_a_killed_download_fetches_no_finished_file_again(
    study: Make, hub: Hub, tmp_path: Path, monkeypatch: Patch, end: BaseException, seen: str
):
    source = save_tiny_model(tmp_path / "source", shard="30KB")
    *_, last = shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 1
    hub.add("models/org/tiny", source)
    real = huggingface_hub.file_download.http_get

    def killed(url: str, temp_file: Any, **words: Any) -> None:
        if not url.endswith(last):
            return real(url, temp_file, **words)
        temp_file.write((source / last).read_bytes()[:1000])
        temp_file.flush()
        raise end

    made = study(model="org/tiny")
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", killed)
    with pytest.raises((KeyboardInterrupt, UserError), match=seen):
        download(study=made, source="model")
    assert not made.model("dense").exists()
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", real)
    done = set(hub.fetched)
    hub.asked.clear()
    download(study=made, source="model")
    assert not done & set(hub.fetched)
    assert set(hub.fetched) >= {last}
    assert all((made.model("dense") / name).read_bytes() == (source / name).read_bytes() for name in shards)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda files: files.pop("config.json"), "model: org/tiny has no config.json"),
        (
            lambda files: files.update({"pytorch_model.bin": files.pop("model.safetensors")}),
            "model: org/tiny has no model.safetensors",
        ),
        (
            lambda files: files.update({"config.json": b'{"model_type": "new", "auto_map": {"AutoConfig": "new.C"}}'}),
            r"config.json: found new, expected a causal decoder .*a model's own code is never run",
        ),
    ],
)
def test_what_is_no_model_for_us_is_said_before_its_weights_are_read(
    study: Make, hub: Hub, tiny: Path, spoil: Callable[[dict[str, bytes]], object], message: str
):
    hub.add("models/org/tiny", tiny)
    spoil(hub.repositories["models/org/tiny"])
    with pytest.raises(UserError, match=message):
        download(study=study(model="org/tiny"), source="model")
    assert not {"model.safetensors", "pytorch_model.bin"} & set(hub.fetched)


GATED, DOWN = "GatedRepoError", "HfHubHTTPError: Service in pieces"
TROUBLES = {
    "gated": GATED, "gated, logged in": GATED, "unknown": "RepositoryNotFoundError", "down": DOWN,
    "revision": "RevisionNotFoundError", "offline": "OfflineModeIsEnabled", "no network": "ConnectError",
}  # fmt: skip


@pytest.mark.parametrize("part", ["model", "perplexity"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_hub_refusals_are_told_apart(study: Make, hub: Hub, tiny: Path, monkeypatch: Patch, part: str, trouble: str):
    place = f"{'models' if part == 'model' else 'datasets'}/org/tiny"
    if trouble != "unknown":
        hub.add(place, tiny)
    if trouble.startswith("gated"):
        hub.gated.add(place)
    if "logged in" in trouble:
        monkeypatch.setenv("HF_TOKEN", "hf_x")
    if trouble == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if trouble == "no network":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    hub.status = 500 if trouble == "down" else 200
    source = "org/tiny@v2" if trouble == "revision" else "org/tiny"
    made = study(model=source) if part == "model" else study(perplexity__texts__embedded__source=source)
    where = rf"^params.yaml: (model|perplexity.texts.embedded.source): org/tiny( at v2)?: {TROUBLES[trouble]}"
    says = f"{where}.*; correct its id or revision, .* log in .*, or unset HF_HUB_OFFLINE"
    with pytest.raises(UserError, match=says):
        fetch(made, part)
    assert hub.fetched == []


# --- a local model costs no second copy where the file system can share blocks ---


def unsupported(source: Path, target: Path) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize("clone", [shutil.copyfile, unsupported])
def test_a_local_model_is_cloned_or_copied_and_never_linked(
    study: Make, tiny: Path, tmp_path: Path, monkeypatch: Patch, clone: Callable[[Path, Path], None]
):
    source, snapshot = tmp_path / "source", shutil.copytree(tiny, tmp_path / "blobs")
    source.mkdir()
    for path in snapshot.iterdir():  # as the Hub's cache keeps a snapshot
        (source / path.name).symlink_to(path)
    names = {path.name for path in source.iterdir()}
    (source / "pytorch_model.bin").write_bytes(b"a second copy in another format, which is not taken")
    cloned = mock.Mock(side_effect=clone)
    monkeypatch.setattr("dvc_objects.fs.system.reflink", cloned)
    made = fetch(study(model=source), "model")
    assert {path.name for path in made.model("dense").iterdir()} == names | {"provenance.json"}
    assert {Path(call.args[0]).name for call in cloned.mock_calls} == names  # each is tried
    for name in names:
        taken, own = made.model("dense") / name, source / name
        assert taken.read_bytes() == own.read_bytes()
        assert taken.stat().st_ino != own.stat().st_ino
        assert own.stat().st_nlink == 1
        assert not taken.is_symlink()


# --- texts ---


@pytest.fixture
def data(hub: Hub, tmp_path: Path, monkeypatch: Patch) -> Callable[..., list[dict[str, Any]]]:
    """Puts a data set on the Hub: `datasets`' own loader reads it from a folder, and what it was asked is noted."""
    import datasets

    asked: list[dict[str, Any]] = []
    real = datasets.load_dataset

    def add(name: str, config: str | None, split: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        folder = tmp_path / "sets" / name
        (folder / (config or "data")).mkdir(parents=True, exist_ok=True)
        (folder / (config or "data") / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if config:
            card = f"---\nconfigs:\n- config_name: {config}\n  data_dir: {config}\n---\n"
            (folder / "README.md").write_text(card)
        hub.add(f"datasets/{name}")
        return asked

    def load(path: str, name: str | None = None, *, split: str, revision: str, **options: Any) -> Any:
        asked.append({"path": path, "name": name, "split": split, "revision": revision, **options})
        return real(str(tmp_path / "sets" / path), name, split=split, cache_dir=str(tmp_path / "arrow"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    return add


def test_documents_are_those_of_the_file_and_not_of_an_earlier_one_at_its_place(tmp_path: Path):
    """Also of one size and time, which is all that a cache by place would know."""
    path = tmp_path / "documents.json.gz"
    for text in ("one", "two"):
        path.write_bytes(gzip.compress(json.dumps({"text": text}).encode() + b"\n", mtime=0))
        os.utime(path, (1, 1))
        assert list(open_documents(path, "text", file_digest(path))) == [text]


@pytest.mark.parametrize(
    ("source", "name", "config", "column", "commit"),
    [
        ("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", "text", COMMIT),
        ("ptb", "ptb-text-only/ptb_text_only", "penn_treebank", "sentence", "b" * 40),
        ("org/prose", "org/prose", None, "body", OLDER),
    ],
)
def test_texts_come_from_the_hub_at_a_commit(
    study: Make, hub: Hub, data, source: str, name: str, config: str | None, column: str, commit: str
):
    hub.revisions["refs/convert/parquet"] = "b" * 40
    asked = data(name, config, "validation", [{column: "one é"}, {column: "two"}])
    own = source == "org/prose"
    text = {"source": f"{source}@v1" if own else source, "split": "validation", "column": "body" if own else None}
    made = study(**{f"calibration__text__{key}": value for key, value in text.items()})
    download(study=made, source="calibration")
    assert made.text("calibration") == "one é two"
    assert asked == [{"path": name, "name": config, "split": "validation", "revision": commit}]
    found = load_json(made.data("calibration") / "provenance.json")
    assert found["revision"] == commit
    assert found["source"] == "/".join(part for part in (name, config) if part) + ", validation"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": "title"}, "text.column: org/prose: found body, rank, expected text in column `title`"),
        ({"column": "rank"}, "text.column: org/prose: found body, rank, expected text in column `rank`"),
        ({"split": "dev"}, r"org/prose, config good, split dev: .*validation"),
        ({"source": "org/prose:bad"}, r"org/prose, config bad, split validation: .*good"),
    ],
)
def test_a_missing_column_split_or_config_says_which_exist(study: Make, data, changes: dict[str, Any], message: str):
    data("org/prose", "good", "validation", [{"body": "one", "rank": 1}])
    wanted = {"source": "org/prose:good", "split": "validation", "column": "body"} | changes
    made = study(**{f"calibration__text__{key}": value for key, value in wanted.items()})
    with pytest.raises(UserError, match=message):
        download(study=made, source="calibration")
    assert not made.data("calibration").exists()


# --- C4 ---


def authors_windows(texts: list[str], tokenizer: Any, samples: int, length: int, seed: int) -> list[list[int]]:
    """get_c4 of the Wanda authors, line for line."""
    random.seed(seed)
    windows = []
    for _ in range(samples):
        while True:
            i = random.randint(0, len(texts) - 1)
            tokens = tokenizer(texts[i])["input_ids"]
            if len(tokens) > length:
                break
        i = random.randint(0, len(tokens) - length - 1)
        windows.append(tokens[i : i + length])
    return windows


@pytest.mark.parametrize(("seed", "mirrored"), [(0, True), (1, False), (2, True)])
def test_c4_is_drawn_as_the_authors_do(study: Make, hub: Hub, tiny: Path, tmp_path: Path, seed: int, mirrored: bool):
    content = packed(documents())
    hub.add("datasets/allenai/c4", **{SHARD.replace("/", "__"): content, "en__other.json.gz": b"x"})
    mirror = tmp_path / "mirror/allenai/c4" / SHARD
    mirror.parent.mkdir(parents=True)
    mirror.write_bytes(content)
    settings = {"calibration__seed": seed, "runtime__mirror": str(tmp_path / "mirror") if mirrored else None}
    made = fetch(study(calibration__text__source="c4", calibration__windows=20, **settings), "model", "calibration")
    assert hub.fetched == ([] if mirrored else [SHARD])
    assert (made.data("calibration") / "documents.json.gz").read_bytes() == content  # as it was fetched
    found = load_json(made.data("calibration") / "provenance.json")
    assert (found["revision"], found["rows"]) == (None if mirrored else COMMIT, 60)
    assert found["sha256"] == hashlib.sha256(content).hexdigest()
    expected = authors_windows(documents(), load_tokenizer(tiny), samples=20, length=64, seed=seed)
    assert draw_calibration(made).tokens.tolist() == expected
    again = authors_windows(documents(), load_tokenizer(tiny), samples=8, length=64, seed=seed + 1)
    made = study(calibration__text__source="c4", calibration__windows=20, recovery__tokens=64 * 4, **settings)
    assert training_windows(made)[0].tolist() == again[4:]  # and not the calibration's


def test_documents_of_each_length_are_drawn_as_the_authors_draw():
    texts = ["a" * size for size in (3, 9, 10, 11, 12, 13, 30)]
    tokens = {text: [1, *text.encode()] for text in texts}  # a token before the text, as Llama has it
    kwargs: dict[str, Any] = {"samples": 30, "length": 10, "seed": 3}
    drawn = draw_from_documents(texts, lambda text: torch.tensor(tokens[text]), **kwargs, setting="recovery.text")
    assert drawn.tokens.tolist() == authors_windows(texts, lambda text: {"input_ids": tokens[text]}, **kwargs)


@pytest.mark.parametrize("texts", [[], ["short", "b" * 64]])
def test_where_no_document_is_long_enough_it_ends(tiny: Path, texts: list[str]):
    tokenizer = load_tokenizer(tiny)
    message = f"recovery.text: none of its {len(texts)} documents has more than 64 tokens, a window's length"
    kwargs: dict[str, Any] = {"samples": 1, "length": 64, "seed": 0, "setting": "recovery.text"}
    with pytest.raises(UserError, match=message):
        draw_from_documents(texts, lambda text: tokenize(text, tokenizer), **kwargs)


def test_perplexity_on_c4_is_on_its_joined_documents(study: Make, hub: Hub):
    content = packed(["one", "two é"])
    hub.add("datasets/allenai/c4", **{"en__c4-validation.00000-of-00008.json.gz": content})
    made = study(perplexity__texts__embedded__source="c4", perplexity__texts__embedded__split="validation")
    download(study=made, source="perplexity", text="embedded")
    assert made.text("perplexity/embedded") == "one two é"


# --- tasks ---


def test_tasks_come_from_the_hub_at_a_commit(study: Make, data):
    rows = [{"goal": "é", "sol1": "a", "sol2": "b", "label": 0}]
    asked = data("baber/piqa", None, "validation", rows)
    made = study(tasks__source="benchmark")
    download(study=made, source="tasks")
    folder = made.data("tasks") / "piqa"
    assert (folder / "items.jsonl").read_bytes() == (json.dumps(rows[0], ensure_ascii=False) + "\n").encode()
    assert asked == [{"path": "baber/piqa", "name": None, "split": "validation", "revision": COMMIT}]
    found = load_json(folder / "provenance.json")
    assert (found["source"], found["revision"], found["samples"]) == ("baber/piqa", COMMIT, False)
    assert found["lm_eval"]


def test_draw_is_the_authors_draw_and_leaves_the_global_generator_alone():
    tokens = torch.arange(13)  # so few places that one more or one fewer would show
    random.seed(7)
    expected = [random.randint(0, 13 - 10 - 1) for _ in range(50)]
    before = random.getstate()
    assert draw(tokens, samples=50, length=10, seed=7).tokens[:, 0].tolist() == expected
    assert random.getstate() == before


@pytest.mark.parametrize(("samples", "is_reported"), [(1, False), (60, True)])
def test_windows_of_nearly_the_same_tokens_are_reported(samples: int, is_reported: bool, capsys: Capture):
    documents = ["a" * 12, "b" * 14, "c" * 9]
    drawn: dict[str, Any] = {"samples": samples, "length": 10, "seed": 7}
    draw(torch.arange(13), **drawn)
    draw_from_documents(documents, lambda text: torch.tensor([*text.encode()]), **drawn, setting="recovery.text")
    reports = [
        "calibration.text: 60 windows of 10 tokens have only 12 distinct tokens of the text; take a longer text",
        "recovery.text: 60 windows of 10 tokens have only 24 distinct tokens of the text; take a longer text",
    ]
    assert capsys.readouterr().err.splitlines() == (reports if is_reported else [])


def test_cut_takes_whole_windows_in_order():
    windows = cut(torch.arange(25), length=10, windows=None)
    assert [window.tolist() for window in windows] == [list(range(10)), list(range(10, 20))]
    assert [window.tolist() for window in cut(torch.arange(25), length=10, windows=1)] == [list(range(10))]


@pytest.mark.parametrize(("tokens", "lengths"), [(23, [10, 10, 3]), (21, [10, 10]), (20, [10, 10]), (7, [7]), (2, [2])])
def test_all_tokens_make_a_shorter_last_window_that_has_a_token_to_predict(tokens: int, lengths: list[int]):
    windows = cut(torch.arange(tokens), length=10, windows="all")
    assert list(map(len, windows)) == lengths
    assert torch.cat(windows).tolist() == list(range(sum(lengths)))


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("setting", ["calibration", "recovery"])
def test_a_text_that_is_too_short_is_named_by_its_setting(study: Make, setting: str, documents: bool):
    kwargs = {"recovery__tokens": 640, "recovery__text": {"source": "ptb"}} if setting == "recovery" else {}
    made = fetch(study(**kwargs), "model", "calibration")
    folder = made.data(setting)
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("short")
    if documents:
        write_provenance(folder, {"made_by": f"download {setting}", "column": "text", "sha256": ""})
        with gzip.open(folder / "documents.json.gz", "wt") as file:
            file.write('{"text": "short"}\n')
    windows_of = training_windows if setting == "recovery" else draw_calibration
    with pytest.raises(UserError, match=rf"^{setting}\.text: .*take .*text"):
        windows_of(made)


def test_too_short_a_text_says_how_short():
    with pytest.raises(UserError, match="calibration.text: 10 tokens, expected more than 10, a window's length"):
        draw(torch.arange(10), samples=1, length=10, seed=0)
    with pytest.raises(UserError, match="perplexity.texts.a: 25 tokens, expected 3 windows of 10 or more"):
        cut(torch.arange(25), length=10, windows=3, name="perplexity.texts.a")
    with pytest.raises(UserError, match="the text: 1 tokens, expected 2 tokens or more"):
        cut(torch.arange(1), length=10, windows="all")


def test_windows_are_those_of_the_reference():
    """WikiText-2 as the Wanda authors join it for calibration, and as the papers join it for perplexity."""
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
    assert torch.equal(drawn.tokens, reference["calibration"].long())
