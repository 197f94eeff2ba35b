"""Trains a pruned model towards the dense model with transformers' Trainer.

Ours are the loss (the divergence from the dense model), the mask (pruned weights stay zero) and the validation.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments, logging

from wanda_dvc.engine.accelerator import keep_freed_memory
from wanda_dvc.engine.checkpoint import Address, Checkpoint, EditedCheckpoint, read_config
from wanda_dvc.engine.memory import LOGITS_OF_SLICE
from wanda_dvc.engine.structure import ParameterSlice, find_slices
from wanda_dvc.errors import UserError, notice
from wanda_dvc.kernels import install as install_faster_linears
from wanda_dvc.plan import RECOVERY_BATCH
from wanda_dvc.training.compact import CompactAdamW
from wanda_dvc.training.sharding import gathered, launched_processes, local, run_gathered, shard

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


def divergence_of_windows(dense: Any, pruned: Any, input_ids: Int[Tensor, "batch length"]) -> Tensor:
    """Return `mean_divergence` of two models on windows. The dense model runs too: stored logits would fill a disk."""
    with torch.no_grad():
        dense_logits = dense(input_ids=input_ids).logits
    return mean_divergence(dense_logits, pruned(input_ids=input_ids).logits)


def sliced_divergence(dense: Any, pruned: Any, input_ids: Int[Tensor, "batch length"]) -> Tensor:
    """Return `divergence_of_windows` without all logits at once: some positions at a time, computed twice."""
    return run_gathered(dense, lambda: run_gathered(pruned, lambda: _sum_slices(dense, pruned, input_ids)))


def _sum_slices(dense: Any, pruned: Any, input_ids: Int[Tensor, "batch length"]) -> Tensor:
    with torch.no_grad():
        dense_outputs = dense.get_decoder()(input_ids=input_ids)
    outputs = pruned.get_decoder()(input_ids=input_ids)
    kind = type(outputs)  # the model's own class

    def add_slice(total: Tensor, dense_hidden: Tensor, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            dense_logits = logits_after(dense, kind(last_hidden_state=dense_hidden))
        logits = logits_after(pruned, kind(last_hidden_state=hidden))
        return total + mean_divergence(dense_logits, logits) * hidden.shape[1]

    positions = max(1, LOGITS_OF_SLICE // pruned.get_output_embeddings().weight.shape[0])

    def slices_of(outputs: Any) -> Sequence[Tensor]:
        return outputs.last_hidden_state.reshape(1, input_ids.numel(), -1).split(positions, dim=1)

    total = torch.zeros((), device=input_ids.device)
    for dense_hidden, hidden in zip(slices_of(dense_outputs), slices_of(outputs), strict=True):
        total = recompute(add_slice, total, dense_hidden, hidden, use_reentrant=False, preserve_rng_state=False)
    return total / input_ids.numel()


def logits_after(model: Any, outputs: Any) -> Float[Tensor, "1 positions vocabulary"]:
    """Return the logits of the blocks' outputs, through all that the model's own forward pass does after the blocks."""
    decoder, hidden = model.get_decoder(), outputs.last_hidden_state
    calls: list[Any] = []

    def return_outputs(*_: Any, **__: Any) -> Any:
        calls.append(outputs)
        return outputs

    decoder.forward = return_outputs  # on this object; its class has the method
    try:
        logits = model(input_ids=torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)).logits
    finally:
        del decoder.forward
    if len(calls) != 1:
        raise UserError(
            f"recovery.tokens: {model.config.model_type} cannot be trained with little memory: its head does not read "
            "the decoder's outputs; free some memory, or set recovery.tokens to 0"
        )
    return logits


def root_mean_square(parameter: Tensor) -> float:
    """Return the root mean square of nonzero values; at least 1e-3, so that zero biases can change (as Adafactor)."""
    rms = torch.linalg.vector_norm(parameter, dtype=torch.float32) / max(1, parameter.count_nonzero().item()) ** 0.5
    return max(1e-3, rms.item())


class RecoveryTrainer(Trainer):
    """The trainer of a pruned model, or of this process's part of one that is split."""

    model: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any

    def __init__(
        self,
        dense: Any,
        validation: Mapping[str, Windows],
        stored_dtypes: Mapping[str, torch.dtype],  # by parameter
        on_step: Callable[[int], None],
        divergence: Callable[[Any, Any, Tensor], Tensor],
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)
        if self.args.world_size > 1:  # in evaluation mode accelerate does not wrap the model in DDP: FSDP adds up
            prepare = partial(self.accelerator.prepare_model, evaluation_mode=True)
            vars(self.accelerator)["prepare_model"] = prepare
        self.dense, self.validation, self.stored_dtypes, self.on_step = dense, validation, stored_dtypes, on_step
        self.divergence = divergence

    def _move_model_to_device(self, *_: Any) -> None:
        """Leave the model: it is on the device."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        """Return the divergence on some windows."""
        return self.divergence(self.dense, model, inputs["input_ids"])

    def training_step(self, model: Any, *inputs: Any, **kwargs: Any) -> Tensor:
        """Compute gradients, except those of zeros in matrices: AdamW without decay then leaves them zero."""
        loss: Tensor = super().training_step(model, *inputs, **kwargs)
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.grad is not None:
                local(parameter.grad).mul_(local(parameter) != 0)
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
        batch = self.args.per_device_train_batch_size * self.args.world_size
        tokens = self.state.global_step * batch * len(self.train_dataset[0]["input_ids"])
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
        model, divergences = self.model.eval(), {}
        parameters = {name: local(parameter) for name, parameter in model.named_parameters()}
        stored_dtypes = {name: self.stored_dtypes.get(name, values.dtype) for name, values in parameters.items()}
        rounded = [name for name, values in parameters.items() if values.dtype != stored_dtypes[name]]
        trained = {name: parameters[name].clone() for name in rounded}
        try:
            for name in rounded:
                parameters[name].copy_(trained[name].to(stored_dtypes[name]))
            with torch.no_grad(), self.autocast_smart_context_manager():
                for text, windows in self.validation.items():
                    batches = [{"input_ids": window[None].to(self.args.device)} for window in windows]
                    divergences[text] = fmean(self.compute_loss(model, inputs).item() for inputs in batches)
        finally:
            for name in rounded:
                parameters[name].copy_(trained[name])
        return divergences

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        """Make the folder; `_save_optimizer_and_scheduler` writes the weights too."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: Any) -> None:
        """Write a checkpoint's files, by the first process; of a split model each process writes its parts."""
        if self.args.world_size > 1 or self.args.should_save:
            weights = {name: local(parameter) for name, parameter in self.model.named_parameters()}
            states = {"optimizer": self.optimizer.state_dict(), "scheduler": self.lr_scheduler.state_dict()}
            torch.save(weights, self._file(output_dir, "weights"))
            torch.save(states, self._file(output_dir, "states"))
        self.accelerator.wait_for_everyone()  # before the first process calls the checkpoint complete

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        file = self._file(resume_from_checkpoint, "weights")
        weights = torch.load(file, weights_only=True, mmap=True, map_location="cpu")  # saved on any device
        for name, parameter in self.model.named_parameters():
            local(parameter).copy_(weights[name])

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        if checkpoint is not None:
            states = torch.load(self._file(checkpoint, "states"), weights_only=True, map_location="cpu")
            self.optimizer.load_state_dict(states["optimizer"])
            self.lr_scheduler.load_state_dict(states["scheduler"])

    def _file(self, folder: Any, content: str) -> Path:
        return Path(folder) / f"{content}-{self.args.process_index}.pt"


