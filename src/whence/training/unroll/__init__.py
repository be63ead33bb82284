"""Differentiating through training: how a measurement of the trained model moves with the weight of each training image.

    loss_t = 1/(B c) sum_slots w_i f(x_i; theta_t)        c = mean weight, held constant (see `training`)
    s_{t+1} = h(s_t, w),   s = (theta, m, v, ema)         h: gradient, clipping, AdamW or SGD, averaging
    reverse    a_T = df_q/ds_T;   df_q/dw += (dh/dw)^T a_{t+1};   a_t = (dh/ds)^T a_{t+1}       all images, one query
    forward    ds_{t+1} = (dh/ds) ds_t + (dh/dw) dw                                             all queries, one direction

With g = sum_b s_b grad l_b the gradient of a step, h is elementwise in (theta, m, v, ema, g): its derivative is a few
vectors (`slopes`), shared by all queries. What is left is p^T dg for M vectors p, that is H p and <grad l_b, p>: one
backward pass of the gradient, linearised once per step and vectorised over p. H is symmetric, so forward mode is the same
pass, and no operation needs a forward derivative (that of group norm fails on some layouts, and that of layer norm cannot
be differentiated again: torch 2.13).

With curvature "gauss-newton", H is replaced by G = sum_b s_b J_b^T (d2 l_b / d prediction^2) J_b. What it leaves out is
sum_b s_b (dl_b / d prediction) . d2 prediction_b, which has mean zero over the noise where the network predicts as well as
it can: in one step it is noise, which hundreds of steps multiply. The derivative is then no longer that of this very
training, but varies much less from one seed to the next: the better estimate of what happens at other seeds.
With "none", H is 0: what an image did to the weights in a step stays as it was. With SGD that is TracIn along all steps, and
with AdamW TracIn preconditioned by its moments, whose own memory is differentiated.

Images of weight 0 have a slope too. Units: those of the measurement, per unit of weight (1 = the image once). Sources:
Engstrom et al. 2025 (2503.13751), Ilyas & Engstrom 2025 (2504.16430). Differs from released code: noise, order and flips are
keyed by image, the denominator is constant, the optimiser is differentiated by hand, and many queries share one replay.

run        the training, its steps, one step linearised          measured   what is measured of the trained model
slopes     the optimiser's derivative by hand                    memory     what fits in the budget
states     keeping states and computing them again               checks     differences of trainings, smoothness
reverse    all images, few queries                               forward    all queries, few directions
resample   the images' slopes at draws of their own
"""

from whence.training.unroll.checks import Smoothness, finite_difference, smoothness
from whence.training.unroll.forward import sketched, tangent
from whence.training.unroll.measured import Outputs, Queries
from whence.training.unroll.reverse import metagradient
from whence.training.unroll.run import (
    CURVATURES,
    KEEP,
    Differentiation,
    Resample,
    Run,
    Trainer,
    final_weights,
    twin,
)
from whence.training.unroll.states import same_end

__all__ = [
    "CURVATURES",
    "KEEP",
    "Differentiation",
    "Outputs",
    "Queries",
    "Resample",
    "Run",
    "Smoothness",
    "Trainer",
    "final_weights",
    "finite_difference",
    "metagradient",
    "same_end",
    "sketched",
    "smoothness",
    "tangent",
    "twin",
]
