"""The transformer: symmetries of a set of genes, what flags and targets say, groups of genes, attention, losses, learning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gears_models import UNSEEN, first_batch, module, noise_free, table_of
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

import perturbzoo
from perturbzoo.data.batch import ConditionTable
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.attention import Block, bin_values
from perturbzoo.models.transformer import Transformer

pytestmark = pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")

SMALL: dict[str, Any] = {"width": 8, "layers": 2, "heads": 2}
# what depends on nothing but the network
BARE: dict[str, Any] = {**SMALL, "residual": False}


def fit(model: Transformer, data: PerturbSeqDataModule, epochs: int = 0, folder: Path | None = None) -> Transformer:
    """Train; 0 epochs prepare and build the model, no more."""
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model.train(), data)
    return model.eval()


def made(data: PerturbSeqDataModule, **arguments: Any) -> Transformer:
    """A built model with random parameters, those that start at 0 too."""
    model = fit(Transformer(**arguments), data)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def ask(model: Transformer, conditions: list[str], profile: Tensor | None = None) -> Tensor:
    """Changes ``(C, G)`` of the mean control profile, or of one given for all conditions."""
    table = table_of(model, conditions)  # type: ignore[arg-type]
    values = (
        torch.as_tensor(model.get_spec().control_mean)[table.context] if profile is None else profile.expand(len(table), -1)
    )
    with torch.no_grad():
        return model.changes(values, table, torch.arange(len(table)))


def of_genes(model: Transformer, table: ConditionTable, values: Tensor, genes: Tensor) -> Tensor:
    with torch.no_grad():
        return model.change(values, genes, table, torch.arange(len(table)), model.marks(table), model.start(table))


@pytest.fixture(scope="module")
def adata(make_adata: Callable[..., Any]) -> Any:
    """Twelve genes, of which G0 to G4 are targets, and X, which is none."""
    conditions = ("G0", "G1", "G2", "G3", "G4", "X", "G0+G1", "G1+G2", "G3+G4", "G0+X")
    return make_adata(conditions=conditions, cells_per_condition=8, n_controls=16, n_genes=12)


@pytest.fixture
def data(adata: Any) -> PerturbSeqDataModule:
    return module(adata)


# ---------------------------------------------------------------------- symmetries


@pytest.mark.parametrize("paper", [False, True])
def test_permuting_genes_permutes_outputs(data: PerturbSeqDataModule, paper: bool) -> None:
    """Genes are a set: their order in the sequence cannot matter, nor in the data if their embeddings go with them."""
    model = made(data, paper=paper, **SMALL)
    table = table_of(model, ["G0", "G3+G4", "X"])  # type: ignore[arg-type]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    values = torch.rand(3, 12)
    change = of_genes(model, table, values, torch.arange(12))
    torch.testing.assert_close(of_genes(model, table, values, order), change[:, order], rtol=0, atol=1e-5)
    # the data's own order: gene order[i] is now gene i
    model.gene_embedding.weight.data = model.gene_embedding.weight.data[order]
    model.gene_of_target = torch.where(model.gene_of_target < 0, -1, order.argsort()[model.gene_of_target])
    if not paper:
        model.known.value.copy_(model.known.value[:, order])
    torch.testing.assert_close(of_genes(model, table, values[:, order], torch.arange(12)), change[:, order], rtol=0, atol=1e-5)
    assert not torch.allclose(change[:, order], change, atol=1e-2)


@pytest.mark.parametrize("paper", [False, True])
def test_order_of_a_combination_is_irrelevant(data: PerturbSeqDataModule, paper: bool) -> None:
    model = made(data, paper=paper, **SMALL)
    table = table_of(model, ["G0+X+G2:activation@2"] * 3)  # type: ignore[arg-type]
    orders = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 0, 2]])
    shuffled = {name: torch.gather(getattr(table, name), 1, orders) for name in ("targets", "kind", "dose")}
    change = of_genes(model, replace(table, **shuffled), torch.ones(3, 12), torch.arange(12))
    torch.testing.assert_close(change, change[:1].expand(3, -1), rtol=0, atol=1e-5)
    assert change.abs().max() > 0.05


@pytest.mark.parametrize(
    "arguments", [{}, {"paper": True}, {"per": "cell"}, {"values": "binned", "per": "cell"}, {"max_genes": 5}]
)
def test_a_cell_is_predicted_alike_in_any_company(data: PerturbSeqDataModule, arguments: dict[str, Any]) -> None:
    """Other cells and conditions of a batch, their tokens and masks, and how many run at once, change nothing."""
    model = made(data, **SMALL, **arguments)
    batch = first_batch(data)
    with torch.no_grad():
        together = model(batch).mean
        model.hparams["cells_per_forward"] = 3
        torch.testing.assert_close(model(batch).mean, together, rtol=0, atol=1e-5)
        for cell in range(len(batch)):
            row = batch.row[cell : cell + 1]
            alone = replace(
                batch,
                control=batch.control[cell : cell + 1],
                row=torch.zeros(1, dtype=torch.int64),
                table=batch.table.select(row),
                context_control=batch.context_control[row],
            )
            torch.testing.assert_close(model(alone).mean[0], together[cell], rtol=0, atol=1e-5)
    per_cell = together - batch.control
    first = per_cell[batch.row == 0]
    assert torch.allclose(first, first[:1].expand_as(first), atol=1e-5) == (model.choices["per"] == "condition")


def test_masked_tokens_change_nothing(data: PerturbSeqDataModule) -> None:
    """X has a token of its own; beside it, the others are padded. Their attention must not see the padding."""
    model = made(data, **BARE)
    tokens, mask = model.tokens(
        torch.ones(3, 12),
        torch.arange(12),
        table := table_of(model, ["G0", "G0+X", "X"]),  # type: ignore[arg-type]
        torch.arange(3),
        model.marks(table),
        None,
    )
    assert tokens.shape == (3, 13, 8)
    assert mask is not None
    assert mask[:, 0, 0, :12].all()
    assert mask[:, 0, 0, 12].tolist() == [False, True, True]
    noise = tokens.clone()
    noise[0, 12] = 100.0
    with torch.no_grad():
        torch.testing.assert_close(model.blocks[0](noise, mask)[0, :12], model.blocks[0](tokens, mask)[0, :12])
        assert not torch.allclose(model.blocks[0](noise, None)[0, :12], model.blocks[0](tokens, None)[0, :12], atol=1e-3)
    both = ask(model, ["G0", "G0+X", "X"])
    torch.testing.assert_close(both[0], ask(model, ["G0"])[0], rtol=0, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-3


# ---------------------------------------------------------------------- what a condition says


def test_flags_matter(data: PerturbSeqDataModule) -> None:
    """scGPT's only sign of the condition: without a difference between its two vectors every condition is the same."""
    model = made(data, paper=True, **SMALL)
    change = ask(model, ["G0", "G1", "G0+G1"])
    assert (torch.cdist(change, change) + torch.eye(3) > 1e-2).all()
    model.flag_embedding.weight.data[1] = model.flag_embedding.weight.data[0]
    same = ask(model, ["G0", "G1", "G0+G1"])
    torch.testing.assert_close(same, same[:1].expand(3, -1), rtol=0, atol=1e-6)


