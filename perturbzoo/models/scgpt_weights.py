"""Published scGPT weights: read from their folder, matched to the measured genes, renamed to the layers of `Transformer`.

A folder holds ``best_model.pt``, a state dict; ``vocab.json``, token to row of the gene embedding; and mostly ``args.json``.
The same numbers of the attention come under two names: ``self_attn.Wqkv.weight`` of flash-attn 1, which the published files
have, and ``self_attn.in_proj_weight`` of PyTorch. The decoders, which were trained for other tasks, are left out, as in the
original's fine-tuning.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perturbzoo.data.reading import expand_path
from perturbzoo.errors import PerturbZooError, shortened

_LISTED = 30  # names in an error


def published_names(layers: int, flash: bool) -> dict[str, str]:
    """The name in our model of each published tensor that a model of that many layers takes, gene embedding excepted.

    Parameters
    ----------
    layers
        Number of blocks.
    flash
        Names of flash-attn (``Wqkv``) rather than of PyTorch (``in_proj_weight``).
    """
    joint = "self_attn.Wqkv." if flash else "self_attn.in_proj_"
    names = {}
    for kind in ("weight", "bias"):
        names[f"encoder.enc_norm.{kind}"] = f"gene_norm.{kind}"
        for part in ("linear1", "linear2", "norm"):
            names[f"value_encoder.{part}.{kind}"] = f"value_encoder.{part}.{kind}"
        for layer in range(layers):
            theirs, ours = f"transformer_encoder.layers.{layer}", f"blocks.{layer}"
            names[f"{theirs}.{joint}{kind}"] = f"{ours}.qkv.{kind}"
            names[f"{theirs}.self_attn.out_proj.{kind}"] = f"{ours}.out_proj.{kind}"
            for part in ("linear1", "linear2", "norm1", "norm2"):
                names[f"{theirs}.{part}.{kind}"] = f"{ours}.{part}.{kind}"
    return names


def read_scgpt(folder: str, layers: int, heads: int) -> tuple[dict[str, Tensor], Tensor, dict[str, int]]:
    """Read a folder of published weights.

    Parameters
    ----------
    folder
        Where ``best_model.pt`` and ``vocab.json`` are; ``$VAR`` is expanded.
    layers, heads
        Of the model that takes them: all their layers, and the same number of heads where ``args.json`` tells it.

    Returns
    -------
    Tensors by our names; the gene embedding, ``(tokens, h)``; and the vocabulary, token to row of it.

    Raises
    ------
    PerturbZooError
        A file is missing or unreadable, the numbers of layers or heads differ, or keys are missing: they are listed.
    """
    place = expand_path(folder)
    for file in ("best_model.pt", "vocab.json"):
        if not (place / file).is_file():
            raise PerturbZooError(
                f"pretrained '{place}': no {file} there; a folder of scGPT weights has best_model.pt and vocab.json"
            )
    try:
        state: Any = torch.load(place / "best_model.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise PerturbZooError(
            f"{place / 'best_model.pt'}: not a readable state dict of tensors (truncated or damaged?)"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise PerturbZooError(f"{place / 'best_model.pt'}: expected a state dict: names and tensors")
    # left by data-parallel training
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    vocabulary = _read_json(place / "vocab.json")
    if not vocabulary or not all(type(row) is int for row in vocabulary.values()):
        raise PerturbZooError(f"{place / 'vocab.json'}: expected an object of tokens and their numbers")
    arguments = _read_json(place / "args.json") if (place / "args.json").is_file() else {}
    if (theirs := arguments.get("nheads", heads)) != heads:
        raise PerturbZooError(f"pretrained '{place}' has {theirs} attention heads, this model {heads}: set heads to {theirs}")
    held = {name.split(".")[2] for name in state if name.startswith("transformer_encoder.layers.")}
    names = published_names(layers, flash=any(".self_attn.Wqkv." in name for name in state))
    missing = [name for name in ("encoder.embedding.weight", *names) if name not in state]
    if missing:
        known = f"; it has {len(held)} layers, this model {layers}" if held and len(held) < layers else ""
        raise PerturbZooError(
            f"{place / 'best_model.pt'} lacks {len(missing)} of scGPT's {len(names) + 1} keys "
            f"({shortened(missing, _LISTED)}){known}"
        )
    if len(held) > layers:
        raise PerturbZooError(f"pretrained '{place}' has {len(held)} layers, this model {layers}: set layers to {len(held)}")
    embedding = state["encoder.embedding.weight"]
    if max(vocabulary.values()) >= len(embedding) or min(vocabulary.values()) < 0:
        raise PerturbZooError(
            f"{place / 'vocab.json'} counts up to {max(vocabulary.values())}, but the embedding has {len(embedding)} rows; "
            "the two files do not belong together"
        )
    return {ours: state[theirs] for theirs, ours in names.items()}, embedding, vocabulary


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise PerturbZooError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise PerturbZooError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


@torch.no_grad()
def take_scgpt_weights(model: nn.Module, folder: str, genes: Sequence[str], heads: int) -> str:
    """Copy published weights into a model; genes that the vocabulary lacks keep their own embeddings.

    The original gives those genes the padding token's embedding, one for all of them.

    Parameters
    ----------
    model
        A built `Transformer`, with or without LoRA.
    folder, heads
        As in :func:`read_scgpt`.
    genes
        Names of the measured genes, symbols as in the vocabulary.

    Returns
    -------
    What was matched, for the user.

    Raises
    ------
    PerturbZooError
        As :func:`read_scgpt`; no gene is in the vocabulary; shapes differ: they are listed.
    """
    tensors, embedding, vocabulary = read_scgpt(folder, len(model.get_submodule("blocks")), heads)  # type: ignore[arg-type]
    found = [gene for gene in genes if gene in vocabulary]
    if not found:
        raise PerturbZooError(
            f"pretrained '{folder}': none of the {len(genes)} measured genes ({shortened(genes)}) is in its vocabulary, which "
            "holds symbols: translate the genes with --data.init_args.gene_table"
        )
    own = dict(model.named_parameters())
    # peft moves a layer's weight into its base_layer
    plain = {name.replace(".base_layer.", "."): parameter for name, parameter in own.items()}
    own_embedding = own["gene_embedding.weight"]
    shapes = {name: (value.shape, plain[name].shape) for name, value in tensors.items()}
    shapes["gene_embedding.weight"] = (embedding.shape[1:], own_embedding.shape[1:])
    differ = [f"{name} {tuple(theirs)} for {tuple(ours)}" for name, (theirs, ours) in shapes.items() if theirs != ours]
    if differ:
        feedforward = tensors["blocks.0.linear1.weight"].shape[0]
        raise PerturbZooError(
            f"pretrained '{folder}' is {embedding.shape[1]} wide with feedforward {feedforward}: set width and feedforward to "
            f"these; shapes that differ: {shortened(differ)}"
        )
    for name, value in tensors.items():
        plain[name].copy_(value)
    row = {gene: position for position, gene in enumerate(genes)}
    theirs = torch.tensor([vocabulary[gene] for gene in found])
    own_embedding[torch.tensor([row[gene] for gene in found], device=own_embedding.device)] = embedding[theirs].to(
        own_embedding
    )
    lacking = [gene for gene in genes if gene not in vocabulary]
    rest = f"; the others start anew: {shortened(lacking)}" if lacking else ""
    return f"scGPT weights from {folder}: {len(found)} of {len(genes)} genes in its vocabulary{rest}"
