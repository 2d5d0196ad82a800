r"""The latent space of an scVI model as the space that cells are moved in.

Lopez et al., Nature Methods 2018, https://doi.org/10.1038/s41592-018-0229-2; encoder and decoder are scvi-tools'
(https://scvi-tools.org). A cell with counts :math:`n` over the genes, of log1p-normalised expression :math:`x`, has

.. math::
    z \sim \mathcal N(0, I), \qquad
    n_g \sim \mathrm{NB}(\ell\, \rho_g(z), \theta_g), \qquad \rho = \mathrm{softmax}(\mathrm{MLP}(z)), \quad
    \ell = \textstyle\sum_g n_g,

and networks are trained on :math:`E_q[-\log p(n \mid z)] + \beta\, \mathrm{KL}(q(z \mid x) \,\|\, p(z))` with
:math:`q(z \mid x) = \mathcal N(m(x), \mathrm{diag}\, v(x))`. The position of a cell is :math:`m(x)`; a position is decoded to
:math:`E[\log(1 + c\, n)]`, the zoo's value space, with the control cell's own :math:`\ell`
(:func:`perturbzoo.models.likelihood.expected_log1p`).

Here and not in the original: the encoder reads normalised values, not log counts, because that is what models of the zoo
predict and predictions must have positions too; layers are normalised within a cell, so that its position depends on no other;
batches of a screen are no input. Trained once, on the training cells and
controls, before the model that moves cells, and frozen then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from perturbzoo.errors import PerturbZooError, near_matches
from perturbzoo.models.latent import CellSpace
from perturbzoo.models.likelihood import expected_log1p, nb_negative_log_likelihood

# of the networks and of their training; scvi-tools' own, but for the number of steps (its 400 epochs are for GPUs)
OPTIONS: dict[str, Any] = {
    "n_hidden": 128,
    "n_layers": 1,
    "dropout": 0.1,
    "kl_weight": 1.0,
    "kl_warmup": 0.4,
    "steps": 4000,
    "batch_size": 128,
    "lr": 1e-3,
    "seed": 0,
}


def understand_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Complete the options of the networks.

    Parameters
    ----------
    options
        ``n_hidden``, ``n_layers``, ``dropout`` of encoder and decoder; ``kl_weight``, and ``kl_warmup``, the share of the steps
        over which it rises from 0; ``steps`` of ``batch_size`` cells with Adam's ``lr``; ``seed`` of all that is drawn.

    Raises
    ------
    PerturbZooError
        An unknown name, or a value out of range.
    """
    given = dict(options or {})
    for name in given:
        if name not in OPTIONS:
            raise PerturbZooError(f"scvi: unknown option '{name}'{near_matches(name, OPTIONS)}; it takes {', '.join(OPTIONS)}")
    complete = {**OPTIONS, **given}
    for name in ("n_hidden", "n_layers", "steps", "batch_size"):
        if not isinstance(complete[name], int) or complete[name] < 1:
            raise PerturbZooError(f"scvi: {name} is {complete[name]}: give a whole number of 1 or more")
    for name in ("dropout", "kl_warmup"):
        if not 0 <= complete[name] < 1:
            raise PerturbZooError(f"scvi: {name} is {complete[name]}: give a share from 0 to below 1")
    for name in ("kl_weight", "lr"):
        if complete[name] <= 0:
            raise PerturbZooError(f"scvi: {name} is {complete[name]}: give a number above 0")
    return complete


class _Networks(nn.Module):
    """Encoder, decoder and dispersions, as they are trained."""

    def __init__(self, n_genes: int, dimension: int, n_hidden: int, n_layers: int, dropout: float) -> None:
        from scvi.nn import DecoderSCVI, Encoder  # seconds, which '--help' has no use for

        super().__init__()
        sizes = {"n_layers": n_layers, "n_hidden": n_hidden, "use_batch_norm": False, "use_layer_norm": True}
        self.encoder = Encoder(n_genes, dimension, dropout_rate=dropout, **sizes)
        self.decoder = DecoderSCVI(dimension, n_genes, **sizes)
        # one dispersion for each gene, no zero inflation: these two layers have nothing to say
        del self.decoder.px_r_decoder, self.decoder.px_dropout_decoder
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes))

    def position(self, centred: Tensor) -> Tensor:
        """The mean m(x) of centred expression ``(..., G)``, ``(..., d)``; the encoder as a whole would draw from it too."""
        return self.encoder.mean_encoder(self.encoder.encoder(centred))

    def share(self, z: Tensor) -> Tensor:
        """Each gene's share of the counts, ``(B, G)``, at ``(B, d)``."""
        return self.decoder.px_scale_decoder(self.decoder.px_decoder(z))

    def loss(self, centred: Tensor, counts: Tensor, kl_weight: float) -> Tensor:
        """Negative evidence bound per cell, of centred expression and counts ``(B, G)``."""
        mean, variance, z = self.encoder(centred)
        kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum()
        log_mean = (self.share(z) + 1e-8).log() + counts.sum(dim=1, keepdim=True).log()
        return (nb_negative_log_likelihood(counts, log_mean, self.log_dispersion) + kl_weight * kl) / len(counts)