def test_a_flag_is_on_the_perturbed_gene(data: PerturbSeqDataModule) -> None:
    """The tokens of two conditions differ where, and only where, a gene is perturbed in one of them."""
    model = made(data, **BARE)
    table = table_of(model, ["G1", "G2+G4", "G4:activation"])  # type: ignore[arg-type]
    tokens, mask = model.tokens(torch.ones(3, 12), torch.arange(12), table, torch.arange(3), model.marks(table), None)
    assert mask is None
    plain = model.gene_norm(model.gene_embedding.weight) + model.value_encoder(torch.ones(12)) + model.flag_embedding.weight[0]
    marked = ((tokens - plain).abs().amax(dim=2) > 1e-4).int()
    assert [row.nonzero().ravel().tolist() for row in marked] == [[1], [2, 4], [4]]
    assert not torch.allclose(tokens[1, 4], tokens[2, 4], atol=1e-3)  # the kind is said too


def test_control_and_dose_zero_change_nothing(data: PerturbSeqDataModule) -> None:
    model = made(data, **SMALL)
    change = ask(model, ["control", "G0@0", "X@0", "G0@0+G1", "G1", "G1@3"])
    assert (change[:3] == 0).all()
    torch.testing.assert_close(change[3], change[4], rtol=0, atol=1e-6)
    assert (change[4] - change[5]).abs().max() > 1e-3


