"""Runs lm-eval on the engine: lm-eval's definitions of tasks, the engine's log-likelihoods."""

from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.questions import Progress, Request, loglikelihoods
from wanda_dvc.engine.runner import Runner
from wanda_dvc.engine.windows import load_tokenizer
from wanda_dvc.errors import UserError, notice
from wanda_dvc.reading import read_lines


class EngineLM(HFLM):  # type: ignore[misc] # it brings no types
    """lm-eval's model class with the engine's log-likelihoods: one pass per context, no padding, block by block.

    lm-eval does the tokenization, limits positions, and chooses the prefix of an empty context.
    """

    def __init__(self, decoder: Decoder, folder: Path, runner: Runner, *, what: str, progress: Progress) -> None:
        """`folder` holds the tokenizer, `what` names the run in messages, `progress` shows the blocks."""
        tokenizer = load_tokenizer(folder)
        self.folder, self.has_prefix = folder, (tokenizer.bos_token_id, tokenizer.eos_token_id) != (None, None)
        # lm-eval asks for a prefix with each text, and uses it for texts without a context.
        prefix = None if self.has_prefix else 0
        decoder.model.tie_weights = lambda *_, **__: None  # lm-eval would replace a head that is stored by itself
        super().__init__(pretrained=decoder.model, tokenizer=tokenizer, trust_remote_code=False, prefix_token_id=prefix)
        del decoder.model.tie_weights
        self.runner, self.what, self.progress = runner, what, progress

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Answer lm-eval's requests. UserError for an empty context if the tokenizer has no BOS or EOS token."""
        if not self.has_prefix and not all(request.args[0] for request in requests):
            raise UserError(
                f"{self.folder}: the tokenizer has no bos_token and no eos_token, expected one for questions without "
                "context; set one in the model's tokenizer_config.json"
            )
        return super().loglikelihood(requests, disable_tqdm=True)  # the engine shows its own progress bar

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], *_: Any, **__: Any
    ) -> list[tuple[float, bool]]:
        if not self.runner.decoder.holds_layouts:
            notice(
                f"{self.what}: the model's attention or positions do not allow several questions in a row; each choice "
                "runs separately, which is slower and gives the same answers"
            )
        asked = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return loglikelihoods(self.runner, asked, length=self.max_length, progress=self.progress)


def load_task(definition: str, role: str, items: Path) -> Any:
    """Return lm-eval's task on items from a file: its own YAML, with the split in that role alone."""
    rows = [row for _, row in read_lines(items, "run `wanda-dvc download tasks` again")]
    tasks = Path(lm_eval.tasks.__file__).parent
    # Definitions may name Python files, and lm-eval runs them. So only lm-eval's own definitions are read.
    if not (tasks / definition).resolve().is_relative_to(tasks.resolve()) or not (tasks / definition).is_file():
        raise UserError(
            f"{items.parent}: got the definition {definition}, expected one of lm-eval's; "
            "run `wanda-dvc download tasks` again"
        )
    config = load_yaml(tasks / definition)
    config |= {f"{name}_split": role if name == role else None for name in ("training", "validation", "test")}
    config |= {"fewshot_split": None}  # lm-eval would look for the split, even without examples
    config |= {"custom_dataset": lambda **_: {role: Dataset.from_list(rows)}, "num_fewshot": 0}
    return ConfigurableTask(config=config)
