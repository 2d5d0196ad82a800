"""Published scGPT weights: both layouts of attention, genes by name, what is missing; and LoRA on top of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gears_models import module, table_of
from lightning.pytorch import Trainer
from torch import Tensor, nn

import perturbzoo
from perturbzoo.data.datamodule import PerturbSeqDataModule
from perturbzoo.errors import PerturbZooError
from perturbzoo.models.scgpt_weights import published_names
from perturbzoo.models.transformer import Transformer

NEEDS_PEFT = "LoRA needs peft, an extra: pip install 'perturbzoo[lora]'"
pytestmark = pytest.mark.filterwarnings("ignore::perturbzoo.errors.PerturbZooWarning")

WIDTH, HEADS, LAYERS, FEEDFORWARD = 8, 2, 2, 12
# G10 and G11 are not in it; TP53 is not measured
VOCABULARY = {"<pad>": 0, "<cls>": 1, "TP53": 2, **{f"G{number}": 12 - number for number in range(10)}}
SIZES: dict[str, Any] = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": FEEDFORWARD}


def published(flash: bool, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors with the names and shapes of scGPT's files, its decoders included."""
    generator = torch.Generator().manual_seed(seed)
    h, f = WIDTH, FEEDFORWARD
    shapes: dict[str, tuple[int, ...]] = {"encoder.embedding.weight": (13, h), "flag_encoder.weight": (2, h)}
    norms = ["encoder.enc_norm", "value_encoder.norm"]
    linears = {
        "value_encoder.linear1": (h, 1),
        "value_encoder.linear2": (h, h),
        "decoder.fc.0": (h, h),
        "mvc_decoder.W": (h, h),
    }
    for layer in range(LAYERS):
        place = f"transformer_encoder.layers.{layer}"
        norms += [f"{place}.norm1", f"{place}.norm2"]
        linears |= {f"{place}.self_attn.out_proj": (h, h), f"{place}.linear1": (f, h), f"{place}.linear2": (h, f)}
        joint = f"{place}.self_attn." + ("Wqkv." if flash else "in_proj_")
        shapes |= {f"{joint}weight": (3 * h, h), f"{joint}bias": (3 * h,)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{name}.{kind}": (h,) for name in norms for kind in ("weight", "bias")}
    # sorted by names that are the same in both layouts, so that both get the same numbers
    order = sorted(shapes, key=lambda name: name.replace("Wqkv.", "in_proj_"))
    return {name: torch.randn(shapes[name], generator=generator) for name in order}


def write(folder: Path, state: dict[str, Any], vocabulary: Any = VOCABULARY, **arguments: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "best_model.pt")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "args.json").write_text(json.dumps({"embsize": WIDTH, "nheads": HEADS, **arguments}))
    return str(folder)


def fit(model: Transformer, data: PerturbSeqDataModule, epochs: int = 0, folder: Path | None = None) -> Transformer:
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, enable_checkpointing=folder is not None, **options
    )
    trainer.fit(model, data)
    return model.eval()


@pytest.fixture(scope="module")
def adata(make_adata: Callable[..., Any]) -> Any:
    return make_adata(cells_per_condition=8, n_controls=16, n_genes=12)


@pytest.fixture
def data(adata: Any) -> PerturbSeqDataModule:
    return module(adata)


def encoded(model: Transformer) -> Tensor:
    """Tokens after all blocks, ``(2, G, h)``: all that published weights speak of."""
    table = table_of(model, ["G0", "G1+G2"])  # type: ignore[arg-type]
    values = torch.linspace(0.1, 2.0, 24).view(2, 12)
    with torch.no_grad():
        tokens, mask = model.tokens(values, torch.arange(12), table, torch.arange(2), model.marks(table), model.start(table))
        for block in model.blocks:
            tokens = block(tokens, mask)
        return tokens


