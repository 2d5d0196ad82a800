"""Vectors for targets: what lets a model say something about a target it never saw perturbed.

One argument, ``embedding``, is the same for every model that takes it (:func:`understand_embedding` reads it):

- None or ``learned``: none but what a model learns by itself (deep models only);
- ``pca``: :func:`pseudobulk_pca` of the training pseudobulks, for measured targets;
- ``{kind: pca, path: other.h5ad, dimension: 20}``: :func:`screen_pca` of another screen, for the targets perturbed there;
- ``{kind: spectral, graph: [{kind: go, path: gene2go.csv}], dimension: 20}``: :func:`spectral_embedding` of a graph;
- ``vectors.csv`` or ``{kind: table, path: vectors.csv}``: any table (:func:`read_embedding`), as of text, of protein language
  models or of foundation models; a ``dimension`` is the width it must have.

Every mapping also takes ``fill``, for targets without a vector: ``zero`` (a closed-form model predicts the training mean for
them), ``mean`` (the mean vector of the others) or ``error``; and ``fine_tune: true``, with which a deep model adapts the
vectors (:class:`perturbzoo.models.targets.TargetVectors`) instead of their projection alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from scipy import sparse

from perturbzoo.data.datamodule import PerturbSeqDataModule, TrainingPseudobulks
from perturbzoo.data.graph import Graph
from perturbzoo.data.graphs import build_graph, universe
from perturbzoo.data.reading import expand_path
from perturbzoo.data.spec import DataSpec
from perturbzoo.errors import PerturbZooError, PerturbZooWarning, near_matches, shortened

Embedding = Mapping[str, Any] | str | None

# the keys of each kind beside 'fill' and 'fine_tune', and those that must be there
_KEYS = {
    "learned": (),
    "pca": ("path", "dimension", "data"),
    "spectral": ("graph", "dimension"),
    "table": ("path", "dimension"),
}
_NEEDED = {"spectral": "graph", "table": "path"}
_FILLS = {"zero": "zeros (closed-form models: the training mean)", "mean": "the mean vector of the others", "error": ""}
_DENSE_NODES = 1000  # up to here all eigenvectors at once are faster than a few, one by one


def understand_embedding(embedding: Embedding) -> dict[str, Any] | None:
    """Read the argument `embedding` as a mapping with ``kind``, ``fill`` and ``fine_tune``; None for learned vectors alone.

    Raises
    ------
    PerturbZooError
        An unknown kind, key or fill, or a needed key that is missing.
    """
    if isinstance(embedding, str | os.PathLike):
        embedding = {"kind": embedding} if embedding in ("learned", "pca") else {"kind": "table", "path": os.fspath(embedding)}
    wanted = {"kind": "learned"} if embedding is None else embedding
    if not isinstance(wanted, Mapping):
        raise PerturbZooError(f"embedding: expected 'learned', 'pca', the path of a table or a mapping, not {embedding!r}")
    kind = str(wanted.get("kind", ""))
    if kind not in _KEYS:
        raise PerturbZooError(f"embedding: kind '{kind}' is none of {', '.join(_KEYS)}{near_matches(kind, _KEYS)}")
    allowed = ("kind", "fill", "fine_tune", *_KEYS[kind])
    for key in wanted:
        if key not in allowed:
            raise PerturbZooError(
                f"embedding of kind '{kind}': unknown key '{key}'{near_matches(key, allowed)}; it takes {', '.join(allowed[1:])}"
            )
    if kind == "learned":
        return None
    if not wanted.get(needed := _NEEDED.get(kind, "kind")):
        raise PerturbZooError(f"embedding of kind '{kind}': no {needed} was given")
    complete = {"fill": "zero", "fine_tune": False, **wanted}
    if complete["fill"] not in _FILLS:
        raise PerturbZooError(f"embedding: fill '{complete['fill']}' is none of {', '.join(_FILLS)}")
    return complete


def pseudobulk_pca(bulks: TrainingPseudobulks, dimension: int) -> np.ndarray:
    """Scores of the genes on the first principal components of the training pseudobulks.

    Genes are the observations and pseudobulks (training pairs and controls) the variables, as in the bilinear model of
    Ahlmann-Eltze et al. (Nature Methods 2025).

    Parameters
    ----------
    bulks
        The training pseudobulks, log1p-normalised.
    dimension
        Number of components K; fewer where there are fewer pseudobulks.

    Returns
    -------
    Shape ``(G, K)``, float64.
    """
    known = vars(bulks)  # several baselines are fitted on the same pseudobulks, and this is most of the work
    if "principal_scores" not in known:
        profiles = np.concatenate([bulks.control_mean, bulks.mean])
        known["principal_scores"] = _principal_scores(profiles.T, len(profiles))  # of (G, contexts + P)
    return known["principal_scores"][:, :dimension]


def screen_pca(path: str, dimension: int, **reading: Any) -> tuple[list[str], np.ndarray]:
    """Scores of another screen's targets on the first principal components of its pseudobulks.

    Conditions are the observations and their changes from control the variables: targets that did the same there are close,
    as in what Ahlmann-Eltze et al. (Nature Methods 2025) found the best embedding for another cell line. All conditions make
    the components; a target has the mean score of the conditions in which it was perturbed alone.

    Parameters
    ----------
    path
        The other screen.
    dimension
        Number of components K; fewer where there are fewer conditions or genes.
    reading
        Arguments of :class:`~perturbzoo.data.datamodule.PerturbSeqDataModule`, such as ``condition_key``.

    Returns
    -------
    The n targets perturbed alone, and their scores ``(n, K)``, float64.
    """
    print(f"embedding: principal components of {path}")
    try:
        other = PerturbSeqDataModule(path=path, split={"method": "no_test", "val_fraction": 0.0}, **reading)
    except TypeError as error:
        raise PerturbZooError(f"embedding of kind 'pca': 'data' takes arguments of the data module: {error}") from error
    other.setup("fit")
    bulks = other.training_pseudobulks()
    scores = _principal_scores(bulks.delta, dimension)  # (P, K)
    rows: dict[str, list[int]] = {}
    for row, condition in enumerate(bulks.conditions):
        if len(condition) == 1:
            rows.setdefault(condition.targets[0], []).append(row)
    if not rows:
        raise PerturbZooError(f"embedding of kind 'pca': {path} holds no target that was perturbed alone")
    return list(rows), np.stack([scores[chosen].mean(axis=0) for chosen in rows.values()])


def _principal_scores(values: np.ndarray, dimension: int) -> np.ndarray:
    """Scores ``(n, K)`` of n observations ``(n, variables)``, the columns centred."""
    left, singular, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    return _with_fixed_signs(left * singular)[:, :dimension]


def _with_fixed_signs(columns: np.ndarray) -> np.ndarray:
    """A component's sign is arbitrary: fix it so that the same data give the same numbers on every machine."""
    return columns * np.sign(columns[np.abs(columns).argmax(axis=0), np.arange(columns.shape[1])])