@pytest.mark.parametrize("per", ["condition", "cell"])
def test_an_untrained_model_is_the_baseline(data: PerturbSeqDataModule, per: str) -> None:
    """The mean training change for a single, the sum of the singles' for a combination."""
    model = fit(Transformer(per=per, **SMALL), data)  # type: ignore[arg-type]
    bulks = data.training_pseudobulks()
    single = {str(c): delta for c, delta in zip(bulks.conditions, bulks.delta, strict=True) if len(c) == 1}
    change = ask(model, ["G0", "G4", "G0+G1", "X+G2"]).numpy()
    mean = np.mean(list(single.values()), axis=0)
    expected = np.array([mean, mean, single["G0"] + single["G1"], single["X"] + single["G2"]])
    np.testing.assert_allclose(change, expected, rtol=0, atol=1e-6)
    bare = fit(Transformer(per=per, **BARE), data)  # type: ignore[arg-type]
    assert (ask(bare, ["G0", "X"]) == 0).all()


def test_an_unseen_target_is_told_by_its_table(adata: Any, tmp_path: Path) -> None:
    """A target never trained has no learned vector: its row of the table, and its gene's embedding, speak for it."""
    table = tmp_path / "table.csv"
    table.write_text("name,a,b\nG0,1,0\nG1,0,1\nG3,1,0\nNEW,0,1\n")
    model = made(module(adata, UNSEEN), embedding=str(table), **BARE)
    assert model.target_names == ("G0", "G1", "G2", "G3", "G4", "X", "NEW")
    before = ask(model, ["G3", "NEW", "G0"])
    model.targets.learned.weight.data += 1.0
    after = ask(model, ["G3", "NEW", "G0"])
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=1e-6)
    assert not torch.allclose(after[2], before[2], atol=1e-3)
    assert (before[0] - before[1]).abs().max() > 1e-3
    with pytest.raises(PerturbZooError, match=r"'G9'.*never named"):
        ask(model, ["G9"])


# ---------------------------------------------------------------------- groups and samples of genes


def test_groups_are_disjoint_whole_and_as_long_as_samples(data: PerturbSeqDataModule) -> None:
    for most, lengths in ((5, [4, 4, 4]), (7, [6, 6]), (12, [12]), (100, [12])):
        model = fit(Transformer(max_genes=most, **SMALL), data)
        groups = model.groups()
        assert [len(group) for group in groups] == lengths
        assert torch.cat(groups).sort().values.tolist() == list(range(12))
        assert len(model.sample_genes(table_of(model, ["G0"]))) == lengths[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [BARE, SMALL, {"paper": True, **SMALL}])
def test_groups_equal_the_whole_when_everything_fits(data: PerturbSeqDataModule, arguments: dict[str, Any]) -> None:
    """One group is the whole; several are each what the network says of that group with the targets' tokens added."""
    whole = made(data, max_genes=12, **arguments)
    table, profile = table_of(whole, ["G0", "G1+G2"]), torch.rand(1, 12)  # type: ignore[arg-type]
    torch.testing.assert_close(
        ask(whole, ["G0", "G1+G2"], profile), of_genes(whole, table, profile.expand(2, -1), torch.arange(12))
    )
    parts = made(data, max_genes=4, **arguments)
    parts.load_state_dict(whole.state_dict())
    change = ask(parts, ["G0", "G1+G2"], profile)
    for group in parts.groups():
        for row in range(2):
            # the same set of tokens, written down as one sequence: what lies outside the group is appended
            target = parts.gene_of_target[table.targets[row][table.present[row]]].tolist()
            genes = group.tolist() + [gene for gene in target if gene not in group.tolist()]
            alone = table.select(torch.tensor([row]))
            expected = of_genes(whole, alone, profile, torch.tensor(genes))[0, : len(group)]
            torch.testing.assert_close(change[row, group], expected, rtol=0, atol=1e-5)


