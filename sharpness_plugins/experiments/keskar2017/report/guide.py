"""How to read the numbers, and what must not be concluded: the short form, for the page."""

from __future__ import annotations

__all__ = ["CAUTIONS", "HOW_TO_READ"]

HOW_TO_READ = (
    (
        "ε-box sharpness φ [%]",
        "100 (max f(w + e) − f(w)) / (1 + f(w)) over |eᵢ| ≤ ε (|wᵢ| + 1): how far the training loss f can be pushed "
        "up by moving "
        "every weight a little. At a loss near zero it is a rise in hundredths of a nat. The maximum is searched, "
        "not known: "
        "every value is a lower bound, and two solvers are compared by who finds more.",
    ),
    (
        "φ(ε)/φ(ε/2)",
        "4 where the loss is a quadratic within the box, 2 where a slope dominates (no minimum), 1 where the solver "
        "failed or the "
        "loss saturates; above 4 the box reaches where the loss bends up faster than its curvature says.",
    ),
    (
        "random subspaces [%]",
        "the same over 100 random directions, mean over draws. The paper does not give the scale of its directions: "
        "small against large batch can be compared with its Table 4, the values cannot.",
    ),
    (
        "λmax and the density [nats per squared weight]",
        "curvature at the minimum itself, where φ looks as far as the box. For cross-entropy it goes to zero with the "
        "loss: read it at equal training loss only.",
    ),
    (
        "test accuracy, large − small [points]",
        "seed by seed from the same initial weights and data; ± is the standard error of the mean.",
    ),
    ("± in tables and bars in figures", "sample standard deviation over seeds, unless a standard error is named."),
)

CAUTIONS = (
    (
        "Sharpness is a correlate, not a cause.",
        "A larger learning rate can lower it and leave the test accuracy where it was (see the controls), and a "
        "network can be "
        "sharper and test better.",
    ),
    (
        "The loss comes first.",
        "Sharpness and curvature fall as the training loss falls. The paper's protocol does not match losses; where "
        "the order at "
        "equal loss or equal steps is another one, that is the finding.",
    ),
    (
        "Layers can be rescaled.",
        "Multiplying one layer of a ReLU network by a number and dividing the next by it changes φ and λmax at will "
        "and the "
        "function not at all (Dinh et al. 2017, arXiv 1703.04933). Compare networks of one architecture, trained "
        "alike.",
    ),
    (
        "BatchNorm is part of the measurement.",
        "With batch statistics, as in the paper's code, a perturbation is normalized away again; with running "
        "statistics it is not. "
        "The two differ many times over.",
    ),
    (
        "Agreement is a matter of rules.",
        "They stand beside each verdict. Two standard errors over a few seeds are no proof, and twenty claims are "
        "judged at once.",
    ),
    (
        "Orders carry over, values do not.",
        "Unless the network and the data are the paper's, its numbers are there to compare signs and sizes of ratios.",
    ),
)
