"""Trains a pruned model towards the dense model with transformers' Trainer.

Ours are the loss (the divergence from the dense model), the mask (pruned weights stay zero) and the validation.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments, logging

from wanda_dvc.engine.checkpoint import Address, Checkpoint, EditedCheckpoint, read_config
from wanda_dvc.engine.structure import ParameterSlice, find_slices
from wanda_dvc.errors import UserError, explain, notice, reason
from wanda_dvc.kernels import install as install_faster_linears
from wanda_dvc.plan import RECOVERY_BATCH  # windows per step, over all processes

WARM_UP = 0.05  # of the steps
EVALUATIONS = 10  # per training, at most, on the validation windows; each also writes a checkpoint
Windows = Int[Tensor, "windows length"]
Curve = list[dict[str, float]]  # by evaluation: tokens, the divergence on each text, and the score


def mean_divergence(
    dense: Float[Tensor, "*position vocabulary"], pruned: Float[Tensor, "*position vocabulary"]
) -> Tensor:
    """Return the mean over positions of KL(dense ‖ pruned) in nats, of logits."""
    log_p = dense.float().log_softmax(-1)
    log_q = pruned.float().log_softmax(-1)
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def root_mean_square(parameter: Tensor) -> float:
    """Return the root mean square of nonzero values; at least 1e-3, so that zero biases can change (as Adafactor)."""
    rms = torch.linalg.vector_norm(parameter) / max(1, parameter.count_nonzero().item()) ** 0.5
    return max(1e-3, rms.item())


class RecoveryTrainer(Trainer):
    """The trainer of a pruned model."""

    model: Any
    train_dataset: Any

    def __init__(
        self,
        dense: Any,
        validation: Mapping[str, Windows],
        stored_dtypes: Mapping[str, torch.dtype],  # by parameter
        on_step: Callable[[int], None],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)
        self.dense, self.validation, self.stored_dtypes, self.on_step = dense, validation, stored_dtypes, on_step

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        """Return the divergence on some windows. The dense model runs each time: its logits would fill a disk."""
        with torch.no_grad():
            dense_logits = self.dense(**inputs).logits
        return mean_divergence(dense_logits, model(**inputs).logits)

    def training_step(self, model: Any, *inputs: Any, **kwargs: Any) -> Tensor:
        """Compute gradients, except those of zeros in matrices: AdamW without decay then leaves them zero."""
        loss: Tensor = super().training_step(model, *inputs, **kwargs)
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.grad is not None:
                parameter.grad.mul_(parameter.detach() != 0)
        self.on_step(self.state.global_step + 1)
        return loss

    @property
    def curve(self) -> Curve:
        """The evaluations, first the one before the training."""
        return [entry for entry in self.state.log_history if "score" in entry]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the divergence on the validation windows and log it; return the score.

        A score is the mean over texts of the divergence, divided by the one before the training: 1 is no gain.
        """
        tokens = self.state.global_step * RECOVERY_BATCH * len(self.train_dataset[0]["input_ids"])
        if self.curve and self.curve[-1]["tokens"] == tokens:  # `eval_on_start` repeats the last one after a resume
            return {"eval_score": self.curve[-1]["score"]}
        divergences = self._divergences()
        start = self.curve[0] if self.curve else divergences
        score = fmean(divergences[text] / start[text] if start[text] else math.inf for text in divergences)
        self.log({"tokens": tokens, **divergences, "score": score})
        if self.args.should_save:  # the first process
            changes = ", ".join(f"{text} {start[text]:.4f} → {divergences[text]:.4f}" for text in divergences)
            notice(f"recover: {tokens:,} tokens, divergence of validation windows: {changes}")
        return {"eval_score": score}

    def _divergences(self) -> dict[str, float]:
        """Return the mean divergence on the validation windows, by text, of weights rounded as they will be stored."""
        model = self.model.eval()
        rounded = {}
        for name, parameter in model.named_parameters():
            stored_dtype = self.stored_dtypes.get(name, parameter.dtype)
            rounded[name] = parameter.detach().to(stored_dtype).to(parameter.dtype)

        divergences = {}
        with torch.no_grad(), self.autocast_smart_context_manager():
            for text, windows in self.validation.items():
                losses = []
                for window in windows:
                    inputs = {"input_ids": window[None].to(self.args.device)}
                    dense_logits = self.dense(**inputs).logits
                    rounded_logits = functional_call(model, rounded, (), inputs).logits
                    losses.append(mean_divergence(dense_logits, rounded_logits).item())
                divergences[text] = fmean(losses)
        return divergences

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        """Write the weights by their names in the model, without transformers' conversions."""
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(dict(self.model.named_parameters()), Path(output_dir) / "model.safetensors")


