"""Trains a pruned model towards the dense model, with transformers' Trainer: ours are the loss, the mask, the guard."""

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
from wanda_dvc.engine.structure import stored_parts
from wanda_dvc.errors import UserError, explain, notice, reason
from wanda_dvc.kernels import install
from wanda_dvc.plan import RECOVERY_BATCH as BATCH  # windows a step, of all processes

WARM_UP = 0.05  # of the steps
LOOKS = 10  # of the guard, and checkpoints, during a training
NOISE = ("drop", "jitter")  # in the names of rates that make a training random
STATE, WEIGHTS = "trainer_state.json", "model.safetensors"


def divergence(dense: Float[Tensor, "*position vocabulary"], pruned: Float[Tensor, "*position vocabulary"]) -> Tensor:
    """Return the mean over positions of KL(dense ‖ pruned) in nats, of logits."""
    p, q = (logits.float().log_softmax(-1) for logits in (dense, pruned))
    return kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()


def root_mean_square(parameter: Tensor) -> float:
    """Return the root mean square of nonzero values; at least 1e-3, so that zero biases can change (as Adafactor)."""
    rms = torch.linalg.vector_norm(parameter) / max(1, parameter.count_nonzero().item()) ** 0.5
    return max(1e-3, rms.item())


class RecoveryTrainer(Trainer):
    """The trainer of a pruned model, with the dense model and the guard's windows, by text."""

    model: Any
    train_dataset: Any
    kinds: Mapping[str, torch.dtype]  # in which parameters are stored, by name

    def __init__(self, dense: Any, held: Mapping[str, Tensor], step: Callable[[], object], **words: Any) -> None:
        super().__init__(**words)
        self.remove_callback(PrinterCallback)
        self.dense, self.held, self.step, self.steps = dense, held, step, 0

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        """Return the divergence of some windows. The dense model runs each time: its predictions would fill a disk."""
        with torch.no_grad():
            wanted = self.dense(**inputs).logits
        return divergence(wanted, model(**inputs).logits)

    def training_step(self, model: Any, *inputs: Any, **words: Any) -> Tensor:
        """Compute gradients, except those of zeros in matrices: AdamW without decay then leaves them zero."""
        while self.steps <= self.state.global_step:  # with those before an interruption
            self.step()
            self.steps += 1
        loss: Tensor = super().training_step(model, *inputs, **words)
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.grad is not None:
                parameter.grad.mul_(parameter.detach() != 0)
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make AdamW. A parameter's learning rate is a share of the root mean square of its nonzero values."""
        every, rate = (model or self.model).parameters(), self.args.learning_rate
        groups = [{"params": [p], "lr": rate * root_mean_square(p.detach())} for p in every if p.requires_grad]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)  # torch's fastest, on each device
        return self.optimizer

    @property
    def curve(self) -> list[dict[str, float]]:
        """The guard's measures, first those before the training; a score is the mean share left of a divergence."""
        return [one for one in self.state.log_history if "score" in one]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure on the guard's windows, with weights rounded as they will be stored, unless that is done."""
        seen = self.state.global_step * BATCH * len(self.train_dataset[0]["input_ids"])
        if not self.curve or self.curve[-1]["tokens"] != seen:  # the trainer asks twice after the last step
            model, found, own = self.model.eval(), dict[str, float](), dict[str, Tensor]()
            for name, of in model.named_parameters():
                own[name] = of.detach().to(self.kinds.get(name, of.dtype)).to(of.dtype)

            def run(**words: Any) -> Any:
                return functional_call(model, own, (), words)

            with torch.no_grad(), self.autocast_smart_context_manager():
                for name, rows in self.held.items():
                    each = ({"input_ids": row[None].to(self.args.device)} for row in rows)
                    found[name] = fmean(self.compute_loss(run, inputs).item() for inputs in each)
            start = self.curve[0] if self.curve else found
            score = fmean(found[name] / start[name] if start[name] else math.inf for name in found)
            self.log({"tokens": seen, **found, "score": score})
            if self.args.should_save:  # the first process
                shown = ", ".join(f"{name} {start[name]:.4f} → {found[name]:.4f}" for name in found)
                notice(f"recover: {seen:,} tokens, divergence of held-out windows: {shown}")
        return {"eval_score": self.curve[-1]["score"]}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the weights by their names in the model, without transformers' conversions."""
        if self.args.should_save:
            (folder := Path(output_dir or self.args.output_dir or "")).mkdir(parents=True, exist_ok=True)
            save_file(state_dict or dict(self.model.named_parameters()), folder / WEIGHTS)


