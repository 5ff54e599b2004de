"""The one trainer: who trains, with which loss, under which mask, for how long. Every method that trains anything calls `train`.

    record = train(model, parameters, next_token, rows, TrainOptions(steps=200, lr=1e-3), evaluate=lambda: loss_on(model, held_out))

`parameters` train and nothing else does. A step reads `batch` rows, in the order of a shuffle that the seed and the position alone
decide; `loss(model, rows)` is all that the trainer knows of the model, so that rows may be windows of tokens, or numbers under which the
caller keeps something else. The state that evaluates best is the one that the model is left with. With a folder, what was done is kept
there now and then, and the same call goes on from it to the same bytes.

Under torchrun (an initialised `torch.distributed`) every process calls `train` alike: each takes its share of every batch, and torch's
DistributedDataParallel averages the gradients, so that the result is that of one process but for rounding.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from .errors import OptionError
from .progress import Progress, quiet

STATE = "training.pt"  # in the folder of a training that can be resumed

Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class TrainOptions:
    """How long, how fast and how. `batch` is the rows of one step of the optimiser, which are read in `accumulation` parts."""

    steps: int = 200
    lr: float = 1e-3
    batch: int = 8
    accumulation: int = 1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.1  # share of the steps in which the rate rises
    weight_decay: float = 0.0  # of matrices
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"  # muon: for matrices that are no embeddings and no head, AdamW for the rest; sgd: momentum 0.9
    clip: float | None = 1.0  # largest norm of the gradient
    seed: int = 0
    autocast: bool = False  # bfloat16 where torch finds it safe; parameters stay as they are
    checkpointing: bool = False  # activations are computed again in place of being kept
    dropout: bool = True  # as the model has it; without, it trains in evaluation mode
    evaluations: int = 5  # how often it is evaluated on the way, the end included

    def problems(self) -> list[str]:
        """Everything wrong with them, a sentence each."""
        counts = {"steps": self.steps, "batch": self.batch, "accumulation": self.accumulation, "evaluations": self.evaluations}
        found = [f"{name} is {value}; it must be at least 1" for name, value in counts.items() if value < 1]
        found += [f"the learning rate is {self.lr}; it must be positive and finite"] if not 0 < self.lr < math.inf else []
        found += [f"warmup is {self.warmup}; it is a share of the steps, 0 to 1"] if not 0 <= self.warmup <= 1 else []
        found += [f"weight decay is {self.weight_decay}; it must not be negative"] if not 0 <= self.weight_decay < math.inf else []
        found += [f"clip is {self.clip}; it must be positive"] if self.clip is not None and not self.clip > 0 else []
        if self.checkpointing and not self.dropout:
            found.append("activations are computed again in training mode only; train with dropout, or without checkpointing")
        if not found and self.batch % self.accumulation:
            found.append(f"a batch of {self.batch} rows cannot be read in {self.accumulation} equal parts")
        return found

    def rate(self, step: int) -> float:
        """The share of `lr` at which a step, counted from 0, is made."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / warm
        gone = (step - warm) / max(1, self.steps - warm)
        return {"linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2, "constant": 1.0}[self.schedule]

    def evaluated(self, done: int) -> bool:
        """Whether the model is evaluated after so many steps."""
        return done == self.steps or done * self.evaluations // self.steps > (done - 1) * self.evaluations // self.steps


@dataclass
class TrainRecord:
    """What a training did. `best` is the number of steps after which the model was as it is left; `stopped` says why it ended early."""

    losses: list[float] = field(default_factory=list)  # of each step, before it was made
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # steps done, value
    best: int = 0
    stopped: str = ""
    optimizer_bytes: int = 0  # of the optimiser's state

    @property
    def value(self) -> float:
        """The evaluation of the state that the model is left with; NaN where nothing evaluated it."""
        return next((value for step, value in self.evaluations if step == self.best), math.nan)


# ---- losses ----


def next_token(model: Any, rows: Tensor) -> Tensor:
    """The mean cross entropy of the next token, in nats, over windows of tokens, int64 [windows, window]."""
    return _cross_entropy(_logits(model, rows), rows)


def distillation(teacher: Any, weight: float = 1.0, temperature: float = 1.0) -> Loss:
    """A loss: `weight` x KL(teacher || model) over the next token + (1 - weight) x its cross entropy; the KL at a temperature, times its square."""

    def loss(model: Any, rows: Tensor) -> Tensor:
        ours = _logits(model, rows)
        with torch.no_grad():
            theirs = _logits(teacher, rows)
        if ours.shape != theirs.shape:
            raise OptionError(f"the model has {ours.shape[-1]} tokens and its teacher {theirs.shape[-1]}; distil from a model of the same vocabulary")
        here, there = ((logits / temperature).log_softmax(-1).flatten(0, 1) for logits in (ours, theirs))
        divergence = functional.kl_div(here, there, log_target=True, reduction="batchmean") * temperature**2
        return weight * divergence + (1 - weight) * _cross_entropy(ours, rows) if weight < 1 else divergence

    return loss


def loss_on(model: Any, rows: Tensor, loss: Loss = next_token, batch: int = 8) -> float:
    """The mean loss over rows, in evaluation mode, a few of them at a time; the mode is as it was afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return math.fsum(loss(model, part).double().item() * len(part) for part in torch.split(rows, batch)) / len(rows)
    finally:
        model.train(training)


def _logits(model: Any, rows: Tensor) -> Tensor:
    """Float32 logits of the tokens that follow, [windows, window - 1, vocabulary]."""
    logits: Tensor = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return logits.float()


def _cross_entropy(logits: Tensor, rows: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


# ---- training ----


def train(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    ids: Tensor,
    options: TrainOptions,
    *,
    masks: Mapping[str, Tensor] | None = None,
    after_step: Callable[[], None] | None = None,
    evaluate: Callable[[], float] | None = None,
    folder: Path | None = None,
    kept: Callable[[str], None] | None = None,
    keep_every: float = 60.0,
    progress: Progress | None = None,
) -> TrainRecord:
    """Train these parameters of a model on rows `ids` [rows, ...], in place; the caller's random numbers are not touched.

    `masks`: for parameters by name, bool, where False stays exactly 0 in the weight, its gradient and the optimiser's state. `after_step`
    is called after each step, to keep an invariant of the caller's. `evaluate` gives a number, the lower the better; it is asked before
    the first step too. A loss or a gradient that is NaN or infinite ends the training: the model is left in its best state (the first one
    where nothing is evaluated), and the record says which step. State for a resumption is kept in `folder` every `keep_every` seconds;
    `kept` is told the name of the file each time.
    Memory: the parameters, a copy of the best ones, gradients, and the optimiser's state.
    Errors: OptionError for impossible options, nothing to train, and a folder that holds another training's state.
    """
    if problems := options.problems() + _misfits(parameters, ids, options):
        raise OptionError("; ".join(problems))
    progress = progress or quiet()
    with _training(model, parameters, options), _masked(parameters, masks or {}) as mask_again:
        run = _Run(model, parameters, options, _fingerprint(parameters, ids, options), folder)
        run.restore()
        if not run.done and evaluate is not None:
            run.note(evaluate())
        last = time.monotonic()
        with progress.phase("training", options.steps, " steps", done=run.done):
            while run.done < options.steps and not run.record.stopped:
                value = run.step(loss, _batch_of(ids, run.done, options))
                mask_again()
                if run.record.stopped:
                    break
                if after_step is not None:
                    after_step()
                progress.say(f"loss {value:.4g}" + (f", evaluated {run.record.evaluations[-1][1]:.4g}" if run.record.evaluations else ""))
                progress.advance(1)
                if evaluate is not None and options.evaluated(run.done):
                    run.note(evaluate())
                if folder is not None and (time.monotonic() - last >= keep_every or run.done == options.steps):
                    run.keep(kept)
                    last = time.monotonic()
        run.finish(evaluated=evaluate is not None)
    return run.record


class _Run:
    """One training: its optimisers, how far it is, and its best state."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], options: TrainOptions, job: str, folder: Path | None) -> None:
        self.model, self.parameters, self.options, self.job, self.folder = model, parameters, options, job, folder
        self.runner: Any = nn.parallel.DistributedDataParallel(model) if _processes() > 1 else model
        self.optimizers = _optimizers(model, parameters, options)
        self.schedules = [LambdaLR(optimizer, options.rate) for optimizer in self.optimizers]
        self.record = TrainRecord()
        self.best = self._values()
        self.done = 0

    def step(self, loss: Loss, rows: Tensor) -> float:
        """Make one step on these rows; the mean loss over them, before it."""
        torch.manual_seed(_mixed(self.options.seed, self.done, _rank()))  # dropout depends on the position, not on what was drawn before
        parts = torch.chunk(rows, self.options.accumulation)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        for number, part in enumerate(parts, 1):
            alone = isinstance(self.runner, nn.parallel.DistributedDataParallel) and number < len(parts)
            with self.runner.no_sync() if alone else nullcontext(), torch.autocast(rows.device.type, torch.bfloat16, enabled=self.options.autocast):
                value = loss(self.runner, part) / len(parts)
            value.backward()  # type: ignore[no-untyped-call]
            total += value.detach()
        if _processes() > 1:
            distributed.all_reduce(total)
            total /= _processes()
        clip = math.inf if self.options.clip is None else self.options.clip
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), clip)
        self.record.losses.append(total.item())
        if not (math.isfinite(total.item()) and bool(norm.isfinite())):
            what = "loss" if not math.isfinite(total.item()) else "gradient"
            self.record.stopped = f"the {what} of step {self.done + 1} of {self.options.steps} is not finite"
            return total.item()
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.done += 1
        return total.item()

    def note(self, value: float) -> None:
        """Take note of an evaluation; the state is the best one where none was better."""
        before = min((value for _, value in self.record.evaluations if not math.isnan(value)), default=math.inf)
        self.record.evaluations.append((self.done, value))
        if value < before:
            self.record.best, self.best = self.done, self._values()

    def finish(self, evaluated: bool) -> None:
        """Leave the model in its best state."""
        self.record.optimizer_bytes = sum(
            value.nbytes for optimizer in self.optimizers for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        )
        if evaluated or self.record.stopped:
            self._set(self.best)
        else:
            self.record.best = self.done

    def keep(self, kept: Callable[[str], None] | None) -> None:
        """Write the state of the training, whole or not at all."""
        if self.folder is None or _rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "job": self.job, "done": self.done, "record": asdict(self.record), "parameters": self._values(), "best": self.best,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "schedules": [schedule.state_dict() for schedule in self.schedules],
        }  # fmt: skip
        unfinished = self.folder / f"{STATE}.unfinished"
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.folder / STATE)
        if kept is not None:
            kept(STATE)

    def restore(self) -> None:
        """Go on from what the folder holds, if it holds anything."""
        state = from_first(self._kept)
        if state is None:
            return
        if state["job"] != self.job:
            raise OptionError(f"{self.folder} holds the state of another training, with other options, parameters or text; remove it to start anew")
        self.done, self.best = state["done"], state["best"]
        self.record = TrainRecord(**{**state["record"], "evaluations": [tuple(pair) for pair in state["record"]["evaluations"]]})
        self._set(state["parameters"])
        for optimizer, schedule, moments, rates in zip(self.optimizers, self.schedules, state["optimizers"], state["schedules"], strict=True):
            optimizer.load_state_dict(moments)
            schedule.load_state_dict(rates)

    def _kept(self) -> dict[str, Any] | None:
        if self.folder is None or not (self.folder / STATE).exists():
            return None
        found: dict[str, Any] = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
        return found

    def _values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters.items()}

    def _set(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])


