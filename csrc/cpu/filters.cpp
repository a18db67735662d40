// SPDX-License-Identifier: Apache-2.0
// Top-k, top-p and min-p as one threshold on the value, found without sorting the vocabulary. A
// sweep weighs what lies above each of a few edges, by count or by mass; the interval between two
// edges in which the weight is reached is cut again, until what it holds fits a short list, which
// is sorted.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "law.h"

namespace specens {
namespace {

constexpr int kMaxListed = 2048;

// Weights are integers, which makes a sum independent of its order: counts, or masses in this unit.
constexpr double kMassUnit = 0x1p40;

// A decision closer than this part of all mass is made again, with masses that are not rounded to
// single precision.
constexpr double kRoughness = 1e-7;

// The first edges, below the top: for a mass in temperatures, for a count in distances between the
// top and the least of the sub-tiles' maxima. What lies below the first half is weighed only if the
// target is not reached above.
constexpr int kFirstEdges = 2 * kEdges;
constexpr double kMassEdges[kFirstEdges] = {1,  2,  3.5, 5,  6.5, 8,  10, 12,
                                            14, 17, 21,  27, 35,  50, 80, kInfinity};
constexpr double kCountEdges[kFirstEdges] = {0.25, 0.5, 0.75, 1,   1.15, 1.3, 1.5, 1.75,
                                             2,    2.3, 2.7,  3.2, 4,    5,   8,   kInfinity};

// The interval that is listed before anything is weighed.
constexpr double kListedMass = 4;
constexpr double kListedCount = 1;

constexpr double kLowest = -std::numeric_limits<double>::max();

// Values in [low, high).
struct Range {
  double low;
  double high;
};

// Finds the least value v such that the weight above v is less than a target.
class Search {
 public:
  // Values below `floor` are as good as none.
  Search(const WarpedLaw& law, const Team& team, double floor)
      : law_(law), team_(team), floor_(floor) {}

  double kth_largest(int64_t k);
  double nucleus(double p);

 private:
  template <typename Function>
  void visit(const Range& range, const Function& function) const;
  double total() const;
  double descend(const double* edges, double unit, double listed);
  bool within(Range range, double* found);
  bool choose(const double* edges, Range* range);
  void weigh(const double* edges, double high, double* weights) const;
  int64_t list(const Range& range);
  Range extremes(const Range& range) const;
  bool walk(int count, double* found);
  bool reached(double above);

