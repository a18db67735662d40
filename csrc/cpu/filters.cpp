// SPDX-License-Identifier: Apache-2.0
// Top-k, top-p and min-p as one threshold on the value, found without sorting: values are counted,
// or their masses added up, in buckets of equal width from the top down; the bucket in which the
// count or the mass is reached is divided again, until what is left in it fits a small array.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>

#include "law.h"

namespace specens {
namespace {

constexpr int kBuckets = 1024;
constexpr int kMaxListed = 1024;

// Where the first buckets end, in nats below the top: there is little mass beyond.
constexpr double kFirstRange = 12.0;

// Masses are added up as integers, which makes the sum independent of the order.
constexpr double kMassUnit = 0x1p40;

struct Bucket {
  uint64_t count;
  uint64_t mass;
};

// Values in [low, high], and how they fall into buckets; lower ones fall into the last one.
struct Range {
  double low;
  double high;

  int bucket(double value) const {
    const double place = (high - value) * (kBuckets / (high - low));
    return place < kBuckets ? static_cast<int>(place) : kBuckets;
  }
};

class Search {
 public:
  // Looks at the values >= floor of `law`.
  Search(const Law& law, const Team& team, double floor) : law_(law), team_(team), floor_(floor) {}

  // The k-th largest value; -inf if there are fewer.
  double kth_largest(int64_t k) { return descend(false, static_cast<double>(k)); }

  // The least value such that the mass above it is less than p of all.
  double nucleus(double p) { return descend(true, p); }

 private:
  double descend(bool by_mass, double target);
  void fill(const Range& range, bool by_mass);
  Range extent(const Range& range, int bucket);
  double resolve(const Range& range, int bucket, bool by_mass, double above, double target);
  template <typename Function>
  void visit(double low, bool by_mass, const Function& function);

  double weight(const Bucket& bucket, bool by_mass) const {
    return static_cast<double>(by_mass ? bucket.mass : bucket.count);
  }

  const Law& law_;
  const Team& team_;
  double floor_;
  Bucket buckets_[kBuckets + 1];
};

// Calls function(thread, values, masses, count) for each sub-tile that may hold a value >= low.
template <typename Function>
void Search::visit(double low, bool by_mass, const Function& function) {
  const Affine law = {law_.top(), 1.0 / law_.temperature(), 0.0};
  team_.for_each(law_.sub_tiles(), 1, [&](int thread, int64_t index) {
    const int s = static_cast<int>(index);
    if (law_.upper_bound(s) < low) return;
    double values[kSubTile];
    double masses[kSubTile];
    law_.values(s, values);
    if (by_mass) {
      std::copy_n(values, padded(law_.count(s)), masses);
      kernels().score_masses(masses, law_.count(s), low, law);
    }
    function(thread, values, masses, law_.count(s));
  });
}

uint64_t to_units(double mass) { return static_cast<uint64_t>(mass * kMassUnit + 0.5); }

void Search::fill(const Range& range, bool by_mass) {
  const int threads = team_.size();
  std::unique_ptr<Bucket[]> all(new Bucket[static_cast<size_t>(threads) * (kBuckets + 1)]());
  visit(floor_, by_mass, [&](int thread, const double* values, const double* masses, int count) {
    Bucket* mine = &all[static_cast<size_t>(thread) * (kBuckets + 1)];
    for (int i = 0; i < count; ++i) {
      if (values[i] < floor_ || values[i] > range.high || values[i] == -kInfinity) continue;
      Bucket& bucket = mine[range.bucket(values[i])];
      ++bucket.count;
      if (by_mass) bucket.mass += to_units(masses[i]);
    }
  });
  std::fill_n(buckets_, kBuckets + 1, Bucket{});
  for (int t = 0; t < threads; ++t) {
    for (int b = 0; b <= kBuckets; ++b) {
      buckets_[b].count += all[static_cast<size_t>(t) * (kBuckets + 1) + b].count;
      buckets_[b].mass += all[static_cast<size_t>(t) * (kBuckets + 1) + b].mass;
    }
  }
}

// The least and the largest value in a bucket.
Range Search::extent(const Range& range, int bucket) {
  const int threads = team_.size();
  std::unique_ptr<Range[]> all(new Range[threads]);
  std::fill_n(all.get(), threads, Range{kInfinity, -kInfinity});
  visit(floor_, false, [&](int thread, const double* values, const double*, int count) {
    Range& mine = all[thread];
    for (int i = 0; i < count; ++i) {
      if (values[i] < floor_ || values[i] > range.high || values[i] == -kInfinity) continue;
      if (range.bucket(values[i]) != bucket) continue;
      mine.low = std::min(mine.low, values[i]);
      mine.high = std::max(mine.high, values[i]);
    }
  });
  for (int t = 1; t < threads; ++t) {
    all[0].low = std::min(all[0].low, all[t].low);
    all[0].high = std::max(all[0].high, all[t].high);
  }
  return all[0];
}

// Walks down the values of a bucket that holds at most kMaxListed.
double Search::resolve(const Range& range, int bucket, bool by_mass, double above, double target) {
  struct Item {
    double value;
    uint64_t mass;
  };
  Item items[kMaxListed];
  std::atomic<int> size{0};
  visit(floor_, by_mass, [&](int, const double* values, const double* masses, int count) {
    for (int i = 0; i < count; ++i) {
      if (values[i] < floor_ || values[i] > range.high || values[i] == -kInfinity) continue;
      if (range.bucket(values[i]) != bucket) continue;
      items[size.fetch_add(1, std::memory_order_relaxed)] = {values[i],
                                                             by_mass ? to_units(masses[i]) : 1};
    }
  });
  std::sort(items, items + size, [](const Item& a, const Item& b) { return a.value > b.value; });
  double least = items[0].value;
  for (int i = 0; i < size && (i == 0 || above < target); ++i) {
    least = items[i].value;
    above += static_cast<double>(items[i].mass);
  }
  return least;
}

double Search::descend(bool by_mass, double target) {
  Range range = {floor_, law_.top()};
  if (floor_ == range.high) return floor_;
  if (floor_ == -kInfinity) {
    const double least = 1e-9 * std::max(1.0, std::abs(range.high));
    range.low = range.high - std::max(least, kFirstRange * law_.temperature());
  }
  double above = 0.0;
  for (bool first = true;; first = false) {
    fill(range, by_mass);
    if (first && by_mass) {
      double total = 0.0;
      for (const Bucket& bucket : buckets_) total += weight(bucket, true);
      target *= total;
    }
    int found = 0;
    for (; found <= kBuckets; ++found) {
      const Bucket& bucket = buckets_[found];
      if (bucket.count > 0 && above + weight(bucket, by_mass) >= target) break;
      above += weight(bucket, by_mass);
    }
    if (found > kBuckets) return -kInfinity;
    if (buckets_[found].count <= kMaxListed) return resolve(range, found, by_mass, above, target);
    const Range inside = extent(range, found);
    if (inside.low == inside.high) return inside.low;
    range = inside;
    floor_ = inside.low;
  }
}

// The k-th largest of what each sub-tile is known to hold: no more than k values lie above it.
double floor_for(const Law& law, int64_t k) {
  if (k > law.sub_tiles()) return -kInfinity;
  std::unique_ptr<double[]> held(new double[law.sub_tiles()]);
  for (int s = 0; s < law.sub_tiles(); ++s) held[s] = law.lower_bound(s);
  std::nth_element(held.get(), held.get() + (k - 1), held.get() + law.sub_tiles(),
                   std::greater<double>());
  return held[k - 1];
}

}  // namespace

double filter_cutoff(const Law& law, const Team& team) {
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
