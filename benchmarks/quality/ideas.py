"""Ideas for a method of our own, each a merge with one thing changed: names and states, for `quality explore`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

from torch import Tensor

from benchmarks.quality import formulas
from benchmarks.quality.subject import Deltas, Formula, Subject, scaled

States = Callable[[], list[Deltas]]


def ideas(s: Subject) -> Iterator[tuple[str, States]]:
    """(name, the states to measure: one, or one for each task)."""
    yield "base", lambda: [s.base]
    yield "individual", lambda: s.experts
    yield "average", lambda: [s.state(s.apply(formulas.average, [*s.linear, *s.others]))]
    for factor in (0.6, 0.8, 1.0, 1.2, 1.4, 1.6):
        yield f"wudi_flow, scale {factor:g}", lambda f=factor: [s.state(scaled(s.flow, f) | s.averaged)]
    for name, formula in _formulas():
        yield name, lambda f=formula: [s.state(s.apply(f, s.linear) | s.averaged)]
    for name, formula in _convolutions() if s.convolutions else ():
        yield name, lambda f=formula: [s.state(s.flow | s.averaged | s.apply(f, s.convolutions))]
    for one in s.convolutions:
        yield f"{one} by wudi_flow", lambda n=one: [s.state(s.flow | s.averaged | s.apply(formulas.flow, [n]))]
    for name, deltas in _spectra(s):
        yield name, lambda d=deltas: [s.state(d() | s.averaged)]
    yield from _solved_convolutions(s)
    yield from _crests(s)
    for kind, names in _kinds(s).items():
        yield f"each task's own {kind}", lambda n=names: _own(s, n)
    yield from _true_inputs(s)
    yield from _experts(s)


def _formulas() -> Iterator[tuple[str, Formula]]:
    """What may be done with linear weights."""
    for factor in (1.0, 1.25, 1.5, 1.75, 2.0):
        yield f"iso_c, scale {factor:g}", lambda taus, f=factor: f * formulas.isotropic(taus)
    for density in (0.1, 0.3, 0.5):
        yield (
            f"matrix of trimmed task vectors, density {density:g}",
            lambda taus, d=density: formulas.flow(taus, likenesses=[formulas.trimmed(tau, d) for tau in taus]),
        )
    for power in (0.25, 0.5, 0.75, 1.5, 2.0):
        yield (
            f"powers {power:g} of the Gram matrices",
            lambda taus, p=power: formulas.flow(taus, likenesses=[formulas.with_power(tau, p) for tau in taus]),
        )
    for share in (0.5, 1.0):
        yield f"spectrum flattened by {share:g}", lambda taus, b=share: formulas.flattened(formulas.flow(taus), b)
    for power, blend, steps in ((0.0, 0.0, 10), (0.25, 0.0, 30), (0.5, 0.0, 10), (0.5, 0.3, 10), (1.0, 0.0, 10)):
        yield (
            f"two-sided, power {power:g}, identity {blend:g}, {steps} steps",
            lambda taus, p=power, b=blend, n=steps: formulas.two_sided(taus, p, b, n),
        )
    for factor in (0.7, 1.2, 1.4):
        yield (
            f"two-sided, power 0.5, identity 0.3, 10 steps, scale {factor:g}",
            lambda taus, f=factor: f * formulas.two_sided(taus, 0.5, 0.3, 10),
        )
    yield (
        "two-sided, power 0.5, identity 0.3, 10 steps, flattened by 0.5",
        lambda taus: formulas.flattened(formulas.two_sided(taus, 0.5, 0.3, 10), 0.5),
    )


def _spectra(s: Subject) -> Iterator[tuple[str, Callable[[], Deltas]]]:
    """What may be done with singular values, of merged deltas or before."""
    T = len(s.experts)

    def after(deltas: Deltas, change: Callable[[Tensor], Tensor]) -> Deltas:
        return {name: change(X) for name, X in deltas.items()}

    def calibrated(deltas: Deltas, least: float) -> Deltas:
        return {name: formulas.calibrated(X, s.taus[name], least) for name, X in deltas.items()}

    for label, of in (("wudi_flow", lambda: s.flow), ("two-sided", lambda: s.two_sided)):
        for least, word in ((1.0, "1"), (1 / T, "1/T")):
            yield f"{label}, calibrated, at least {word}", lambda d=of, a=least: calibrated(d(), a)
        for means in (1.5, 2.0, 3.0):
            yield (
                f"{label}, capped at {means:g} means",
                lambda d=of, c=means: after(d(), lambda X: formulas.capped(X, c)),
            )
            yield (
                f"{label}, calibrated, capped at {means:g} means",
                lambda d=of, c=means: after(calibrated(d(), 1 / T), lambda X: formulas.capped(X, c)),
            )
    yield "two-sided, raised to 1 mean", lambda: after(s.two_sided, lambda X: formulas.raised(X, 1.0))
    for share in (0.5, 0.75):
        for factor in (1.0, 1.25):
            yield (
                f"two-sided, flattened by {share:g}, scale {factor:g}",
                lambda b=share, a=factor: after(s.two_sided, lambda X: a * formulas.flattened(X, b)),
            )
        yield (
            f"two-sided, calibrated, flattened by {share:g}",
            lambda b=share: after(calibrated(s.two_sided, 1 / T), lambda X: formulas.flattened(X, b)),
        )
    for share in (0.25, 0.5, 0.75):
        yield (
            f"task vectors flattened by {share:g}, two-sided",
            lambda b=share: s.apply(
                lambda taus: formulas.halfway([formulas.flattened(tau, b) for tau in taus], taus), s.linear
            ),
        )


def _solved_convolutions(s: Subject) -> Iterator[tuple[str, States]]:
    """Convolutions from the mean, as long as a task's, with errors beside the task's own change or not."""

    def calibrated(deltas: Deltas) -> Deltas:
        return {name: formulas.calibrated(X, s.taus[name], 1 / len(s.experts)) for name, X in deltas.items()}

    def solved(names: Sequence[str], relative: bool) -> Deltas:
        return s.apply(lambda taus: formulas.as_long_as_a_task(taus, relative), names)

    def capped(deltas: Deltas, means: float) -> list[Deltas]:
        linear = {name: formulas.capped(X, means) for name, X in calibrated(deltas).items()}
        return [s.state(linear | s.averaged | solved(s.convolutions, True))]

    for relative, word in ((False, "absolute"), (True, "relative")):
        for name in s.convolutions:
            yield (
                f"two-sided, {name} by the {word} loss",
                lambda n=name, r=relative: [s.state(s.two_sided | s.averaged | solved([n], r))],
            )
        if not s.convolutions:
            continue
        yield (
            f"wudi_flow, convolutions by the {word} loss",
            lambda r=relative: [s.state(s.flow | s.averaged | solved(s.convolutions, r))],
        )
        for label, of in (("wudi_flow", lambda: s.flow), ("two-sided", lambda: s.two_sided)):
            yield (
                f"{label}, calibrated, convolutions by the {word} loss",
                lambda d=of, r=relative: [s.state(calibrated(d()) | s.averaged | solved(s.convolutions, r))],
            )
    for label, of in (("wudi_flow", lambda: s.flow), ("two-sided", lambda: s.two_sided)):
        for means in (2.0, 3.0, 5.0) if s.convolutions else ():
            yield (
                f"{label}, calibrated, capped at {means:g} means, convolutions by the relative loss",
                lambda d=of, c=means: capped(d(), c),
            )


def _crests(s: Subject) -> Iterator[tuple[str, States]]:
    """Where the spectrum of the calibrated flow is cut, with solved convolutions; what weir was chosen from."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for means in (2.0, 2.5, 3.0):
        changes[f"capped at {means:g} means"] = partial(formulas.capped, means=means)
    for means in (3.0, 4.0, 5.0):
        changes[f"saturated at {means:g} means"] = partial(formulas.saturated, means=means)
    for times in (1.25, 1.5, 1.75, 2.0, 2.5, 3.5, 5.0):
        changes[f"below {times:g} root mean squares"] = partial(formulas.below_crest, times=times)
    changes["not cut"] = lambda X: X

    @cache
    def calibrated() -> Deltas:
        return {name: formulas.calibrated(X, s.taus[name], 1 / len(s.experts)) for name, X in s.flow.items()}

    def state(linear: Deltas) -> list[Deltas]:
        kernels = s.apply(lambda taus: formulas.as_long_as_a_task(taus, True), s.convolutions)
        return [s.state(linear | s.averaged | kernels)]

    for label, change in changes.items():
        yield f"crest: {label}", lambda f=change: state({name: f(X) for name, X in calibrated().items()})
    for times in sorted({1.75, 7 / len(s.experts)}):
        yield (
            f"tempered: below {times:.3g} root mean squares",
            lambda c=times: state({name: formulas.tempered(X, s.taus[name], c) for name, X in s.flow.items()}),
        )


