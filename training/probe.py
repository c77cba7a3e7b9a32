"""Looks at attention outside the training step: pooled over a batch, and what sparse attention
leaves out. Without gradient and dropout; a step's bits do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models import ModelOutput, StatisticsRequest
from sparsity.observe import Values, describe_masks, numbers, uniform_attention
from training.data.order import training_indices
from training.forward import autocast, to_device
from training.run import Run


class Pooled:
    """Sums a batch's pooled attention over its micro-batches, and what it would be were attention
    uniform where something is padded. Float64 on the device, copied to the host once."""

    def __init__(self, run: Run) -> None:
        model = run.config.model
        shape = (model.num_layers + model.key_padding, model.num_blocks, model.num_blocks)
        # one tensor, one exchange: the last matrix is the uniform one
        self._sum = torch.zeros(shape, dtype=torch.float64, device=run.device)
        self.sums = [self._sum]
        self._model = model

    def add(self, output: ModelOutput, share: float) -> None:
        """share: of the global batch. Two documents count half each."""
        num_layers = self._model.num_layers
        documents = [output.statistics] + ([output.statistics_1] if output.statistics_1 else [])
        for statistics in documents:
            assert statistics is not None
            of_layers = torch.stack([layer.pooled_real for layer in statistics])
            self._sum[:num_layers] += of_layers.double() * (share / len(documents))
        for real in output.real_keys:
            uniform = uniform_attention(real, self._model.block_size)
            self._sum[num_layers] += uniform * (share / len(documents))

    def result(self) -> tuple[Tensor, Tensor | None]:
        """`pooled` and `uniform` of sparsity.observe.Observation."""
        sums = self._sum.cpu()
        pooled = sums[: self._model.num_layers]
        if self._model.tied_weights:  # one mask for all passes: the mean over them
            pooled = pooled.mean(0, keepdim=True).expand_as(pooled)
        return pooled, sums[-1] if self._model.key_padding else None


@torch.no_grad()
def _forward(run: Run, begin: int, end: int) -> ModelOutput:
    """The sparse model on examples [begin, end) of the batch of the last step, with a probe of
    each layer: query, key and value are those that the sparse layers before it produce."""
    first = (run.step - 1) * run.config.training.batch_size if run.step else 0
    indices = training_indices(
        run.train_data.size, run.config.run.seed, first + begin, end - begin
    )
    ids, ids_1, _ = to_device(run.train_data.batch(indices), run.device)
    with autocast(run.device, run.config.run.precision):
        return run.model(ids, ids_1, statistics=StatisticsRequest(probe=True))


def probe(run: Run) -> Values:
    """What the sparse attention of one micro-batch leaves out, lists of L: how much of the dense
    attention of the same logits lies in the kept blocks, the share of the method's own softmax
    that real values get, and the relative error of the output. The first process alone looks.
    """
    if not run.world.is_main:
        return {}
    masks = run.model.block_masks
    assert masks is not None
    count = min(run.options.micro_batch_size, run.config.training.batch_size)
    output = _forward(run, 0, count)
    sums = Pooled(run)
    sums.add(output, 1.0)
    pooled, uniform = sums.result()
    documents = [document for document in (output.statistics, output.statistics_1) if document]

    def of_layers(name: str) -> Tensor:
        columns = [[getattr(layer, name) for layer in document] for document in documents]
        return torch.stack([torch.stack(column) for column in columns]).cpu()

    error = of_layers("squared_error").sum(0) / of_layers("squared_norm").sum(0)
    return {
        **describe_masks(pooled, masks, uniform),
        "used_mass": numbers(of_layers("used_mass").mean(0)),
        "output_error": numbers(error.sqrt()),
    }


def dense_pooled(run: Run) -> tuple[Tensor, Tensor | None]:
    """`pooled` and `uniform` of sparsity.observe.Observation, of dense attention over the whole
    batch of the last step, in the sparse phase."""
    pooled = Pooled(run)
    batch = run.config.training.batch_size
    begin, end = run.world.part(batch)
    for start in range(begin, end, run.options.micro_batch_size):
        stop = min(start + run.options.micro_batch_size, end)
        pooled.add(_forward(run, start, stop), (stop - start) / batch)
    run.world.sum_(pooled.sums)
    return pooled.result()
