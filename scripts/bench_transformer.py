"""Time a training step of the transformer beside the network of the reference, on the same tokens and attention kernel.

::

    git clone https://github.com/bowang-lab/scGPT SCGPT    # the networks are in SCGPT/scgpt/model
    python scripts/bench_transformer.py --scgpt_source SCGPT                # 4 cells x 1,536 tokens, 12 layers x 512 x 8: minutes
    python scripts/bench_transformer.py --scgpt_source SCGPT --layers 2 --steps 5
    python scripts/bench_transformer.py --device cuda --bf16 --cells 32 --steps 20

The reference is scGPT's own ``TransformerGenerator``, read from the public source as it is, without what its packages import
beside it (torchtext, the tutorials' tools), and without flash-attn: its blocks are PyTorch's, whose attention is
``scaled_dot_product_attention``, as ours is. Without ``--scgpt_source`` it is the same network written again of PyTorch's layers.
Where its own choices would cost it time it gets the cheaper one: no padding mask (its fine-tuning passes one of zeros, with
which attention has a slower kernel), and an embedding of the 5,000 genes only (its own has 60,697 rows, all of which the
optimiser updates).

A step is forward, backward and Adam. Steps of both sides alternate, and which is first alternates too, so that whatever else
the machine does meets both. Ratios are of the two steps of a round.

Exit status 1 if ours is slower, by the median of the ratios.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perturbzoo.data.batch import PerturbationBatch, encode_conditions
from perturbzoo.data.spec import DataSpec
from perturbzoo.models.transformer import Transformer
from perturbzoo.perturbation import parse_condition

GENES, WIDTH, HEADS = 5000, 512, 8


def published(source: Path, layers: int) -> nn.Module:
    """scGPT's ``TransformerGenerator`` from a folder of its source, for :data:`GENES` genes.

    The packages' own ``__init__`` files import the whole project: empty modules stand in their place, so that only the files
    of the network are read.
    """
    folder = source.expanduser().resolve() / "scgpt"
    if not (folder / "model" / "generation_model.py").exists():
        sys.exit(f"{source} holds no scgpt/model/generation_model.py: give a clone of https://github.com/bowang-lab/scGPT")
    for name, path in (("scgpt", folder), ("scgpt.model", folder / "model"), ("scgpt.utils", folder / "utils")):
        sys.modules[name] = module = ModuleType(name)
        module.__path__ = [str(path)]
    sys.modules["scgpt"].logger = logging.getLogger("scgpt")  # type: ignore[attr-defined]
    sys.modules["scgpt.utils"].map_raw_id_to_vocab_id = None  # type: ignore[attr-defined]  # of its prediction only
    network = importlib.import_module("scgpt.model.generation_model").TransformerGenerator
    return network(
        ntoken=GENES + 1, d_model=WIDTH, nhead=HEADS, d_hid=WIDTH, nlayers=layers, nlayers_cls=3, n_cls=1,
        vocab={"<pad>": GENES}, dropout=0.0, use_fast_transformer=False,
    )  # fmt: skip


class Published(nn.Module):
    """The published network, called as its fine-tuning calls it, but for the mask."""

    def __init__(self, source: Path, layers: int) -> None:
        super().__init__()
        self.network = published(source, layers)

    def forward(self, genes: Tensor, values: Tensor, flags: Tensor) -> Tensor:
        return self.network(genes, values, flags, src_key_padding_mask=None)["mlm_output"]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scgpt_source", type=Path, help="a clone of the reference's source")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--cells", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default: 1)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    spec, batch = make_batch(options.cells)
    batch = batch.to(options.device)
    sizes: dict[str, Any] = {"width": WIDTH, "layers": options.layers, "heads": HEADS}
    model = Transformer(paper=True, max_genes=options.tokens, bf16=options.bf16, **sizes)
    known = torch.ones(options.cells, dtype=torch.bool)
    model.spec, model.prepared = spec, {"trained": known, "informed": known, "extra": []}
    model.configure_model()
    model.length = options.tokens  # not shortened to equal groups
    source = options.scgpt_source
    reference = Reference(options.layers) if source is None else Published(source, options.layers)
    networks: dict[str, nn.Module] = {"ours": model.to(options.device), "reference": reference.to(options.device)}
    optimizers = {name: torch.optim.Adam(network.parameters(), lr=1e-4) for name, network in networks.items()}

    def loss_of_reference() -> Tensor:
        genes = torch.randperm(GENES, device=options.device)[: options.tokens]
        flags = (genes == batch.row[:, None]).long()
        with torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16, enabled=options.bf16):
            predicted = reference(genes.repeat(options.cells, 1), batch.control[:, genes], flags)
        return nn.functional.mse_loss(predicted.float(), batch.observed[:, genes])

    losses = {"ours": lambda: model.loss(batch)["mse"], "reference": loss_of_reference}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for step in range(options.steps + 1):
        for name in sorted(networks, reverse=bool(step % 2)):
            start = time.perf_counter()
            optimizers[name].zero_grad()
            losses[name]().backward()
            optimizers[name].step()
            if options.device != "cpu":
                torch.cuda.synchronize()
            if step:  # the first makes buffers and the optimiser's state
                seconds[name].append(time.perf_counter() - start)
    kind = "scGPT's own network" if source is not None else "the same network of PyTorch's layers"
    print(
        f"{options.cells} x {options.tokens} tokens, {options.layers} layers x {WIDTH} x {HEADS}, {options.device}; reference: {kind}"
    )
    for name, values in seconds.items():
        print(
            f"{name:<10} {statistics.median(values):8.3f} s a step (median of {len(values)}; {min(values):.3f} to {max(values):.3f})"
        )
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds["reference"], strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"{'PASS' if ratio <= 1 else 'MISS'}  ours / reference: {ratio:.2f} (at most 1; {min(ratios):.2f} to {max(ratios):.2f})"
    )
    if options.output is not None:
        parameters = {name: sum(value.numel() for value in network.parameters()) for name, network in networks.items()}
        options.output.write_text(json.dumps({"seconds": seconds, "ratio": ratio, "parameters": parameters, "kind": kind}))
    sys.exit(int(ratio > 1))


if __name__ == "__main__":
    main()
