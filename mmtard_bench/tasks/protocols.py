"""The named protocols: which threat models belong together, and who defined them."""

from mmtard_bench import registry
from mmtard_bench.types import Eps, Norm, Protocol, Surface, ThreatModel


def _threats(
    names: str, eps: str, norm: Norm = "linf", surface: Surface = "model"
) -> tuple[ThreatModel, ...]:
    return tuple(
        ThreatModel(attack, norm, Eps.parse(radius), surface)
        for radius in eps.split()
        for attack in names.split()
    )


_SURFACES: tuple[Surface, ...] = ("native", "model")  # the latter for images of mixed sizes
_TECOA = "pgd-10 pgd-100 cw-linf-100 autoattack-standard"

for _protocol in (
    Protocol(
        name="mmtard-digits-v1",
        description="the digits world at its native 32 x 32 pixels",
        threats=_threats(
            "pgd-20 cw-linf-20 apgd-pair autoattack-standard autoattack-rand",
            "8/255",
            surface="native",
        )
        + _threats("cw-l2 apgd-pair", "128/255", "l2", "native"),
        samples="drawn from the test part by the suite's seed",
        source="mmtard_bench",
    ),
    Protocol(
        name="mmtard-curve-v1",
        description="robust accuracy against eps: APGD at six radii, from the largest down",
        threats=_threats("apgd-pair", "1/255 2/255 3/255 4/255 6/255 8/255", surface="native"),
        samples="what stood at a larger radius counts as standing at the smaller ones",
        source="mmtard_bench",
    ),
    Protocol(
        name="mmtard-retrieval-v1",
        description="image attacks on image-to-text rank 1; recall at 1, 5, 10 in both directions",
        threats=_threats("pgd-20 apgd-pair", "8/255", surface="native")
        + _threats("pgd-20 apgd-pair", "2/255 4/255"),
        samples="the gallery is made of the drawn samples and their distinct captions",
        source="mmtard_bench",
    ),
    Protocol(
        name="mmtard-text-v1",
        description="up to 2 character edits of the true class's name, alone and with PGD",
        threats=tuple(
            ThreatModel(
                f"text-charmer-k{k}",
                "levenshtein",
                Eps.parse(f"{k}/1", norm="levenshtein"),
                surface,
            )
            for surface in _SURFACES
            for k in range(3)
        )
        + _threats("joint-charmer-k1-pgd-20", "8/255", surface="native")
        + _threats("joint-charmer-k1-pgd-20", "2/255 4/255"),
        samples="drawn by the suite's seed",
        source="mmtard_bench, after Charmer (Abad Rocamora et al., 2024) and LEAF (2025)",
    ),
    Protocol(
        name="robustvlm-v1",
        description="APGD-CE (5 restarts) and targeted APGD-DLR, 100 iterations (two classes: CE)",
        # CIFAR and STL at native resolution, the other data sets at the model's.
        threats=_threats("apgd-pair-5r", "2/255 4/255")
        + _threats("apgd-pair-5r", "2/255 4/255", surface="native"),
        samples="1,000 a data set, 13 data sets, float32, logit scale 100",
        source="RobustVLM (Schlarmann et al., 2024, arXiv 2402.12336), CLIP_benchmark scripts",
    ),
    Protocol(
        name="mmtard-imagenet-v1",
        description="APGD-CE (5 restarts) and targeted APGD-DLR (9 targets), 100 iterations",
        threats=_threats("apgd-pair-5r", "2/255"),
        samples="ImageNet validation, RobustBench's 5,000 images, 80-template ensemble",
        source="MMT-ARD (arXiv 2511.17448) and RobustVLM, CLIP_eval scripts",
    ),
    Protocol(
        name="tecoa-v1",
        description="PGD-10, PGD-100, CW and AutoAttack",
        # CIFAR and STL at native resolution, as above.
        threats=_threats(_TECOA, "1/255") + _threats(_TECOA, "1/255", surface="native"),
        samples="1,000 a data set",
        source="TeCoA (Mao et al., 2023, arXiv 2212.07016), PMG-AFT (Wang et al., 2024)",
    ),
    Protocol(
        name="rb-standard-v1",
        description="AutoAttack standard",
        threats=_threats("autoattack-standard", "8/255", surface="native")
        + _threats("autoattack-standard", "128/255", "l2", "native")
        + _threats("autoattack-standard", "4/255"),
        samples="CIFAR test sets (10,000) or ImageNet validation (5,000)",
        source="RobustBench (Croce et al., 2021, arXiv 2010.09670)",
    ),
):
    registry.protocols.add(_protocol.name, _protocol)