def spectral_embedding(graph: Graph, dimension: int) -> tuple[list[str], np.ndarray]:
    r"""Laplacian eigenmaps of a graph (Belkin and Niyogi, Neural Computation 2003), regularised.

    With W the symmetric part of the adjacency, self loops left out and kinds of edges added up, over the n nodes that have
    an edge, and :math:`\tau` their mean degree, the coordinates are the smoothest non-constant solutions of

    .. math:: (D - A) f = \lambda D f, \qquad A = W + \frac{\tau}{n} 1 1^\top, \qquad D = \mathrm{diag}(A 1),

    each scaled to :math:`f^\top D f = 1^\top D 1`. Without :math:`\tau` every small set of nodes apart from the rest would
    take up a coordinate of its own (Zhang and Rohe, NeurIPS 2018).

    Parameters
    ----------
    graph
        Any graph; directions do not count.
    dimension
        Number of coordinates K; fewer where there are fewer nodes.

    Returns
    -------
    The n nodes with an edge, and their coordinates ``(n, K)``, float64.

    Raises
    ------
    PerturbZooError
        The graph has no edge between two nodes.
    """
    source, destination = graph.edge_index.numpy()
    between = source != destination
    weight = graph.edge_weight.double().numpy()[between]
    adjacency = sparse.csr_matrix((weight, (source[between], destination[between])), shape=(len(graph), len(graph)))
    adjacency = (adjacency + adjacency.T) / 2
    connected = np.flatnonzero(np.asarray(adjacency.sum(axis=1)).ravel() > 0)
    n = len(connected)
    if not n:
        raise PerturbZooError("embedding of kind 'spectral': its graph joins no two nodes; lower the threshold or add sources")
    adjacency = adjacency[connected][:, connected]
    degree = np.asarray(adjacency.sum(axis=1)).ravel()
    tau = degree.mean()
    degree = degree + tau
    root = np.sqrt(degree)
    smooth = sparse.diags(1 / root) @ adjacency @ sparse.diags(1 / root)
    # the constant solution, of eigenvalue 1 here, is moved to the other end
    left = np.stack([1 / root, root / np.linalg.norm(root)], axis=1)  # (n, 2)
    right = left * [tau / n, -2.0]
    k = min(dimension, n - 1)
    if n <= _DENSE_NODES:
        _, vectors = np.linalg.eigh(smooth.toarray() + left @ right.T)
    else:
        from scipy.sparse.linalg import LinearOperator, eigsh

        operator = LinearOperator((n, n), matvec=lambda x: smooth @ x + left @ (right.T @ x), dtype=np.float64)
        values, vectors = eigsh(operator, k=k, which="LA", v0=np.random.default_rng(0).normal(size=n))
        vectors = vectors[:, np.argsort(values)]
    coordinates = vectors[:, ::-1][:, :k] / root[:, None] * np.sqrt(degree.sum())
    return [graph.names[node] for node in connected], _with_fixed_signs(coordinates)


