"""MiniMax-01's tables: every row runs at a tiny size, every rule judges as it says, larger scales can be built."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import table as reproducer
from experiments.tables.minimax_01 import architecture, arms, cost, length, retrieval, scaling
from research.lm.decoder import Decoder
from research.minimax_01.retrieval import Language, Words

LANGUAGE = Language(length=32, vocab=16, classes=8)
TINY = {
    "scaling": (
        scaling,
        {"language": LANGUAGE, "sizes": ((16, 2), (32, 2)), "steps": 4, "batch": 2, "points": 2},
    ),
    "retrieval": (
        retrieval,
        {"width": 16, "layers": 2, "pairs": (2,), "tested": (2, 3), "queries": 4, "steps": 20, "batch": 2},
    ),
    "architecture": (
        architecture,
        {
            "language": LANGUAGE, "deep": (16, 2, 4), "flat": (16, 2, 4), "experts": 4, "batch": 2,
            "points": 2,
        },
    ),
    "length": (
        length,
        {
            "lengths": (32,), "multiples": (1, 2, 4), "depths": (0.0, 1.0), "width": 16, "layers": 2,
            "steps": 20, "batch": 6, "batches": 1, "rows": 2,
        },
    ),
    "cost": (
        cost,
        {
            "width": 16, "layers": 2, "prompts": (64, 128), "contexts": (64, 128), "rounds": 1, "steps": 2,
            "flat_from": 64,
        },
    ),
}  # fmt: skip


def tiny(name):
    """The table's runs of the CPU scale with every limit lowered."""
    module, changes = TINY[name]
    settings = dataclasses.replace(module.SCALES["cpu"], **changes)
    runs = []
    for run in module.TABLE.scales["cpu"]:
        _, *rest = run.measure.args
        if name == "scaling":
            form, size = rest
            at = scaling.SCALES["cpu"].sizes.index(size)
            if at >= 2:
                continue
            rest = [form, settings.sizes[at]]
        runs.append(
            dataclasses.replace(run, measure=lambda *a, r=rest: module.measure(settings, *r, *a))
        )
    return dataclasses.replace(module.TABLE, scales={"cpu": runs})


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_row_runs(name, tmp_path, monkeypatch):
    """One seed of a tiny size; every claim finds the figures it reads, and the figure is drawn."""
    # Both kinds of layers in two.
    monkeypatch.setitem(arms.MIXERS, "hybrid-3", arms.MIXERS["hybrid-1"])
    table = tiny(name)
    results, origins = reproducer.collect(table, "cpu", [0], tmp_path / "runs", run=True)
    assert set(results) == {run.name for run in table.scales["cpu"]}
    verdicts = {c.number: reproducer.judge(c, results) for c in table.claims}
    missing = "not run" if name == "scaling" else "not resolved"  # its two larger sizes
    assert {v.status for v in verdicts.values()} == {missing}, verdicts
    path = reproducer.write(table, "cpu", results, verdicts, origins, tmp_path / "out")
    assert path.with_suffix(".png").stat().st_size > 10_000


PLANS = [
    (module, scale, arm)
    for module in (retrieval, architecture, length)
    for scale in module.SCALES
    for arm in {
        retrieval: module.SCALES[scale].ratios if module is retrieval else (),
        architecture: architecture.DEEP + architecture.FLAT,
        length: length.ARMS,
    }[module]
]


@pytest.mark.parametrize(
    "module, scale, arm", PLANS, ids=[f"{m.TABLE.name}-{s}-{a}" for m, s, a in PLANS]
)
def test_every_scale_can_be_built(module, scale, arm):
    """Model, task and batch of every row fit each other; nothing is allocated."""
    settings = module.SCALES[scale]
    plan = module.plan(settings, arm)
    built(plan)
    tested = {length: lambda: max(settings.lengths) * max(settings.multiples)}.get(module)
    assert plan.model.max_position >= (tested() if tested else plan.task.length)


@pytest.mark.parametrize("scale", scaling.SCALES)
@pytest.mark.parametrize("form", scaling.FORMS)
def test_every_size_can_be_built(scale, form):
    settings = scaling.SCALES[scale]
    sizes = [built(scaling.plan(settings, form, *size)) for size in settings.sizes]
    assert sizes == sorted(sizes) and sizes[-1] > 8 * sizes[0]


def built(plan):
    """How many parameters the model of a plan has."""
    from research.minimax_01 import retrieval as tasks

    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.eval_shape(lambda k: tasks.batch(plan.task, k, plan.batch), key)
    model = Decoder(plan.model)
    shapes = jax.eval_shape(model.init, key, jnp.zeros((1, 1), jnp.int32))["params"]
    logits = jax.eval_shape(
        lambda p, t: model.apply({"params": p}, t, mutable=["router"])[0], shapes, batch.tokens
    )
    assert logits.shape == (*batch.tokens.shape, plan.model.vocab_size)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_experts_cost_what_the_dense_model_does():
    """Equal arithmetic but for the router, and several times the parameters."""
    from research.lm import costs

    s = architecture.SCALES["cpu"]
    dense, experts = (architecture.model(s, arm) for arm in ("dense", "experts"))
    ratio = costs.training_flops(experts, 128) / costs.training_flops(dense, 128)
    assert 1 < ratio < 1.1
    assert costs.parameters(experts).total > 2 * costs.parameters(dense).total


def seeds(*figures):
    return dict(enumerate(figures))


