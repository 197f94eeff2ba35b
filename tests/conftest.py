"""Fixtures: tiny random models with a byte tokenizer, and projects around them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import install_import_hook

# Shapes in annotations are checked at run time, before anything imports these modules.
CHECKED = ["pruning", "engine"]
install_import_hook([f"wanda_dvc.{name}" for name in CHECKED], "checker.checked")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run beside one another, on models too small to share
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import pytest  # noqa: E402 - after the hook
import torch  # noqa: E402
from ruamel.yaml import YAML  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from wanda_dvc.study.project import Project  # noqa: E402

ROOT = Path(__file__).parent.parent


def save_tiny_model(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "1GB", **config: Any
) -> Path:
    """A random Llama of four blocks with grouped queries, and a tokenizer that knows bytes."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape | config))
    model.to(dtype)  # type: ignore[arg-type] # transformers' decorator hides self
    for parameter in model.parameters():  # far from the tiny values of the initializer, so that masks matter
        parameter.data.mul_(5)
    model.save_pretrained(folder, max_shard_size=shard)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", pad_token="<p>").save_pretrained(folder)
    return folder


def write_params(root: Path, folder: Path | str, **changes: Any) -> None:
    """The committed params.yaml, small enough for a tiny model; `changes` by dotted names with __ for the dots."""
    yaml = YAML()
    params = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    small = {
        "model": str(folder), "calibration__samples": 3, "calibration__length": 64, "perplexity__length": 64,
        "perplexity__windows": 4, "tasks__names": ["piqa"], "zero_shot__limit": 4,
    }  # fmt: skip
    for name, value in (small | changes).items():
        *sections, leaf = name.split("__")
        target = params
        for section in sections if name not in params else []:
            target = target[section]
        target[leaf if name not in params else name] = value
    for part in ("calibration", "perplexity"):
        text = params[part]["text"]
        if isinstance(text, dict) and Path(text["source"]).is_absolute() and f"{part}__text__split" not in changes:
            text["split"] = None  # a file has none
    yaml.dump(params, root / "params.yaml")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, in one file."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def project(tmp_path: Path, tiny: Path) -> Callable[..., Project]:
    """Makes the project in tmp_path, with changed parameters; called again, it changes them again."""

    def make(model: Path = tiny, **changes: Any) -> Project:
        write_params(tmp_path, model, **changes)
        return Project(tmp_path)

    return make


def shared() -> Path:
    """The folder of reference data, which lies beside a checkout on some machines only."""
    folder = os.environ.get("WANDA_DVC_SHARED")
    if not folder:
        pytest.skip("WANDA_DVC_SHARED is not set: reference data is not on this machine")
    return Path(folder)