def read_embedding(path: str) -> tuple[list[str], np.ndarray]:
    """Read a table of vectors: names and a ``(names, K)`` float64 array.

    CSV, TSV or parquet with the names in the first column, or npz with arrays ``names`` and ``vectors``.

    Raises
    ------
    PerturbZooError
        The file is missing, or is no such table.
    """
    file = expand_path(path)
    if not file.is_file():
        raise PerturbZooError(f"embedding '{file}': no such file; give 'learned', 'pca', the path of a table or a mapping")
    if file.suffix in (".h5ad", ".h5mu"):
        raise PerturbZooError(f"embedding '{file}' is a screen, no table: write {{kind: pca, path: {path}}}")
    try:
        names, vectors = _read_table(file)
    except (ValueError, KeyError, IndexError, OSError, ImportError, BadZipFile) as error:
        reason = f"{error!s:.200}".strip().split("\n")[0]
        raise PerturbZooError(f"embedding '{file}' is no table of names and numbers: {reason}") from error
    if vectors.ndim != 2 or not vectors.shape[1] or len(names) != len(vectors) or not np.isfinite(vectors).all():
        raise PerturbZooError(f"embedding '{file}': expected one finite vector per name, got shape {vectors.shape}")
    if len(set(names)) < len(names):
        raise PerturbZooError(f"embedding '{file}': {len(names) - len(set(names))} names occur more than once")
    if not vectors.any():
        raise PerturbZooError(f"embedding '{file}': all its numbers are 0")
    return names, vectors


def _read_table(file: Path) -> tuple[list[str], np.ndarray]:
    import pandas as pd

    if file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            return [str(name) for name in arrays["names"]], np.asarray(arrays["vectors"], dtype=np.float64)
    if file.suffix == ".parquet":
        table = pd.read_parquet(file)
        table = table if isinstance(table.index[0], str) else table.set_index(table.columns[0])
    else:
        separator = "\t" if ".tsv" in file.name or ".txt" in file.name else ","
        table = pd.read_csv(file, sep=separator, index_col=0)
    return table.index.astype(str).tolist(), table.to_numpy(dtype=np.float64)


