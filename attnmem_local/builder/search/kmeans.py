"""k-means: the queries of a KV head, or the entries of a table, in clusters of neighbours."""

import torch

ITERATIONS = 4  # rounds of Lloyd's algorithm, which takes most of the time of a build with many entries


def cluster(x: torch.Tensor, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroids [≤ n, d] of points x [n_x, d], and the cluster of each point int64 [n_x]. No cluster is empty.

    Lloyd's algorithm from a random subset of the points.
    """
    centers = x[torch.randperm(len(x), generator=generator)[:n].sort().values.to(x.device)]
    for _ in range(ITERATIONS):
        nearest, distance = _assign(x, centers)
        centers, count = _means(x, nearest, len(centers))
        empty = (count == 0).nonzero().flatten()
        centers[empty] = x[distance.topk(len(empty)).indices]  # an empty cluster restarts at a point far from all centers
    nearest, _ = _assign(x, centers)
    _, nearest = nearest.unique(return_inverse=True)  # drop clusters that stayed empty
    centroid, _ = _means(x, nearest, int(nearest.max()) + 1)
    return centroid, nearest


def _assign(x: torch.Tensor, centers: torch.Tensor, block: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest center of each point, and the squared distance to it. Small blocks keep the scores in the cache."""
    half_norm, transposed = centers.square().sum(-1) / 2, centers.T.contiguous()
    nearest = torch.cat([torch.addmm(-half_norm, part, transposed).argmax(-1) for part in x.split(block)])
    return nearest, (x - centers[nearest]).square().sum(-1)


def _means(x: torch.Tensor, group: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of x [n_x, d] per group, and the size of each group; zeros where a group is empty."""
    count = torch.bincount(group, minlength=n)
    return x.new_zeros(n, x.shape[1]).index_add_(0, group, x) / count.clamp(min=1)[:, None], count