  const WarpedLaw& law_;
  const Team& team_;
  double floor_;
  Weighing weighing_ = Weighing::kCount;
  double target_ = 0.0;
  double above_ = 0.0;
  double margin_ = kInfinity;  // the closest that a decision has come to the target
  double items_[kMaxListed];
};

// Calls function(sub_tile) for each sub-tile that may hold a value in the range.
template <typename Function>
void Search::visit(const Range& range, const Function& function) const {
  team_.for_each(law_.sub_tiles(), 4, [&](int, int64_t index) {
    const int sub_tile = static_cast<int>(index);
    if (law_.upper_bound(sub_tile) >= range.low) function(sub_tile);
  });
}

// The weight of the values in [edge, high) for each of kEdges descending edges.
void Search::weigh(const double* edges, double high, double* weights) const {
  const double unit = weighing_ == Weighing::kCount ? 1.0 : kMassUnit;
  std::atomic<int64_t> sums[kEdges] = {};
  visit({edges[kEdges - 1], high}, [&](int sub_tile) {
    double parts[kEdges];
    law_.weigh(sub_tile, edges, high, weighing_, parts);
    for (int i = 0; i < kEdges; ++i) {
      if (parts[i] == 0.0) continue;
      sums[i].fetch_add(static_cast<int64_t>(parts[i] * unit + 0.5), std::memory_order_relaxed);
    }
  });
  for (int i = 0; i < kEdges; ++i) weights[i] = static_cast<double>(sums[i].load());
}

double Search::total() const {
  double edges[kEdges], weights[kEdges];
  std::fill_n(edges, kEdges, std::max(floor_, kLowest));
  weigh(edges, kInfinity, weights);
  return weights[0];
}

bool Search::reached(double above) {
  margin_ = std::min(margin_, std::abs(above - target_));
  return !(above < target_);
}

// Lists the values of a range; returns how many there are, or some number above kMaxListed.
int64_t Search::list(const Range& range) {
  std::atomic<int64_t> size{0};
  visit(range, [&](int sub_tile) {
    if (size.load(std::memory_order_relaxed) > kMaxListed) return;
    double values[kSubTile];
    const int count = law_.collect(sub_tile, range.low, range.high, values);
    const int64_t begin = size.fetch_add(count, std::memory_order_relaxed);
    for (int64_t i = 0; i < std::min<int64_t>(count, kMaxListed - begin); ++i) {
      items_[begin + i] = values[i];
    }
  });
  return size;
}

Range Search::extremes(const Range& range) const {
  std::vector<Range> found(law_.sub_tiles(), Range{kInfinity, -kInfinity});
  visit(range, [&](int sub_tile) {
    double values[kSubTile];
    const int count = law_.collect(sub_tile, range.low, range.high, values);
    Range& here = found[sub_tile];
    for (int i = 0; i < count; ++i) {
      here = {std::min(here.low, values[i]), std::max(here.high, values[i])};
    }
  });
  Range all = found[0];
  for (const Range& one : found) {
    all = {std::min(all.low, one.low), std::max(all.high, one.high)};
  }
  return all;
}

// Down the listed values, until the target is reached.
bool Search::walk(int count, double* found) {
  std::sort(items_, items_ + count, std::greater<double>());
  double masses[kMaxListed];
  std::copy_n(items_, count, masses);
  std::fill(masses + count, masses + padded(count), -kInfinity);
  if (weighing_ != Weighing::kCount) {
    kernels().score_masses(masses, count, -kInfinity, {law_.top(), 1.0 / law_.temperature(), 0.0});
  }
  for (int i = 0; i < count; ++i) {
    if (reached(above_)) return true;
    *found = items_[i];
    above_ += weighing_ == Weighing::kCount ? 1.0 : masses[i] * kMassUnit;
  }
  return reached(above_);
}

// Narrows the range to the interval in which the target is reached; false if that lies below the
// last edge. Edges descend from the range's high or below.
bool Search::choose(const double* edges, Range* range) {
  double weights[kEdges];
  weigh(edges, range->high, weights);
  const double above = above_;
  for (int i = 0; i < kEdges; ++i) {
    const double here = above + weights[i];
    if (reached(here)) {
      *range = {edges[i], i == 0 ? range->high : edges[i - 1]};
      return true;
    }
    above_ = here;
  }
  return false;
}

// In a range that reaches the target.
bool Search::within(Range range, double* found) {
  for (;;) {
    const int64_t count = list(range);
    if (count <= kMaxListed) return walk(static_cast<int>(count), found);
    const Range inside = extremes(range);
    *found = inside.low;
    if (inside.low == inside.high) return true;
    double edges[kEdges];
    for (int i = 0; i < kEdges; ++i) {
      edges[i] = inside.high - i * ((inside.high - inside.low) / kEdges);
    }
    edges[kEdges - 1] = inside.low;
    if (!choose(edges, &range)) return false;
  }
}

double Search::descend(const double* edges, double unit, double listed) {
  const double top = law_.top();
  double found = top;
  above_ = 0.0;
  margin_ = kInfinity;
  Range range = {std::max(floor_, top - listed * unit), kInfinity};
  const int64_t count = list(range);
  if (count <= kMaxListed) {
    if (walk(static_cast<int>(count), &found)) return found;
    range.high = range.low;
  }
  for (int first = 0; first < kFirstEdges; first += kEdges) {
    double below[kEdges];
    for (int i = 0; i < kEdges; ++i) {
      const double edge = std::max({top - edges[first + i] * unit, floor_, kLowest});
      below[i] = std::min(range.high, edge);
    }
    if (choose(below, &range)) return within(range, &found) ? found : -kInfinity;
    range.high = below[kEdges - 1];
  }
  return -kInfinity;
}

double Search::kth_largest(int64_t k) {
  double least = law_.top();
  for (int s = 0; s < law_.sub_tiles(); ++s) {
    const double held = law_.lower_bound(s);
    if (held > -kInfinity) least = std::min(least, held);
  }
  weighing_ = Weighing::kCount;
  target_ = static_cast<double>(k);
  return descend(kCountEdges, std::max(law_.top() - least, 1e-3), kListedCount);
}

double Search::nucleus(double p) {
  if (!(p > 0.0)) return law_.top();
  const double rough = floor_ > -kInfinity ? std::nan("") : law_.rough_mass() * kMassUnit;
  if (!std::isnan(rough)) {
    weighing_ = Weighing::kRoughMass;
    target_ = p * rough;
    const double found = descend(kMassEdges, law_.temperature(), kListedMass);
    if (margin_ > kRoughness * rough) return found;
  }
  weighing_ = Weighing::kMass;
  target_ = p * total();
  return descend(kMassEdges, law_.temperature(), kListedMass);
}

// The k-th largest of what each sub-tile holds for certain: k values at least reach it.
double floor_for(const WarpedLaw& law, int64_t k) {
  if (k > law.sub_tiles()) return -kInfinity;
  std::vector<double> held(law.sub_tiles());
  for (int s = 0; s < law.sub_tiles(); ++s) held[s] = law.lower_bound(s);
  std::nth_element(held.begin(), held.begin() + (k - 1), held.end(), std::greater<double>());
  return held[k - 1];
}

}  // namespace

double filter_cutoff(const WarpedLaw& law, const Team& team) {
  const Filter& filter = law.filter();
  double lowest = -kInfinity;
  if (law.top() == -kInfinity) return lowest;
  if (filter.top_k > 0) {
    const int64_t k = std::min(filter.top_k, law.vocab_size());
    lowest = Search(law, team, floor_for(law, k)).kth_largest(k);
  }
  if (filter.top_p < 1.0) {
    lowest = std::max(lowest, Search(law, team, lowest).nucleus(filter.top_p));
  }
  if (filter.min_p > 0.0) {
    const double ratio = logarithm(std::min(filter.min_p, 1.0));
    lowest = std::max(lowest, law.top() + law.temperature() * ratio);
  }
  return lowest;
}

}  // namespace specens
