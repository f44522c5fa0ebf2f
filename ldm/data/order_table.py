"""Tables of the sources and the aspect buckets of a training set, to be shown before training."""

from __future__ import annotations

from ldm.data.mixture import mixed_order, source_shares
from ldm.data.samples import Samples


def order_table(samples: Samples, batch: int) -> list[str]:
    """Return the lines of the tables; none for a set of one source and one size.

    Args:
        samples: the training set.
        batch: samples of a batch on all ranks.
    """
    return [*_sources(samples), *_buckets(samples, batch)]


def _sources(samples: Samples) -> list[str]:
    if not samples.mixture:
        return []
    lines, first = [f"{'source':>8}{'images':>12}{'share':>9}{'uses of an image in an epoch':>31}"], 0
    for number, (source, share) in enumerate(zip(samples.mixture, source_shares(samples), strict=True), 1):
        images = sum(samples.lengths[first : first + source.files])
        uses = float(share * len(samples) / images)
        lines.append(f"{number:>8}{images:>12,}{float(share):>9.1%}{uses:>31.2f}")
        first += source.files
    return lines


def _buckets(samples: Samples, batch: int) -> list[str]:
    buckets = samples.buckets()
    if buckets is None:
        return []
    lines, counts = [f"{'height x width':>16}{'images':>12}{'batches an epoch':>19}"], buckets.counts()
    small = []
    for number, ((height, width), count) in enumerate(zip(buckets.shapes, counts, strict=True)):
        if count:
            _, share = mixed_order(samples, 0, None, number)
            shape = f"{height} x {width}"
            lines.append(f"{shape:>16}{count:>12,}{float(share * len(samples) / batch):>19.1f}")
            small += [shape] if count < batch else []
    if small:
        lines.append(
            f"  {', '.join(small)}: fewer images than a batch has ({batch}), so a batch contains some of them several times; "
            "a lower data.buckets.max_aspect or a larger step has fewer buckets"
        )
    return lines