def train(
    dense: Path, pruned: Path, *, windows: Windows, validation: Mapping[str, Windows], rate: float, dtype: torch.dtype,
    device: torch.device, checkpointing: bool, work: Path, on_step: Callable[[int], None],
) -> tuple[EditedCheckpoint | None, Curve]:  # fmt: skip
    """Train a pruned model on windows of tokens, in their order, towards the dense model.

    A step has `RECOVERY_BATCH` windows, and an evaluation has all validation windows, by text. `rate` is the highest
    learning rate, relative to the root mean square of a parameter's nonzero values. Products are in `dtype`, trained
    weights in float32. With `checkpointing` activations are computed twice instead of kept. `on_step` gets the number
    of each step.

    An interrupted training resumes at its last checkpoint in `work`. Each process of `accelerate launch` calls this,
    and takes its part of a step's windows. This removes accelerate's choices of precision and compiler from
    `os.environ`, and names the GPU there.

    Returns the checkpoint with the weights of the lowest score, or None if no score is below the pruned model's; and
    all evaluations. UserError if the model cannot be trained, or the choices of `accelerate launch` do not fit.
    """
    # Choices of the user's `accelerate config`, which no artifact names, must not change the result.
    for choice in ("MIXED_PRECISION", "DYNAMO_BACKEND"):
        os.environ.pop(f"ACCELERATE_{choice}", None)
    windows_per_process = _windows_per_process()
    logging.set_verbosity_error()
    model = load_for_training(pruned, torch.float32, device)
    dense_model = load_for_training(dense, dtype, device).requires_grad_(False)
    if dtype is torch.float32 and device.type == "cpu":
        for linears in (model, dense_model):
            install_faster_linears(linears)
    try:
        tokens = windows[:1, :8].to(device)
        dense_logits = dense_model(input_ids=tokens).logits
        mean_divergence(dense_logits, model.train()(input_ids=tokens).logits).backward()
    except Exception as error:  # a model's class may raise any exception
        family = model.config.model_type
        unknown = f"recovery.tokens: {family} cannot be trained: {reason(error)}; set recovery.tokens to 0"
        raise UserError(*(explain(error) or [unknown])) from error
    model.zero_grad()
    if checkpointing and model.supports_gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name in later versions
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    checkpoint = Checkpoint(pruned)
    slices = find_slices(model, checkpoint)
    # Views of files: no weight is read.
    stored_dtypes = {name: checkpoint.read(stored[-1].address).dtype for name, stored in slices.items()}
    groups = [
        {"params": [parameter], "lr": rate * root_mean_square(parameter.detach())} for parameter in model.parameters()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)  # torch's fastest, on each device
    dataset = [{"input_ids": window} for window in windows]
    trainer = RecoveryTrainer(
        dense_model, validation, stored_dtypes, on_step, model=model, train_dataset=dataset, eval_dataset=dataset,
        args=_arguments(work, len(windows), windows_per_process, rate=rate, dtype=dtype, device=device),
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=_last_checkpoint(work))
    best = trainer.state.best_metric
    if best is None or best >= 1:
        return None, trainer.curve
    return _with_weights(checkpoint, model, slices), trainer.curve


def load_for_training(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a complete model that trains without dropout and jitter."""
    config = read_config(folder)
    for section in (config, config.get_text_config()):
        section.use_cache = False
        for name, value in list(vars(section).items()):
            if isinstance(value, float) and any(rate in name for rate in ("drop", "jitter")):
                setattr(section, name, 0.0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, trust_remote_code=False)
    return model.eval().to(device)


def _arguments(
    work: Path, windows: int, windows_per_process: int, *, rate: float, dtype: torch.dtype, device: torch.device
) -> TrainingArguments:
    steps_between_evaluations = math.ceil(windows / RECOVERY_BATCH / EVALUATIONS)
    # transformers reads a number below 1 as a fraction of the steps. The first step of a warm-up has a rate of 0: a
    # single step would train nothing.
    warm_up = WARM_UP if windows > RECOVERY_BATCH else 0
    if device.type == "cuda" and windows_per_process == RECOVERY_BATCH:  # in a single process
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    arguments = TrainingArguments(
        output_dir=str(work.absolute()), per_device_train_batch_size=windows_per_process, num_train_epochs=1,
        train_sampling_strategy="sequential", learning_rate=rate, lr_scheduler_type="linear", warmup_steps=warm_up,
        eval_on_start=True, eval_strategy="steps", save_strategy="steps", eval_steps=steps_between_evaluations,
        save_steps=steps_between_evaluations, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=False, use_cpu=device.type == "cpu",
        bf16=dtype is torch.bfloat16, fp16=dtype is torch.float16,
        ddp_find_unused_parameters=True,  # otherwise it depends on the checkpointing, which may differ between GPUs
        report_to="none", logging_strategy="no", log_level="error", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else one process splits each batch over all GPUs
    if device.type == "cuda":
        vars(arguments)["_setup_devices"] = device  # a cached property, which takes the first GPU
    return arguments


def _with_weights(checkpoint: Checkpoint, model: Any, slices: Mapping[str, list[ParameterSlice]]) -> EditedCheckpoint:
    weights: dict[Address, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for stored in slices.get(name, []):  # a tied name need not be stored
            weights[stored.address] = stored.of(parameter.detach())

    def read(address: Address) -> Tensor:
        before = checkpoint.read(address)
        trained = weights[address].to("cpu", before.dtype)
        if before.dim() > 1 and trained[before == 0].count_nonzero():
            raise RuntimeError(f"{address.tensor}: the training moved zeros")
        return trained

    return EditedCheckpoint(checkpoint, read, weights)


def _windows_per_process() -> int:
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            raise UserError(f"accelerate launch: {name} splits gradients, so no mask can act; add --multi_gpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if RECOVERY_BATCH % processes:
        raise UserError(
            f"accelerate launch: {processes} processes, expected 1 or {RECOVERY_BATCH}: a step has {RECOVERY_BATCH} "
            "windows"
        )
    return RECOVERY_BATCH // processes


def _last_checkpoint(work: Path) -> str | None:
    """Return the last complete checkpoint, if any, and remove incomplete ones. A checkpoint's state is written last."""
    complete = {}
    for folder in work.glob("checkpoint-*"):
        try:
            step = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
            for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):  # a kill may have left some
                (folder / name).stat()
            complete[step] = str(folder.absolute())
        except (OSError, ValueError, KeyError):  # missing or damaged
            shutil.rmtree(folder, ignore_errors=True)
    return complete[max(complete)] if complete else None