@contextmanager
def several_processes(device: str) -> Iterator[None]:
    """Inside, this process is one of those that torchrun started, if it did; they all must come here."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or _processes() > 1:
        yield
        return
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        gc.collect()  # what still holds the group in a circle of references: its threads must not outlive it
        distributed.destroy_process_group()


def from_first(compute: Callable[[], Any]) -> Any:
    """What the first process computes, in every process."""
    found = [None if _rank() else compute()]
    if _processes() > 1:
        distributed.broadcast_object_list(found, src=0)
    return found[0]


def _misfits(parameters: Mapping[str, nn.Parameter], ids: Tensor, options: TrainOptions) -> list[str]:
    found = [] if any(parameter.numel() for parameter in parameters.values()) else ["there is nothing to train"]
    found += [] if len(ids) else ["there are no rows to train on"]
    parts = options.accumulation * _processes()
    if not options.problems() and options.batch % parts:
        parted = f"in {options.accumulation} parts by {_processes()} processes"
        found.append(f"a batch of {options.batch} rows cannot be read {parted}; make it a multiple of {parts}")
    return found


@contextmanager
def _training(model: Any, parameters: Mapping[str, nn.Parameter], options: TrainOptions) -> Iterator[None]:
    """The model with only these parameters trainable; what it was like before, afterwards."""
    wanted = {id(parameter) for parameter in parameters.values()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training
    if options.checkpointing:
        _checkpointing(model, "enable")({"use_reentrant": False})
    cards = {parameter.device.index for parameter in required if parameter.is_cuda}
    with torch.random.fork_rng(devices=cards), torch.enable_grad():
        try:
            for parameter in required:
                parameter.requires_grad_(id(parameter) in wanted)
            model.train(options.dropout)
            yield
        finally:
            for parameter, before in required.items():
                parameter.requires_grad_(before).grad = None
            model.train(training)
            if options.checkpointing:
                _checkpointing(model, "disable")()


def _checkpointing(model: Any, what: str) -> Callable[..., None]:
    """The method of a transformers model that enables or disables it; transformers renamed them in 5.23."""
    method = getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}", None)
    if method is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise OptionError(f"{type(model).__name__} cannot compute its activations again; train without checkpointing")
    found: Callable[..., None] = method
    return found


@contextmanager
def _masked(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> Iterator[Callable[[], None]]:
    """Masks on gradients, and so on what an elementwise optimiser keeps of them; the function masks the weights, for those that are not elementwise."""
    parts: list[tuple[Any, Tensor]] = [(parameters[name], mask) for name, mask in masks.items()]
    hooks = [parameter.register_hook(lambda gradient, mask=mask: gradient.masked_fill(~mask, 0)) for parameter, mask in parts]

    def mask_again() -> None:
        with torch.no_grad():
            for parameter, mask in parts:
                parameter.masked_fill_(~mask, 0)

    mask_again()
    try:
        yield mask_again
    finally:
        for hook in hooks:
            hook.remove()


def _optimizers(model: Any, parameters: Mapping[str, nn.Parameter], options: TrainOptions) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the matrices beside it, its update scaled as wide as AdamW's so that they share a learning rate; or SGD for everything."""
    if options.optimizer == "sgd":
        return [torch.optim.SGD(parameters.values(), lr=options.lr, momentum=0.9, weight_decay=options.weight_decay)]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables |= {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    matrices = [parameter for parameter in parameters.values() if parameter.ndim == 2 and id(parameter) not in tables]
    by_muon = {id(parameter) for parameter in matrices} if options.optimizer == "muon" else set()
    rest = [parameter for parameter in parameters.values() if id(parameter) not in by_muon]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in rest if parameter.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [parameter for parameter in rest if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = []
    if by_muon:
        found.append(torch.optim.Muon(matrices, lr=options.lr, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"))
    if rest:
        found.append(torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr))
    return found


def _batch_of(ids: Tensor, step: int, options: TrainOptions) -> Tensor:
    """The rows of a step for this process: each pass over all rows is a shuffle of its own, and the passes follow each other without a gap."""
    places = range(step * options.batch, (step + 1) * options.batch)
    epochs = {place // len(ids) for place in places}
    orders = {epoch: torch.randperm(len(ids), generator=torch.Generator().manual_seed(_mixed(options.seed, epoch))) for epoch in epochs}
    chosen = torch.stack([orders[place // len(ids)][place % len(ids)] for place in places])
    return ids[chosen[_rank() :: _processes()].to(ids.device)]


def _fingerprint(parameters: Mapping[str, nn.Parameter], ids: Tensor, options: TrainOptions) -> str:
    facts = repr((asdict(options), [(name, tuple(parameter.shape)) for name, parameter in parameters.items()], tuple(ids.shape)))
    return hashlib.sha256(facts.encode() + ids.cpu().contiguous().numpy().tobytes()).hexdigest()


def _mixed(*numbers: int) -> int:
    """A seed out of several numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _rank() -> int:
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