def test_a_sample_always_holds_the_perturbed_genes(data: PerturbSeqDataModule) -> None:
    model = fit(Transformer(max_genes=5, **SMALL), data)
    table = table_of(model, ["G0", "G3+G4", "X", "G2@0"])  # type: ignore[arg-type]
    torch.manual_seed(0)
    draws = [model.sample_genes(table).tolist() for _ in range(200)]
    assert all(len(set(draw)) == 4 and {0, 3, 4} <= set(draw) for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=12)
    others = counts[[1, 2, 5, 6, 7, 8, 9, 10, 11]]
    assert others.sum() == 200
    # 200 draws of one of nine: 22 each, standard deviation 4.4
    assert others.min() > 5
    assert others.max() < 45


# ---------------------------------------------------------------------- blocks


def explicit(block: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention written out, head by head."""
    h, size = x.shape[2], x.shape[2] // block.heads
    q, k, v = (block.qkv(x)[..., part * h : (part + 1) * h] for part in range(3))
    heads = []
    for head in range(block.heads):
        of = slice(head * size, (head + 1) * size)
        score = torch.einsum("nld,nmd->nlm", q[..., of], k[..., of]) / size**0.5
        if mask is not None:
            score = score.masked_fill(~mask[:, 0], float("-inf"))
        weight = score.exp() / score.exp().sum(dim=2, keepdim=True)
        heads.append(torch.einsum("nlm,nmd->nld", weight, v[..., of]))
    return block.out_proj(torch.cat(heads, dim=2))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_explicit_softmax_attention(masked: bool) -> None:
    torch.manual_seed(0)
    block, x = Block(12, 3, 20).double(), torch.randn(4, 7, 12, dtype=torch.float64)
    mask = torch.rand(4, 1, 1, 7) < 0.6 if masked else None
    if mask is not None:
        mask[..., 0] = True
    torch.testing.assert_close(block.attention(x, mask), explicit(block, x, mask))
    after = x + explicit(block, block.norm1(x), mask)
    expected = after + block.linear2(block.linear1(block.norm2(after)).relu())
    torch.testing.assert_close(block(x, mask), expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_block_is_pytorchs_layer(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True, norm_first=norm_first).double()
    block, x = Block(12, 3, 20, norm_first=norm_first).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    state = {name.replace("self_attn.in_proj_", "qkv.").replace("self_attn.", ""): v for name, v in layer.state_dict().items()}
    block.load_state_dict(state)
    torch.testing.assert_close(block(x), layer(x))


def test_gradient_checkpointing_gives_the_same_gradients(data: PerturbSeqDataModule) -> None:
    plain, saving = made(data, max_genes=6, **SMALL), made(data, max_genes=6, gradient_checkpointing=True, **SMALL)
    saving.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain.train(), saving.train()):
        torch.manual_seed(0)
        parameters = [value for name, value in model.named_parameters() if "prepared" not in name]
        gradients.append(torch.autograd.grad(model.loss(first_batch(data))["mse"], parameters))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert sum(float(value.abs().sum()) for value in gradients[0]) > 0


def test_compiled_blocks_are_the_same(data: PerturbSeqDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for any backend, without the minute that C++ takes; weights keep their names."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, fast = made(data, **SMALL), made(data, compile=True, **SMALL)
    fast.load_state_dict(plain.state_dict())
    assert all(block._compiled_call_impl is not None for block in fast.blocks)
    torch.testing.assert_close(ask(fast, ["G0", "G0+X"]), ask(plain, ["G0", "G0+X"]))


def test_bfloat16_is_close(data: PerturbSeqDataModule) -> None:
    exact, rough = made(data, **SMALL), made(data, bf16=True, **SMALL)
    rough.load_state_dict(exact.state_dict())
    one, other = ask(exact, ["G0", "G0+X"]), ask(rough, ["G0", "G0+X"])
    assert other.dtype == torch.float32
    assert not torch.equal(one, other)
    torch.testing.assert_close(other, one, rtol=0.05, atol=0.05 * float(one.abs().max()))


# ---------------------------------------------------------------------- values


def test_bins_by_hand() -> None:
    """Three bins above 0, each with a third of the row's non-zero values; equal values share one."""
    values = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.0, 0.0, 2.0, 2.0, 2.0, 1.0, 0.0], [0.0] * 7])
    expected = torch.tensor([[0.0, 1, 1, 2, 2, 3, 3], [0, 0, 3, 3, 3, 1, 0], [0] * 7])
    assert torch.equal(bin_values(values, 4), expected)
    # only the order of values counts, and at most as many bins as asked for
    assert torch.equal(bin_values(values.square() * 7, 4), expected)
    assert bin_values(torch.rand(2, 500) + 0.1, 51).unique().tolist() == list(range(1, 51))