def _experts(s: Subject) -> Iterator[tuple[str, States]]:
    """What such changes do to experts alone, and a scale where linear weights alone are merged."""

    def changed(change: Callable[[Tensor], Tensor]) -> list[Deltas]:
        return [
            expert | _linear(s, {name: change(s.taus[name][place]) for name in s.linear})
            for place, expert in enumerate(s.experts)
        ]

    for factor in (0.8, 1.2, 1.5):
        yield f"individual, linear weights' change times {factor:g}", lambda a=factor: changed(lambda tau: a * tau)
    for share in (0.5, 1.0):
        yield (
            f"individual, linear weights' change flattened by {share:g}",
            lambda b=share: changed(lambda tau: formulas.flattened(tau, b)),
        )
    for factor in (0.8, 1.2, 1.4):
        yield (
            f"each task's own other tensors, wudi_flow, scale {factor:g}",
            lambda a=factor: [expert | _linear(s, scaled(s.flow, a)) for expert in s.experts],
        )


def _linear(s: Subject, deltas: Deltas) -> Deltas:
    merged = s.state(deltas)
    return {name: merged[name] for name in deltas}


def _convolutions() -> Iterator[tuple[str, Formula]]:
    """What may be done with convolutions as matrices, beside averaging them."""
    for time in (30.0, 300.0, 1e6):
        yield f"convolutions by wudi_flow, t = {time:g}", lambda taus, t=time: formulas.flow(taus, t)
    for time in (3.0, 10.0, 30.0, 300.0):
        yield (
            f"convolutions by the flow from the mean, t = {time:g}",
            lambda taus, t=time: formulas.flow(taus, t, start=1 / len(taus)),
        )
    for ridge in (0.3, 3.0, 10.0):
        yield (
            f"convolutions with ridge {ridge:g} to the mean",
            lambda taus, r=ridge: formulas.towards_mean(taus, r),
        )


