"""Each loss against a float64 reference written here from its formula, values and gradients."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from mmtard_bench.errors import InputError
from mmtard_bench.train.methods import METHODS, find_method
from mmtard_bench.train.methods.mtard import Balance, robust_weight
from mmtard_bench.train.towers import Head, Output, Patches

N, C, D = 6, 5, 7
GRID, SIZE = (2, 3), (5, 6)
ROLES = ("clean", "robust", "original")
VIEWS = ("clean", "adv")


@dataclass
class Case:
    """Random outputs of a student and of teachers with other embedding widths; one process."""

    labels: Tensor
    student: dict
    teachers: dict
    processes: int = 1
    memory: dict = field(default_factory=dict)
    asked: set = field(default_factory=set)

    def teacher(self, role, view):
        self.asked.add((role, view))
        return self.teachers[role, view]

    def gather(self, rows):
        return rows


@pytest.fixture(params=[0, 1, 2])
def case(request):
    generator = torch.Generator().manual_seed(request.param)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def head(width, scale):
        rows = torch.nn.functional.normalize(draw(C, width), dim=-1)
        return Head(rows.float(), torch.tensor(scale))

    own = head(D, 9.0)
    # The original is the student's own start: it shares its width and its head.
    heads = {"clean": head(D + 2, 12.0), "robust": head(D + 1, 7.0), "original": own}
    widths = {"clean": D + 2, "robust": D + 1, "original": D}

    def output(width, head, *, learns):
        rows, patches = draw(N, width).float(), draw(N, GRID[0] * GRID[1], width).float()
        if learns:
            rows.requires_grad_()
            patches.requires_grad_()
        return Output(rows, head, Patches(patches, GRID, SIZE))

    student = {v: output(D, own, learns=True) for v in VIEWS}
    teachers = {(r, v): output(widths[r], heads[r], learns=False) for r in ROLES for v in VIEWS}
    labels = torch.randint(C, (N,), generator=generator)
    return Case(labels, student, teachers)


# The reference: numpy, float64, loops over samples and classes, nothing of the package.


def cosines(embedding, head):
    rows = []
    for e in embedding:
        norm = np.sqrt(sum(v * v for v in e))
        rows.append([sum(a * b for a, b in zip(e, t, strict=True)) / norm for t in head])
    return np.array(rows)


def softmax(row):
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def divergence(p, q):
    return sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True))


class Reference:
    """The formulas of DESIGN section 7 and of the docstrings, on plain arrays."""

    def __init__(self, case, embeddings, temperature=1.0):
        self.y = case.labels.numpy()
        self.e = {("student", v): embeddings[v] for v in VIEWS}
        self.e |= {k: o.embedding.double().numpy() for k, o in case.teachers.items()}
        models = {"student": case.student["clean"].head}
        models |= {r: case.teachers[r, "clean"].head for r in ROLES}
        self.cos = {
            (m, v): cosines(self.e[m, v], models[m].embeddings.double().numpy())
            for m in models
            for v in VIEWS
        }
        self.z = {
            (m, v): float(models[m].scale) * c / temperature for (m, v), c in self.cos.items()
        }
        self.p = {k: np.array([softmax(row) for row in z]) for k, z in self.z.items()}

    def ce(self, view):
        return np.mean(
            [-np.log(p[y]) for p, y in zip(self.p["student", view], self.y, strict=True)]
        )

    def kl(self, target, view):
        pairs = zip(self.p[target], self.p["student", view], strict=True)
        return np.array([divergence(p, q) for p, q in pairs])

    def clean_ft(self):
        return self.ce("clean")

    def tecoa(self):
        return self.ce("adv")

    def fare(self):
        gaps = self.e["student", "adv"] - self.e["original", "clean"]
        return np.mean([sum(g * g for g in gap) for gap in gaps])

    def pmg_aft(self):
        near = self.kl(("original", "adv"), "adv") + self.kl(("student", "clean"), "adv")
        return self.ce("adv") + near.mean()

    def ard(self):
        return self.kl(("robust", "clean"), "adv").mean()

    def sim_clip(self, frozen):
        total = 0.0
        for one, other in (VIEWS, VIEWS[::-1]):
            for e, f in zip(self.e["student", one], frozen.e["student", other], strict=True):
                total -= sum(e * f) / np.sqrt(sum(e * e) * sum(f * f)) / 2
        return total / N

    def mtard(self, weight=0.5):
        robust = self.kl(("robust", "adv"), "adv").mean()
        clean = self.kl(("clean", "clean"), "clean").mean()
        return weight * robust + (1 - weight) * clean

    def mmt_ard_shipped(self, factors=(50, 5)):
        total = 0.0
        sides = ((factors[0], ("robust", "adv"), "adv"), (factors[1], ("clean", "clean"), "clean"))
        for factor, target, view in sides:
            for i, y in enumerate(self.y):
                for c in range(C):
                    p, q = self.p[target][i, c], self.p["student", view][i, c]
                    total += factor * self.cos[target][i, y] * p * (np.log(p) - np.log(q))
        return total / (N * C)

    def mmt_ard(
        self, *, frozen, weights=True, gate=True, share=0.5, consistency=True, alignment=1.0
    ):
        """``frozen`` is a reference at the same place: weights and gate carry no gradient."""
        still = frozen or self
        sides = {
            "robust": (("robust", "clean"), "adv"),
            "clean": (("clean", "clean"), "clean"),
        }
        robust, clean = (still.kl(*sides[side]) for side in ("robust", "clean"))
        if gate:
            share = 1 / (1 + np.exp(-2 * (robust - clean) / (robust + clean)))
        total = 0.0
        for side, (target, view) in sides.items():
            weight = 2 * share if side == "robust" else 2 * (1 - share)
            if weights:
                trust = np.array([p[y] for p, y in zip(self.p[target], self.y, strict=True)])
                own = still.p["student", view]
                hard = np.array([2 - p[y] for p, y in zip(own, self.y, strict=True)])
                weight = weight * trust * hard / np.mean(trust * hard)
            total += (weight * self.kl(target, view)).mean()
        if consistency:
            columns = zip(self.z["robust", "clean"].T, self.z["student", "adv"].T, strict=True)
            total += alignment * np.mean([divergence(softmax(t), softmax(s)) for t, s in columns])
        return total


def embeddings_of(case):
    return {v: case.student[v].embedding.detach().double().numpy().copy() for v in VIEWS}


def compare(case, name, options, formula, temperature=1.0):
    """The loss and its gradient against the reference and its central differences."""
    method, parsed = find_method(name, options)
    loss = method.loss(case, parsed)
    total = sum(loss.terms.values())
    places = embeddings_of(case)
    here = Reference(case, places, temperature)
    assert total.item() == pytest.approx(float(formula(here)), rel=1e-5)
    views = [v for v in VIEWS if v in method.views]
    gradients = torch.autograd.grad(total, [case.student[v].embedding for v in views])
    for view, gradient in zip(views, gradients, strict=True):
        for index in np.ndindex(N, D):
            if sum(index) % 5:  # one entry in five is enough, and every row has some
                continue
            sides = []
            for step in (1e-5, -1e-5):
                moved = {v: e.copy() for v, e in places.items()}
                moved[view][index] += step
                sides.append(formula(Reference(case, moved, temperature)))
            slope = (sides[0] - sides[1]) / 2e-5
            assert float(gradient[index]) == pytest.approx(slope, rel=2e-4, abs=2e-5)


# They hold part of the loss still, or need patches: below.
OWN_TESTS = {"mmt-ard", "sim-clip", "tga-zsr"}


@pytest.mark.parametrize("name", sorted(set(METHODS) - OWN_TESTS))
def test_a_loss_is_its_formula(case, name):
    compare(case, name, {}, lambda reference: getattr(reference, name.replace("-", "_"))())


def test_mmt_ard_shipped_takes_other_factors(case):
    factors = {"robust_factor": 60, "clean_factor": 7}
    compare(case, "mmt-ard-shipped", factors, lambda r: r.mmt_ard_shipped((60, 7)))


def test_sim_clip_is_its_formula_and_stops_the_gradient_of_one_branch(case):
    still = Reference(case, embeddings_of(case))
    compare(case, "sim-clip", {}, lambda reference: reference.sim_clip(still))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mtard_moves_its_weights_towards_the_loss_that_has_fallen_less(case, temperature):
    here = Reference(case, embeddings_of(case), temperature)
    robust = here.kl(("robust", "adv"), "adv").mean()
    clean = here.kl(("clean", "clean"), "clean").mean()
    # Of the robust loss 80% are left, of the clean one 10%.
    case.memory = {"weight": 0.4, "first_robust": robust / 0.8, "first_clean": clean / 0.1}
    share = 0.8**2 / (0.8**2 + 0.1**2)
    weight = 0.3 * share + 0.7 * 0.4
    options = {"rate": 0.3, "beta": 2.0, "temperature": temperature}
    compare(case, "mtard", options, lambda r: temperature**2 * r.mtard(weight), temperature)
    method, parsed = find_method("mtard", options)
    assert method.loss(case, parsed).memory == pytest.approx(case.memory | {"weight": weight})


def test_mtard_starts_balanced_and_remembers_its_first_losses(case):
    method, options = find_method("mtard", {})
    found = method.loss(case, options)
    here = Reference(case, embeddings_of(case))
    assert found.memory == pytest.approx(
        {
            "weight": 0.5,
            "first_robust": here.kl(("robust", "adv"), "adv").mean(),
            "first_clean": here.kl(("clean", "clean"), "clean").mean(),
        }
    )


def test_the_weights_of_mtard_converge_to_the_shares_of_the_relative_losses():
    weight = 0.5
    for _ in range(1000):
        weight = robust_weight(weight, robust=0.9, clean=0.3, balance=Balance())
    assert weight == pytest.approx(0.75)
    assert robust_weight(0.2, robust=0.0, clean=0.0, balance=Balance(rate=1.0)) == 0.5


def upsampled(grid, size):
    """Bilinear, as ``align_corners=False``: a pixel's centre among the centres of the grid."""
    weights = []
    for count, pixels in zip(grid.shape, size, strict=True):
        rows = np.zeros((pixels, count))
        for pixel in range(pixels):
            place = min(max((pixel + 0.5) * count / pixels - 0.5, 0), count - 1)
            low = min(int(place), count - 1)
            rows[pixel, low] += 1 - (place - low)
            rows[pixel, min(low + 1, count - 1)] += place - low
        weights.append(rows)
    return weights[0] @ grid @ weights[1].T