def embed_targets(
    embedding: Embedding,
    dimension: int,
    spec: DataSpec,
    bulks: TrainingPseudobulks,
    data: PerturbSeqDataModule | None = None,
    others: Sequence[str] = (),
) -> dict[str, Any]:
    """Vectors for the targets, as tensors for the checkpoint. Targets of the data that have none are named in a warning.

    Parameters
    ----------
    embedding
        The argument of the models; see the head of this file.
    dimension
        Number of components where `embedding` does not say it; the width of a table is its own.
    spec, bulks
        The data.
    data
        Where the training cells come from, which a co-expression graph needs.
    others
        More names to give a row.

    Returns
    -------
    ``extra``: names beyond the spec's targets that have a vector, so that a model can be asked about them, and `others`,
    sorted; for these T in all ``vectors`` ``(T, K)`` float32; ``known`` and ``usable`` ``(T,)`` bool: has a vector of its own;
    that, or the mean of the others; ``fine_tune``.

    Raises
    ------
    PerturbZooError
        There is no vector for any target of the data (or, with ``fill: error``, for one of them), a table is of another width
        than said, `dimension` is no positive number, or `embedding` is ``learned``.
    """
    wanted = understand_embedding(embedding)
    if wanted is None:
        raise PerturbZooError("embedding: a closed-form model learns no vectors: give 'pca', a table or a mapping")
    names, vectors, label = _names_and_vectors(wanted, dimension, spec, bulks, data)
    position = {name: row for row, name in enumerate(names)}
    missing = [target for target in spec.targets if target not in position]
    # without a measured target the components of the training data have nothing to say, which is no fault of the names
    own_pca = wanted["kind"] == "pca" and not wanted.get("path")
    if len(missing) == len(spec.targets) and not own_pca:
        raise PerturbZooError(
            f"embedding '{label}' has no vector for any of the {len(spec.targets)} targets ({shortened(spec.targets)}): "
            "are its names of the same kind (symbols, Ensembl)?"
        )
    if missing:
        said = f"embedding '{label}' has no vector for {len(missing)} of {len(spec.targets)} targets ({shortened(missing)})"
        if wanted["fill"] == "error":
            raise PerturbZooError(f"{said}: add them to it, or set its fill to 'zero' or 'mean'")
        warnings.warn(f"{said}: they get {_FILLS[wanted['fill']]}", PerturbZooWarning, stacklevel=2)
    extra = sorted({*names, *others} - set(spec.targets))
    targets = [*spec.targets, *extra]
    known = np.array([target in position for target in targets])
    filled = np.zeros((len(targets), vectors.shape[1]), dtype=np.float32)
    filled[known] = vectors[[position[target] for target in targets if target in position]]
    usable = known
    if wanted["fill"] == "mean" and len(missing) < len(spec.targets):
        filled[~known] = filled[: len(spec.targets)][known[: len(spec.targets)]].mean(axis=0)
        usable = np.ones_like(known)
    return {
        "extra": extra,
        "vectors": torch.from_numpy(filled),
        "known": torch.from_numpy(known),
        "usable": torch.from_numpy(usable),
        "fine_tune": bool(wanted["fine_tune"]),
    }


def _names_and_vectors(
    wanted: dict[str, Any], dimension: int, spec: DataSpec, bulks: TrainingPseudobulks, data: PerturbSeqDataModule | None
) -> tuple[Sequence[str], np.ndarray, str]:
    """Names and vectors of all that the source knows, and what to call it in a message."""
    path: str = wanted.get("path") or ""
    if wanted["kind"] == "table":
        names, vectors = read_embedding(path)
        width = wanted.get("dimension") or vectors.shape[1]
        if vectors.shape[1] != width:
            raise PerturbZooError(f"embedding '{path}': its vectors have {vectors.shape[1]} numbers, not dimension {width}")
        return names, vectors, path
    dimension = wanted.get("dimension") or dimension
    if dimension < 1:
        raise PerturbZooError(f"dimension is {dimension}: give 1 or more components")
    if wanted["kind"] == "spectral":
        sources = [wanted["graph"]] if isinstance(wanted["graph"], Mapping) else wanted["graph"]
        nodes = {*universe(sources), *spec.targets}
        # the whole graph says more about a target than the part between targets
        measured = any(source["kind"] == "coexpression" for source in sources)
        cells = data.training_cells() if measured and data is not None else None
        order = sorted(nodes | set(spec.genes) if measured else nodes)
        graph = build_graph(sources, order, expression=cells, genes=spec.genes)
        return *spectral_embedding(graph, dimension), "spectral"
    if not path:
        return spec.genes, pseudobulk_pca(bulks, dimension), "pca"
    if data is not None and expand_path(path).resolve() in _files(data):
        raise PerturbZooError(
            f"embedding of kind 'pca': {path} is the screen to learn from, test cells and all; leave out path"
        )
    return *screen_pca(path, dimension, **(wanted.get("data") or {})), path


def _files(data: PerturbSeqDataModule) -> list[Path]:
    """The files of a data module."""
    given = data.hparams["path"] or []
    return [expand_path(path).resolve() for path in ([given] if isinstance(given, str | os.PathLike) else given)]