def fit_scvi(
    cells: sparse.csr_matrix,
    size: np.ndarray,
    depth: float,
    components: int,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train the networks on the training cells.

    Parameters
    ----------
    cells
        Shape ``(cells, G)``, log1p-normalised.
    size
        Shape ``(cells,)``: their size factors, in counts.
    depth
        Counts that they were scaled to.
    components
        Dimension d of the space.
    options
        See :func:`understand_options`.
    device
        Where to train.

    Returns
    -------
    What :class:`ScVISpace` is made of: ``centre`` ``(G,)``, ``mean`` ``(d,)``, ``scale`` ``()`` and ``spread`` ``(d,)`` as of
    :func:`perturbzoo.models.latent.fit_latent`, ``depth``, ``sizes`` and ``networks``, by name. The same numbers for the same
    cells, options and device, whatever was drawn before.

    Raises
    ------
    PerturbZooError
        There are no counts, or fewer than two cells.
    """
    chosen = understand_options(options)
    if depth <= 0:
        raise PerturbZooError(
            "space 'scvi' needs raw counts, the data hold log1p values only: set space to 'pca' or give a file with counts"
        )
    # a cell without counts of these genes has no likelihood
    filled = np.flatnonzero(np.asarray(cells.sum(axis=1)).ravel() > 0)
    if len(filled) < 2:
        raise PerturbZooError(f"space 'scvi' needs training cells with counts, there are {len(filled)}")
    sizes = {"n_genes": cells.shape[1], "dimension": components}
    sizes |= {name: chosen[name] for name in ("n_hidden", "n_layers", "dropout")}
    centre = torch.as_tensor(np.asarray(cells.mean(axis=0)).ravel(), dtype=torch.float32, device=device)
    scale = torch.as_tensor(size / depth, dtype=torch.float32)
    random = np.random.default_rng(chosen["seed"])
    n_batch = min(chosen["batch_size"], len(filled))
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(chosen["seed"])
        networks = _Networks(**sizes).to(device)
        optimizer = torch.optim.Adam(networks.parameters(), lr=chosen["lr"], weight_decay=1e-6)
        order: np.ndarray = np.empty(0, dtype=np.int64)
        for step in range(chosen["steps"]):
            if len(order) < n_batch:
                order = random.permutation(filled)
            rows, order = order[:n_batch], order[n_batch:]
            expression = torch.from_numpy(cells[rows].toarray()).to(device, torch.float32)
            # what was scaled and logged, taken back; whole numbers again
            counts = (expression.expm1() * scale[rows].to(device)[:, None]).round()
            ramp = min(1.0, (step + 1) / max(1.0, chosen["kl_warmup"] * chosen["steps"]))
            loss = networks.loss(expression - centre, counts, ramp * chosen["kl_weight"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    networks.eval()
    with torch.no_grad():
        parts = np.array_split(filled, max(1, len(filled) // 1024))
        means = [
            networks.position(torch.from_numpy(cells[rows].toarray()).to(device, torch.float32) - centre) for rows in parts
        ]
        position = torch.cat(means)
    variance = position.var(dim=0)
    unit = variance.mean().sqrt().clamp(min=1e-8)
    return {
        "centre": centre.cpu(),
        "mean": position.mean(dim=0).cpu(),
        "scale": unit.cpu(),
        # an axis that the prior has taken must not blow up what is divided by its spread
        "spread": (variance.sqrt() / unit).clamp(min=0.1).cpu(),
        "depth": float(depth),
        "sizes": sizes,
        "networks": {name: value.detach().cpu().clone() for name, value in networks.state_dict().items()},
    }


class ScVISpace(CellSpace):
    """Positions of cells by the trained encoder, and cells at positions by the trained decoder.

    Parameters
    ----------
    fitted
        What :func:`fit_scvi` returned.
    """

    centre: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, fitted: Mapping[str, Any]) -> None:
        super().__init__()
        for name in ("centre", "mean", "scale", "spread"):
            self.register_buffer(name, fitted[name], persistent=False)
        self.depth = fitted["depth"]
        self.networks = _Networks(**{**fitted["sizes"], "dropout": 0.0})  # the same in training mode, then
        self.networks.load_state_dict(fitted["networks"])
        # buffers, not parameters: no optimiser may touch them, and checkpoints hold them with the other prepared tensors
        for module in self.networks.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, value.detach(), persistent=False)

    def encode(self, expression: Tensor) -> Tensor:
        """Expression ``(..., G)`` to position ``(..., d)``."""
        return (self.networks.position(expression - self.centre) - self.mean) / self.scale

    def decode(self, position: Tensor, control: Tensor, size: Tensor) -> Tensor:
        """Expected expression ``(B, G)`` at positions ``(B, d)``; see :class:`CellSpace`."""
        share = self.networks.share(position * self.scale + self.mean)
        factor = (self.depth / size.clamp(min=1e-8)).to(share)
        total = control.clamp(min=0).expm1().sum(dim=1) / factor  # the cell's counts over the genes
        return expected_log1p(share * total[:, None], self.networks.log_dispersion.exp(), factor)
