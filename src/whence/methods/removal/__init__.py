"""Values of images read from retrained models."""

READERS = (
    "leave_one_out",
    "shapley",
    "beta_shapley",
    "banzhaf",
    "empirical_influence",
    "memorization",
    "datamodel_ridge",
    "datamodel_lasso",
    "kernel_shap",
    "knn_shapley",
)
"""Methods that read retrained models, or labels, and score nothing by themselves: `whence.values`."""
