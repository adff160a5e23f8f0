// Sum and M2 = Σ(x - mean)² of a channel, from those of its parts, by Chan's formula.

#pragma once

namespace fusedskip::cpu {

// Adds a part of `count` elements to the `seen` before it. What follows from these alone is worked
// out once for all channels: their divisions would take longer than the rest.
struct Merge {
  double count, per_element, per_seen, weight;

  Merge(double seen, double count)
      : count(count),
        per_element(1 / count),
        per_seen(seen > 0 ? 1 / seen : 0),
        weight(seen * count / (seen + count)) {}

  void operator()(double& sum, double& m2, double part_sum, double part_m2) const {
    const double delta = part_sum * per_element - sum * per_seen;
    m2 += part_m2 + delta * delta * weight;
    sum += part_sum;
  }
};

}  // namespace fusedskip::cpu