def train(
    dense: Path, pruned: Path, *, windows: Windows, validation: Mapping[str, Windows], batch: int, rate: float,
    dtype: torch.dtype, device: torch.device, checkpointing: bool, low_memory: bool, work: Path,
    on_step: Callable[[int], None],
) -> tuple[EditedCheckpoint | None, Curve]:  # fmt: skip
    """Train a pruned model on windows of tokens, in their order, towards the dense model.

    A step has `batch` windows over all processes, and an evaluation has all validation windows, by text. `rate` is the
    highest learning rate of a step of RECOVERY_BATCH windows, relative to the root mean square of a parameter's nonzero
    values; it grows with the square root of the batch (Malladi et al. 2022, https://arxiv.org/abs/2205.10287). Products
    are in `dtype`, trained weights in float32. With `checkpointing` activations are computed twice instead of kept.
    `on_step` gets the number of each step.

    With `low_memory`, `dtype` is bfloat16 and also that of the trained weights; `CompactAdamW` takes the steps, without
    clipped gradients, and logits exist for some positions at a time.

    An interrupted training resumes at its last checkpoint in `work`. Each process of `accelerate launch` calls this,
    and takes its part of a step's windows. Several split both models; only the first returns weights that can be read.

    Returns the checkpoint with the weights of the lowest score, or None if no score is below the pruned model's; and
    all evaluations. UserError if the choices of `accelerate launch` do not fit.
    """
    processes = _processes(batch, dtype)
    checkpoint_before = last_checkpoint(work)
    cast_to = torch.float32 if low_memory else dtype  # of autocast; weights in bfloat16 need none
    # This connects the processes.
    arguments = _arguments(work, len(windows), batch // processes, batch=batch, dtype=cast_to, device=device)
    logging.set_verbosity_error()
    divergence = sliced_divergence if low_memory else divergence_of_windows
    if low_memory:
        keep_freed_memory(largest=2**22)  # bytes; of larger tensors glibc would keep holes too small for a gradient
    read_on = torch.device("cpu") if processes > 1 else device  # no GPU needs to hold all of a split model
    model = load_for_training(pruned, dtype if low_memory else torch.float32, read_on)
    dense_model = load_for_training(dense, dtype, read_on).requires_grad_(False)
    if dtype is torch.float32 and device.type == "cpu":
        install_faster_linears(model)
        install_faster_linears(dense_model)
    sizes = [root_mean_square(parameter.detach()) for parameter in model.parameters()]
    if processes > 1:
        shard(model, device)
        shard(dense_model, device)
    if checkpointing and model.supports_gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # its name in later versions
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    checkpoint = Checkpoint(pruned)
    slices = find_slices(model, checkpoint)
    stored_dtypes: dict[str, torch.dtype] = {}
    if not low_memory:  # else all evaluations are of weights in bfloat16, also of those that are stored in float16
        for name, parts in slices.items():  # the tensors of a parameter have one dtype
            stored_dtypes[name] = checkpoint.read(parts[0].address).dtype  # of a view of the file: no weight is read
    rates = [rate * math.sqrt(batch / RECOVERY_BATCH) * size for size in sizes]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(model.parameters(), rates, strict=True)]
    # torch's fused one is its fastest, on each device.
    optimizer = CompactAdamW(groups) if low_memory else torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    dataset = [{"input_ids": window} for window in windows]
    trainer = RecoveryTrainer(
        dense=dense_model, validation=validation, stored_dtypes=stored_dtypes, on_step=on_step, divergence=divergence,
        model=model, train_dataset=dataset, optimizers=(optimizer, None), args=arguments,
        eval_dataset=dataset,  # Trainer requires one; `evaluate` reads the validation windows instead
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if checkpoint_before is None else str(checkpoint_before))
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
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(section, name, 0.0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, trust_remote_code=False)
    return model.eval().to(device)


