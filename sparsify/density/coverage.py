"""Coverage: why weights that a model consumes are dense; what no rule accounts for is an error."""

from collections.abc import Callable, Mapping, Sequence

from passes.weights.reasons import Reason, Why
from passes.weights.sites import Site


def dense_by_rule(sites: Sequence[Site], excluded: Mapping[str, Reason], refuse: Callable[[Site], str]) -> dict[str, Reason]:
    """Say why weights are not masked.

    Args:
        sites: the weights.
        excluded: {parameter name: reason} of those that were asked to stay dense.
        refuse: why a weight cannot have such a mask as the method wants, "" where it can.

    Returns:
        {parameter name: reason}; a weight that is not in it is to be masked.

    Raises:
        ValueError: there is nothing to mask, or it is unknown whether something is a weight.
    """
    if not sites:
        raise ValueError("The model has nothing to mask: no convolution or linear layer consumes a parameter.")
    reasons: dict[str, Reason] = {}
    for site in sites:
        if reason := excluded.get(site.name) or site.problem:
            reasons[site.name] = reason
        elif text := refuse(site):
            reasons[site.name] = Reason(Why.RULE, text)
    for name, reason in reasons.items():
        if reason.why is Why.UNKNOWN:
            raise ValueError(
                f"{name} may be a weight or not: {reason.sentence}. Keep it dense with exclude=[{name!r}], or mask it as it is "
                f"read with include=[{name!r}]."
            )
    if len(reasons) == len(sites):
        raise ValueError(
            f"The model has nothing left to mask: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}. To mask a "
            f"weight all the same, name it in include=[...]."
        )
    return reasons
