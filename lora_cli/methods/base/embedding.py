"""embedding: torch.nn.Embedding, a lookup; as a matrix it maps one-hot ids, so W0 is its weight transposed."""

import copy

from torch import Tensor, nn
from torch.nn import functional as F

from lora_cli.adapter.base import Base

wraps = nn.Embedding


class View(Base):
    """W0 [dim, vocabulary] of an nn.Embedding, times the factor that some models (Gemma) put on their embeddings."""

    reads_ids = True

    def __init__(self, module: nn.Embedding) -> None:
        """Look at `module`; nothing is copied."""
        self.module = module
        self.in_features, self.out_features = module.num_embeddings, module.embedding_dim
        # Gemma's subclass multiplies what it looked up; ΔW has to be multiplied the same way.
        self.factor = float(getattr(module, "embed_scale", 1.0))

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        """Look up columns of A."""
        found = F.embedding(x, A.t())
        return found if self.factor == 1.0 else found * self.factor

    @property
    def bias(self) -> Tensor | None:
        """A lookup has none."""
        return None

    def oriented(self, stored: Tensor) -> Tensor:
        """Transposed to [dim, vocabulary]; the factor is not part of it."""
        return stored.t()

    def replaced(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The same kind of embedding, other values."""
        assert bias is None, "an embedding has no bias"
        embedding = copy.copy(self.module)
        embedding._parameters = dict(self.module._parameters)
        embedding.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
        return embedding
