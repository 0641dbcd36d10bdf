"""SAM (Foret et al., arXiv 2010.01412, ρ of section 3.1) and Momentum-SAM (Becker et al., arXiv 2401.12033)."""

from __future__ import annotations

from cram_bench.recipes.method import Method

METHODS = {
    "sam": Method("SAM", {"rho": 0.05}),
    "momentum-sam": Method("Momentum-SAM", {"rho": 0.3}),
}
