"""``clean-ft``: fine-tuning on clean images, the undefended baseline."""

from mmtard_bench.train.losses import cross_entropy
from mmtard_bench.train.methods.base import Batch, Loss, Method, Options, mean_terms


def loss(batch: Batch, _: Options) -> Loss:
    """CE(z_S(x), y), with z_S = scale * cosine to the frozen class embeddings, (N, C)."""
    return mean_terms(cross_entropy=cross_entropy(batch.student["clean"].logits, batch.labels))


METHOD = Method(
    name="clean-ft",
    summary="cross-entropy on clean images",
    views=("clean",),
    loss=loss,
)
