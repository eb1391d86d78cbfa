"""``--cuda-graphs``: updates that the GPU repeats by itself, recorded once a batch shape, from outside the trainer.

Launching its kernels one by one takes longer than a small model's update itself. A CUDA graph is such a sequence of
kernels with every address and number in it, and one launch repeats it. So a batch is copied into buffers of its shape's
graph, and what else differs from update to update (the step size, the loss scale, counts of tokens) is on the device.

A shape's first update is one like any other, by which what it needs is loaded, compiled and tuned; its second is
recorded, which executes nothing, and then repeated. Where an update has one micro-batch, a graph is the whole update.
Where it has several, each adds its gradients to buffers that all graphs share, and one graph more applies them. So too
with several processes, which sum these buffers in between, outside of graphs: not all need a graph for their batch.
Graphs share their memory: no two run at once, and none leaves anything there for another.

What a recording does when first repeated is compared with an ordinary forward and backward pass on the same batch.

Dropout draws what it would draw without graphs: torch has a graph take seed and offset of the CUDA generator from the
host when it is launched, and the trainer seeds that before every micro-batch.
"""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fairseq.data.translation import Batch
from fairseq.errors import first_line, is_out_of_memory
from fairseq.optim.optimizers import Adam
from fairseq.training.gradients import FlatGradients
from fairseq.utils.cuda_graphs import CudaRecorder, Graphs, Recorder

if TYPE_CHECKING:
    from fairseq.training.distributed import World
    from fairseq.training.trainer import Trainer

logger = logging.getLogger("fairseq.train")

MOST_GRAPHS = 128  # further shapes run without
TOLERANCE = 0.02  # between what a graph computes and what it was recorded from, relative: bf16's sums in another order
Shape = tuple[int, ...]
APPLY: tuple[str, Shape] = ("apply", ())  # the graph of an update's end


def with_graphs(trainer: Trainer) -> UpdateGraphs | None:
    """The graphs of ``trainer``, if there are to be any. Where the flag asks in vain, that is said."""
    if uses_graphs(trainer.args, trainer.world):
        return UpdateGraphs(trainer, CudaRecorder(trainer.world.device))
    if trainer.args.cuda_graphs:
        logger.warning(f"--cuda-graphs does nothing here: {_obstacle(trainer.args, trainer.world)}")
    return None


def uses_graphs(args: Namespace, world: World) -> bool:
    """Whether updates are to be recorded, unless that fails: where nothing is in the way and no flag forbids it."""
    return args.cuda_graphs is not False and not _obstacle(args, world)


def _obstacle(args: Namespace, world: World) -> str:
    for is_there, reason in (
        (world.device.type != "cuda", "training is not on a GPU"),
        (
            world.size > 1 and args.ddp_backend == "fully_sharded",
            "--ddp-backend fully_sharded gathers parameters on the way",
        ),
        (args.optimizer not in ("adam", "radam"), f"--optimizer {args.optimizer} cannot skip an update on the device"),
        (args.checkpoint_activations or args.offload_activations, "activations are checkpointed"),
    ):
        if is_there:
            return reason
    return ""