def test_bins_are_the_input_and_values_the_output(data: PerturbSeqDataModule) -> None:
    """Training and prediction see the same bins; the decoder multiplies log1p-normalised values."""
    model = made(data, values="binned", **BARE)
    profile = torch.rand(1, 12) + 0.1
    change = ask(model, ["G0"], profile)
    doubled = ask(model, ["G0"], 2 * profile)  # the same bins, and so the same slope and intercept
    slope = (doubled - change) / profile
    tripled = ask(model, ["G0"], 3 * profile)
    torch.testing.assert_close(tripled - doubled, slope * profile, rtol=0, atol=1e-5)
    assert slope.abs().max() > 1e-3


# ---------------------------------------------------------------------- losses and learning


@pytest.mark.parametrize("per", ["condition", "cell"])
@pytest.mark.parametrize("output", ["change", "expression"])
def test_losses_by_hand(data: PerturbSeqDataModule, per: str, output: str) -> None:
    arguments: dict[str, Any] = {"per": per, "output": output}
    model = made(data, loss="condition_mse", **arguments, **SMALL)
    cell = made(data, loss="cell_mse", **arguments, **SMALL)
    cell.load_state_dict(model.state_dict())
    batch = first_batch(data)
    with torch.no_grad():
        predicted = model(batch).mean
        errors = []
        for row in range(len(batch.table)):
            mine = batch.row == row
            change = (predicted - batch.control)[mine].mean(dim=0)
            errors.append(batch.context_control[row] + change - batch.observed[mine].mean(dim=0))
        torch.testing.assert_close(model.loss(batch)["mse"], torch.stack(errors).square().mean(), rtol=1e-4, atol=1e-6)
        expected = (predicted - batch.observed).square().mean()
        torch.testing.assert_close(cell.loss(batch)["mse"], expected, rtol=1e-4, atol=1e-6)


def test_every_parameter_learns(data: PerturbSeqDataModule) -> None:
    model = made(data, loss="cell_mse", per="cell", **SMALL)
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(model.loss(first_batch(data))["mse"], list(named.values()))
    silent = {name for name, gradient in zip(named, gradients, strict=True) if not gradient.abs().max() > 0}
    assert not silent


@pytest.mark.parametrize("arguments", [{}, {"paper": True}, {"max_genes": 5, "lora_rank": 2}])
def test_every_parameter_takes_part_in_every_step(data: PerturbSeqDataModule, arguments: dict[str, Any]) -> None:
    """Several processes wait for every gradient, also where a batch has no unmeasured target."""
    if "lora_rank" in arguments:
        pytest.importorskip("peft", reason="LoRA needs peft, an extra: pip install 'perturbzoo[lora]'")
    model = made(data, **SMALL, **arguments).train()
    batch = first_batch(data)
    x = model.target_names.index("X")
    for has_x in (False, True):
        rows = torch.nonzero((batch.table.targets == x).any(dim=1) == has_x).ravel()
        cells = torch.isin(batch.row, rows)
        part = replace(
            batch,
            expression=batch.observed[cells],
            control=batch.control[cells],
            row=torch.searchsorted(rows, batch.row[cells]),
            table=batch.table.select(rows),
            context_control=batch.context_control[rows],
        )
        trained = [value for value in model.parameters() if value.requires_grad]
        gradients = torch.autograd.grad(model.loss(part)["mse"], trained)  # an error where one takes no part
        assert len(gradients) == len(trained)


