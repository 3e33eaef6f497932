"""The best settings of a study, to be tried again with other seeds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace

from ..errors import InputError, check, is_whole
from .plan import Plan, Varied
from .record import Record
from .statistics import fewest_seeds
from .summary import Group, summarize, values_of

# A setting is what varies but for the seed.
SETTING = [one.name for one in fields(Varied) if one.name != "seed"]


def confirm(plan: Plan, records: Iterable[Record], seeds: Sequence[int] | None = None, best: int = 1) -> Plan:
    """A plan of the best settings of each norm at each batch size, with seeds that did not choose them.

    The best of many settings looks better than it is on the seeds that it was chosen on. On other seeds a comparison
    of the chosen settings, and its tests, are fair.

    Args:
        plan: of the study that chooses.
        records: its runs.
        seeds: other ones than it had. By default as many as it takes to tell all chosen norms apart, see
            `statistics.fewest_seeds`, from the first that it did not have.
        best: how many settings of each norm and batch size. Those that do not train are left out.

    Raises:
        InputError: a seed was used to choose, or no setting trains.
    """
    before = {trial.seed for trial in plan.trials()}
    used = sorted(before & set(seeds or []))
    check(not used, "seeds", list(seeds or []), f"others than {', '.join(map(str, used))}, which chose the settings")
    check(is_whole(best, 1), "best", best, "a whole number from 1")
    keys = {trial.key for trial in plan.trials()}
    groups = [group for group in summarize(one for one in records if one.key in keys) if group.trains]
    chosen = []
    for size in values_of(groups, "batch_size"):
        for norm in values_of(groups, "norm"):
            mine = [one for one in groups if (one.settings["batch_size"], one.settings["norm"]) == (size, norm)]
            chosen += sorted(mine, key=lambda group: group.rank, reverse=True)[:best]
    if not chosen:
        raise InputError("confirm: no setting of the study trains. Give it other learning rates.")
    settings = [{name: group.settings[name] for name in SETTING} for group in chosen]
    if seeds is None:
        seeds = list(range(max(before) + 1, max(before) + 1 + _enough(chosen)))
    return replace(plan, settings=settings, seeds=list(seeds))


def _enough(chosen: Iterable[Group]) -> int:
    """The fewest seeds that can tell apart all norms of a batch size, at the batch size with the most of them."""
    norms: dict[int, set[str]] = {}
    for group in chosen:
        norms.setdefault(group.settings["batch_size"], set()).add(group.settings["norm"])
    return max(fewest_seeds(math.comb(len(here), 2)) for here in norms.values())