class UpdateGraphs(Graphs):
    """The recorded updates of a trainer that `_obstacle` lets pass."""

    def __init__(self, trainer: Trainer, recorder: Recorder) -> None:
        self._trainer = trainer
        self._several = trainer.flat is not None  # processes, which sum their gradients between two graphs
        self._sums = torch.zeros_like(trainer.new_sums())
        self._grads: list[FlatGradients] = []  # a single process's, for updates of several micro-batches
        self._found: list[float] = []  # what new graphs have computed, before the sum over processes
        self._seen: set[Shape] = set()
        self._without: set[Shape] = set()  # shapes whose graph did not fit into memory
        self._inputs: dict[Shape, Batch] = {}
        self._graphs: dict[tuple[str, Shape], Callable[[], None]] = {}
        self._new: set[tuple[str, Shape]] = set()  # graphs that have not been compared yet
        super().__init__(recorder, logger, [self._graphs, self._inputs, self._grads])

    def step(self, micro_batches: Sequence[Batch | None]) -> bool:
        """One update; see `Trainer.train_step`.

        While updates are skipped they run without graphs, so that what breaks them can be found.
        """
        trainer = self._trainer
        with self._recorder.on_stream():
            if trainer.skipped.in_a_row:
                return trainer.eager_step(micro_batches)
            batches = [batch for batch in micro_batches if batch is not None]
            ready = self._ready(batches)
            if not (ready or self._several):
                return trainer.eager_step(micro_batches)
            new = self._new.intersection(self._wanted(batches)) if ready else set()
            expected = self._measured(batches) if new else None
            done = trainer.step_on_device(partial(self._update, micro_batches, ready, bool(new)), batches)
            if expected is not None and self._as_expected(expected):
                self._new -= new
            return done

    def _update(self, micro_batches: Sequence[Batch | None], ready: bool, new: bool) -> None:
        """The update itself. ready: whether there are graphs for it. new: whether one is to be compared.

        Of several processes some may have graphs and others not, but all end it with the same kernels, or their
        parameters would drift apart.
        """
        trainer = self._trainer
        if ready:
            self._replay([batch for batch in micro_batches if batch is not None])
        else:
            self._sums.copy_(trainer.accumulate(micro_batches))
        if not self._several:
            return
        if new:
            self._found = trainer.loss_and_norm(self._sums)
        with trainer.updating():
            trainer.sum_over_processes(self._sums)
            if apply := self._graphs.get(APPLY):
                apply()
            else:
                cast("Adam", trainer.optimizer).complete_state()
                trainer.update_parameters(self._sums)

    def _wanted(self, batches: list[Batch]) -> list[tuple[str, Shape]]:
        """The graphs of an update: what they do, and of which shape."""
        if len(batches) == 1 and not self._several:
            return [("whole", _shape(batches[0]))]
        return [*(("add", _shape(batch)) for batch in batches), APPLY]

    def _ready(self, batches: list[Batch]) -> bool:
        """Whether there are graphs for ``batches``; those that can be recorded now are."""
        shapes = list(map(_shape, batches))
        new = set(shapes) - self._seen
        self._seen.update(new)
        if self._off or new or self._without.intersection(shapes):
            return False
        for batch, (kind, shape) in zip([*batches, None], self._wanted(batches), strict=False):
            if (kind, shape) in self._graphs:
                continue
            if len(self._graphs) == MOST_GRAPHS:
                return False
            try:
                self._graphs[kind, shape] = self._record(kind, shape, batch)
                self._new.add((kind, shape))
            except Exception as error:  # one that is not the recording's comes again without it
                self._fail(shape, error)
                return False
        return True

    def _record(self, kind: str, shape: Shape, batch: Batch | None) -> Callable[[], None]:
        trainer = self._trainer
        cast("Adam", trainer.optimizer).complete_state()  # all updates so far may have been skipped
        if batch is not None and shape not in self._inputs:
            self._inputs[shape] = _buffers(batch, trainer.world.device)
            _fill(self._inputs[shape], batch)
        if kind != "whole" and not (self._several or self._grads):
            self._grads.append(FlatGradients(trainer.parameters))

        def work() -> None:
            if kind != "apply":
                inputs = self._inputs[shape]
                trainer.backpropagate(inputs, *trainer.losses(inputs), self._sums)
            if kind == "add":
                self._flat.add_gradients()
            else:
                trainer.update_parameters(self._sums)

        if kind == "apply":
            self._flat.clear()
        else:  # gradients are the graph's own: with none there yet, the backward pass has nothing to add to
            trainer.optimizer.zero_grad(set_to_none=True)
        try:
            return self._recorder.record(work)
        finally:
            trainer.clear_gradients()

    @property
    def _flat(self) -> FlatGradients:
        """What graphs of single micro-batches add their gradients to."""
        return self._trainer.flat or self._grads[0]

    def _replay(self, batches: list[Batch]) -> None:
        """The graphs of an update; of several processes, those before its end."""
        self._sums.zero_()
        wanted = self._wanted(batches)
        if APPLY in wanted:
            self._flat.all.zero_()
        for index, (batch, graph) in enumerate(zip(batches, wanted, strict=False)):
            _fill(self._inputs[graph[1]], batch)
            self._trainer.seed(index)
            self._graphs[graph]()
        if APPLY in wanted and not self._several:
            self._graphs[APPLY]()

    def _measured(self, batches: list[Batch]) -> list[float] | None:
        """Loss and gradient norm of the update to come, without graphs; None where memory does not suffice."""
        try:
            return self._trainer.measure(batches)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._trainer.clear_gradients()
        torch.cuda.empty_cache()
        return None

    def _as_expected(self, expected: list[float]) -> bool:
        """Whether the update just repeated had this loss and gradient norm; if it had others, go on without graphs.

        Where they are not finite nothing can be said: then not, and graphs stay.
        """
        found = self._found if self._several else self._trainer.outcome[1:3].tolist()
        if not all(map(math.isfinite, (*expected, *found))):
            return False
        if all(math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-6) for a, b in zip(expected, found, strict=True)):
            return True
        (loss, gnorm), (other_loss, other_gnorm) = expected, found
        logger.warning(
            f"--cuda-graphs: a recorded update has loss {other_loss:g} and gradient norm {other_gnorm:g}, an ordinary "
            f"one {loss:g} and {gnorm:g}; going on without (that one update is in the model)"
        )
        self._turn_off()
        return False

    def _fail(self, shape: Shape, error: Exception) -> None:
        """Do without: for this shape, when memory did not suffice, else for good."""
        if not is_out_of_memory(error):
            self._failed(error)
            return
        if not self._without:
            said = first_line(error)
            logger.warning(f"--cuda-graphs: out of memory for batches of {shape}; such go on without: {said}")
        self._without.add(shape)
        torch.cuda.empty_cache()


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """What the device needs of a batch, by name."""
    assert batch["target"] is not None
    return {**cast("dict[str, Tensor]", batch["net_input"]), "target": batch["target"]}


def _shape(batch: Batch) -> Shape:
    """Rows, source tokens, target tokens."""
    net_input = batch["net_input"]
    return (*net_input["src_tokens"].shape, net_input["prev_output_tokens"].size(1))


def _buffers(batch: Batch, device: torch.device) -> Batch:
    """Room on the device for batches of this shape; what `Batch` has as numbers, too."""
    tensors = {name: torch.zeros_like(tensor, device=device) for name, tensor in _tensors(batch).items()}
    counts = {key: torch.zeros((), dtype=torch.float64, device=device) for key in ("nsentences", "ntokens")}
    net_input = {name: tensors[name] for name in batch["net_input"]}
    buffers: Any = {"id": batch["id"], "net_input": net_input, "target": tensors["target"], **counts}
    return cast("Batch", buffers)


def _fill(buffers: Batch, batch: Batch) -> None:
    """Copy ``batch`` to the device, without waiting where it is in pinned memory."""
    for name, tensor in _tensors(batch).items():
        _tensors(buffers)[name].copy_(tensor, non_blocking=True)
    cast("Tensor", buffers["nsentences"]).fill_(batch["nsentences"])
    cast("Tensor", buffers["ntokens"]).fill_(batch["ntokens"])