def test_both_layouts_are_the_same_network(data: PerturbSeqDataModule, tmp_path: Path) -> None:
    """Equal to a stack of PyTorch's own encoder layers with the published weights, built by their published names."""
    state = published(flash=False)
    models = []
    for flash in (True, False):
        folder = write(tmp_path / str(flash), published(flash))
        models.append(fit(Transformer(paper=True, pretrained=folder, **SIZES), data))
    assert "transformer_encoder.layers.0.self_attn.Wqkv.weight" in published(flash=True)
    models[1].flag_embedding.load_state_dict(models[0].flag_embedding.state_dict())
    models[1].gene_embedding.load_state_dict(models[0].gene_embedding.state_dict())
    one, other = map(encoded, models)
    assert torch.equal(one, other)

    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, FEEDFORWARD, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    place = "transformer_encoder."
    encoder.load_state_dict({name.removeprefix(place): value for name, value in state.items() if name.startswith(place)})
    genes, values = torch.arange(12), torch.linspace(0.1, 2.0, 24).view(2, 12)
    table = state["encoder.embedding.weight"]
    rows = torch.stack([table[VOCABULARY[f"G{g}"]] if g < 10 else models[0].gene_embedding.weight[g] for g in genes.tolist()])

    def norm(name: str, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    hidden = (values[..., None] @ state["value_encoder.linear1.weight"].T + state["value_encoder.linear1.bias"]).relu()
    value = norm("value_encoder.norm", hidden @ state["value_encoder.linear2.weight"].T + state["value_encoder.linear2.bias"])
    flag = torch.zeros(2, 12, dtype=torch.int64)
    flag[0, 0] = flag[1, 1] = flag[1, 2] = 1
    with torch.no_grad():
        expected = encoder(norm("encoder.enc_norm", rows) + value + models[0].flag_embedding(flag))
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)