def _kinds(s: Subject) -> dict[str, list[str]]:
    vectors = [name for name in s.others if s.base[name].ndim == 1]
    norms = [name for name in s.others if "norm" in name.lower()]
    kinds = {
        "linear weights": s.linear,
        "other tensors": s.others,
        "norms": norms,
        "biases": [name for name in vectors if name not in norms],
        "tables": [name for name in s.others if name not in vectors and name not in s.convolutions],
        "convolutions": s.convolutions,
    } | {name: [name] for name in s.convolutions}
    return {kind: names for kind, names in kinds.items() if names}


def _own(s: Subject, names: Sequence[str]) -> list[Deltas]:
    merged = s.state(s.flow | s.averaged)
    return [merged | {name: expert[name] for name in names} for expert in s.experts]


def _true_inputs(s: Subject) -> Iterator[tuple[str, States]]:
    """RegMean, whose matrices are those of true inputs: of validation examples, so a bound and no merge."""

    def solved(names: Sequence[str]) -> Deltas:
        return {name: formulas.regression(s.taus[name], s.moments[name]) for name in names}

    yield "true inputs for linear weights", lambda: [s.state(solved(s.linear) | s.averaged)]
    if s.convolutions:
        yield "true inputs for convolutions", lambda: [s.state(s.flow | s.averaged | solved(s.convolutions))]
        yield "true inputs for both", lambda: [s.state(s.averaged | solved([*s.linear, *s.convolutions]))]
