"""What metrics are called wherever people read them: in figures and on the page. Called by plotting and `report`."""

from __future__ import annotations

LABELS = {
    "pearson_delta": "Pearson of delta",
    "pearson_delta_perturbed_reference": "Pearson of delta, perturbed reference",
    "direction_top20_de": "direction, top 20 DE genes",
    "mse_top20_de": "MSE, top 20 DE genes",
    "mse_top20_de_no_target": "MSE, top 20 DE genes, no targets",
    "mse": "MSE, all genes",
    "mae": "MAE, all genes",
    "rmse": "RMSE, all genes",
    "pds_cosine": "discrimination score, cosine",
    "pds_l1": "discrimination score, L1",
    "pds_l2": "discrimination score, L2",
    "centroid_accuracy": "centroid accuracy",
    "variance_recovery": "variance recovery",
    "e_distance": "E-distance",
    "mmd": "MMD",
    "weighted_mse": "weighted MSE",
    "weighted_r2_delta": "weighted R2 of delta",
    "l2_top1000": "L2, 1,000 most expressed genes",
}


def label_of(metric: str) -> str:
    """What a metric is called; its name in words where there is nothing shorter or clearer."""
    return LABELS.get(metric, metric.replace("_", " "))