def test_genes_are_matched_by_name_and_reported(
    data: PerturbSeqDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = published(flash=True)
    model = fit(Transformer(paper=True, pretrained=write(tmp_path, state), **SIZES), data)
    out = capsys.readouterr().out
    assert "10 of 12 genes" in out
    assert "G10, G11" in out
    table = state["encoder.embedding.weight"]
    for number in range(10):
        assert torch.equal(model.gene_embedding.weight[number], table[12 - number])
    # genes outside the vocabulary have embeddings of their own, not the padding token's
    strangers = model.gene_embedding.weight[10:]
    assert not torch.equal(strangers[0], strangers[1])
    assert (torch.cdist(strangers, table) > 1e-3).all()


def test_they_run_in_their_own_arrangement(tmp_path: Path) -> None:
    """Published blocks are post-norm; that is the default with them, and can be said otherwise."""
    assert Transformer(pretrained=str(tmp_path)).choices["norm_first"] is False
    assert Transformer(pretrained=str(tmp_path), norm_first=True).choices["norm_first"] is True
    assert Transformer().choices["norm_first"] is True


def test_missing_keys_are_listed(data: PerturbSeqDataModule, tmp_path: Path) -> None:
    state = published(flash=True)
    lost = [
        "encoder.enc_norm.bias",
        "transformer_encoder.layers.1.linear2.weight",
        "transformer_encoder.layers.0.self_attn.Wqkv.bias",
    ]
    for name in lost:
        del state[name]
    with pytest.raises(PerturbZooError, match=rf"lacks 3 of scGPT's {len(published_names(LAYERS, True)) + 1} keys") as caught:
        fit(Transformer(paper=True, pretrained=write(tmp_path, state), **SIZES), data)
    assert all(name in str(caught.value) for name in lost)
    assert "\n" not in str(caught.value)


def test_the_file_takes_no_more_than_it_names(tmp_path: Path) -> None:
    """Every tensor of the encoders is taken; what is left are the decoders and the flag of another task."""
    for flash in (True, False):
        left = set(published(flash)) - set(published_names(LAYERS, flash)) - {"encoder.embedding.weight"}
        assert {name.split(".")[0] for name in left} == {"decoder", "mvc_decoder", "flag_encoder"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 3}, r"it has 2 layers, this model 3"),
        ({"layers": 1}, r"has 2 layers, this model 1: set layers to 2"),
        ({"heads": 4}, r"has 2 attention heads, this model 4"),
        ({"width": 16}, r"8 wide with feedforward 12.*gene_norm.weight \(8,\) for \(16,\)"),
    ],
)
def test_other_sizes_are_refused(data: PerturbSeqDataModule, tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    folder = write(tmp_path, published(flash=True))
    with pytest.raises(PerturbZooError, match=message):
        fit(Transformer(paper=True, pretrained=folder, **{**SIZES, **sizes}), data)


def test_other_files_are_refused(data: PerturbSeqDataModule, tmp_path: Path) -> None:
    state = published(flash=True)

    def refused(folder: str, message: str) -> None:
        with pytest.raises(PerturbZooError, match=message) as caught:
            fit(Transformer(paper=True, pretrained=folder, **SIZES), data)
        assert "\n" not in str(caught.value)

    refused(str(tmp_path / "nowhere"), r"no best_model\.pt there")
    refused(write(tmp_path / "a", state, {"GENE1": 0}), "none of the 12 measured genes")
    refused(write(tmp_path / "b", state, {"G0": 13}), "13, but the embedding has 13 rows")
    refused(write(tmp_path / "c", state, ["G0"]), "expected a JSON object, got list")
    refused(write(tmp_path / "d", state, {"G0": "a"}), "tokens and their numbers")
    refused(write(tmp_path / "e", {"state": state}), "names and tensors")
    folder = Path(write(tmp_path / "f", state))
    (folder / "vocab.json").write_text("{")
    refused(str(folder), "not readable as JSON")
    folder = Path(write(tmp_path / "g", state))
    (folder / "best_model.pt").write_bytes((folder / "best_model.pt").read_bytes()[:200])
    refused(str(folder), "truncated or damaged")
    (folder / "vocab.json").unlink()
    refused(str(folder), r"no vocab\.json there")


def test_training_goes_on_from_its_own_weights(data: PerturbSeqDataModule, tmp_path: Path) -> None:
    """A checkpoint needs the folder no more, and a second fit does not go back to the published weights."""
    folder = write(tmp_path / "weights", published(flash=True))
    fit(Transformer(paper=True, pretrained=folder, lr=0.05, **SIZES), data, 2, tmp_path)
    for file in Path(folder).iterdir():
        file.unlink()
    loaded: Any = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    trained = loaded.blocks[0].qkv.weight.detach().clone()
    assert not torch.allclose(trained, published(flash=True)["transformer_encoder.layers.0.self_attn.Wqkv.weight"], atol=1e-3)
    fit(loaded, data)
    assert torch.equal(loaded.blocks[0].qkv.weight, trained)


# ---------------------------------------------------------------------- LoRA


def test_lora_leaves_base_weights_untouched(data: PerturbSeqDataModule, adata: Any, tmp_path: Path) -> None:
    """At the start it is the plain model; a fit then adds a matrix of the given rank, and changes nothing below."""
    pytest.importorskip("peft", reason=NEEDS_PEFT)
    state = published(flash=True)
    folder = write(tmp_path / "weights", state)
    torch.manual_seed(0)
    model = Transformer(paper=True, pretrained=folder, lora_rank=2, lr=0.02, **SIZES)
    fit(model, data)
    plain = fit(Transformer(paper=True, pretrained=folder, **SIZES), data)
    names = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name}
    plain.load_state_dict(names)
    assert torch.equal(encoded(plain), encoded(model))

    fit(model, data, 3, tmp_path)
    layer: Any = model.blocks[1].qkv
    assert torch.equal(layer.base_layer.weight, state["transformer_encoder.layers.1.self_attn.Wqkv.weight"])
    first: Any = model.blocks[0]
    assert torch.equal(first.norm1.weight, state["transformer_encoder.layers.0.norm1.weight"])
    added = layer.get_delta_weight("default")
    assert torch.linalg.matrix_rank(added.detach()) == 2
    assert not torch.allclose(encoded(plain), encoded(model), atol=1e-4)
    trained = {name for name, value in model.blocks.named_parameters() if value.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)

    loaded: Any = perturbzoo.load(tmp_path / "checkpoints" / "last.ckpt")
    assert torch.equal(encoded(loaded), encoded(model))
    assert loaded.predict(adata, ["G0"], n_cells=2).shape == (2, 12)


def test_lora_starts_from_a_checkpoint_of_the_zoo(data: PerturbSeqDataModule, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason=NEEDS_PEFT)
    source = fit(Transformer(**SIZES), data, 1, tmp_path)
    copy = Transformer(lora_rank=2, **SIZES)
    copy.initialise_from(str(tmp_path / "checkpoints" / "last.ckpt"))
    fit(copy, data, 1)
    for one, other in zip(copy.blocks, source.blocks, strict=True):
        assert torch.equal(one.qkv.base_layer.weight, other.qkv.weight)  # type: ignore[union-attr]