def load(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a complete model that trains without dropout and jitter."""
    config = read_config(folder)
    for part in (config, config.get_text_config()):
        part.use_cache = False
        for name, value in list(vars(part).items()):
            if isinstance(value, float) and any(word in name for word in NOISE):
                setattr(part, name, 0.0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, trust_remote_code=False)
    return model.eval().to(device)


def recover(
    dense: Path, pruned: Path, *, rows: Int[Tensor, "windows length"], held: Mapping[str, Int[Tensor, "_ length"]],
    rate: float, dtype: torch.dtype, device: torch.device, checkpointing: bool, work: Path, step: Callable[[], object],
) -> tuple[EditedCheckpoint | None, list[dict[str, float]]]:  # fmt: skip
    """Train a pruned model on `rows`, in their order, towards the dense model in another folder.

    Returns the pruned checkpoint with the weights of the best score, or None if no score is better than the pruned
    model's; and the guard's curve. An interrupted training resumes at its last checkpoint in `work`. Each process of
    `accelerate launch` calls this, and takes its share of a step's windows.
    """
    # Choices of the user's `accelerate config`, which no artifact names, must not change the result.
    for choice in ("MIXED_PRECISION", "DYNAMO_BACKEND"):
        os.environ.pop(f"ACCELERATE_{choice}", None)
    share = _share()
    logging.set_verbosity_error()
    student, teacher = load(pruned, torch.float32, device), load(dense, dtype, device).requires_grad_(False)
    for model in (student, teacher) if dtype is torch.float32 and device.type == "cpu" else ():
        install(model)
    try:
        some = rows[:1, :8].to(device)
        divergence(teacher(input_ids=some).logits, student.train()(input_ids=some).logits).backward()
    except Exception as error:  # a model's class may raise any exception
        family = student.config.model_type
        what = explain(error) or (f"recovery.tokens: {family} cannot be trained: {reason(error)}; set it to 0",)
        raise UserError(*what) from error
    student.zero_grad()
    if checkpointing and student.supports_gradient_checkpointing:
        renamed = getattr(student, "activation_checkpointing_enable", None)  # its name in later versions
        (renamed or student.gradient_checkpointing_enable)({"use_reentrant": False})
    each = math.ceil(len(rows) / BATCH / LOOKS)
    warm_up = WARM_UP * (len(rows) > BATCH)  # its first step has a rate of 0: an only step would train nothing
    if device.type == "cuda" and share == BATCH:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    arguments = TrainingArguments(
        output_dir=str(work.absolute()), per_device_train_batch_size=share, num_train_epochs=1,
        train_sampling_strategy="sequential", learning_rate=rate, lr_scheduler_type="linear", warmup_steps=warm_up,
        eval_on_start=True, eval_strategy="steps", save_strategy="steps", eval_steps=each, save_steps=each,
        save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=False,
        use_cpu=device.type == "cpu", bf16=dtype is torch.bfloat16, fp16=dtype is torch.float16,
        ddp_find_unused_parameters=True,  # otherwise it depends on the checkpointing, which may differ between GPUs
        report_to="none", logging_strategy="no", log_level="error", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process would split each batch over all GPUs
    if device.type == "cuda":
        vars(arguments)["_setup_devices"] = device  # a cached property, which takes the first GPU
    data = [{"input_ids": row} for row in rows]
    checkpoint, named = Checkpoint(pruned), dict(student.named_parameters(remove_duplicate=False))
    every = [(name, part) for name, stored in stored_parts(student, checkpoint).items() for part in stored]
    parts = [(name, part) for name, part in every if name in named]
    trainer = RecoveryTrainer(teacher, held, step, model=student, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.kinds = {name: checkpoint.read(part.address).dtype for name, part in parts}
    trainer.train(resume_from_checkpoint=_last(work))
    if not (trainer.state.best_metric or 1) < 1:
        return None, trainer.curve
    weights = {part.address: part.of(named[name].detach()) for name, part in parts}

    def read(address: Address) -> Tensor:
        before = checkpoint.read(address)
        new = weights[address].to("cpu", before.dtype)
        if before.dim() > 1 and new[before == 0].count_nonzero():
            raise RuntimeError(f"{address.tensor}: the training moved zeros")
        return new

    return EditedCheckpoint(checkpoint, read, weights), trainer.curve


def _share() -> int:
    """Return this process's windows of a step, among the processes of `accelerate launch`."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            raise UserError(f"accelerate launch: {name} splits gradients, so no mask can act; add --multi_gpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if BATCH % processes:
        raise UserError(f"accelerate launch: {processes} processes, expected 1 or {BATCH}: a step has {BATCH} windows")
    return BATCH // processes


def _last(work: Path) -> str | None:
    """Return the last complete checkpoint, if any. A checkpoint's state is written last."""
    complete = {}
    for folder in work.glob("checkpoint-*"):
        try:
            step = json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"]
            for name in (WEIGHTS, "optimizer.pt", "scheduler.pt"):  # a kill leaves a part of a removed one
                (folder / name).stat()
            complete[step] = str(folder.absolute())
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
    return complete[max(complete)] if complete else None
