"""Time a training step of the transformer beside the network of the reference, on the same tokens and attention kernel.

::

    python scripts/bench_transformer.py                    # 4 cells x 1,536 tokens, 12 layers x 512 x 8: minutes on a CPU
    python scripts/bench_transformer.py --layers 2 --steps 3
    python scripts/bench_transformer.py --device cuda --bf16 --steps 20

The reference is scGPT's perturbation network (embedding, value and flag encoders, post-norm blocks, affine decoder) of PyTorch's
own layers, whose attention is ``scaled_dot_product_attention`` too, without the fine-tuning's batch normalisation and with an
embedding of the 5,000 genes only (its own has 60,697 rows, which the optimiser updates all). A step is forward, backward and
Adam. Steps of both sides alternate, so that whatever else the machine does meets both; medians are compared.

Exit status 1 if ours is slower by more than a tenth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perturbzoo.data.batch import PerturbationBatch, encode_conditions
from perturbzoo.data.spec import DataSpec
from perturbzoo.models.transformer import Transformer
from perturbzoo.perturbation import parse_condition

GENES, WIDTH, HEADS = 5000, 512, 8


class Reference(nn.Module):
    """The reference's network, of PyTorch's layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.gene, self.gene_norm, self.flag = nn.Embedding(GENES, WIDTH), nn.LayerNorm(WIDTH), nn.Embedding(3, WIDTH)
        self.value = nn.Sequential(nn.Linear(1, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.slope, self.intercept = self._decoder(), self._decoder()

    @staticmethod
    def _decoder() -> nn.Sequential:
        linear = [nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, 1)]
        return nn.Sequential(*linear)

    def forward(self, genes: Tensor, values: Tensor, flags: Tensor) -> Tensor:
        tokens = self.encoder(self.gene_norm(self.gene(genes)) + self.value(values[..., None]) + self.flag(flags))
        return self.slope(tokens)[..., 0] * values + self.intercept(tokens)[..., 0]


def make_batch(cells: int) -> tuple[DataSpec, PerturbationBatch]:
    """Random cells of as many conditions, each of one measured target."""
    genes = tuple(f"g{number}" for number in range(GENES))
    names = genes[:cells]
    spec = DataSpec(
        genes=genes,
        targets=names,
        default_kind="knockout",
        covariates={},
        match_on=(),
        contexts=((),),
        control_mean=np.ones((1, GENES), dtype=np.float32),
        value_space="log1p",
        depth=0.0,
        size_factor_key=None,
        split="",
        training_pairs=tuple((name, 0) for name in names),
    )
    table = encode_conditions([parse_condition(name) for name in names], [0] * cells, names, "knockout")
    nothing, row = torch.zeros(cells), torch.arange(cells)
    batch = PerturbationBatch(
        expression=torch.rand(cells, GENES),
        control=torch.rand(cells, GENES),
        row=row,
        table=table,
        context_control=torch.ones(cells, GENES),
        size_factor=nothing,
        control_size_factor=nothing,
        covariates=torch.zeros(cells, 0, dtype=torch.int64),
        cell=row,
        control_cell=row,
        depth=0.0,
    )
    return spec, batch


def main() -> None:
    parser = argparse.ArgumentParser(description="Time a training step of the transformer beside the reference's network.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    spec, batch = make_batch(options.cells)
    batch = batch.to(options.device)
    sizes: dict[str, Any] = {"width": WIDTH, "layers": options.layers, "heads": HEADS}
    model = Transformer(paper=True, max_genes=options.tokens, bf16=options.bf16, **sizes)
    known = torch.ones(options.cells, dtype=torch.bool)
    model.spec, model.prepared = spec, {"trained": known, "informed": known, "extra": []}
    model.configure_model()
    model.length = options.tokens  # not shortened to equal groups
    reference = Reference(options.layers)
    networks: dict[str, nn.Module] = {"ours": model.to(options.device), "reference": reference.to(options.device)}
    optimizers = {name: torch.optim.Adam(network.parameters(), lr=1e-4) for name, network in networks.items()}

    def loss_of_reference() -> Tensor:
        genes = torch.randperm(GENES, device=options.device)[: options.tokens]
        flags = (genes == batch.row[:, None]).long()
        with torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16, enabled=options.bf16):
            predicted = reference(genes.expand(options.cells, -1), batch.control[:, genes], flags)
        return nn.functional.mse_loss(predicted.float(), batch.observed[:, genes])

    losses = {"ours": lambda: model.loss(batch)["mse"], "reference": loss_of_reference}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for step in range(options.steps + 1):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            losses[name]().backward()
            optimizer.step()
            if options.device != "cpu":
                torch.cuda.synchronize()
            if step:  # the first makes buffers and the optimiser's state
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{options.cells} x {options.tokens} tokens, {options.layers} layers x {WIDTH} x {HEADS}, {options.device}")
    for name, values in seconds.items():
        print(f"{name:<10} {medians[name]:8.3f} s a step (median of {len(values)}; {min(values):.3f} to {max(values):.3f})")
    print(f"ours / reference: {medians['ours'] / medians['reference']:.2f}")
    sys.exit(int(medians["ours"] > 1.1 * medians["reference"]))


if __name__ == "__main__":
    main()
