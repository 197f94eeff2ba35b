"""Runs lm-eval on the engine: lm-eval's definitions of tasks, the engine's log-likelihoods."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lm_eval.models.huggingface import HFLM

from wanda_dvc.engine.forward import ModelRunner
from wanda_dvc.engine.questions import Request, ShowProgress, loglikelihoods
from wanda_dvc.engine.windows import load_tokenizer
from wanda_dvc.errors import UserError


class EngineLM(HFLM):  # type: ignore[misc] # it brings no types
    """lm-eval's model class, for tokens, limits of positions and prefixes, with the engine's log-likelihoods."""

    def __init__(self, folder: Path, runner: ModelRunner, *, progress: ShowProgress) -> None:
        """`folder` holds the tokenizer, `progress` shows the blocks."""
        tokenizer, model = load_tokenizer(folder), runner.decoder.model
        self.folder, self.runner, self.progress = folder, runner, progress
        self.has_prefix = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
        # lm-eval asks for a prefix with each text, and uses it for texts without a context.
        prefix = None if self.has_prefix else 0
        # All that lm-eval reads of a model. It would tie the heads of a module, also those that are stored separately.
        described = SimpleNamespace(config=model.config, device=model.device)
        super().__init__(described, tokenizer=tokenizer, trust_remote_code=False, prefix_token_id=prefix)

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Answer lm-eval's requests. UserError for an empty context if the tokenizer has no BOS or EOS token."""
        if not self.has_prefix and not all(request.args[0] for request in requests):
            problem = "the tokenizer has no bos_token and no eos_token, expected one for questions without context"
            raise UserError(f"{self.folder}: {problem}; set one in the model's tokenizer_config.json")
        self.tasks = [request.task_name for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)  # the engine shows its own progress bar

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], *_: Any, **__: Any
    ) -> list[tuple[float, bool]]:
        converted = [Request(tuple(x), tuple(y), task) for (_, x, y), task in zip(requests, self.tasks, strict=True)]
        return loglikelihoods(self.runner, converted, length=self.max_length, progress=self.progress)