@pytest.mark.parametrize("per", ["condition", "cell"])
def test_overfits_a_noise_free_screen(per: str) -> None:
    seed_everything(0, verbose=False)
    data = module(noise_free(), {"method": "no_test"})
    learning: dict[str, Any] = {"lr": 3e-3, "lr_decay": 1.0, "unseen_rate": 0.0}
    model = Transformer(width=32, layers=2, heads=2, per=per, residual=False, **learning)  # type: ignore[arg-type]
    fit(model, data)
    batch = first_batch(data)
    before = model.loss(batch)["mse"].item()
    fit(model, data, 250 if per == "condition" else 150)
    after = model.loss(batch)["mse"].item()
    assert before > 0.05
    assert after < 0.05 * before


def test_paper_selects_scgpts_choices(data: PerturbSeqDataModule) -> None:
    """The perturbation tutorial: one sequence per cell, post-norm, raw expression, Adam 1e-4 shrunk by 0.9 each epoch."""
    model = fit(Transformer(paper=True, **SMALL), data)
    assert model.choices == {
        "per": "cell",
        "loss": "cell_mse",
        "output": "expression",
        "residual": False,
        "start_input": False,
        "target_vectors": False,
        "unseen_rate": 0.0,
        "norm_first": False,
        "lr": 1e-4,
        "lr_decay": 0.9,
    }
    assert not any(block.norm_first for block in model.blocks)
    assert model.hparams["max_genes"] == 1536
    optimizer = model.configure_optimizers()
    assert optimizer["optimizer"].defaults["lr"] == 1e-4
    assert optimizer["lr_scheduler"]["scheduler"].gamma == 0.9
    assert Transformer(paper=True, norm_first=True).choices["norm_first"] is True


@pytest.mark.parametrize("arguments", [{"max_genes": 5}, {"paper": True, "max_genes": 5}])
def test_checkpoint_round_trip(data: PerturbSeqDataModule, adata: Any, tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = fit(Transformer(**SMALL, **arguments), data, 2, tmp_path)
    loaded = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    options: dict[str, Any] = {"n_cells": 5, "seed": 3}
    conditions = ["G0", "X", "G0+G1+X", "G4:activation@0.5"]
    one, other = model.predict(adata, conditions, **options), loaded.predict(adata, conditions, **options)
    np.testing.assert_array_equal(one.X, other.X)
    assert one.shape == (20, 12)
    pseudobulk = loaded.predict(adata, conditions, pseudobulk=True)
    everyone = loaded.predict(adata, conditions)
    for row, condition in enumerate(conditions):
        mean = np.asarray(everyone.X)[(everyone.obs["condition"] == condition).to_numpy()].mean(axis=0)
        np.testing.assert_allclose(pseudobulk.X[row], mean, rtol=0, atol=1e-5)


def test_weights_move_to_another_screen_by_gene(
    data: PerturbSeqDataModule, make_adata: Callable[..., Any], tmp_path: Path
) -> None:
    source = fit(Transformer(**BARE), data, 1, tmp_path)
    other = module(make_adata(n_genes=15, cells_per_condition=8, n_controls=16)[:, ::-1].copy())
    copy = Transformer(**BARE)
    copy.initialise_from(str(tmp_path / "checkpoints" / "last.ckpt"))
    fit(copy, other)
    genes = list(copy.get_spec().genes)
    assert genes[0] == "G14"
    for row, gene in enumerate(source.get_spec().genes):
        assert torch.equal(copy.gene_embedding.weight[genes.index(gene)], source.gene_embedding.weight[row])
    assert torch.equal(copy.blocks[1].qkv.weight, source.blocks[1].qkv.weight)  # type: ignore[union-attr]


def test_mistakes_are_named() -> None:
    with pytest.raises(PerturbZooError, match="width is 10, heads is 4"):
        Transformer(width=10, heads=4)
    with pytest.raises(PerturbZooError, match="max_genes"):
        Transformer(max_genes=0)