def _arguments(
    work: Path, windows: int, windows_per_process: int, *, batch: int, dtype: torch.dtype, device: torch.device
) -> TrainingArguments:  # fmt: skip
    steps_between_evaluations = math.ceil(windows / batch / EVALUATIONS)  # transformers also evaluates after the last
    # transformers reads a number below 1 as a fraction of the steps. The first step of a warm-up has a learning rate of
    # 0: a single step would train nothing.
    warm_up = WARM_UP if windows > batch else 0
    if device.type == "cuda" and windows_per_process == batch:  # in a single process
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    arguments = TrainingArguments(
        output_dir=str(work.absolute()), per_device_train_batch_size=windows_per_process, num_train_epochs=1,
        train_sampling_strategy="sequential", lr_scheduler_type="linear", warmup_steps=warm_up,
        eval_on_start=True, eval_strategy="steps", save_strategy="steps", eval_steps=steps_between_evaluations,
        save_steps=steps_between_evaluations, load_best_model_at_end=True,
        save_total_limit=2,  # the best and the last: with 1 the last goes before the result is written
        metric_for_best_model="score", greater_is_better=False, use_cpu=device.type == "cpu",
        bf16=dtype is torch.bfloat16, fp16=dtype is torch.float16,
        dataloader_pin_memory=False,  # windows are small, and MPS warns about it
        report_to="none", logging_strategy="no", log_level="error", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else one process splits each batch over all GPUs
    if device.type == "cuda":
        vars(arguments)["_setup_devices"] = device  # a cached property, which takes the first GPU
    return arguments


def _with_weights(checkpoint: Checkpoint, model: Any, slices: Mapping[str, list[ParameterSlice]]) -> EditedCheckpoint:
    views: dict[Address, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for stored in slices.get(name, []):  # a tied name need not be stored
            views[stored.address] = stored.of(gathered(parameter))

    def read(address: Address) -> Tensor:
        before = checkpoint.read(address)
        trained = views[address].to("cpu", before.dtype)
        if before.dim() > 1 and trained[before == 0].count_nonzero():
            raise RuntimeError(f"{address.tensor}: the training moved zeros")
        return trained

    return EditedCheckpoint(checkpoint, read, views)


def _processes(batch: int, dtype: torch.dtype) -> int:
    """Return the number of processes. UserError if they cannot train so.

    It ends accelerate's own splitting, so `launched_processes` would then refuse several.
    """
    processes = launched_processes()
    if batch % processes:
        raise UserError(f"accelerate launch: {processes} processes, expected a divisor of recovery.batch, {batch}")
    if processes > 1 and dtype is torch.float16:
        raise UserError("accelerate launch: the GPU has no bfloat16, expected one with it; run `dvc repro` on one GPU")
    # Choices of the user's `accelerate config`, which no artifact names, must not change the result. `shard` splits
    # models: accelerate splits none on CPUs, and not the dense one.
    for choice in ("MIXED_PRECISION", "DYNAMO_BACKEND", "USE_FSDP"):
        os.environ.pop(f"ACCELERATE_{choice}", None)
    return processes


def last_checkpoint(work: Path) -> Path | None:
    """Return the last complete checkpoint, if any. Each is written in place, its trainer_state.json last."""
    complete = {}
    for folder in work.glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError):  # missing, or cut
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            complete[state["global_step"]] = folder.absolute()
    return complete[max(complete)] if complete else None