def attention_maps(tokens, head, labels):
    maps = []
    for image, label in zip(tokens, labels, strict=True):
        norms = np.sqrt((image**2).sum(0))
        products = np.array([(patch / norms) @ head[label] for patch in image[1:]])
        scaled = (products - products.min()) / (products.max() - products.min())
        maps.append(upsampled(scaled.reshape(GRID), SIZE))
    return maps


def test_tga_zsr_is_its_formula(case):
    method, options = find_method("tga-zsr", {"refine": 0.3, "constrain": 0.2})
    labels = case.labels.numpy()
    head = case.student["clean"].head.embeddings.double().numpy()

    def tokens_of(output):
        parts = output.embedding[:, None], output.patches.embeddings
        return torch.cat(parts, dim=1).detach().double().numpy()

    def formula(tokens):
        here = Reference(case, {v: tokens[v][:, 0] for v in VIEWS})
        target, adv, clean = (
            attention_maps(t, head, labels)
            for t in (tokens_of(case.teachers["original", "clean"]), tokens["adv"], tokens["clean"])
        )
        pairs = zip(target, adv, clean, strict=True)
        apart = [
            0.3 * np.sqrt(((a - t) ** 2).sum()) + 0.2 * np.sqrt(((c - t) ** 2).sum())
            for t, a, c in pairs
        ]
        return here.ce("adv") + np.mean(apart)

    total = sum(method.loss(case, options).terms.values())
    places = {v: tokens_of(case.student[v]) for v in VIEWS}
    assert total.item() == pytest.approx(formula(places), rel=1e-5)
    leaves = [(v, part) for v in VIEWS for part in ("embedding", "patches")]
    tensors = [
        case.student[v].embedding if part == "embedding" else case.student[v].patches.embeddings
        for v, part in leaves
    ]
    gradients = torch.autograd.grad(total, tensors)
    for view in VIEWS:
        row, patches = (g for (v, _), g in zip(leaves, gradients, strict=True) if v == view)
        gradient = torch.cat([row[:, None], patches], dim=1)
        for index in np.ndindex(*gradient.shape):
            if sum(index) % 7:
                continue
            sides = []
            for step in (1e-5, -1e-5):
                moved = {v: t.copy() for v, t in places.items()}
                moved[view][index] += step
                sides.append(formula(moved))
            slope = (sides[0] - sides[1]) / 2e-5
            assert float(gradient[index]) == pytest.approx(slope, rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_ard_at_a_temperature_is_its_formula(case, temperature):
    def formula(reference):
        return temperature**2 * reference.ard()

    compare(case, "ard", {"temperature": temperature}, formula, temperature)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("consistency", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mmt_ard_is_its_formula(case, gate, weights, consistency, temperature):
    switches = {"gate": gate, "weights": weights, "consistency": consistency}
    still = Reference(case, embeddings_of(case), temperature)

    def formula(reference):
        return temperature**2 * reference.mmt_ard(frozen=still, **switches)

    compare(case, "mmt-ard", switches | {"temperature": temperature}, formula, temperature)


def test_mmt_ard_takes_a_fixed_share_in_place_of_the_gate(case):
    switches = {"gate": False, "share": 0.8}
    still = Reference(case, embeddings_of(case))
    compare(case, "mmt-ard", switches, lambda r: r.mmt_ard(frozen=still, **switches))


def total_of(case, **switches):
    method, options = find_method("mmt-ard", switches)
    return sum(method.loss(case, options).terms.values()).item()


@pytest.mark.parametrize(
    "switch",
    [
        {"robust_teacher": False},
        {"clean_teacher": False},
        {"weights": False},
        {"gate": False},
        {"consistency": False},
        {"alignment": 2.0},
        {"temperature": 2.0},
    ],
    ids=str,
)
def test_every_switch_of_mmt_ard_changes_the_loss(case, switch):
    assert total_of(case, **switch) != pytest.approx(total_of(case), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mmt_ard_reduced_to_one_teacher_is_ard(case, temperature):
    alone = {"clean_teacher": False, "weights": False, "gate": False, "consistency": False}
    alone["temperature"] = temperature
    method, options = find_method("ard", {"temperature": temperature})
    ard = method.loss(case, options)
    assert total_of(case, **alone) == pytest.approx(ard.terms["kl_robust"].item(), rel=1e-6)
    reduced, switches = find_method("mmt-ard", alone)
    assert reduced.guide(switches).role == method.guide(options).role == "robust"
    assert reduced.targets(switches) == method.targets(options)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_asks_for_what_it_declares(case, name):
    method, options = find_method(name, {})
    case.student = {view: case.student[view] for view in method.views}
    method.loss(case, options)
    assert case.asked == set(method.targets(options)) <= set(method.outputs(options))
    guide = method.guide(options)
    if guide is not None and guide.role is not None:
        assert (guide.role, "clean") in method.outputs(options)


@pytest.mark.parametrize("name", [n for n in METHODS if not METHODS[n].labels])
def test_label_free_methods_ignore_labels(case, name):
    method, options = find_method(name, {})
    before = {k: v.item() for k, v in method.loss(case, options).terms.items()}
    case.labels = torch.full((N,), -1)
    assert {k: v.item() for k, v in method.loss(case, options).terms.items()} == before


def test_weights_and_gate_keep_the_scale_of_the_loss(case):
    method, options = find_method("mmt-ard", {"gate": False})
    for weights in method.loss(case, options).weights.values():
        assert float(weights.mean()) == pytest.approx(1, rel=1e-5)
    method, options = find_method("mmt-ard", {"weights": False})
    weights = method.loss(case, options).weights
    torch.testing.assert_close(weights["robust"] + weights["clean"], torch.full((N,), 2.0))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mmt-adr", {}, "Did you mean mmt-ard"),
        ("ard", {"gate": True}, "'gate' is unknown"),
        ("mmt-ard", {"alignment": -1.0}, "alignment"),
        ("mmt-ard", {"robust_teacher": False, "clean_teacher": False}, "switch one on"),
    ],
)
def test_unknown_methods_and_options_are_refused(name, options, words):
    with pytest.raises(InputError, match=words):
        find_method(name, options)
