"""Small breaks of the CUDA kernels, each of which the tests on the host must notice."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A small break: ``old`` (in the file exactly once) becomes ``new``."""

    name: str
    file: str
    old: str
    new: str

    @property
    def room(self) -> str:
        """Whose checks notice: a shared header's break shows in any room."""
        room = self.file.split("/")[0]
        return "linear_attention" if room == "cuda" else room


MUTATIONS = (
    Mutation(
        "swap the halves of phi",
        "linear_attention/cuda.cu",
        "phi[0][i] = positive_part(x);",
        "phi[0][i] = negative_part(x);",
    ),
    Mutation(
        "skip dz",
        "linear_attention/cuda.cu",
        "dphi[0][i][j] + dz[feature],",
        "dphi[0][i][j],",
    ),
    Mutation(
        "no barrier before the result's tile",
        "linear_attention/cuda.cu",
        "__syncthreads();  // q has been read: its tile now takes the result",
        "",
    ),
    Mutation(
        "drop the last tile of queries",
        "softmax_attention/cuda.cu",
        "first < a.query_tokens; first += kTile",
        "first + kTile < a.query_tokens; first += kTile",
    ),
    Mutation(
        "taps in reverse",
        "ripple/cuda.cu",
        "sum[e] += weight[tap][e] * x[e];",
        "sum[e] += weight[kTaps - 1 - tap][e] * x[e];",
    ),
)

# For the slow tests.
MORE_MUTATIONS = (
    Mutation(
        "drop the last tile of tokens",
        "linear_attention/cuda.cu",
        "first < chunk_end; first += Tile::kTokens",
        "first + Tile::kTokens < chunk_end; first += Tile::kTokens",
    ),
    Mutation(
        "drop a split",
        "linear_attention/cuda.cu",
        "split < p.num_splits; ++split) sum",
        "split + 1 < p.num_splits; ++split) sum",
    ),
    Mutation(
        "no barrier between tiles",
        "linear_attention/cuda.cu",
        "__syncthreads();  // the tile before has been read",
        "",
    ),
    Mutation(
        "no eps",
        "linear_attention/cuda.cu",
        "E[i] = row_sum(sum) + eps;",
        "E[i] = row_sum(sum);",
    ),
    Mutation(
        "weight of the wrong sign",
        "linear_attention/cuda.cu",
        "const float weight = -(row_sum(dot)",
        "const float weight = (row_sum(dot)",
    ),
    Mutation(
        "one query head of a group",
        "linear_attention/cuda.cu",
        "for (int64_t g = 0; g < p.group; ++g) {",
        "for (int64_t g = 0; g < 1; ++g) {",
    ),
    Mutation(
        "rows of the wrong state",
        "linear_attention/cuda.cu",
        "block.batch * (p.heads / p.group) + block.head / p.group;\n\n",
        "block.batch * (p.heads / p.group) + block.head % (p.heads / p.group);\n\n",
    ),
    Mutation(
        "columns of the wrong lane",
        "linear_attention/cuda.cu",
        "positive[j] = slab.value[f * D + tx + kSide * j];",
        "positive[j] = slab.value[f * D + (tx ^ 1) + kSide * j];",
    ),
    Mutation(
        "gradient at zero's wrong side",
        "linear_attention/cuda.cu",
        "x < 0.0f ? -by_negative : x;",
        "x < 0.0f ? by_negative : x;",
    ),
    Mutation(
        "no edge mask on stores",
        "cuda/common.cuh",
        "if (row >= valid) return;",
        "",
    ),
    Mutation(
        "no edge mask on loads",
        "cuda/common.cuh",
        "if (row < valid) {",
        "if (true) {",
    ),
    Mutation(
        "rows in the wrong lane",
        "cuda/common.cuh",
        "tile[(y + kSide * i) * kPitch + x + kSide * j]",
        "tile[(y * kRows + i) * kPitch + x + kSide * j]",
    ),
    Mutation(
        "half of a row's sum",
        "cuda/common.cuh",
        "for (int lane = kSide / 2; lane > 0; lane /= 2) value +=",
        "for (int lane = kSide / 2; lane > 1; lane /= 2) value +=",
    ),
    Mutation(
        "keys past the end count",
        "softmax_attention/cuda.cu",
        "score[i][j] = tx + kSide * j < valid ? score[i][j] * to_log2 : -kInfinity;",
        "score[i][j] = score[i][j] * to_log2;",
    ),
    Mutation(
        "the sum is not rescaled",
        "softmax_attention/cuda.cu",
        "sum[i] = sum[i] * rescale[i] + row_sum(tile_sum);",
        "sum[i] = sum[i] + row_sum(tile_sum);",
    ),
    Mutation(
        "no delta",
        "softmax_attention/cuda.cu",
        "ds = p * (dp[i][j] - shared.delta[query]) * a.scale;",
        "ds = p * dp[i][j] * a.scale;",
    ),
    Mutation(
        "queries past the end count",
        "softmax_attention/cuda.cu",
        "if (query < valid) {",
        "if (true) {",
    ),
    Mutation(
        "one query head of a group reads",
        "softmax_attention/cuda.cu",
        "head < (block.head + 1) * a.group; ++head",
        "head < block.head * a.group + 1; ++head",
    ),
    Mutation(
        "no barrier before keys are read",
        "softmax_attention/cuda.cu",
        "__syncthreads();\n    float score[B::kPerThread][kTilePerThread], rescale",
        "float score[B::kPerThread][kTilePerThread], rescale",
    ),
    Mutation(
        "no barrier before dS is read",
        "softmax_attention/cuda.cu",
        "__syncwarp();\n    accumulate<D>(dq, one",
        "accumulate<D>(dq, one",
    ),
    Mutation(
        "no barrier between taps",
        "ripple/cuda.cu",
        "__syncthreads();  // the tap before has been read",
        "",
    ),
    Mutation(
        "one warp is left out",
        "ripple/cuda.cu",
        "for (int w = 0; w < kWarps; ++w) total",
        "for (int w = 1; w < kWarps; ++w) total",
    ),
    Mutation(
        "odd tokens weigh as even ones",
        "ripple/cuda.cu",
        "p.pair_weight[along % 2 * p.channels + channel + e]",
        "p.pair_weight[channel + e]",
    ),
    Mutation(
        "odd size keeps its last pair",
        "ripple/cuda.cu",
        "if (row >= p.rows || col >= p.cols) continue;  // an odd size cuts the last pair",
        "",
    ),
    Mutation(
        "stride ignored backward",
        "ripple/cuda.cu",
        "if (row < 0 || col < 0 || row % p.row_stride != 0 || col % p.col_stride != 0) continue;",
        "if (row < 0 || col < 0) continue;",
    ),
)
