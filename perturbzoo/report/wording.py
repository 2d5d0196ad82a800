"""How the page defines things. docs/evaluation.md has the formulas and the sources; evaluation.labels has the names."""

from __future__ import annotations

DEFINITIONS = {
    "pearson_delta": "Correlation, over all genes, of the predicted with the observed change from the control mean. Whatever all "
    "perturbations share counts as success.",
    "pearson_delta_perturbed_reference": "Correlation, over all genes, of the predicted with the observed change from the mean of the "
    "training perturbations; predicting that mean scores 0. Predicting no change need not score 0 here: seen from that mean it is the "
    "opposite of what perturbations share, which is right wherever a perturbation does little.",
    "direction_top20_de": "Share of a condition's 20 most differentially expressed genes whose predicted change has the right sign.",
    "mse_top20_de": "Mean squared error over a condition's 20 most differentially expressed genes.",
    "mse_top20_de_no_target": "Mean squared error over these 20 genes without the perturbed genes themselves.",
    "mse": "Mean squared error of the predicted mean expression, over all genes. Most genes do not change, so predicting no change does well.",
    "mae": "Mean absolute error of the predicted mean expression, over all genes.",
    "rmse": "Root of the mean squared error, over all genes.",
    "pds_cosine": "Share of the other conditions that are further from the prediction, by the cosine of changes, than the true one: .5 is chance.",
    "pds_l1": "Share of the other conditions that are further from the prediction, by Manhattan distance, than the true one: .5 is chance.",
    "pds_l2": "Share of the other conditions that are further from the prediction, by Euclidean distance, than the true one: .5 is chance.",
    "de_overlap": "Share of the observed differentially expressed genes that are among as many predicted ones.",
    "de_lfc_spearman": "Rank correlation of log fold changes over the observed differentially expressed genes.",
    "centroid_accuracy": "Share of the other conditions whose mean is further from the prediction than the true one's: .5 is chance.",
    "l2_top1000": "Euclidean distance of the predicted from the observed change over the 1,000 genes most expressed in the controls.",
    "weighted_mse": "Mean squared error, genes weighted by how specific they are for the condition.",
    "weighted_r2_delta": "Weighted R2 of the change from the perturbed mean, the same weights.",
    "variance_recovery": "Variance between predicted conditions over that between observed ones: 0 if all are predicted alike.",
    "cell_variance_recovery": "Variance of the predicted over that of the observed cells of a condition.",
    "e_distance": "Energy distance between predicted and observed cells, unbiased.",
    "mmd": "Squared maximum mean discrepancy between predicted and observed cells, Gaussian kernel, unbiased.",
    "sinkhorn": "Debiased entropic transport cost between predicted and observed cells.",
}

GLOSSARY = {
    "delta": "Mean log1p-normalised expression of a condition's cells minus that of its context's control cells.",
    "floor": "A prediction that needs no model worth the name: no change, the mean of the training perturbations, the sum of the "
    "singles' changes, a ridge regression, the nearest neighbours. One that a model has to beat.",
    "ceiling": "What a repeat of the experiment would score, made from the same cells: one half of a condition's cells for the other, or "
    "its technical duplicate.",
    "interval": "95 % bootstrap over conditions: what another draw of conditions would give, not what another training run would.",
    "over seeds": "Standard deviation of a model's mean from training run to training run.",
    "paired": "Differences are taken condition by condition and then averaged; two intervals that overlap can still belong to a clear difference.",
    "ahead, level, behind": "Ahead: clear of every floor, that is, the interval of the paired difference leaves out 0, and so does a sign-flip "
    "test over conditions (p below .05). Behind: a floor is clear of the model. Level: neither. Not corrected for the number of metrics.",
}
