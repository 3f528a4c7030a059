"""HydraAttention: several query branches, one shared key and value head, a learned fusion."""

from torch import Tensor, nn

from linear_vit.attention.layers import Grid, LocalBranch, branch_count, check_tokens
from linear_vit.kernels import linear_attention


def fused(out: Tensor, gate: Tensor) -> Tensor:
    """The learned fusion: branches (B, N, R, D), each times R softmax(gate), of gate (B, N, R)."""
    share = gate.softmax(dim=-1) * gate.shape[-1]
    return out * share.to(out.dtype).unsqueeze(-1)


class HydraAttention(nn.Module):
    """Linear attention of R query branches that share one key and value head, over (B, N, C).

    Branch r has its own subspace of C/R query features; keys and values have C/R features and
    are read by every branch (grouped queries, H = R, Hk = 1):

        o_r  = linear_attention(q_r, k, v)                      r = 0 .. R-1
        out  = projection([R * softmax_r(gate(x)) * o_r])       per token, branches concatenated

    Args:
        dim: C, the embedding dimension.
        hydra_branches: R; must divide dim.
        local_branch: adds a depthwise 3x3 before the output projection. The shared v of C/R
            features is broadcast to the branches, and each of the C channels that result has its
            own filter, so that the branch has 9C weights here as in the other modules.
        backend: a name from ``kernels.BACKENDS``, or None for the fastest usable one.

    Raises:
        ValueError: hydra_branches do not divide dim; at call, x is not (B, rows * cols, dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        hydra_branches: int = 4,
        local_branch: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.branches = branch_count(dim, hydra_branches)
        self.head_dim = dim // self.branches
        self.backend = backend
        # q: C -> C and k, v: C -> C/R each, as one matrix product.
        self.qkv = nn.Linear(dim, dim + 2 * self.head_dim)
        self.gate = nn.Linear(dim, self.branches)
        self.local = LocalBranch(dim) if local_branch else None
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        batch, tokens = check_tokens(x, grid, self.dim)
        packed = self.qkv(x).view(batch, tokens, self.branches + 2, self.head_dim).transpose(1, 2)
        q, k, v = packed.split([self.branches, 1, 1], dim=1)
        out = self.attend(q, k, v).transpose(1, 2)  # (B, N, R, C/R)
        out = fused(out, self.gate(x)).reshape(batch, tokens, self.dim)
        if self.local is not None:
            shared = v.transpose(1, 2).expand(-1, -1, self.branches, -1)
            out = out + self.local(shared.reshape(batch, tokens, self.dim), grid)
        return self.projection(out)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of queries (B, R, N, C/R) and the keys and values (B, 1, N, C/R): as the queries."""
        return linear_attention(q, k, v, backend=self.backend)