def test_share_of_compute():
    dense = {"curve": [4.0, 3.0, 2.0, 2.0, 2.0, 2.0], "flops": 6.0}
    fast = {"curve": [3.0, 1.0, 1.0, 1.0, 1.0, 1.0], "flops": 6.0}  # running: 3, 2, 5/3, …
    assert architecture.share_of_compute(fast, dense) == pytest.approx(2 / 6)
    assert architecture.share_of_compute({**fast, "flops": 12.0}, dense) == pytest.approx(4 / 6)
    assert architecture.share_of_compute({"curve": [5.0] * 6, "flops": 6.0}, dense) == 1.0


def curve(form, parameters, compute, loss):
    tokens = [c / parameters for c in compute]
    return {
        "form": form,
        "parameters": parameters,
        "compute": compute,
        "tokens": tokens,
        "loss": loss,
    }


def test_equal_compute():
    """Two sizes cross; the envelope is the lower of the two, and the gap of shifted forms is the shift."""
    grid = np.geomspace(1, 64, 13)

    def form(name, shift, reach=1.0):
        small = curve(name, 1.0, (grid * reach).tolist(), (3 + 0 * grid + shift).tolist())
        large = curve(
            name, 4.0, (4 * grid * reach).tolist(), (4 - 0.5 * np.log(grid) + shift).tolist()
        )
        return {f"{name}-1": seeds(small), f"{name}-2": seeds(large)}

    results = form("softmax", 0.0) | form("hybrid", -0.03) | form("lightning", 0.2)
    at = np.array([2.0, 4 * np.exp(4.0)])
    np.testing.assert_allclose(
        scaling.best_loss(scaling.curves(results, "softmax", 0), at), [3.0, 2.0], atol=0.01
    )
    assert scaling.gap(results, "hybrid", "softmax").value == pytest.approx(-0.03)
    judge = {c.number: c.judge for c in scaling.TABLE.claims}
    assert judge["T2-1"](results).status == "confirmed"
    assert judge["T2-2"](results).status == "refuted"
    assert judge["T2-3"](results).status == "not resolved"  # two sizes make no envelope


def recall(value, solved=1.0):
    return {"recall": value, "solved": solved, "rates": [1, 2]}


@pytest.mark.parametrize(
    "softmax, hybrid, lightning, first, second",
    [
        ([1.0, 1.0, 1.0], [1.0, 0.99, 1.0], [0.2, 0.2, 0.2], "confirmed", "confirmed"),
        ([1.0, 1.0, 1.0], [0.2, 0.2, 0.2], [0.2, 0.2, 0.2], "refuted", "refuted"),
        ([1.0, 1.0, 1.0], [1.0, 0.2, 1.0], [0.2, 0.2, 0.2], "not resolved", "not resolved"),
    ],
)
def test_retrieval_rules(softmax, hybrid, lightning, first, second):
    runs = {"softmax": softmax, "hybrid-1": hybrid, "hybrid-3": hybrid, "lightning": lightning}
    results = {arm: seeds(*map(recall, values)) for arm, values in runs.items()}
    judge = {c.number: c.judge for c in retrieval.TABLE.claims}
    assert judge["F7-1"](results).status == first
    verdict = judge["F7-2"](results)
    assert verdict.status == second
    assert verdict.numbers["softmax: runs solved"] == "6 of 6"


def found(*by_length):
    return {
        "lengths": [64, 128, 256],
        "needle": [[x] * 2 for x in by_length],
        "suite": {"a": by_length},
    }


def test_length_rules():
    results = {
        "softmax": seeds(*[found(1.0, 0.5, 0.2)] * 3),
        "hybrid": seeds(*[found(1.0, 1.0, 0.95)] * 3),
        "hybrid-full-rope": seeds(*[found(1.0, 0.8, 0.7)] * 3),
        "lightning": seeds(*[found(0.9, 0.6, 0.5)] * 3),
    }
    judge = {c.number: c.judge for c in length.TABLE.claims}
    assert {n: j(results).status for n, j in judge.items()} == dict.fromkeys(judge, "confirmed")
    results["hybrid"] = seeds(*[found(1.0, 0.4, 0.1)] * 3)
    assert {n: j(results).status for n, j in judge.items()} == dict.fromkeys(judge, "refuted")
    results["hybrid"] = seeds(*[found(0.5, 0.4, 0.1)] * 3)  # not learnt in the first place
    assert judge["F14"](results).status == "not resolved"


@pytest.mark.parametrize(
    "lightning, softmax, status",
    [(1.0, 4.0, "confirmed"), (4.0, 4.0, "refuted"), (1.0, 1.0, "refuted")],
)
def test_cost_rules(lightning, softmax, status):
    def rows(growth):
        return [[512, 9e-6, 1.0], [1024, 1e-6, 1.0], [4096, growth * 1e-6, 2.0]]

    of = {"softmax": softmax, "hybrid-3": 2.0, "lightning": lightning}
    figures = {arm: {"prefill": rows(x), "decode": rows(x)} for arm, x in of.items()}
    results = {"cost": seeds(*[figures | {"flat_from": 1024}] * 3)}
    for claim in cost.TABLE.claims:
        verdict = claim.judge(results)
        assert verdict.status == status
        assert verdict.numbers["time per token, lightning"].value == pytest.approx(lightning)
        assert verdict.numbers["FLOPs, softmax"] == 2.0


def test_arms():
    model = arms.decoder("hybrid-7", width=64, layers=8, vocab=10)
    assert model.layer_mixers == ("lightning",) * 7 + ("softmax",)
    assert (model.num_heads, model.head_dim, model.rotary_dim) == (4, 16, 8)
    assert model.residual.post_norm and model.residual.mlp[0] == pytest.approx(2.0)
    np.testing.assert_allclose(arms.smoothed([3, 1, 2, 6]), [3, 2, 2, 3])
    assert Words().vocab_size == 51
